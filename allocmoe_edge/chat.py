"""The command allocmoe-chat: a chat in the terminal, whose budget can be changed at any time.

allocmoe-chat MODEL [--budget B]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
from pathlib import Path
import random
import re
import signal
import sys
import threading
import time
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple
import warnings

from . import __version__, output_file
from .arguments import (
    add_expert_cache,
    add_gpu,
    add_threads,
    check_gpu,
    check_miss_price,
    n_tokens,
    positive,
    seed,
    speed,
)
from .checked_llama import GenerationError
from .command import CommandError, is_of_chat_template, load_errors, need_model, printable, reason, run_command
from .llama import Budget, Llama
from .plan import share_text
from .terminal import Terminal

_DESCRIPTION = """\
A chat with a model in the terminal. The model keeps its plan until you say otherwise: /budget 0.4 spends 40% of the
experts from the next message on, /compare 0.5 1.0 answers the last message at both budgets."""

_EPILOG = """\
Enter sends a message. A line that ends in a backslash goes on in the next one, and \"\"\" begins a text of several lines,
which ends with the next \"\"\". Ctrl-C stops a reply, Ctrl-D ends the chat. /help lists the commands.

In a pipe every line is a message or a command, and replies and what commands say go to standard output, errors do not:

    echo "Name three colours." | allocmoe-chat model.gguf --budget 0.5 > reply.txt
"""

_HELP = """\
/budget B       from now on: a share (0.4, 40%), a total of expert activations per token (96), or fast, balanced or full
/budget         which one it is
/compare B ...  answers the last message at each of these budgets; the chat itself goes on as it was
/stats          what the last reply spent, in all and in each layer, and how fast it was
/save FILE      writes the chat to a file
/load FILE      goes on with the chat in a file
/reset          forgets the chat
/help           this
/quit           ends the program, as Ctrl-D does

A line that ends in \\ goes on in the next one; \"\"\" begins and ends a text of several lines. Ctrl-C stops a reply.
A message that begins with a slash: put a space before it."""

Messages = List[Dict[str, str]]

# of a file that /load reads: more than any context holds
_MAX_FILE = 64 << 20
_ROLES = ("system", "user", "assistant")


class Reply(NamedTuple):
    """What is known of a reply: its text, whether and how it ended early, what it spent."""

    text: str
    ended: str  # "stop" where the model has said all, else why it ends there
    n_tokens: int
    seconds_to_first: float
    tokens_per_second: float
    budget: Optional[str]
    activations: List[float]  # a generated token's, per layer; empty for a model without experts
    n_context: int  # tokens of the context that it came to


def _without_oldest(messages: Messages) -> Messages:
    """Up to the next one of the user's."""
    left = messages[1:]
    while left[0]["role"] != "user" and len(left) > 1:
        left = left[1:]
    return left


class Chat:
    """A conversation.

    Args:
        system: the message at its head; None for none.
        max_tokens: of a reply; None for as many as there is place for.
        options: of `Llama.create_chat_completion`.
    """

    def __init__(
        self, llm: Llama, terminal: Terminal, system: Optional[str], max_tokens: Optional[int], **options: Any
    ):
        self._llm, self._terminal, self._options, self._max_tokens = llm, terminal, options, max_tokens
        self._head: Messages = [{"role": "system", "content": system}] if system else []
        self._own_head = self._head
        self._messages: Messages = []
        self._last: Optional[Reply] = None
        self._stopping = self._reading = False

    def run(self) -> bool:
        """To the end of the input. A line that cannot be answered is one line of error, and no end.

        Returns:
            Whether every line of a pipe was answered.
        """
        good = True
        for text in self._terminal.messages():
            try:
                if text.startswith("/"):
                    if self._command(text.strip()):
                        break
                else:
                    self._ask(text.strip("\n"))
            except BrokenPipeError:  # nobody reads on
                raise
            except Exception as error:
                # a ValueError is what llama-cpp-python, or the model's template, has against these messages
                if is_of_chat_template(error):
                    error = CommandError(f"{self._llm.model_path}: its chat template: {error}")
                elif isinstance(error, ValueError):
                    error = CommandError(error)
                self._terminal.warn(f"error: {reason(error)}")
                good = self._terminal.interactive
        return good

    # messages

    def _ask(self, text: str) -> None:
        message = {"role": "user", "content": text}
        messages, self._last = self._answer([*self._messages, message])
        # a template may want user and assistant in turn: without an answer there was no question
        if self._last.text:
            self._messages = [*messages, {"role": "assistant", "content": self._last.text}]

    def _answer(self, messages: Messages, budget: Optional[Budget] = None) -> Tuple[Messages, Reply]:
        """Prints the reply to the last message as it comes.

        Returns:
            The messages that it is a reply to, without those that the context has no place for; the reply.
        """
        n_ctx, n_all = self._llm.n_ctx(), len(messages)
        if self._length(messages) > n_ctx - min(self._max_tokens or n_ctx // 4, n_ctx // 2):
            # so much that it is not the same at the next message: what is left is computed anew
            while len(messages) > 1 and self._length(messages) > n_ctx // 2:
                messages = _without_oldest(messages)
        while True:
            try:
                reply = self._stream(messages, budget, n_all - len(messages))
                return messages, reply
            except ValueError as error:
                if "exceed context window" not in str(error):
                    raise
            if len(messages) == 1:
                raise CommandError(
                    f"this does not fit into the context of {n_ctx} tokens; --ctx-size N makes it larger"
                )
            messages = _without_oldest(messages)

    def _length(self, messages: Messages) -> int:
        """Tokens, about: what a template writes around each message is not known here."""
        texts = [message["content"] for message in self._head + messages]
        return sum(8 + len(self._llm.tokenize(text.encode(), add_bos=False)) for text in texts)

    def _stream(self, messages: Messages, budget: Optional[Budget], n_left_out: int) -> Reply:
        llm, ended = self._llm, "stopped"
        parts: List[str] = []
        before = llm.expert_stats()["decode"]
        begin = first = time.perf_counter()
        with self._stoppable():
            chunks = llm.create_chat_completion(
                self._head + messages, stream=True, budget=budget, max_tokens=self._max_tokens, **self._options
            )
            with contextlib.closing(chunks):
                for i, chunk in enumerate(chunks):
                    if i == 0 and n_left_out:
                        self._terminal.warn(
                            f"({n_left_out} of the oldest messages do not fit into the context any more)"
                        )
                    choice = chunk["choices"][0]
                    part = choice["delta"].get("content") or ""
                    if part and not self._reading:
                        first, self._reading = time.perf_counter(), True
                    parts.append(part)
                    self._terminal.write(part)
                    if choice["finish_reason"]:
                        ended = choice["finish_reason"]
                    if self._stopping:
                        break
        seconds = time.perf_counter() - first
        self._terminal.end_line()
        text = "".join(parts)
        if ended == "length":
            ended = "the context is full" if llm.n_tokens >= llm.n_ctx() - 1 else "cut off"
        n_computed = n_tokens = len(llm.tokenize(text.encode(), add_bos=False))
        activations: List[float] = []
        if llm.plan is not None:
            after = llm.expert_stats()["decode"]
            tokens = after["tokens"] - before["tokens"]
            n_computed = int(tokens.max())
            activations = list((after["activations"] - before["activations"]) / tokens.clip(1))
        rate = n_computed / seconds if seconds else 0.0
        shown = self._budget() if budget is None else str(budget)
        reply = Reply(text, ended, n_tokens, first - begin, rate, shown, activations, llm.n_tokens)
        self._terminal.note(f"({summary(reply)})")
        return reply

    @contextlib.contextmanager
    def _stoppable(self) -> Iterator[None]:
        """Ctrl-C ends the reply: after the token that is being computed, or in the middle of the prompt."""
        self._stopping = self._reading = False

        def stop(number, frame):
            if not self._reading:
                raise KeyboardInterrupt
            self._stopping = True

        here = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGINT, stop) if here and self._terminal.interactive else None
        try:
            yield
        except KeyboardInterrupt:
            if before is None:
                raise
            self._llm.clear_cache()  # whatever was being done to it
        finally:
            if before is not None:
                signal.signal(signal.SIGINT, before)

    # commands

    def _command(self, text: str) -> bool:
        """Whether it ends the chat."""
        name, *arguments = re.sub(r"\s+%", "%", text).split()
        if name in ("/quit", "/exit"):
            return True
        command = self.commands().get(name)
        if command is None:
            raise CommandError(f"{name}: no such command; /help lists them")
        if name in ("/save", "/load"):  # a name may have spaces
            arguments = [text[len(name) :].strip()] if arguments else []
            if not arguments:
                raise CommandError(f"{name} wants the name of a file")
        elif arguments and name not in ("/budget", "/compare"):
            raise CommandError(f"{name} takes nothing more")
        command(*arguments)
        return False

    def commands(self) -> Dict[str, Callable]:
        return {
            "/budget": self._set_budget,
            "/compare": self._compare,
            "/stats": self._stats,
            "/save": self._save,
            "/load": self.load,
            "/reset": self._reset,
            "/help": lambda: self._terminal.print(_HELP),
        }

    def _budget(self) -> Optional[str]:
        plan = self._llm.plan
        return plan and share_text(plan.budget)

    def _set_budget(self, *budget: str) -> None:
        if len(budget) > 1:
            raise CommandError("/budget takes one budget; /compare takes several")
        if budget:
            self._llm.set_budget(budget[0])
        plan = self._llm.plan
        self._terminal.print(str(plan) if plan else "a model without experts: there is no budget to choose")

    def _compare(self, *budgets: str) -> None:
        asked = [i for i, message in enumerate(self._messages) if message["role"] == "user"]
        if not asked:
            raise CommandError("/compare answers the last message: there is none yet")
        if not budgets:
            raise CommandError("/compare wants budgets, for example: /compare 0.5 1.0")
        for budget in budgets:  # all of them, before the first is answered
            self._llm.budget_total(budget)
        options = self._options
        if self._options.get("seed") is None:
            self._options = {**options, "seed": random.randrange(2**31)}  # the budget is to be the only difference
        try:
            for budget in budgets:
                # a prompt out of the cache is computed in other batches, whose rounding can end in other words
                self._llm.clear_cache()
                self._terminal.print(f"at budget {budget}:")
                _, reply = self._answer(self._messages[: asked[-1] + 1], budget)
                if reply.ended == "stopped":
                    return
        finally:
            self._options = options

    def _stats(self) -> None:
        if self._last is None:
            raise CommandError("/stats is about the last reply: there is none yet")
        reply, plan, say = self._last, self._llm.plan, self._terminal.print
        say(summary(reply))
        used = f"{reply.n_context} of {self._llm.n_ctx()} tokens of context used"
        say(f"first token after {reply.seconds_to_first:.2f} s; {used}")
        if plan is not None:
            bars = self._terminal.bars(reply.activations, plan.expert_used_count_full)
            say(f"in force: {plan}")
            say(f"experts per generated token, layer by layer: {bars}")

    def _save(self, name: str) -> None:
        path = Path(os.path.expanduser(name))
        output_file.check(path)
        if path.is_file() and path.stat().st_size:
            read_chat(path)  # another file than a chat is not written over
        chat = {"messages": self._head + self._messages}
        output_file.write(path, (json.dumps(chat, ensure_ascii=False, indent=1) + "\n").encode())
        self._terminal.note(f"({len(self._messages)} messages saved)")

    def load(self, name: str) -> None:
        messages = read_chat(Path(os.path.expanduser(name)))
        n_head = int(bool(messages) and messages[0]["role"] == "system")
        if n_head and self._own_head and messages[:1] != self._own_head:
            self._terminal.warn("(the system message in the file takes the place of --system)")
        self._head, self._messages = messages[:n_head] or self._own_head, messages[n_head:]
        self._last = None
        self._terminal.note(f"({len(self._messages)} messages)")

    def _reset(self) -> None:
        self._messages, self._last = [], None
        self._terminal.note("(a new chat)")


def summary(reply: Reply) -> str:
    """A reply's figures in a line."""
    parts = [] if reply.budget is None else [f"budget {reply.budget}"]
    parts.append(f"{reply.n_tokens} tokens")
    if reply.tokens_per_second:
        parts.append(f"{reply.tokens_per_second:.1f} tokens/s")
    if any(reply.activations):
        parts.append(f"{sum(reply.activations):.1f} activations per token")
    if reply.ended != "stop":
        parts.append(reply.ended)
    return ", ".join(parts)


def read_chat(path: Path) -> Messages:
    """The messages of a file that /save has written, or another program: {"messages": [{"role": ..., "content": ...}, ...]}.

    Raises:
        CommandError: it is no such file.
    """
    if path.is_file() and path.stat().st_size > _MAX_FILE:
        raise CommandError(f"{path}: is no chat: more than {_MAX_FILE >> 20} MB")
    if path.exists() and not path.is_file():
        raise CommandError(f"{path}: is no file")
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise CommandError(f"{path}: is no chat: not JSON") from None
    except OSError as error:  # one of reading names no file
        raise CommandError(f"{path}: {error.strerror}") from None
    messages = found.get("messages") if isinstance(found, dict) else None
    if not isinstance(messages, list):
        raise CommandError(f'{path}: is no chat: want an object with "messages"')
    for i, message in enumerate(messages):
        fits = isinstance(message, dict) and isinstance(message.get("content"), str)
        if not fits or message.get("role") not in _ROLES or (message["role"] == "system" and i > 0):
            raise CommandError(
                f"{path}: message {i + 1}: want role and content, both text; the role is user or assistant, or system in the first"
            )
    # a surrogate alone is JSON and no text
    return [{"role": m["role"], "content": m["content"].encode("utf-8", "replace").decode()} for m in messages]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="allocmoe-chat",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("model", metavar="MODEL", help="GGUF file; the first one if the model is split")
    p.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    spend = p.add_mutually_exclusive_group()
    spend.add_argument(
        "--budget", metavar="B",
        help="a share (0.5, 50%%), a total of activations per token, or fast, balanced or full. Default: the plan in the file",
    )  # fmt: skip
    spend.add_argument(
        "--target-tps", type=speed, metavar="N",
        help="the largest budget at which this machine generates N tokens/s, measured first, reads of experts included",
    )  # fmt: skip
    p.add_argument("--plan", metavar="FILE", help="a side file with the plans, as allocmoe-convert --plan-only writes")
    p.add_argument("--system", metavar="TEXT", help="what the model is told before the chat")
    p.add_argument("--load", metavar="FILE", help="go on with a chat that /save has written")
    p.add_argument(
        "--ctx-size", type=n_tokens, default=4096, metavar="N",
        help="tokens of context; 0 for what the model was trained with. Where a chat grows beyond it the oldest messages are "
        "forgotten. Default: %(default)s",
    )  # fmt: skip
    p.add_argument(
        "--max-tokens", type=positive, metavar="N", help="of a reply. Default: as many as there is place for"
    )
    p.add_argument(
        "--temperature",
        type=_temperature,
        default=0.7,
        metavar="T",
        help="0 for the likeliest token always. Default: %(default)s",
    )
    p.add_argument("--seed", type=seed, metavar="N", help="the same replies every time")
    p.add_argument("--no-repack", action="store_true", help="leave the weights as the file has them: less memory")
    add_expert_cache(p)
    add_threads(p)
    add_gpu(p)
    return p


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text[:40]}: want a number from 0 to 100")
    return value


def main(argv: Optional[Sequence[str]] = None) -> int:
    return run_command(parser(), _chat, argv)


def _chat(args: argparse.Namespace) -> None:
    check_gpu(args)
    need_model(args.model, "pass it as --plan, beside the model's own file")
    with load_errors(args.model), warnings.catch_warnings():
        # of a context that the model is too short for, as it may be by default; /stats says how long it is
        warnings.filterwarnings("ignore", "n_ctx: found")
        llm = Llama(
            args.model,
            budget=args.budget,
            plan_path=args.plan,
            n_ctx=args.ctx_size,
            n_threads=args.threads,
            n_threads_batch=args.threads,
            n_gpu_layers=args.n_gpu_layers,
            n_cpu_moe=args.n_cpu_moe,
            repack=not args.no_repack,
            expert_cache=args.expert_cache,
            miss_price=args.miss_price,
            verbose=False,
        )
    check_miss_price(args, llm.expert_cache, [llm.plan.token_rule] if llm.plan else [])
    if args.target_tps is not None:
        try:
            llm.set_speed(args.target_tps)
        except GenerationError as error:
            raise CommandError(f"{args.model}: {error}") from error
    terminal = Terminal()
    chat = Chat(llm, terminal, args.system, args.max_tokens, temperature=args.temperature, seed=args.seed)
    terminal.complete([*chat.commands(), "/quit"])
    if args.load is not None:
        chat.load(args.load)
    plan = llm.plan
    cache = (
        f", {llm.expert_cache / 1e9:.1f} GB of memory for its experts, miss price {llm.miss_price:g}"
        if llm.expert_cache
        else ""
    )
    terminal.note(f"{printable(Path(args.model).name)}{f', {plan}' if plan else ''}{cache}. /help lists the commands.")
    if not chat.run():
        raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(main())

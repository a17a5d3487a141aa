#!/usr/bin/env python3
"""Measures drafts: what verifying costs at a model's true shape, what drafts gain at which acceptance, and real drafts on real text.

    python bench/speculative.py replay olmoe.gguf [--experts 4]                # random weights will do
    python bench/speculative.py real model-half.gguf --prompts prompts.txt     # one prompt a line
    python bench/speculative.py limit model-half.gguf --text prose.txt         # token by token
    python bench/speculative.py limit olmoe.gguf                               # its time alone: random weights and estimates

replay: the model writes a text, by sampling with a seed; then drafts replay it, each token spoilt with a set probability, so that
the share that is accepted is known. They cost nothing themselves; what a draft may cost follows from what verifying takes. The
text is the same every time, bit for bit, so all runs compute the same tokens.

real: the drafts themselves, greedy, on each prompt.

limit: verifications of 5 tokens of a text, all of them accepted, under a verification_budget: each token's divergence from the
same without a limit, and what it takes. Without --text the estimates are random ones, with thresholds that spend half.

With and without drafts takes turns, 8 tokens and 8 tokens, in one text; with --texts N whole texts do, each with a draft of which
nothing is known yet. Every line is the median of the neighbours' quotients of times; behind it the quartiles. --cpu takes the time
of the processor, of all threads together, which others that use the machine change less.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from typing import Dict, List

from allocmoe_edge import DraftModel, Llama
import expert_cache
from llama_cpp.llama_speculative import LlamaDraftModel, LlamaPromptLookupDecoding
import numpy as np

SAMPLING = dict(temp=1.0, top_k=0, top_p=1.0, min_p=0.0)  # random weights have no likeliest token
SEGMENT = 8
LENGTHS = (2, 4, 8)
N_VERIFIED = 5
COSTS = (0.0, 0.05, 0.1, 0.25, 0.5)
clock = time.perf_counter


class Replay(LlamaDraftModel):
    """Proposes what comes next in a text, each token replaced by another with the probability 1 - acceptance."""

    def __init__(self, text: List[int], acceptance: float, n_vocab: int):
        self.text, self.n_vocab = np.array(text, np.intc), n_vocab
        # of each 20 tokens as many as that is, so that a short text has them too
        rng, block = np.random.default_rng(0), np.arange(20) < round(20 * acceptance)
        self.right = np.concatenate([rng.permutation(block) for _ in range(0, len(text), 20)])[: len(text)]

    def __call__(self, input_ids, /, **kwargs):
        here = slice(len(input_ids), len(input_ids) + 16)
        return np.where(self.right[here], self.text[here], (self.text[here] + 1) % self.n_vocab)


class InTurns(DraftModel):
    """Drafts for SEGMENT tokens and more, up to the end of a step, then for as many does not, and notes how long each took."""

    def __call__(self, input_ids, /, **kwargs):
        now, n_tokens = clock(), len(input_ids)
        begin = getattr(self, "segment", None)
        if begin is None or n_tokens < begin[1]:
            self.segments, begin = [], (now, n_tokens, False)
        elif n_tokens - begin[1] >= SEGMENT:
            self.segments.append((begin[2], (now - begin[0]) / (n_tokens - begin[1])))
            begin = (now, n_tokens, not begin[2])
        self.segment = begin
        if begin[2]:
            return super().__call__(input_ids)
        self._judge(input_ids)
        self._proposed = (n_tokens, [])
        return np.zeros(0, np.intc)

    def quotients(self) -> List[float]:
        """Of the seconds a token of each segment without drafts, and of the one with drafts after it."""
        return [a / b for (_, a), (drafts, b) in itertools.pairwise(self.segments) if drafts]


def write(llm: Llama, prompt: List[int], n_tokens: int, **options) -> List[int]:
    llm.clear_cache()  # what of a prompt is computed together decides its last bits
    llm.set_seed(1)
    return list(itertools.islice(llm.generate(prompt, **options), n_tokens))


def measure(llm: Llama, prompt: List[int], n_tokens: int, drafts: Dict[str, InTurns], **options) -> None:
    """Prints for every draft how many times as fast it is as none, and whether its text is the same."""
    wanted = write(llm, prompt, n_tokens, **options)
    for name, draft in drafts.items():
        llm.draft_model = draft
        text = write(llm, prompt, n_tokens, **options)
        llm.draft_model = None
        found, all_ = draft.stats(), sorted(draft.quotients())
        drafted = sum(times for n, times in found["lengths"].items() if n)
        lengths = sum(n * times for n, times in found["lengths"].items()) / max(1, drafted)
        quarter = len(all_) // 4
        print(
            f"| {name} | {statistics.median(all_):.2f} ({all_[quarter]:.2f} to {all_[-1 - quarter]:.2f}) | "
            f"{found['acceptance']:.2f} | {lengths:.1f} in {drafted} steps | {'the same' if text == wanted else 'another'} |",
            flush=True,
        )


def whole_texts(
    llm: Llama, prompt: List[int], n_tokens: int, n_texts: int, draft: LlamaDraftModel, times: Dict[int, float]
) -> str:
    """How many times as fast texts are with a new `DraftModel` each, without their prompts: a row of a table.

    Args:
        times: what verifying so many tokens takes, in times of one: with it the steps that were made have a length that no
            other program changes.
    """
    quotients, by_steps, proposed, compared = [], [], 0, 0
    for _ in range(n_texts):
        seconds = []
        for each in (None, DraftModel(draft)):
            llm.draft_model = each
            llm.clear_cache()
            llm.set_seed(1)
            text = llm.generate(prompt, **SAMPLING)
            next(text)
            begin = clock()
            for _ in itertools.islice(text, n_tokens - 1):
                pass
            seconds.append(clock() - begin)
            text.close()
        found = llm.draft_stats()
        steps = {n + 1: n_steps for n, n_steps in found["lengths"].items()}
        by_steps.append(
            found["tokens"] / sum(np.interp(n, list(times), list(times.values())) * steps[n] for n in steps)
        )
        proposed += found["proposed"]
        compared += found["compared"]
        quotients.append(seconds[0] / seconds[1])
    llm.draft_model = None
    all_ = sorted(quotients)
    quarter = len(all_) // 4
    return (
        f"{statistics.median(all_):.2f} ({all_[quarter]:.2f} to {all_[-1 - quarter]:.2f}) | "
        f"{statistics.mean(by_steps):.3f}, {min(by_steps):.3f} at least | {proposed / n_texts:.0f} | {compared / n_texts:.0f} |"
    )


TEXTS = "| accepted | times as fast | by its steps | proposed | compared |\n| --- | ---: | ---: | ---: | ---: |"
HEAD = "| draft | times as fast | accepted | drafted | text |\n| --- | ---: | ---: | ---: | --- |"


def verification(llm: Llama, text: List[int], n_turns: int) -> Dict[int, float]:
    """What evaluating so many tokens at once takes, in times of one."""
    sizes, at = (1, 2, 3, 5, 9, 17), min(len(text) - 17, llm.n_batch)
    llm.decode(text[:at])
    seconds: Dict[int, List[float]] = {n: [] for n in sizes}
    for _ in range(n_turns):
        for n in sizes:
            begin = clock()
            llm.decode(text[at : at + n], at, logits_all=True)
            seconds[n].append(clock() - begin)
    return {n: statistics.median(a / b for a, b in zip(seconds[n], seconds[1])) for n in sizes}


def break_even(times: Dict[int, float], cost: float) -> float:
    """The least acceptance at which some number of drafted tokens pays, each costing so many plain steps."""
    for a in np.arange(0.0, 1.001, 0.01):
        if any(sum(a**i for i in range(n)) > (n - 1) * cost + times[n] for n in times if n > 1):
            return float(a)
    return float("nan")


def replay(args: argparse.Namespace) -> None:
    llm = load(args)
    rng = np.random.default_rng(0)
    prompt = rng.integers(256, llm.n_vocab() - 256, 64).tolist()
    text = prompt + write(llm, prompt, args.tokens + 17, **SAMPLING)
    times = verification(llm, text, args.turns)
    print("\ntokens at once, in times of one: " + ", ".join(f"{n}: {t:.2f}" for n, t in times.items()))
    print("\nacceptance from which drafts pay, by what a drafted token costs in plain ones:")
    print(", ".join(f"{cost:g}: {break_even(times, cost):.2f}" for cost in COSTS))
    print(f"\n{TEXTS if args.texts else HEAD}")
    for acceptance in args.acceptance:
        if args.texts:
            draft = Replay(text, acceptance, llm.n_vocab())
            row = whole_texts(llm, prompt, args.tokens, args.texts, draft, times)
            print(f"| {acceptance:g} | {row}", flush=True)
            continue
        drafts = {}
        for n in (*LENGTHS, None):
            draft = InTurns(Replay(text, acceptance, llm.n_vocab()), n_draft=n)
            drafts[f"{acceptance:g}, {'adaptive' if n is None else n}"] = draft
        measure(llm, prompt, args.tokens, drafts, **SAMPLING)


def real(args: argparse.Namespace) -> None:
    llm = load(args)
    drafts = {
        "lookup": InTurns(LlamaPromptLookupDecoding()),
        "lookup, always 4": InTurns(LlamaPromptLookupDecoding(), n_draft=4),
        **{f"same at {budget:g}": InTurns.same(budget) for budget in args.same},
        **{f"same at {budget:g}, always 3": InTurns.same(budget, n_draft=3) for budget in args.same},
        **{path: InTurns(path) for path in args.draft},
    }
    with open(args.prompts, encoding="utf-8") as file:
        prompts = [line.rstrip("\n").replace("\\n", "\n") for line in file if line.strip()]
    for text in prompts:
        print(f"\n{text[:60]!r}\n{HEAD}")
        measure(llm, llm.tokenize(text.encode()), args.tokens, drafts, temp=0.0)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def limit(args: argparse.Namespace) -> None:
    llm = load(args)
    if args.text:
        with open(args.text, encoding="utf-8") as file:
            text = llm.tokenize(file.read().encode())[: args.tokens]
    else:
        text = expert_cache.tokens(args.tokens, llm.n_vocab(), 0.0).tolist()
        plan = expert_cache.half_plan(llm, np.zeros(len(llm.expert_used_count_full)))
        llm.set_plan(expert_cache.spending(llm, plan, text[:64]))
    shares = [None, *args.shares]
    seconds: Dict[object, List[float]] = {share: [] for share in shares}
    spent: Dict[object, int] = dict.fromkeys(shares, 0)
    divergences: Dict[object, List[float]] = {share: [] for share in shares}
    others: Dict[object, int] = dict.fromkeys(shares, 0)
    found: Dict[object, np.ndarray] = {}
    llm.decode(text[:32])
    llm.expert_stats(reset=True)
    for at in range(32, len(text) - N_VERIFIED, N_VERIFIED):
        for share in (*shares[1:], None):  # the last one's cache is what the next tokens see
            begin = clock()
            with llm.limited_union(share):
                logits = llm.decode(text[at : at + N_VERIFIED], at, logits_all=True)
            seconds[share].append(clock() - begin)
            spent[share] += llm.expert_stats(reset=True)["prefill"]["activations"].sum()
            if share is None:
                free = log_softmax(logits)
            else:
                found[share] = log_softmax(logits)
        for share in shares[1:]:
            divergences[share] += (np.exp(free) * (free - found[share])).sum(axis=1).tolist()
            others[share] += (free.argmax(axis=1) != found[share].argmax(axis=1)).sum()
    print("\n| share of the union | time | activations | divergence | another likeliest token |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for share in shares[1:]:
        quotient = statistics.median(a / b for a, b in zip(seconds[share], seconds[None]))
        n = len(divergences[share])
        print(
            f"| {share:g} | {quotient:.2f} | {spent[share] / spent[None]:.2f} | {np.mean(divergences[share]):.4f} | "
            f"{others[share] / n:.3f} of {n} |"
        )


def load(args: argparse.Namespace) -> Llama:
    llm = Llama(args.model, n_ctx=2048, budget=args.budget, verbose=False, n_threads=args.threads)
    if args.experts:
        llm.set_plan([min(k, args.experts) for k in llm.expert_used_count_full])
    print(f"{args.model}: {llm.plan}; {llm.n_threads} threads", flush=True)
    return llm


def main() -> None:
    numbers = lambda text: [float(part) for part in text.split(",")]  # noqa: E731
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for command, tokens in ((replay, 200), (real, 200), (limit, 400)):
        p = commands.add_parser(command.__name__)
        p.set_defaults(command=command)
        p.add_argument("model")
        p.add_argument("--budget")
        p.add_argument(
            "--experts", type=int, metavar="K", help="the same number in every layer, where the file has no plan"
        )
        p.add_argument("--tokens", type=int, default=tokens)
        p.add_argument("--threads", type=int, metavar="N", help="default: one a core")
        p.add_argument("--cpu", action="store_true", help="the processor's time")
        if command is replay:
            p.add_argument(
                "--texts",
                type=int,
                default=0,
                metavar="N",
                help="N whole texts with the adaptive number, in turns with N without",
            )
            p.add_argument("--turns", type=int, default=15, help="of the verifications of each size")
            p.add_argument("--acceptance", type=numbers, default=[0.5, 0.7, 0.85, 0.95])
        elif command is limit:
            p.add_argument("--text")
            p.add_argument("--shares", type=numbers, default=[0.9, 0.75, 0.6, 0.5])
        else:
            p.add_argument("--prompts", required=True)
            p.add_argument("--same", type=numbers, default=[], help="budgets of drafts by the model itself")
            p.add_argument("--draft", action="append", default=[], help="a draft's file")
    args = parser.parse_args()
    if args.cpu:
        global clock
        clock = time.perf_counter = time.process_time  # drafts go by it, too
    args.command(args)


if __name__ == "__main__":
    main()

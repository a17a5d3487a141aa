#!/usr/bin/env python3
"""Measures drafts: what verifying costs at a model's true shape, what drafts gain at which acceptance, and real drafts on real text.

    python bench/speculative.py replay olmoe.gguf [--budget 0.5]               # random weights will do
    python bench/speculative.py real model-half.gguf --prompts prompts.txt     # one prompt a line

replay: the model writes a text, by sampling with a seed; then drafts replay it, each token spoilt with a set probability, so that
the share that is accepted is known. They cost nothing themselves; what a draft may cost follows from what verifying takes. The
text is the same every time, bit for bit, so all runs compute the same tokens.

real: the drafts themselves, greedy, on each prompt.

Methods take turns in one process, on one loaded model: none, each draft, none, each draft. Every line is the median of the
turns' quotients of times; behind it the least and the largest.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from typing import Dict, List

from allocmoe_edge import DraftModel, Llama
from llama_cpp.llama_speculative import LlamaDraftModel, LlamaPromptLookupDecoding
import numpy as np

SAMPLING = dict(temp=1.0, top_k=0, top_p=1.0, min_p=0.0)  # random weights have no likeliest token
LENGTHS = (2, 4, 8)
COSTS = (0.0, 0.05, 0.1, 0.25, 0.5)


class Replay(LlamaDraftModel):
    """Proposes what comes next in a text, each token replaced by another with the probability 1 - acceptance."""

    def __init__(self, text: List[int], acceptance: float, n_vocab: int):
        self.text, self.n_vocab = np.array(text, np.intc), n_vocab
        self.right = np.random.default_rng(0).random(len(text)) < acceptance

    def __call__(self, input_ids, /, **kwargs):
        here = slice(len(input_ids), len(input_ids) + 16)
        return np.where(self.right[here], self.text[here], (self.text[here] + 1) % self.n_vocab)


def write(llm: Llama, prompt: List[int], n_tokens: int, **options):
    """(tokens, seconds of all but the first, which comes with the prompt)."""
    llm.clear_cache()  # what of a prompt is computed together decides its last bits
    llm.set_seed(1)
    steps = llm.generate(prompt, **options)
    out = [next(steps)]
    begin = time.perf_counter()
    out += itertools.islice(steps, n_tokens - 1)
    return out, time.perf_counter() - begin


def in_turns(llm: Llama, prompt: List[int], n_tokens: int, drafts: Dict[str, object], n_turns: int, **options) -> None:
    """Prints for every draft how many times as fast it is as none, and whether its text is the same."""
    wanted, quotients, equal = None, {name: [] for name in drafts}, dict.fromkeys(drafts, True)
    for _ in range(n_turns):
        llm.draft_model = None
        text, plain = write(llm, prompt, n_tokens, **options)
        wanted = wanted or text
        assert text == wanted
        for name, draft in drafts.items():
            llm.draft_model = draft
            text, seconds = write(llm, prompt, n_tokens, **options)
            quotients[name].append(plain / seconds)
            equal[name] &= text == wanted
    llm.draft_model = None
    for name, draft in drafts.items():
        found, all_ = draft.stats(), sorted(quotients[name])
        lengths = sum(n * times for n, times in found["lengths"].items()) / max(1, sum(found["lengths"].values()))
        print(
            f"| {name} | {statistics.median(all_):.2f} ({all_[0]:.2f} to {all_[-1]:.2f}) | {found['acceptance']:.2f} | "
            f"{found['tokens_per_step']:.2f} | {lengths:.1f} | {'the same' if equal[name] else 'another'} |",
            flush=True,
        )


HEAD = "| draft | times as fast | accepted | tokens a step | drafted a step | text |\n| --- | ---: | ---: | ---: | ---: | --- |"


def verification(llm: Llama, text: List[int], n_turns: int) -> Dict[int, float]:
    """What evaluating so many tokens at once takes, in times of one."""
    sizes, at = (1, 2, 3, 5, 9, 17), len(text) - 17
    llm.decode(text[:at])
    seconds: Dict[int, List[float]] = {n: [] for n in sizes}
    for _ in range(n_turns):
        for n in sizes:
            begin = time.perf_counter()
            llm.decode(text[at : at + n], at, logits_all=True)
            seconds[n].append(time.perf_counter() - begin)
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
    text = prompt + write(llm, prompt, args.tokens + 17, **SAMPLING)[0]
    times = verification(llm, text, 3 * args.turns)
    print("\ntokens at once, in times of one: " + ", ".join(f"{n}: {t:.2f}" for n, t in times.items()))
    print("\nacceptance from which drafts pay, by what a drafted token costs in plain ones:")
    print(", ".join(f"{cost:g}: {break_even(times, cost):.2f}" for cost in COSTS))
    print(f"\n{HEAD}")
    for acceptance in args.acceptance:
        drafts = {}
        for n in (*LENGTHS, None):
            draft = DraftModel(Replay(text, acceptance, llm.n_vocab()), n_draft=n)
            draft.open(llm)
            drafts[f"{acceptance:g}, {'adaptive' if n is None else n}"] = draft
        in_turns(llm, prompt, args.tokens, drafts, args.turns, **SAMPLING)


def real(args: argparse.Namespace) -> None:
    llm = load(args)
    drafts = {
        "lookup": DraftModel(LlamaPromptLookupDecoding()),
        "lookup, always 4": DraftModel(LlamaPromptLookupDecoding(), n_draft=4),
        **{f"same at {budget:g}": DraftModel.same(budget) for budget in args.same},
        **{f"same at {budget:g}, always 3": DraftModel.same(budget, n_draft=3) for budget in args.same},
        **{path: DraftModel(path) for path in args.draft},
    }
    for draft in drafts.values():
        draft.open(llm)
    with open(args.prompts, encoding="utf-8") as file:
        prompts = [line.rstrip("\n").replace("\\n", "\n") for line in file if line.strip()]
    for text in prompts:
        print(f"\n{text[:60]!r}\n{HEAD}")
        in_turns(llm, llm.tokenize(text.encode()), args.tokens, drafts, args.turns, temp=0.0)
        for draft in drafts.values():
            draft.stats(reset=True)


def load(args: argparse.Namespace) -> Llama:
    llm = Llama(args.model, n_ctx=2048, budget=args.budget, verbose=False)
    print(f"{args.model}: {llm.plan}; {llm.n_threads} threads", flush=True)
    return llm


def main() -> None:
    numbers = lambda text: [float(part) for part in text.split(",")]  # noqa: E731
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for command, tokens in ((replay, 128), (real, 200)):
        p = commands.add_parser(command.__name__)
        p.set_defaults(command=command)
        p.add_argument("model")
        p.add_argument("--budget")
        p.add_argument("--tokens", type=int, default=tokens)
        p.add_argument("--turns", type=int, default=3)
        if command is replay:
            p.add_argument("--acceptance", type=numbers, default=[0.5, 0.7, 0.85, 0.95])
        else:
            p.add_argument("--prompts", required=True)
            p.add_argument("--same", type=numbers, default=[], help="budgets of drafts by the model itself")
            p.add_argument("--draft", action="append", default=[], help="a draft's file")
    args = parser.parse_args()
    args.command(args)


if __name__ == "__main__":
    main()

"""Times prefill and decode of one loaded model under several plans that take turns."""

from __future__ import annotations

from dataclasses import dataclass, field
import time
from typing import Dict, Iterator, List, Sequence

import numpy as np
from tqdm import tqdm

from .._native import libllama
from ..llama import Llama
from ..plan import Plan
from . import BenchError
from .machine import EnergyCounter

# name of the plan that llama.cpp's own CPU kernels run, without ours
STOCK = "stock"
# evaluated before the clock starts: the first graph for a plan is built here, and caches hold what they will
_WARMUP_PREFILL, _WARMUP_DECODE = 8, 2


@dataclass(frozen=True)
class Item:
    """One thing to time. phase "prefill": `length` prompt tokens; "decode": `n_gen` tokens after `length` others."""

    phase: str
    length: int
    n_gen: int = 0

    @property
    def n_tokens(self) -> int:
        return self.n_gen if self.phase == "decode" else self.length

    @property
    def context(self) -> int:
        """Context that it needs."""
        return self.length + (self.n_gen + _WARMUP_DECODE if self.phase == "decode" else 0)

    def __str__(self) -> str:
        return f"decode, depth {self.length}" if self.phase == "decode" else f"prefill {self.length}"


@dataclass
class Samples:
    """What was measured of one item under one plan: a list entry a run.

    seconds: the whole run. step_seconds: each token's, decode only. activations: float64 [block_count], mean experts
    per token that the run really activated. joules: empty without energy counters.
    """

    seconds: List[float] = field(default_factory=list)
    step_seconds: List[list] = field(default_factory=list)
    activations: List[np.ndarray] = field(default_factory=list)
    joules: List[float] = field(default_factory=list)


@dataclass
class Result:
    """samples: by item, then by plan's name; the first plan is the reference, run first and last in every round, so it
    has two runs a round. order: the plans' names as they were run, one list a round, by item."""

    samples: Dict[Item, Dict[str, Samples]] = field(default_factory=dict)
    order: Dict[Item, List[List[str]]] = field(default_factory=dict)


def turns(names: Sequence[str], n_rounds: int) -> Iterator[List[str]]:
    """The order of every round: the reference first and last, the others between, backwards in every second round, so
    that a machine that slowly heats up or slows down favours none."""
    reference, *others = names
    for i in range(n_rounds):
        yield [reference, *(others if i % 2 == 0 else others[::-1]), reference]


def run(llm: Llama, plans: Dict[str, Plan], items: Sequence[Item], n_rounds: int, tokens: Sequence[int]) -> Result:
    """Measures every item under every plan.

    Args:
        plans: by name; the first is the reference that ratios refer to. The one named STOCK runs without our CPU kernels.
        tokens: token ids to evaluate, at least as many as the longest item's context; generation takes them too
            instead of sampling, so that every run does the same work.

    Raises:
        BenchError: the context is too small, or llama.cpp fails to evaluate.
    """
    for item in items:
        if item.context > min(llm.n_ctx(), len(tokens)):
            raise BenchError(f"{item}: needs {item.context} tokens, but there are {min(llm.n_ctx(), len(tokens))}")
    energy, result = EnergyCounter(), Result()
    before, cheapest = llm.plan, min(plans.values(), key=lambda plan: plan.budget_total)
    total = len(items) * n_rounds * (len(plans) + 1)
    try:
        with tqdm(total=total, desc="measuring", unit="run", disable=None, leave=False) as bar:
            for item in items:
                samples = result.samples[item] = {name: Samples() for name in plans}
                result.order[item] = []
                _prepare(llm, item, cheapest, tokens)
                for order in turns(list(plans), n_rounds):
                    result.order[item].append(order)
                    for name in order:
                        bar.set_postfix_str(f"{item}, {name}")
                        # set_plan would drop the cache, and with it the depth; speed does not depend on its content
                        llm.apply_plan(plans[name])
                        libllama.allocmoe_set_cpu_kernels(name != STOCK)
                        _run_once(llm, item, cheapest, tokens, samples[name], energy)
                        bar.update()
    finally:
        libllama.allocmoe_set_cpu_kernels(True)
        llm.set_plan(before)
        llm.clear_cache()
    return result


def _evaluate(llm: Llama, tokens: Sequence[int], n_past: int) -> int:
    """Evaluates tokens and returns the likeliest next one."""
    for start in range(0, len(tokens), llm.n_batch):
        try:
            logits = llm.decode(tokens[start : start + llm.n_batch], n_past + start)
        except RuntimeError as error:
            raise BenchError(f"llama.cpp failed to evaluate {len(tokens)} tokens after {n_past}: {error}") from None
    return int(logits.argmax())  # waits for the result


def _prepare(llm: Llama, item: Item, plan: Plan, tokens: Sequence[int]) -> None:
    """An empty cache for prefill; for decode one filled to the depth, under the cheapest plan to save time."""
    llm.clear_cache()
    if item.phase == "decode" and item.length:
        llm.apply_plan(plan)
        _evaluate(llm, tokens[: item.length], 0)


def _rewind(llm: Llama, item: Item, plan: Plan, tokens: Sequence[int]) -> None:
    """The cache as `_prepare` left it."""
    if item.phase == "prefill" or not item.length:
        llm.clear_cache()
    elif not llm.rewind(item.length):
        _prepare(llm, item, plan, tokens)


def _run_once(
    llm: Llama, item: Item, cheapest: Plan, tokens: Sequence[int], out: Samples, energy: EnergyCounter
) -> None:
    decode, depth = item.phase == "decode", item.length if item.phase == "decode" else 0
    if decode:
        for i in range(_WARMUP_DECODE):
            _evaluate(llm, [tokens[depth + i]], depth + i)
        depth += _WARMUP_DECODE
    else:
        _evaluate(llm, tokens[:_WARMUP_PREFILL], 0)
        llm.clear_cache()
    llm.expert_stats(reset=True)
    joules = energy.read()
    start = time.perf_counter()
    if decode:
        clock = [start]
        for i in range(depth, depth + item.n_gen):
            _evaluate(llm, [tokens[i]], i)
            clock.append(time.perf_counter())
        out.seconds.append(clock[-1] - start)
        out.step_seconds.append(np.diff(clock).tolist())
    else:
        _evaluate(llm, tokens[: item.length], 0)
        out.seconds.append(time.perf_counter() - start)
    if energy.available:
        out.joules.append(energy.joules(joules, energy.read()))
    # of both phases: a prompt of a single token counts as a generated one
    prefill, decoded = llm.expert_stats().values()
    tokens_by_layer = prefill["tokens"] + decoded["tokens"]
    out.activations.append((prefill["activations"] + decoded["activations"]) / np.maximum(tokens_by_layer, 1))
    _rewind(llm, item, cheapest, tokens)

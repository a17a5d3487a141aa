"""What one expert activation costs in each layer, measured: milliseconds of decoding on this machine and placement."""

from __future__ import annotations

import time
from typing import NamedTuple

from allocmoe_edge import Llama, Plan
from allocmoe_edge._native import context_pointer, ffi, libllama
import numpy as np

from . import ConvertError
from .progress import progress_bar

_TOKENS, _REPEATS = 12, 7


class Costs(NamedTuple):
    """fixed_ms: a decoded token without any routed expert. activation_ms: one entry per layer, 0 without experts."""

    fixed_ms: float
    activation_ms: tuple

    def decode_ms(self, expert_used_count: tuple) -> float:
        return self.fixed_ms + sum(c * k for c, k in zip(self.activation_ms, expert_used_count))


def layer_classes(llm: Llama, full: tuple) -> list:
    """Groups of layers whose experts lie in the same kind of memory and have the same size: they cost the same."""
    groups: dict = {}
    n_bytes = ffi.new("int64_t *")
    for il, k in enumerate(full):
        if k:
            buffer = ffi.string(libllama.allocmoe_expert_placement(context_pointer(llm), il, n_bytes))
            groups.setdefault((buffer, n_bytes[0]), []).append(il)
    return list(groups.values())


def measure(llm: Llama, full: tuple, tokens: np.ndarray) -> Costs:
    """Times decoding at full budget and with each class of layers at one expert, in turns; medians of the differences.

    Args:
        full: K_l per layer, 0 where a layer routes no experts.
        tokens: int32, at least 13 of them: the text that is decoded.

    A class that comes out faster with more experts, which is noise, gets the mean cost per byte of all classes.
    """
    classes = [layers for layers in layer_classes(llm, full) if any(full[il] > 1 for il in layers)]
    everything = [il for layers in classes for il in layers]
    if not everything:
        return Costs(decode_ms(llm, Plan.full(full), tokens), tuple(0.0 for _ in full))
    groups = classes if len(classes) == 1 else [*classes, everything]
    plans = [Plan(tuple(1 if k and il in group else k for il, k in enumerate(full)), full) for group in groups]

    def stretch(run: int) -> np.ndarray:
        # what has been decoded just now would find its experts in a cache: other text has to read them, as it does in use
        return np.roll(tokens, -run * (_TOKENS + 1)) if llm.expert_cache else tokens

    saved = np.empty((_REPEATS, len(plans)))
    whole = np.empty(_REPEATS)
    with progress_bar("decode cost", _REPEATS * (len(plans) + 1), "run") as bar:
        for repeat in range(_REPEATS):
            whole[repeat] = decode_ms(llm, Plan.full(full), stretch(repeat * (len(plans) + 1)))
            bar.update()
            for i, plan in enumerate(plans):
                saved[repeat, i] = whole[repeat] - decode_ms(llm, plan, stretch(repeat * (len(plans) + 1) + i + 1))
                bar.update()
    per_class = np.median(saved, axis=0)
    weight = np.array([_bytes(llm, group, full) for group in groups])
    per_byte = max(per_class[-1], 1e-6) / weight[-1]
    activation_ms = [0.0] * len(full)
    for group, measured, size in zip(classes, per_class, weight):
        cost = (measured if measured > 0 else per_byte * size) / sum(full[il] - 1 for il in group)
        for il in group:
            activation_ms[il] = float(cost)
    # a layer of one expert cannot be measured, and has nothing to decide: its cost is part of the fixed time
    for il, k in enumerate(full):
        if k == 1 and not activation_ms[il]:
            activation_ms[il] = 1e-9
    fixed = float(np.median(whole)) - sum(c * k for c, k in zip(activation_ms, full))
    return Costs(max(fixed, 0.0), tuple(activation_ms))


def largest_total(costs: Costs, full: tuple, tokens_per_second: float) -> int:
    """The most expert activations per token, spent alike in all layers, with which a token takes no longer.

    Raises:
        ConvertError: not even one expert in each layer is fast enough.
    """
    allowed = 1000 / tokens_per_second - costs.fixed_ms
    least, most = sum(k > 0 for k in full), sum(full)
    everything = costs.decode_ms(full) - costs.fixed_ms
    total = most if allowed >= everything else int(allowed / everything * most)
    if total < least:
        fastest = 1000 / (costs.fixed_ms + everything * least / most)
        raise ConvertError(
            f"--target-tps {tokens_per_second:g}: out of reach: with one expert in each layer this machine decodes "
            f"{fastest:.1f} tokens/s, at full budget {1000 / costs.decode_ms(full):.1f}"
        )
    return total


def _bytes(llm: Llama, layers: list, full: tuple) -> float:
    """Bytes of the experts that a token no longer reads with these layers at one expert."""
    n_bytes = ffi.new("int64_t *")
    total = 0
    for il in layers:
        libllama.allocmoe_expert_placement(context_pointer(llm), il, n_bytes)
        total += n_bytes[0] * (full[il] - 1)
    return float(total)


def decode_ms(llm: Llama, plan: Plan, tokens: np.ndarray) -> float:
    """Median time of a decoded token, the first one, which builds the graph, not counted."""
    llm.apply_plan(plan)
    llm.clear_cache()
    times = []
    for i, token in enumerate(tokens[: _TOKENS + 1]):
        start = time.perf_counter()
        llm.decode([int(token)], i)
        times.append(time.perf_counter() - start)
    return 1000 * float(np.median(times[1:]))

"""The largest budget at which a model decodes so many tokens per second on this machine: measured, and with it what is read."""

from __future__ import annotations

import time
from typing import Callable

import numpy as np

from .checked_llama import GenerationError
from .measure.perplexity import bos_token

_WARM, _TIMED = 6, 16


def speed(value: float) -> float:
    """Tokens per second that may be asked for. Raises ValueError."""
    try:
        found = float("nan") if isinstance(value, (bool, str)) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = float("nan")
    if not 0 < found < float("inf"):
        raise ValueError(f"tokens_per_second: found {str(value)[:40]!r}, want a number above 0")
    return found


class Probe:
    """How fast a model decodes a text of its own, drawn from its distributions and another one each time: one that repeats
    itself would find its experts in a cache."""

    def __init__(self, llm):
        self._llm, self._rng = llm, np.random.default_rng(0)

    def warm_up(self) -> None:
        """Fills an expert cache, and has the machine at its speed."""
        self.tokens_per_second()

    def tokens_per_second(self) -> float:
        """Under the plan in force. What is cached is forgotten."""
        llm = self._llm
        llm.clear_cache()
        n_warm = min(_WARM, llm.n_ctx() // 2)
        n_timed = min(_TIMED, llm.n_ctx() - n_warm)
        token, seconds = bos_token(llm) or 0, 0.0
        for i in range(n_warm + n_timed):
            start = time.perf_counter()
            logits = llm.decode([token], i)[0].astype(np.float64)
            if i >= n_warm:
                seconds += time.perf_counter() - start
            if not np.isfinite(logits).all():
                raise GenerationError("the model computes no numbers (NaN or infinity)")
            p = np.exp(logits - logits.max())
            token = int(self._rng.choice(len(p), p=p / p.sum()))
        return n_timed / seconds


def largest_total(least: int, most: int, wanted: float, speed_at: Callable[[int], float]) -> tuple[int, float]:
    """(total, its tokens/s): the largest total of activations per token, to a 32nd of the most, that is fast enough.

    Args:
        speed_at: of a total, tokens/s; expected to fall with it.

    Returns:
        The least one where none is.
    """
    found = speed_at(most)
    if found >= wanted:
        return most, found
    low, reached = least, speed_at(least)
    high = most
    while reached >= wanted and high - low > max(1, most // 32):
        middle = (low + high) // 2
        at_middle = speed_at(middle)
        if at_middle >= wanted:
            low, reached = middle, at_middle
        else:
            high = middle
    return low, reached

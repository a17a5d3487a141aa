"""Calibrates the token rule "threshold": per layer and k, the value from which candidates are activated."""

from __future__ import annotations

from dataclasses import replace
from typing import Optional

from allocmoe_edge import Llama, Plan
from allocmoe_edge.measure.recording import recording
import numpy as np

from .progress import progress_bar


def table_row(scores: np.ndarray, k_base: int) -> np.ndarray:
    """Thresholds at which the tokens activate k = 1..K experts in the mean, every token's k_base best included.

    Args:
        scores: float32, shape [n_tokens, K], each row falling: the routing scores, or values, of the K best experts.

    Returns:
        float32, shape [K]: infinity up to k_base, -infinity for K; between them, the value of the last candidate
        that the budget buys.
    """
    n_tokens, n_used = scores.shape
    row = np.full(n_used, np.inf, np.float32)
    row[-1] = -np.inf
    pool = np.sort(scores[:, k_base:].ravel())[::-1]
    for k in range(k_base + 1, n_used):
        row[k - 1] = pool[(k - k_base) * n_tokens - 1]
    return row


def calibrate(llm: Llama, plan: Plan, token_windows: np.ndarray) -> Optional[tuple]:
    """The threshold table of a model, from the scores at the planned operating point.

    That is: under `plan` with the token rule "batch", which for long windows activates the same experts as the
    thresholds that come out of it.

    Args:
        token_windows: int32, shape [n_windows, n_ctx].

    Returns:
        One float32 array of shape [K_l] per layer, empty where K_l is 0; None where the model's backend cannot skip
        single experts, and so has no use for thresholds.
    """
    scores = recorded_values(llm, replace(plan, token_rule="batch", threshold=None, strict=False), token_windows)
    if scores is None:
        return None
    return tuple(
        table_row(rows, plan.k_base) if n_used else np.empty(0, np.float32)
        for rows, n_used in zip(scores, plan.expert_used_count_full)
    )


def possible(llm: Llama, full: tuple) -> bool:
    """Whether the model, and the backend that it runs on, can leave out single experts."""
    with recording(llm, replace(Plan.full(full), token_rule="batch")) as recorder:
        return recorder.works


def recorded_values(llm: Llama, plan: Plan, token_windows: np.ndarray) -> Optional[list]:
    """The values of every token's K_l experts by rank, from a run over a text under `plan`, which has a token rule.

    Args:
        token_windows: int32, shape [n_windows, n_ctx].

    Returns:
        Per layer float32, shape [n_tokens, K_l]; None where the model's backend cannot skip single experts.
    """
    values: list = [[] for _ in plan.expert_used_count_full]
    with recording(llm, plan) as recorder, progress_bar("thresholds", len(token_windows), "pass") as bar:
        if not recorder.works:
            return None
        for il, layer in recorder.layers(token_windows, "values", progress=bar.update):
            values[il].append(layer.values)
    return [np.concatenate(rows) if rows else np.empty((0, 1), np.float32) for rows in values]

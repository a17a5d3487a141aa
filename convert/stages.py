"""What a conversion's stages cost, beside each other: how many tokens run through which share of the model."""

from __future__ import annotations

from typing import List, Tuple

from allocmoe_edge import Plan

from . import choose, sensitivity
from .task import Task

# Measured against a token of a window at full budget (docs/notes/2026-11-conversion.md): one that the model writes among 64
# documents; one whose layers are recorded; one at half budget.
_WRITTEN, _RECORDED, _HALF = 1.65, 1.05, 0.7
# of all that: to load the model, and to write a file
_FILE = 0.01


def expected(task: Task) -> List[Tuple[str, float]]:
    """The bars of a conversion that runs the model, in their order, and the work of each in tokens through the whole model."""
    settings, full = task.settings, task.full
    tries = task.tries_estimates and not task.calibrated
    # a window is the least
    n_profile = max(task.calib_tokens, settings.ctx_size)
    n_fit = max(n_profile, task.estimate_tokens) if tries else n_profile
    n_held = min(n_profile, max(n_fit / 4, settings.ctx_size))
    found = []
    if settings.calib is None:
        found += [("calibration text", _WRITTEN * 1.25 * n_fit)]
    if task.stored is None:
        cells = set(sensitivity.cells(full, settings.profile).values()) - {full}
        starts = [next(il for il, (k, own) in enumerate(zip(counts, full)) if k != own) for counts in cells]
        found += [("sensitivity", n_profile * (_RECORDED + sum(1 - il / len(full) for il in starts)))]
    if tries:
        found += [
            ("estimates, sizes", _RECORDED * n_fit),
            ("estimates, directions", task.n_embd),
            ("estimates, positive directions", 0.12 * n_fit),
            ("estimates, outputs", _RECORDED * n_fit),
            ("estimates, ranks", task.n_embd / 3),
            ("estimates, spend", _HALF * 4 * min(n_fit / 4, 4096)),
        ]
    n_allocated = _n_allocated(task)
    n_plans = n_allocated * (1 + (settings.token_rule is None)) + task.tries_estimates * choose.N_ESTIMATES
    check = ("held-out check", n_held * (1 + _HALF * n_plans))
    if settings.max_ppl_increase is not None:
        step = [("thresholds", _HALF * n_profile)] * n_allocated if settings.token_rule == "threshold" else []
        found += [*step, check] * (sum(full) - task.least).bit_length()
    if settings.token_rule in (None, "threshold"):
        found += [("thresholds", _HALF * n_profile)] * n_allocated
    found += [check]
    if n_held < n_fit / 4:
        found += [("held-out check", (n_fit / 4 - n_held) * (1 + _HALF * 2))]
    file = _FILE * sum(work for _, work in found)
    return [("loading the model", file), *found, ("writing the model", file)]


def _n_allocated(task: Task) -> int:
    """Different plans of Alloc-L and uniform k: 1 where the budget is known, and buys all experts or the fewest of every layer."""
    only = task.full, tuple(min(k, task.k_base) for k in task.full)
    return 1 if task.settings.fixed_budget and Plan.uniform(task.full, task.total).expert_used_count in only else 2

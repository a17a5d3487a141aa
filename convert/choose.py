"""Chooses a plan by how candidates do on held-out text: Alloc-L or uniform k, with or without thresholds."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Dict, NamedTuple, Optional

import numpy as np
from tqdm import tqdm

from allocmoe_edge import Llama, Plan
from allocmoe_edge.metadata import HeldOut, Profile
from allocmoe_edge.perplexity import Reference

from . import thresholds
from .calibration import CalibrationText


class Score(NamedTuple):
    """A plan over the held-out windows: divergence from the full model in nats per token, activations per token."""

    perplexity: float
    kl: float
    spent: float


class Choice(NamedTuple):
    profile: Profile
    plan: Plan
    found: Dict[str, Score]  # all that were compared, the full model under the name "full"


def scores(llm: Llama, full: tuple, plans: Dict[str, Plan], token_windows: np.ndarray) -> Dict[str, Score]:
    """Every plan's Score, and the full model's under the name "full"; windows int32, shape [n_windows, n_ctx]."""
    nll, kl, spent = ({name: 0.0 for name in ("full", *plans)} for _ in range(3))
    total = len(token_windows) * (1 + len(plans))
    n = len(token_windows)
    with tqdm(total=total, desc="held-out check", unit="pass", disable=None, leave=False) as bar:
        for window in token_windows:
            llm._set_native_plan(Plan.full(full))
            reference = Reference(llm, window)
            nll["full"] += reference.nll.mean() / n
            bar.update()
            for name, plan in plans.items():
                llm._set_native_plan(plan)
                llm.expert_stats(reset=True)
                values, divergence = reference.compare(llm)
                nll[name] += values.mean() / n
                kl[name] += divergence.mean() / n
                spent[name] += llm.expert_stats()["prefill"]["mean"].sum() / n
                bar.update()
    spent["full"] = float(sum(full))
    return {name: Score(float(np.exp(nll[name])), kl[name], spent[name]) for name in nll}


def choose(
    llm: Llama,
    profile: Profile,
    total: int,
    full: tuple,
    text: CalibrationText,
    token_rule: Optional[str] = None,
    max_increase: float = np.inf,
) -> Choice:
    """The plan of `total` activations with the least divergence from the full model on text the profile has not seen.

    Args:
        token_rule: None to try "off" and "threshold".
        max_increase: of perplexity over the full model's; a plan within it goes before any that is not.
    """
    candidates = {}
    for allocation in ("alloc-l", "uniform"):
        candidate = replace(profile, allocation=allocation, token_rule="off", threshold_table=None, held_out=None)
        plan = candidate.plan(total, full)
        rules = [token_rule] if token_rule else ["off"]
        if token_rule in (None, "threshold"):
            table = thresholds.calibrate(llm, plan, text.profile)
            if table is not None:
                candidate = replace(candidate, threshold_table=table)
                rules = [token_rule] if token_rule else ["off", "threshold"]
        for rule in rules:
            ruled = replace(candidate, token_rule=rule)
            candidates[f"{allocation}, token rule {rule}"] = (ruled, ruled.with_token_rule(plan))
    found = scores(llm, full, {name: plan for name, (_, plan) in candidates.items()}, text.held_out)
    limit = found["full"].perplexity * (1 + max_increase)
    best = min(candidates, key=lambda name: (found[name].perplexity > limit, found[name].kl))
    uniform = next(found[name] for name in candidates if name.startswith("uniform"))
    held_out = HeldOut(
        int(text.held_out.size), found["full"].perplexity, uniform.perplexity, found[best].perplexity, uniform.kl, found[best].kl
    )
    chosen, plan = candidates[best]
    return Choice(replace(chosen, held_out=held_out), plan, found)


def smallest_total(llm: Llama, profile: Profile, full: tuple, text: CalibrationText, max_increase: float) -> int:
    """The least total of activations whose plan keeps held-out perplexity within (1 + max_increase) of the full model's.

    By bisection, so it takes perplexity to fall as the total grows; the full budget where nothing less will do.
    """
    low, high = sum(k > 0 for k in full), sum(full)
    while low < high:
        middle = (low + high) // 2
        plans = {a: replace(profile, allocation=a).plan(middle, full, "off") for a in ("alloc-l", "uniform")}
        found = scores(llm, full, plans, text.held_out)
        best = min(plans, key=lambda name: found[name].kl)
        increase = found[best].perplexity / found["full"].perplexity - 1
        tqdm.write(f"  {middle} of {sum(full)} activations: perplexity {increase:+.1%}", file=sys.stderr)
        if increase <= max_increase:
            high = middle
        else:
            low = middle + 1
    return low

"""Chooses a plan by how candidates do on held-out text: Alloc-L or uniform k, with or without thresholds, or estimates."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Dict, NamedTuple, Optional, Tuple

from allocmoe_edge import Llama, Plan
from allocmoe_edge.measure.perplexity import Reference
from allocmoe_edge.plan.metadata import HeldOut, Profile
import numpy as np

from . import CalibrationError, thresholds
from .calibration import CalibrationText
from .progress import progress_bar, say

# How the candidates with this rule are called, and how far their layers' sensitivities are taken out. A layer cut alone tells
# less of what it is worth beside others that are cut, the less like the calibration's the text is
# (docs/notes/2026-11-trained-moe.md).
_ESTIMATES = {
    "token rule estimate": 0.0,
    "token rule estimate, layers half alike": 0.5,
    "token rule estimate, layers alike": 1.0,
}
N_ESTIMATES = len(_ESTIMATES)


class Score(NamedTuple):
    """A plan over the held-out windows: divergence from the full model in nats per token, activations per token, and how far the ratio
    of its perplexity to the full model's may be off by chance (relative standard error, taking tokens as independent)."""

    perplexity: float
    kl: float
    spent: float
    error: float


@dataclass(frozen=True)
class Choice:
    """profile, plan: the best. scores: of all plans that were compared, the full model under the name "full". further: the same of the two
    best, where both are estimates, on n_further tokens of further text, which decides between them; empty elsewhere."""

    profile: Profile
    plan: Plan
    scores: Dict[str, Score]
    further: Dict[str, Score]
    n_further: int


def scores(llm: Llama, full: tuple, plans: Dict[str, Plan], token_windows: np.ndarray) -> Dict[str, Score]:
    """Every plan's Score, and the full model's under the name "full"; windows int32, shape [n_windows, n_ctx].

    Infinity where a plan's predictions are no numbers.

    Raises:
        CalibrationError: the full model's are none.
    """
    # what is one and the same plan under two names is run once
    run_as = {name: next(other for other in plans if _same(plans[other], plan)) for name, plan in plans.items()}
    different = {name: plan for name, plan in plans.items() if run_as[name] == name}
    nll, kl, spent = (dict.fromkeys(("full", *different), 0.0) for _ in range(3))
    increases: Dict[str, list] = {name: [] for name in different}  # of each token's nll
    n = len(token_windows)
    with progress_bar("held-out check", n * (1 + len(different)), "pass") as bar:
        for window in token_windows:
            llm.apply_plan(Plan.full(full))
            reference = Reference(llm, window)
            nll["full"] += reference.nll.mean() / n
            bar.update()
            for name, plan in different.items():
                llm.apply_plan(plan)
                llm.expert_stats(reset=True)
                values, divergence = reference.compare(llm)
                nll[name] += values.mean() / n
                increases[name].append(values - reference.nll)
                kl[name] += divergence.mean() / n
                spent[name] += llm.expert_stats()["prefill"]["mean"].sum() / n
                bar.update()
    spent["full"] = float(sum(full))
    if not np.isfinite(nll["full"]):
        raise CalibrationError("the model's own predictions on held-out text are not finite", finite=False)
    for name in different:
        # what is no number is no rival
        if not np.isfinite([nll[name], kl[name]]).all():
            nll[name] = kl[name] = np.inf
    errors = {name: _standard_error(np.concatenate(found)) for name, found in increases.items()}
    run_as, errors["full"] = {"full": "full", **run_as}, 0.0
    return {name: Score(float(np.exp(nll[of])), kl[of], spent[of], errors[of]) for name, of in run_as.items()}


def _standard_error(values: np.ndarray) -> float:
    """Of their mean; infinity where one value, or one that is no number, says nothing of it."""
    with np.errstate(all="ignore"):
        error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.inf
    return float(error) if np.isfinite(error) else np.inf


def _same(plan: Plan, other: Plan) -> bool:
    return plan == other and plan.estimator is other.estimator


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
        profile: with an estimator, unless the rule "estimate" is not to be tried.
        token_rule: None to try "off", "threshold" and "estimate".
        max_increase: of perplexity over the full model's; a plan within it goes before any that is not.
    """
    # "estimate" has layers of its own; these are what it is compared with
    rules = {None: ("off", "threshold"), "estimate": ("off",)}.get(token_rule, (token_rule,))
    candidates = _top_k(llm, profile, total, full, text, rules)
    others = list(candidates)
    if token_rule in (None, "estimate"):
        candidates |= _estimates(profile, total, full)
    measured = scores(llm, full, {name: plan for name, (_, plan) in candidates.items()}, text.held_out)
    limit = measured["full"].perplexity * (1 + max_increase)

    def over(name: str) -> bool:
        return measured[name].perplexity > limit

    def ranked(names: list) -> list:
        return sorted(names, key=lambda name: (over(name), measured[name].kl))

    rivals = ranked([name for name in candidates if name in _ESTIMATES or token_rule != "estimate"])
    best = rivals[0]
    # estimates that go before all else, whose order a few windows do not tell
    first = [name for name in takewhile(_ESTIMATES.__contains__, rivals) if over(name) == over(best)][:2]
    further: Dict[str, Score] = {}
    rest = _without(text.spend, text.held_out)
    if len(first) == 2 and len(rest):
        further = scores(llm, full, {name: candidates[name][1] for name in first}, rest)
        n, n_rest = len(text.held_out), len(rest)
        best = min(first, key=lambda name: n * measured[name].kl + n_rest * further[name].kl)
    if not np.isfinite(measured[best].kl):
        raise CalibrationError("no plan's predictions on held-out text are finite", finite=False)
    uniform = next(measured[name] for name in candidates if name.startswith("uniform"))
    held_out = HeldOut(
        int(text.held_out.size),
        measured["full"].perplexity,
        uniform.perplexity,
        measured[best].perplexity,
        uniform.kl,
        measured[best].kl,
    )
    # what else the profile says is for other rules
    chosen = replace(candidates[ranked(others)[0]][0], held_out=held_out)
    # estimates that another rule is ahead of stay in the file, for who asks for them at another budget
    by_estimate = best in _ESTIMATES
    estimator = candidates[best][0].estimator if by_estimate else profile.estimator
    chosen = replace(chosen, token_rule="estimate" if by_estimate else chosen.token_rule, estimator=estimator)
    return Choice(chosen, candidates[best][1], measured, further, int(rest.size) if further else 0)


def _top_k(
    llm: Llama, profile: Profile, total: int, full: tuple, text: CalibrationText, rules: tuple
) -> Dict[str, Tuple[Profile, Plan]]:
    """The candidates with rules other than "estimate"; without "threshold" where this model cannot have it."""
    candidates, tables = {}, {}
    for allocation in ("alloc-l", "uniform"):
        candidate = replace(profile, allocation=allocation, token_rule="off", threshold_table=None, held_out=None)
        plan = candidate.plan(total, full)
        if "threshold" in rules:
            if plan not in tables:
                tables[plan] = thresholds.calibrate(llm, plan, text.profile)
            candidate = replace(candidate, threshold_table=tables[plan])
        for rule in rules:
            if rule != "threshold" or tables[plan] is not None:
                ruled = replace(candidate, token_rule=rule)
                candidates[f"{allocation}, token rule {rule}"] = (ruled, ruled.with_token_rule(plan))
    return candidates


def _without(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Those rows that are not among the others."""
    known = {row.tobytes() for row in others}
    return rows[[row.tobytes() not in known for row in rows]]


def _estimates(profile: Profile, total: int, full: tuple) -> Dict[str, Tuple[Profile, Plan]]:
    """The candidates with the rule "estimate", none without an estimator."""
    found: Dict[str, Tuple[Profile, Plan]] = {}
    if profile.estimator is not None:
        for name, part in _ESTIMATES.items():
            estimator = profile.estimator.levelled(total, full, profile.k_base, part) if part else profile.estimator
            of = replace(profile, estimator=estimator)
            found[name] = of, of.plan(total, full, "estimate")
    return found


def report(choice: Choice, max_increase: float = np.inf) -> None:
    """Says what was compared, and where the choice is not what one would expect."""

    def table(found: Dict[str, Score]) -> None:
        for name, score in found.items():
            say(f"  {score.perplexity:26.3f}  {score.kl:17.4f}  {score.spent:11.0f}  {name}")

    say("on held-out text:  perplexity  divergence (nats)  activations")
    table(choice.scores)
    if choice.further:
        say(f"the two best on {choice.n_further} further tokens, by which and the above the better one is chosen:")
        table(choice.further)
    held_out = choice.profile.held_out
    assert held_out is not None
    increase = held_out.plan / held_out.full - 1
    if increase > max_increase:
        say(f"no plan is within the limit: perplexity {_beside(increase, max_increase)}")
    if choice.plan.token_rule == "estimate":
        if held_out.kl_plan > held_out.kl_uniform:
            say("this plan does worse than uniform k on held-out text; it is written because --token-rule asks for it")
        return
    if choice.profile.estimator is not None:
        say("estimates do no better here; they stay in the file, for other budgets with token_rule='estimate'")
    if choice.profile.allocation == "uniform":
        alloc_l, uniform = (
            min(score.kl for name, score in choice.scores.items() if name.startswith(of))
            for of in ("alloc-l", "uniform")
        )
        why = f"divergence decides, and is {alloc_l:.4f} by Alloc-L's plan and {uniform:.4f} by uniform k"
        if alloc_l < uniform:
            why = "Alloc-L's plan does not keep to the limit of perplexity"
        say(
            f"{why}: the uniform plan is written. On {held_out.n_tokens} tokens a small difference may be chance; more "
            "calibration text (--calib, --calib-tokens) tells more"
        )


def smallest_total(
    llm: Llama,
    profile: Profile,
    full: tuple,
    text: CalibrationText,
    max_increase: float,
    token_rule: Optional[str] = None,
) -> int:
    """The least total of activations whose plan keeps held-out perplexity within (1 + max_increase) of the full model's.

    By bisection, so it takes perplexity to fall as the total grows; the full budget where nothing less will do. token_rule: as for
    `choose`, but None does without thresholds, which are calibrated anew for each total.
    """
    low, high = sum(min(k, profile.k_base) for k in full), sum(full)
    # of the step that came nearest to the limit
    distance, error = np.inf, 0.0
    while low < high:
        middle = (low + high) // 2
        candidates: Dict[str, Tuple[Profile, Plan]] = {}
        if token_rule != "estimate":
            candidates |= _top_k(llm, profile, middle, full, text, (token_rule or "off",))
        if token_rule in (None, "estimate"):
            candidates |= _estimates(profile, middle, full)
        found = scores(llm, full, {name: plan for name, (_, plan) in candidates.items()}, text.held_out)
        increases = {name: found[name].perplexity / found["full"].perplexity - 1 for name in candidates}
        best = min(candidates, key=lambda name: (increases[name] > max_increase, found[name].kl))
        increase = increases[best]
        spread = f"standard error {found[best].error:.2%}"
        say(f"  {middle} of {sum(full)} activations: perplexity {_beside(increase, max_increase)}, {spread}")
        if abs(increase - max_increase) < distance:
            distance, error = abs(increase - max_increase), found[best].error
        if increase <= max_increase:
            high = middle
        else:
            low = middle + 1
    if 2 * error > max_increase:
        say(
            f"a limit of {100 * max_increase:g}% cannot be told on {text.held_out.size} held-out tokens: by chance perplexity is off by up "
            f"to {2 * error:.1%} there, twice the standard error; --calib-tokens takes more"
        )
    return low


def _beside(increase: float, limit: float) -> str:
    """In per cent, with as many digits as tell on which side of the limit it is."""
    for digits in range(1, 16):
        text = f"{increase:+.{digits}%}"
        if (float(text[:-1]) / 100 <= limit) == (increase <= limit):
            break
    return text

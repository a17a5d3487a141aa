"""The methods that are compared, each as a plan for a total of expert activations per token.

"Equal mean activations" is what makes them comparable: every threshold is calibrated, on text that is not evaluated on,
so that tokens activate the budget in the mean.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, Dict, Optional, Sequence

from allocmoe_edge import Llama, Plan, PlanError, parse_budget
from allocmoe_edge.convert import pipeline, sensitivity, thresholds
from allocmoe_edge.convert.checkpoint import Checkpoint
from allocmoe_edge.convert.settings import Settings
from allocmoe_edge.convert.source import Source
from allocmoe_edge.convert.task import plan_task
from allocmoe_edge.plan import metadata
from allocmoe_edge.plan.planner import allocate
from allocmoe_edge.plan.profile import thresholds_at
import lexi
import numpy as np


@dataclass(frozen=True)
class Setting:
    """What a method may use.

    calib: int32 windows, shape [n, n_ctx], of the calibration text in `calib_path`, or, if that is None, of what the
    model wrote with the seed `sample`.
    args: of the command line; calib_tokens, isolated_tokens, ctx_size, threads and output are used.
    """

    llm: Llama
    full: tuple
    path: Path
    calib: np.ndarray
    calib_path: Optional[Path]
    sample: int
    args: argparse.Namespace

    def output(self, suffix: str) -> Path:
        """Path of what belongs to this calibration sample."""
        return self.args.output / f"{'calibration' if self.calib_path else 'self-generated'}-{self.sample}{suffix}"


@dataclass(frozen=True)
class Method:
    """plan: of a Setting and a total. calibrated: it depends on the calibration text. decode: it is evaluated token by
    token too, because its rule does something else there, or, for ours, to show that it does not."""

    title: str
    plan: Callable[[Setting, int], Plan]
    calibrated: bool = True
    decode: bool = False


# layers


def spend_exactly(rows: Sequence[np.ndarray], total: int, full: tuple) -> Plan:
    """The plan of least total sensitivity with exactly `total` activations, even where fewer would do no worse."""
    # a reward per activation above any difference of sensitivities makes every activation worth buying
    reward = 1 + 2 * sum(float(np.ptp(row)) for row in rows if len(row))
    return allocate([row - reward * np.arange(1, len(row) + 1) for row in rows], total, full)


def uniform(setting: Setting, total: int) -> Plan:
    return Plan.uniform(setting.full, total)


def _profiled(mode: str, metric: str) -> Callable[[Setting, int], Plan]:
    def plan(setting: Setting, total: int) -> Plan:
        calib = setting.calib
        if mode == "isolated" and setting.args.isolated_tokens:
            calib = calib[: max(1, setting.args.isolated_tokens // calib.shape[1])]
        # where allocmoe-convert keeps its cells, so that `ours` finds those that it needs too
        with Checkpoint(convert_settings(setting, total).checkpoint, setting.path) as checkpoint:
            rows, _ = sensitivity.measure(setting.llm, setting.full, calib, mode, metric, checkpoint)
        return spend_exactly(rows, total, setting.full)

    return plan


def lexi_plan(setting: Setting, total: int) -> Plan:
    try:
        rows = lexi.sensitivities(setting.path, setting.full)
    except ValueError as error:
        raise PlanError(str(error)) from None
    return spend_exactly(rows, total, setting.full)


# tokens


def _batch(layers: Callable[[Setting, int], Plan]) -> Callable[[Setting, int], Plan]:
    return lambda setting, total: replace(layers(setting, total), token_rule="batch")


def _threshold(layers: Callable[[Setting, int], Plan]) -> Callable[[Setting, int], Plan]:
    def plan(setting: Setting, total: int) -> Plan:
        counts = layers(setting, total)
        table = thresholds.calibrate(setting.llm, counts, setting.calib)
        if table is None:
            raise PlanError("token rules need a model whose experts are on the CPU alone")
        threshold = thresholds_at(table, counts.expert_used_count)
        return replace(counts, token_rule="threshold", threshold=threshold)

    return plan


def _on_value(value: str, scope: str) -> Callable[[Setting, int], Plan]:
    return lambda setting, total: calibrated_on_value(setting.llm, setting.full, total, value, scope, setting.calib)


def calibrated_on_value(
    llm: Llama, full: tuple, total: int, value: str, scope: str, calib: np.ndarray, rounds: int = 3
) -> Plan:
    """A threshold on `value` at which tokens activate `total` experts in the mean over the calibration text.

    Args:
        scope: "layer" for one threshold a layer, each at the layer's share of the total; "model" for one for all.
        rounds: runs over the text. Skipping experts changes what later layers see, so the thresholds of one run are
            calibrated again under what they do.

    Raises:
        PlanError: a layer has fewer than three experts, scores are no probabilities, or the model cannot run rules.
    """
    layers = [il for il, k in enumerate(full) if k]
    for il in layers:
        if full[il] < 3:
            raise PlanError(f"layer {il}: {full[il]} experts, want at least 3 for a threshold to choose among")
    # the counts only say that a layer has something to choose
    even = Plan.uniform(full, total).expert_used_count
    counts = [min(max(2, k), own - 1) if own else 0 for k, own in zip(even, full)]
    plan = Plan(counts, full, token_rule="batch", value=value)
    _check_probabilities(llm, replace(plan, value="score"), calib[:1])
    for _ in range(rounds):
        values = thresholds.recorded_values(llm, plan, calib)
        if scope == "model":
            limits = dict.fromkeys(layers, _limit([values[il] for il in layers], total))
        else:
            limits = {il: _limit([values[il]], full[il] * total / sum(full)) for il in layers}
        plan = replace(plan, token_rule="threshold", threshold=[limits.get(il, 0.0) for il in range(len(full))])
    return plan


def _limit(values: list, mean: float) -> float:
    """The value from which candidates are activated so that tokens activate `mean` experts, their best ones included.

    values: a float32 array [n_tokens, K_l] for each of the layers over which the mean is to be summed.
    """
    pool = np.sort(np.concatenate([rows[:, 1:].ravel() for rows in values]))[::-1]
    n_chosen = round((mean - len(values)) * len(values[0]))
    return float(pool[min(n_chosen, pool.size) - 1]) if n_chosen > 0 else float("inf")


def _check_probabilities(llm: Llama, plan: Plan, window: np.ndarray) -> None:
    recorded = thresholds.recorded_values(llm, plan, window)
    if recorded is None:
        raise PlanError("token rules need a model whose experts are on the CPU alone")
    for il, scores in enumerate(recorded):
        if scores.size and not (scores.min() >= 0 and scores.max() <= 1):
            raise PlanError(f"layer {il}: routing scores from {scores.min():g} to {scores.max():g}, want probabilities")


# ours


def convert_settings(setting: Setting, total: int, token_rule: Optional[str] = None) -> Settings:
    """Of allocmoe-convert with its defaults, this calibration text, and a budget of `total`."""
    args = setting.args
    text = {"calib": setting.calib_path} if setting.calib_path else {"seed": setting.sample}
    return Settings(
        setting.path,
        setting.output(".plan"),
        plan_only=True,
        budget=str(total),
        token_rule=token_rule,
        calib_tokens=args.calib_tokens,
        estimate_tokens=args.estimate_tokens,
        ctx_size=args.ctx_size,
        threads=args.threads,
        **text,
    )


def plan_path(setting: Setting, method: str, total: int) -> Path:
    """Where a method of ours leaves its plan: an estimator is too large for the checkpoint."""
    return setting.output(f".{method}.{total}.plan.gguf")


def _keep(setting: Setting, method: str, total: int, plan: Plan, profile: metadata.Profile) -> None:
    metadata.write_side_file(plan_path(setting, method, total), metadata.read(setting.path), plan, profile)


def _ours(method: str, token_rule: Optional[str] = None) -> Callable[[Setting, int], Plan]:
    """What allocmoe-convert writes."""

    def plan(setting: Setting, total: int) -> Plan:
        task = plan_task(convert_settings(setting, total, token_rule), Source(setting.path, temporary=False))
        choice = pipeline.measure(replace(task, stored=None))
        _keep(setting, method, total, choice.plan, choice.profile)
        return choice.plan

    return plan


def _one_file(setting: Setting, total: int) -> Plan:
    """What Llama(budget=total) does with the file that allocmoe-convert writes for half."""
    half = parse_budget("0.5", sum(setting.full), sum(k > 0 for k in setting.full))
    path = plan_path(setting, "ours", half)
    if not path.exists():
        METHODS["ours"].plan(setting, half)
    profile = metadata.read(path).profile
    plan = profile.plan(total, setting.full)
    _keep(setting, "ours-one-file", total, plan, profile)
    return plan


_paper, _fast = _profiled("isolated", "perplexity"), _profiled("fast", "kl")

METHODS: Dict[str, Method] = {
    "uniform": Method("uniform k", uniform, calibrated=False),
    "alloc-l-paper": Method("Alloc-L, isolated perplexity profile (the paper's)", _paper),
    "alloc-l-fast": Method("Alloc-L, fast KL profile", _fast),
    "alloc-t-batch": Method("Alloc-T, batch (the paper's)", _batch(uniform), calibrated=False, decode=True),
    "alloc-t-threshold": Method("Alloc-T, threshold", _threshold(uniform)),
    "paper": Method("both, as in the paper (isolated, batch)", _batch(_paper), decode=True),
    "paper-threshold": Method("both, isolated profile and threshold", _threshold(_paper)),
    "fast-batch": Method("both, fast profile and batch", _batch(_fast), decode=True),
    "fast-threshold": Method("both, fast profile and threshold", _threshold(_fast)),
    "lexi": Method("LExI", lexi_plan, calibrated=False),
    "naee": Method("NAEE, K > 2", _on_value("relative", "layer")),
    "dynamic-moe": Method("Dynamic-MoE, top-p", _on_value("remaining", "model")),
    "ser": Method("ik_llama.cpp -ser", _on_value("relative", "model")),
    "ours-threshold": Method("ours without estimates (--token-rule threshold)", _ours("ours-threshold", "threshold")),
    "ours": Method("ours (allocmoe-convert)", _ours("ours"), decode=True),
    "ours-one-file": Method("ours, the file for half at another budget", _one_file),
}

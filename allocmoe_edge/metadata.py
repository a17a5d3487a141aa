"""How the plan travels: the allocmoe.* keys of a GGUF file.

| key | type | meaning |
| --- | --- | --- |
| allocmoe.version | uint32 | version of these keys, 1 |
| allocmoe.expert_used_count | int32[block_count] | planned experts per token, 0 where a layer routes none |
| allocmoe.budget_total | uint32 | their sum |
| allocmoe.token_rule | string | how a layer's activations are shared among tokens: off (top-k), batch, threshold |
| allocmoe.k_base | uint32 | experts that every token keeps under batch and threshold |
| allocmoe.threshold | float32[block_count] | for threshold: the routing score from which a candidate is activated |
| allocmoe.allocation | string | how the plan was made: alloc-l, or uniform where Alloc-L lost on held-out text |
| allocmoe.sensitivity | float64[sum of K_l] | S[l,k], k = 1..K_l, rows of the layers with experts in order |
| allocmoe.sensitivity.metric, .mode | string | what S holds (perplexity), how it was measured (isolated) |
| allocmoe.threshold_table | float32[sum of K_l] | t[l,k], the threshold at which the mean is k; rows as above |
| allocmoe.cost | float64[block_count] | cost of one activation in each layer |
| allocmoe.calibration.source, .sha256 | string | the calibration text, by name and by hash of its token ids |
| allocmoe.calibration.n_tokens | uint32 | its length in tokens |

Only the first two are needed to run a plan; the rest lets another budget be planned without profiling again.
The model's own expert_used_count stays as it is, so that stock llama.cpp loads the file at full budget.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Optional

import numpy as np

from .gguf_file import GGUFError, GGUFFile, expert_used_count_full
from .plan import Plan, PlanError, parse_budget
from .planner import allocate

VERSION = 1
ALLOCATIONS = ("alloc-l", "uniform")


@dataclass(frozen=True)
class Calibration:
    source: str
    n_tokens: int
    sha256: str


@dataclass(frozen=True)
class Profile:
    """What was measured on a model, enough to plan any budget.

    sensitivity: one float64 array of shape [K_l] per layer, empty where the layer routes no experts.
    cost: cost of one activation per layer, length block_count.
    threshold_table: one float32 array of shape [K_l] per layer: the routing score from which candidates beyond the
        k_base best are activated so that the mean is k = 1..K_l; None if it was not calibrated.
    token_rule: the rule to plan with unless another is asked for.
    """

    sensitivity: tuple
    cost: tuple
    calibration: Calibration
    allocation: str = "alloc-l"
    metric: str = "perplexity"
    mode: str = "isolated"
    threshold_table: Optional[tuple] = None
    k_base: int = 1
    token_rule: str = "off"

    def plan(self, budget, full: tuple, token_rule: Optional[str] = None, strict: bool = False) -> Plan:
        """The plan for `budget` (a fraction or a total, see `parse_budget`) on a model with K_l = full.

        token_rule: None for the profile's own.
        """
        return self.with_token_rule(self._allocate(budget, full), token_rule, strict)

    def with_token_rule(self, plan: Plan, token_rule: Optional[str] = None, strict: bool = False) -> Plan:
        """The same experts per layer under a token rule; None as in `plan`."""
        token_rule = token_rule or self.token_rule
        threshold = None
        if token_rule == "threshold":
            if self.threshold_table is None:
                raise PlanError("token_rule 'threshold' needs a threshold table, and the file has none: convert it again")
            # layers without experts have no row, and nothing reads their entry
            threshold = [
                float(row[k - 1]) if k else 0.0 for row, k in zip(self.threshold_table, plan.expert_used_count)
            ]
        return replace(plan, token_rule=token_rule, k_base=self.k_base, threshold=threshold, strict=strict)

    def _allocate(self, budget, full: tuple) -> Plan:
        total = parse_budget(budget, sum(full), sum(k > 0 for k in full))
        if self.allocation == "uniform":
            return Plan.uniform(full, total)
        rows = [row[:k] for row, k in zip(self.sensitivity, full)]
        if all(c == 1 for c in self.cost):
            return allocate(rows, total, full)
        share = total / sum(full)
        budget_cost = share * sum(c * k for c, k in zip(self.cost, full))
        return allocate(rows, budget_cost, full, cost=self.cost)


@dataclass(frozen=True)
class ModelPlan:
    """What a GGUF file says about experts.

    full: the model's own K_l per layer; None for a dense model.
    plan, profile: from the allocmoe.* keys; None where the file has none.
    """

    full: Optional[tuple]
    plan: Optional[Plan] = None
    profile: Optional[Profile] = field(default=None, repr=False)


def read(path) -> ModelPlan:
    """Reads and checks everything about experts in a GGUF file.

    Raises:
        GGUFError: no such file, not a GGUF file, damaged, or expert keys that contradict each other.
        PlanError: allocmoe.* keys that this version does not know or that do not fit the model.
    """
    with GGUFFile(path) as file:
        full = expert_used_count_full(file)
        version = file.get("allocmoe.version")
        if version is None:
            return ModelPlan(full)
        if version != VERSION:
            raise PlanError(f"{path}: allocmoe.version is {version!r}, this allocmoe-edge reads version {VERSION}")
        if full is None:
            raise PlanError(f"{path}: has a plan (allocmoe.*) but the model has no experts")
        try:
            planned = _array(file, "allocmoe.expert_used_count", np.int32, len(full))
            rule = file.get("allocmoe.token_rule", "off")
            threshold = None
            if rule == "threshold":
                threshold = _array(file, "allocmoe.threshold", np.float32, len(full)).tolist()
            plan = Plan(planned, full, rule, file.get("allocmoe.k_base", 1), threshold)
        except PlanError as error:
            raise PlanError(f"{path}: allocmoe.{error}") from None
        return ModelPlan(full, plan, _read_profile(file, full))


def write(file: GGUFFile, plan: Plan, profile: Optional[Profile]) -> None:
    """Sets the allocmoe.* keys in an open file's metadata, replacing all that were there."""
    for key in [key for key in file.keys() if key.startswith("allocmoe.")]:
        file.set(key, None)
    file.set("allocmoe.version", VERSION)
    file.set("allocmoe.expert_used_count", np.array(plan.expert_used_count, np.int32))
    file.set("allocmoe.budget_total", plan.budget_total)
    file.set("allocmoe.token_rule", plan.token_rule)
    file.set("allocmoe.k_base", plan.k_base)
    if plan.threshold is not None:
        file.set("allocmoe.threshold", np.array(plan.threshold, np.float32))
    if profile is None:
        return
    file.set("allocmoe.allocation", profile.allocation)
    file.set("allocmoe.sensitivity", np.concatenate([np.asarray(row, np.float64) for row in profile.sensitivity]))
    if profile.threshold_table is not None:
        rows = [np.asarray(row, np.float32) for row in profile.threshold_table]
        file.set("allocmoe.threshold_table", np.concatenate(rows))
    file.set("allocmoe.sensitivity.metric", profile.metric)
    file.set("allocmoe.sensitivity.mode", profile.mode)
    file.set("allocmoe.cost", np.array(profile.cost, np.float64))
    file.set("allocmoe.calibration.source", profile.calibration.source)
    file.set("allocmoe.calibration.n_tokens", profile.calibration.n_tokens)
    file.set("allocmoe.calibration.sha256", profile.calibration.sha256)


def _array(file: GGUFFile, key: str, dtype, n: int) -> np.ndarray:
    value = file.get(key)
    if not isinstance(value, np.ndarray) or value.dtype != dtype:
        found = "nothing" if value is None else f"{value.dtype} array" if isinstance(value, np.ndarray) else repr(value)
        raise PlanError(f"{key[9:]}: found {found}, want an array of {np.dtype(dtype).name}")
    if len(value) != n:
        raise PlanError(f"{key[9:]}: found {len(value)} entries, want {n}")
    return value


def _read_profile(file: GGUFFile, full: tuple) -> Optional[Profile]:
    if file.get("allocmoe.sensitivity") is None:
        return None
    try:
        flat = _array(file, "allocmoe.sensitivity", np.float64, sum(full))
        cost = _array(file, "allocmoe.cost", np.float64, len(full))
        if not np.isfinite(flat).all():
            raise PlanError("sensitivity: found NaN or infinity, want finite numbers")
        if not (np.isfinite(cost).all() and (cost > 0).all()):
            raise PlanError("cost: found an entry that is not a positive number")
        table = None
        if file.get("allocmoe.threshold_table") is not None:
            table = _array(file, "allocmoe.threshold_table", np.float32, sum(full))
            if np.isnan(table).any():
                raise PlanError("threshold_table: found NaN, want numbers")
            table = tuple(np.split(table, np.cumsum(full)[:-1]))
        allocation = file.get("allocmoe.allocation", "alloc-l")
        if allocation not in ALLOCATIONS:
            raise PlanError(f"allocation: found {allocation!r}, want one of: {', '.join(ALLOCATIONS)}")
    except PlanError as error:
        raise PlanError(f"{file.path}: allocmoe.{error}") from None
    return Profile(
        sensitivity=tuple(np.split(flat, np.cumsum(full)[:-1])),
        cost=tuple(cost.tolist()),
        calibration=Calibration(
            str(file.get("allocmoe.calibration.source", "unknown")),
            int(file.get("allocmoe.calibration.n_tokens", 0)),
            str(file.get("allocmoe.calibration.sha256", "")),
        ),
        allocation=allocation,
        metric=str(file.get("allocmoe.sensitivity.metric", "perplexity")),
        mode=str(file.get("allocmoe.sensitivity.mode", "isolated")),
        threshold_table=table,
        k_base=int(file.get("allocmoe.k_base", 1)),
        token_rule=file.get("allocmoe.token_rule", "off"),
    )

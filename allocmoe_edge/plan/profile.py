"""What was measured on a model, and the plans that follow from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Optional, Sequence

import numpy as np

from .estimator import Estimator
from .plan import Plan, PlanError, parse_budget
from .planner import allocate_totals


@dataclass(frozen=True)
class Calibration:
    source: str
    n_tokens: int
    sha256: str


@dataclass(frozen=True)
class HeldOut:
    """The plan on text that it was not made from: perplexities, and divergences (KL) from the full model in nats."""

    n_tokens: int
    full: float
    uniform: float
    plan: float
    kl_uniform: float
    kl_plan: float


def thresholds_at(table: Sequence, counts: Sequence[int]) -> tuple:
    """Each layer's threshold at its count, of a table as a `Profile` has it; 0 where it has no experts, which nothing reads."""
    return tuple(float(row[k - 1]) if k else 0.0 for row, k in zip(table, counts))


@dataclass(frozen=True)
class Profile:
    """What was measured on a model, enough to plan any budget.

    sensitivity: one float64 array of shape [K_l] per layer, empty where the layer routes no experts.
    cost: cost of one activation per layer, length block_count, in `cost_unit` ("activations" or "ms").
    held_out: how the plan in the file did; None where it was not checked, or was planned anew since.
    threshold_table: one float32 array of shape [K_l] per layer: the value from which candidates beyond the
        k_base best are activated so that the mean is k = 1..K_l; None if it was not calibrated.
    token_rule: the rule to plan with unless another is asked for.
    estimator: what token rule "estimate" goes by; None if it was not calibrated.
    """

    sensitivity: tuple
    cost: tuple
    calibration: Calibration
    allocation: str = "alloc-l"
    metric: str = "kl"
    mode: str = "fast"
    threshold_table: Optional[tuple] = None
    k_base: int = 1
    token_rule: str = "off"
    cost_unit: str = "activations"
    held_out: Optional[HeldOut] = None
    estimator: Optional[Estimator] = None

    def plan(self, budget, full: tuple, token_rule: Optional[str] = None, strict: Optional[bool] = None) -> Plan:
        """The plan for `budget` (a fraction or a total, see `parse_budget`) on a model with K_l = full.

        token_rule: None for the profile's own. strict: None for True under "estimate" and False under other rules.
        """
        token_rule = token_rule or self.token_rule
        if token_rule != "estimate":
            return self.with_token_rule(self._allocate(budget, full), token_rule, strict or False)
        if self.estimator is None:
            raise PlanError("token_rule 'estimate' needs an estimator, and the file has none: convert it again")
        total = parse_budget(budget, sum(full), sum(k > 0 for k in full))
        return replace(self.estimator.plan(total, full, self.k_base, self._cost()), strict=strict is not False)

    def with_token_rule(self, plan: Plan, token_rule: Optional[str] = None, strict: Optional[bool] = None) -> Plan:
        """The same experts per layer under a token rule, None as in `plan`; as many in all where "estimate" comes or goes."""
        token_rule = token_rule or self.token_rule
        if "estimate" in (token_rule, plan.token_rule):
            same = token_rule == plan.token_rule
            if same:
                return replace(plan, strict=strict is not False)
            return self.plan(self._total_of(plan), plan.expert_used_count_full, token_rule, strict)
        threshold = None
        if token_rule == "threshold":
            if self.threshold_table is None:
                raise PlanError(
                    "token_rule 'threshold' needs a threshold table, and the file has none: convert it again"
                )
            threshold = thresholds_at(self.threshold_table, plan.expert_used_count)
        return replace(
            plan, token_rule=token_rule, k_base=self.k_base, threshold=threshold, strict=strict or False, value="score"
        )

    def _total_of(self, plan: Plan) -> int:
        """The total for which a plan was made: what it spends, but where a budget counts milliseconds, and the largest of several."""
        full = plan.expert_used_count_full
        if plan.token_rule == "estimate" and self.estimator is not None:
            counts, threshold = self.estimate_table(full)
            asked = np.float32(threshold) == np.float32(plan.threshold)  # as a file has them
            same = (counts == plan.expert_used_count).all(axis=1) & asked.all(axis=1)
        else:
            same = (self.plan_table(full) == plan.expert_used_count).all(axis=1)
        rows = np.flatnonzero(same)
        return sum(k > 0 for k in full) + int(rows[-1]) if len(rows) else plan.budget_total

    def plan_table(self, full: tuple) -> np.ndarray:
        """The counts of every total under the rules other than "estimate": int64 [n_totals, n_layer], as `allocate_totals`."""
        if self.allocation == "uniform":
            totals = range(sum(k > 0 for k in full), sum(full) + 1)
            return np.array([Plan.uniform(full, total).expert_used_count for total in totals])
        return allocate_totals(self._rows(full), full, self._cost(), self.k_base)

    def estimate_table(self, full: tuple) -> tuple:
        """The same under "estimate", and the thresholds, see `Estimator.plan_table`; for a profile that has an estimator."""
        assert self.estimator is not None
        return self.estimator.plan_table(full, self.k_base, self._cost())

    def _allocate(self, budget, full: tuple) -> Plan:
        total = parse_budget(budget, sum(full), sum(k > 0 for k in full))
        if self.allocation == "uniform":
            return Plan.uniform(full, total)
        # not `allocate`: a front of real costs is thinned by what it reaches up to
        return Plan(self.plan_table(full)[total - sum(k > 0 for k in full)], full)

    def _rows(self, full: tuple) -> list:
        return [row[:k] for row, k in zip(self.sensitivity, full)]

    def _cost(self) -> Optional[tuple]:
        return None if all(c == 1 for c in self.cost) else self.cost

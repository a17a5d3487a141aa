"""The plan: how many routed experts each layer spends on a token.

A `Plan` is checked once, when it is made, and cannot change afterwards, so code that holds one
need not check again. `parse_budget` turns what a user typed into the plan's total.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
import math
from numbers import Integral, Real
import re
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .estimator import Estimator

TOKEN_RULES = ("off", "batch", "threshold", "estimate")
VALUES = ("score", "relative", "remaining")


class PlanError(ValueError):
    """A plan, or what a plan is to be made from, is malformed; the message says where."""


# of a number of experts: the library's int32
_MOST = 2**31 - 1


def shown(value):
    """A value as an error shows it, in few words; Python refuses to write integers of thousands of digits."""
    try:
        text = repr(value)
    except ValueError:
        return "an integer of thousands of digits"
    return text if len(text) <= 100 else text[:97] + "..."


def integer_tuple(name, values):
    """`values`, any iterable of integers, as a tuple of Python ints.

    name: how the error calls it. Raises PlanError for anything else, bools and whole floats
    included: in metadata they mean that the wrong array was read.
    """
    # bytes and dicts iterate as integers, sets in no order: none of them is a list of layers.
    if isinstance(values, (str, bytes, bytearray, dict, set, frozenset)):
        raise PlanError(f"{name}: found {type(values).__name__}, want a sequence of integers, one per layer")
    try:
        values = tuple(values)
    except TypeError:
        raise PlanError(f"{name}: found {shown(values)}, want a sequence of integers, one per layer") from None
    for layer, v in enumerate(values):
        if isinstance(v, bool) or not isinstance(v, Integral) or not -_MOST <= v <= _MOST:
            raise PlanError(f"{name}, layer {layer}: found {shown(v)} ({type(v).__name__}), want an integer (int32)")
    return tuple(int(v) for v in values)


@dataclass(frozen=True)
class Plan:
    """Planned experts per token for every layer of one model.

    Below, K_l is the model's own number of experts per token in layer l, and k_l the planned one.

    expert_used_count: the k_l, one integer per layer (length block_count), 1 <= k_l <= K_l; 0 if
        the layer has no routed experts. Any integer sequence or 1-D integer array is accepted
        and kept as a tuple of ints.
    expert_used_count_full: the K_l, same length, 0 for such layers.
    token_rule: how a layer shares its k_l among the tokens (Alloc-T). "off": every token gets its
        top k_l. "batch": every token keeps its top k_base. Of the other candidates of the whole
        micro-batch those of the best scores run, so that it is k_l times its tokens in all.
        "threshold": every token keeps its top k_base, and each other candidate (up to rank K_l)
        whose routing score is at least the layer's threshold. k_l is then the mean over text like
        the calibration's. "estimate": the same by the estimated size of an expert's output in place
        of the score. This can leave out any rank, and an estimate of what is left out takes its
        place (see `estimator.py`).
    k_base: experts that every token keeps under any rule but "off". Under "batch" and "threshold" a
        layer with k_l <= k_base is plain top-k_l. Under "estimate" only the threshold decides, not k_l.
    threshold: one float per layer, for "threshold" and "estimate"; unused in layers without routed experts.
    strict: for "threshold": no layer's running mean rises above k_l, for activations beyond it are cut. For "estimate":
        each layer's threshold moves, slowly, so that its running mean stays near k_l on any text. In either case what a
        token gets depends on the tokens before it in its text. It does not depend on how they were cut into batches, nor
        on what else the context has read. The last layer runs only for the tokens whose output is wanted. It keeps its
        threshold, and never runs more than k_l.
    value: what "batch" and "threshold" go by, from the scores that the router ranks a token's experts by. "score": the
        score itself. "relative": divided by the token's best score, as in ik_llama.cpp's -ser and NAEE. "remaining":
        1 - the sum of the scores of better ranks, as in Dynamic-MoE's top-p. The last two are for scores that are
        probabilities (softmax or sigmoid of the router logits).
    estimator: what "estimate" goes by; None for the one in the model's file. Two plans that differ only here are equal.

    Raises PlanError, naming the layer, the value found and the value wanted.
    """

    expert_used_count: tuple[int, ...]
    expert_used_count_full: tuple[int, ...]
    token_rule: str = "off"
    k_base: int = 1
    threshold: tuple[float, ...] | None = None
    strict: bool = False
    value: str = "score"
    estimator: Estimator | None = field(default=None, repr=False, compare=False)

    def __post_init__(self):
        planned = integer_tuple("expert_used_count", self.expert_used_count)
        full = integer_tuple("expert_used_count_full", self.expert_used_count_full)
        # Full first: a model without routed experts should hear that, not a complaint about k.
        for layer, K in enumerate(full):
            if K < 0:
                raise PlanError(f"expert_used_count_full, layer {layer}: found {K}, want 0 (no routed experts) or up")
        if not any(full):
            raise PlanError(
                f"expert_used_count_full: found 0 in all {len(full)} layers, want at least one layer with routed experts"
            )
        if len(planned) != len(full):
            raise PlanError(
                f"expert_used_count: found {len(planned)} layers, want {len(full)}, as in expert_used_count_full"
            )
        for layer, (k, K) in enumerate(zip(planned, full)):
            if K == 0 and k != 0:
                raise PlanError(f"expert_used_count, layer {layer}: found {k}, want 0: the layer has no routed experts")
            if K > 0 and not 1 <= k <= K:
                raise PlanError(f"expert_used_count, layer {layer}: found {k}, want 1 to {K}, the model's own count")
        if not isinstance(self.token_rule, str) or self.token_rule not in TOKEN_RULES:
            raise PlanError(f"token_rule: found {shown(self.token_rule)}, want one of: {', '.join(TOKEN_RULES)}")
        if isinstance(self.k_base, bool) or not isinstance(self.k_base, Integral) or not 1 <= self.k_base <= _MOST:
            raise PlanError(f"k_base: found {shown(self.k_base)}, want an integer of at least 1 (int32)")
        by_threshold = self.token_rule in ("threshold", "estimate")
        if (self.threshold is not None) != by_threshold:
            want = "one per layer" if by_threshold else f"none with token_rule {self.token_rule!r}"
            raise PlanError(f"threshold: found {'none' if self.threshold is None else 'some'}, want {want}")
        if self.threshold is not None:
            object.__setattr__(self, "threshold", _float_tuple("threshold", self.threshold, len(full)))
        if not isinstance(self.strict, (bool, np.bool_)):
            raise PlanError(f"strict: found {shown(self.strict)}, want True or False")
        if self.strict and self.token_rule not in ("threshold", "estimate"):
            raise PlanError(f"strict: needs token_rule 'threshold' or 'estimate', found {self.token_rule!r}")
        if not isinstance(self.value, str) or self.value not in VALUES:
            raise PlanError(f"value: found {shown(self.value)}, want one of: {', '.join(VALUES)}")
        if self.value != "score" and self.token_rule in ("off", "estimate"):
            why = "which compares no scores"
            raise PlanError(f"value: found {self.value!r}, want 'score' with token_rule {self.token_rule!r}, {why}")
        if self.estimator is not None:
            from .estimator import Estimator

            if not isinstance(self.estimator, Estimator):
                raise PlanError(f"estimator: found {shown(self.estimator)}, want an Estimator or None")
            if self.token_rule != "estimate":
                raise PlanError(f"estimator: found one, want none with token_rule {self.token_rule!r}")
        # The fields are frozen; this is the one place that may set them.
        object.__setattr__(self, "strict", bool(self.strict))
        object.__setattr__(self, "k_base", int(self.k_base))
        object.__setattr__(self, "expert_used_count", planned)
        object.__setattr__(self, "expert_used_count_full", full)

    @classmethod
    def full(cls, expert_used_count_full):
        """The plan that spends what the model was trained to spend."""
        full = integer_tuple("expert_used_count_full", expert_used_count_full)
        return cls(full, full)

    @classmethod
    def uniform(cls, expert_used_count_full, budget_total):
        """The plan of exactly `budget_total` activations that treats all layers alike.

        Each layer's fair share is the same fraction of its K_l, but at least 1; k_l is that share
        rounded up or down. Where shares are not whole, the extra experts are spread evenly over
        the depth (running totals are rounded half up, as in Bresenham's line), so the same input
        always gives the same plan.

        budget_total: int, from the number of layers with routed experts to the sum of K_l.
        Raises PlanError.
        """
        everything = cls.full(expert_used_count_full)
        full, layers = everything.expert_used_count, everything.moe_layers
        if isinstance(budget_total, bool) or not isinstance(budget_total, Integral):
            raise PlanError(
                f"budget_total: found {shown(budget_total)} ({type(budget_total).__name__}), want an integer"
            )
        if not len(layers) <= budget_total <= sum(full):
            raise PlanError(
                f"budget_total: found {shown(budget_total)}, want {len(layers)} (one expert in each layer"
                f" with routed experts) to {sum(full)} (all of them)"
            )
        # A layer whose share is below 1 gets 1, which lowers the share of the others, until no
        # more fall below. Fractions: the running totals must end on budget_total exactly.
        above_one = set(layers)
        while True:
            share = Fraction(int(budget_total) - (len(layers) - len(above_one)), sum(full[i] for i in above_one))
            below = {i for i in above_one if share * full[i] < 1}
            if not below:
                break
            above_one -= below
        planned, running = [0] * len(full), Fraction(1, 2)
        for i in layers:
            upto = running + (share * full[i] if i in above_one else 1)
            planned[i] = math.floor(upto) - math.floor(running)
            running = upto
        return cls(planned, full)

    @property
    def n_layer(self):
        """Layers of the model (block_count), those without routed experts included."""
        return len(self.expert_used_count_full)

    @property
    def moe_layers(self):
        """Indices of the layers with routed experts, ascending."""
        return tuple(i for i, K in enumerate(self.expert_used_count_full) if K > 0)

    @property
    def budget_total(self):
        """Planned expert activations per token, summed over the layers."""
        return sum(self.expert_used_count)

    @property
    def budget_full(self):
        """The model's own expert activations per token, summed over the layers."""
        return sum(self.expert_used_count_full)

    @property
    def budget(self):
        """budget_total as a fraction of budget_full, in (0, 1]."""
        return self.budget_total / self.budget_full

    @property
    def mean(self):
        """Mean k_l over the layers with routed experts."""
        return self.budget_total / len(self.moe_layers)

    @property
    def mean_full(self):
        """Mean K_l over the layers with routed experts."""
        return self.budget_full / len(self.moe_layers)

    def __str__(self):
        return (
            f"budget {share_text(self.budget)}: {self.budget_total} of {self.budget_full} expert activations per token,"
            f" mean {self.mean:.1f} of {self.mean_full:.1f}, token rule {self.token_rule}"
        )


def _float_tuple(name, values, n):
    """`values`, any iterable of n real numbers, as a tuple of floats. Raises PlanError for anything else, NaN included."""
    try:
        values = tuple(values)
    except TypeError:
        raise PlanError(f"{name}: found {shown(values)}, want a sequence of numbers, one per layer") from None
    if len(values) != n:
        raise PlanError(f"{name}: found {len(values)} layers, want {n}")
    for layer, v in enumerate(values):
        if isinstance(v, bool) or not isinstance(v, Real):
            raise PlanError(f"{name}, layer {layer}: found {shown(v)} ({type(v).__name__}), want a number")
        if math.isnan(_float(v)):
            raise PlanError(f"{name}, layer {layer}: found NaN, want a number")
    return tuple(map(_float, values))


def _float(value):
    """A real number as float, infinite where it is beyond those."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def share_text(share):
    """A budget as a share in (0, 1], as text: 1.00 for the full one alone."""
    return f"{share:.2f}" if share < 0.995 or share == 1 else f"{math.floor(1000 * share) / 1000:.3f}"


def looks_like_percent(budget, budget_full):
    """Whether somebody who writes `budget`, a whole number of activations, may have meant a percentage: it is written like
    one, and less than half of what it would be then. budget_full: sum of K_l."""
    value = _number(budget)
    return isinstance(value, int) and not isinstance(value, bool) and 2 <= value <= 100 and 200 < budget_full


def parse_budget(budget, budget_full, n_moe_layers):
    """The total of expert activations per token, B, that `budget` asks for.

    budget: a float f in (0, 1] is a share of the model's own activations, B = floor(f *
        budget_full + 0.5), as are a Fraction and a Decimal; an int is B itself. As a string: "0.5" and "50%" are shares,
        digits alone are B. 1 is the full model, as 1.0, but with a single layer of routed experts it is one activation.
    budget_full: sum of K_l. n_moe_layers: layers with routed experts; each needs one activation.

    Returns an int from n_moe_layers to budget_full. Raises PlanError with the allowed range.
    """
    for name, v in (("budget_full", budget_full), ("n_moe_layers", n_moe_layers)):
        if isinstance(v, bool) or not isinstance(v, Integral):
            raise PlanError(f"{name}: found {v!r} ({type(v).__name__}), want an integer")
    if not 1 <= n_moe_layers <= budget_full:
        raise PlanError(
            f"n_moe_layers: found {n_moe_layers}, want 1 to {budget_full} (budget_full): each such layer has an expert"
        )
    # Rounded up, so that the number we print is itself accepted.
    lowest = math.ceil(Fraction(int(n_moe_layers), int(budget_full)) * 10**4) / 10**4
    want = (
        f"want a share from {lowest:g} to 1.0, or a whole number of expert activations per token"
        f" from {n_moe_layers} (one per layer with routed experts) to {budget_full}"
    )
    value = _number(budget)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise PlanError(f"budget: found {shown(budget)}, {want}")
    if isinstance(value, Integral):
        total = int(budget_full if value == 1 < n_moe_layers else value)
        if 1 < total <= 100:
            want += f'; {total} per cent are written "{total}%" or {total / 100:g}'
    else:
        share = _float(value)
        if not 0 < share <= 1:  # also catches NaN
            hint = "; a total is written without a decimal point" if share > 1 and "%" not in shown(budget) else ""
            raise PlanError(f"budget: found {shown(budget)}, {want}{hint}")
        total = math.floor(share * int(budget_full) + 0.5)
    if not n_moe_layers <= total <= budget_full:
        got = "" if isinstance(value, Integral) else f" (= {total} activations)"
        raise PlanError(f"budget: found {shown(budget)}{got}, {want}")
    return total


def _number(budget):
    """A string as int or float, None where it is neither, a Decimal as float; anything else unchanged."""
    if isinstance(budget, Decimal):
        return math.nan if budget.is_nan() else float(budget)
    if not isinstance(budget, str):
        return budget
    # Our own grammar: int() and float() also take "1_0", "nan", and digits of other scripts. A
    # limit on whole digits, because int() refuses thousands of them with an error of its own.
    match = re.fullmatch(r"\s*([0-9]{1,18})?(\.[0-9]*)?\s*(%)?\s*", budget, re.ASCII)
    if not match or not re.search("[0-9]", budget):
        return None
    whole, decimals, percent = match.groups()
    number = (whole or "") + (decimals or "")
    if percent:
        # By the exponent and not by / 100: "29.3%" and "0.293" must be the same float.
        return float(number + "e-2")
    return int(number) if decimals is None else float(number)

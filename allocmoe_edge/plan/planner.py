"""Alloc-L: spread a budget of expert activations over the layers of a model.

Source: Alloc-MoE, Liu et al., ACL 2026, arXiv 2604.08133: a grouped knapsack, one group per
layer, of which exactly one item k is taken, DP[l,b] = min over k of DP[l-1,b-k] + S[l,k]. We keep
the same recursion but as a Pareto front instead of a table over b: with unit costs the front has
at most one state per b, and costs that are real numbers (bytes, microseconds) need no grid.
"""

from __future__ import annotations

import math
from numbers import Integral, Real

import numpy as np

from .plan import Plan, PlanError, integer_tuple

# Unit costs never get here: a front holds at most one state per total. See `allocate`.
MAX_STATES = 200_000


def allocate(sensitivity, budget_total, expert_used_count_full, *, k_min=1, k_max=None, cost=None):
    """The plan of least total damage within the budget.

    Minimises sum of S[l, k_l] subject to sum of cost_l * k_l <= budget_total and
    k_min_l <= k_l <= k_max_l. It may spend less than the budget: where more experts do not help,
    they are not bought.

    sensitivity: sequence of n_layer 1-D real arrays (kept as float64); row l has shape (K_l,),
        S[l][k-1] = damage with k experts in layer l, in any unit that adds up over layers; empty
        where K_l = 0. Rows need not be monotone in k.
    budget_total: expert activations per token, an int; with `cost`, a number in cost units.
    expert_used_count_full: K_l, n_layer integers, 0 where the layer has no routed experts.
    k_min, k_max: int, or n_layer integers, 1 <= k_min_l <= k_max_l <= K_l; k_max None: K_l.
    cost: n_layer positive numbers, what one activation of layer l costs; None: 1 each. Entries of
        bounds and costs in layers with K_l = 0 are not used.

    Ties are broken in this order: lower damage; lower cost; smaller sum of k_l^2 / K_l, which
    prefers an even share of each K_l to extremes; fewer experts in the last layer where the plans
    differ.

    Exact where costs and budget are integers (totals below 2^53). With real costs exact up to
    float rounding: a total may pass the budget by one part in 10^12, so that a budget that is the
    sum of its parts buys them whatever the order of addition. A front beyond MAX_STATES states is
    thinned to real states, never above the budget; the plan is then at least as good as the best
    one for budget_total * (1 - n_moe_layers / MAX_STATES).

    Returns a Plan with token_rule "off". Raises PlanError naming the argument, the layer, the
    value found and the value wanted.
    """
    whole = Plan.full(expert_used_count_full)
    full, layers = whole.expert_used_count, whole.moe_layers
    lo = _bound("k_min", k_min, full)
    hi = full if k_max is None else _bound("k_max", k_max, full)
    for i in layers:
        if not 1 <= lo[i] <= full[i]:
            raise PlanError(f"k_min, layer {i}: found {lo[i]}, want 1 to {full[i]}, the model's own count")
        if not lo[i] <= hi[i] <= full[i]:
            raise PlanError(f"k_max, layer {i}: found {hi[i]}, want {lo[i]} (k_min) to {full[i]}, its own count")
    damages = _check_sensitivity(sensitivity, full)
    unit = _check_cost(cost, hi, layers)
    cap = _check_budget(budget_total, cost is None, unit, lo, layers)
    _, steps = _fronts(damages, full, layers, lo, hi, unit, cap)
    return Plan(
        _path(steps, layers, full, -1), full
    )  # a front falls in damage as it grows in cost: its last state is best


def allocate_totals(sensitivity, expert_used_count_full, cost=None, k_base=1):
    """The plans of every budget at once: int64 [n_totals, n_layer], row r for n_moe_layers + r activations, up to all.

    Without costs, a row is `allocate` of its total. With costs, it is the best that costs no more than the same share of
    what all activations cost: the total of activations / sum(K_l). Where that buys k_base experts in every layer, or all that
    it has, no layer gets fewer.
    """
    whole = Plan.full(expert_used_count_full)
    full, layers = whole.expert_used_count, whole.moe_layers
    damages = _check_sensitivity(sensitivity, full)
    unit = _check_cost(cost, full, layers)
    most = sum(unit[i] * full[i] for i in layers)
    fronts = [
        _fronts(damages, full, layers, [min(k, least) for k in full], full, unit, most * (1 + 1e-12))
        for least in sorted({1, k_base}, reverse=True)
    ]
    rows = []
    for total in range(len(layers), sum(full) + 1):
        budget = total if cost is None else total / sum(full) * most * (1 + 1e-12)
        spent, steps = next((front for front in fronts if front[0][0] <= budget), fronts[-1])
        # the cheapest plan where shares of the cost do not reach even that
        rows.append(_path(steps, layers, full, max(np.searchsorted(spent, budget, side="right") - 1, 0)))
    return np.array(rows)


def _fronts(damages, full, layers, lo, hi, unit, cap):
    """The Pareto front over all layers: what its states cost, ascending, and for each layer (parent state, k) of its states."""
    # What the layers after each one need at least: a state that leaves less is dead already.
    least = np.array([unit[i] * lo[i] for i in layers])
    rest = np.append(np.cumsum(least[::-1])[::-1][1:], 0.0)

    spent, damage, uneven = np.zeros(1), np.zeros(1), np.zeros(1)
    steps = []
    for i, reserved in zip(layers, rest):
        k = np.arange(lo[i], hi[i] + 1)
        spent = spent + unit[i] * k[:, None]
        alive = spent <= cap - reserved
        # The cheapest state is feasible (_check_budget); rounding of `reserved` must not drop it.
        alive[0, 0] = True
        choice, parent = np.nonzero(alive)
        spent = spent[alive]
        damage = damage[parent] + damages[i][k - 1][choice]
        uneven = uneven[parent] + (k * k / full[i])[choice]
        front = _thin(_pareto_front(spent, damage, uneven), spent)
        steps.append((parent[front], k[choice[front]]))
        spent, damage, uneven = spent[front], damage[front], uneven[front]
    return spent, steps


def _path(steps, layers, full, state):
    """The plan that leads to a state of the last front, a list of n_layer ints."""
    planned = [0] * len(full)
    for i, (parent, k) in zip(reversed(layers), reversed(steps)):
        planned[i], state = int(k[state]), parent[state]
    return planned


def _pareto_front(spent, damage, uneven):
    """Indices of the states that no other beats on cost and damage at once, ascending in cost.

    All three are float64 [n]. Of equal states the most even one stays, then the first.
    """
    # The input is sorted runs, which a stable sort merges fast. Sorting by all three keys does
    # not profit from them, so it is left for the few states that could stay.
    order = np.argsort(spent, kind="stable")
    damage_by_cost = damage[order]
    order = order[damage_by_cost <= np.minimum.accumulate(damage_by_cost)]
    order = order[np.lexsort((uneven[order], damage[order], spent[order]))]
    best = np.minimum.accumulate(damage[order])
    return order[np.append(True, best[1:] < best[:-1])]


def _thin(front, spent):
    """At most MAX_STATES + 1 states of the front, the best of each slice of cost.

    The best of a slice costs at most one slice more than any state it stands for, hence the bound
    in `allocate`. Every state it is given leaves enough for the layers to come, so any will do.
    """
    if front.size <= MAX_STATES:
        return front
    total = spent[front]
    piece = ((total - total[0]) / (total[-1] - total[0]) * MAX_STATES).astype(np.int64)
    return front[np.append(piece[1:] != piece[:-1], True)]


def _bound(name, value, full):
    if isinstance(value, Integral) and not isinstance(value, bool):
        return (int(value),) * len(full)
    if isinstance(value, Real):
        raise PlanError(f"{name}: found {value!r} ({type(value).__name__}), want an integer, or one per layer")
    value = integer_tuple(name, value)
    if len(value) != len(full):
        raise PlanError(f"{name}: found {len(value)} layers, want {len(full)}, as in expert_used_count_full")
    return value


def _real_array(name, values):
    """`values` as float64 [n]; text, bools, complex numbers and ragged lists are refused."""
    try:
        array = np.asarray(values)
    except ValueError:  # ragged
        array = np.asarray(None)
    # An empty list has no type to refuse.
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iuf"):
        raise PlanError(f"{name}: found shape {array.shape}, dtype {array.dtype}, want a 1-D array of real numbers")
    return array.astype(np.float64)


def _check_sensitivity(sensitivity, full):
    try:
        rows = list(sensitivity)
    except TypeError:
        raise PlanError(f"sensitivity: found {sensitivity!r}, want a sequence of 1-D arrays, one per layer") from None
    if len(rows) != len(full):
        raise PlanError(f"sensitivity: found {len(rows)} layers, want {len(full)}, as in expert_used_count_full")
    rows = [_real_array(f"sensitivity, layer {i}", row) for i, row in enumerate(rows)]
    for i, (row, K) in enumerate(zip(rows, full)):
        if row.size != K:
            raise PlanError(f"sensitivity, layer {i}: found {row.size} values, want {K}, one per expert count")
        for k in np.flatnonzero(~np.isfinite(row)) + 1:
            raise PlanError(f"sensitivity, layer {i}, k = {k}: found {row[k - 1]}, want a finite number")
    if not math.isfinite(sum(float(np.abs(row).max(initial=0.0)) for row in rows)):
        raise PlanError("sensitivity: the sum over the layers overflows, want values within float64's range")
    return rows


def _check_cost(cost, k_max, layers):
    if cost is None:
        return np.ones(len(k_max))
    unit = _real_array("cost", cost)
    if unit.size != len(k_max):
        raise PlanError(f"cost: found {unit.size} layers, want {len(k_max)}, as in expert_used_count_full")
    for i in layers:
        if not (math.isfinite(unit[i]) and unit[i] > 0):
            raise PlanError(f"cost, layer {i}: found {unit[i]}, want a positive, finite number")
    if not math.isfinite(sum(float(unit[i]) * k_max[i] for i in layers)):
        raise PlanError("cost: the sum over the layers overflows, want values within float64's range")
    return unit


def _check_budget(budget, counts, unit, k_min, layers):
    """The most that a plan may spend: the budget, with room for rounding where sums can round."""
    kind, want = (Integral, "an integer, in expert activations") if counts else (Real, "a finite number, in cost units")
    try:
        value = float(budget) if isinstance(budget, kind) and not isinstance(budget, bool) else math.nan
    except OverflowError:  # an int beyond float64
        value = math.inf
    if not math.isfinite(value):
        raise PlanError(f"budget_total: found {budget!r} ({type(budget).__name__}), want {want}")
    used = unit[list(layers)]
    whole = value.is_integer() and bool((used == np.floor(used)).all())
    cap = value if whole else value * (1 + 1e-12)
    least = math.fsum(unit[i] * k_min[i] for i in layers)
    if least > cap:
        raise PlanError(f"budget_total: found {budget}, want at least {least:g}, k_min in every layer")
    return cap

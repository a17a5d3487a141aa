"""Alloc-L against brute force: exact, never above the budget, ties as documented."""

from fractions import Fraction
import itertools
import math

from allocmoe_edge.plan import Plan, PlanError, planner
from allocmoe_edge.plan.planner import allocate, allocate_totals
from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest


def total_damage(sensitivity, plan):
    return math.fsum(row[k - 1] for row, k in zip(sensitivity, plan.expert_used_count) if k)


def total_cost(cost, plan):
    return math.fsum(c * k for c, k in zip(cost, plan.expert_used_count))


def brute_force(sensitivity, budget, full, lo, hi, cost):
    """The best planned counts by trying all, in exact arithmetic; None where nothing fits.

    The order of preference is the documented one.
    """
    best = None
    for planned in itertools.product(*(range(a, b + 1) if K else (0,) for a, b, K in zip(lo, hi, full))):
        spent = sum(Fraction(c) * k for c, k in zip(cost, planned))
        if spent > budget:
            continue
        damage = sum(Fraction(row[k - 1]) for row, k in zip(sensitivity, planned) if k)
        uneven = sum(Fraction(k * k, K) for k, K in zip(planned, full) if K)
        key = damage, spent, uneven, planned[::-1]
        best = key if best is None else min(best, key)
    return best


@st.composite
def knapsacks(draw, damages, costs, counts):
    full = draw(st.lists(counts, min_size=1, max_size=4).filter(any))
    lo = [draw(st.integers(1, K)) if K else 0 for K in full]
    hi = [draw(st.integers(a, K)) if K else 0 for a, K in zip(lo, full)]
    sensitivity = [draw(st.lists(damages, min_size=K, max_size=K)) for K in full]
    cost = [draw(costs) for _ in full]
    return sensitivity, full, lo, hi, cost


# Few different damages, of either sign, in any order: ties and non-monotone rows are the rule.
# K in powers of two: then the tie-break's k^2 / K is exact and the whole plan is determined.
exact = knapsacks(st.integers(-3, 3), st.integers(1, 4), st.sampled_from([0, 1, 2, 4]))
real = knapsacks(st.floats(-2, 2), st.floats(0.01, 3), st.integers(0, 5))


@settings(max_examples=150, deadline=None)
@given(exact, st.data())
def test_integer_costs_give_the_brute_force_plan(case, data):
    sensitivity, full, lo, hi, cost = case
    least, most = (sum(c * k for c, k in zip(cost, bound)) for bound in (lo, hi))
    budget = data.draw(st.integers(least, most + 2))
    plan = allocate(sensitivity, budget, full, k_min=lo, k_max=hi, cost=cost)
    assert plan.expert_used_count == brute_force(sensitivity, budget, full, lo, hi, cost)[3][::-1]
    assert total_cost(cost, plan) <= budget


@settings(max_examples=100, deadline=None)
@given(exact, st.data())
def test_no_cost_counts_activations(case, data):
    sensitivity, full, _, _, _ = case
    lo, ones = [min(K, 1) for K in full], [1] * len(full)
    budget = data.draw(st.integers(sum(lo), sum(full)))
    plan = allocate(sensitivity, budget, full)
    assert plan.expert_used_count == brute_force(sensitivity, budget, full, lo, full, ones)[3][::-1]
    assert plan.budget_total <= budget


@settings(max_examples=150, deadline=None)
@given(real, st.floats(0, 1))
def test_real_costs_give_the_brute_force_damage(case, where):
    sensitivity, full, lo, hi, cost = case
    least, most = (sum(c * k for c, k in zip(cost, bound)) for bound in (lo, hi))
    budget = least + where * (most - least)
    plan = allocate(sensitivity, budget, full, k_min=lo, k_max=hi, cost=cost)
    # 1e-12: the documented room for rounding; brute force gets none, resp. twice as much.
    assert total_cost(cost, plan) <= budget * (1 + 2e-12)
    assert all(a <= k <= b for a, k, b in zip(lo, plan.expert_used_count, hi) if b)
    floor = brute_force(sensitivity, Fraction(budget) * (1 + Fraction(2, 10**12)), full, lo, hi, cost)
    ceiling = brute_force(sensitivity, Fraction(budget), full, lo, hi, cost)
    damage = total_damage(sensitivity, plan)
    # 1e-14: four additions of numbers up to 8 in float64.
    assert damage >= floor[0] - 1e-14
    assert ceiling is None or damage <= ceiling[0] + 1e-14


@settings(max_examples=50, deadline=None)
@given(exact)
def test_damage_never_rises_with_the_budget(case):
    sensitivity, full, lo, hi, cost = case
    least, most = (sum(c * k for c, k in zip(cost, bound)) for bound in (lo, hi))
    damages = [
        total_damage(sensitivity, allocate(sensitivity, budget, full, k_min=lo, k_max=hi, cost=cost))
        for budget in range(least, most + 1)
    ]
    assert damages == sorted(damages, reverse=True)


@settings(max_examples=100, deadline=None)
@given(real, st.floats(0, 1), st.integers(2, 8))
def test_thinned_fronts_keep_their_bound(case, where, max_states):
    sensitivity, full, lo, hi, cost = case
    least, most = (sum(c * k for c, k in zip(cost, bound)) for bound in (lo, hi))
    budget = least + where * (most - least)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "MAX_STATES", max_states)
        plan = allocate(sensitivity, budget, full, k_min=lo, k_max=hi, cost=cost)
    assert total_cost(cost, plan) <= budget * (1 + 2e-12)  # as above
    n_moe_layers = sum(K > 0 for K in full)
    smaller = brute_force(sensitivity, Fraction(budget) * (1 - Fraction(n_moe_layers, max_states)), full, lo, hi, cost)
    assert smaller is None or total_damage(sensitivity, plan) <= smaller[0] + 1e-14


def test_thinning_never_passes_the_budget():
    rng = np.random.default_rng(0)
    sensitivity, cost = -np.sort(-rng.random((16, 8))), rng.random(16) + 0.5
    with pytest.MonkeyPatch.context() as patch:
        for budget in cost.sum() * np.array([1, 1.01, 1.1, 2, 4, 7, 8]):
            exact_plan = allocate(sensitivity, budget, [8] * 16, cost=cost)
            patch.setattr(planner, "MAX_STATES", 3)
            thinned = allocate(sensitivity, budget, [8] * 16, cost=cost)
            patch.undo()
            assert total_cost(cost, thinned) <= budget * (1 + 2e-12)  # as above
            assert total_damage(sensitivity, thinned) >= total_damage(sensitivity, exact_plan) - 1e-14
        assert thinned == Plan.full([8] * 16)


@settings(deadline=None)
@given(st.lists(st.floats(0, 100), min_size=2, max_size=60, unique=True), st.integers(1, 20))
def test_thinned_states_have_a_better_one_within_a_slice(spent, max_states):
    spent = np.sort(spent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "MAX_STATES", max_states)
        kept = planner._thin(np.arange(spent.size), spent)
    assert kept.size <= max_states + 1
    stand_in = kept[np.searchsorted(kept, np.arange(spent.size))]
    # 1e-12: rounding at the edge of a slice, in units of at most 100.
    assert np.all(spent[stand_in] - spent <= (spent[-1] - spent[0]) / max_states + 1e-12)


@settings(deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=1, max_size=30))
def test_pareto_front_is_its_definition(states):
    want, lowest = [], math.inf
    for spent, damage, uneven in sorted(states):
        if damage < lowest:
            want.append(states.index((spent, damage, uneven)))
            lowest = damage
    assert planner._pareto_front(*np.array(states, float).T).tolist() == want


def test_least_budget_is_feasible_whatever_the_rounding():
    rng = np.random.default_rng(0)
    for _ in range(100):
        cost = rng.random(20) + 0.1
        budget = math.fsum(cost) / (1 + 1e-12)
        while budget * (1 + 1e-12) < math.fsum(cost):
            budget = np.nextafter(budget, math.inf)
        assert allocate(np.zeros((20, 2)), budget, [2] * 20, cost=cost).expert_used_count == (1,) * 20


# --- single cases ---------------------------------------------------------------------------

S = [[], [9.0, 4.0, 3.0, 0.0], [8.0, 1.0]]
FULL = (0, 4, 2)


def test_spends_where_it_helps_most():
    assert [allocate(S, b, FULL).expert_used_count for b in (2, 3, 4, 5, 6)] == [
        (0, 1, 1),
        (0, 1, 2),
        (0, 2, 2),
        (0, 3, 2),
        (0, 4, 2),
    ]


def test_returns_a_plan_of_python_ints():
    plan = allocate([np.array(row, np.float32) for row in S], np.int64(4), np.array(FULL), k_max=np.array([0, 3, 2]))
    assert isinstance(plan, Plan) and plan.token_rule == "off" and plan.expert_used_count_full == FULL
    assert {type(k) for k in plan.expert_used_count} == {int}


def test_a_cost_moves_the_spending():
    # With 6 to spend, two experts in the last layer (cost 5 each) no longer fit.
    assert allocate(S, 9, FULL, cost=[0, 1, 5]).expert_used_count == (0, 4, 1)


def test_does_not_spend_on_what_does_not_help():
    assert allocate([[2.0, 2.0, 2.0], [3.0, 1.0, 1.5]], 6, [3, 3]).expert_used_count == (1, 2)


def test_equal_layers_share_evenly():
    sensitivity = np.tile(8.0 - np.arange(1, 9), (4, 1))
    assert sorted(allocate(sensitivity, 18, [8] * 4).expert_used_count) == [4, 4, 5, 5]
    # In proportion to K_l where that differs: damage falls by one per expert in both layers.
    assert allocate([8.0 - np.arange(8), 4.0 - np.arange(4)], 6, [8, 4]).expert_used_count == (4, 2)


def test_room_for_the_rounding_of_sums():
    # 0.1 + 0.1 + 0.1 > 0.3 in float64; a budget that is the sum of its parts must buy them.
    assert allocate([[3.0, 2.0, 1.0]], 0.3, [3], cost=[0.1]).expert_used_count == (3,)


def test_no_room_where_sums_are_exact():
    big = 10**13
    assert allocate([[2.0, 1.0]], 2 * big - 1, [2], cost=[big]).expert_used_count == (1,)


def test_input_is_not_changed():
    sensitivity = np.array([[3.0, 1.0], [2.0, 0.0]])
    allocate(sensitivity, 3, [2, 2])
    assert sensitivity.tolist() == [[3.0, 1.0], [2.0, 0.0]]


def test_large_model_has_the_optimum_of_convex_rows():
    # For convex rows the greedy choice is optimal: an independent check at full size.
    rng = np.random.default_rng(1)
    gains = -np.sort(-rng.random((64, 15)))
    sensitivity = 20.0 - np.cumsum(np.c_[np.zeros(64), gains], axis=1)
    plan = allocate(sensitivity, 512, [16] * 64)
    best = 64 * 20.0 - np.sort(gains.ravel())[::-1][: 512 - 64].sum()
    # 1e-9: some 500 additions of numbers up to 1,280 in float64.
    assert total_damage(sensitivity, plan) == pytest.approx(best, abs=1e-9)
    assert plan.budget_total == 512


# --- what it refuses ------------------------------------------------------------------------


def refused(match, sensitivity=S, budget=4, full=FULL, **kw):
    with pytest.raises(PlanError, match=match):
        allocate(sensitivity, budget, full, **kw)


def test_refuses_nan_sensitivity():
    refused("sensitivity, layer 1, k = 3: found nan", [[], [9.0, 4.0, math.nan, 0.0], [8.0, 1.0]])


def test_refuses_infinite_sensitivity():
    refused("sensitivity, layer 2, k = 1: found inf", [[], [9.0, 4.0, 3.0, 0.0], [math.inf, 1.0]])


def test_refuses_overflowing_sensitivity():
    refused("sensitivity: the sum over the layers overflows", [[], [1e308] * 4, [-1e308] * 2])


def test_refuses_missing_layer():
    refused("sensitivity: found 2 layers, want 3", S[1:])


def test_refuses_short_row():
    refused("sensitivity, layer 1: found 3 values, want 4", [[], [9.0, 4.0, 3.0], [8.0, 1.0]])


def test_refuses_values_in_a_layer_without_experts():
    refused("sensitivity, layer 0: found 1 values, want 0", [[1.0], S[1], S[2]])


def test_refuses_two_dimensional_row():
    refused(r"sensitivity, layer 1: found shape \(1, 4\)", [[], [S[1]], S[2]])


def test_refuses_ragged_row():
    refused("sensitivity, layer 1: found .*want a 1-D array", [[], [[1.0], [1.0, 2.0]], S[2]])


@pytest.mark.parametrize("row", ["abcd", ["9", "4", "3", "0"], [True] * 4, [1j] * 4, [None] * 4, None, 5.0])
def test_refuses_rows_that_are_not_real(row):
    refused("sensitivity, layer 1: found .*want a 1-D array", [[], row, S[2]])


def test_refuses_scalar_sensitivity():
    refused("sensitivity: found 1.0, want a sequence", 1.0)


def test_refuses_model_without_experts():
    refused("at least one layer with routed experts", [[], []], 0, (0, 0))


def test_refuses_budget_below_k_min():
    refused("budget_total: found 1, want at least 2, k_min in every layer", budget=1)
    refused("budget_total: found 4, want at least 5", k_min=[0, 3, 2])


def test_refuses_budget_below_k_min_in_cost_units():
    refused("budget_total: found 0.5, want at least 0.75", budget=0.5, cost=[0, 0.25, 0.5])


@pytest.mark.parametrize("budget", [4.0, True, "4", None, math.nan, 10**400])
def test_refuses_budget_that_is_no_count(budget):
    refused("budget_total: found .*want an integer, in expert activations", budget=budget)


@pytest.mark.parametrize("budget", [math.nan, math.inf, True, "4", None, 10**400])
def test_refuses_budget_that_is_no_number(budget):
    refused("budget_total: found .*want a finite number, in cost units", budget=budget, cost=[0, 1.5, 1])


@pytest.mark.parametrize("bad", [0, -1, 5])
def test_refuses_k_min_out_of_range(bad):
    refused(f"k_min, layer 1: found {bad}, want 1 to 4", k_min=[0, bad, 1])


def test_refuses_scalar_k_min_that_a_layer_cannot_reach():
    refused("k_min, layer 2: found 3, want 1 to 2", k_min=3)


def test_refuses_k_max_above_the_models_count():
    refused("k_max, layer 2: found 4, want 1 .*to 2", k_max=4)


def test_refuses_k_max_below_k_min():
    refused(r"k_max, layer 1: found 2, want 3 \(k_min\) to 4", k_min=[0, 3, 1], k_max=[0, 2, 1])


@pytest.mark.parametrize("name", ["k_min", "k_max"])
@pytest.mark.parametrize("bad", [1.0, True, math.nan, "1", [0, 1.0, 1], [0, True, 1], np.ones(3)])
def test_refuses_bounds_that_are_no_integers(name, bad):
    refused(f"{name}.*found", **{name: bad})


def test_refuses_none_for_k_min():
    refused("k_min: found None", k_min=None)


@pytest.mark.parametrize("name", ["k_min", "k_max"])
def test_refuses_bounds_of_wrong_length(name):
    refused(f"{name}: found 2 layers, want 3", **{name: [1, 1]})


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_refuses_cost_that_is_not_positive_and_finite(bad):
    refused("cost, layer 2: found .*want a positive, finite number", cost=[0.0, 1.0, bad])


def test_refuses_cost_of_wrong_length():
    refused("cost: found 2 layers, want 3", cost=[1.0, 1.0])


def test_refuses_overflowing_cost():
    refused("cost: the sum over the layers overflows", cost=[0.0, 1e308, 1.0])


@pytest.mark.parametrize("bad", [1.0, "111", [True, True, True], ["1", "1", "1"]])
def test_refuses_cost_that_is_no_array_of_numbers(bad):
    refused("cost: found .*want a 1-D array of real numbers", cost=bad)


@settings(max_examples=60, deadline=None)
@given(exact)
def test_the_plans_of_all_totals_are_those_of_each(case):
    sensitivity, full, _, _, _ = case
    for k_base in (1, 2):
        held = [min(K, k_base) for K in full]
        rows = allocate_totals(sensitivity, full, k_base=k_base)
        assert len(rows) == sum(full) - sum(K > 0 for K in full) + 1
        for row, total in zip(rows, range(sum(K > 0 for K in full), sum(full) + 1)):
            k_min = held if total >= sum(held) else 1
            assert tuple(row) == allocate(sensitivity, total, full, k_min=k_min).expert_used_count


@settings(max_examples=60, deadline=None)
@given(real, st.integers(1, 3))
def test_with_costs_a_total_is_a_share_of_what_all_cost(case, k_base):
    """Plans of equal damage and cost but for rounding may differ, hence no comparison of counts."""
    sensitivity, full, _, _, cost = case
    most, least = sum(c * K for c, K in zip(cost, full)), sum(c for c, K in zip(cost, full) if K)
    held = [min(K, k_base) for K in full]
    least_held = sum(c * k for c, k in zip(cost, held))
    rows = allocate_totals(sensitivity, full, cost, k_base)
    for row, total in zip(rows, range(sum(K > 0 for K in full), sum(full) + 1)):
        budget, found = total / sum(full) * most, Plan(row.tolist(), full)
        if budget < least * (1 - 1e-9):
            assert max(found.expert_used_count) == 1  # the cheapest there is
            continue
        if abs(budget / least_held - 1) < 1e-9:
            continue  # held or not, by rounding
        k_min = held if budget > least_held else 1
        want = allocate(sensitivity, budget * (1 + 1e-12), full, cost=cost, k_min=k_min)
        assert total_cost(cost, found) <= budget * (1 + 1e-9)
        assert total_damage(sensitivity, found) == pytest.approx(total_damage(sensitivity, want), abs=1e-12)

"""The plan type: what it accepts, what it refuses and how, uniform plans, budgets."""

import dataclasses
from decimal import Decimal
from fractions import Fraction
import math
import pickle

from allocmoe_edge.plan import Plan, PlanError, looks_like_percent, parse_budget
from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

FULL = (0, 8, 8, 6)


# --- what it is -----------------------------------------------------------------------------


def test_properties():
    plan = Plan((0, 4, 2, 6), FULL)
    assert plan.n_layer == 4
    assert plan.moe_layers == (1, 2, 3)
    assert (plan.budget_total, plan.budget_full) == (12, 22)
    assert plan.budget == 12 / 22
    assert (plan.mean, plan.mean_full) == (4.0, 22 / 3)
    assert plan.token_rule == "off"


def test_str_is_one_line():
    plan = Plan.uniform([12] * 30, 180)
    assert str(plan) == "budget 0.50: 180 of 360 expert activations per token, mean 6.0 of 12.0, token rule off"


@pytest.mark.parametrize("make", [list, tuple, np.array, lambda v: np.array(v, np.uint8), iter])
def test_accepts_integer_sequences_and_keeps_python_ints(make):
    plan = Plan(make([0, 4, 2, 6]), make(FULL))
    assert plan == Plan((0, 4, 2, 6), FULL)
    for field in (plan.expert_used_count, plan.expert_used_count_full):
        assert type(field) is tuple and {type(v) for v in field} == {int}


def test_is_frozen_hashable_and_picklable():
    plan = Plan.full(FULL)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.token_rule = "off"
    assert hash(plan) == hash(Plan.full(FULL))
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_replace_checks_again():
    with pytest.raises(PlanError, match="layer 1"):
        dataclasses.replace(Plan.full(FULL), expert_used_count=(0, 9, 8, 6))


def test_full():
    assert Plan.full(np.array(FULL)) == Plan(FULL, FULL)
    assert Plan.full(FULL).budget == 1.0


# --- what it refuses ------------------------------------------------------------------------

ODD = [
    "one",
    b"1",
    None,
    math.nan,
    -1,
    10**30,
    10**6000,
    True,
    np.True_,
    1.5,
    1j,
    [],
    {},
    np.zeros((2, 2)),
    object(),
    np.nan,
]


@pytest.mark.parametrize("value", ODD, ids=lambda value: type(value).__name__)
def test_odd_values_are_a_plan_error_and_no_other(value):
    """Whatever is given for whatever: taken, or an error that says where."""
    threshold = dict(token_rule="threshold", threshold=(0.0,) * 4)
    for arguments in (
        dict(expert_used_count=value), dict(expert_used_count=(0, value, 2, 6)), dict(expert_used_count_full=value),
        dict(expert_used_count_full=(0, value, 8, 6)), dict(token_rule=value), dict(threshold, k_base=value),
        dict(threshold, threshold=value), dict(threshold, threshold=(0.0, value, 0.0, 0.0)), dict(threshold, strict=value),
        dict(threshold, value=value), dict(threshold, token_rule="estimate", estimator=value),
    ):  # fmt: skip
        try:
            plan = Plan(**{"expert_used_count": (0, 4, 2, 6), "expert_used_count_full": FULL, **arguments})
        except PlanError as error:
            assert next(name for name in arguments if name in str(error)) and len(str(error)) < 400
        else:
            assert type(plan.strict) is bool and type(plan.k_base) is int
            assert plan.threshold is None or {type(t) for t in plan.threshold} == {float}
    for call in (lambda: parse_budget(value, 22, 3), lambda: Plan.uniform(FULL, value)):
        with pytest.raises(PlanError, match="^budget"):
            call()


def refused(match, planned=(0, 4, 2, 6), full=FULL, **kw):
    with pytest.raises(PlanError, match=match):
        Plan(planned, full, **kw)


def test_plan_error_is_a_value_error():
    assert issubclass(PlanError, ValueError)


def test_refuses_too_few_layers():
    refused("expert_used_count: found 3 layers, want 4", planned=(0, 4, 2))


def test_refuses_too_many_layers():
    refused("expert_used_count: found 5 layers, want 4", planned=(0, 4, 2, 6, 1))


def test_refuses_zero_in_a_layer_with_experts():
    refused("layer 2: found 0, want 1 to 8", planned=(0, 4, 0, 6))


def test_refuses_negative():
    refused("layer 2: found -1, want 1 to 8", planned=(0, 4, -1, 6))


def test_refuses_more_than_the_model_has():
    refused("layer 3: found 7, want 1 to 6", planned=(0, 4, 2, 7))


def test_refuses_experts_in_a_layer_without():
    refused("layer 0: found 2, want 0: the layer has no routed experts", planned=(2, 4, 2, 6))


def test_refuses_negative_full():
    refused("expert_used_count_full, layer 1: found -8, want 0", full=(0, -8, 8, 6))


def test_refuses_a_model_without_routed_experts():
    refused("at least one layer with routed experts", planned=(0, 0), full=(0, 0))


def test_refuses_no_layers():
    refused("at least one layer with routed experts", planned=(), full=())


def test_refuses_bool():
    refused(r"layer 1: found True \(bool\), want an integer", planned=(0, True, 2, 6))


def test_refuses_numpy_bool():
    refused("layer 0: found .*, want an integer", planned=np.array([False, True, True, True]))


def test_refuses_whole_float():
    refused(r"layer 2: found 2.0 \(float\), want an integer", planned=(0, 4, 2.0, 6))


def test_refuses_float_array():
    refused("layer 0: found .*float64", planned=np.array([0.0, 4, 2, 6]))


def test_refuses_nan():
    refused("layer 3: found nan", planned=(0, 4, 2, math.nan))


def test_refuses_none_for_a_layer():
    refused("layer 1: found None", planned=(0, None, 2, 6))


def test_refuses_float_in_full():
    refused("expert_used_count_full, layer 1: found 8.0", full=(0, 8.0, 8, 6))


def test_refuses_scalar():
    refused("expert_used_count: found 4, want a sequence", planned=4)


def test_refuses_two_dimensions():
    refused(r"layer 0: found .*\(ndarray\), want an integer", planned=np.ones((4, 2), int))


@pytest.mark.parametrize("values", ["0426", b"\x00\x04\x02\x06", {0: 0, 4: 4, 2: 2, 6: 6}, {0, 4, 2, 6}])
def test_refuses_what_only_iterates_like_integers(values):
    refused(f"found {type(values).__name__}, want a sequence", planned=values)


@pytest.mark.parametrize("rule", ["", "top-p", "OFF", None, 0, ["off"], np.array(["off", "off"])])
def test_refuses_unknown_token_rule(rule):
    refused("token_rule: found .*want one of: off", token_rule=rule)


# --- uniform --------------------------------------------------------------------------------


def test_uniform_spreads_the_remainder_over_depth():
    assert Plan.uniform([8] * 8, 8 * 4 + 2).expert_used_count == (4, 5, 4, 4, 4, 5, 4, 4)


def test_uniform_follows_each_layers_own_count():
    assert Plan.uniform([0, 8, 4, 0, 2], 7).expert_used_count == (0, 4, 2, 0, 1)


def test_uniform_lifts_shares_below_one():
    # 5 of 18: a plain share gives the middle layer 0.56; it gets 1 and the others share 4.
    assert Plan.uniform([8, 2, 8], 5).expert_used_count == (2, 1, 2)


@pytest.mark.parametrize("total", [2, 23, -1])
def test_uniform_refuses_total_out_of_range(total):
    with pytest.raises(PlanError, match=rf"budget_total: found {total}, want 3 .*to 22"):
        Plan.uniform(FULL, total)


@pytest.mark.parametrize("total", [12.0, True, "12", None, math.nan])
def test_uniform_refuses_total_that_is_no_integer(total):
    with pytest.raises(PlanError, match="budget_total: found .*want an integer"):
        Plan.uniform(FULL, total)


@st.composite
def full_and_total(draw, counts=st.integers(0, 12)):
    full = draw(st.lists(counts, min_size=1, max_size=40).filter(any))
    return full, draw(st.integers(sum(K > 0 for K in full), sum(full)))


def water_level(full, total):
    """The fair shares by bisection: max(1, f * K_l) summing to total."""
    full, lo, hi = np.array([K for K in full if K > 0], float), 0.0, 1.0
    for _ in range(60):
        mid = (lo + hi) / 2
        lo, hi = (mid, hi) if np.maximum(1, mid * full).sum() < total else (lo, mid)
    return np.maximum(1, hi * full)


@settings(deadline=None)
@given(full_and_total())
def test_uniform_has_the_total_and_stays_within_one_of_the_share(case):
    full, total = case
    plan = Plan.uniform(full, total)  # 1 <= k_l <= K_l is Plan's own check
    assert plan.budget_total == total
    assert plan == Plan.uniform(np.array(full), np.int64(total))
    planned = np.array([k for k in plan.expert_used_count if k > 0])
    # 1e-9: the bisection's own error; a rounded share is strictly less than 1 away.
    assert np.all(np.abs(planned - water_level(full, total)) < 1 + 1e-9)


@settings(deadline=None)
@given(st.integers(1, 16), st.integers(1, 64), st.data())
def test_uniform_is_even_over_depth_where_all_layers_are_alike(K, n, data):
    total = data.draw(st.integers(n, n * K))
    k = np.array(Plan.uniform([K] * n, total).expert_used_count)
    assert k.max() - k.min() <= 1
    # No stretch of layers gets more or less than its part of the total by a whole expert.
    sums = np.concatenate([[0], np.cumsum(k)])
    for width in range(1, n + 1):
        stretch = sums[width:] - sums[:-width]
        assert stretch.max() - stretch.min() <= 1


# --- parse_budget ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "budget, total",
    [
        (0.5, 180),
        (1.0, 360),
        ("0.5", 180),
        ("50%", 180),
        (" 50 % ", 180),
        (".5", 180),
        ("100%", 360),
        ("1.0", 360),
        (180, 180),
        ("180", 180),
        (30, 30),
        (360, 360),
        (np.int64(90), 90),
        (np.float32(0.25), 90),
        (0.2513, 90),
        (0.2514, 91),  # 90.47, 90.50
        (1, 360),  # no budget of a single activation, with 30 layers
        ("1", 360),
        (np.int8(1), 360),
        (Decimal("0.25"), 90),
        (Decimal(1), 360),
        (Fraction(1, 4), 90),
        (np.float16(0.25), 90),
        (np.longdouble(0.25), 90),
        ("\t50\n%\r", 180),
    ],
)
def test_parse_budget(budget, total):
    got = parse_budget(budget, 360, 30)
    assert got == total and type(got) is int


def test_only_the_full_budget_is_shown_as_1():
    shown = {total: str(Plan.uniform((8,) * 30, total)).split(":")[0] for total in (120, 238, 239, 240)}
    assert shown == {120: "budget 0.50", 238: "budget 0.99", 239: "budget 0.995", 240: "budget 1.00"}


def test_parse_budget_rounds_half_up():
    assert [parse_budget(f, 2, 1) for f in (0.25, 0.74, 0.75)] == [1, 1, 2]
    assert parse_budget(0.5, 5, 1) == 3 and parse_budget(0.5, 3, 1) == 2


def test_parse_budget_percent_is_not_divided():
    # float("2.9") / 100 * 500 is 14.499999999999998, which would round down.
    assert parse_budget("2.9%", 500, 1) == parse_budget("0.029", 500, 1) == parse_budget(0.029, 500, 1) == 15


def test_parse_budget_one_is_a_total_where_there_is_one_layer():
    assert parse_budget(1, 8, 1) == 1


@settings(deadline=None)
@given(st.integers(1, 10**4))
def test_parse_budget_share_and_percent_agree(n):
    share, percent = f"{n / 10**4:.4f}", f"{n / 100:.2f}%"
    assert parse_budget(share, 10**6, 1) == parse_budget(percent, 10**6, 1) == parse_budget(float(share), 10**6, 1)


@pytest.mark.parametrize(
    "budget",
    [
        0,
        0.0,
        -0.5,
        -180,
        0.01,
        1.0001,
        180.0,
        29,
        361,
        10**30,
        math.nan,
        math.inf,
        -math.inf,
        "",
        "%",
        ".",
        "0",
        "0%",
        "101%",
        "29",
        "361",
        "-0.5",
        "half",
        "nan",
        "inf",
        "1e-1",
        "3_0",
        "0x50",
        "٥٠",
        "50%%",
        "9" * 5000,
        True,
        False,
        np.True_,
        None,
        [180],
        b"180",
        1j,
        Decimal("sNaN"),
        Decimal("-Infinity"),
        Decimal(96),
        Fraction(96),
        np.float32("nan"),
        np.array([0.5]),
        "\u2003180",  # a blank of another script
    ],
)
def test_parse_budget_refuses_with_the_range(budget):
    with pytest.raises(PlanError, match=r"budget: found .*want a share from 0.0834 to 1.0, or a .* from 30 .*to 360"):
        parse_budget(budget, 360, 30)


def test_parse_budget_hints_at_percent():
    with pytest.raises(PlanError, match='found 50, .*; 50 per cent are written "50%" or 0.5$'):
        parse_budget(50, 480, 60)


@pytest.mark.parametrize("budget, full, is_one", [
    ("50", 384, True), (50, 384, True), ("100", 384, True), ("50", 96, False), ("50%", 384, False), ("0.5", 384, False),
    (0.5, 384, False), ("192", 384, False), ("1", 384, False), (True, 384, False), (None, 384, False), ("x", 384, False),
])  # fmt: skip
def test_what_looks_like_percent(budget, full, is_one):
    assert looks_like_percent(budget, full) == is_one


def test_parse_budget_float_total_hints_at_the_point():
    with pytest.raises(PlanError, match="without a decimal point"):
        parse_budget(180.0, 360, 30)


def test_parse_budget_says_what_a_small_share_comes_to():
    with pytest.raises(PlanError, match=r"found 0.01 \(= 4 activations\)"):
        parse_budget(0.01, 360, 30)


@pytest.mark.parametrize("budget_full, n_moe_layers", [(0, 0), (8, 0), (8, 9), (8.0, 3), (8, 3.0), (True, True)])
def test_parse_budget_refuses_impossible_models(budget_full, n_moe_layers):
    with pytest.raises(PlanError, match="budget_full|n_moe_layers"):
        parse_budget(0.5, budget_full, n_moe_layers)


@settings(deadline=None)
@given(full_and_total(), st.floats(0, 1, exclude_min=True))
def test_parse_budget_gives_what_uniform_takes(case, share):
    full, total = case
    n, most = sum(K > 0 for K in full), sum(full)
    assert parse_budget(total, most, n) == total
    try:
        got = parse_budget(share, most, n)
    except PlanError:
        assert math.floor(share * most + 0.5) < n
    else:
        assert Plan.uniform(full, got).budget_total == got == math.floor(share * most + 0.5)


@settings(deadline=None)
@given(st.integers(1, 100), st.integers(1, 16))
def test_parse_budget_accepts_the_lowest_share_it_names(n, K):
    with pytest.raises(PlanError) as error:
        parse_budget(0.0, n * K, n)
    lowest = str(error.value).split("want a share from ")[1].split(" ")[0]
    # The share is named to four decimals, rounded up: at most 1e-4 too much, and half an activation.
    assert n <= parse_budget(float(lowest), n * K, n) <= n + 1e-4 * n * K + 0.5

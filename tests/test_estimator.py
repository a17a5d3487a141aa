"""What token rule "estimate" goes by: its checks, its way into a file and back, and the plans that follow from it."""

from dataclasses import fields, replace

from allocmoe_edge import Plan, PlanError
from allocmoe_edge.gguf_file import GGUFFile
from allocmoe_edge.plan import metadata
from allocmoe_edge.plan.estimator import (
    N_QUANTILES,
    Estimator,
    _rounded,
    as_it_runs,
    from_stored,
    n_words,
    stored,
    to_blocks,
)
import gguf
from gguf_factory import plan_keys, write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

FULL = (0, 4, 4)


def make(n_layer=3, n_expert=8, n_embd=32, n_down=3, rank=2, seed=0, moe=(1, 2), n_relu=1) -> Estimator:
    """Random numbers in the layers `moe`, zeros in the others."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, shape in Estimator.shapes(n_layer, n_expert, n_down, rank, n_embd).items():
        arrays[name] = np.zeros(shape, np.float32)
        arrays[name][list(moe)] = rng.standard_normal((len(moe), *shape[1:]))
    arrays["quantiles"].sort(axis=1)
    return Estimator(**arrays, n_relu=n_relu)


def same(one: Estimator, other: Estimator) -> bool:
    return all(np.array_equal(getattr(one, field.name), getattr(other, field.name)) for field in fields(Estimator))


# the arrays


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("down", lambda a: a[:2], "estimator.down: found shape"),
        ("down", lambda a: a[:, :, 0], "want real numbers by layer"),
        ("down", lambda a: a.astype(str), "want real numbers by layer"),
        ("down", lambda a: a * np.nan, "down: found NaN or infinity"),
        ("up", lambda a: a / 0, "up: found NaN or infinity"),
        ("output", lambda a: a * 1e6, "output: found a number beyond the range of float16"),
        ("log_norm", lambda a: a[:, :, 1:], "estimator.log_norm: found shape"),
        ("output", lambda a: np.zeros((3, 8, 4)), "n_down 3 and rank 4"),
        ("up", lambda a: a[:, :1], "estimator.up: found shape"),
        ("quantiles", lambda a: a[:, ::-1], "quantiles: found falling ones"),
        ("quantiles", lambda a: a[:, :9], "estimator.quantiles: found shape"),
        ("quantiles", lambda a: np.full_like(a, np.nan), "quantiles: found NaN"),
        ("quantiles", lambda a: np.full_like(a, np.inf), "quantiles: found NaN or infinity"),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_malformed_arrays_are_refused(name, change, message):
    good = make()
    with pytest.raises(PlanError, match=message):
        replace(good, **{name: change(getattr(good, name))})


def test_no_directions_are_refused():
    with pytest.raises(PlanError, match="n_down 0"):
        make(n_down=0, rank=0)


@pytest.mark.parametrize("n_relu", [-1, 2])
def test_directions_for_outputs_do_not_count_where_positive(n_relu):
    with pytest.raises(PlanError, match=f"estimator.n_relu: found {n_relu}, want 0 to 1"):
        replace(make(), n_relu=n_relu)


def test_numbers_are_as_they_run_and_cannot_be_changed():
    found = make()
    assert found.down.dtype == np.float32 and np.array_equal(found.log_norm, found.log_norm.astype(np.float16))
    for array in (found.down, np.pad(found.up.swapaxes(1, 2), ((0, 0), (0, 0), (0, 30)))):
        kind = gguf.GGMLQuantizationType.Q4_0
        assert np.array_equal(gguf.dequantize(to_blocks(array), kind), array)
    with pytest.raises(ValueError):
        found.down[0] = 1


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3])
def test_rounding_is_that_of_gguf(scale):
    """Bit for bit; what is no multiple of a block is float16."""
    rows = (scale * np.random.default_rng(0).standard_normal((3, 5, 96))).astype(np.float32)
    rows[0, 0, :32] = 0
    kind = gguf.GGMLQuantizationType.Q4_0
    assert np.array_equal(as_it_runs(rows), gguf.dequantize(gguf.quantize(rows, kind), kind))
    assert np.array_equal(as_it_runs(rows[..., :95]), rows[..., :95].astype(np.float16).astype(np.float32))
    assert as_it_runs(rows[:, :0]).shape == (3, 0, 96)


@pytest.mark.parametrize("n_embd, rank, n_down", [(32, 2, 3), (64, 33, 40), (24, 5, 9), (32, 0, 1)])
def test_what_is_stored_is_exactly_what_runs(n_embd, rank, n_down):
    """Of any width, blocks or not: stored, read back and rounded again without a change."""
    found = make(n_embd=n_embd, rank=rank, n_down=n_down, n_relu=0)
    arrays = {}
    for name in ("down", "log_norm", "output", "up"):
        array = getattr(found, name)
        words = stored(name, array)
        assert words.dtype == np.uint64 and len(words) == n_words(name, array.shape)
        arrays[name] = from_stored(name, words, array.shape)
        assert np.array_equal(arrays[name], array), name
    assert same(replace(found, **arrays), found)


def test_stored_order():
    """The first of four lies in the lowest bits: 1.0 is 0x3c00, 2.0 is 0x4000, -2.0 is 0xc000."""
    words = stored("output", np.array([1.0, 2.0, -2.0, 0.0, 1.0], np.float32).reshape(1, 1, 5))
    assert [hex(word) for word in words] == ["0xc00040003c00", "0x3c00"]


@pytest.mark.parametrize("name", ["down", "log_norm", "output", "up"])
def test_the_bound_is_float16s_own(name):
    """65504 is the largest; 65520 is the first that rounds to infinity."""
    good = make()
    array = np.array(getattr(good, name))
    array[1, 0, 0] = 65504.0
    assert getattr(replace(good, **{name: array}), name)[1, 0, 0] == 65504.0
    array[1, 0, 0] = 65520.0
    with pytest.raises(PlanError, match=f"estimator.{name}: found a number beyond the range of float16"):
        replace(good, **{name: array})


# plans


def counted(estimator, full, k_base, limits):
    """Mean activations by counting: tokens whose candidates beyond the base lie at the quantiles' midpoints."""
    means = []
    for row, K, limit in zip(estimator.quantiles, full, limits):
        fine = np.interp(np.linspace(0, 1, 20001), np.linspace(0, 1, N_QUANTILES), row)
        means.append(min(K, k_base) + max(0, K - k_base) * (fine >= limit).mean())
    return np.array(means)


@pytest.mark.parametrize("k_base", [1, 2])
@pytest.mark.parametrize("total", [4, 5, 6, 7])
def test_threshold_spends_the_total(total, k_base):
    """1e-3: a layer's distribution is counted at 20,001 points."""
    estimator = make()
    plan = estimator.plan(total, FULL, k_base)
    assert plan.token_rule == "estimate" and plan.k_base == k_base and plan.estimator is estimator
    assert plan.budget_total == total and plan.threshold[1] == plan.threshold[2]
    means = counted(estimator, FULL, k_base, plan.threshold)
    assert means.sum() == pytest.approx(total, abs=1e-3)
    assert (np.abs(np.array(plan.expert_used_count) - means) < 1).all()


def test_the_ends_of_the_budget():
    estimator = make()
    assert estimator.plan(8, FULL).threshold[1:] == (-np.inf, -np.inf)
    least = estimator.plan(2, FULL)
    assert least.expert_used_count == (0, 1, 1) and least.threshold[1:] == (np.inf, np.inf)
    for total, k_base in ((1, 1), (3, 2), (9, 1)):
        with pytest.raises(PlanError, match=f"found {total} activations"):
            estimator.plan(total, FULL, k_base)
    with pytest.raises(PlanError, match="found 3 layers, want 2"):
        estimator.plan(4, (4, 4))


def test_equal_sizes_have_one_threshold_for_all():
    """All of a layer's candidates alike: there is no threshold between all of them and none, but counts keep the total."""
    estimator = replace(make(), quantiles=np.zeros((3, N_QUANTILES)))
    assert estimator.plan(5, FULL).budget_total == 5


def test_layers_are_compared():
    """What matters e times more in one layer, all else being equal, is kept there first."""
    quantiles = np.tile(np.linspace(-1, 1, N_QUANTILES), (3, 1)) + np.array([[0], [0], [1]])
    plan = replace(make(), quantiles=quantiles).plan(5, FULL)
    # of three candidates a layer, 2 lie apart and 1 is their distance: shares s and s + 1/2 with 3s + 3(s + 1/2) = 3
    assert counted(plan.estimator, FULL, 1, plan.threshold)[1:] == pytest.approx([1.75, 3.25], abs=1e-3)


def test_cost_moves_thresholds():
    estimator = make()
    even = estimator.plan(5, FULL, cost=(0.0, 2.0, 2.0))
    assert even == estimator.plan(5, FULL)
    plan = estimator.plan(5, FULL, cost=(0.0, 1.0, np.e**2))
    assert plan.threshold[2] - plan.threshold[1] == pytest.approx(1.0, abs=1e-5)
    means = counted(estimator, FULL, 1, plan.threshold)
    # half of what the layers cost at full count, and 5 of 8 is more than half
    assert means[1] + np.e**2 * means[2] == pytest.approx(5 / 8 * (4 + 4 * np.e**2), rel=1e-3)
    assert plan.budget_total == round(means.sum())


@given(st.lists(st.tuples(st.integers(1, 9), st.floats(0, 1)), min_size=1, max_size=12), st.data())
def test_means_are_rounded_to_the_total(layers, data):
    high = np.array([K for K, _ in layers])
    means = np.array([1 + (K - 1) * share for K, share in layers])
    total = data.draw(st.integers(len(layers), int(high.sum())))
    counts = np.array(_rounded(means, np.ones_like(high), high, total))
    assert counts.sum() == total and (counts >= 1).all() and (counts <= high).all()
    if abs(total - means.sum()) < 0.5:
        assert (np.abs(counts - means) < 1 + 1e-9).all()


def test_levelled_layers_spend_alike():
    """Whatever one layer's sizes are beside another's; halfway, half of the difference is left."""
    estimator, full = make(), (0, 4, 4)
    raised = replace(estimator, quantiles=estimator.quantiles + np.array([[0], [0], [5]]))
    level = raised.levelled(5, full)
    share = (5 - 2) / 6
    at = [np.interp(1 - share, np.linspace(0, 1, N_QUANTILES), row) for row in level.quantiles]
    assert at[1] == pytest.approx(at[2], abs=1e-5)
    plan = level.plan(5, full)
    np.testing.assert_allclose(counted(level, full, 1, plan.threshold)[1:], 2.5, atol=1e-3)
    # sizes move with their distribution: float16 of numbers up to 8
    moved = level.log_norm[:, :, -1] - raised.log_norm[:, :, -1]
    np.testing.assert_allclose(moved, (level.quantiles - raised.quantiles)[:, :1].repeat(moved.shape[1], 1), atol=8e-3)
    half = raised.levelled(5, full, part=0.5).quantiles
    np.testing.assert_allclose(half, (raised.quantiles + level.quantiles) / 2, atol=1e-5)
    assert raised.levelled(4, (0, 1, 1)) is raised  # nothing to choose


def test_shifted_distributions_have_the_share():
    """1e-6: float32 quantiles."""
    estimator, limit, shares = make(), np.array([0.0, 0.3, -0.2]), np.array([0.0, 0.25, 0.9])
    moved = estimator.shifted(limit, shares)
    for il in (1, 2):
        assert moved._share(il, limit[il]) == pytest.approx(shares[il], abs=1e-6)
        np.testing.assert_allclose(np.diff(moved.quantiles[il]), np.diff(estimator.quantiles[il]), atol=1e-6)


@pytest.mark.parametrize("k_base", [1, 3])
@pytest.mark.parametrize("cost", [None, (0.0, 1.0, 7.0)])
def test_the_table_has_every_plan(k_base, cost):
    estimator = make()
    counts, threshold = estimator.plan_table(FULL, k_base, cost)
    assert counts.shape == threshold.shape == (8 - 2 + 1, 3)
    for row, total in enumerate(range(2, 9)):
        try:
            plan = estimator.plan(total, FULL, k_base, cost)
        except PlanError:
            assert np.isnan(threshold[row]).all()
            continue
        assert plan.expert_used_count == tuple(counts[row]) and plan.threshold == tuple(threshold[row])
    assert np.isnan(threshold[0]).all() == (k_base > 1)


# in a profile


def profile(**changes) -> metadata.Profile:
    rows = (np.empty(0), np.array([9.0, 8, 7, 6]), np.array([5.0, 4, 3, 2]))
    made = metadata.Profile(rows, (1.0,) * 3, metadata.Calibration("made up", 1, "0"), estimator=make())
    return replace(made, **changes)


def test_profile_plans_with_it():
    plan = profile(token_rule="estimate").plan(5, FULL)
    assert plan == replace(make().plan(5, FULL), strict=True)  # by default
    assert profile().plan(5, FULL).token_rule == "off"
    assert (
        profile(cost=(1.0, 1.0, 3.0)).plan(5, FULL, "estimate").threshold[1]
        < profile().plan(5, FULL, "estimate").threshold[1]
    )
    with pytest.raises(PlanError, match="needs an estimator"):
        profile(estimator=None).plan(5, FULL, "estimate")
    assert profile().plan(5, FULL, "estimate", strict=True) == plan
    assert profile().plan(5, FULL, "estimate", strict=False) == make().plan(5, FULL)


def test_changing_the_rule_plans_the_layers_anew():
    made = profile()
    estimate, off = made.plan(5, FULL, "estimate"), made.plan(5, FULL, "off")
    assert made.with_token_rule(estimate, "off") == off and made.with_token_rule(off, "estimate") == estimate
    assert made.with_token_rule(estimate, "estimate") == estimate


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(token_rule="estimate"), "threshold: found none"),
        (dict(token_rule="estimate", threshold=[0.0] * 3, value="relative"), "want 'score' with token_rule 'estimate'"),
        (dict(estimator=make()), "estimator: found one, want none"),
    ],
)
def test_malformed_plan_is_refused(changes, message):
    with pytest.raises(PlanError, match=message):
        Plan((0, 2, 2), FULL, **changes)


# in a file


@pytest.fixture
def side_file(tmp_path):
    """A side file with a plan of the rule, and the model that it is for."""
    keys = [*plan_keys(), ("deepseek.embedding_length", 32)]
    model = metadata.read(write_gguf(tmp_path / "m.gguf", keys=keys))
    made = profile(token_rule="estimate")
    metadata.write_side_file(tmp_path / "plan.gguf", model, made.plan(5, FULL), made)
    return tmp_path / "plan.gguf"


def test_what_is_written_is_read_back(side_file, tmp_path):
    made = profile(token_rule="estimate")
    for found in (metadata.read(side_file), metadata.read_for(side_file, metadata.read(tmp_path / "m.gguf"))):
        assert found.plan == made.plan(5, FULL)
        assert same(found.plan.estimator, make()) and found.profile.estimator is found.plan.estimator
        assert found.profile.plan(5, FULL) == found.plan


def test_plan_without_a_profile_keeps_it(side_file, tmp_path):
    model = metadata.read(tmp_path / "m.gguf")
    metadata.write_side_file(tmp_path / "bare.gguf", model, make().plan(5, FULL), None)
    found = metadata.read(tmp_path / "bare.gguf")
    assert found.profile is None and same(found.plan.estimator, make())


def test_estimator_beside_another_rule(tmp_path, side_file):
    made = profile()
    metadata.write_side_file(tmp_path / "off.gguf", metadata.read(tmp_path / "m.gguf"), made.plan(5, FULL), made)
    found = metadata.read(tmp_path / "off.gguf")
    assert found.plan.estimator is None and found.profile.plan(5, FULL, "estimate") == made.plan(5, FULL, "estimate")


def changed(path, target, **keys):
    """The file again with allocmoe.* keys changed; None removes one."""
    with GGUFFile(path) as file:
        for key, value in keys.items():
            file.set("allocmoe." + key.replace("__", "."), value)
        file.write_metadata(target)
    return target


@pytest.mark.parametrize(
    "keys, message",
    [
        (dict(threshold=None), "threshold: found nothing"),
        (dict(threshold=np.full(3, np.nan, np.float32)), "threshold, layer 0: found NaN"),
        (dict(threshold=np.zeros(2, np.float32)), "threshold: found 2 entries, want 3"),
        (dict(estimator__n_down=None), "estimator: found nothing"),
        (dict(estimator__n_down="3"), "estimator.n_down: found '3'"),
        (dict(estimator__n_down=4), "estimator.down: found 14 entries, want 18"),
        (dict(estimator__n_down=0), "estimator.down: found 14 entries, want 0"),
        (dict(estimator__n_down=2**31), "estimator.down: found 14 entries"),
        (dict(estimator__rank=None), "estimator.rank: found None"),
        (dict(estimator__rank=3), "estimator.output: found 8 entries, want 12"),
        (dict(estimator__n_relu=2), "estimator.n_relu: found 2, want 0 to 1"),
        (dict(estimator__n_relu="1"), "estimator.n_relu: found '1'"),
        (dict(estimator__n_embd=0), "estimator.n_embd: found 0"),
        (dict(estimator__n_expert=0), "estimator.n_expert: found 0"),
        (dict(estimator__n_expert=9), "estimator.log_norm: found 16 entries, want 18"),
        (dict(estimator__down=None), "estimator.down: found nothing"),
        (dict(estimator__down=np.zeros(14)), "estimator.down: found float64 array, want an array of uint64"),
        (dict(estimator__down=np.zeros(13, np.uint64)), "estimator.down: found 13 entries, want 14"),
        (dict(estimator__up=np.full(144, 2**64 - 1, np.uint64)), "estimator.up: found NaN or infinity"),
        (
            dict(estimator__up=np.frombuffer((b"\0\x7c" + b"\x88" * 16) * 64, np.uint64)),
            "estimator.up: found NaN or infinity",
        ),
        (dict(estimator__output=np.full(8, 2**64 - 1, np.uint64)), "estimator.output: found NaN or infinity"),
        (dict(estimator__n_relu=None), "estimator.n_relu: found None"),
        (dict(table__expert_used_count=np.zeros(20, np.uint8)), "table.expert_used_count: found 20 entries, want 21"),
        (dict(table__estimate__threshold=None), "table.estimate.threshold: found nothing"),
        (dict(estimator__log_norm="1 2 3"), "estimator.log_norm: found '1 2 3'"),
        (dict(estimator__quantiles=None), "estimator.quantiles: found nothing"),
        (dict(estimator__quantiles=np.zeros(65, np.float32)), "estimator.quantiles: found 65 entries, want 130"),
        (dict(estimator__quantiles=np.linspace(1, 0, 130, dtype=np.float32)), "quantiles: found falling ones"),
        (dict(token_rule="guess"), "token_rule: found 'guess'"),
    ],
    ids=lambda value: "-".join(f"{key}" for key in value) if isinstance(value, dict) else "",
)
@pytest.mark.filterwarnings("error")
def test_malformed_file_is_refused(side_file, tmp_path, keys, message):
    with pytest.raises(PlanError, match="hurt.gguf") as error:
        metadata.read(changed(side_file, tmp_path / "hurt.gguf", **keys))
    assert message in str(error.value)


def test_estimator_of_another_model_is_refused(side_file, tmp_path):
    """A model's file says how wide it is, and how many experts it has."""
    made = profile(token_rule="estimate", estimator=make(n_embd=16))
    with GGUFFile(tmp_path / "m.gguf") as file:
        metadata.write(file, made.plan(5, FULL), made)
        file.write_metadata(tmp_path / "wide.gguf")
        offset = file.data_offset
    with open(tmp_path / "wide.gguf", "ab") as wide:
        wide.write((tmp_path / "m.gguf").read_bytes()[offset:])
    with pytest.raises(PlanError, match="estimator.n_embd: found 16, want the model's embedding_length, 32"):
        metadata.read(tmp_path / "wide.gguf")


def test_flipped_bytes_never_crash(side_file, tmp_path):
    """Any byte changed: read or refused with one of our errors."""
    whole = bytearray(side_file.read_bytes())
    rng = np.random.default_rng(0)
    refused = 0
    for position in rng.integers(4, len(whole), 400):
        hurt = whole.copy()
        hurt[position] ^= 1 << rng.integers(8)
        (tmp_path / "hurt.gguf").write_bytes(hurt)
        try:
            found = metadata.read(tmp_path / "hurt.gguf").plan
            assert found.estimator is None or np.isfinite(found.estimator.down).all()
        except ValueError as error:
            assert type(error).__name__ in ("GGUFError", "PlanError"), error
            refused += 1
    assert refused > 20


settings.register_profile("here", deadline=None)
settings.load_profile("here")

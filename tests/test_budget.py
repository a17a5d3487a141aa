"""The library serves budgets from what the file carries: the plans are those that Python makes, for every total and rule."""

from dataclasses import replace

from allocmoe_edge import Llama, PlanError
from allocmoe_edge._native import context_pointer, ffi, libllama
from allocmoe_edge.convert import output, quantize
from allocmoe_edge.gguf_file import GGUFFile
from allocmoe_edge.plan import TOKEN_RULES, metadata
from gguf_factory import random_estimator
import llama_cpp
import numpy as np
import pytest

TOKENS = list(range(3, 43))
N_LAYER, K = 4, 4
FULL = (K,) * N_LAYER
SIZES = dict(n_ctx=64, logits_all=True, n_threads=2, verbose=False)


def made_profile(**changes) -> metadata.Profile:
    """Uneven layers, thresholds, an estimator; k_base 2."""
    rng = np.random.default_rng(3)
    rows = tuple(-np.sort(-rng.random(K)) * (il + 1) for il in range(N_LAYER))
    table = tuple(np.array([np.inf, 0.3, 0.1, -np.inf], np.float32) + il for il in range(N_LAYER))
    estimator = replace(
        random_estimator(N_LAYER, 8, 64, 6, 4, 7), quantiles=np.sort(rng.standard_normal((N_LAYER, 65)), axis=1)
    )
    profile = metadata.Profile(
        rows,
        (1.0,) * N_LAYER,
        metadata.Calibration("made up", 1, "0" * 64),
        threshold_table=table,
        k_base=2,
        token_rule="threshold",
        estimator=estimator,
    )
    return replace(profile, **changes)


@pytest.fixture(scope="module")
def source(built):
    return built["olmoe"].gguf_path


def written(source, path, profile, total=8):
    output.write_planned(source, path, profile.plan(total, FULL), profile)
    return path


@pytest.fixture(scope="module")
def planned(source, tmp_path_factory):
    return written(source, tmp_path_factory.mktemp("budget") / "planned.gguf", made_profile())


@pytest.fixture(scope="module")
def llm(planned):
    llm = Llama(str(planned), **SIZES)
    yield llm
    llm.close()


def served(llm, total, rule, strict):
    """The plan in force, None where the budget is refused; what is in force stays then."""
    before = llm.plan
    try:
        return llm.set_budget(total, token_rule=rule, strict=strict)
    except PlanError:
        assert llm.plan == before
        return None


def wanted(profile, total, rule, strict):
    try:
        plan = profile.plan(total, FULL, rule, strict)
    except PlanError:
        return None
    # k_base is nothing of a plan in which no rule keeps so many
    return replace(plan, k_base=1) if plan.token_rule == "off" else plan


@pytest.mark.parametrize("changes", [{}, {"allocation": "uniform"}, {"cost": (1.0, 2.5, 0.7, 1.3), "cost_unit": "ms"}])
def test_every_plan_is_the_planners(source, tmp_path, changes):
    profile = made_profile(**changes)
    llm = Llama(str(written(source, tmp_path / "m.gguf", profile)), **SIZES)
    assert llm.plan == profile.plan(8, FULL)
    refused = 0
    for rule in (None, *TOKEN_RULES):
        for strict in (None, False, True):
            for total in range(N_LAYER, N_LAYER * K + 1):
                found, want = served(llm, total, rule, strict), wanted(profile, total, rule, strict)
                assert found == want, (total, rule, strict)
                refused += found is None
    # below k_base under estimate, strict under off and batch
    assert refused > 2 * 13
    llm.close()


@pytest.mark.parametrize("changes", [{}, {"cost": (1.0, 2.5, 0.7, 1.3), "cost_unit": "ms"}])
def test_no_layer_is_planned_below_k_base(changes):
    """Where the budget has room for k_base in every layer; the layer that matters least had one of 2."""
    profile, without = made_profile(**changes), made_profile(**changes, k_base=1)
    assert min(without.plan(9, FULL).expert_used_count) == 1
    for rule in ("threshold", "batch", "off"):
        least = {total: min(profile.plan(total, FULL, rule).expert_used_count) for total in range(4, 17)}
        assert all(k >= 2 for total, k in least.items() if total >= 8), least
        assert least[7] == 1


def test_k_base_is_paid_from_the_budget():
    """Of 20 activations 8 are a share of 11.2 of the cost, and two in each layer cost 16: so much was planned."""
    full, cost = (8, 8, 2, 2), (1.0, 1.0, 3.0, 3.0)
    rows = tuple(np.linspace(2.0, 1.0, k) for k in full)
    profile = made_profile(sensitivity=rows, cost=cost, cost_unit="ms")
    table = profile.plan_table(full)
    assert all(row @ cost <= total / 20 * 28 + 1e-9 for total, row in zip(range(6, 21), table[2:]))
    assert [total for total, row in zip(range(4, 21), table) if row.min() >= 2][0] == 12


def test_rule_of_the_files_own_plan(llm):
    profile = made_profile()
    plan = profile.plan(8, FULL)
    for rule in TOKEN_RULES:
        want = profile.with_token_rule(plan, rule)
        assert llm.set_budget(token_rule=rule) == (replace(want, k_base=1) if rule == "off" else want)
    assert llm.set_budget() == plan


@pytest.mark.parametrize("rule", ["off", "threshold", "estimate"])
def test_budgets_of_a_file_that_counts_milliseconds(source, tmp_path, rule):
    """A plan's counts add up to another number than its total there, and that number was looked up: "balanced" spent another share of
    the time than the plan in the file, and so did the file's plan under another rule."""
    profile = made_profile(cost=(1.0, 1.0, 3.0, 3.0), cost_unit="ms", token_rule=rule, k_base=1)
    llm = Llama(str(written(source, tmp_path / "m.gguf", profile)), **SIZES)
    own = llm.plan
    assert own == profile.plan(8, FULL) and own.budget_total != 8
    assert llm.set_budget("balanced") == llm.set_budget(0.5) == llm.set_budget() == own
    assert llm.budget_total("balanced") == 8 and llm.budget_total("fast") == 5
    for other in TOKEN_RULES:
        want = profile.with_token_rule(own, other)
        assert want.expert_used_count == profile.plan(8, FULL, other).expert_used_count
        assert llm.set_budget(token_rule=other) == (replace(want, k_base=1) if other == "off" else want)
    total = ffi.new("int64_t *")
    for asked in (6, 8, 12):
        llm.set_budget(asked)
        assert libllama.allocmoe_get_total(context_pointer(llm), total) == 0
        assert llm.set_budget(total[0]) == profile.plan(asked, FULL)
    llm.close()


def test_totals_with_the_same_plan(source, tmp_path):
    """Where one layer costs much more than the others, several have: a server's budget of 8 was 6."""
    profile = made_profile(cost=(1.0, 1.0, 1.0, 20.0), cost_unit="ms", k_base=1)
    path = written(source, tmp_path / "m.gguf", profile)
    llm, total, rows = Llama(str(path), **SIZES), ffi.new("int64_t *"), set()
    for asked in range(N_LAYER, N_LAYER * K + 1):
        plan = llm.set_budget(asked)
        assert libllama.allocmoe_get_total(context_pointer(llm), total) == 0
        assert total[0] >= asked and llm.set_budget(total[0]) == plan
        rows.add(total[0])
    assert len(rows) < N_LAYER * (K - 1) + 1
    for asked in (8, 10):
        other = Llama(str(path), kv_overrides={"allocmoe.budget_total": asked}, **SIZES)
        assert other.plan == llm.set_budget(asked)
        other.close()
    llm.close()


def test_errors_are_sentences(llm):
    def message(*arguments) -> str:
        assert libllama.allocmoe_set_budget(context_pointer(llm), *arguments) == libllama.ALLOCMOE_ERR_BUDGET
        return ffi.string(libllama.allocmoe_last_error()).decode()

    estimate = libllama.ALLOCMOE_RULE_ESTIMATE
    assert message(3, -1, -1) == "budget: found 3 activations per token, want 4 to 16 under token rule threshold"
    assert message(17, -1, -1).startswith("budget: found 17")
    assert message(7, estimate, -1) == "budget: found 7 activations per token, want 8 to 16 under token rule estimate"
    assert message(-1, -1, -1).startswith("budget: found -1")
    assert message(8, 4, -1).startswith("token rule: found 4")
    assert message(8, 0, 1) == "strict: needs token rule threshold or estimate, found off"


def logits(llm) -> np.ndarray:
    llm.clear_cache()
    llm.eval(TOKENS)
    return llm.scores[: len(TOKENS)].copy()


def test_raised_expert_count(planned):
    """The file's plans are for 4: an override that raises it is what runs, and all that can. `Llama` refuses the rest itself;
    other programs hear it of the library."""
    llm = Llama(str(planned), kv_overrides={"olmoe.expert_used_count": 6}, budget=1.0, **SIZES)
    assert llm.plan.expert_used_count == (6,) * N_LAYER and llm.plan.token_rule == "off"
    full = logits(llm)
    of_file, context = libllama.ALLOCMOE_TOTAL_OF_FILE, context_pointer(llm)
    for total, rule, strict in ((8, -1, -1), (of_file, libllama.ALLOCMOE_RULE_THRESHOLD, -1), (24, -1, 1)):
        assert libllama.allocmoe_set_budget(context, total, rule, strict) == libllama.ALLOCMOE_ERR_BUDGET
        message = ffi.string(libllama.allocmoe_last_error()).decode()
        assert "olmoe.expert_used_count is overridden with 6, and the file's plans are for 4" in message
    for total in (24, of_file):
        assert libllama.allocmoe_set_budget(context, total, -1, -1) == libllama.ALLOCMOE_OK
    assert np.array_equal(logits(llm), full)
    llm.close()
    for budget in ("full", " full\n", " 100 % "):  # the one with blanks around the name was refused
        Llama(str(planned), kv_overrides={"olmoe.expert_used_count": 6}, budget=budget, **SIZES).close()
    with pytest.raises(PlanError, match="only the full budget"):
        Llama(str(planned), kv_overrides={"olmoe.expert_used_count": 6}, budget="balanced", **SIZES)


def test_lowered_expert_count(planned):
    llm = Llama(str(planned), kv_overrides={"olmoe.expert_used_count": 3}, **SIZES)
    assert max(llm.plan.expert_used_count) <= 3
    for total in range(4, 13):
        assert llm.set_budget(total, token_rule="off").budget_total <= total
    assert llm.set_budget(12).expert_used_count == (3,) * N_LAYER
    llm.close()


def test_budget_by_key_override(planned):
    """As `--override-kv allocmoe.budget_total=int:11` of llama.cpp's programs."""
    llm = Llama(str(planned), kv_overrides={"allocmoe.budget_total": 11}, **SIZES)
    assert llm.plan == made_profile().plan(11, FULL)
    llm.close()
    # 2**32 + 6 was 6
    for total in (99, 2**32 + 6):
        with pytest.raises(
            ValueError, match="allocmoe.budget_total: want a whole number of expert activations per token, 1 to 16"
        ):
            Llama(str(planned), kv_overrides={"allocmoe.budget_total": total}, **SIZES)


@pytest.mark.parametrize(
    "value",
    ["much", b"1", np.nan, -1, 10**30, 10**6000, 1j, [], {}, np.zeros(2), object()],
    ids=lambda value: type(value).__name__,
)
def test_odd_values_for_a_live_model(llm, value):
    before = llm.plan
    for call in (
        llm.set_budget, lambda value: llm.set_budget(8, token_rule=value), lambda value: llm.set_budget(8, strict=value),
        llm.set_plan, lambda value: llm.set_plan([value] * N_LAYER), llm.apply_plan,
    ):  # fmt: skip
        with pytest.raises(PlanError):
            call(value)
    assert llm.plan == before


@pytest.mark.parametrize(
    "options, reason",
    [
        (dict(kv_overrides={"allocmoe.token_rule": "off"}), "allocmoe.token_rule cannot be overridden"),
        (dict(kv_overrides={"allocmoe.budget_totl": 11}), "allocmoe.budget_totl cannot be overridden"),
        (dict(kv_overrides={"allocmoe.budget_total": 0}), "is 0, want a whole number"),
        (dict(kv_overrides={"allocmoe.budget_total": True}), "is True, want a whole number"),
        (dict(kv_overrides={"allocmoe.budget_total": 0.5}), "is 0.5, want a whole number"),
        (dict(kv_overrides={"allocmoe.budget_total": 11}, budget=0.5), "leave out budget, token_rule and plan_path"),
        (dict(kv_overrides={"allocmoe.budget_total": 11}, vocab_only=True), "vocab_only"),
    ],
    ids=str,
)
def test_key_overrides_that_would_be_ignored(planned, options, reason):
    with pytest.raises(PlanError, match=reason):
        Llama(str(planned), **options, **SIZES)


def test_the_library_refuses_them_too(planned, source, capfd):
    """As llama.cpp's own programs would pass them."""
    for path, key in ((planned, "allocmoe.token_rule"), (source, "allocmoe.budget_total")):
        with pytest.raises(ValueError, match="Failed to load"):
            llama_cpp.Llama(str(path), kv_overrides={key: 11}, n_ctx=64, verbose=True)
        assert f"{key} cannot be overridden" in capfd.readouterr().err


def test_key_override_of_a_file_without_a_plan(source):
    with pytest.raises(PlanError, match="has no plan"):
        Llama(str(source), kv_overrides={"allocmoe.budget_total": 11}, **SIZES)


@pytest.mark.parametrize("damage", ["cut", "not GGUF", "without a plan", "of another architecture"])
def test_side_files_that_the_library_refuses(llm, source, tmp_path, damage):
    path = tmp_path / "plan.gguf"
    metadata.write_side_file(path, metadata.read(source), made_profile().plan(8, FULL), made_profile())
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-3000])
    elif damage == "not GGUF":
        path.write_bytes(b"not a GGUF file")
    else:
        with GGUFFile(path) as file:
            file.set(
                *(
                    ("allocmoe.version", None)
                    if damage == "without a plan"
                    else ("allocmoe.model.architecture", "llama")
                )
            )
            file.write_metadata(path)
    before = llm.plan
    status = libllama.allocmoe_load_plan_file(context_pointer(llm), str(path).encode())
    assert (
        status == libllama.ALLOCMOE_ERR_BUDGET and "plan.gguf: " in ffi.string(libllama.allocmoe_last_error()).decode()
    )
    assert llm.plan == before


def side_file(path, source, profile, total=8):
    metadata.write_side_file(path, metadata.read(source), profile.plan(total, FULL), profile)
    return path


def changed(path, key, change) -> None:
    """With other values of an array, or of a number."""
    with GGUFFile(path) as file:
        value = file.get(f"allocmoe.{key}")
        file.set(f"allocmoe.{key}", change(value))
        file.write_metadata(path)


def refusals(llm, path) -> list:
    """What Python says of a side file, and what the library says."""
    with pytest.raises(PlanError) as error:
        metadata.read(path)
    before = llm.plan
    status = libllama.allocmoe_load_plan_file(context_pointer(llm), str(path).encode())
    assert status == libllama.ALLOCMOE_ERR_BUDGET and llm.plan == before
    return [str(error.value), ffi.string(libllama.allocmoe_last_error()).decode()]


def in_row(row: int, counts) -> callable:
    def change(table):
        rows = table.reshape(-1, N_LAYER).copy()
        rows[row] = counts
        return rows.ravel()

    return change


@pytest.mark.parametrize("key", ["table.expert_used_count", "table.estimate.expert_used_count"])
@pytest.mark.parametrize(
    "change, reason",
    [
        (in_row(5, [3, 0, 3, 3]), ["0 in row 5", "layer 1"]),
        (in_row(5, [1, 1, 5, 2]), ["5 in row 5", "layer 2"]),
        (in_row(5, [1, 3, 3, 3]), ["10 activations in row 5", "for 9"]),
        (in_row(5, [65535 % 256] * 4), ["255 in row 5", "layer 0"]),
        (lambda table: table[:-1], ["entries", "array of"]),
        (lambda table: np.append(table, table[-4:]), ["entries", "array of"]),
        (lambda table: table.astype(np.int32), ["int32 array", "array of"]),
    ],
)
def test_tables_that_are_wrong(llm, source, tmp_path, key, change, reason):
    """Refused by key and row, in Python and by the library."""
    path = side_file(tmp_path / "plan.gguf", source, made_profile())
    changed(path, key, change)
    for message in refusals(llm, path):
        assert f"allocmoe.{key}" in message and any(words in message for words in reason), message
    row = reason[0].partition(" in ")[2]
    assert all(row in message for message in refusals(llm, path))


def test_estimates_spend_just_what_they_are_for(llm, source, tmp_path):
    path = side_file(tmp_path / "plan.gguf", source, made_profile())
    changed(path, "table.estimate.expert_used_count", in_row(6, [2, 2, 2, 2]))
    assert all("8 activations in row 6, which is for 10" in message for message in refusals(llm, path))


def test_total_that_is_not_the_plans(llm, source, tmp_path):
    path = side_file(tmp_path / "plan.gguf", source, made_profile())
    changed(path, "budget_total", lambda total: total + 1)
    assert all("budget_total" in message for message in refusals(llm, path))


@pytest.mark.parametrize("allocation", ["alloc-l", "uniform"])
@pytest.mark.parametrize("cost", [(1.0,) * 4, (0.3, 2.0, 0.1, 1.7), (5.0, 1.0, 1.0, 1.0)])
def test_tables_that_are_made_are_right(planned, source, tmp_path, allocation, cost):
    """Also where layers' costs differ and rows spend by those, and where sensitivities do not fall with every expert."""
    llm = Llama(str(planned), **SIZES)  # of its own: what a side file says stays
    rows = made_profile().sensitivity
    for sensitivity in (rows, tuple(row[::-1] for row in rows), tuple(np.roll(row, 1) for row in rows)):
        profile = made_profile(cost=cost, cost_unit="ms", allocation=allocation, sensitivity=sensitivity)
        path = side_file(tmp_path / "plan.gguf", source, profile)
        assert metadata.read(path).plan is not None
        status = libllama.allocmoe_load_plan_file(context_pointer(llm), str(path).encode())
        assert status >= 0, ffi.string(libllama.allocmoe_last_error())
        path.unlink()
    llm.close()


# side files of other models


def with_another_router(source, path, layer: int):
    """A copy of a model in which one weight of one router is another."""
    path.write_bytes(source.read_bytes())
    with GGUFFile(path) as file:
        (tensor,) = (each for each in file.tensors if each.name == f"blk.{layer}.ffn_gate_inp.weight")
        with open(path, "r+b") as data:
            data.seek(file.data_offset + tensor.offset)
            data.write(np.float32(1.0).tobytes())
    return path


@pytest.mark.parametrize("as_side_file", [True, False])
def test_plan_of_another_model_of_the_same_shape(source, planned, tmp_path, as_side_file):
    plan = side_file(tmp_path / "plan.gguf", source, made_profile()) if as_side_file else planned
    other = with_another_router(source, tmp_path / "other.gguf", 3)
    with pytest.raises(PlanError, match="plan.*was made for another model .* with other weights in its routers"):
        Llama(str(other), plan_path=plan, **SIZES)
    Llama(str(source), plan_path=plan, **SIZES).close()


def test_plan_of_another_quantisation_of_the_model(source, tmp_path):
    """Also through a side file that was made from a side file, and one that does not say."""
    quantized = tmp_path / "q.gguf"
    quantize.quantize(source, quantized, "Q8_0", n_threads=1, expected=1)
    assert metadata.routers_hash(quantized) == metadata.routers_hash(source) != ""
    path = side_file(tmp_path / "plan.gguf", source, made_profile())
    again = tmp_path / "again.gguf"
    metadata.write_side_file(again, metadata.read(path), made_profile().plan(9, FULL), made_profile())
    llm = Llama(str(quantized), plan_path=again, **SIZES)
    assert llm.plan.budget_total == llm.stored.plan.budget_total == 9
    llm.close()
    other = with_another_router(source, tmp_path / "other.gguf", 0)
    with pytest.raises(PlanError, match="again.gguf: was made for another model"):
        metadata.read_for(again, metadata.read(other))
    changed(again, "model.name", lambda value: "")
    with pytest.raises(PlanError, match="again.gguf: was made for another model than"):
        metadata.read_for(again, metadata.read(other))
    changed(again, "model.routers", lambda value: None)
    assert metadata.read_for(again, metadata.read(other)).plan.budget_total == 9

"""The library serves budgets from what the file carries: the plans are those that Python makes, for every total and rule."""

from dataclasses import replace

from allocmoe_edge import Llama, PlanError
from allocmoe_edge._native import context_pointer, ffi, libllama
from allocmoe_edge.convert import output
from allocmoe_edge.gguf_file import GGUFFile
from allocmoe_edge.plan import TOKEN_RULES, metadata
from gguf_factory import random_estimator
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


def test_rule_of_the_files_own_plan(llm):
    profile = made_profile()
    plan = profile.plan(8, FULL)
    for rule in TOKEN_RULES:
        want = profile.with_token_rule(plan, rule)
        assert llm.set_budget(token_rule=rule) == (replace(want, k_base=1) if rule == "off" else want)
    assert llm.set_budget() == plan


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
    with pytest.raises(ValueError):
        Llama(str(planned), kv_overrides={"allocmoe.budget_total": 99}, **SIZES)


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

"""`Llama` under token rule "estimate": from a file, from a side file, and as the budget changes. A random estimator will do."""

from dataclasses import replace
import pickle
import warnings

from allocmoe_edge import Llama, Plan, PlanError
from allocmoe_edge._native import context_pointer, ffi, libllama
from allocmoe_edge.convert import choose, output, thresholds
from allocmoe_edge.convert.calibration import CalibrationText
from allocmoe_edge.measure.perplexity import Reference, negative_log_likelihood
from allocmoe_edge.plan import metadata
from allocmoe_edge.plan.estimator import Estimator
import llama_cpp
import numpy as np
import pytest

TOKENS = list(range(3, 43))
FULL = (4,) * 4


def random_estimator(n_layer=4, n_expert=8, n_embd=64, seed=0) -> Estimator:
    rng = np.random.default_rng(seed)
    shapes = Estimator.shapes(n_layer, n_expert, 6, 4, n_embd)
    arrays = {name: rng.standard_normal(shape) * 0.3 for name, shape in shapes.items()}
    arrays["quantiles"].sort(axis=1)
    return Estimator(**arrays)


def load(path, **kwargs) -> Llama:
    return Llama(str(path), n_ctx=64, logits_all=True, n_threads=2, verbose=False, **kwargs)


def logits(llm) -> np.ndarray:
    llm.clear_cache()
    llm.eval(TOKENS)
    return llm.scores[: len(TOKENS)].copy()


@pytest.fixture(scope="module")
def source(built):
    return built["olmoe"].gguf_path


@pytest.fixture(scope="module")
def profile():
    rows = tuple(np.linspace(2.0, 1.0, 4) * (il + 1) for il in range(4))
    made = metadata.Profile(rows, (1.0,) * 4, metadata.Calibration("made up", 1, "0" * 64))
    return replace(made, token_rule="estimate", estimator=random_estimator())


@pytest.fixture(scope="module")
def planned(source, profile, tmp_path_factory):
    path = tmp_path_factory.mktemp("estimate") / "planned.gguf"
    output.write_planned(source, path, profile.plan(0.5, FULL), profile)
    return path


@pytest.fixture(scope="module")
def llm(planned):
    return load(planned)


def n_recorded(llm) -> int:
    """Values that the runtime has kept of the first layer."""
    return libllama.allocmoe_take_scores(context_pointer(llm), 0, ffi.NULL, 0)


def test_plan_comes_from_the_file(planned, source, profile):
    """As the same plan set live, and as neither top-k nor the full model."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llm = load(planned)
    assert llm.plan == profile.plan(0.5, FULL) and llm.plan.token_rule == "estimate"
    found = logits(llm)
    live = load(source)
    full = logits(live)
    live.set_plan(profile.plan(0.5, FULL))
    assert np.array_equal(logits(live), found)
    live.set_plan(Plan((2,) * 4, FULL))
    assert not np.allclose(logits(live), found, atol=1e-3) and not np.allclose(full, found, atol=1e-3)


def test_plan_comes_from_a_side_file(source, profile, llm, tmp_path):
    path = output.write_side_file(tmp_path / "p.gguf", metadata.read(source), profile.plan(0.5, FULL), profile)
    beside = load(source, plan_path=str(path))
    assert beside.plan == llm.set_budget()
    assert np.array_equal(logits(beside), logits(llm))


def test_side_file_of_another_model_is_refused(source, profile, tmp_path):
    """As many layers and experts per token, but another width; or another number of experts."""
    for sizes in (dict(n_embd=32), dict(n_expert=7)):
        other = replace(profile, estimator=random_estimator(**sizes))
        path = output.write_side_file(tmp_path / "p.gguf", metadata.read(source), other.plan(0.5, FULL), other)
        with pytest.raises(PlanError, match="for another model"):
            load(source, plan_path=str(path))
        live = load(source)
        with pytest.raises(PlanError, match="for another model"):
            live.set_plan(other.plan(0.5, FULL))
        assert live.plan == Plan.full(FULL)


def test_budget_and_rule_change(llm, profile):
    found = logits(llm)
    assert llm.set_budget(0.75) == profile.plan(12, FULL)
    assert not np.array_equal(logits(llm), found)
    assert llm.set_budget(0.5, token_rule="off") == profile.plan(8, FULL, "off")
    assert llm.set_budget(token_rule="off") == profile.plan(8, FULL, "off")
    with pytest.raises(PlanError, match="threshold table"):
        llm.set_budget(token_rule="threshold")
    assert llm.plan == profile.plan(8, FULL, "off")
    assert llm.set_budget(strict=False) == profile.plan(8, FULL, "estimate", strict=False) != profile.plan(8, FULL)
    assert llm.set_budget() == profile.plan(8, FULL)
    assert np.array_equal(logits(llm), found)


def test_full_budget_is_no_plan(llm):
    llm.set_budget(1.0)
    found = logits(llm)
    llm.set_plan(None)
    assert np.array_equal(logits(llm), found)
    llm.set_budget()


def test_activations_are_counted(llm, profile):
    """A random estimator's quantiles promise nothing; the ends of the range do."""
    llm.set_budget()
    for total in (4, 16):
        llm.set_budget(total)
        llm.expert_stats(reset=True)
        logits(llm)
        assert llm.expert_stats()["prefill"]["activations"].sum() == total * len(TOKENS)
    llm.set_budget()


def test_estimators_can_be_exchanged(llm, profile):
    """Every plan runs by its own."""
    llm.set_budget()
    first = logits(llm)
    other = random_estimator(seed=1).plan(8, FULL)
    llm.set_plan(other)
    second = logits(llm)
    assert not np.allclose(first, second, atol=1e-3)
    llm.set_budget()
    assert np.array_equal(logits(llm), first)
    llm.set_plan(other)
    assert np.array_equal(logits(llm), second)
    # one without any runs by the file's
    llm.set_plan(replace(profile.plan(8, FULL), estimator=None))
    assert np.array_equal(logits(llm), first)
    llm.set_budget()


def test_what_is_refused_changes_nothing(llm):
    """Plan, estimator, and what is recorded, whichever of them is wrong."""
    kept = random_estimator(seed=1).plan(8, FULL)
    beyond = Plan((9,) * 4, (9,) * 4, "estimate", threshold=(0.0,) * 4, estimator=random_estimator(seed=2))
    other = replace(kept, estimator=random_estimator(n_embd=32))
    for record in (False, True):
        llm.apply_plan(kept, record=record)
        expected, n_values = logits(llm), n_recorded(llm)
        assert bool(n_values) is record
        libllama.allocmoe_take_scores(context_pointer(llm), 0, ffi.new("float[]", n_values), n_values)
        for refused in (
            lambda: llm.apply_plan(beyond, record=not record),
            lambda: llm.apply_plan(other, record=not record),
            lambda: llm.apply_plan(kept, start_layer=2**31),
            lambda: llm.apply_plan(kept, start_layer=4),
            lambda: llm.apply_plan(kept, record=5),
            lambda: llm.set_plan(other),
            lambda: llm.set_budget(0.01),
        ):
            with pytest.raises(ValueError):
                refused()
            assert llm.plan == kept and llm.plan.estimator is kept.estimator is llm._handed_over
        assert np.array_equal(logits(llm), expected) and n_recorded(llm) == n_values
    llm.set_budget()


def test_plan_without_a_profile(source, profile, tmp_path):
    """Such a file can only have its rule taken off; the estimator is in it all the same."""
    output.write_planned(source, tmp_path / "m.gguf", profile.plan(8, FULL), None)
    llm = load(tmp_path / "m.gguf")
    assert llm.plan == profile.plan(8, FULL)
    assert llm.set_budget(token_rule="off").token_rule == "off"
    assert llm.set_budget() == profile.plan(8, FULL)


def test_no_estimator(source):
    llm = load(source)
    with pytest.raises(PlanError, match="needs an estimator"):
        llm.set_plan(Plan((2,) * 4, FULL, "estimate", threshold=[0.0] * 4))
    with pytest.raises(PlanError, match="allocmoe-convert"):
        llm.set_budget(token_rule="estimate")


def test_pickling_keeps_it(llm, profile):
    llm.set_plan(random_estimator(seed=1).plan(9, FULL))
    copy = pickle.loads(pickle.dumps(llm))
    assert copy.plan == llm.plan and np.array_equal(logits(copy), logits(llm))
    llm.set_budget()


def test_state_remembers_it(llm):
    llm.set_budget()
    expected = logits(llm)
    state = llm.save_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llm.load_state(state)
    llm.set_budget(token_rule="off")
    with pytest.warns(UserWarning, match="another plan"):
        llm.load_state(state)
    llm.set_budget()
    assert np.array_equal(logits(llm), expected)


def test_states_do_not_carry_it(planned):
    """Nor does an entry of llama-cpp-python's caches, or the pickled model where it is the file's own."""
    llm = load(planned)
    llm.set_cache(llama_cpp.LlamaRAMCache())
    llm(TOKENS[:4], max_tokens=2)
    (entry,) = llm.cache.cache_state.values()
    for state in (llm.save_state(), entry):
        assert state.plan == llm.plan and state.plan.estimator is None
        assert len(pickle.dumps(state.plan)) < 1000
    assert len(pickle.dumps(llm)) < 10_000


def test_load_logs_one_line(planned, capfd):
    Llama(str(planned), n_ctx=64, verbose=True)
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("allocmoe: ")]
    assert lines == [
        "allocmoe: budget 0.50: 8 of 16 expert activations per token, mean 2.0 of 4.0, token rule estimate"
    ]


def test_the_best_division_among_layers_is_chosen(llm, profile):
    """One layer's sizes far above all others, as a wrong sensitivity makes them: the plan is the best of three by KL."""
    raised = np.array([3.0, 0.0, 0.0, 0.0])
    wrong = profile.estimator
    log_norm = wrong.log_norm.copy()
    log_norm[:, :, -1] += raised[:, None]
    wrong = replace(wrong, log_norm=log_norm, quantiles=wrong.quantiles + raised[:, None].astype(np.float32))
    windows = np.random.default_rng(1).integers(3, 300, (2, 64)).astype(np.int32)
    text = CalibrationText(windows, windows, windows, windows, profile.calibration)
    found = choose.choose(llm, replace(profile, estimator=wrong), 8, FULL, text, "estimate")
    kl = {name: score.kl for name, score in found.scores.items() if "estimate" in name}
    assert len(set(kl.values())) == choose.N_ESTIMATES == 3
    assert found.profile.held_out.kl_plan == min(kl.values())
    assert found.profile.plan(8, FULL) == found.plan and found.plan.budget_total == 8
    counts = {name: plan.expert_used_count for name, (_, plan) in choose._estimates(found.profile, 8, FULL).items()}
    assert counts["token rule estimate, layers alike"] == (2, 2, 2, 2)


def test_the_two_best_are_told_apart_on_further_text(llm, profile):
    """By windows that they have not been compared on, and those that they have: on some text the second on these is the better one
    on all. Which text that is, rounding decides."""
    plans = {name: plan for name, (_, plan) in choose._estimates(profile, 8, FULL).items()}
    for seed in range(5, 25):
        windows = np.random.default_rng(seed).integers(3, 300, (4, 64)).astype(np.int32)
        text = CalibrationText(windows[:1], windows[:1], windows[:1], windows, profile.calibration)
        found = choose.choose(llm, profile, 8, FULL, text, "estimate")
        first, second = sorted((n for n in found.scores if "estimate" in n), key=lambda n: found.scores[n].kl)[:2]
        assert found.n_further == 3 * 64 and set(found.further) == {first, second, "full"}
        on_all = choose.scores(llm, FULL, {name: plans[name] for name in (first, second)}, windows)
        for name in (first, second):
            assert (found.scores[name].kl + 3 * found.further[name].kl) / 4 == pytest.approx(on_all[name].kl, rel=1e-9)
        best = min((first, second), key=lambda name: on_all[name].kl)
        assert found.plan == plans[best] == found.profile.plan(8, FULL)
        assert found.profile.held_out.n_tokens == 64
        if best == second:
            return
    raise AssertionError("the first is the better one on every text")


def test_plans_without_estimates_are_compared_once(llm, profile):
    """Where none is an estimate, what is best on held-out text is written, with its own profile."""
    windows = np.random.default_rng(5).integers(3, 300, (4, 64)).astype(np.int32)
    text = CalibrationText(windows[:1], windows[:1], windows[:1], windows, profile.calibration)
    found = choose.choose(llm, replace(profile, estimator=None), 8, FULL, text)
    best = min((n for n in found.scores if n != "full"), key=lambda n: found.scores[n].kl)
    assert not found.further and found.n_further == 0 and best.startswith(found.profile.allocation)
    assert found.profile.plan(8, FULL) == found.plan


def test_one_plan_under_two_names_is_run_once(llm, profile, monkeypatch):
    """Where layers are alike Alloc-L's plan is uniform k: its thresholds were calibrated twice, and it was compared twice."""
    runs = []
    run, calibrate = Reference.compare, thresholds.calibrate
    monkeypatch.setattr(Reference, "compare", lambda *args: runs.append("compared") or run(*args))
    monkeypatch.setattr(thresholds, "calibrate", lambda *args: runs.append("calibrated") or calibrate(*args))
    windows = np.random.default_rng(5).integers(3, 300, (1, 64)).astype(np.int32)
    text = CalibrationText(windows, windows, windows, windows, profile.calibration)
    alike = replace(profile, estimator=None, sensitivity=(np.array([2.0, 1.2, 1.05, 1.0]),) * 4)
    found = choose.choose(llm, alike, 8, FULL, text)
    assert found.plan.expert_used_count == (2, 2, 2, 2) and runs == ["calibrated"] + 2 * ["compared"]
    assert list(found.scores) == [
        "full", *(f"{name}, token rule {rule}" for name in ("alloc-l", "uniform") for rule in ("off", "threshold"))
    ]  # fmt: skip
    for rule in ("off", "threshold"):
        assert found.scores[f"alloc-l, token rule {rule}"] == found.scores[f"uniform, token rule {rule}"]


def test_how_far_a_perplexity_may_be_off_by_chance(llm):
    """The standard error of the mean of what the plan adds to each token's negative log-likelihood."""
    windows, plan = np.random.default_rng(5).integers(3, 300, (2, 64)).astype(np.int32), Plan.uniform(FULL, 8)
    found = choose.scores(llm, FULL, {"half": plan}, windows)
    added = np.subtract(*(_nll(llm, p, windows).ravel() for p in (plan, Plan.full(FULL))))
    assert found["half"].error == pytest.approx(added.std(ddof=1) / len(added) ** 0.5, rel=1e-9)
    assert np.log(found["half"].perplexity / found["full"].perplexity) == pytest.approx(added.mean(), rel=1e-9)
    assert (
        choose.scores(llm, FULL, {"half": plan}, windows[:1, :2])["half"].error == np.inf
    )  # of one token nothing is known


def _nll(llm, plan, windows) -> np.ndarray:
    llm.apply_plan(plan)
    return negative_log_likelihood(llm, windows)

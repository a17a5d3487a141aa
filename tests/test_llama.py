"""allocmoe_edge.Llama on the small real model: budgets, and everything that llama_cpp.Llama does."""

import inspect
import pickle
import sys
import warnings

from allocmoe_edge import GGUFError, Llama, Plan, PlanError
from allocmoe_edge.convert import output
from allocmoe_edge.gguf_file import GGUFFile
from allocmoe_edge.plan import metadata
from gguf_factory import plan_keys, write_gguf
import llama_cpp
import numpy as np
import pytest

MESSAGES = [{"role": "user", "content": "Name three colours."}]


@pytest.fixture(scope="module")
def llm(planned_path):
    return Llama(str(planned_path), n_ctx=512, logits_all=True, seed=1, verbose=False)


@pytest.fixture(autouse=True)
def stored_plan(request):
    """Every test starts from the plan in the file."""
    if "llm" in request.fixturenames:
        request.getfixturevalue("llm").set_budget(None)


def logits(llm, tokens):
    llm.reset()
    llm.eval(tokens)
    return llm.scores[: len(tokens)].copy()


def text(llm, **kwargs):
    return llm("The capital of France is", max_tokens=12, temperature=0.0, **kwargs)["choices"][0]["text"]


def test_plan_comes_from_the_file(llm, planned_path):
    assert llm.plan == metadata.read(planned_path).plan
    assert llm.plan.budget_total == 180
    assert len(set(llm.plan.expert_used_count)) > 1


def test_set_budget_plans_anew_from_stored_sensitivities(llm, planned_path):
    profile = metadata.read(planned_path).profile
    full = llm.plan.expert_used_count_full
    for budget, total in ((0.33, 119), (200, 200), ("75%", 270), (1.0, 360)):
        plan = llm.set_budget(budget)
        assert plan == llm.plan == profile.plan(budget, full)
        assert plan.budget_total == total
    assert llm.set_budget(None) == metadata.read(planned_path).plan


def test_budget_argument(planned_path):
    llm = Llama(str(planned_path), n_ctx=64, budget=0.25, verbose=False)
    assert llm.plan.budget_total == 90


@pytest.mark.parametrize("budget", [0.0, 1.5, -1, 29, 361, float("nan"), True, "half"])
def test_budget_out_of_range_is_refused(llm, budget):
    before = llm.plan
    with pytest.raises(PlanError, match="budget"):
        llm.set_budget(budget)
    assert llm.plan == before


def test_budget_without_sensitivities_is_refused(testbed_path):
    llm = Llama(str(testbed_path), n_ctx=64, verbose=False)
    assert llm.plan.budget == 1.0
    with pytest.raises(PlanError, match="allocmoe-convert"):
        llm.set_budget(0.5)
    assert llm.set_budget(1.0).budget == 1.0


@pytest.mark.parametrize(
    "arguments",
    [
        dict(token_rule="threshold"),
        dict(token_rule="batch"),
        dict(token_rule="no such rule"),
        dict(budget=1.0, token_rule="batch"),
        dict(strict=True),
        dict(token_rule="off", strict=True),
    ],
    ids=str,
)
def test_token_rule_without_a_profile_is_refused(testbed_path, arguments):
    """On a file that was never converted: an error that says what to do, where it used to be ignored."""
    llm = Llama(str(testbed_path), n_ctx=64, verbose=False)
    with pytest.raises(PlanError, match="allocmoe-convert"):
        llm.set_budget(**arguments)
    assert llm.plan == Plan.full([12] * 30)
    assert llm.set_budget(token_rule="off") == llm.set_budget(1.0, token_rule="off") == llm.plan
    if "strict" not in arguments:
        with pytest.raises(PlanError, match="allocmoe-convert"):
            Llama(str(testbed_path), n_ctx=64, verbose=False, **arguments)


def test_rule_of_a_plan_without_a_profile_can_only_be_taken_off(testbed_path, tmp_path):
    """A plan written by hand carries its rule; another one would have to be calibrated first."""
    plan = Plan([6] * 30, [12] * 30, token_rule="threshold", threshold=[0.5] * 30)
    path = tmp_path / "planned.gguf"
    output.write_planned(testbed_path, path, plan, None)
    llm = Llama(str(path), n_ctx=64, verbose=False)
    assert llm.plan == plan
    with pytest.raises(PlanError, match="allocmoe-convert"):
        llm.set_budget(token_rule="batch")
    assert llm.plan == plan
    assert llm.set_budget(token_rule="off") == Plan([6] * 30, [12] * 30)
    assert llm.set_budget() == plan


def test_rule_that_the_profile_cannot_give_is_refused(llm, planned_path):
    before = llm.plan
    for arguments, message in (
        (dict(token_rule="threshold"), "threshold table"),
        (dict(strict=True), "strict"),
        (dict(token_rule="batch", strict=True), "strict"),
        (dict(token_rule="no such rule"), "want one of: off, batch, threshold"),
    ):
        with pytest.raises(PlanError, match=message):
            llm.set_budget(**arguments)
        assert llm.plan == before


@pytest.mark.parametrize(
    "counts",
    [[6] * 29, [6] * 31, [0] * 30, [13] * 30, [6.0] * 30, [-1] * 30],
    ids=["short", "long", "0", "13", "6.0", "-1"],
)
def test_plan_that_does_not_fit_is_refused(llm, counts):
    before = llm.plan
    with pytest.raises(PlanError):
        llm.set_plan(counts)
    assert llm.plan == before


def test_full_plan_and_no_plan_are_bit_identical(llm):
    tokens = llm.tokenize(b"Bit for bit the same as without a plan, at prefill and at decode.")
    llm.set_plan(None)
    none = logits(llm, tokens)
    llm.set_plan(Plan.full(llm.plan.expert_used_count_full))
    full = logits(llm, tokens)
    assert np.array_equal(none, full)
    llm.set_plan([6] * 30)
    assert not np.allclose(logits(llm, tokens), none, atol=0.1)


def test_switching_plans_leaves_no_trace(llm):
    """The same plan gives the same bits whatever was set in between, and whichever way it was set."""
    tokens = llm.tokenize(b"Plans come and go on a live context.")
    first = logits(llm, tokens)
    llm.set_budget(0.2)
    logits(llm, tokens)
    llm.set_plan(None)
    logits(llm, tokens)
    llm.set_budget(None)
    assert np.array_equal(logits(llm, tokens), first)


def test_stored_plan_equals_the_same_plan_set_live(llm, testbed_path):
    tokens = llm.tokenize(b"From the file or by hand.")
    other = Llama(str(testbed_path), n_ctx=512, logits_all=True, verbose=False)
    other.set_plan(llm.plan)
    assert np.array_equal(logits(other, tokens), logits(llm, tokens))


def test_unchanged_plan_reuses_graphs(llm):
    def reused(set_plan):
        llm.reset()
        llm.eval([1, 2, 3])
        before = llama_cpp.llama_perf_context(llm.ctx).n_reused
        for _ in range(10):
            set_plan()
            llm.eval([5])
        return llama_cpp.llama_perf_context(llm.ctx).n_reused - before

    plan, other = llm.plan, Plan.uniform(llm.plan.expert_used_count_full, 100)
    alone = reused(lambda: None)
    assert alone >= 8
    assert reused(lambda: llm.set_plan(plan)) == alone
    plans = [plan, other] * 5
    # a changed plan starts a new context of graphs, so none of them is the last one again
    assert reused(lambda: llm.set_plan(plans.pop())) == 0


def test_plan_does_not_reload_the_model(llm):
    model = llama_cpp.llama_get_model(llm.ctx)
    llm.set_budget(0.3)
    assert llama_cpp.llama_get_model(llm.ctx) == model


def test_changed_plan_drops_the_cached_prompt(llm):
    """With the prompt's cache kept, the second answer would still depend on the first plan."""
    llm.set_budget(0.2)
    text(llm)
    llm.set_budget(1.0)
    after_switch = text(llm)
    llm.clear_cache()
    assert after_switch == text(llm)


def test_expert_stats_count_prompt_and_generated_tokens_apart(llm):
    llm.expert_stats(reset=True)
    llm.reset()
    llm.eval(list(range(10, 30)))
    for token in (5, 6, 7):
        llm.eval([token])
    stats = llm.expert_stats()
    counts = np.array(llm.plan.expert_used_count)
    assert stats["prefill"]["tokens"].tolist() == [20] * 30
    assert stats["decode"]["tokens"].tolist() == [3] * 30
    for phase in ("prefill", "decode"):
        assert stats[phase]["activations"].dtype == np.int64
        assert (stats[phase]["mean"] == counts).all()
    assert llm.expert_stats(reset=True)["decode"]["tokens"].sum() == 90
    assert llm.expert_stats()["decode"]["tokens"].sum() == 0


def test_last_layer_sees_only_tokens_that_are_needed(planned_path):
    llm = Llama(str(planned_path), n_ctx=64, verbose=False)
    llm.eval(list(range(10, 30)))
    assert llm.expert_stats()["prefill"]["tokens"].tolist() == [20] * 29 + [1]


def test_load_logs_one_line(planned_path, capfd):
    Llama(str(planned_path), n_ctx=64, verbose=True)
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("allocmoe: ")]
    assert lines == ["allocmoe: budget 0.50: 180 of 360 expert activations per token, mean 6.0 of 12.0, token rule off"]


# what llama_cpp.Llama does


def logger_runs(testbed_path, verbose) -> int:
    """How often llama_cpp's logger, which is Python code, ran while a model was loaded and evaluated."""
    logger, runs = llama_cpp._logger.__file__, []
    sys.setprofile(
        lambda frame, event, _: (
            event == "call" and frame.f_code.co_filename == logger and runs.append(frame.f_code.co_name)
        )
    )
    try:
        Llama(str(testbed_path), n_ctx=64, verbose=verbose).eval([1, 2, 3])
    finally:
        sys.setprofile(None)
    return runs.count("llama_log_callback")


def test_no_python_runs_inside_quiet_llama_cpp(testbed_path, capfd):
    """Ctrl-C in a callback is lost."""
    assert logger_runs(testbed_path, verbose=True) > 100
    capfd.readouterr()
    assert logger_runs(testbed_path, verbose=False) == 0
    assert capfd.readouterr() == ("", "")


def test_quiet_llama_cpp_prints_errors(testbed_path, capfd):
    llm = Llama(str(testbed_path), n_ctx=64, verbose=False)
    with pytest.raises(RuntimeError, match="llama_decode"):
        llm.eval([10**6])
    assert "invalid token" in capfd.readouterr().err


def test_logger_of_somebody_else_stays(testbed_path):
    lines = []
    theirs = llama_cpp.llama_log_callback(lambda level, text, data: lines.append(text))
    llama_cpp.llama_log_set(theirs, None)
    try:
        Llama(str(testbed_path), n_ctx=64, verbose=False)
    finally:
        llama_cpp.llama_log_set(llama_cpp._logger.llama_log_callback, None)
    assert len(lines) > 100


def test_signature_is_llama_cpps_and_ours():
    ours = inspect.signature(Llama.__init__).parameters
    theirs = inspect.signature(llama_cpp.Llama.__init__).parameters
    assert set(ours) - set(theirs) == {"budget", "token_rule", "plan_path", "n_cpu_moe", "repack", "prefetch"}
    assert set(theirs) <= set(ours)
    assert ours["budget"].default is None


def test_completion(llm):
    assert "Paris" in llm("The capital of France is", max_tokens=12, temperature=0.0)["choices"][0]["text"] or text(llm)
    llm.set_budget(1.0)
    assert "Paris" in text(llm)


def test_chat_streams(llm):
    llm.set_budget(1.0)
    llm.reset()  # the second call would find the prompt cached but for its last token: other rounding than in one batch
    whole = llm.create_chat_completion(MESSAGES, max_tokens=24, temperature=0.0)["choices"][0]["message"]["content"]
    llm.reset()
    chunks = llm.create_chat_completion(MESSAGES, max_tokens=24, temperature=0.0, stream=True)
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == whole
    assert len(whole) > 10


def test_grammar(llm):
    grammar = llama_cpp.LlamaGrammar.from_string('root ::= ("red" | "blue")', verbose=False)
    assert text(llm, grammar=grammar) in ("red", "blue")


def test_embeddings_depend_on_the_plan(planned_path):
    llm = Llama(
        str(planned_path), n_ctx=64, embedding=True, verbose=False, pooling_type=llama_cpp.LLAMA_POOLING_TYPE_MEAN
    )
    half = np.array(llm.embed("hello world"))
    llm.set_budget(1.0)
    full = np.array(llm.embed("hello world"))
    assert half.shape == full.shape == (llm.n_embd(),)
    assert np.isfinite(half).all() and not np.allclose(half, full)


def test_state_goes_on_where_it_was_saved(llm):
    tokens = llm.tokenize(b"A state is saved and loaded, and goes on")
    llm.reset()
    llm.eval(tokens)
    state = llm.save_state()
    llm.eval([42])
    expected = llm.scores[len(tokens)].copy()
    llm.reset()
    llm.eval(tokens[::-1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llm.load_state(state)
    llm.eval([42])
    # not bit for bit: the cache is restored from f16, in other cells than before
    np.testing.assert_allclose(llm.scores[len(tokens)], expected, atol=1e-3)


def test_state_of_another_plan_says_so(llm):
    llm.reset()
    llm.eval([1, 2, 3])
    state = llm.save_state()
    llm.set_budget(0.2)
    with pytest.warns(UserWarning, match="180 of 360.*72 of 360"):
        llm.load_state(pickle.loads(pickle.dumps(state)))


def test_pickling_keeps_the_plan(llm):
    llm.set_budget(0.4)
    copy = pickle.loads(pickle.dumps(llm))
    assert copy.plan == llm.plan
    assert text(copy) == text(llm)


def test_pickling_without_a_plan(testbed_path):
    llm = Llama(str(testbed_path), n_ctx=64, verbose=False)
    assert pickle.loads(pickle.dumps(llm)).plan == llm.plan


# what must never reach native code


def test_damaged_plan_is_refused_before_loading(tmp_path):
    with pytest.raises(PlanError, match="layer 2: found 99"):
        Llama(str(write_gguf(tmp_path / "m.gguf", keys=plan_keys((0, 2, 99)))))


def test_truncated_model_is_refused(testbed_path, tmp_path):
    with open(testbed_path, "rb") as file:
        (tmp_path / "cut.gguf").write_bytes(file.read(20_000_000))
    with pytest.raises(GGUFError, match="truncated"):
        Llama(str(tmp_path / "cut.gguf"))


def test_expert_count_override_caps_the_plan(planned_path):
    """--override-kv style: the model's own count becomes 4 in every layer, and the plan cannot go above it."""
    llm = Llama(str(planned_path), n_ctx=64, verbose=False, kv_overrides={"deepseek.expert_used_count": 4})
    assert set(llm.plan.expert_used_count_full) == {4}
    assert max(llm.plan.expert_used_count) <= 4
    assert llm.set_budget(0.5).budget_total == 60


def test_native_api_refuses_wrong_arguments(llm):
    from allocmoe_edge._native import context_pointer, ffi, libllama

    ctx = context_pointer(llm)
    before = llm.plan
    assert libllama.allocmoe_n_layer(ctx) == 30
    assert libllama.allocmoe_set_plan(ctx, [6] * 29, 29, ffi.NULL) == libllama.ALLOCMOE_ERR_N_LAYER
    assert libllama.allocmoe_set_plan(ctx, [-1] * 30, 30, ffi.NULL) == libllama.ALLOCMOE_ERR_K
    assert libllama.allocmoe_set_plan(ctx, [1000] * 30, 30, ffi.NULL) == libllama.ALLOCMOE_ERR_K
    out = ffi.new("int64_t[30]")
    assert libllama.allocmoe_get_counts(ctx, 7, out, out, 30) == libllama.ALLOCMOE_ERR_PHASE
    assert libllama.allocmoe_get_counts(ctx, 0, out, out, 29) == libllama.ALLOCMOE_ERR_N_LAYER
    assert llm.plan == before


def test_native_library_refuses_a_bad_plan_in_a_file(testbed_path, tmp_path):
    """Programs other than ours that link the library get an error from the loader, not an abort."""
    bad = tmp_path / "bad.gguf"
    with GGUFFile(testbed_path) as file:
        file.set("allocmoe.version", 1)
        file.set("allocmoe.expert_used_count", np.full(29, 6, np.int32))
        file.write_metadata(bad)
        with open(testbed_path, "rb") as data, open(bad, "ab") as copy:
            data.seek(file.data_offset)
            copy.write(data.read())
    with pytest.raises(ValueError, match="Failed to load model"):
        llama_cpp.Llama(str(bad), verbose=False)

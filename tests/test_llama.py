"""allocmoe_edge.Llama on the small real model: budgets, and everything that llama_cpp.Llama does."""

import copy
import inspect
import pickle
import sys
import warnings

from allocmoe_edge import GGUFError, Llama, Plan, PlanError
from allocmoe_edge.convert import output
from allocmoe_edge.gguf_file import GGUFFile
from allocmoe_edge.measure.cores import physical_cores
from allocmoe_edge.plan import metadata
from conftest import plan_from_made_up_profile
from gguf_factory import changed_keys, plan_keys, split_gguf, write_gguf
import llama_cpp
import numpy as np
import odd_models
import other_models
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
    with pytest.raises(PlanError, match="allocmoe-convert|want one of: off"):
        llm.set_budget(**arguments)
    assert llm.plan == Plan.full([12] * 30)
    assert llm.set_budget(token_rule="off") == llm.set_budget(1.0, token_rule="off") == llm.plan
    if "strict" not in arguments:
        with pytest.raises(PlanError, match="allocmoe-convert|want one of: off"):
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
    llm._batch.set_batch(batch=[10**6], n_past=0, logits_all=False)  # past our own check
    with pytest.raises(RuntimeError, match="llama_decode"):
        llm._ctx.decode(llm._batch)
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
    assert set(ours) - set(theirs) == {
        "budget",
        "token_rule",
        "plan_path",
        "n_cpu_moe",
        "repack",
        "prefetch",
        "expert_cache",
        "miss_price",
    }
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


def test_state_holds_what_is_needed(planned_path):
    """The memory of its tokens; no logits where none are kept, of which llama-cpp-python saves as many as there could be."""
    llm = Llama(planned_path, n_ctx=256, verbose=False)
    tokens = llm.tokenize(b"A state is saved and loaded, and goes on " * 4)
    expected = [token for token, _ in zip(llm.generate(tokens, temp=0.0), range(6))]
    llm.clear_cache()
    llm.eval(tokens)
    state = llm.save_state()
    assert len(pickle.dumps(state)) < state.llama_state_size + 20_000
    for other in (llm, llama_cpp.Llama(str(planned_path), n_ctx=256, flash_attn=True, verbose=False)):
        other.reset()
        other.load_state(state)
        assert [token for token, _ in zip(other.generate(tokens, temp=0.0), range(6))] == expected


def test_states_that_are_none(planned_path):
    """One error before anything has changed; and one that says why where the cache differs."""
    llm = Llama(planned_path, n_ctx=256, verbose=False)
    tokens = llm.tokenize(b"A state is saved and damaged")
    llm.eval(tokens)
    state = llm.save_state()
    damage = (
        {"input_ids": state.input_ids[:3]},
        {"n_tokens": -1},
        {"n_tokens": 10**6},
        {"scores": state.scores[:0]},
        {"llama_state_size": 7},
        {"scores": None},
        {"left": 1.0},
        {"left": np.zeros((1, len(tokens)), np.float32)},
        {"left": np.zeros(len(tokens), np.float32)},
    )
    for change in damage:
        damaged = copy.copy(state)
        vars(damaged).update(change)
        with pytest.raises(ValueError, match="load_state: found a LlamaState"):
            llm.load_state(damaged)
    with pytest.raises(ValueError, match="found a NoneType"):
        llm.load_state(None)
    assert llm.n_tokens == len(tokens)
    other = Llama(planned_path, n_ctx=256, flash_attn=False, verbose=False)
    with pytest.raises(RuntimeError, match="of a cache that differs"):
        other.load_state(state)
    llm.load_state(state)
    assert text(llm)


# 4, 33 and 38 are types that ggml has given up, 9 and 15 what it makes of a vector that it multiplies by quantised weights
@pytest.mark.parametrize(
    "option",
    [*({"type_k": n} for n in (4, 9, 15, 24, 33, 38)), {"type_v": 28}, {"type_v": 5}, {"type_v": 9}, {"flash_attn": "x"},
     {"flash_attn": 5}],
    ids=str,
)  # fmt: skip
def test_caches_that_there_are_not(planned_path, option):
    with pytest.raises(ValueError, match=next(iter(option))):
        Llama(planned_path, n_ctx=64, verbose=False, **option)


@pytest.mark.parametrize("name", ["olmoe", "llama4"])
def test_caches_that_heads_do_not_fit_into(built, name, capfd):
    """llama.cpp's own words stood on the terminal, and the error was "Failed to create llama_context"."""
    path = str(built[name].gguf_path)
    llm = Llama(path, n_ctx=64, verbose=False, type_k=8, flash_attn=False)  # which llama.cpp can
    if name == "llama4":  # heads of 32
        llm = Llama(path, n_ctx=64, verbose=False, type_k=8, type_v=8)
        wrong: list = [{"type_k": 12}]
    else:
        wrong = [{"type_k": 8}, {"type_v": 2}, {"type_k": 1, "type_v": 8}]
    llm.close()
    for types in [*wrong, {"type_v": 8, "flash_attn": False}, {"type_k": 12, "flash_attn": False}]:
        with pytest.raises(ValueError, match="^type_[kv]: found .*(blocks of|needs flash_attn)"):
            Llama(path, n_ctx=64, verbose=False, **types)
    assert capfd.readouterr().err == ""


def test_caches_of_heads_by_layer(built, tmp_path):
    """A file may say of each layer how many heads it has: 4 of 16 values."""
    path = built["olmoe"].gguf_path
    with GGUFFile(path) as file:
        assert file.get("olmoe.attention.key_length") is None
    by_layer = str(changed_keys(path, tmp_path / "m.gguf", {"olmoe.attention.head_count": [4] * 4}))
    Llama(by_layer, n_ctx=64, verbose=False).close()
    with pytest.raises(ValueError, match="^type_k: found 8, a type of blocks of 32 values, and a head of .* has 16"):
        Llama(by_layer, n_ctx=64, verbose=False, type_k=8)


@pytest.mark.parametrize("name", ["deepseek2", "deepseek4"])
@pytest.mark.parametrize("flash_attn", [True, False])
def test_caches_of_latent_attention(built, tmp_path, name, flash_attn):
    """Keys and values are of one tensor there."""
    path = built[name].gguf_path if name in built else odd_models.write_deepseek4(tmp_path / "m.gguf", 1)
    options = dict(n_ctx=64, verbose=False, flash_attn=flash_attn)
    Llama(str(path), **options, type_k=0, type_v=0).close()
    for types in ({"type_k": 0}, {"type_v": 0}, {"type_k": 0, "type_v": 30}):
        with pytest.raises(ValueError, match="^type_v: found .* has latent attention"):
            Llama(str(path), **options, **types)


def test_states_that_are_damaged_within(planned_path):
    """They are taken or an error, and what is generated next is what it was."""
    llm = Llama(planned_path, n_ctx=256, verbose=False)
    expected = text(llm)
    llm.clear_cache()
    tokens = llm.tokenize(b"A state is saved and damaged")
    llm.eval(tokens)
    state = llm.save_state()
    errors = set()
    for offset in range(0, 100, 4):  # its header, and the places of the first tokens
        damaged = copy.copy(state)
        content = bytearray(state.llama_state)
        content[offset : offset + 4] = (-7).to_bytes(4, "little", signed=True)
        damaged.llama_state = bytes(content)
        try:
            llm.load_state(damaged)
        except (RuntimeError, ValueError) as error:
            errors.add(type(error))
            assert llm.n_tokens == 0
            assert llm(tokens, max_tokens=1)["usage"]["completion_tokens"] == 1
        assert text(llm) == expected, offset
    assert errors == {RuntimeError, ValueError}


def test_state_of_another_plan_says_so(llm):
    llm.reset()
    llm.eval([1, 2, 3])
    state = llm.save_state()
    llm.set_budget(0.2)
    with pytest.warns(UserWarning, match="180 of 360.*72 of 360") as warned:
        llm.load_state(pickle.loads(pickle.dumps(state)))
    assert warned[0].filename == __file__  # it was of a line of ours: one line for all callers, shown once


def test_pickling_keeps_the_plan(llm):
    llm.set_budget(0.4)
    copy = pickle.loads(pickle.dumps(llm))
    assert copy.plan == llm.plan
    assert text(copy) == text(llm)


def test_pickling_without_a_plan(testbed_path):
    llm = Llama(str(testbed_path), n_ctx=64, verbose=False)
    assert pickle.loads(pickle.dumps(llm)).plan == llm.plan


# in the middle of a completion

CHANGES = {
    "lower": lambda llm: llm.set_budget(0.25),
    "the file's": lambda llm: llm.set_budget(None),
    "by hand": lambda llm: llm.set_plan([7] * 30),
    "full": lambda llm: llm.set_plan(None),
    "none": lambda llm: llm.set_budget(1.0),
}


def greedy(llm, tokens, n, change=None, at=None) -> list:
    """n tokens by evaluating them one by one, with another plan from the token after the at-th on."""
    llm.clear_cache()
    llm.eval(tokens)
    found = []
    while True:
        found.append(int(llm.scores[llm.n_tokens - 1].argmax()))
        if len(found) == n:
            return found
        if len(found) == at:
            llm.apply_plan(change)
        llm.eval(found[-1:])


@pytest.mark.parametrize("name", CHANGES)
def test_plan_that_changes_in_the_middle_of_a_stream(llm, name):
    """It takes effect with the next token, and the text goes on from what is cached."""
    tokens = llm.tokenize(b"The history of Rome begins with")
    CHANGES[name](llm)
    after = llm.plan
    llm.set_plan([9] * 30)
    expected = greedy(llm, tokens, 16, after, at=6)
    llm.set_plan([9] * 30)
    llm.clear_cache()
    chunks = llm.generate(tokens, temp=0.0)
    found = [next(chunks) for _ in range(6)]
    llm.expert_stats(reset=True)
    CHANGES[name](llm)
    found += [next(chunks) for _ in range(10)]
    assert found == expected
    stats = llm.expert_stats()
    assert stats["decode"]["tokens"].tolist() == [10] * 30 and not stats["prefill"]["tokens"].any()
    assert stats["decode"]["mean"].tolist() == list(after.expert_used_count)
    chunks.close()
    # what is cached is of two plans, and no part of what comes after
    again = [token for token, _ in zip(llm.generate(tokens, temp=0.0), range(16))]
    assert again == greedy(llm, tokens, 16)


def test_plan_that_changes_in_a_callback(llm):
    """A stopping criterion, say, that knows when a part of the text needs less."""
    tokens = llm.tokenize(b"The history of Rome begins with")
    llm.set_plan([9] * 30)
    expected = greedy(llm, tokens, 12, Plan([4] * 30, [12] * 30), at=5)
    calls = []

    def criterion(ids, logits):
        calls.append(1)
        if len(calls) == 5:
            llm.set_plan([4] * 30)
        return False

    llm.set_plan([9] * 30)
    llm.clear_cache()
    chunks = llm.generate(tokens, temp=0.0, stopping_criteria=llama_cpp.StoppingCriteriaList([criterion]))
    assert [next(chunks) for _ in range(12)] == expected


def test_refused_budget_in_the_middle_of_a_stream_changes_nothing(llm):
    tokens = llm.tokenize(b"The history of Rome begins with")
    expected = greedy(llm, tokens, 8)
    llm.clear_cache()
    chunks = llm.generate(tokens, temp=0.0)
    found = [next(chunks) for _ in range(4)]
    with pytest.raises(PlanError):
        llm.set_budget(7.5)
    assert found + [next(chunks) for _ in range(4)] == expected


def test_state_of_a_stream_with_two_plans_says_so(llm):
    llm.clear_cache()
    chunks = llm.generate(llm.tokenize(b"The history of Rome begins with"), temp=0.0)
    next(chunks)
    llm.set_budget(0.25)
    next(chunks)
    state = llm.save_state()
    chunks.close()
    with pytest.warns(UserWarning, match="saved while the plan changed, in force is .*90 of 360"):
        llm.load_state(state)


def test_cached_prompt_of_another_plan_is_none(llm):
    """It would be text of a plan that is no longer in force, and a warning."""
    cache = llama_cpp.LlamaRAMCache()
    prompt = "The history of Rome begins with"
    llm.set_cache(cache)
    try:
        first = text(llm)
        llm.set_budget(0.25)
        llm.clear_cache()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            other = text(llm)
            llm.set_cache(None)
            llm.clear_cache()
            assert text(llm) == other != first
            llm.set_cache(cache)
            llm(prompt, max_tokens=4, temperature=0.0)
            llm.clear_cache()
            llm.expert_stats(reset=True)
            llm(prompt, max_tokens=4, temperature=0.0)
        # of the same plan: the prompt is there, but for the token whose logits are needed
        assert llm.expert_stats()["prefill"]["tokens"].max() == 0
    finally:
        llm.set_cache(None)


def test_drafted_tokens_are_generated_ones(planned_path):
    """llama.cpp evaluates several of them at once, as it does with a prompt."""
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    llm = Llama(
        planned_path,
        n_ctx=256,
        verbose=False,
        draft_model=LlamaPromptLookupDecoding(max_ngram_size=2, num_pred_tokens=4),
    )
    tokens = llm.tokenize(b"one two three one two three one two three one two")
    found = [token for token, _ in zip(llm.generate(tokens, temp=0.0), range(24))]
    stats = llm.expert_stats()
    assert stats["prefill"]["tokens"].tolist() == [len(tokens)] * 29 + [1]
    assert (stats["decode"]["tokens"] >= len(found) - 1).all()
    for phase in ("prefill", "decode"):
        assert stats[phase]["mean"].tolist() == list(llm.plan.expert_used_count)
    llm.expert_stats(reset=True)
    assert not llm.expert_stats()["decode"]["tokens"].any() and not llm.expert_stats()["prefill"]["tokens"].any()


def test_a_prompt_in_pieces_has_the_numbers_of_one_at_once(llm):
    """Bit for bit, down to single tokens: so text from a prompt cache goes on as text that was just read."""
    if b"AVX2 = 1" not in llama_cpp.llama_print_system_info():
        pytest.skip("on this CPU products are rounded otherwise where there are many tokens")
    tokens = llm.tokenize(b"It was the best of times, it was the worst of times, and it was written down. " * 5)[:70]
    llm.clear_cache()
    whole = llm.decode(tokens, logits_all=True).copy()
    for n in (1, 33):
        llm.clear_cache()
        pieces = [llm.decode(tokens[i : i + n], i, logits_all=True).copy() for i in range(0, len(tokens), n)]
        assert np.array_equal(np.concatenate(pieces), whole)


# models without anything to budget


def test_model_without_experts(dense_path):
    """All that llama_cpp.Llama does, to the last bit; a budget is one clear error."""
    ours, stock = (
        Llama(dense_path, n_ctx=128, verbose=False, n_cpu_moe=3),
        llama_cpp.Llama(str(dense_path), n_ctx=128, flash_attn=True, verbose=False),
    )
    tokens = ours.tokenize(b"The capital of France")
    assert np.array_equal(ours.decode(tokens), stock_logits(stock, tokens))
    expected = text(stock)
    assert text(ours) == expected and len(expected) > 10
    assert ours.plan is None and ours.stored.full is None and ours.prefetch is False
    assert ours.expert_stats()["decode"]["tokens"].tolist() == [0] * 30
    state = ours.save_state()
    ours.set_plan(None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.load_state(state)
    assert text(pickle.loads(pickle.dumps(ours))) == expected
    for call in (
        lambda: ours.set_budget(0.5),
        lambda: ours.set_budget(1.0),
        lambda: ours.set_plan([1] * 30),
        ours.set_budget,
    ):
        with pytest.raises(PlanError, match="a dense model: it has no experts to budget"):
            call()


def stock_logits(llm, tokens):
    llm._batch.set_batch(tokens, 0, False)
    llm._ctx.decode(llm._batch)
    return np.ctypeslib.as_array(llm._ctx.get_logits(), (1, llm.n_vocab()))


@pytest.mark.parametrize("arguments", [dict(budget=0.5), dict(token_rule="batch"), dict(plan_path="plan")], ids=str)
def test_budget_where_there_is_none_to_have(dense_path, planned_path, arguments):
    """Refused before anything is loaded."""
    if "plan_path" in arguments:
        arguments = dict(plan_path=planned_path)
    with pytest.raises(PlanError, match="a dense model"):
        Llama(dense_path, n_ctx=64, verbose=False, **arguments)
    with pytest.raises(PlanError, match="vocab_only"):
        Llama(planned_path, vocab_only=True, verbose=False, **arguments)


def test_vocabulary_alone(planned_path, llm):
    """Of a file with a plan, which nobody wants to run."""
    vocabulary = Llama(planned_path, vocab_only=True, verbose=False)
    sentence = b"The quick brown fox"
    assert vocabulary.tokenize(sentence) == llm.tokenize(sentence)
    assert vocabulary.detokenize(vocabulary.tokenize(sentence)) == sentence
    assert vocabulary.plan is None and vocabulary.set_plan(None) is None
    with pytest.raises(PlanError, match="vocab_only"):
        vocabulary.set_budget(0.5)
    assert pickle.loads(pickle.dumps(vocabulary)).tokenize(sentence) == llm.tokenize(sentence)


@pytest.mark.parametrize("kind", ["mamba", "jamba"])
def test_recurrent_models(tmp_path, kind):
    """Their memory cannot forget the last tokens alone; the hybrid one has experts in a layer."""
    path = getattr(other_models, f"write_{kind}")(tmp_path / "m.gguf")
    llm = Llama(path, n_ctx=64, verbose=False)
    assert (llm.plan is None) == (kind == "mamba")
    tokens = llm.tokenize(b"Once upon")
    first = [token for token, _ in zip(llm.generate(tokens, temp=0.0), range(6))]
    assert [token for token, _ in zip(llm.generate(tokens, temp=0.0), range(6))] == first
    llm.eval(tokens)
    assert llm.rewind(4) is False
    if kind == "jamba":
        chunks = llm.generate(tokens, temp=0.0)
        next(chunks)
        llm.set_plan([0, 1])
        next(chunks)
        assert llm.plan == Plan([0, 1], [0, 2])


def test_model_without_layers(tmp_path):
    for expert_count in (0, 4):
        path = write_gguf(tmp_path / "m.gguf", n_layer=0, expert_count=expert_count)
        with pytest.raises(GGUFError, match="block_count is 0, wanted an integer from 1 to 512"):
            Llama(path)


def test_file_that_is_not_the_first_of_a_split_model(tmp_path, testbed_path):
    """It has no architecture of its own to complain of."""
    second = split_gguf(testbed_path, tmp_path / "m", 200)[1]
    with pytest.raises(GGUFError, match="file 2 of 2 of a split model: give the first one, m-00001-of-00002.gguf"):
        Llama(second)


def test_threads_are_the_physical_cores(llm, planned_path):
    assert (llm.n_threads, llm.n_threads_batch) == (physical_cores(),) * 2
    other = Llama(planned_path, n_ctx=64, n_threads=1, n_threads_batch=3, verbose=False)
    assert (other.n_threads, other.n_threads_batch) == (1, 3)


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


OVERRIDE = "deepseek.expert_used_count"


@pytest.mark.parametrize("value", [0, -1, 13, 2**40, 2.0, True, "4"])
def test_override_of_the_experts_per_token_that_does_not_fit(planned_path, dense_path, value):
    """On a file with a plan and on a dense one: native code ends the process, and prints nothing where it is quiet."""
    with pytest.raises(PlanError, match=f"kv_overrides: .*{OVERRIDE} is .*, wanted (0|1) to 12"):
        Llama(planned_path, n_ctx=64, verbose=False, kv_overrides={OVERRIDE: value})
    if value:
        with pytest.raises(
            PlanError, match="kv_overrides: .*llama.expert_used_count is .*, wanted an integer from 0 to 0"
        ):
            Llama(dense_path, n_ctx=64, verbose=False, kv_overrides={"llama.expert_used_count": value})


@pytest.mark.parametrize("name, value, want", [("expert_count", 6, "12"), ("block_count", 29, "30")])
def test_override_of_what_the_weights_are(planned_path, name, value, want):
    with pytest.raises(PlanError, match=f"kv_overrides: deepseek.{name} is {value}, want {want}"):
        Llama(planned_path, n_ctx=64, verbose=False, kv_overrides={f"deepseek.{name}": value})
    Llama(planned_path, n_ctx=64, verbose=False, kv_overrides={f"deepseek.{name}": int(want)})


def test_override_of_experts_per_layer(tmp_path):
    """llama.cpp passes over an override of an array; here it is refused."""
    path = write_gguf(tmp_path / "m.gguf", expert_used_count=None, keys=[(OVERRIDE, np.array([4, 4, 4], np.int32))])
    with pytest.raises(PlanError, match=f"{OVERRIDE} cannot be overridden"):
        Llama(path, kv_overrides={OVERRIDE: 2})


@pytest.fixture(scope="module")
def narrow_path(tmp_path_factory):
    """A model that uses 4 of its 8 experts, with a plan."""
    folder = tmp_path_factory.mktemp("narrow")
    return plan_from_made_up_profile(odd_models.write_grovemoe(folder / "model.gguf"), folder / "planned.gguf")


def test_override_that_goes_beyond_what_the_plan_was_made_for(narrow_path):
    """Only the full budget, and plans by hand; the file's plan does not beat the override unasked."""
    name = "grovemoe.expert_used_count"
    options = dict(n_ctx=64, verbose=False, kv_overrides={name: 6})
    for arguments in ({}, dict(budget=0.5), dict(token_rule="off"), dict(budget=12)):
        with pytest.raises(PlanError, match=f"kv_overrides: {name} is 6, above the 4 experts"):
            Llama(narrow_path, **options, **arguments)
    for budget in (1.0, 24, "100%"):
        llm = Llama(narrow_path, **options, budget=budget)
        assert llm.plan == Plan.full([6] * 4)
    for budget in (None, 0.5, 12):
        with pytest.raises(PlanError, match=f"kv_overrides: {name} is 6"):
            llm.set_budget(budget)
    assert llm.plan == Plan.full([6] * 4) == llm.set_budget(1.0)
    llm.set_plan([5, 6, 1, 2])
    llm.eval([1, 2, 3])
    assert llm.expert_stats()["prefill"]["mean"].tolist()[:3] == [5, 6, 1]
    assert pickle.loads(pickle.dumps(llm)).plan == llm.plan


def test_override_below_what_the_plan_was_made_for(narrow_path):
    llm = Llama(narrow_path, n_ctx=64, verbose=False, kv_overrides={"grovemoe.expert_used_count": 2})
    assert max(llm.plan.expert_used_count) <= 2 and llm.plan.budget_full == 8
    assert llm.set_budget(0.5).budget_total == 4 and llm.set_budget(1.0).budget_total == 8


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


@pytest.mark.parametrize(
    "key, value",
    [
        ("version", 1),
        ("expert_used_count", np.full(29, 6, np.int32)),
        ("expert_used_count", np.full(30, 13, np.int32)),
        ("expert_used_count_full", None),
        ("token_rule", "guess"),
        ("k_base", 0),
        ("table.expert_used_count", np.full(330, 6, np.uint8)),
        ("table.expert_used_count", np.full(331 * 30, 13, np.uint8)),
    ],
)
def test_native_library_refuses_a_bad_plan_in_a_file(planned_path, tmp_path, key, value):
    """Programs other than ours that link the library get an error from the loader, not an abort."""
    bad = tmp_path / "bad.gguf"
    with GGUFFile(planned_path) as file:
        file.set(f"allocmoe.{key}", value)
        file.write_metadata(bad)
        with open(planned_path, "rb") as data, open(bad, "ab") as copy:
            data.seek(file.data_offset)
            copy.write(data.read())
    with pytest.raises(ValueError, match="Failed to load model"):
        llama_cpp.Llama(str(bad), verbose=False)

"""budget= of a single completion: what it computes is of that budget, and what was in force before is so again afterwards.

On a tiny random model, whose texts differ at any two budgets."""

import copy
from dataclasses import replace
import gc
import itertools
from pathlib import Path
import pickle
import re
import textwrap
import threading

from allocmoe_edge import Llama, Plan, PlanError
from allocmoe_edge.convert import output
from allocmoe_edge.plan import metadata
from conftest import plan_from_made_up_profile
from gguf_factory import random_estimator
import llama_cpp
import numpy as np
import odd_models
import other_models
import pytest

PROMPT = "The history of Rome begins with"
MESSAGES = [{"role": "user", "content": "Name three colours."}]
OPTIONS = dict(max_tokens=12, temperature=0.0)
N_LAYER, FULL, PLANNED, LOW = 4, 16, 8, 6


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """4 layers, 4 of 8 experts."""
    return odd_models.write_qwen3moe(tmp_path_factory.mktemp("source") / "qwen3moe.gguf")


@pytest.fixture(scope="module", params=["off", "estimate"])
def path(request, source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("planned")
    model = metadata.read(plan_from_made_up_profile(source, folder / "made-up.gguf"))
    quantiles = np.sort(np.random.default_rng(3).standard_normal((N_LAYER, 65)), axis=1)
    profile = replace(
        model.profile,
        estimator=replace(random_estimator(N_LAYER, 8, 64, 6, 4, 7), quantiles=quantiles),
        threshold_table=tuple(np.linspace(0.5, 0.0, k, dtype=np.float32) for k in model.full),
        token_rule=request.param,
    )
    output.write_planned(source, folder / "planned.gguf", profile.plan(0.5, model.full), profile)
    return folder / "planned.gguf"


@pytest.fixture(scope="module")
def shared(path):
    return Llama(path, n_ctx=512, seed=1, verbose=False)


@pytest.fixture
def llm(shared):
    """Under the plan in the file, with nothing cached."""
    shared.set_budget(None)
    shared.set_cache(None)
    shared.clear_cache()
    shared.expert_stats(reset=True)
    return shared


def text(llm, prompt=PROMPT, **options) -> str:
    return llm(prompt, **OPTIONS, **options)["choices"][0]["text"]


def at(llm, budget, prompt=PROMPT) -> str:
    """What a model says that is set to a budget, from nothing; the plan in the file is in force afterwards."""
    llm.set_budget(budget)
    llm.clear_cache()
    found = text(llm, prompt)
    llm.set_budget(None)
    llm.clear_cache()
    return found


CALLS = {
    "call": lambda llm, **options: llm(PROMPT, **OPTIONS, **options),
    "create_completion": lambda llm, **options: llm.create_completion(PROMPT, **OPTIONS, **options),
    "chat": lambda llm, **options: llm.create_chat_completion(MESSAGES, **OPTIONS, **options),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_every_call_spends_its_budget(llm, name, stream):
    before = llm.plan
    for budget, total in ((0.375, LOW), ("75%", 12), (10, 10), ("full", FULL)):
        llm.expert_stats(reset=True)
        found = CALLS[name](llm, budget=budget, stream=stream)
        if stream:
            assert llm.plan == before  # nothing has been computed yet
            next(found)
            assert llm.plan.budget_total == total
            list(found)
        assert llm.plan == before
        if before.token_rule == "off":
            assert llm.expert_stats()["prefill"]["mean"].sum() == total
    llm.expert_stats(reset=True)
    CALLS[name](llm)
    if before.token_rule == "off":
        assert llm.expert_stats()["prefill"]["mean"].sum() == PLANNED


def test_the_page_of_budgets(path, tmp_path, monkeypatch, capsys):
    """The Python of docs/budget.md, as it stands there."""
    page = (Path(__file__).parent.parent / "docs" / "budget.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model-half.gguf").symlink_to(path)
    names: dict = {}
    for block in re.findall(r"^ *```python\n(.*?)^ *```", page, re.M | re.S):
        exec(textwrap.dedent(block), names)
    assert names["llm"].plan.expert_used_count == (2, 2, 2, 2)


def test_text_is_that_of_the_budget(llm):
    alone = {budget: at(llm, budget) for budget in (0.375, 1.0, None)}
    assert len({alone[0.375], alone[1.0]}) == 2
    assert llm.plan.token_rule != "off" or len(set(alone.values())) == 3
    for budget in (0.375, None, 1.0, 0.375, None):
        assert text(llm, budget=budget) == alone[budget]


def test_names(llm):
    for name, total in (("fast", 5), ("balanced", PLANNED), ("full", FULL), (" fast ", 5)):
        assert llm.set_budget(name).budget_total == total
        llm.set_budget(0.75)
        chunks = llm(PROMPT, budget=name, stream=True, **OPTIONS)
        next(chunks)
        assert llm.plan.budget_total == total
        chunks.close()
        assert llm.plan.budget_total == 12
    for wrong in ("fastest", "Full", "voll"):
        with pytest.raises(PlanError, match=f'found "{wrong}", want a number, or "fast", "balanced" or "full"'):
            llm.set_budget(wrong)


def test_name_in_the_constructor(path, source, tmp_path):
    assert Llama(path, n_ctx=64, budget="fast", verbose=False).plan.budget_total == 5
    # a file without plans
    assert Llama(source, n_ctx=64, budget="full", verbose=False).plan.budget_total == FULL
    for name in ("fast", "balanced"):
        with pytest.raises(PlanError, match="convert it first"):
            Llama(source, n_ctx=64, budget=name, verbose=False)
    with pytest.raises(PlanError, match="dense model"):
        Llama(other_models.write_dense(tmp_path / "dense.gguf"), n_ctx=64, budget="full", verbose=False)


def test_dense_model(tmp_path):
    llm = Llama(other_models.write_dense(tmp_path / "dense.gguf"), n_ctx=64, verbose=False)
    for budget in (0.5, "full"):
        with pytest.raises(PlanError, match="dense model"):
            llm(PROMPT, budget=budget, max_tokens=1)
    assert llm(PROMPT, max_tokens=1, budget=None)["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize("budget", [0.0, 1.5, -1, 3, 17, float("nan"), True, "half", "", [], 2, 10**30], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_refused(llm, name, budget):
    """At once, also of a stream."""
    before = llm.plan
    for stream in (False, True):
        with pytest.raises(PlanError, match="^(budget|.*: budget)"):
            CALLS[name](llm, budget=budget, stream=stream)
    assert llm.plan == before


# afterwards


def half_read(llm, n=3):
    chunks = llm(PROMPT, budget=0.375, stream=True, max_tokens=40, temperature=0.0)
    for _ in range(n):
        next(chunks)
    assert llm.plan.budget_total == LOW
    return chunks


ENDINGS = {
    "closed": lambda llm, chunks: chunks.close(),
    "reset()": lambda llm, chunks: llm.reset(),
    "eval()": lambda llm, chunks: llm.eval([5]),
    "another": lambda llm, chunks: llm("Another", max_tokens=2),
    "another with a budget": lambda llm, chunks: llm("Another", max_tokens=2, budget=0.75),
    "generate": lambda llm, chunks: next(llm.generate([5, 6, 7])),
    "load_state": lambda llm, chunks: llm.load_state(llm.save_state()),
}


@pytest.mark.filterwarnings("ignore:this state was saved")
@pytest.mark.parametrize("name", ENDINGS)
def test_stream_that_nobody_reads_on(llm, name):
    """However it ends; and nothing that happens to it later matters."""
    before, expected = llm.plan, at(llm, None)
    chunks = half_read(llm)
    ENDINGS[name](llm, chunks)
    assert llm.plan == before
    assert text(llm) == expected
    llm.set_budget(0.75)
    chunks.close()
    del chunks
    assert llm.plan.budget_total == 12


def test_stream_that_is_dropped(llm):
    before = llm.plan
    chunks = half_read(llm)
    del chunks
    gc.collect()
    assert llm.plan == before


def test_stream_after_its_text_has_ended(llm):
    """The last part of a stream comes when all is computed."""
    before = llm.plan
    chunks = llm(PROMPT, budget=0.375, stream=True, max_tokens=2, temperature=0.0)
    read = []
    for chunk in chunks:
        read.append(chunk)
        if chunk["choices"][0]["finish_reason"]:
            break
    llm.eval([5])
    assert llm.plan == before and list(chunks) == []


def failing(*args):
    raise KeyError("a user's own error")


def test_errors_in_the_middle(llm):
    before = llm.plan
    criteria = llama_cpp.StoppingCriteriaList([failing])
    for stream in (False, True):
        with pytest.raises(KeyError):
            list(llm(PROMPT, budget=0.375, stopping_criteria=criteria, stream=stream, **OPTIONS))
        assert llm.plan == before
    with pytest.raises(ValueError, match="exceed context window"):
        llm("x " * 2000, budget=0.375)
    with pytest.raises(ValueError, match="grammar"):
        llm.create_chat_completion(MESSAGES, budget=0.375, grammar="root ::= root")
    assert llm.plan == before and text(llm) == at(llm, None)


PLANS = {
    "by hand": lambda llm: llm.set_plan([3] * 4),
    "a rule by hand": lambda llm: llm.set_plan(Plan([3] * 4, [4] * 4, "batch", 2)),
    "none": lambda llm: llm.set_plan(None),
    "a budget": lambda llm: llm.set_budget(0.625),
    "another rule": lambda llm: llm.set_budget(0.625, token_rule="threshold", strict=True),
    "the file's": lambda llm: llm.set_budget(None),
}


@pytest.mark.parametrize("name", PLANS)
def test_whatever_was_in_force_is_so_again(llm, name):
    PLANS[name](llm)
    before, expected = llm.plan, text(llm)
    text(llm, budget=0.375)
    chunks = half_read(llm)
    another = pickle.loads(pickle.dumps(llm))  # of what lasts
    chunks.close()
    assert llm.plan == before and text(llm) == expected
    assert another.plan == before
    another.close()


@pytest.mark.parametrize("name", [*PLANS, "the constructor's"])
def test_copy_goes_on_as_the_model_does(path, name):
    """Also at budgets of requests, whose rule is that of the last budget, and the file's after a plan by hand."""
    asked = {"budget": 0.625, "token_rule": "threshold"} if name == "the constructor's" else {}
    llm = Llama(path, n_ctx=512, seed=1, verbose=False, **asked)
    PLANS.get(name, lambda llm: None)(llm)
    another = pickle.loads(pickle.dumps(llm))
    for each in (another, copy.copy(another)):
        for budget in (None, 0.375, "full", None):
            found = [during(x, budget) for x in (llm, each)]
            assert found[0] == found[1]
        each.close()
    llm.close()


def test_copy_of_a_model_whose_budget_was_overridden(path):
    """That is in force until a budget is set, which the file's plan is not."""
    llm = Llama(path, n_ctx=64, verbose=False, kv_overrides={"allocmoe.budget_total": 12})
    for total, then in ((12, 10), (10, None), (PLANNED, None)):
        assert llm.plan.budget_total == total
        another = pickle.loads(pickle.dumps(llm))
        assert another.plan == llm.plan
        another.close()
        llm.set_budget(then)
    llm.close()


def during(llm, budget):
    """The plan of a request at this budget, and its text."""
    chunks = llm(PROMPT, budget=budget, stream=True, **OPTIONS)
    parts = [next(chunks)]
    plan = llm.plan
    return plan, "".join(part["choices"][0]["text"] for part in [*parts, *chunks])


def test_estimator_by_hand(llm):
    if llm.plan.token_rule != "estimate":
        pytest.skip("of the rule that has one")
    other = random_estimator(N_LAYER, 8, 64, 6, 4, 3)
    llm.set_plan(Plan([2] * 4, [4] * 4, "estimate", 1, [0.1] * 4, estimator=other))
    expected = text(llm)
    between = text(llm, budget=0.375)
    assert text(llm) == expected
    assert between == at(llm, 0.375)


def test_budget_that_is_set_meanwhile(llm):
    """It takes the place of the request's, and stays."""
    chunks = half_read(llm)
    llm.set_budget(0.75)
    assert llm.plan.budget_total == 12
    list(chunks)
    assert llm.plan.budget_total == 12
    chunks = half_read(llm)
    llm.set_plan([1] * 4)
    chunks.close()
    assert llm.plan.expert_used_count == (1,) * 4
    assert text(llm) == text(llm, budget=None)


# cached text


def prefilled(llm) -> int:
    return int(llm.expert_stats(reset=True)["prefill"]["tokens"].max())


def test_cached_text_is_of_the_same_budget(llm):
    n = len(llm.tokenize(PROMPT.encode(), add_bos=False))
    text(llm, budget=0.375)
    assert prefilled(llm) == n
    text(llm, budget=LOW)
    assert prefilled(llm) <= 1  # all but the token whose logits are needed
    text(llm, budget=0.5)
    assert prefilled(llm) == n
    text(llm)
    assert prefilled(llm) <= 1  # half is what the file has
    text(llm, budget="full")
    assert prefilled(llm) == n


def test_text_goes_on_the_same(llm):
    """A chat, message by message at a budget of its own: what a strict rule has left over is there again."""
    more = PROMPT + " a story of two brothers, and it ends with"
    llm.set_budget(0.375)
    llm.clear_cache()
    text(llm)
    expected, state = text(llm, more), llm.save_state()
    llm.set_budget(None)
    llm.clear_cache()
    text(llm, budget=0.375)
    llm.expert_stats(reset=True)
    assert text(llm, more, budget=0.375) == expected
    assert prefilled(llm) < len(llm.tokenize(more.encode()))
    again = llm.save_state()
    assert again.plan == state.plan
    if state.plan.strict:
        assert state.left.any() and np.array_equal(again.left, state.left)
    else:
        assert again.left is None


def test_state_names_its_plan(llm):
    text(llm, budget=0.375)
    state = llm.save_state()
    assert state.plan.budget_total == LOW and not state.mixed
    with pytest.warns(UserWarning, match="6 of 16"):
        llm.load_state(state)
    before = llm.plan
    expected = at(llm, None)
    with pytest.warns(UserWarning, match="6 of 16"):
        llm.load_state(state)
    assert text(llm) == expected and llm.plan == before
    # and is of use to a request with that budget
    with pytest.warns(UserWarning, match="6 of 16"):
        llm.load_state(state)
    llm.expert_stats(reset=True)
    text(llm, budget=0.375)
    assert prefilled(llm) <= 1


def test_caches_of_prompts(llm):
    alone = {budget: at(llm, budget) for budget in (0.375, None)}
    llm.set_cache(llama_cpp.LlamaRAMCache())
    for _ in range(2):
        for budget in (0.375, None):
            llm.clear_cache()
            assert text(llm, budget=budget) == alone[budget]


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf, 1e30, -1e30])
def test_state_of_which_more_is_left_over_than_can_be(llm, number):
    """As in a damaged file. It was taken, and a strict plan no longer held its budget, whatever text came."""
    llm.set_budget(0.375, token_rule="threshold", strict=True)
    llm.clear_cache()
    expected, state = text(llm), llm.save_state()
    damaged = copy.copy(state)
    damaged.left = state.left.copy()
    damaged.left[1, 3] = number
    with pytest.raises(ValueError, match="^load_state: the state is damaged: more is left over"):
        llm.load_state(damaged)
    now = llm.save_state()
    assert now.n_tokens == state.n_tokens and np.array_equal(now.left, state.left)
    llm.load_state(state)
    assert text(llm) == expected


def test_a_cache_of_other_models(llm, path, tmp_path):
    """Another model's entries, and those of another context, are none: the one's were taken, and the others ended the completion."""
    expected = text(llm)
    folder = str(tmp_path / "cache")
    with open(path, "rb") as file:
        weights = bytearray(file.read())
    for i in range(len(weights) - 40_000, len(weights), 100):
        weights[i] ^= 1  # of single weights the last bits
    (tmp_path / "other.gguf").write_bytes(weights)
    for model, n_ctx, more in (
        (tmp_path / "other.gguf", 512, {}),
        (path, 768, {}),
        (path, 512, dict(rope_freq_base=500.0)),
        (path, 512, dict(kv_overrides={"qwen3moe.attention.layer_norm_rms_epsilon": 0.5})),
        (path, 512, dict(type_k=llama_cpp.GGML_TYPE_Q8_0, type_v=llama_cpp.GGML_TYPE_Q8_0)),
    ):
        other = Llama(model, n_ctx=n_ctx, seed=1, verbose=False, **more)
        own = text(other)
        for each, wanted in ((llm, expected), (other, own), (llm, expected)):
            each.set_cache(llama_cpp.LlamaDiskCache(folder))
            each.clear_cache()
            assert text(each) == wanted
        state = other.save_state()
        with pytest.raises((RuntimeError, ValueError), match="load_state: "):
            llm.load_state(state)
        other.close()
    for file in Path(folder).rglob("*.val"):
        file.write_bytes(b"damaged")
    llm.clear_cache()
    assert text(llm) == expected
    llm.set_cache(None)


def test_the_models_file_may_go(path, tmp_path):
    """What a state is of is known from when the model was loaded."""
    file = tmp_path / "m.gguf"
    file.write_bytes(Path(path).read_bytes())
    first, second = (Llama(file, n_ctx=64, seed=1, verbose=False) for _ in range(2))
    file.unlink()
    first.eval([5, 6, 7])
    second.load_state(first.save_state())
    assert second.n_tokens == 3
    first.close(), second.close()


def test_a_cache_of_another_models_cache(llm, path):
    other = Llama(path, n_ctx=512, seed=1, verbose=False)
    other.set_cache(llama_cpp.LlamaRAMCache())
    expected = text(other)
    llm.set_cache(other.cache)
    other.close()
    del other
    assert text(llm) == expected
    llm.set_cache(None)


def test_a_cache_that_several_threads_use(path):
    llms = [Llama(path, n_ctx=256, seed=1, verbose=False) for _ in range(3)]
    cache, failed = llama_cpp.LlamaRAMCache(), []

    def work(llm, name):
        try:
            for i in range(25):
                llm(f"{name} {i % 5}", max_tokens=1)
        except Exception as error:  # kept for the test's thread
            failed.append(error)

    for llm in llms:
        llm.set_cache(cache)
    threads = [threading.Thread(target=work, args=(llm, name)) for llm, name in zip(llms, "abc")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    for llm in llms:
        llm.close()


def test_from_another_folder(path, tmp_path, monkeypatch):
    """Names that are relative are those of the folder in which the model was loaded."""
    monkeypatch.chdir(Path(path).parent)
    llm = Llama(Path(path).name, n_ctx=64, verbose=False)
    monkeypatch.chdir(tmp_path)
    assert llm.stored.profile is not None
    llm.load_state(llm.save_state())
    assert llm.budget_total(None) == PLANNED and llm.budget_total("full") == FULL
    llm.close()


def test_the_cache_that_was_set(llm):
    """`llm.cache` can be used as the one that was set; an assignment to it was lost, and a copy never ended."""
    own = llama_cpp.LlamaRAMCache()
    llm.set_cache(own)
    text(llm)
    assert isinstance(llm.cache, llama_cpp.llama_cache.BaseLlamaCache)
    assert llm.cache.cache_size == own.cache_size > 0
    llm.cache.capacity_bytes = 5
    assert own.capacity_bytes == 5 and copy.copy(llm.cache).capacity_bytes == 5
    llm.set_cache(None)
    assert llm.cache is None


def test_state_of_which_much_is_left_over(llm):
    """A text for which thresholds find little to run; what was above 400 became 0, though it may be more by thresholds."""
    plan = replace(llm.set_budget(0.5, token_rule="threshold", strict=True), threshold=[9.0] * llm.plan.n_layer)
    llm.set_plan(plan)
    llm.clear_cache()
    for _ in range(8):
        llm.eval([5] * 60)
    state = llm.save_state()
    assert state.left.max() > 400
    llm.eval([7])
    expected = llm.save_state().left
    for _ in range(2):
        llm.clear_cache()
        llm.load_state(state)
        assert np.array_equal(llm.save_state().left, state.left)
        llm.eval([7])
        assert np.array_equal(llm.save_state().left, expected)


CACHES = {
    "memory": lambda folder: llama_cpp.LlamaRAMCache(),
    "disk": lambda folder: llama_cpp.LlamaDiskCache(str(folder)),
}


@pytest.mark.parametrize("kind", CACHES)
def test_caches_of_prompts_at_two_budgets(llm, kind, tmp_path):
    """Both budgets find their own text: neither hides the other's, nor removes it."""
    budgets = (0.375, 0.5)
    alone = {budget: at(llm, budget) for budget in budgets}
    n = len(llm.tokenize(PROMPT.encode(), add_bos=False))
    llm.set_cache(CACHES[kind](tmp_path))
    llm.expert_stats(reset=True)
    for i in range(3):
        for budget in budgets:
            llm.clear_cache()
            assert text(llm, budget=budget) == alone[budget]
            assert prefilled(llm) == n if i == 0 else prefilled(llm) <= 1


@pytest.mark.parametrize("kind", CACHES)
def test_entries_of_another_plan_are_none(llm, kind, tmp_path):
    """And stay: a look under one plan leaves them as they are, and finds the longest beginning under its own."""
    llm.set_cache(CACHES[kind](tmp_path))
    begin, longer = [5, 6, 7], [5, 6, 7, 8]

    def store(tokens):
        llm.clear_cache()
        llm.eval(tokens)
        llm.cache[tokens] = llm.save_state()

    llm.set_budget(0.375)
    store(begin)
    llm.set_budget(0.75)
    assert longer not in llm.cache
    with pytest.raises(KeyError):
        llm.cache[longer]
    store(longer)
    store(begin)
    assert longer in llm.cache and llm.cache[longer].n_tokens == 4
    assert [9, *longer] not in llm.cache  # with nothing in common
    llm.set_budget(0.375)
    assert longer in llm.cache and llm.cache[longer].n_tokens == 3


def test_text_of_two_plans_is_not_kept(llm):
    """It is of no use to anyone."""
    llm.set_cache(llama_cpp.LlamaRAMCache())
    chunks = llm(PROMPT, stream=True, **OPTIONS)
    next(chunks)
    llm.set_budget(0.75)
    list(chunks)
    assert not llm.cache.cache_state


# several at once


def test_threads(llm):
    budgets = [0.375, 1.0, None, 0.75]
    alone = {budget: at(llm, budget) for budget in budgets}
    before, wrong = llm.plan, []

    def work(budget):
        for _ in range(3):
            if text(llm, budget=budget) != alone[budget]:
                wrong.append(budget)

    threads = [threading.Thread(target=work, args=(budget,)) for budget in budgets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and llm.plan == before


def test_chat_format_that_calls_functions(llm):
    """It begins further completions while its answer is being read."""
    tools = [{"type": "function", "function": {"name": "colour", "parameters": {"type": "object", "properties": {}}}}]
    before, llm.chat_format = llm.chat_format, "chatml-function-calling"
    in_force = llm.plan
    try:
        for stream in (False, True):
            llm.clear_cache()
            llm.expert_stats(reset=True)
            found = llm.create_chat_completion(MESSAGES, tools=tools, budget=0.375, stream=stream, **OPTIONS)
            if stream:
                list(itertools.islice(found, 100))
            spent = llm.expert_stats()
            assert llm.plan == in_force
            if in_force.token_rule == "off":
                for phase in ("prefill", "decode"):
                    assert spent[phase]["mean"].sum() in (0, LOW)
                assert np.sum(spent["prefill"]["tokens"]) > 0
    finally:
        llm.chat_format = before

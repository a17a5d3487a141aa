"""Drafts: the text is that of plain decoding, whoever proposes, and as if nobody had."""

from __future__ import annotations

from collections import Counter
import itertools
import pickle

from allocmoe_edge import DraftModel, GenerationError, Llama, PlanError
from allocmoe_edge.second_context import SecondContext
from conftest import plan_from_made_up_profile, put_picture
import llama_cpp
from llama_cpp.llama_speculative import LlamaDraftModel, LlamaPromptLookupDecoding
import numpy as np
import odd_models
import other_models
import pytest

SIZES = dict(n_ctx=256, n_batch=32, flash_attn=True, n_threads=1, verbose=False)
PROMPT = b"the quick brown fox jumps over the lazy dog "


@pytest.fixture(scope="module")
def path(tiny_planned):
    return tiny_planned


@pytest.fixture(scope="module")
def plain(path):
    return Llama(path, **SIZES)


def tokens(llm, n=60, prompt=PROMPT, **options) -> list:
    return list(itertools.islice(llm.generate(llm.tokenize(prompt), **{"temp": 0.0, **options}), n))


class Recorded(LlamaDraftModel):
    """Proposes what the model is known to go on with, each token spoilt with some probability."""

    def __init__(self, text, acceptance=1.0, n=16):
        self.text, self.acceptance, self.n = np.asarray(text, np.intc), acceptance, n
        self.rng, self.seen = np.random.default_rng(0), []

    def __call__(self, input_ids, /, **kwargs):
        self.seen.append(len(input_ids))
        proposed = self.text[len(input_ids) :][: self.n].copy()
        spoilt = self.rng.random(len(proposed)) >= self.acceptance
        proposed[spoilt] ^= 1
        return proposed


def recorded(llm, acceptance=1.0, n_tokens=200) -> Recorded:
    return Recorded(llm.tokenize(PROMPT) + tokens(llm, n_tokens), acceptance)


# float32 weights, and flash attention: tokens that are evaluated together are computed as alone, to the last bits of a float
DRAFTS = {
    "half": lambda path, plain: DraftModel.same(budget=0.5, n_draft=3),
    "full": lambda path, plain: DraftModel.same(budget=1.0, n_draft=4),
    "adaptive": lambda path, plain: DraftModel.same(budget=0.5),
    "file": lambda path, plain: DraftModel(path, budget=0.25, n_draft=2, n_threads=1),
    "lookup": lambda path, plain: DraftModel(LlamaPromptLookupDecoding(), n_draft=5),
    "recorded": lambda path, plain: DraftModel(recorded(plain, 0.7)),
    "llama-cpp-python's": lambda path, plain: LlamaPromptLookupDecoding(num_pred_tokens=3),
}


@pytest.mark.parametrize("name", DRAFTS)
def test_the_text_is_that_of_plain_decoding(path, plain, name):
    llm = Llama(path, **SIZES, draft_model=DRAFTS[name](path, plain))
    expected = tokens(plain)
    assert tokens(llm) == expected
    # the next one goes on from the same prompt, after a text that was not read to its end
    assert tokens(llm, 40) == expected[:40]
    assert llm.n_tokens == len(llm.tokenize(PROMPT)) + 39
    for seed in (1, 2):
        for each in (plain, llm):
            each.set_seed(seed)
        assert tokens(llm, 30, temp=1.0) == tokens(plain, 30, temp=1.0) != expected[:30]
    if isinstance(llm.draft_model, DraftModel) and llm.draft_model._n_draft:
        found = llm.draft_stats()
        assert found["proposed"] > found["accepted"] > 0
        assert 1 < found["tokens_per_step"] == found["tokens"] / found["steps"]
        assert found["acceptance"] == found["accepted"] / found["proposed"]
        assert sum(found["lengths"].values()) >= found["steps"]
        assert found["seconds"]["verification"] > 0 and found["seconds"]["drafting"] > 0
        assert set(found["seconds_of_verification"]) <= set(range(1, 18))
        assert llm.draft_stats(reset=True) == found and llm.draft_stats()["tokens"] == 0


@pytest.mark.slow
def test_distribution_of_sampled_text(path, plain):
    """Two samples of pairs of tokens, with other seeds: chi-square of their counts."""
    llm = Llama(path, **SIZES, draft_model=DraftModel.same(budget=0.25, n_draft=2))
    counts = [Counter(), Counter()]
    n_texts = 400
    for i, each in enumerate((plain, llm)):
        for text in range(n_texts):
            each.set_seed(1000 + 10_000 * i + text)
            counts[i][tuple(tokens(each, 5, temp=0.7, top_k=3)[1:3])] += 1
    assert llm.draft_stats()["accepted"] > 100  # else the test would say nothing
    pairs = [pair for pair in counts[0] | counts[1] if counts[0][pair] + counts[1][pair] >= 10]
    table = np.array([[count[pair] for pair in pairs] for count in counts], float)
    table = np.hstack([table, n_texts - table.sum(1, keepdims=True)])
    table = table[:, table.sum(0) > 0]
    expected = table.sum(0) / 2
    chi_square, freedom = ((table - expected) ** 2 / expected).sum(), table.shape[1] - 1
    assert freedom >= 4
    # mean and standard deviation of the distribution; beyond 4 of them once in some 10,000 runs, and seeds are fixed
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom)


def test_the_draft_reads_what_is_new(path, plain):
    """Its cache is kept in step with the text, over steps and from text to text."""
    llm = Llama(path, **SIZES, draft_model=DraftModel.same(budget=0.5, n_draft=4))
    follower = llm.draft_model._proposer._follower
    read, decode = [], follower.decode
    follower.decode = lambda new, n_past: read.append((n_past, len(new))) or decode(new, n_past)
    prompt = len(llm.tokenize(PROMPT))
    tokens(llm, 21)
    # the first token comes of the prompt alone; then the draft is right every time, and has not read its own last token
    assert read[:5] == [(0, prompt + 1), *((prompt + 1 + i, 1) for i in range(3)), (prompt + 4, 2)]
    assert sum(n for _, n in read) == prompt + 20 - 1
    read.clear()
    tokens(llm, 3, prompt=PROMPT + b"and ")
    assert read[0][0] >= prompt - 1


def test_texts_longer_than_a_batch(path, plain):
    """llama-cpp-python has no place for the logits of drafted tokens after as many as a batch."""
    expected = tokens(plain, 1000)  # up to the end of the context
    for draft in (LlamaPromptLookupDecoding(num_pred_tokens=4), recorded(plain, n_tokens=1000)):
        draft.n = 100
        llm = Llama(path, **SIZES, draft_model=draft)
        assert tokens(llm, 1000) == expected and llm.n_tokens == llm.n_ctx()


def test_prompts_need_no_logits(path, plain):
    """Only the last token's are computed, as without a draft model: with those of all, prompts would take longer."""
    llm = Llama(path, **SIZES, draft_model=recorded(plain))
    prompt = llm.tokenize(PROMPT)
    next(llm.generate(prompt, temp=0.0))
    assert llm.expert_stats()["prefill"]["tokens"][-1] == 1 < len(prompt)
    with pytest.raises(ValueError, match="logits_all"):
        llm(PROMPT.decode(), logprobs=2)
    llm = Llama(path, **SIZES, draft_model=recorded(plain), logits_all=True)
    found = llm(PROMPT.decode(), max_tokens=8, temperature=0.0, logprobs=2)["choices"][0]["logprobs"]
    plain_one = Llama(path, **SIZES, logits_all=True)
    wanted = plain_one(PROMPT.decode(), max_tokens=8, temperature=0.0, logprobs=2)["choices"][0]["logprobs"]
    assert found["tokens"] == wanted["tokens"]
    assert np.allclose(found["token_logprobs"], wanted["token_logprobs"], atol=1e-3)  # the cache is float16


def test_callbacks_see_the_text_alone(path, plain):
    """Not what is proposed after it, which llama-cpp-python shows to logits processors."""
    seen = []

    def processor(input_ids, logits):
        seen.append(input_ids.tolist())
        return logits

    llm = Llama(path, **SIZES, draft_model=recorded(plain))
    text = llm.tokenize(PROMPT) + tokens(plain, 30)
    tokens(llm, 30, logits_processor=llama_cpp.LogitsProcessorList([processor]))
    assert seen == [text[:n] for n in range(len(text) - 30, len(text))]
    seen.clear()
    stop = llama_cpp.StoppingCriteriaList([lambda input_ids, logits: seen.append(input_ids.tolist()) or len(seen) == 9])
    assert tokens(llm, 30, stopping_criteria=stop) == tokens(plain, 8)
    assert seen == [text[: len(text) - 30 + n] for n in range(9)]


def with_pictures(llm, n=30, seed=0) -> list:
    """Tokens after a prompt of text, picture, text, picture, text."""
    llm.reset()
    llm._ctx.kv_cache_clear()
    for part in (b"the quick ", b"brown fox ", b"jumps over "):
        if llm.n_tokens:
            put_picture(llm, seed=seed)
        llm.eval(llm.tokenize(part, add_bos=not llm.n_tokens))
    return list(itertools.islice(llm.generate(llm.input_ids[: llm.n_tokens].tolist(), temp=0.0), n))


@pytest.mark.parametrize("n_draft", [3, None])
def test_a_draft_needs_no_pictures(path, plain, n_draft):
    """It sees the text alone; what the model says of text and pictures is the same."""
    llm = Llama(path, **SIZES, draft_model=DraftModel.same(budget=0.5, n_draft=n_draft))
    assert with_pictures(llm) == with_pictures(plain) != with_pictures(plain, seed=1)
    text = sum(
        (llm.tokenize(part, add_bos=not i) for i, part in enumerate((b"the quick ", b"brown fox ", b"jumps over "))), []
    )
    if n_draft:
        assert llm.draft_stats()["proposed"] > 0
        assert llm.draft_model._proposer._cached[: len(text)] == text
    # a text without any comes after it
    assert tokens(llm, 20) == tokens(plain, 20)
    assert llm.draft_model._proposer._cached[: len(llm.tokenize(PROMPT))] == llm.tokenize(PROMPT) or not n_draft


def test_budgets_change_while_a_draft_proposes(path, plain):
    llm = Llama(path, **SIZES, draft_model=DraftModel.same(budget=0.25, n_draft=3))
    for budget in (1.0, 0.4, None):
        for each in (llm, plain):
            each.set_budget(budget)
        assert tokens(llm, 30) == tokens(plain, 30)
    assert llm(PROMPT.decode(), max_tokens=8, temperature=0.0, budget=0.7) is not None


CHANGES = {
    "budget": lambda llm: llm.set_budget(0.4),
    "full": lambda llm: llm.set_budget(1.0),
    "rule": lambda llm: llm.set_budget(0.4, token_rule="batch"),
    "by hand": lambda llm: llm.set_plan([1] * len(llm.plan.expert_used_count)),
    "none": lambda llm: llm.set_plan(None),
}


@pytest.mark.parametrize("name", CHANGES)
def test_plan_that_changes_in_the_middle_of_a_stream(path, plain, name):
    """It takes effect with the next token, also where more than that one have been verified."""
    n = 2  # of which the second one has been verified with those after it
    llm = Llama(path, **SIZES, draft_model=recorded(plain))
    texts = []
    try:
        for each in (llm, plain):
            generation = each.generate(each.tokenize(PROMPT), temp=0.0)
            text = [next(generation) for _ in range(n)]
            if each is llm:
                assert each.n_tokens > len(each.tokenize(PROMPT)) + n
            CHANGES[name](each)
            texts.append(text + list(itertools.islice(generation, 20)))
            generation.close()
            texts.append(tokens(each, 20))
    finally:
        plain.set_budget(None)
    assert texts[:2] == texts[2:] and texts[0] != tokens(plain, n + 20)


def test_a_state_in_the_middle_of_a_stream(path, plain):
    """It has the text that was read, and nothing that is proposed after it."""
    llm, expected = Llama(path, **SIZES, draft_model=recorded(plain, 0.7)), tokens(plain, 30)
    prompt = llm.tokenize(PROMPT)
    generation = llm.generate(prompt, temp=0.0)
    for n in range(1, 12):
        assert next(generation) == expected[n - 1]
        state = llm.save_state()
        plain.load_state(state)
        assert plain.input_ids[: plain.n_tokens].tolist() == (prompt + expected)[: len(prompt) + n - 1]
        plain.eval([expected[n - 1]])
        assert plain.sample(temp=0.0) == expected[n]
    assert list(itertools.islice(generation, 19)) == expected[11:]


def test_rules_under_which_tokens_are_not_alone(path, plain):
    """Under "batch" those of one verification would share their experts."""
    draft = recorded(plain)
    llm = Llama(path, **SIZES, draft_model=draft, token_rule="batch")
    plain.set_budget(None, token_rule="batch")
    try:
        assert tokens(llm, 30) == tokens(plain, 30)
    finally:
        plain.set_budget(None)
    assert len(draft.seen) == 29 and not llm.verifies
    llm = Llama(path, **SIZES, draft_model=DraftModel.same(n_draft=3), token_rule="batch")
    tokens(llm, 10)
    assert llm.draft_stats()["proposed"] == 0


def test_one_draft_for_one_model(path):
    draft = DraftModel.same(n_draft=2)
    with pytest.raises(RuntimeError, match="belongs to no Llama"):
        draft(np.zeros(3, np.intc))
    llm = Llama(path, **SIZES, draft_model=draft)
    with pytest.raises(ValueError, match="belongs to another Llama"):
        Llama(path, **SIZES, draft_model=draft)
    expected = tokens(llm, 10)
    again = pickle.loads(pickle.dumps(llm))
    assert tokens(again, 10) == expected and again.draft_stats()["proposed"] > 0
    llm.close()
    llm.close()
    assert tokens(Llama(path, **SIZES, draft_model=draft), 10) == expected


def test_a_draft_that_is_set_later(path, plain, dense_path):
    """As llama-cpp-python allows: it is opened then, and the one before it closed."""
    llm = Llama(path, **SIZES)
    expected = tokens(plain, 20)
    first, second = DraftModel.same(budget=0.5, n_draft=3), DraftModel(path, n_draft=2, n_threads=1)
    for draft in (first, second, LlamaPromptLookupDecoding(), None, first):
        llm.draft_model = draft
        assert llm.draft_model is draft and tokens(llm, 20) == expected
        llm.draft_model = draft  # again
        assert tokens(llm, 20) == expected
        if isinstance(draft, DraftModel):
            assert llm.draft_stats()["proposed"] > 0
    with pytest.raises(ValueError, match="its vocabulary is not that of"):
        llm.draft_model = DraftModel(dense_path)
    with pytest.raises(ValueError, match="belongs to another Llama"):
        Llama(path, **SIZES).draft_model = first
    for wrong in ("small.gguf", DraftModel, LlamaPromptLookupDecoding):
        with pytest.raises(TypeError, match="draft_model: found .*, want a LlamaDraftModel or another callable"):
            llm.draft_model = wrong
    assert llm.draft_model is first and tokens(llm, 20) == expected
    generation = llm.generate(llm.tokenize(PROMPT), temp=0.0)
    next(generation)
    llm.draft_model = second
    with pytest.raises(GenerationError, match="another draft_model"):
        next(generation)
    assert tokens(llm, 20) == expected


def test_batches_of_two_tokens(path, plain):
    """Fewer than a draft is timed with where there is room."""
    for draft in (DraftModel.same(budget=0.5), DraftModel(path, n_batch=2, n_threads=1)):
        llm = Llama(path, **{**SIZES, "n_batch": 2}, draft_model=draft)
        assert tokens(llm, 20) == tokens(plain, 20)
        for wrong in ([1, 2, 3], []):
            with pytest.raises(ValueError, match=f"tokens: found {len(wrong)}, want 1 to 2"):
                draft._proposer._follower.decode(wrong)


def test_a_draft_that_cannot_be_timed(path, plain, monkeypatch):
    """It is closed, the one before stays, and it can be tried again."""
    followers = []

    def interrupted(self, *_):
        followers.append(self)
        raise KeyboardInterrupt

    first, second = DraftModel.same(budget=0.5, n_draft=3), DraftModel.same(budget=0.5)
    llm = Llama(path, **SIZES, draft_model=first)
    with monkeypatch.context() as patch:
        patch.setattr(SecondContext, "decode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.draft_model = second
    assert llm.draft_model is first and followers[0].ctx is None
    llm.draft_model = second
    assert tokens(llm, 20) == tokens(plain, 20)


def test_steps_without_a_draft_are_left_alone(path, plain):
    """Where drafts do not pay, most tokens pass without a question, and all of them are counted."""
    llm = Llama(path, **SIZES, draft_model=DraftModel(recorded(plain, 0.0)))
    # a machine on which five tokens together take three times as long as one, and drafts cost nothing, however busy this one is
    evaluated, length, asked = llm.draft_model.evaluated, llm.draft_model._length, []
    choose, drafted, stepped = length.choose, length.drafted, length.stepped
    llm.draft_model.evaluated = lambda n, seconds, prompt: evaluated(n, 0.005 * (1 + n), prompt)
    length.drafted = lambda n, seconds: drafted(n, 1e-6 * n)
    length.stepped = lambda n, n_new, *_: stepped(n, n_new, 0.005 * (2 + n), 0.0)
    length.choose = lambda *args: asked.append(args) or choose(*args)
    assert tokens(llm, 150) == tokens(plain, 150)
    found = llm.draft_stats()
    assert len(asked) < 75
    if not found["proposed"]:
        assert found["steps"] == found["tokens"] == found["lengths"][0] == 149 and not length._texts
    assert found["seconds"]["plain"] > 0
    tokens(llm, 2)
    assert list(length._texts) == [150]


def test_a_draft_that_has_nothing_is_asked_less_often(path, plain):
    """As prompt lookup in a text that repeats nothing."""
    nothing = Recorded([])
    llm = Llama(path, **SIZES, draft_model=DraftModel(nothing))
    llm.draft_model._length._choose = lambda *_: (1, False, False)
    assert tokens(llm, 60) == tokens(plain, 60)
    assert np.diff(nothing.seen).tolist() == [2, 4, *[8] * 6] and llm.draft_stats()["steps"] == 59


def test_a_second_context_ends_with_its_model(path):
    """llama.cpp would go on in memory that has been freed."""
    llm = Llama(path, **SIZES)
    first, second = llm.second_context(0.5), llm.second_context(0.5)
    first.close()
    for wrong in (-1, llm.n_ctx(), 2**40, 0.5):
        with pytest.raises(ValueError, match="n_past: found"):
            second.decode([1], wrong)
        with pytest.raises(ValueError, match="tokens: found"):
            second.decode([1, wrong + 2**20 * (wrong >= 0)])
        with pytest.raises(ValueError, match="n_threads: found"):
            llm.second_context(0.5, n_threads=wrong + 1000 * (wrong > 0))
    assert second.decode([1, 2]).shape == (1, llm.n_vocab())
    llm.close()
    for closed in (first, second):
        with pytest.raises(RuntimeError, match="has been closed"):
            closed.decode([1])


def test_what_is_only_compared(path, plain):
    """Where it does not pay to verify a token, it is compared with the one that is written."""
    for acceptance in (1.0, 0.0):
        llm = Llama(path, **SIZES, draft_model=DraftModel(recorded(plain, acceptance)))
        llm.draft_model._length._choose = lambda *_: (1, False, False)
        assert tokens(llm, 60) == tokens(plain, 60)
        found = llm.draft_stats()
        assert found["compared"] == 58 and found["agreed"] == 58 * acceptance  # the last one has no successor yet
        assert found["proposed"] == 0 and found["seconds"]["drafting"] > 0
        assert llm.draft_model._length.acceptance == pytest.approx(acceptance, abs=0.01)


def test_what_cannot_be_a_draft(path, tiny, dense_path, tmp_path):
    for wrong in (0, -1, True, 1.5, "2"):
        with pytest.raises(ValueError, match="n_draft: found .* want a number of tokens"):
            DraftModel(path, n_draft=wrong)
        with pytest.raises(ValueError, match="most: found .* want a number of tokens"):
            DraftModel.same(most=wrong)
    with pytest.raises(TypeError, match="n_threads: for a draft from a file"):
        DraftModel(LlamaPromptLookupDecoding(), n_threads=2)
    for wrong in (DraftModel(path), DraftModel.same(), None, LlamaPromptLookupDecoding, lambda text: text):
        with pytest.raises(TypeError, match="model: found .* want a GGUF file, or a LlamaDraftModel of another kind"):
            DraftModel(wrong)
    for draft, error, message in (
        (DraftModel(dense_path), ValueError, "its vocabulary is not that of"),
        (DraftModel(tmp_path / "none.gguf"), ValueError, "none.gguf"),
        (DraftModel(path, n_treads=1), TypeError, "n_treads"),
        (DraftModel.same(budget=7.5), PlanError, "budget"),
        (DraftModel.same(budget="slow"), PlanError, "slow"),
        (DraftModel(path, vocab_only=True), ValueError, "cannot go on from a text"),
        (DraftModel(other_models.write_bert(tmp_path / "bert.gguf")), ValueError, "cannot go on from a text"),
        (DraftModel.same(n_threads=513), ValueError, "n_threads"),
    ):
        with pytest.raises(error, match=message):
            Llama(path, **SIZES, draft_model=draft)
    with pytest.raises(PlanError, match="convert it first"):
        Llama(tiny.gguf_path, **SIZES, draft_model=DraftModel.same(budget=0.5))
    with pytest.raises(ValueError, match="want a DraftModel"):
        Llama(path, **SIZES).draft_stats()


@pytest.mark.parametrize("proposed", [None, 5, "abc", [1.5], [[1]], {1}, [-1], [10**6], [10**20]], ids=str)
def test_a_draft_that_proposes_no_tokens(path, plain, proposed):
    class Wrong(LlamaDraftModel):
        def __call__(self, input_ids, /, **kwargs):
            return proposed

    llm = Llama(path, **SIZES, draft_model=DraftModel(Wrong(), n_draft=2))
    with pytest.raises(ValueError, match="Wrong proposes .*, want token ids|tokens: found"):
        tokens(llm, 5)
    llm.draft_model = None
    assert tokens(llm, 5) == tokens(plain, 5)


@pytest.mark.parametrize("n_draft", [3, None])
def test_tokens_that_the_draft_does_not_have(tmp_path, n_draft):
    """Vocabularies of one family differ in size; the draft reads the text without them."""
    large = odd_models.write_qwen3moe(tmp_path / "large.gguf", more=[f"<{i}>" for i in range(20)])
    small = odd_models.write_qwen3moe(tmp_path / "small.gguf")
    llm = Llama(large, **SIZES, draft_model=DraftModel(small, n_draft=n_draft, n_threads=1))
    alone, n_vocab = Llama(large, **SIZES), llm.n_vocab()
    prompt = [*llm.tokenize(PROMPT), n_vocab - 1, n_vocab - 5, *llm.tokenize(b"over")]

    def text(each, bias):
        logits = lambda _, scores: scores + np.where(np.arange(n_vocab) >= n_vocab - 20, bias, 0)  # noqa: E731
        processors = llama_cpp.LogitsProcessorList([logits])
        return list(itertools.islice(each.generate(prompt, temp=0.0, logits_processor=processors), 30))

    for bias in (0.0, 3.0, 50.0):
        assert text(llm, bias) == text(alone, bias)
    assert max(text(alone, 50.0)) >= n_vocab - 20
    if n_draft:
        assert llm.draft_stats()["proposed"] > 0


def test_a_vocabulary_that_differs_by_one_token(path, tmp_path):
    from gguf_factory import changed_token

    with pytest.raises(ValueError, match="token 300 is 'another', want"):
        Llama(path, **SIZES, draft_model=DraftModel(changed_token(path, tmp_path / "other.gguf", 300, "another")))


def test_plans_from_a_side_file(tiny, tmp_path):
    """The draft takes its plans from there, too."""
    planned = plan_from_made_up_profile(tiny.gguf_path, tmp_path / "planned.gguf")
    llm = Llama(tiny.gguf_path, **SIZES, plan_path=planned, draft_model=DraftModel.same(budget=0.5, n_draft=3))
    assert tokens(llm, 20) == tokens(Llama(planned, **SIZES), 20)


@pytest.mark.parametrize("rule, flash_attn", [("off", False), ("threshold", True), ("estimate", False)])
def test_tokens_are_verified_with_the_numbers_of_plain_decoding(testbed_path, tmp_path, rule, flash_attn):
    """Bit for bit, in a quantised model on the CPU, under every rule that goes by single tokens."""
    from conftest import plan_under_rule
    from llama_cpp import llama_print_system_info

    if b"AVX2 = 1" not in llama_print_system_info():
        pytest.skip("elsewhere 2 and 3 tokens together go through llama.cpp's kernels, which round otherwise")
    llm = Llama(
        plan_under_rule(testbed_path, tmp_path / "planned.gguf", rule), n_ctx=256, flash_attn=flash_attn, verbose=False
    )
    text = llm.tokenize(
        b"The capital of France is a city that was founded by people who wanted to live on an island in it"
    )
    prompt = text[:12]
    llm.decode(prompt)
    alone = [llm.decode([token], len(prompt) + i)[0].copy() for i, token in enumerate(text[12:])]
    for n in (2, 3, 6, len(text) - 12):
        llm.decode(prompt)
        together = llm.decode(text[12 : 12 + n], len(prompt), logits_all=True)
        assert all(np.array_equal(found, wanted) for found, wanted in zip(together, alone))

"""What llama-cpp-python crashes on, or gets wrong and says nothing: an error in our class. On a tiny dense model."""

import contextlib
import ctypes
import gc
import itertools
import os
from pathlib import Path
import pickle
import struct
import warnings
import weakref

from allocmoe_edge import DraftModel, GenerationError, Llama
import llama_cpp
from llama_cpp import LlamaGrammar, LogitsProcessorList, StoppingCriteriaList
import numpy as np
import odd_models
import other_models
import pytest

SIZES = dict(n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False)
PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return other_models.write_dense(tmp_path_factory.mktemp("dense") / "dense.gguf")


@pytest.fixture
def llm(path):
    return Llama(path, **SIZES)


@pytest.fixture(scope="module")
def real(dense_path):
    """One that writes text."""
    return Llama(dense_path, **SIZES)


def stream(llm, **kwargs):
    """A greedy completion, of which one token has been read."""
    chunks = llm.generate(llm.tokenize(PROMPT.encode()), temp=0.0, **kwargs)
    return [next(chunks)], chunks


def tokens(llm, n=12, prompt=PROMPT) -> list:
    llm.reset()
    return list(itertools.islice(llm.generate(llm.tokenize(prompt.encode()), temp=0.0), n))


# --- what is given


def test_path_may_be_a_path(path, llm):
    """So may be those of other arguments."""
    assert isinstance(path, Path) and llm.model_path == str(path)
    assert pickle.loads(pickle.dumps(llm)).model_path == str(path)
    with pytest.raises(ValueError, match="lora_path: llama.cpp cannot use"):
        Llama(path, **SIZES, lora_path=Path("/no/such/adapter"))


def test_arguments_that_there_are_not(path):
    """llama-cpp-python takes any and says nothing."""
    with pytest.raises(TypeError, match="'budgt'.*did you mean budget?"):
        Llama(path, **SIZES, budgt=0.5)
    with pytest.raises(TypeError, match="'n_gqa', which there is not$"):
        Llama(path, **SIZES, n_gqa=8)
    with pytest.raises(TypeError, match="'kwargs', which there is not$"):
        Llama(path, **SIZES, kwargs={})


@pytest.mark.parametrize(
    "arguments",
    [
        dict(n_ctx=-1), dict(n_ctx="64"), dict(n_ctx=64.5), dict(n_ctx=2**31), dict(n_batch=0), dict(n_batch=-5),
        dict(n_batch=None), dict(n_batch="8"), dict(n_ubatch=0), dict(n_ubatch=None), dict(pooling_type=77, embedding=True),
        dict(type_k=99), dict(type_v=-1), dict(type_v="f16"), dict(numa=None), dict(numa=2.0), dict(numa=99),
        dict(seed=2**40), dict(seed=1.5), dict(main_gpu=2**40), dict(split_mode=None), dict(yarn_orig_ctx="x"),
        dict(last_n_tokens_size=2**31), dict(rope_scaling_type=float("nan")), dict(rope_freq_base=10**400), dict(lora_scale="1x"),
        dict(rope_freq_base=float("nan")), dict(rope_freq_base=-1), dict(rope_freq_scale=-0.5), dict(yarn_ext_factor=float("inf")),
        dict(split_mode=9), dict(kv_overrides=""), dict(kv_overrides=5), dict(kv_overrides=[], vocab_only=True), dict(lora_path="/no/such/adapter"),
    ],
    ids=lambda arguments: str(arguments)[:40],
)  # fmt: skip
def test_arguments_that_llama_cpp_would_crash_on(path, arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Llama(path, **{**SIZES, **arguments})


def test_model_as_an_adapter(path):
    with pytest.raises(ValueError, match="lora_path"):
        Llama(path, **SIZES, lora_path=path)


CHAIN = "root ::= a0\n" + "".join(f"a{i} ::= a{i + 1}\n" for i in range(50_000)) + 'a50000 ::= "x"\n'


@pytest.mark.parametrize(
    "grammar",
    [
        "not a grammar", "root ::= root", 'x ::= "a"', "root ::= " + "(" * 100_000,
        # llama.cpp would take all memory
        'root ::= "a"{3,1}', 'root ::= ("a" | b){0,500}{0,3}{2,0}\nb ::= "b"', 'root ::= "' + "x" * 10_000 + '"{1000}' * 2,
        'root ::= b root "z" | "x"\nb ::= c\nc ::= "y"?\n',
        CHAIN,  # or out of stack
    ],
    ids=lambda text: f"{text[:40]!r}",
)  # fmt: skip
def test_bad_grammar(llm, grammar):
    for call in (lambda **kwargs: llm(PROMPT, max_tokens=4, **kwargs), llm.sample):
        llm.eval([1, 2, 3])
        with pytest.raises(ValueError, match="^grammar: "):
            call(grammar=LlamaGrammar.from_string(grammar))
    assert len(tokens(llm)) == 12


def test_grammar_that_no_token_meets(real):
    """llama-cpp-python's process ends there."""
    grammar = LlamaGrammar.from_string("root ::= [^\\x00-\\U0010FFFF]")
    with pytest.raises(ValueError, match="grammar: it allows none of the model's tokens"):
        real(PROMPT, max_tokens=4, grammar=grammar)


def test_large_grammars_that_are_none_too_large(llm):
    """Schemas of many values, of long texts and of many members are in use."""
    for grammar in (
        "root ::= " + " | ".join(f'"x{i}"' for i in range(5000)),
        "root ::= " + "[a-z]{0,2000} " * 20,
        "root ::= " + "a? " * 500 + '\na ::= "," [a-z]+ "=" [0-9]{1,16}',
        "root ::= " + "(" * 300 + '"x"' + ")" * 300,
    ):
        llm.check_grammar(grammar)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_grammar_does_what_it_does_in_llama_cpp_python(path, llm, temperature):
    grammar = LlamaGrammar.from_string('root ::= ("red" | "blue" | [a-f]{3,9}) "!"')
    options = dict(max_tokens=20, temperature=temperature, seed=7, grammar=grammar)
    stock = llama_cpp.Llama(str(path), **SIZES)
    for prompt in (PROMPT, "ab", "xyz"):
        found = llm(prompt, **options)["choices"][0]["text"]
        assert found == stock(prompt, **options)["choices"][0]["text"] and found.endswith("!")


@pytest.mark.parametrize("seed", [2**32, -2, 1.5, "x"], ids=str)
def test_seed_that_is_none(llm, seed):
    for call in (
        lambda: llm(PROMPT, max_tokens=1, seed=seed),
        lambda: llm(PROMPT, max_tokens=1, seed=seed, stream=True),
        lambda: llm.create_chat_completion([], seed=seed),
        lambda: llm.set_seed(seed),
    ):
        with pytest.raises(ValueError, match="^seed: found "):
            call()
    llm(PROMPT, max_tokens=1, seed=2**32 - 1)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_pipe_as_an_adapter(path, tmp_path):
    """It would be waited for without end."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="lora_path: .*pipe is no file"):
        Llama(path, **SIZES, lora_path=tmp_path / "pipe")


def test_nothing_to_go_on_from(llm):
    for prompt in ("", []):
        with pytest.raises(ValueError, match="the prompt has no tokens"):
            llm(prompt)
    with pytest.raises(RuntimeError, match="no logits to sample from"):
        llm.sample()
    llm.eval([1, 2, 3])
    with pytest.raises(RuntimeError, match="no logits to sample from"):
        llm.sample(idx=1000)


# --- embeddings


def test_why_a_model_does_not_load_is_said(path, tmp_path):
    """llama-cpp-python shuts stderr while it loads one, unless it is verbose."""
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(path.read_bytes().replace(b"blk.0.attn_norm.weight", b"blk.0.attn_nirm.weight"))
    for _ in range(2):
        with pytest.raises(
            ValueError, match="Failed to load model from file: .*: .*tensor 'blk.0.attn_norm.weight' not found"
        ):
            Llama(damaged, **SIZES)
    Llama(path, **SIZES).close()


def test_scores_of_a_reranker_are_one_number_each(tmp_path):
    llm = Llama(other_models.write_bert(tmp_path / "ranks.gguf", ranks=True), **SIZES, embedding=True)
    texts = ["a b", "b c d", "a b"]
    first, second, third = llm.embed(texts)
    assert len(first) == 1 and first == third != second and first == llm.embed("a b")
    assert llm.n_embd() == 64


def test_scores_of_no_reranker_are_refused(path):
    with pytest.raises(ValueError, match="is no reranker: it has no tensors cls"):
        Llama(path, **SIZES, embedding=True, pooling_type=4)
    Llama(path, **SIZES, pooling_type=4).close()  # nobody asks for any


def test_micro_batch_without_a_place_for_each_text(tmp_path):
    """llama.cpp said no more than which assert had failed."""
    bert = other_models.write_bert(tmp_path / "bert.gguf")
    with pytest.raises(ValueError, match="n_ubatch: found 16, want at least 256 for means over tokens"):
        Llama(bert, **SIZES, embedding=True, n_ubatch=16)
    assert len(Llama(bert, **SIZES, embedding=True, n_ubatch=16, n_batch=16).embed("hello world")) == 64


def test_vocabulary_alone_computes_nothing(path):
    llm = Llama(path, **SIZES, vocab_only=True, embedding=True)
    for call in (llm.embed, llm.create_embedding, llm, lambda text: llm.eval([1]), lambda text: llm.decode([1])):
        with pytest.raises(RuntimeError, match="was loaded with vocab_only, without weights to compute with"):
            call("a")
    assert llm.tokenize(b"a")


@pytest.mark.parametrize("pooling", ["NONE", "MEAN", "LAST"])
def test_embeddings_of_a_list_are_those_of_its_texts(path, pooling):
    llm = Llama(path, **SIZES, embedding=True, pooling_type=getattr(llama_cpp, f"LLAMA_POOLING_TYPE_{pooling}"))
    texts = ["one", "another one", "x"]
    found, n = llm.embed(texts, return_count=True)
    assert n == sum(map(len, texts)) and len(found) == 3
    for text, embedding in zip(texts, found):
        np.testing.assert_allclose(embedding, llm.embed(text), rtol=1e-4, atol=1e-5)
        assert np.shape(embedding) == ((len(text), 64) if pooling == "NONE" else (64,))
    with pytest.raises(ValueError, match="'' has no tokens"):
        llm.embed(["one", ""])


def test_embedding_model(tmp_path):
    """Everything that does not need a memory of tokens before, which it has none of."""
    llm = Llama(other_models.write_bert(tmp_path / "bert.gguf"), **SIZES, embedding=True)
    assert llm.plan is None and llm.expert_stats()["decode"]["tokens"].sum() == 0
    a, b = llm.embed(["hello world", "a different prompt"])
    np.testing.assert_allclose(b, llm.embed("a different prompt"), rtol=1e-4, atol=1e-5)
    assert not np.allclose(a, b)
    llm.clear_cache()
    assert llm.create_embedding("hello")["data"][0]["embedding"]


def test_model_is_freed_with_its_last_name(path):
    """And not when the collector comes by: it is large."""
    llm = Llama(path, **SIZES)
    llm.set_cache(llama_cpp.LlamaRAMCache())
    assert len(tokens(llm)) == 12 and llm(PROMPT, max_tokens=2, grammar=LlamaGrammar.from_string('root ::= "ab"'))
    _, chunks = stream(llm)
    freed = weakref.ref(llm)
    gc.disable()
    try:
        del llm, chunks
        assert freed() is None
    finally:
        gc.enable()


# --- after the end

CALLS = {
    "completion": lambda llm: llm(PROMPT),
    "chat": lambda llm: llm.create_chat_completion([{"role": "user", "content": "x"}]),
    "save_state": lambda llm: llm.save_state(),
    "tokenize": lambda llm: llm.tokenize(b"x"),
    "detokenize": lambda llm: llm.detokenize([1]),
    "eval": lambda llm: llm.eval([1]),
    "n_ctx": lambda llm: llm.n_ctx(),
    "n_vocab": lambda llm: llm.n_vocab(),
    "ctx": lambda llm: llm.ctx,
    "model": lambda llm: llm.model,
    "plan": lambda llm: llm.plan,
    "set_budget": lambda llm: llm.set_budget(0.5),
    "set_plan": lambda llm: llm.set_plan(None),
    "expert_stats": lambda llm: llm.expert_stats(),
    "clear_cache": lambda llm: llm.clear_cache(),
    "decode": lambda llm: llm.decode([1]),
    "embed": lambda llm: llm.embed("x"),
    "sample": lambda llm: llm.sample(),
    "create_embedding": lambda llm: llm.create_embedding("x"),
}


@pytest.mark.parametrize("call", CALLS)
def test_use_after_close(llm, call):
    llm.eval([1, 2, 3])
    llm.close()
    llm.close()
    with pytest.raises(RuntimeError, match="this Llama has been closed"):
        CALLS[call](llm)


def test_parts_that_others_hold_after_close(llm):
    tokenizer, model, context = llm.tokenizer(), llm._model, llm._ctx
    llm.close()
    for call in (lambda: tokenizer.encode("x"), model.n_vocab, context.n_ctx, context.kv_cache_clear):
        with pytest.raises(Exception, match="this Llama has been closed"):
            call()


# --- in the middle of a generation


def test_reading_on_gives_the_text(llm):
    """With calls in between that change nothing."""
    expected = tokens(llm)
    read, chunks = stream(llm)
    for token in itertools.islice(chunks, 11):
        read.append(token)
        llm.save_state(), llm.tokenize(b"x"), llm.expert_stats(), llm.n_ctx(), llm.plan
    assert read == expected


ENDINGS = {
    "reset()": lambda llm, state: llm.reset(),
    "load_state()": lambda llm, state: llm.load_state(state),
    "eval()": lambda llm, state: llm.eval([5]),
    "rewind()": lambda llm, state: llm.rewind(2),
    "close()": lambda llm, state: llm.close(),
    "another generation": lambda llm, state: llm("Another", max_tokens=3),
}


@pytest.mark.parametrize("call", ENDINGS)
def test_calls_that_end_it(llm, call):
    """Reading on is an error, and no other text; what was called did what it does."""
    state = llm.save_state()
    _, chunks = stream(llm)
    ENDINGS[call](llm, state)
    with pytest.raises(GenerationError, match=f"^{call}".replace("(", r"\(").replace(")", r"\)")):
        next(chunks)
    assert list(chunks) == []
    if call != "close()":
        assert tokens(llm) == tokens(llm)


def test_streamed_completion_that_cannot_go_on(real):
    options = dict(max_tokens=8, temperature=0.0)
    chunks = real(PROMPT, **options, stream=True)
    next(chunks)
    whole = real(PROMPT, **options)["choices"][0]["text"]
    with pytest.raises(GenerationError, match="start it again"):
        list(chunks)
    again = real(PROMPT, **options, stream=True)
    assert "".join(chunk["choices"][0]["text"] for chunk in again) == whole


def test_two_streams_in_turn(llm):
    """The newest goes on."""
    _, first = stream(llm)
    read, second = stream(llm)
    with pytest.raises(GenerationError):
        next(first)
    read += itertools.islice(second, 11)
    assert read == tokens(llm)


def test_stream_that_nobody_reads_on(llm):
    expected = tokens(llm)
    _, abandoned = stream(llm)
    assert tokens(llm) == expected
    abandoned.close()
    assert tokens(llm) == expected


def test_embed_ends_it(path):
    llm = Llama(path, **SIZES, embedding=True, pooling_type=llama_cpp.LLAMA_POOLING_TYPE_NONE)
    _, chunks = stream(llm)
    llm.embed("x")
    with pytest.raises(GenerationError, match=r"^embed\(\)"):
        next(chunks)


def test_callbacks_may_not_end_it(llm, capfd):
    """An error, in a stopping criterion and in a logits processor, which may go on after it."""
    expected = tokens(llm)

    def criterion(ids, logits):
        llm.reset()

    llm.reset()
    _, chunks = None, llm.generate(llm.tokenize(PROMPT.encode()), stopping_criteria=StoppingCriteriaList([criterion]))
    with pytest.raises(GenerationError, match="in a callback"):
        next(chunks)

    def processor(ids, logits):
        try:
            llm.eval([7])
        except GenerationError:
            refused.append(True)
        return logits

    refused = []
    llm.reset()
    options = dict(temp=0.0, logits_processor=LogitsProcessorList([processor]))
    assert list(itertools.islice(llm.generate(llm.tokenize(PROMPT.encode()), **options), 12)) == expected
    assert len(refused) == 12


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("in it"), KeyboardInterrupt("in it"), ValueError("another shape")], ids=repr
)
def test_error_of_a_logits_processor(llm, error, capfd):
    """It is raised; llama-cpp-python prints it and goes on. After it the model is as before."""
    expected = tokens(llm)

    def processor(ids, logits):
        if len(ids) < 8:
            return logits
        if str(error) == "another shape":
            return logits[:3]
        raise error

    ids = llm.tokenize(PROMPT.encode())
    options = dict(temperature=0.0, max_tokens=12, logits_processor=LogitsProcessorList([processor]))
    for call in (
        lambda: llm(PROMPT, **options),
        lambda: list(llm(PROMPT, stream=True, **options)),
        lambda: list(llm.generate(ids, temp=0.0, logits_processor=options["logits_processor"])),
        lambda: llm.create_chat_completion([{"role": "user", "content": PROMPT}], **options),
    ):
        with pytest.raises(type(error), match="could not broadcast" if "shape" in str(error) else str(error)):
            call()
    llm.reset()
    llm.eval([*ids, *ids])
    with pytest.raises(type(error)):
        llm.sample(logits_processor=options["logits_processor"])
    assert capfd.readouterr().err == "" and tokens(llm) == expected


def test_a_processor_and_a_bias(llm):
    """llama-cpp-python forgets both where a completion has both."""
    called, first = [], tokens(llm, 1)[0]
    processors = LogitsProcessorList([lambda ids, logits: called.append(True) or logits])
    llm.reset()
    options = dict(temperature=0.0, max_tokens=2, logits_processor=processors)
    found = llm(PROMPT, logit_bias={str(first): -1000.0}, **options)["choices"][0]["text"]
    assert called and len(processors) == 1 and found != llm(PROMPT, **options)["choices"][0]["text"]


def test_tokens_can_be_sent_into_it(path, llm):
    """As in llama-cpp-python, with the logits of all tokens; without them that crashes."""
    found = []
    for kind in (Llama, llama_cpp.Llama):
        each = kind(str(path), **SIZES, logits_all=True)
        chunks = each.generate(each.tokenize(PROMPT.encode()), temp=0.0)
        found.append([next(chunks), chunks.send([65, 66, 67]), next(chunks), chunks.send([68]), next(chunks)])
    assert found[0] == found[1]
    _, chunks = stream(llm)
    with pytest.raises(RuntimeError, match="no logits to sample from"):
        chunks.send([65, 66, 67])


def test_draft_model_gives_the_same_text(path, llm):
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    drafted = Llama(path, **SIZES, draft_model=LlamaPromptLookupDecoding(num_pred_tokens=3))
    assert tokens(drafted, 40) == tokens(llm, 40)


@contextlib.contextmanager
def interrupted_in_second_batch(llm, monkeypatch):
    """Ctrl-C right behind it."""
    decode, calls = llm._ctx.decode, []

    def interrupted(batch):
        decode(batch)
        calls.append(batch)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(llm._ctx, "decode", interrupted)
        yield


@pytest.mark.parametrize("n_draft", [None, 3])
def test_interrupted_after_the_first_token(path, llm, monkeypatch, n_draft):
    """The prompt is cached as a whole, and the logits at hand are of what comes after it."""
    draft = None if n_draft is None else DraftModel(path, n_draft=n_draft, n_threads=1)
    other, expected = Llama(path, **SIZES, draft_model=draft), tokens(llm)
    with interrupted_in_second_batch(other, monkeypatch):
        tokens(other)
    prompt = other.tokenize(PROMPT.encode())
    assert other.n_tokens == len(prompt)
    assert list(itertools.islice(other.generate(prompt, temp=0.0), 12)) == expected


def test_interrupted_in_the_middle_of_a_prompt(path, monkeypatch):
    """What of it is cached is not begun with the logits of the batch after it."""
    llm = Llama(path, **SIZES, n_batch=32)
    prompt = (llm.tokenize(PROMPT.encode()) * 40)[:64]
    expected = list(itertools.islice(llm.generate(prompt[:32], temp=0.0), 5))
    llm.reset()
    with interrupted_in_second_batch(llm, monkeypatch):
        next(llm.generate(prompt, temp=0.0))
    assert llm.n_tokens == 32
    assert list(itertools.islice(llm.generate(prompt[:32], temp=0.0), 5)) == expected


def test_another_draft_forgets_what_the_first_has_proposed(path):
    llm = Llama(path, **SIZES, draft_model=DraftModel(path, n_draft=3, n_threads=1))
    prompt = llm.tokenize(PROMPT.encode())
    stream = llm.generate(prompt, temp=0.0)
    next(stream), next(stream)
    assert llm.n_tokens > len(prompt) + 1
    llm.draft_model = None
    assert llm.n_tokens == len(prompt) + 1


def test_what_has_left_the_window_of_attention(built, monkeypatch):
    """Is not there to go on from: the text that begins with it is computed anew. What is there is not."""
    llm = Llama(built["gpt-oss"].gguf_path, n_ctx=512, n_batch=32, n_threads=1, swa_full=False, verbose=False)
    prompt = llm.tokenize(PROMPT.encode())
    text = prompt + list(itertools.islice(llm.generate(prompt, temp=0.0), 450))
    decode, calls = llm._ctx.decode, []
    monkeypatch.setattr(llm._ctx, "decode", lambda batch: (calls.append(batch), decode(batch)))
    for n, anew in ((30, True), (len(prompt), True), (len(text) - 5, False), (200, True)):
        calls.clear()
        assert list(itertools.islice(llm.generate(text[:n], temp=0.0), 5)) == text[n : n + 5]
        assert len(calls) == 5 + (n - 1) // 32 * anew
        assert llm.n_tokens < len(text)
        next(llm.generate(text[:-1], temp=0.0))


def test_generation_ends_where_the_context_is_full(llm):
    """In llama-cpp-python it ends in "llama_decode returned 1"; every token but the last has a place."""
    prompt = llm.tokenize(PROMPT.encode())
    written = list(llm.generate(prompt, temp=0.0))
    assert llm.n_tokens == llm.n_ctx() and len(prompt) + len(written) == llm.n_ctx() + 1


@pytest.mark.parametrize("token", [-1, 10**9])
def test_tokens_that_the_vocabulary_does_not_have(llm, token):
    """llama.cpp would end the process, or llama-cpp-python take another token."""
    tokenizer = llm.tokenizer()
    for call in (
        llm.detokenize,
        tokenizer.decode,
        tokenizer.detokenize,
        llm.eval,
        llm,
        lambda t: next(llm.generate(t)),
    ):
        with pytest.raises(ValueError, match=f"tokens: found {token}"):
            call([1, token])
    assert llm.detokenize([65, np.int32(66)]) == tokenizer.decode([65, 66]).encode()


@pytest.mark.parametrize(
    "bias",
    [{10**9: 1.0}, {-1: 1.0}, {"x": 1.0}, {None: 1.0}, {1: "much"}, {1: float("nan")}, {1: None}, [1, 2]],
    ids=str,
)
def test_bias_of_what_is_no_token(real, bias):
    """llama-cpp-python prints an error and goes on without any bias."""
    for call in (
        lambda **options: real(PROMPT, **options),
        lambda **options: real.create_chat_completion([], **options),
    ):
        for stream in (False, True):
            with pytest.raises(ValueError, match="^logit_bias: found "):
                call(max_tokens=2, logit_bias=bias, stream=stream)
    first = real(PROMPT, max_tokens=1, logit_bias={"100": 1e6, 5: -np.inf}, temperature=0.0)
    assert first["choices"][0]["text"] == real.detokenize([100]).decode()


def test_context_is_as_large_as_llama_cpp_makes_it(path):
    """300 becomes 512: a text may go as far, and not only to where llama-cpp-python keeps tokens."""
    llm = Llama(path, **{**SIZES, "n_ctx": 300})
    assert llm.n_ctx() == 512
    list(itertools.islice(llm.generate([1] * 310, temp=0.0), 3))
    assert len(llm.input_ids) == 512 and llm.n_tokens == 312


@pytest.mark.parametrize("logits_all", [True, False])
def test_the_models_own_context(tmp_path, logits_all):
    """As large as llama.cpp makes it, too; a longer prompt did not fit the array of tokens, and generated ones were lost."""
    model = odd_models.write_qwen3moe(tmp_path / "m.gguf", n_ctx=300)
    llm = Llama(model, n_ctx=0, logits_all=logits_all, verbose=False)
    assert llm.n_ctx() == len(llm.input_ids) == 512
    assert len(llm.scores) == 512
    list(itertools.islice(llm.generate([1] * 310, temp=0.0), 3))
    assert llm.n_tokens == 312 and (llm.input_ids[:310] == 1).all()


def test_text_beyond_the_positions_that_a_model_has_learned(tmp_path):
    """llama.cpp would end the process."""
    path = other_models.write_gpt2(tmp_path / "gpt2.gguf")
    with pytest.warns(UserWarning, match="n_ctx: found 1024, and .*gpt2.gguf has learned 256 positions"):
        llm = Llama(path, **{**SIZES, "n_ctx": 1024})
    assert llm.n_ctx() == 256
    done = llm(PROMPT, max_tokens=600, temperature=0.0)
    assert done["usage"]["total_tokens"] == 257 and done["choices"][0]["finish_reason"] == "length"
    with pytest.raises(ValueError, match="exceed context window"):
        llm([1] * 300)
    llm.reset()
    with pytest.raises(RuntimeError, match="llama_decode returned -1"):
        llm.eval([1] * 300)
    llm.reset()
    assert len(list(itertools.islice(llm.generate([1] * 200, temp=0.0), 100))) == 57
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copy = pickle.loads(pickle.dumps(llm))
        assert copy.n_ctx() == Llama(path, n_threads=1, verbose=False).n_ctx() == 256


def test_embedding_of_a_text_beyond_the_learned_positions(tmp_path):
    """It is cut off, as one beyond n_batch is."""
    path = other_models.write_bert(tmp_path / "bert.gguf")
    with pytest.warns(UserWarning, match="has learned 256 positions"):
        llm = Llama(path, **{**SIZES, "n_ctx": 1024}, embedding=True)
    text = "hello world a different prompt " * 80
    found, n = llm.embed(text, return_count=True)
    assert n == 256 and np.isfinite(found).all()
    assert np.shape(llm.embed([text, "a", text])) == (3, 64)
    with pytest.raises(ValueError, match="exceed batch size of 256"):
        llm.embed(text, truncate=False)


@pytest.mark.parametrize("n_past", [-1, 256, 10**20, 1.5])
def test_position_that_the_context_does_not_have(llm, n_past):
    with pytest.raises(ValueError, match="n_past"):
        llm.decode([1], n_past=n_past)
    assert np.isfinite(llm.decode([1], n_past=0)).all()
    if n_past != 256:
        with pytest.raises(ValueError, match="n_past"):
            llm.rewind(n_past)


@pytest.mark.parametrize("token", [-1, 10**20, 1.5])
def test_a_token_to_decode_that_there_is_not(llm, token):
    with pytest.raises(ValueError, match="tokens: found"):
        llm.decode([1, token])


def test_a_sequence_at_negative_places_is_refused_by_llama_cpp(tiny):
    """What a slot's file of the server is read by: such tokens stayed in the cache for good."""
    llm = Llama(str(tiny.gguf_path), n_ctx=64, verbose=False)
    llm.eval([1, 2, 3])
    size = llama_cpp.llama_state_seq_get_size(llm.ctx, 0)
    data = (ctypes.c_uint8 * size)()
    assert llama_cpp.llama_state_seq_get_data(llm.ctx, data, size, 0) == size
    second = struct.pack("<ii", 1, 1)  # position, number of sequences
    assert bytes(data).count(second) == 1
    damaged = bytes(data).replace(second, struct.pack("<ii", -5, 1))
    assert llama_cpp.llama_state_seq_set_data(llm.ctx, (ctypes.c_uint8 * size)(*damaged), size, 0) == 0
    llm.reset()
    assert llama_cpp.llama_state_seq_set_data(llm.ctx, data, size, 0) == size


def test_embedding_leaves_nothing_cached(tiny):
    """llama-cpp-python empties the cache for it; tokens read before counted as there all the same."""
    llm = Llama(str(tiny.gguf_path), n_ctx=64, embedding=True, verbose=False)
    llm.eval([1, 2, 3])
    llm.embed("a b")
    assert llm.n_tokens == 0
    llm.load_state(llm.save_state())

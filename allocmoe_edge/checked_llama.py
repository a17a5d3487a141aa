"""`CheckedLlama`: llama-cpp-python's `Llama` with a check where a call would crash the process, or go wrong and say nothing.

What no check can catch is in docs/limits.md.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import os
import sys
import threading
from typing import Any, Callable, ContextManager, Generator, Iterator, List, Mapping, Optional, Sequence, Tuple, Union
import warnings

import numpy as np

from . import projector
from ._native import context_pointer, ffi, libggml_base, libllama, llama_cpp
from .gguf_file import GGUFFile, ranks
from .plan import shown
from .threads_and_forks import in_turn, keep_over_forks, turns
from .whole_numbers import MOST_INT32, MOST_THREADS, whole

internals = llama_cpp._internals

# llama.cpp loads a model with one, and ends the process at the first token: numbers, and what only products are computed with
_NO_CACHE_TYPES = tuple(
    getattr(llama_cpp, f"GGML_TYPE_{name}") for name in ("I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K")
)
# what ctypes would cut to 32 bits
_NUMBERS = {
    "seed": (-1, 2**32 - 1),
    "split_mode": (0, llama_cpp.LLAMA_SPLIT_MODE_TENSOR),
    "main_gpu": (-1, MOST_INT32),
    "rope_scaling_type": (-1, MOST_INT32),
    "attention_type": (-1, MOST_INT32),
    "yarn_orig_ctx": (0, MOST_INT32),
    "last_n_tokens_size": (-1, MOST_INT32),
}
_OPTIONAL = ("rope_scaling_type", "seed")
# and the least that they may be
_REALS = {
    **{"rope_freq_base": 0.0, "rope_freq_scale": 0.0, "lora_scale": -math.inf},
    **{f"yarn_{name}": -math.inf for name in ("ext_factor", "attn_factor", "beta_fast", "beta_slow")},
}
# enum llama_pooling_type
_POOLING_TYPES = range(-1, 5)
# llama.cpp makes every context a multiple of so many tokens
_CONTEXT_UNIT = 256


class GenerationError(RuntimeError):
    """What is being generated cannot go on: its tokens were forgotten or replaced since the last one was read."""


class _Gone:
    """Stands for what has been freed, so that its use is an error and no crash."""

    def __init__(self, why: str):
        self._why = why

    def __getattr__(self, name: str):
        raise RuntimeError(self._why)


_CLOSED = _Gone("this Llama has been closed")
_LOST_IN_FORK = _Gone(
    "this Llama was in use by another thread, or on a GPU, when the process was forked: load it anew in the child, or start "
    "the child with multiprocessing's method 'spawn'"
)
# our attributes that hold what close() frees, and theirs that point to it
_FREED = {"_model": ("model", "vocab"), "_ctx": ("ctx", "memory"), "_batch": ("batch",), "tokenizer_": ()}


class _Generation:
    """A generation in progress.

    n_tokens: read so far. n_verified: cached tokens up to that after which the last one was sampled. ended_by: the call after
    which it cannot go on.
    """

    def __init__(self) -> None:
        self.n_tokens = self.n_verified = 0
        self.ended_by: Optional[str] = None


class _Processors(llama_cpp.LogitsProcessorList):
    """llama-cpp-python adds one for a logit_bias, and goes on with what `extend` returns."""

    def extend(self, more):
        super().extend(more)
        return self


class _GrammarSampler(internals.LlamaSampler):  # type: ignore[name-defined]
    """A chain of samplers with a grammar, which is not told of a token that it does not allow: it would end the process."""

    def sample(self, ctx, idx: int = -1) -> int:
        if not hasattr(self, "_candidates"):
            self._candidates = internals.LlamaTokenDataArray(n_vocab=ctx.model.n_vocab())
        shape = (self._candidates.n_vocab,)
        self._candidates.copy_logits(np.ctypeslib.as_array(ctx.get_logits_ith(idx), shape))
        candidates = self._candidates.candidates
        candidates.selected = -1
        llama_cpp.llama_sampler_apply(self.sampler, candidates)
        if candidates.selected < 0 or candidates.data[candidates.selected].logit == -np.inf:
            raise ValueError("grammar: it allows none of the model's tokens here")
        token = candidates.data[candidates.selected].id
        self.accept(token)
        return token


class _Tokenizer(llama_cpp.LlamaTokenizer):
    """Of tokens that the vocabulary has, for any thread at any time."""

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = True) -> List[int]:
        # llama-cpp-python would begin with a buffer as long as the context that the file says the model was trained for
        n = len(text) + 8
        with self._model.vocab_in_use:
            vocab = self._model.vocab
            for _ in range(2):
                tokens = (llama_cpp.llama_token * n)()
                n = llama_cpp.llama_tokenize(vocab, text, len(text), tokens, n, add_bos, special)
                if n >= 0:
                    return tokens[:n]
                n = -n
        raise RuntimeError(f"llama.cpp cannot make tokens of {text[:60]!r}")

    def detokenize(self, tokens: List[int], prev_tokens: Optional[List[int]] = None, special: bool = False) -> bytes:
        with self._model.vocab_in_use:
            check_tokens(tokens, self._model.n_vocab())
            return super().detokenize(tokens, prev_tokens, special)


class _FileName(str):
    """Encoded as the system does: llama-cpp-python asks for UTF-8, which a file's name need not be."""

    def encode(self, *_: str) -> bytes:
        return super().encode(sys.getfilesystemencoding(), sys.getfilesystemencodeerrors())


class CheckedLlama(llama_cpp.Llama):
    """`llama_cpp.Llama`, checked. See `allocmoe_edge.Llama` for what may be called while a completion is being read."""

    n_tokens: int
    n_batch: int
    input_ids: Any
    _logits_all: bool
    lora_path: Optional[str]
    lora_base: Optional[str]
    tokenizer_: Any
    draft_model: Any
    # (begin, end) of the cached places that are no tokens, and the end of what eval() has evaluated
    _pictures: List[Tuple[int, int]] = []
    _end_of_text = 0
    _turn: Any  # a lock: held by the thread that works with the context
    _lora_adapter: Any
    _stack = contextlib.ExitStack()  # what __del__ closes, also where __init__ raises before it has its own
    _generation: Optional[_Generation] = None
    # what a logits processor has raised, until llama.cpp's call that ran it has returned
    _raised: Optional[BaseException] = None
    # "a step" of a generation, in which our methods are called by llama-cpp-python, or "a callback" of the user's in it
    _inside: Optional[str] = None

    def __new__(cls, *args: Any, **kwargs: Any):
        self = super().__new__(cls)
        self._turn = threading.RLock()
        return self

    def __init__(self, model_path: Union[str, os.PathLike], **kwargs: Any):
        for name in ("lora_path", "lora_base"):
            if kwargs.get(name) is not None:
                kwargs[name] = _FileName(os.fsdecode(kwargs[name]))
                if os.path.exists(kwargs[name]) and not os.path.isfile(kwargs[name]):  # a pipe would be waited for
                    raise ValueError(f"{name}: {kwargs[name]} is no file")
        n_ctx = kwargs.get("n_ctx", 0)
        # else llama-cpp-python keeps tokens for fewer places than the context has, and fails where a text goes beyond
        kwargs["n_ctx"] = -(-kwargs.get("n_ctx", 512) // _CONTEXT_UNIT) * _CONTEXT_UNIT
        self._pictures = []
        with _loading:
            libllama.allocmoe_take_first_error()
            try:
                super().__init__(_FileName(os.fsdecode(model_path)), **kwargs)
            except ValueError as error:
                why = ffi.string(libllama.allocmoe_take_first_error()).decode(errors="replace").strip()
                if not why or type(error) is not ValueError:
                    raise
                raise ValueError(f"{error}: {why}") from error
        if len(self.input_ids) < self.n_ctx():  # n_ctx=0: the model's own, which llama.cpp makes larger
            self.input_ids = np.ndarray((self.n_ctx(),), np.intc)
            if self._logits_all:
                self.scores = np.ndarray((self.n_ctx(), self.n_vocab()), np.single)
        self.model_path = os.fsdecode(model_path)
        if n_ctx > self.n_ctx():
            warnings.warn(
                f"n_ctx: found {n_ctx}, and {self.model_path} has learned {self.n_ctx()} positions: so long is the context",
                stacklevel=3,
            )
        self.n_batch = min(self.n_batch, self.n_ctx())  # by which embed() cuts texts off
        self.lora_path, self.lora_base = (path and str(path) for path in (self.lora_path, self.lora_base))
        # with a draft model llama-cpp-python computes and keeps the logits of prompts, too, and has no place for those of texts
        # longer than a batch
        self._logits_all = bool(kwargs.get("logits_all"))
        # for the vocabulary alone: no thread waits there while another generates
        self._model.vocab_in_use = threading.RLock()
        if type(self.tokenizer_) is llama_cpp.LlamaTokenizer:
            self.tokenizer_ = _Tokenizer(self)
        keep_over_forks(self)
        if self.lora_path and not self._lora_adapter:
            self._lora_adapter = None
            self.close()
            raise ValueError(f"lora_path: llama.cpp cannot use {kwargs['lora_path']} with this model")
        try:
            self._check_forgets(self.draft_model)
        except ValueError:
            self.close()
            raise

    def n_ctx(self) -> int:
        """Tokens that a text may have: of a model that has learned its positions one by one (BERT, GPT-2), no more than those."""
        n_ctx = super().n_ctx()
        return min(n_ctx, libllama.allocmoe_n_positions(context_pointer(self)) or n_ctx)

    def _need_weights(self, call: str) -> None:
        if self.model_params.vocab_only:
            raise RuntimeError(f"{call}: {self.model_path} was loaded with vocab_only, without weights to compute with")

    def _check_forgets(self, draft_model: Any) -> None:
        if draft_model is not None and not self.forgets:
            raise ValueError(
                f"draft_model: {self.model_path} cannot forget tokens, as a recurrent model cannot: it takes none"
            )

    @property
    def forgets(self) -> bool:
        """Whether the model's memory can forget the last tokens, as it has to for those that a draft model proposes in vain."""
        return not (self._is_recurrent or self._is_hybrid)

    # generation

    def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Iterator[int]:
        """As in `llama_cpp.Llama`; the newest generation is the one that goes on, and ends where the context is full.

        Raises:
            GenerationError: a call since the last token has forgotten or replaced what this generation goes on from.
            ValueError: there is no token to begin with, or a grammar that llama.cpp cannot use.
        """
        return turns(self._turn, self._generate(tokens, *args, **kwargs))

    def _generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Generator[int, Any, None]:
        call = _GENERATE.bind(self, tokens, *args, **kwargs)
        options = call.arguments
        tokens = options["tokens"] = list(tokens)
        reset = options.get("reset", True)
        if not tokens and (reset or not self.n_tokens):
            raise ValueError("the prompt has no tokens: there is nothing to go on from")
        if options.get("logits_processor"):
            options["logits_processor"] = [self._processor(process) for process in options["logits_processor"]]
        if options.get("stopping_criteria"):
            options["stopping_criteria"] = self._callback(options["stopping_criteria"])
        self._tokens_change("another generation")
        self._before_generation(reset)
        if reset and self.n_tokens and not self._remembers(tokens):
            self.reset()
            self._ctx.kv_cache_clear()
        generation = self._generation = _Generation()
        inner = super().generate(*call.args[1:], **call.kwargs)
        sent = None
        try:
            while True:
                before, self._inside = self._inside, "a step"
                try:
                    token = inner.send(sent)
                except StopIteration:
                    return
                finally:
                    self._inside = before
                generation.n_tokens += 1
                sent = yield token
                if generation.ended_by is not None:
                    raise GenerationError(
                        f"{generation.ended_by} since the last token was read: this generation cannot go on, start it again"
                    )
                if generation.n_verified >= self._n_ctx:
                    return  # no place for the token to be read at: llama.cpp would say no more than "returned 1"
        finally:
            inner.close()
            if self._generation is generation:
                self._forget_drafted()
                self._generation = None

    def _n_read(self) -> int:
        """Cached tokens but for those that a draft model has proposed beyond the one that was read last."""
        generation = self._generation
        if self.draft_model is None or generation is None or not generation.n_verified:
            return self.n_tokens
        return min(self.n_tokens, generation.n_verified)

    def _forget_drafted(self) -> None:
        """The tokens that `_n_read` leaves out are computed anew, if they come."""
        n_read = self._n_read()
        if n_read < self.n_tokens:
            self.n_tokens, self._requires_eval = n_read, True

    def _remembers(self, tokens: List[int]) -> bool:
        """Whether a text can go on from the cached tokens that it begins with. Of layers with a window of attention, what has left it
        may have been written over (swa_full=False); llama-cpp-python does not look."""
        if not self.forgets:  # a recurrent state: only its last place is there, and llama.cpp refuses any other
            return True
        n_window = llama_cpp.llama_model_n_swa(self.model)
        first = llama_cpp.llama_memory_seq_pos_min(self._ctx.memory, 0) if n_window and self.goes_on else 0
        if first <= 0:
            return True
        n = min(len(tokens), self.n_tokens)
        differ = np.flatnonzero(self.input_ids[:n] != tokens[:n])
        # the last token of a prompt is always read anew
        place = int(differ[0]) if len(differ) else min(n, len(tokens) - 1)
        return first <= max(0, place - n_window + 1)

    def _before_generation(self, reset: bool) -> None:
        """Called before a generation looks for a part of its prompt among the cached tokens."""

    def _processor(self, function: Callable) -> Callable:
        """A user's logits processor: it sees the text up to the token that is wanted, and nothing that a draft model proposes."""
        guarded = self._callback(function)

        def process(input_ids, logits):
            n_tokens = len(input_ids) if self._generation is None else self._generation.n_verified
            return guarded(input_ids[:n_tokens], logits)

        return process

    def _callback(self, function: Callable) -> Callable:
        """A user's function that runs inside a generation: it may not change what that goes on from."""

        def guarded(*args):
            with self._being_inside("a callback"):
                return function(*args)

        return guarded

    @contextlib.contextmanager
    def _being_inside(self, what: str) -> Iterator[None]:
        before, self._inside = self._inside, what
        try:
            yield
        finally:
            self._inside = before

    def _tokens_change(self, by: str) -> None:
        """Called before the cached tokens are forgotten or replaced: a generation in progress ends."""
        if self._inside == "a callback":
            raise GenerationError(f"{by} in a callback of a generation, which could not go on")
        if self._inside is None and self._generation is not None:
            self._forget_drafted()
            self._generation.ended_by, self._generation = by, None

    def _create_completion(self, *args: Any, **kwargs: Any):
        call = _COMPLETE.bind(self, *args, **kwargs)
        options = call.arguments
        if options.get("seed") is not None:
            whole("seed", options["seed"], *_NUMBERS["seed"])
        if options.get("logit_bias") is not None:
            _check_bias(options["logit_bias"], self.n_vocab())
            if options.get("logits_processor") is not None:
                options["logits_processor"] = _Processors(options["logits_processor"])
        parts = super()._create_completion(*call.args[1:], **call.kwargs)
        return turns(self._turn, self._complete(parts, bool(options.get("stream")), self._request()))

    def _complete(self, parts: Generator, stream: bool, request: ContextManager) -> Generator[Any, Any, None]:
        """The parts of one completion, the only one without `stream`; all of them are computed inside of `request`."""
        self._tokens_change("another generation")
        with request, contextlib.closing(parts):
            while True:
                with self._being_inside("a step"):
                    part = next(parts, None)
                if part is None or not stream:
                    break
                yield part
        if part is not None:
            yield part

    def _request(self) -> ContextManager:
        """What holds while the completion that is being asked for is computed, from its first part on."""
        return contextlib.nullcontext()

    @in_turn
    def create_chat_completion(self, *args: Any, **kwargs: Any):
        path = getattr(self.chat_handler, "clip_model_path", None)
        if path is not None and getattr(self.chat_handler, "mtmd_ctx", None) is None:
            projector.check(path)
        return super().create_chat_completion(*args, **kwargs)

    @in_turn
    def eval(self, tokens: Sequence[int]) -> None:
        """As in `llama_cpp.Llama`.

        Raises:
            ValueError: a token that the vocabulary does not have.
        """
        check_tokens(tokens, self._n_vocab)
        self._need_weights("eval")
        if not self.goes_on:
            raise RuntimeError("eval: this model has no memory of tokens before; embed() is what it is for")
        if self._inside != "a step":
            self._tokens_change("eval()")
        self._look_for_pictures()
        try:
            self._evaluate(tokens, self._is_drafted(tokens))
        except BaseException:  # Ctrl-C, too: the logits at hand may be of another token than the last one that counts
            self._requires_eval = True
            raise
        self._end_of_text = self.n_tokens

    def _evaluate(self, tokens: Sequence[int], drafted: bool) -> None:
        if not drafted:
            super().eval(tokens)
        elif not self.verifies:
            super().eval(tokens[:1])
        elif self._logits_all:
            super().eval(tokens[: self.n_batch])
        else:
            self._verify(tokens[: self.n_batch])

    def _look_for_pictures(self) -> None:
        """Notes the places that a chat handler has filled with the embeddings of a picture since the last tokens."""
        if self.n_tokens > self._end_of_text:
            self._pictures.append((self._end_of_text, self.n_tokens))
        elif self.n_tokens < self._end_of_text:
            kept = self.n_tokens
            self._pictures = [(begin, min(end, kept)) for begin, end in self._pictures if begin < kept]

    def without_pictures(self, input_ids: np.ndarray) -> np.ndarray:
        """Of the first cached tokens, and what is to follow them, those that are text: pictures have no tokens."""
        for begin, end in reversed(self._pictures):
            input_ids = np.delete(input_ids, slice(begin, end))
        return input_ids

    @property
    def goes_on(self) -> bool:
        """Whether the model has a memory of the tokens before, without which it cannot go on from a text."""
        return self._ctx.memory is not None

    @property
    def verifies(self) -> bool:
        """Whether tokens that are evaluated together are computed as one after the other, but for rounding."""
        return True

    def _is_drafted(self, tokens: Sequence[int]) -> bool:
        """Whether these are what a draft model has proposed, after the last token of the text."""
        generation = self._generation
        return self.draft_model is not None and generation is not None and generation.n_tokens > 0 and len(tokens) > 1

    def _verify(self, tokens: Sequence[int]) -> None:
        """`eval` of a few tokens with the logits of each, which are not kept."""
        self._ctx.kv_cache_seq_rm(-1, self.n_tokens, -1)
        self._batch.set_batch(batch=tokens, n_past=self.n_tokens, logits_all=True)
        self._ctx.decode(self._batch)
        self.input_ids[self.n_tokens : self.n_tokens + len(tokens)] = tokens
        self.n_tokens += len(tokens)
        self._requires_eval = False

    @in_turn
    def reset(self) -> None:
        self._tokens_change("reset()")
        super().reset()
        self._pictures, self._end_of_text = [], 0

    @in_turn
    def load_state(self, state) -> None:
        self._tokens_change("load_state()")
        super().load_state(state)
        self._pictures, self._end_of_text = [], self.n_tokens

    def set_seed(self, seed: int) -> None:
        """As in `llama_cpp.Llama`; -1 for a random one. Raises ValueError for what is no seed."""
        if self._inside is None:  # llama-cpp-python draws one for a completion, of which 2**32 is
            whole("seed", seed, *_NUMBERS["seed"])
        super().set_seed(seed)

    @in_turn
    def sample(self, *args: Any, **kwargs: Any) -> int:
        """As in `llama_cpp.Llama`.

        Raises:
            RuntimeError: there are no logits to sample from.
            ValueError: a grammar that llama.cpp cannot use.
            Exception: whatever a logits processor has raised.
        """
        idx = kwargs.get("idx", args[_IDX] if len(args) > _IDX else None)
        at = -1 if idx is None else idx - self.n_tokens
        generation = self._generation if self._inside == "a step" else None
        # the last token of a step has just been evaluated
        is_new = generation is not None and generation.n_tokens > 0 and at == -1
        if not is_new and not (self.n_tokens and llama_cpp.llama_get_logits_ith(self.ctx, at)):
            raise RuntimeError("no logits to sample from: evaluate a token first")
        if generation is not None and idx is not None:
            generation.n_verified = idx + 1
        self._raised = None
        try:
            return super().sample(*args, **kwargs)
        finally:
            error, self._raised = self._raised, None
            if error is not None:
                raise error

    def _init_sampler(self, *args: Any, **kwargs: Any):
        grammar = kwargs.get("grammar")
        if grammar is not None:
            self.check_grammar(grammar)
        sampler = super()._init_sampler(*args, **kwargs)
        for _, custom in sampler.custom_samplers:
            custom.apply_func = self._keeping_error(custom.apply_func)
        if grammar is not None:
            sampler.__class__ = _GrammarSampler
        return sampler

    def _keeping_error(self, function: Callable) -> Callable:
        """A function that llama.cpp calls, through which no exception can pass: `sample` raises it."""

        def guarded(*args):
            try:
                function(*args)
            except BaseException as error:
                self._raised = error

        return guarded

    def check_grammar(self, grammar: Union[str, llama_cpp.LlamaGrammar]) -> None:
        """Raises ValueError for a grammar (GBNF, or `LlamaGrammar`) that llama.cpp cannot use."""
        text, root = (grammar, "root") if isinstance(grammar, str) else (grammar._grammar, grammar._root)
        vocab = llama_cpp.llama_model_get_vocab(self.model)
        sampler = llama_cpp.llama_sampler_init_grammar(vocab, text.encode(), root.encode())
        if not sampler:
            start = " ".join(text.split())[:60]
            raise ValueError(f"grammar: llama.cpp cannot use it (its reason is on stderr); it begins {start!r}")
        llama_cpp.llama_sampler_free(sampler)

    # tokens

    def tokenizer(self) -> llama_cpp.LlamaTokenizer:
        """As in `llama_cpp.Llama`; it refuses tokens that the vocabulary does not have with a ValueError."""
        return _Tokenizer(self)

    # embeddings

    @in_turn
    def embed(self, input: Union[str, List[str]], normalize=False, truncate=True, return_count=False):
        """As in `llama_cpp.Llama`, also for several texts without pooling; with LLAMA_POOLING_TYPE_RANK a text's scores alone.

        Raises:
            ValueError: a text without a token.
        """
        self._need_weights("embed")
        self._tokens_change("embed()")
        texts = [input] if isinstance(input, str) else list(input)
        for text in texts:
            if not self.tokenize(text.encode()):
                raise ValueError(f"embed: the text {text!r} has no tokens")
        self.reset()  # llama-cpp-python empties the cache of what has been read before
        if self.pooling_type() == llama_cpp.LLAMA_POOLING_TYPE_RANK:
            n_scores = llama_cpp.llama_model_n_cls_out(self._model.model)
            self.n_embd = lambda: n_scores  # type: ignore[method-assign]  # it would read as many floats as a text has
            try:
                return super().embed(input, normalize, truncate, return_count)
            finally:
                del self.n_embd
        if isinstance(input, str) or self.pooling_type() != llama_cpp.LLAMA_POOLING_TYPE_NONE:
            return super().embed(input, normalize, truncate, return_count)
        # without pooling llama-cpp-python mistakes tokens for values where it looks for the second text
        parts = [super(CheckedLlama, self).embed(text, normalize, truncate, True) for text in texts]
        embeddings, count = [part for part, _ in parts], sum(n for _, n in parts)
        return (embeddings, count) if return_count else embeddings

    # the end

    @in_turn
    def close(self) -> None:
        """Frees the model, when what another thread does with it has ended. What is called afterwards raises a RuntimeError."""
        model = self.__dict__.get("_model")
        if isinstance(model, _Gone):
            return
        self._tokens_change("close()")
        with getattr(model, "vocab_in_use", contextlib.nullcontext()):
            self._sampler = None  # it refers to the vocabulary
            super().close()
            self._replace_freed(_CLOSED)

    def _replace_freed(self, gone: _Gone) -> None:
        for owner, names in _FREED.items():
            freed = self.__dict__.get(owner)
            if freed is not None:
                for name in names:  # others hold the same object: a tokenizer, a chat handler
                    setattr(freed, name, gone)
                setattr(self, owner, gone)

    def __getstate__(self):
        return {**super().__getstate__(), "n_ctx": self.n_ctx()}

    def forked(self) -> None:
        """Called in the child after a fork: a model that cannot be used there says so."""
        if isinstance(self._model, _Gone):
            return
        self._model.vocab_in_use = threading.RLock()
        if self._turn.acquire(blocking=False):
            self._turn.release()
            if not llama_cpp.llama_supports_gpu_offload():
                return
        self._turn = threading.RLock()
        self._sampler = self._generation = self._inside = None
        for stack in (self._stack, *(part._exit_stack for part in (self._model, self._ctx, self._batch))):
            stack.pop_all()  # nothing is freed: it is the parent's thread that was at it, or the parent's device
        self._replace_freed(_LOST_IN_FORK)
        getattr(self.draft_model, "forked", lambda: None)()


_GENERATE = inspect.signature(llama_cpp.Llama.generate)
# the place of `idx` among the arguments of `sample`
_IDX = list(inspect.signature(llama_cpp.Llama.sample).parameters).index("idx") - 1
_COMPLETE = inspect.signature(llama_cpp.Llama._create_completion)
# llama-cpp-python turns the whole process's stdout and stderr away and back while it loads: one at a time, or they stay away
_loading = threading.RLock()


def check_tokens(tokens: Sequence[int], n_vocab: int) -> None:
    """Refuses tokens that the vocabulary does not have. Raises ValueError."""
    if not len(tokens) or {*map(type, tokens)} == {int} and min(tokens) >= 0 and max(tokens) < n_vocab:
        return  # llama-cpp-python makes text of all tokens so far at each further one
    want = f"0 to {n_vocab - 1}, the vocabulary's"
    for token in tokens:
        whole("tokens", token, 0, n_vocab - 1, want)


def _check_bias(bias: Any, n_vocab: int) -> None:
    """Refuses what llama-cpp-python would pass over in silence. Raises ValueError."""
    if not isinstance(bias, Mapping):
        raise ValueError(f"logit_bias: found {bias!r}, want a dict of tokens and numbers")
    for token, value in bias.items():
        try:
            fits = 0 <= int(token) < n_vocab
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            fits, number = False, math.nan
        if not fits or math.isnan(number):
            raise ValueError(
                f"logit_bias: found {token!r}: {value!r}, want tokens from 0 to {n_vocab - 1}, the vocabulary's, and numbers"
            )


def check_arguments(kwargs: dict) -> None:
    """Refuses what llama.cpp or llama-cpp-python would crash on. Raises ValueError."""
    overrides = kwargs.get("kv_overrides")
    if overrides is not None and not (isinstance(overrides, dict) and all(isinstance(key, str) for key in overrides)):
        raise ValueError(f"kv_overrides: found {overrides!r}, want a dict of keys and values")
    numa = kwargs.get("numa", False)
    if not (isinstance(numa, int) and 0 <= numa < llama_cpp.GGML_NUMA_STRATEGY_COUNT):
        raise ValueError(f"numa: found {numa!r}, want True, False or one of llama_cpp.GGML_NUMA_STRATEGY_*")
    for name in ("n_threads", "n_threads_batch"):
        whole(name, kwargs.get(name) or 1, 1, MOST_THREADS)
    for name, least in (("n_ctx", 0), ("n_batch", 1), ("n_ubatch", 1)):
        whole(name, kwargs.get(name, least), least)
    for name, (least, most) in _NUMBERS.items():
        if name in kwargs and not (kwargs[name] is None and name in _OPTIONAL):
            whole(name, kwargs[name], least, most)
    for name, lowest in _REALS.items():
        try:
            fits = math.isfinite(kwargs.get(name, 0.0)) and kwargs.get(name, 0.0) >= lowest
        except (TypeError, ValueError, OverflowError):
            fits = False
        if not fits:
            want = "a number" if lowest < 0 else f"a number from {lowest:g} on"
            raise ValueError(f"{name}: found {shown(kwargs[name])}, want {want}")
    for name in ("type_k", "type_v"):
        value = kwargs.get(name)
        if value is None:
            continue
        # a type that ggml has given up is still a number, of blocks of no size
        if not (
            isinstance(value, int) and 0 <= value < llama_cpp.GGML_TYPE_COUNT and libggml_base.ggml_blck_size(value)
        ):
            raise ValueError(f"{name}: found {value!r}, want one of llama_cpp.GGML_TYPE_*")
        if value in _NO_CACHE_TYPES:
            raise ValueError(f"{name}: found {value!r}, a type that no key-value cache can have")
    if not isinstance(kwargs.get("flash_attn"), (bool, type(None))):
        raise ValueError(f"flash_attn: found {kwargs['flash_attn']!r}, want True, False or None")
    pooling = kwargs.get("pooling_type", -1)
    if pooling not in _POOLING_TYPES:
        raise ValueError(f"pooling_type: found {pooling!r}, want one of llama_cpp.LLAMA_POOLING_TYPE_*")


def check_pooling(path: Union[str, os.PathLike], kwargs: dict) -> None:
    """Refuses scores (LLAMA_POOLING_TYPE_RANK) of a model that makes none: they would be what a buffer held; and a mean over tokens
    where a micro-batch has no place for a token of each text. Raises ValueError."""
    if not kwargs.get("embedding"):
        return
    pooling = kwargs.get("pooling_type", llama_cpp.LLAMA_POOLING_TYPE_UNSPECIFIED)
    if pooling == llama_cpp.LLAMA_POOLING_TYPE_UNSPECIFIED:
        with GGUFFile(path) as file:
            pooling = file.get(f"{file.get('general.architecture')}.pooling_type")
    if pooling == llama_cpp.LLAMA_POOLING_TYPE_RANK and not ranks(path):
        raise ValueError(f"pooling_type: found {pooling}, scores, and {path} is no reranker: it has no tensors cls.*")
    n_batch = min(kwargs.get("n_batch", 512), kwargs.get("n_ctx", 512) or MOST_INT32)
    n_texts = min(n_batch, llama_cpp.llama_max_parallel_sequences())
    if pooling == llama_cpp.LLAMA_POOLING_TYPE_MEAN and kwargs.get("n_ubatch", 512) < n_texts:
        raise ValueError(
            f"n_ubatch: found {kwargs['n_ubatch']}, want at least {n_texts} for means over tokens (pooling_type), of so many texts "
            f"at once; or an n_batch of {kwargs['n_ubatch']}"
        )


def check_cache_types(path: Union[str, os.PathLike], kwargs: dict) -> None:
    """Refuses types of the key-value cache that the model cannot have: quantised ones that its heads do not fit into, or that need flash
    attention, and different ones under latent attention. Raises ValueError."""
    default = llama_cpp.GGML_TYPE_F16
    kinds = {name: default if kwargs.get(name) is None else kwargs[name] for name in ("type_k", "type_v")}
    quantised = {name: kind for name, kind in kinds.items() if libggml_base.ggml_is_quantized(kind)}
    for name, kind in quantised.items():
        if libggml_base.ggml_blck_size(kind) > 32:
            raise ValueError(f"{name}: found {kind}, want a type of blocks of 32 values at most")
    if "type_v" in quantised and not kwargs.get("flash_attn"):
        raise ValueError(f"type_v: found {quantised['type_v']}, a quantised type, which needs flash_attn=True")
    if {*kinds.values()} == {default}:
        return
    with GGUFFile(path) as file:
        arch = file.get("general.architecture")
        latent = file.get(f"{arch}.attention.key_length_mla") or arch == "deepseek4"
        if latent and kinds["type_k"] != kinds["type_v"]:
            raise ValueError(
                f"type_v: found {kinds['type_v']}, want {kinds['type_k']}, that of type_k, since {path} has latent attention"
            )
        if not kwargs.get("flash_attn"):
            return
        # of each layer, or of all; the first one's is what llama.cpp goes by
        heads = np.ravel(file.get(f"{arch}.attention.head_count", 0))
        n_head = int(heads[0]) if heads.size and heads.dtype.kind in "iu" else 0
        n_embd = file.get(f"{arch}.embedding_length")
        even = n_embd // n_head if isinstance(n_embd, int) and n_head > 0 else 0
        for name, kind in quantised.items():
            key = f"{arch}.attention.{'key' if name == 'type_k' else 'value'}_length"
            block, size = libggml_base.ggml_blck_size(kind), file.get(key, even)
            for width in (size, file.get(f"{key}_swa", size)):
                if isinstance(width, int) and width % block:
                    raise ValueError(
                        f"{name}: found {kind}, a type of blocks of {block} values, and a head of {path} has {width}"
                    )

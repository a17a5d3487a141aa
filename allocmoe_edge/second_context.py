"""Another context of a loaded model: the same weights, a cache and a budget of its own."""

from __future__ import annotations

from typing import Optional, Sequence

import numpy as np

from ._native import llama_cpp
from .checked_llama import check_tokens
from .whole_numbers import MOST_THREADS, whole

internals = llama_cpp._internals


class SecondContext:
    """A context beside that of a `Llama`, with its sizes. Frees itself before the model; not for two threads at a time.

    Args:
        llm: whose model it is of.
        n_threads: None for as many as that has.

    Raises:
        ValueError: llama.cpp cannot make it, for instance for lack of memory, or with so many threads.
    """

    def __init__(self, llm: llama_cpp.Llama, n_threads: Optional[int] = None):
        params = type(llm.context_params).from_buffer_copy(llm.context_params)
        if n_threads is not None:
            n_threads = whole("n_threads", n_threads, 1, MOST_THREADS)
            params.n_threads = params.n_threads_batch = n_threads
        self._context = internals.LlamaContext(model=llm._model, params=params, verbose=llm.verbose)
        self.n_batch, self._n_vocab = llm.n_batch, llm.n_vocab()
        self._batch = internals.LlamaBatch(n_tokens=self.n_batch, embd=0, n_seq_max=1, verbose=llm.verbose)

    @property
    def ctx(self):
        """`llama_context *`, for the functions of llama.cpp and ours."""
        return self._context.ctx

    def n_ctx(self) -> int:
        return self._context.n_ctx()

    def n_vocab(self) -> int:
        return self._n_vocab

    def decode(self, tokens: Sequence[int], n_past: int = 0) -> np.ndarray:
        """As `Llama.decode` for the last token: float32 [1, n_vocab], overwritten by the next call.

        Raises:
            ValueError: there are no tokens, more than n_batch, one that the vocabulary does not have, or an n_past beyond the context.
            RuntimeError: it is closed, as it is with the model; or llama.cpp cannot evaluate them.
        """
        if self.ctx is None:
            raise RuntimeError("this SecondContext has been closed, or its Llama")
        if not 0 < len(tokens) <= self.n_batch:  # llama-cpp-python would write beside the batch
            raise ValueError(f"tokens: found {len(tokens)}, want 1 to {self.n_batch} (n_batch)")
        check_tokens(tokens, self._n_vocab)
        n_past = whole("n_past", n_past, 0, self.n_ctx() - 1)
        self._context.kv_cache_seq_rm(0, n_past, -1)
        self._batch.set_batch(batch=tokens, n_past=n_past, logits_all=False)
        self._context.decode(self._batch)
        return np.ctypeslib.as_array(self._context.get_logits(), (1, self._n_vocab))

    def close(self) -> None:
        self._context.close()
        self._batch.close()

    def forked(self) -> None:
        """In the child of a fork that cannot use its parent's memory: nothing is freed."""
        for part in (self._context, self._batch):
            part._exit_stack.pop_all()

"""Documents that the model writes itself, side by side: a token of each takes little longer than a token of one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Callable, List

from allocmoe_edge import Llama
from allocmoe_edge._native import ffi, libllama, llama_cpp, silent
import numpy as np

from . import CalibrationError, ConvertError

_TOP_P = 0.95


def write_documents(
    llm: Llama, start: int, n_max: int, n_tokens: int, seed: int, n_seq: int, progress: Callable[[], object]
) -> List[List[int]]:
    """Samples documents at temperature 1, top-p 0.95 and the model's own expert counts, n_seq at any time: where one ends,
    the next begins.

    They are written in a context of their own, beside that of `llm`, which it leaves as it is. The same arguments give the
    same documents; with other neighbours a document's probabilities can be others in their last bits.

    Args:
        start: the token before each document, which is not part of it.
        n_max: tokens of a document at most; it ends before where the model ends it, and the last ones where there are enough.
        n_tokens: of all documents together.
        seed: of the first document; each further one takes the next.
        progress: called after each token.

    Returns:
        Token ids by seed, without the token that ends a document.

    Raises:
        ConvertError: no memory for the context, llama.cpp cannot run the model, or the model ends its documents before they
            begin.
        CalibrationError: it computes NaN or infinity.
    """
    vocab, n_vocab = llama_cpp.llama_model_get_vocab(llm.model), llm.n_vocab()
    documents: List[List[int]] = []
    generators: List[np.random.Generator] = []

    def begin() -> int:
        documents.append([start])
        generators.append(np.random.default_rng(seed + len(generators)))
        return len(documents) - 1

    with ExitStack() as stack:
        context = _context(llm, n_seq, n_max + 1, stack)
        batch = llama_cpp.llama_batch_init(n_seq, 0, 1)
        stack.callback(llama_cpp.llama_batch_free, batch)
        samplers = stack.enter_context(ThreadPoolExecutor(llm.n_threads))
        live = [begin() for _ in range(n_seq)]
        while True:
            _fill(batch, live, documents)
            if llama_cpp.llama_decode(context, batch):
                raise ConvertError("llama.cpp could not run the model on the calibration text that it writes")
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (n_seq, n_vocab))
            sampled = list(samplers.map(sample, logits, [generators[i] for i in live]))
            for seq, (i, token) in enumerate(zip(live, sampled)):
                ended = llama_cpp.llama_vocab_is_eog(vocab, token)
                if not ended:
                    documents[i].append(token)
                    progress()
                    n_tokens -= 1
                    if n_tokens == 0:
                        return [tokens[1:] for tokens in documents]
                if ended or len(documents[i]) > n_max:
                    llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(context), seq, -1, -1)
                    live[seq] = begin()
            if len(documents) > n_seq + 64 and sum(map(len, documents)) < 2 * len(documents):
                raise ConvertError("the model writes no text of its own: give calibration text with --calib")


def sample(logits: np.ndarray, rng: np.random.Generator) -> int:
    """A token by its probability, of those likeliest ones that together first have _TOP_P of it.

    Drawn of all tokens until it is one of them: to sort a vocabulary takes longer than a small model does for a token.

    Args:
        logits: float32, shape [n_vocab].

    Raises:
        CalibrationError: they hold NaN or infinity.
    """
    with np.errstate(all="ignore"):  # what comes of it is looked at
        p = np.exp(logits - logits.max())
        sums = np.cumsum(p, dtype=np.float64)
    if not np.isfinite(sums[-1]):
        raise CalibrationError("the model's own predictions are not finite", finite=False)
    while True:
        token = int(np.searchsorted(sums, rng.random() * sums[-1], side="right"))
        if p[p > p[token]].sum(dtype=np.float64) < _TOP_P * sums[-1]:
            return token


def _context(llm: Llama, n_seq: int, n_tokens: int, stack: ExitStack):
    """A llama_context for so many sequences of so many tokens, freed with the stack."""
    params = llama_cpp.llama_context_params.from_buffer_copy(llm.context_params)
    params.n_seq_max, params.n_ctx = n_seq, n_seq * n_tokens
    params.n_batch = params.n_ubatch = n_seq
    # else every sequence gets room for a multiple of 256 tokens
    params.kv_unified = True
    cache = params.type_k, params.type_v, params.flash_attn_type
    # half the memory, which is what so many sequences take; not every model can
    params.type_k = params.type_v = llama_cpp.GGML_TYPE_Q8_0
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO
    with silent():
        context = llama_cpp.llama_init_from_model(llm.model, params)
    if not context:
        params.type_k, params.type_v, params.flash_attn_type = cache
        context = llama_cpp.llama_init_from_model(llm.model, params)
    if not context:
        raise ConvertError("no memory for the context in which the model writes its calibration text")
    stack.callback(llama_cpp.llama_free, context)
    libllama.allocmoe_clear_plan(ffi.cast("struct llama_context *", context))
    return context


def _fill(batch, live: List[int], documents: List[List[int]]) -> None:
    """The last token of each document that goes on, by sequence."""
    batch.n_tokens = len(live)
    for seq, i in enumerate(live):
        batch.token[seq], batch.pos[seq] = documents[i][-1], len(documents[i]) - 1
        batch.n_seq_id[seq], batch.seq_id[seq][0] = 1, seq
        batch.logits[seq] = True

"""Documents that the model writes itself, side by side: a token of each takes little longer than a token of one."""

from __future__ import annotations

from contextlib import ExitStack
import ctypes
from typing import Callable, List, Sequence

from allocmoe_edge import Llama
from allocmoe_edge._native import ffi, libllama, llama_cpp
import numpy as np

from . import CalibrationError, ConvertError


def write_documents(
    llm: Llama, start: int, n_max: int, seeds: Sequence[int], progress: Callable[[], object]
) -> List[List[int]]:
    """Samples a document for each seed, at temperature 1, top-p 0.95 and the model's own expert counts.

    They are written in a context of their own, beside that of `llm`, which it leaves as it is. The same seeds give the
    same documents; with other neighbours a document's probabilities can be others in their last bits.

    Args:
        start: the token before each document, which is not part of it.
        n_max: tokens of a document at most; it ends before where the model ends it.
        progress: called after each token.

    Returns:
        Token ids by seed, without the token that ends a document.

    Raises:
        ConvertError: no memory for the context, or llama.cpp cannot run the model.
        CalibrationError: the model computes NaN or infinity.
    """
    vocab, n_vocab = llama_cpp.llama_model_get_vocab(llm.model), llm.n_vocab()
    documents: List[List[int]] = [[start] for _ in seeds]
    with ExitStack() as stack:
        context = _context(llm, len(seeds), n_max + 1, stack)
        batch = llama_cpp.llama_batch_init(len(seeds), 0, 1)
        stack.callback(llama_cpp.llama_batch_free, batch)
        samplers = [_sampler(seed, stack) for seed in seeds]
        live = list(range(len(seeds)))
        while live:
            _fill(batch, live, documents)
            if llama_cpp.llama_decode(context, batch):
                raise ConvertError("llama.cpp could not run the model on the calibration text that it writes")
            going_on = []
            for row, i in enumerate(live):
                token = llama_cpp.llama_sampler_sample(samplers[i], context, row)
                ended = llama_cpp.llama_vocab_is_eog(vocab, token)
                if not ended:
                    documents[i].append(token)
                    progress()
                if not ended and len(documents[i]) <= n_max:
                    going_on.append(i)
                # a sampler takes any token where there is no number to go by, and what is NaN once is so to the end
                elif not _finite(context, row, n_vocab):
                    raise CalibrationError("the model's own predictions are not finite", finite=False)
            live = going_on
    return [tokens[1:] for tokens in documents]


def _context(llm: Llama, n_seq: int, n_tokens: int, stack: ExitStack):
    """A llama_context for so many sequences of so many tokens, freed with the stack."""
    params = llama_cpp.llama_context_params.from_buffer_copy(llm.context_params)
    params.n_seq_max, params.n_ctx = n_seq, n_seq * n_tokens
    params.n_batch = params.n_ubatch = n_seq
    context = llama_cpp.llama_init_from_model(llm.model, params)
    if not context:
        raise ConvertError("no memory for the context in which the model writes its calibration text")
    stack.callback(llama_cpp.llama_free, context)
    libllama.allocmoe_clear_plan(ffi.cast("struct llama_context *", context))
    return context


def _sampler(seed: int, stack: ExitStack) -> ctypes.c_void_p:
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
    stack.callback(llama_cpp.llama_sampler_free, chain)  # and what is added to it
    llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_top_p(0.95, 1))
    llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_dist(seed))
    return chain


def _fill(batch, live: List[int], documents: List[List[int]]) -> None:
    """The last token of each document that goes on."""
    batch.n_tokens = len(live)
    for row, i in enumerate(live):
        batch.token[row], batch.pos[row] = documents[i][-1], len(documents[i]) - 1
        batch.n_seq_id[row], batch.seq_id[row][0] = 1, i
        batch.logits[row] = True


def _finite(context, row: int, n_vocab: int) -> bool:
    logits = llama_cpp.llama_get_logits_ith(context, row)
    return bool(np.isfinite(np.ctypeslib.as_array(logits, (n_vocab,))).all())

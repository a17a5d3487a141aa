"""Documents that the model writes itself, several side by side: a token of each costs little more than a token of one."""

from __future__ import annotations

from contextlib import ExitStack
import ctypes
from typing import Callable, Iterator, NamedTuple

from allocmoe_edge import Llama
from allocmoe_edge._native import ffi, libllama, llama_cpp

from . import ConvertError

# documents that are written at a time; the context has as many places for each as the longest may need
_PARALLEL = 16


class _Document(NamedTuple):
    number: int
    tokens: list
    sampler: ctypes.c_void_p


def documents(llm: Llama, numbers: Iterator[int], start: int, n_max: int, seed: int, progress: Callable[[], object]):
    """Samples documents at temperature 1, top-p 0.95, at the model's own expert counts, in a context of their own.

    The text of a document depends on its seed, and in the last bits of its probabilities on its neighbours, so the same
    call gives the same documents.

    Args:
        numbers: of the documents, taken one by one as there is room; the seed of each is `seed` and its number.
        start: the token before each document, which is not part of it.
        n_max: tokens of a document at most; it ends before where the model ends it.
        progress: called after each token.

    Yields:
        (number, tokens), as documents end: ints, without the token that ends them.

    Raises:
        ConvertError: no memory for the context, or the model cannot be run.
    """
    params = llm.context_params
    own = llama_cpp.llama_context_params.from_buffer_copy(params)
    own.n_seq_max = _PARALLEL
    own.n_ctx = _PARALLEL * (n_max + 1)
    own.n_batch = own.n_ubatch = _PARALLEL
    vocab = llama_cpp.llama_model_get_vocab(llm.model)
    with ExitStack() as stack:
        context = llama_cpp.llama_init_from_model(llm.model, own)
        if not context:
            raise ConvertError("no memory for the context in which the model writes its calibration text")
        stack.callback(llama_cpp.llama_free, context)
        libllama.allocmoe_clear_plan(ffi.cast("struct llama_context *", context))
        batch = llama_cpp.llama_batch_init(_PARALLEL, 0, 1)
        stack.callback(llama_cpp.llama_batch_free, batch)
        places: list = [None] * _PARALLEL
        stack.callback(lambda: [llama_cpp.llama_sampler_free(d.sampler) for d in places if d is not None])
        while True:
            for place in range(_PARALLEL):
                if places[place] is None and (number := next(numbers, None)) is not None:
                    llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(context), place, -1, -1)
                    places[place] = _Document(number, [start], _sampler(seed + number))
            live = [place for place in range(_PARALLEL) if places[place] is not None]
            if not live:
                return
            _fill(batch, [(place, places[place].tokens) for place in live])
            if llama_cpp.llama_decode(context, batch):
                raise ConvertError("the model could not be run on the calibration text that it writes")
            for row, place in enumerate(live):
                number, tokens, sampler = places[place]
                token = llama_cpp.llama_sampler_sample(sampler, context, row)
                ended = llama_cpp.llama_vocab_is_eog(vocab, token)
                if not ended:
                    tokens.append(token)
                    progress()
                if ended or len(tokens) > n_max:
                    llama_cpp.llama_sampler_free(sampler)
                    places[place] = None
                    yield number, tokens[1:]


def _sampler(seed: int) -> ctypes.c_void_p:
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
    llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_top_p(0.95, 1))
    llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_dist(seed))
    return chain


def _fill(batch, last: list) -> None:
    """The last token of each document, at its place."""
    batch.n_tokens = len(last)
    for row, (place, tokens) in enumerate(last):
        batch.token[row] = tokens[-1]
        batch.pos[row] = len(tokens) - 1
        batch.n_seq_id[row] = 1
        batch.seq_id[row][0] = place
        batch.logits[row] = True

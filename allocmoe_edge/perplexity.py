"""Perplexity of a text under the plan in force, computed by the runtime itself."""

from __future__ import annotations

from typing import Callable, Optional

import numpy as np

from ._native import llama_cpp

# rows of logits turned into probabilities at a time: keeps the float32 temporaries in cache
_ROWS = 16


def windows(tokens: np.ndarray, n_ctx: int, bos: Optional[int] = None) -> np.ndarray:
    """Cuts a text into windows that are evaluated independently.

    Args:
        tokens: int token ids, shape [n].
        n_ctx: length of a window, the beginning-of-sequence token included.
        bos: token put before each window; None for models that use none.

    Returns:
        int32, shape [n_windows, n_ctx]; a rest shorter than a window is dropped.
    """
    body = n_ctx - (bos is not None)
    n = len(tokens) // body
    cut = np.asarray(tokens[: n * body], np.int32).reshape(n, body)
    return cut if bos is None else np.concatenate([np.full((n, 1), bos, np.int32), cut], axis=1)


def negative_log_likelihood(llm, token_windows: np.ndarray, progress: Optional[Callable[[], None]] = None) -> np.ndarray:
    """Negative log-likelihood of every token but the first of each window.

    Args:
        llm: an `allocmoe_edge.Llama` with n_ctx of at least the window's length. Its cache is cleared.
        token_windows: int32, shape [n_windows, n_ctx].
        progress: called after each window.

    Returns:
        float64, shape [n_windows, n_ctx - 1], in nats.
    """
    out = np.empty((token_windows.shape[0], token_windows.shape[1] - 1))
    for i, window in enumerate(token_windows):
        llm._drop_cache()
        row = 0
        for start in range(0, len(window), llm.n_batch):
            batch = window[start : start + llm.n_batch]
            llm._batch.set_batch(batch=batch.tolist(), n_past=start, logits_all=True)
            llm._ctx.decode(llm._batch)
            logits = np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(len(batch), llm.n_vocab()))
            targets = window[start + 1 : start + len(batch) + 1]
            out[i, row : row + len(targets)] = _nll(logits[: len(targets)], targets)
            row += len(targets)
        if progress is not None:
            progress()
    llm._ctx.kv_cache_clear()
    return out


def perplexity(llm, token_windows: np.ndarray) -> float:
    """exp of the mean negative log-likelihood over all scored tokens of the windows."""
    return float(np.exp(negative_log_likelihood(llm, token_windows).mean()))


def bos_token(llm) -> Optional[int]:
    """The token that the model expects before a text, None if it expects none."""
    add = llama_cpp.llama_vocab_get_add_bos(llm._model.vocab)
    return llm.token_bos() if add and llm.token_bos() >= 0 else None


def _nll(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    nll = np.empty(len(targets))
    for start in range(0, len(targets), _ROWS):
        rows = logits[start : start + _ROWS]
        top = rows.max(axis=1, keepdims=True)
        log_sum = np.log(np.exp(rows - top).sum(axis=1, dtype=np.float64)) + top[:, 0]
        nll[start : start + _ROWS] = log_sum - rows[np.arange(len(rows)), targets[start : start + _ROWS]]
    return nll

"""Perplexity of a text under the plan in force, and divergence from the full model, computed by the runtime itself."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, Iterator, Optional, Tuple

import numpy as np

from .._native import llama_cpp

# a text is read up to this size: more than any measurement needs, and quick to tokenize
_MAX_BYTES = 8 << 20
# rows of logits turned into probabilities at a time: keeps the float32 temporaries in cache
_ROWS = 8


def read_tokens(llm, path: Path) -> np.ndarray:
    """Token ids of a UTF-8 text file, or of the first 8 MiB of it; int32, shape [n].

    Raises:
        ValueError: as `read_text`.
    """
    return np.array(llm.tokenize(read_text(path), add_bos=False, special=False), np.int32)


def read_text(path: Path) -> bytes:
    """A UTF-8 text file, or the first 8 MiB of it.

    Raises:
        ValueError: the file cannot be read or is not text; says which file.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_BYTES)
    except OSError as error:
        raise ValueError(f"text {path}: {error.strerror}") from None
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        # a character cut in two by the limit is no fault of the file
        if error.start < len(data) - 4:
            raise ValueError(f"text {path}: not UTF-8 text (byte {error.start})") from None
        data = data[: error.start]
    return data


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


def negative_log_likelihood(
    llm, token_windows: np.ndarray, progress: Optional[Callable[[], object]] = None
) -> np.ndarray:
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
        for rows, logits, targets in _run(llm, window):
            out[i, rows] = _by_rows(llm, len(targets), lambda part: nll_of(logits[part], targets[part])[0])
        if progress is not None:
            progress()
    llm.clear_cache()
    return out


def evaluate(llm, token_windows: np.ndarray, progress: Optional[Callable[[], object]] = None) -> None:
    """Runs the windows as `negative_log_likelihood` does, for what the runtime counts or records on the way."""
    for window in token_windows:
        for _ in _run(llm, window):
            pass
        if progress is not None:
            progress()
    llm.clear_cache()


def perplexity(llm, token_windows: np.ndarray, progress: Optional[Callable[[], object]] = None) -> float:
    """exp of the mean negative log-likelihood over all scored tokens of the windows."""
    return float(np.exp(negative_log_likelihood(llm, token_windows, progress).mean()))


def bos_token(llm) -> Optional[int]:
    """The token that the model expects before a text, None if it expects none."""
    add = llama_cpp.llama_vocab_get_add_bos(llama_cpp.llama_model_get_vocab(llm.model))
    return llm.token_bos() if add and llm.token_bos() >= 0 else None


class Reference:
    """The model's next-token distributions over one window, for other plans to be measured against.

    Made by running `llm`, under the plan in force, over `window` (int32, shape [n]). It holds n - 1 distributions in
    float32, 4 bytes x n x n_vocab.

    Attributes:
        nll: float64, shape [n - 1]: negative log-likelihood of each token but the first, in nats.
    """

    def __init__(self, llm, window: np.ndarray):
        self._window = window
        self.nll = np.empty(len(window) - 1)
        self._negative_entropy = np.empty(len(window) - 1)
        self._probabilities = np.empty((len(window) - 1, llm.n_vocab()), np.float32)
        for rows, logits, targets in _run(llm, window):
            probabilities = self._probabilities[rows]

            def of(part: slice) -> np.ndarray:
                nll, log_sum = nll_of(logits[part], targets[part])
                p = probabilities[part]
                np.exp(np.subtract(logits[part], log_sum[:, None], out=p, casting="same_kind"), out=p)
                return np.stack([nll, _dot(p, logits[part]) - log_sum], axis=1)

            self.nll[rows], self._negative_entropy[rows] = _by_rows(llm, len(targets), of).T

    def compare(self, llm) -> Tuple[np.ndarray, np.ndarray]:
        """Runs `llm` over the same window under the plan that is now in force.

        Returns:
            (nll, kl), float64, shape [n - 1], in nats: negative log-likelihood, and the Kullback-Leibler divergence
            sum of p log(p/q), p the reference and q this run. Unlike perplexity it does not depend on how well the
            model predicts the text, only on how much the plan changes it, which makes it far less noisy.
        """
        return self.compare_tokens(llm)[:2]

    def compare_tokens(self, llm) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`compare`, and besides, bool [n - 1], whether both find the same next token the likeliest."""
        nll, kl, same = np.empty_like(self.nll), np.empty_like(self.nll), np.empty(self.nll.shape, bool)
        for rows, logits, targets in _run(llm, self._window):
            probabilities, negative_entropy = self._probabilities[rows], self._negative_entropy[rows]

            def of(part: slice) -> np.ndarray:
                p, row_logits = probabilities[part], logits[part]
                row_nll, log_sum = nll_of(row_logits, targets[part])
                row_kl = negative_entropy[part] - (_dot(p, row_logits) - log_sum)
                return np.stack([row_nll, row_kl, p.argmax(axis=1) == row_logits.argmax(axis=1)], axis=1)

            nll[rows], kl[rows], same[rows] = _by_rows(llm, len(targets), of).T
        return nll, kl, same


def _run(llm, window: np.ndarray) -> Iterator[Tuple[slice, np.ndarray, np.ndarray]]:
    """Evaluates a window from an empty cache: rows of the result, their logits [n, n_vocab], the tokens they predict."""
    llm.clear_cache()
    for start in range(0, len(window), llm.n_batch):
        batch = window[start : start + llm.n_batch]
        logits = llm.decode(batch.tolist(), start, logits_all=True)
        targets = window[start + 1 : start + len(batch) + 1]
        yield slice(start, start + len(targets)), logits[: len(targets)], targets


def _by_rows(llm, n: int, function: Callable[[slice], np.ndarray]) -> np.ndarray:
    """What a function gives for slices of n rows, put together; on the threads of `llm`, which have nothing to do meanwhile."""

    def of(start: int) -> np.ndarray:
        with np.errstate(all="ignore"):  # what is no number is looked at; each thread has its own
            return function(slice(start, min(start + _ROWS, n)))

    with ThreadPoolExecutor(llm.n_threads_batch) as pool:
        return np.concatenate(list(pool.map(of, range(0, max(n, 1), _ROWS))))


def nll_of(logits: np.ndarray, targets: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """Negative log-likelihood of the tokens, and the log of the sum of exponentials: float64, shape [n]."""
    top = logits.max(axis=1, keepdims=True)
    log_sum = np.log(np.exp(logits - top).sum(axis=1, dtype=np.float64)) + top[:, 0]
    return log_sum - logits[np.arange(len(targets)), targets], log_sum


def _dot(p: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Sum of p * logits in each row, in float64: differences of such sums are small against the sums."""
    return (p * logits).sum(axis=1, dtype=np.float64)

"""Calibration text: from a file, or written by the model itself, cut into windows for profile and held-out check."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path
from typing import NamedTuple

from allocmoe_edge import Llama
from allocmoe_edge.measure.perplexity import bos_token, read_text, read_tokens, windows
from allocmoe_edge.plan.metadata import Calibration
import numpy as np

from . import ConvertError
from .checkpoint import Checkpoint
from .progress import progress_bar
from .self_generated import write_documents

# one window in HELD_OUT is kept out of the profile, for the check against uniform k
HELD_OUT = 5
# Windows of a longer text are put together of pieces of about so many tokens from as many places: many subjects tell more than
# many tokens. Shorter pieces would be read with hardly any context of their own.
_PIECE = 128
# Documents that the model writes at a time: a token of 64 takes 0.4 times as long as of 16; of 128 it would be 0.3 times, in
# twice the memory (docs/notes/2026-11-conversion.md).
_SIDE_BY_SIDE = 64


class CalibrationText(NamedTuple):
    """int32 windows, shape [n, n_ctx], spread over the text; no token of the last two is in the first two.

    profile: for what takes many runs. fit: for what takes a few, the profile's among them. Both may be put together of pieces.
    held_out: to check plans on. spend: to count on what plans spend, and to tell the two best apart, those of held_out among them. Text
    as it is.
    """

    profile: np.ndarray
    fit: np.ndarray
    held_out: np.ndarray
    spend: np.ndarray
    source: Calibration


def read(llm: Llama, path: Path) -> np.ndarray:
    """Token ids of a UTF-8 text file, int32, shape [n].

    Raises:
        ConvertError: the file cannot be read, or is not text.
    """
    try:
        return read_tokens(llm, path)
    except ValueError as error:
        raise ConvertError(f"calibration {error}") from None


def most(llm: Llama, tokens: np.ndarray, n_ctx: int) -> int:
    """Tokens that a text has for `fit`, in windows of n_ctx; a window at least."""
    n = len(windows(tokens, n_ctx, bos_token(llm)))
    return n_ctx * max(1, n - max(1, n // HELD_OUT))


def from_tokens(
    llm: Llama, tokens: np.ndarray, path: Path, n_tokens: int, n_ctx: int, n_fit: int = 0
) -> CalibrationText:
    """Windows spread evenly over a text, put together of pieces from all over it if it is much longer than they are.

    Args:
        tokens: as `read` returns them.
        path: of the text.
        n_tokens: tokens for the profile; up to as many again are held out.
        n_ctx: tokens in a window, at most the context of `llm`.
        n_fit: tokens for `fit`, and a quarter as many for `spend`, if that is more and the text has as many.

    Raises:
        ConvertError: the text holds fewer than two windows.
    """
    return _split(llm, tokens, n_tokens, n_ctx, f"file {path.name}", n_fit)


def from_file(llm: Llama, path: Path, n_tokens: int, n_ctx: int, n_fit: int = 0) -> CalibrationText:
    """As `from_tokens`, of those that `read` finds in the file."""
    return from_tokens(llm, read(llm, path), path, n_tokens, n_ctx, n_fit)


def check(path: Path) -> None:
    """Raises ConvertError if a file cannot be read or is not text."""
    try:
        read_text(path)
    except ValueError as error:
        raise ConvertError(f"calibration {error}") from None


def self_generated(
    llm: Llama, n_tokens: int, n_ctx: int, seed: int, checkpoint: Checkpoint, n_fit: int = 0
) -> CalibrationText:
    """Short documents that the model samples itself at temperature 1, top-p 0.95; the same seed gives the same text.

    Args:
        n_tokens: tokens for the profile; up to as many again are held out.
        n_ctx: tokens in a window, at most the context of `llm`.
        seed: of the first document; each further one takes the next.
        checkpoint: has the documents that were written before, and takes the new ones.
        n_fit: tokens for `fit`, and a quarter as many for `spend`, if that is more.

    Raises:
        ConvertError: the model ends its documents before they begin.
        CalibrationError: it computes NaN or infinity.
    """
    bos = bos_token(llm)
    start = next((t for t in (bos, llm.token_bos(), llm.token_eos()) if t is not None and t >= 0), 0)
    needed = _n_windows(max(n_tokens, n_fit), n_ctx) * (n_ctx - (bos is not None))
    n_max = max(1, min(_PIECE, n_ctx - 2))
    tokens: list = []
    n_documents = 0
    with progress_bar("calibration text", needed, "tok") as bar:
        while len(tokens) < needed:
            n_more = min(_SIDE_BY_SIDE * n_max, needed - len(tokens))
            n_seq = min(_SIDE_BY_SIDE, -(-n_more // n_max))
            first = seed + n_documents
            name = f"{n_more} tokens in documents from seed {first}, up to {n_max} each, {n_seq} at a time"
            written = checkpoint.get(name)
            if written is None:
                written = write_documents(llm, start, n_max, n_more, first, n_seq, bar.update)
                checkpoint.put(name, written)
            else:
                bar.skip(n_more)
            tokens += itertools.chain.from_iterable(written)
            n_documents += len(written)
    return _split(llm, np.array(tokens, np.int32), n_tokens, n_ctx, f"self-generated, seed {seed}", n_fit)


def n_pieces(n_ctx: int) -> int:
    """Of how many pieces a window is put together, of a text that is as many times as long as its windows."""
    return max(1, n_ctx // _PIECE)


def _n_windows(n_tokens: int, n_ctx: int) -> int:
    profile = max(1, n_tokens // n_ctx)
    return profile + max(1, profile // (HELD_OUT - 1))


def _split(llm: Llama, tokens: np.ndarray, n_tokens: int, n_ctx: int, source: str, n_fit: int) -> CalibrationText:
    cut = windows(tokens, n_ctx, bos_token(llm))
    if len(cut) < 2:
        raise ConvertError(
            f"calibration text ({source}): {len(tokens)} tokens, want at least {2 * n_ctx} "
            f"(two windows of {n_ctx}, one to profile and one to check)"
        )
    n = min(_n_windows(max(n_tokens, n_fit), n_ctx), len(cut))
    n_spend = max(1, n // HELD_OUT)
    cut = spread(cut, n * n_pieces(n_ctx))
    held_out = np.zeros(len(cut), bool)
    held_out[HELD_OUT - 1 :: HELD_OUT] = True
    if not held_out.any():
        held_out[-1] = True
    fit, spend = _mixed(cut[~held_out], n - n_spend), spread(cut[held_out], n_spend)
    n_profile = max(1, n_tokens // n_ctx)
    profile = spread(fit, n_profile)
    digest = hashlib.sha256(profile.tobytes()).hexdigest()
    check = spread(spend, n_profile)
    return CalibrationText(profile, fit, check, spend, Calibration(source, profile.size, digest))


def _mixed(rows: np.ndarray, n: int) -> np.ndarray:
    """At most n windows, their first part from one of the rows, their second from another, and so on, as far as rows suffice."""
    n_ctx = rows.shape[1]
    n_parts = max(1, min(n_pieces(n_ctx), len(rows) // n))
    rows = spread(rows, n * n_parts).reshape(n_parts, -1, n_ctx)
    ends = np.linspace(0, n_ctx, n_parts + 1).astype(int)
    return np.concatenate([of[:, start:end] for of, start, end in zip(rows, ends, ends[1:])], axis=1)


def spread(rows: np.ndarray, n: int) -> np.ndarray:
    """At most n rows, spread evenly."""
    return rows[np.linspace(0, len(rows) - 1, min(n, len(rows))).astype(int)]

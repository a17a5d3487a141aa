"""Calibration samples that share nothing with each other or with the evaluation text."""

from __future__ import annotations

from pathlib import Path
from typing import List, Sequence

from tqdm import tqdm

# Text shared over twice this many characters is found: a sentence, not a phrase.
SPAN = 40
# Pieces of a sample, spread over all of a file: of one place in a book a model reads one story.
PIECES = 32
_BYTES_PER_TOKEN = 6


def spans(text: str) -> set:
    """Every SPAN-th piece of SPAN characters."""
    return {text[i : i + SPAN] for i in range(0, len(text) - SPAN + 1, SPAN)}


def shares_text(text: str, other_spans: set) -> bool:
    return any(text[i : i + SPAN] in other_spans for i in range(len(text) - SPAN + 1))


def samples(paths: Sequence[Path], evaluation: Path, n_tokens: int, repeats: int, folder: Path) -> List[Path]:
    """Writes `repeats` texts of at least n_tokens tokens each, from disjoint places in the files; returns their paths.

    Places that share a sentence with the evaluation text are left out.

    Raises:
        ValueError: a file cannot be read or is too short, or calibration and evaluation text are one file.
    """
    for path in paths:
        if path.resolve() == evaluation.resolve():
            raise ValueError(f"{path}: is the evaluation text; calibrate on another")
    try:
        taboo = spans(evaluation.read_text(encoding="utf-8"))
        texts = [path.read_text(encoding="utf-8") for path in paths]
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"text {getattr(error, 'filename', '')}: {why}") from None
    size = 1 + n_tokens * _BYTES_PER_TOKEN // (PIECES * len(paths))
    written = []
    with tqdm(total=repeats * len(paths) * PIECES, desc="calibration text", disable=None, leave=False) as bar:
        for sample in range(repeats):
            pieces = []
            for path, text in zip(paths, texts):
                step = len(text) // PIECES
                for i in range(PIECES):
                    # the piece's share of the file is cut among the samples, and each looks for a place in its own part
                    start, stop = i * step + sample * step // repeats, i * step + (sample + 1) * step // repeats
                    pieces.append(_clean(path, text[start:stop], size, taboo))
                    bar.update()
            written.append(folder / f"calibration-{sample}.txt")
            written[-1].write_text("\n\n".join(pieces), encoding="utf-8")
    return written


def _clean(path: Path, text: str, size: int, taboo: set) -> str:
    for start in range(0, len(text) - size + 1, size):
        piece = text[start : start + size]
        if not shares_text(piece, taboo):
            return piece
    raise ValueError(f"{path}: too short for the calibration samples, or all of it is in the evaluation text")

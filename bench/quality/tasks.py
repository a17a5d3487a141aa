"""Accuracy on multiple-choice and last-word tasks under a plan.

Files are JSON lines: `query`, `choices`, `gold` for multiple choice, or `context`, `continuation` for LAMBADA.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import List

from allocmoe_edge import Llama
from allocmoe_edge.measure.perplexity import bos_token, nll_of
import numpy as np


def read(path: Path, n_items: int, n_ctx: int, llm: Llama) -> List[dict]:
    """Up to n_items items, spread evenly over the file, as token ids.

    Returns:
        dicts of context (int list), continuations (int lists), lengths (in bytes), gold (int; None for LAMBADA). A
        context that does not fit n_ctx beside its longest continuation loses its beginning.

    Raises:
        ValueError: the file cannot be read, or a line is not an item; says which.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    chosen = np.linspace(0, len(lines) - 1, min(n_items, len(lines))).astype(int)
    return [_item(path, int(i) + 1, lines[i], n_ctx, llm) for i in chosen]


def _item(path: Path, number: int, line: str, n_ctx: int, llm: Llama) -> dict:
    try:
        entry = json.loads(line)
        if "continuation" in entry:
            context, endings, gold = entry["context"], [entry["continuation"]], None
        else:
            context, endings, gold = entry["query"].rstrip(), entry["choices"], int(entry["gold"])
            if not 0 <= gold < len(endings):
                raise ValueError(f"gold is {gold}, want 0 to {len(endings) - 1}")
        if context.startswith("Question:"):
            context += "\nAnswer:"
        endings = [" " + ending.strip() for ending in endings]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}, line {number}: not a task item: {error!r}") from None
    continuations = [llm.tokenize(ending.encode(), add_bos=False, special=False) for ending in endings]
    bos = bos_token(llm)
    prefix = [] if bos is None else [bos]
    room = n_ctx - max(map(len, continuations)) - len(prefix)
    tokens = llm.tokenize(context.encode(), add_bos=False, special=False)
    if room < 1 or not tokens:
        raise ValueError(f"{path}, line {number}: does not fit a context of {n_ctx} tokens, or is empty")
    return {
        "context": prefix + tokens[-room:],
        "continuations": continuations,
        "lengths": [len(ending.encode()) - 1 for ending in endings],
        "gold": gold,
    }


def score(llm: Llama, item: dict) -> dict:
    """One item under the plan in force.

    Returns:
        multiple choice: {"acc": bool, "acc_norm": bool}, by the sum of log-likelihoods and by that sum per byte of the
        choice; LAMBADA: {"acc": bool}, whether greedy decoding writes the continuation.
    """
    llm.clear_cache()
    context = item["context"]
    before = llm.decode(context).copy()
    sums, greedy = [], []
    for tokens in item["continuations"]:
        rows = before
        if len(tokens) > 1:
            rows = np.concatenate([before, llm.decode(tokens[:-1], len(context), logits_all=True)])
        sums.append(-float(nll_of(rows, np.asarray(tokens))[0].sum()))
        greedy.append(bool((rows.argmax(axis=1) == tokens).all()))
    if item["gold"] is None:
        return {"acc": greedy[0]}
    per_byte = np.array(sums) / np.maximum(item["lengths"], 1)
    return {"acc": bool(np.argmax(sums) == item["gold"]), "acc_norm": bool(np.argmax(per_byte) == item["gold"])}


def main_metric(item: dict) -> str:
    """What is usually reported: LAMBADA's plain accuracy, the length-normalised one of multiple choice."""
    return "acc" if item["gold"] is None else "acc_norm"


def chance(items: List[dict]) -> float:
    """Accuracy of guessing; 0 for LAMBADA."""
    return float(np.mean([0.0 if item["gold"] is None else 1 / len(item["continuations"]) for item in items]))


def standard_error(accuracy: float, n_items: int) -> float:
    return float(np.sqrt(accuracy * (1 - accuracy) / n_items))

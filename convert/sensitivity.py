"""Alloc-L's sensitivities S[l,k]: how much the model suffers with k experts in layer l, measured by the runtime itself.

A *cell* is one run over a window of the calibration text with few experts in some layer. Three modes:

- isolated: layer l at k, every layer before it at its own K_l, every layer after it at 1, so that later layers cannot
  hide the damage (Liu et al., ACL 2026, arXiv 2604.08133). Sum over layers of (K_l - 1) cells a window.
- single: layer l at k, every other layer at its own K_l. As many cells.
- fast: layer l at half its experts, every other layer at its own K_l, one cell a layer. The other k follow from what
  the layer's output loses with them, |y_K - y_k|^2, recorded for all k at once in the one run of the full model.

In every mode a cell starts at layer l: what layers before it put out is the same as in the full model's run over the
window, which is kept. Windows are the outer loop, so that a profile exists after the first and gets better with each.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Dict, Tuple

from allocmoe_edge import Llama, Plan
from allocmoe_edge.measure.perplexity import Reference
from allocmoe_edge.measure.recording import recording, start_at
import numpy as np

from . import CalibrationError
from .checkpoint import Checkpoint, window_name
from .progress import progress_bar

MODES = ("fast", "single", "isolated")
METRICS = ("kl", "perplexity")


def half_of(k: int) -> int:
    """Half of a layer's experts: what the profile "fast" measures with."""
    return max(1, k // 2)


def cells(full: tuple, mode: str) -> Dict[Tuple[int, int], tuple]:
    """Experts in every layer for each cell that the mode needs, by (layer, k), the full model itself included."""
    layers = [il for il, k in enumerate(full) if k]
    found = {}
    for position, il in enumerate(layers):
        for k in {half_of(full[il]), full[il]} if mode == "fast" else range(1, full[il] + 1):
            counts = list(full)
            counts[il] = k
            if mode == "isolated":
                for later in layers[position + 1 :]:
                    counts[later] = 1
            found[il, k] = tuple(counts)
    return found


def n_passes(full: tuple, mode: str) -> int:
    """Runs over the calibration text that the mode needs, the full model's included; most of them are not whole."""
    return len(set(cells(full, mode).values()) | {tuple(full)})


def measure(
    llm: Llama, full: tuple, token_windows: np.ndarray, mode: str, metric: str, checkpoint: Checkpoint
) -> tuple:
    """The sensitivities of a model.

    Args:
        full: K_l per layer, 0 where a layer routes no experts.
        token_windows: int32, shape [n_windows, n_ctx]; n_ctx is at most the micro-batch of `llm`.
        metric: "perplexity" of the text, or "kl", the mean divergence from the full model per token, in nats.
        checkpoint: has what was measured before, and takes what is measured.

    Returns:
        (sensitivities, reused): one float64 array of shape [K_l] per layer, empty where K_l is 0; how many of the cells
        had been measured before. The plan of `llm` is left as it was set last.

    Raises:
        CalibrationError: the model computes NaN or infinity.
    """
    wanted = cells(full, mode)
    plans = sorted(set(wanted.values()) - {tuple(full)}, reverse=True)
    starts = None  # not known before the first cell that has to be measured
    nll: Dict[tuple, float] = {}
    kl: Dict[tuple, float] = {}
    errors = [np.zeros(k + 1) for k in full]
    # counted before any is measured: windows that are equal are measured once
    names = [_cell_name(window_name(window), counts) for window in token_windows for counts in plans]
    reused = sum(checkpoint.get(name) is not None for name in names)
    total = len(token_windows) * (len(plans) + 1)
    with progress_bar("sensitivity", total, "pass", leave=True) as bar:
        for window in token_windows:
            name = window_name(window)
            stored = checkpoint.get(f"{name} full")
            missing = [counts for counts in plans if checkpoint.get(_cell_name(name, counts)) is None]
            if missing and starts is None:
                starts = _can_start_late(llm, full, window)
            if stored is None or missing:
                reference, recorded = _reference(llm, full, window)
                if not np.isfinite(reference.nll).all():
                    raise CalibrationError("the model's own predictions are not finite", finite=False)
                stored = {"nll": reference.nll.mean(), "errors": [row.tolist() for row in recorded]}
                checkpoint.put(f"{name} full", stored)
            if missing:
                bar.update()
            bar.skip(len(plans) - len(missing) + (not missing))
            for counts in missing:
                changed = next(il for il, (k, own) in enumerate(zip(counts, full)) if k != own)
                start_at(llm, Plan(counts, full), changed if starts else 0)
                cell = [float(values.mean()) for values in reference.compare(llm)]
                checkpoint.put(_cell_name(name, counts), cell)
                bar.update()
            for counts in plans:
                cell = checkpoint.get(_cell_name(name, counts))
                nll[counts] = nll.get(counts, 0.0) + cell[0] / len(token_windows)
                kl[counts] = kl.get(counts, 0.0) + cell[1] / len(token_windows)
            nll[tuple(full)] = nll.get(tuple(full), 0.0) + stored["nll"] / len(token_windows)
            errors = [a + b for a, b in zip(errors, stored["errors"])]
    kl[tuple(full)] = 0.0
    damage = {cell: kl[counts] if metric == "kl" else np.exp(nll[counts]) for cell, counts in wanted.items()}
    if mode == "fast":
        rows = [_from_errors(damage, il, row) if k else np.empty(0) for il, (k, row) in enumerate(zip(full, errors))]
    else:
        rows = [np.array([damage[il, k] for k in range(1, own + 1)]) for il, own in enumerate(full)]
    if not all(np.isfinite(row).all() for row in rows):
        raise CalibrationError("predictions with fewer experts are not finite", finite=False)
    return tuple(rows), reused


def _cell_name(window: str, counts: tuple) -> str:
    return f"{window} {' '.join(map(str, counts))}"


def _reference(llm: Llama, full: tuple, window: np.ndarray) -> tuple:
    """The full model's run over a window, and for each layer the squared error with k = 0..K_l experts, summed; outputs are kept."""
    # the rule "batch" keeps everything at full budget, and has the native side rank all K_l
    with recording(llm, replace(Plan.full(full), token_rule="batch"), keep_outputs=True, logits=True) as recorder:
        reference, errors = recorder.reference(window)
    return reference, [errors.get(il, np.zeros(1)) for il in range(len(full))]


def _from_errors(damage: dict, il: int, errors: np.ndarray) -> np.ndarray:
    """S[l, 1..K_l] in proportion to the errors, through the measured cell at half of the layer's experts."""
    own = len(errors) - 1
    half = half_of(own)
    rise = max(damage[il, half] - damage[il, own], 0.0)  # a perplexity may be better by chance
    share = errors[1:] / errors[half] if errors[half] > 0 else np.zeros(own)
    return damage[il, own] + rise * share


def _can_start_late(llm: Llama, full: tuple, window: np.ndarray) -> bool:
    """Whether a run that starts at a later layer gives what a whole run gives, on this model and backend.

    It does not where a layer reads more of earlier layers than their output, as with a shared KV cache.
    """
    plan = Plan.full(full)
    layers = plan.moe_layers
    if layers[-1] == 0:
        return False
    _reference(llm, full, window)
    llm.apply_plan(plan)
    whole = Reference(llm, window)
    for start in {layers[len(layers) // 2], layers[-1]} - {0}:
        start_at(llm, plan, start)
        nll, kl = whole.compare(llm)
        if np.abs(nll - whole.nll).max() > 1e-3 or np.abs(kl).max() > 1e-3:
            return False
    return True

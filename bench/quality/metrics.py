"""What a plan does to the model's predictions, measured by the runtime, and what it wins back of uniform k's loss."""

from __future__ import annotations

import hashlib
from typing import Callable, Dict, Iterable, List, Optional, Tuple

from allocmoe_edge import Llama, Plan
from allocmoe_edge.convert.checkpoint import Checkpoint, window_name
from allocmoe_edge.measure.perplexity import Reference
from allocmoe_edge.plan.estimator import ARRAYS
import numpy as np
from tqdm import tqdm

# A plan, and whether it is evaluated token by token, as in decoding, instead of a window at a time.
Candidate = Tuple[Plan, bool]


def candidate_name(candidate: Candidate) -> str:
    """Hash of all that decides what a candidate computes."""
    plan, single = candidate
    found = hashlib.sha256(f"{plan!r} {single}".encode())
    if plan.estimator is not None:  # no part of a plan's repr
        found.update(str(plan.estimator.n_relu).encode())
        for name in ARRAYS:
            found.update(getattr(plan.estimator, name).tobytes())
    return found.hexdigest()[:16]


def measure(
    models: Dict[bool, Llama],
    full: tuple,
    candidates: Iterable[Candidate],
    token_windows: np.ndarray,
    checkpoint: Checkpoint,
) -> Dict[str, dict]:
    """Every candidate over the windows, against the full model on whole windows.

    Args:
        models: two contexts of one model: False evaluates a window at a time, True token by token (n_batch = 1).
        token_windows: int32, shape [n_windows, n_ctx].
        checkpoint: has the (window, candidate) cells that were measured before, and takes the others.

    Returns:
        By `candidate_name`: nll, mean_kl, top1 and spent, lists with a number for each window: negative log-likelihood
        and divergence from the full model in nats per token, share of tokens with the full model's likeliest token,
        activations per token; and kl, the divergence of every token, rounded to 4 digits.
    """
    by_name = {candidate_name(c): c for c in candidates}
    found: Dict[str, dict] = {name: {} for name in by_name}
    total = len(by_name) * len(token_windows)
    with tqdm(total=total, desc="evaluation", unit="cell", disable=None, smoothing=0.05) as bar:
        for window in token_windows:
            reference: Optional[Reference] = None
            for name, (plan, single) in by_name.items():
                key = f"evaluation {window_name(window)} {name}"
                cell = checkpoint.get(key)
                if cell is None:
                    if reference is None:
                        models[False].apply_plan(Plan.full(full))
                        reference = Reference(models[False], window)
                    cell = _cell(models[single], plan, single, reference)
                    checkpoint.put(key, cell)
                for what, value in cell.items():
                    found[name].setdefault(what, []).append(value)
                bar.update()
    return found


def _cell(llm: Llama, plan: Plan, single: bool, reference: Reference) -> dict:
    llm.apply_plan(plan)
    llm.expert_stats(reset=True)
    nll, kl, same = reference.compare_tokens(llm)
    stats = llm.expert_stats()["decode" if single else "prefill"]
    return {
        "nll": float(nll.mean()),
        "mean_kl": float(kl.mean()),
        "top1": float(same.mean()),
        "spent": float(stats["mean"].sum()),
        "kl": [float(f"{value:.4g}") for value in kl],
    }


def summary(cells: dict) -> Dict[str, float]:
    """Perplexity, mean and median divergence (nats), top-1 agreement and activations per token over all windows."""
    return {
        "perplexity": float(np.exp(np.mean(cells["nll"]))),
        "kl": float(np.mean(cells["mean_kl"])),
        "kl_median": float(np.median(np.concatenate(cells["kl"]))),
        "top1": float(np.mean(cells["top1"])),
        "spent": float(np.mean(cells["spent"])),
    }


def recovery(loss: float, uniform_loss: float) -> float:
    """The share of uniform k's loss that a plan wins back: 1 is the full model, 0 uniform k, below 0 worse than that.

    Losses are over the full model's, in nats: ln(P/P_full), or the divergence.
    """
    return 1 - loss / uniform_loss if uniform_loss > 0 else float("nan")


def recovery_by_perplexity(perplexity: float, uniform: float, full: float) -> float:
    return recovery(np.log(perplexity / full), np.log(uniform / full))


def at_equal_budget(spent: List[float], losses: List[float], budget: float) -> float:
    """A method's loss at exactly `budget`, on the line between its measured points, or beyond through the last two.

    Args:
        spent: activations per token that were realised, of at least two points.
        losses: at those points, in nats over the full model's; the full model itself, with loss 0, can be one.
    """
    order = np.argsort(spent)
    x, y = np.asarray(spent, float)[order], np.asarray(losses, float)[order]
    right = int(np.clip(np.searchsorted(x, budget), 1, len(x) - 1))
    left = right - 1
    if x[right] == x[left]:
        return float(y[right])
    return float(y[left] + (budget - x[left]) * (y[right] - y[left]) / (x[right] - x[left]))


def text_noise(statistic: Callable[[np.ndarray], float], n_windows: int) -> float:
    """Standard error of a statistic over the choice of evaluation windows, by the jackknife.

    Args:
        statistic: of an array of window indices.
    """
    if n_windows < 2:
        return float("nan")
    everything = np.arange(n_windows)
    values = np.array([statistic(np.delete(everything, i)) for i in range(n_windows)])
    return float(np.sqrt((n_windows - 1) / n_windows * ((values - values.mean()) ** 2).sum()))

"""Puts an `Estimator` together from what layers have recorded: functions of arrays, without the model (see `estimate.py`)."""

from __future__ import annotations

import math
from typing import Dict, Iterator, List, Tuple

from allocmoe_edge.measure.recording import LayerRecord
from allocmoe_edge.plan.estimator import N_QUANTILES, Estimator
from allocmoe_edge.plan.profile import Profile
import numpy as np

from .regression import PRIOR_TOKENS, fit_sizes, sizes_of
from .sensitivity import half_of

# directions for sizes, further ones of which what is positive counts, and rank of the estimate of outputs
N_SIZE, N_RELU, RANK = 8, 128, 96
# main directions of the input among which those are sought
N_INPUT = 768
# one window in so many, and no more tokens than so many, are not fitted on, and say how sizes are distributed: on the others the
# fit is too good
_APART, _APART_TOKENS = 4, 4096
# an output smaller than this share of its layer's mean counts as being of this share
_LEAST = np.exp(-4.0)
# What of `PRIOR_TOKENS` is tried in each layer, on the windows apart: how alike experts are depends on it.
_PRIORS = 20.0, 60.0, 200.0, PRIOR_TOKENS, 2000.0
# a layer whose sensitivity was found smaller than this share of the largest has that: so little is noise
_LEAST_SENSITIVITY = 0.01

# of one window and layer: (directions of the input [n, n_down], experts, log sizes, log weights [n, K])
SizeRows = Tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def windows_apart(n: int, n_ctx: int) -> np.ndarray:
    """bool [n]: which of n windows are kept apart; of more than one, one at least."""
    apart = np.arange(n) % max(_APART, -(-n * n_ctx // _APART_TOKENS)) == _APART - 1
    if not apart.any():
        apart[-1] = n > 1
    return apart


def memory(expert_used_count_full: tuple, n_expert: int, n_embd: int, shape: tuple, n_threads: int) -> int:
    """Bytes of memory that calibrating needs beside the model for windows of a shape [n, n_ctx]: what one window has recorded, and
    the most of what is summed up: for each layer a matrix of n_embd by n_embd; or for each token a few floats for each of its
    experts and what counts of its inputs, and for each thread the main inputs of a layer, twice in float16; or for each layer two
    matrices of about n_embd by n_embd."""
    full, n_tokens, n_input = expert_used_count_full, shape[0] * shape[1], min(N_INPUT, n_embd)
    n_layer = sum(k > 0 for k in full)
    directions = n_layer * n_embd * (n_embd + 2 * n_expert) + 3 * n_tokens * sum(full)
    sizes = n_tokens * ((N_SIZE + N_RELU) * n_layer + 3 * sum(full) + n_input * min(n_threads, n_layer))
    outputs = n_layer * (n_expert + n_embd) * (n_expert + 2 * n_embd)
    return 4 * (max(directions, sizes, outputs) + n_layer * 2 * shape[1] * n_embd)


def disk_space(expert_used_count_full: tuple, n_embd: int, shape: tuple) -> int:
    """Bytes that calibrating takes in a temporary file for windows of a shape [n, n_ctx]: see `InputFile`."""
    return 2 * sum(k > 0 for k in expert_used_count_full) * n_embd * shape[0] * shape[1]


def stored_size(n_layer: int, n_expert: int, n_embd: int) -> int:
    """Bytes that an Estimator takes in a file, at most."""
    return 2 * sum(map(math.prod, Estimator.shapes(n_layer, n_expert, N_SIZE + N_RELU, RANK, n_embd).values()))


def keeps(sizes: np.ndarray, threshold: float, k_base: int) -> np.ndarray:
    """bool [n, K]: which experts the rule keeps, given their estimated log sizes [n, K]."""
    best = np.argsort(-sizes, axis=1, kind="stable")[:, :k_base]
    keep = sizes >= np.float32(threshold)
    np.put_along_axis(keep, best, True, axis=1)
    return keep


def fit_layer(windows: List[SizeRows], apart: np.ndarray, n_expert: int) -> np.ndarray:
    """A layer's `fit_sizes`, by the one of several priors that is best on the windows apart."""
    u, experts, sizes, _ = _rows(windows, ~apart)
    fits = fit_sizes(u, experts, sizes, n_expert, *(_PRIORS if apart.any() else (PRIOR_TOKENS,)))
    u, experts, sizes, _ = _rows(windows, _held(apart))
    return min(fits, key=lambda fitted: np.square(sizes_of(fitted, u, experts) - sizes).mean())


def _held(apart: np.ndarray) -> np.ndarray:
    """The windows apart, or all where there are none."""
    return apart if apart.any() else ~apart


def _rows(windows: List[SizeRows], of: np.ndarray) -> Iterator[np.ndarray]:
    return (np.concatenate(arrays) for arrays in zip(*(w for w, one in zip(windows, of) if one)))


def with_sizes(
    down: np.ndarray,
    n_relu: int,
    kept: Dict[int, List[SizeRows]],
    fitted: Dict[int, np.ndarray],
    damage: np.ndarray,
    apart: np.ndarray,
    k_base: int,
    full: tuple,
    n_expert: int,
) -> Estimator:
    """An Estimator of sizes alone, each in units of what it costs to skip it.

    kept, fitted: for each layer with experts a `SizeRows` a window, and its `fit_layer`. damage: see `damages`. apart: bool, which
    windows are not fitted on.
    """
    log_norm = np.zeros((len(full), n_expert, down.shape[1] + 1))
    for il, coefficients in fitted.items():
        log_norm[il] = coefficients

    def candidates(il: int) -> np.ndarray:
        """What the rule compares with the threshold, beyond the k_base best: [n_tokens, K - k_base], rising."""
        u, experts, _, weights = _rows(kept[il], _held(apart))
        v = weights + sizes_of(log_norm[il], u, experts)
        return np.sort(v, axis=1)[:, : full[il] - k_base]

    layers, free = list(kept), [il for il in kept if full[il] > k_base]
    for il in free:
        if damage[il] > 0:
            log_norm[il, :, -1] += 0.5 * np.log(damage[il] / ((full[il] - k_base) * _smaller_half(candidates(il))))
    # only differences matter, and small numbers are the more exact in float16
    log_norm[layers, :, -1] -= log_norm[layers, :, -1].mean()
    log_norm = log_norm.astype(np.float16).astype(np.float32)
    quantiles = np.zeros((len(full), N_QUANTILES), np.float32)
    for il in free:
        quantiles[il] = np.quantile(candidates(il), np.linspace(0, 1, N_QUANTILES))
    return Estimator(down, log_norm, np.zeros((len(full), n_expert, 0)), down[:, :0], quantiles, n_relu)


def _smaller_half(logs: np.ndarray) -> float:
    """Mean square of the smaller half of sizes, given their logs: of what is skipped at half budget. Not of what a layer's output
    loses: in some layers a few tokens, the first of a text above all, have outputs hundreds of times the others', which no
    prediction depends on."""
    ordered = np.sort(logs, axis=None)
    return float(np.exp(2 * ordered[: -(-ordered.size // 2)]).mean())


def with_outputs(estimator: Estimator, fitted: Dict[int, tuple]) -> Estimator:
    """With an estimate of outputs; what decides stays as it is, its coefficients of the new directions being zero."""
    n_layer, n_expert = estimator.n_layer, estimator.n_expert
    rank = next(iter(fitted.values()))[0].shape[1]
    output = np.zeros((n_layer, n_expert, rank), np.float32)
    down, up = (np.zeros((n_layer, rank, estimator.n_embd), np.float32) for _ in range(2))
    for il, arrays in fitted.items():
        output[il], down[il], up[il] = arrays
    return Estimator(
        np.concatenate([down, estimator.down], axis=1),
        np.concatenate([np.zeros((n_layer, n_expert, rank), np.float32), estimator.log_norm], axis=2),
        output,
        up,
        estimator.quantiles,
        estimator.n_relu,
    )


def damages(profile: Profile, full: tuple) -> np.ndarray:
    """float64 [n_layer]: what half of each layer's experts costs, from the profile's cell; all 0 where none costs anything."""
    rise = np.zeros(len(full))
    for il, row in enumerate(profile.sensitivity):
        if full[il]:
            half = row[half_of(full[il]) - 1]
            rise[il] = half - row[-1] if profile.metric == "kl" else np.log(half / row[-1])
    return np.where(np.array(full) > 0, np.maximum(rise, _LEAST_SENSITIVITY * max(rise.max(), 0.0)), 0.0)


def log_sizes(layer: LayerRecord) -> np.ndarray:
    return np.log(np.maximum(layer.norms, max(_LEAST * layer.norms.mean(), 1e-20)))


def log_weights(weights: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(weights, 1e-20))

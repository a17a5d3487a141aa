"""What token rule "estimate" goes by: a small model of every expert's output, and of the size of that.

In each layer, with x the input that its experts read (n_embd values), w_e the weight of expert e among all K_l of the
token's experts, and u = down x:

    log size of what e contributes    v_e = log w_e + log_norm_e . (u, 1), of the last n_relu of u only what is positive
    estimate of its output            up^T (output_e + the first `rank` of u)

A token keeps its k_base experts of largest v and every other one of at least the layer's threshold; in place of each that it
skips, the estimate is added, times w_e. Half of the log of the layer's sensitivity is part of log_norm's constants, so that
v compares across layers, and one threshold for all spreads a budget over layers and tokens at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
import math

import numpy as np

from .._native import ffi, libggml_base
from .plan import Plan, PlanError

# values of a layer's distribution of v that are kept, from the least to the largest
N_QUANTILES = 65
# the arrays of an Estimator
ARRAYS = ("down", "log_norm", "output", "up", "quantiles")
# ggml's Q4_0: blocks of 32 values, a float16 scale and 16 bytes, the first half of the values in their low bits
BLOCK = 32
_Q4_0, _BLOCK_BYTES = 2, 18


@dataclass(frozen=True, eq=False)
class Estimator:
    """Arrays of float32, one entry a layer in each; layers without routed experts have entries too, of zeros.

    down: [n_layer, n_down, n_embd]; the first `rank` rows serve `up`, all serve `log_norm`, the last `n_relu` where positive.
    log_norm: [n_layer, n_expert, n_down + 1], the constant last.
    output: [n_layer, n_expert, rank]. up: [n_layer, rank, n_embd].
    quantiles: [n_layer, N_QUANTILES], ascending: v over text like the calibration's, of the candidates that are not among
        their token's k_base best.

    Rounded as they run and are stored: `up` and, where n_embd is a multiple of 32, `down` to Q4_0, whose blocks lie along
    n_embd in `down` and along the rank, padded with zeros, in `up`; `log_norm`, `output` and any other `down` to float16.

    Raises PlanError, naming the array, for shapes that do not fit each other and for numbers beyond float16's.
    """

    down: np.ndarray
    log_norm: np.ndarray
    output: np.ndarray
    up: np.ndarray
    quantiles: np.ndarray
    n_relu: int = 0

    def __post_init__(self):
        for name in ARRAYS:
            array = np.asarray(getattr(self, name))
            if array.dtype.kind not in "fiu" or array.ndim != (2 if name == "quantiles" else 3):
                raise PlanError(
                    f"estimator.{name}: found shape {array.shape}, dtype {array.dtype}, want real numbers by layer"
                )
            if not np.isfinite(array).all():
                raise PlanError(f"estimator.{name}: found NaN or infinity, want finite numbers")
            if name != "quantiles":
                with np.errstate(over="ignore"):
                    half = array.astype(np.float16)
                if not np.isfinite(half).all():
                    raise PlanError(f"estimator.{name}: found a number beyond the range of float16")
                array = _as_it_runs(name, array, half)
            array = np.array(array, np.float32, order="C")
            array.flags.writeable = False
            object.__setattr__(self, name, array)  # frozen; this is the one place that may set them
        object.__setattr__(self, "n_relu", int(self.n_relu))
        shapes = self.shapes(*self.log_norm.shape[:2], self.n_down, self.rank, self.n_embd)
        if self.n_down < 1 or not 0 <= self.rank <= self.n_down:
            raise PlanError(
                f"estimator: found n_down {self.n_down} and rank {self.rank}, want 0 <= rank <= n_down, 1 <= n_down"
            )
        if not 0 <= self.n_relu <= self.n_down - self.rank:
            raise PlanError(f"estimator.n_relu: found {self.n_relu}, want 0 to {self.n_down - self.rank}")
        for name, shape in shapes.items():
            if getattr(self, name).shape != shape:
                raise PlanError(f"estimator.{name}: found shape {getattr(self, name).shape}, want {shape}")
        if (np.diff(self.quantiles, axis=1) < 0).any():
            raise PlanError("estimator.quantiles: found falling ones, want them ascending")

    @staticmethod
    def shapes(n_layer: int, n_expert: int, n_down: int, rank: int, n_embd: int) -> dict:
        """The shape of each array by name."""
        return {
            "down": (n_layer, n_down, n_embd),
            "log_norm": (n_layer, n_expert, n_down + 1),
            "output": (n_layer, n_expert, rank),
            "up": (n_layer, rank, n_embd),
            "quantiles": (n_layer, N_QUANTILES),
        }

    @property
    def n_layer(self) -> int:
        return self.down.shape[0]

    @property
    def n_down(self) -> int:
        return self.down.shape[1]

    @property
    def n_embd(self) -> int:
        return self.down.shape[2]

    @property
    def n_expert(self) -> int:
        return self.log_norm.shape[1]

    @property
    def rank(self) -> int:
        return self.output.shape[2]

    def plan(self, total: int, full: tuple, k_base: int = 1, cost: tuple | None = None) -> Plan:
        """The plan by which tokens like the calibration's activate `total` experts in the mean, over all layers.

        full: K_l per layer. cost: of an activation in each layer, or None for 1 each; the plan then spends total / sum(K_l)
        of what all cost. An expert is kept for what it gives per cost: sizes count squared, as errors do, so a layer's
        threshold rises by half the log of its cost.

        expert_used_count is the layers' expected means, rounded so that their sum is rounded, too.

        Raises PlanError: the total is below k_base in every layer or above sum(K_l), or the model has other layers.
        """
        counts, threshold = self._plans(np.array([total]), full, k_base, cost)
        if np.isnan(threshold).any():
            base = sum(min(k, k_base) for k in full)
            raise PlanError(
                f"budget: found {total} activations, want {base} (k_base in every layer, at what they cost) to {sum(full)}"
                " under token rule 'estimate'"
            )
        return Plan(counts[0].tolist(), full, "estimate", k_base, threshold[0].tolist(), estimator=self)

    def plan_table(self, full: tuple, k_base: int = 1, cost: tuple | None = None) -> tuple:
        """The plans of every total from one expert in each layer with experts to all: expert_used_count int64
        [n_totals, n_layer], and threshold float32 of that shape, NaN in rows whose total the rule cannot serve."""
        totals = np.arange(sum(k > 0 for k in full), sum(full) + 1)
        return self._plans(totals, full, k_base, cost)

    def _plans(self, totals: np.ndarray, full: tuple, k_base: int, cost: tuple | None) -> tuple:
        """As `plan_table`, of any totals."""
        if len(full) != self.n_layer:
            raise PlanError(f"estimator: found {self.n_layer} layers, want {len(full)}, the model's")
        own = np.array(full)
        unit = np.where(own > 0, 1.0 if cost is None else cost, 1.0)
        base = np.minimum(own, k_base)
        want = totals / own.sum() * (unit * own).sum()
        least = (unit * base).sum()
        served = (least <= want * (1 + 1e-9)) & (totals <= own.sum())
        # relative to the mean, so that equal costs change nothing
        offset = 0.5 * np.log(unit / unit[own > 0].mean())

        def means(limit: np.ndarray) -> np.ndarray:
            shares = [self._share(il, limit + offset[il]) for il in range(len(full))]
            return base + (own - base) * np.stack(shares, axis=1)

        low = np.full(len(totals), self.quantiles.min() - abs(offset).max() - 1.0)
        high = np.full(len(totals), self.quantiles.max() + abs(offset).max() + 1.0)
        for _ in range(60):
            middle = (low + high) / 2
            above = (unit * means(middle)).sum(axis=1) > want
            low, high = np.where(above, middle, low), np.where(above, high, middle)
        mean = means(high)
        everything, nothing = totals == own.sum(), want <= least
        limit = np.where(everything, -np.inf, np.where(nothing, np.inf, high))
        mean = np.where(everything[:, None], own, np.where(nothing[:, None], base, mean))
        least_counts = np.where(own > 0, 1, 0)
        counts = [
            _rounded(row, least_counts, own, int(total) if cost is None else int(row.sum() + 0.5))
            if served_ else least_counts.tolist()
            for row, total, served_ in zip(mean, totals, served)
        ]  # fmt: skip
        threshold = np.where(own > 0, (limit[:, None] + offset).astype(np.float32), np.float32(0.0))
        threshold[~served] = np.nan
        return np.array(counts), threshold

    def shifted(self, limit: np.ndarray, shares: np.ndarray) -> Estimator:
        """With each layer's quantiles moved so that the given share of its candidates, [n_layer], has v of at least `limit`."""
        grid = np.linspace(0.0, 1.0, N_QUANTILES)
        shift = [t - np.interp(1.0 - share, grid, row) for t, share, row in zip(limit, shares, self.quantiles)]
        return replace(self, quantiles=self.quantiles + np.array(shift, np.float32)[:, None])

    def levelled(self, total: int, full: tuple, k_base: int = 1, part: float = 1.0) -> Estimator:
        """With the layers' sensitivities taken out: each layer's sizes moved so that the plan of `total` activations gives
        every layer the same share of its candidates beyond the k_base best. part: how far they are moved there, 0 to 1."""
        own, base = np.array(full), np.minimum(full, k_base)
        free = np.flatnonzero(own > base)
        if not free.size:
            return self
        share = np.clip((total - base.sum()) / (own - base).sum(), 0.0, 1.0)
        grid = np.linspace(0.0, 1.0, N_QUANTILES)
        at = np.array([np.interp(1.0 - share, grid, self.quantiles[il]) for il in free])
        log_norm, quantiles = self.log_norm.copy(), self.quantiles.copy()
        shift = part * (at.mean() - at)
        log_norm[free, :, -1] += shift[:, None]
        quantiles[free] += shift[:, None]
        return replace(self, log_norm=log_norm, quantiles=quantiles)

    def _share(self, il: int, limit: np.ndarray) -> np.ndarray:
        """Of a layer's candidates beyond the k_base best, those with v of at least each `limit`."""
        row = self.quantiles[il]
        return np.where(limit > row[-1], 0.0, 1.0 - np.interp(limit, row, np.linspace(0.0, 1.0, N_QUANTILES)))


def _rounded(means: np.ndarray, low: np.ndarray, high: np.ndarray, total: int) -> list:
    """Integers with the sum `total`, from low to high, each near its mean: by largest remainders."""
    counts = np.clip(np.floor(means).astype(int), low, high)
    while counts.sum() < total:
        counts[np.argmax(np.where(counts < high, means - counts, -np.inf))] += 1
    while counts.sum() > total:
        counts[np.argmin(np.where(counts > low, means - counts, np.inf))] -= 1
    return counts.tolist()


def as_it_runs(down: np.ndarray) -> np.ndarray:
    """float32 of the same shape, [..., n_embd]: directions rounded as the runtime multiplies by them, to Q4_0 where n_embd is a
    multiple of its block of 32, else to float16. What is fitted on products with them should be fitted on the rounded ones."""
    if not down.size or not _in_blocks(down.shape[-1]):
        return down.astype(np.float16).astype(np.float32)
    return from_blocks(to_blocks(down), down.shape[-1])


def _as_it_runs(name: str, array: np.ndarray, half: np.ndarray) -> np.ndarray:
    if name == "down":
        return as_it_runs(array)
    if name == "up" and array.shape[1]:
        return from_blocks(to_blocks(_columns(array)), array.shape[1]).swapaxes(1, 2)
    return half


def _in_blocks(n: int) -> bool:
    return n % BLOCK == 0


def _columns(up: np.ndarray) -> np.ndarray:
    """[n_layer, rank, n_embd] as [n_layer, n_embd, rank padded to whole blocks]."""
    return np.pad(np.swapaxes(up, 1, 2), ((0, 0), (0, 0), (0, -up.shape[1] % BLOCK)))


def to_blocks(array: np.ndarray) -> np.ndarray:
    """Rows in Q4_0, whole blocks: uint8, [..., bytes of a row]."""
    rows = np.ascontiguousarray(array, np.float32).reshape(-1, array.shape[-1])
    blocks = np.empty((len(rows), rows.shape[1] // BLOCK * _BLOCK_BYTES), np.uint8)
    if rows.size:
        libggml_base.ggml_quantize_chunk(
            _Q4_0, ffi.from_buffer("float[]", rows), ffi.from_buffer(blocks), 0, *rows.shape, ffi.NULL
        )
    return blocks.reshape(*array.shape[:-1], blocks.shape[1])


def from_blocks(blocks: np.ndarray, n: int) -> np.ndarray:
    """The first n values of rows in Q4_0: float32, [..., n]."""
    n_blocks = blocks.shape[-1] // _BLOCK_BYTES
    of_block = blocks.reshape(*blocks.shape[:-1], n_blocks, _BLOCK_BYTES)
    scale = np.ascontiguousarray(of_block[..., :2]).view("<f2").astype(np.float32)
    nibbles = np.concatenate([of_block[..., 2:] & 15, of_block[..., 2:] >> 4], axis=-1)
    with np.errstate(invalid="ignore"):  # an infinite scale of a damaged file, which is refused with the values
        values = scale * (nibbles.astype(np.float32) - 8)
    return np.ascontiguousarray(values.reshape(*blocks.shape[:-1], n_blocks * BLOCK)[..., :n])


def stored(name: str, array: np.ndarray) -> np.ndarray:
    """One of the arrays down, log_norm, output and up, of some layers, as a file has it: uint64. Metadata arrays are read entry
    by entry by many programs, and these are an eighth as many as there are bytes."""
    rows = _columns(array) if name == "up" else array
    data = to_blocks(rows) if _stored_in_blocks(name, array.shape) else rows.astype("<f2").view(np.uint8)
    flat = np.ascontiguousarray(data).ravel()
    return np.concatenate([flat, np.zeros(-flat.size % 8, np.uint8)]).view("<u8").astype(np.uint64)


def from_stored(name: str, words: np.ndarray, shape: tuple) -> np.ndarray:
    """The inverse of `stored`: float32 of a shape that takes as many `n_words`."""
    raw = words.astype("<u8").view(np.uint8)[: _n_bytes(name, shape)]
    if not _stored_in_blocks(name, shape):
        return raw.view("<f2").astype(np.float32).reshape(shape)
    if name == "up":
        return from_blocks(raw.reshape(shape[0], shape[2], -1), shape[1]).swapaxes(1, 2)
    return from_blocks(raw.reshape(*shape[:2], -1), shape[2])


def n_words(name: str, shape: tuple) -> int:
    """How many entries `stored` makes of an array of that shape."""
    return -(-_n_bytes(name, shape) // 8)


def _stored_in_blocks(name: str, shape: tuple) -> bool:
    return math.prod(shape) > 0 and (name == "up" or (name == "down" and _in_blocks(shape[2])))


def _n_bytes(name: str, shape: tuple) -> int:
    if not _stored_in_blocks(name, shape):
        return 2 * math.prod(shape)
    n_rows, n = (shape[0] * shape[2], shape[1]) if name == "up" else (shape[0] * shape[1], shape[2])
    return n_rows * -(-n // BLOCK) * _BLOCK_BYTES

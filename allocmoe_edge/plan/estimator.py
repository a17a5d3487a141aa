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

import numpy as np

from .plan import Plan, PlanError

# values of a layer's distribution of v that are kept, from the least to the largest
N_QUANTILES = 65
# the arrays of an Estimator
ARRAYS = ("down", "log_norm", "output", "up", "quantiles")


@dataclass(frozen=True, eq=False)
class Estimator:
    """Arrays of float32, one entry a layer in each; layers without routed experts have entries too, of zeros.

    down: [n_layer, n_down, n_embd]; the first `rank` rows serve `up`, all serve `log_norm`, the last `n_relu` where positive.
    log_norm: [n_layer, n_expert, n_down + 1], the constant last.
    output: [n_layer, n_expert, rank]. up: [n_layer, rank, n_embd].
    quantiles: [n_layer, N_QUANTILES], ascending: v over text like the calibration's, of the candidates that are not among
        their token's k_base best.

    All but the quantiles are rounded to float16, as they are stored. `up` runs in Q4_0, and so does `down` where n_embd is a
    multiple of 32.

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
                    array = array.astype(np.float16)
                if not np.isfinite(array).all():
                    raise PlanError(f"estimator.{name}: found a number beyond the range of float16")
            array = array.astype(np.float32)
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
        if len(full) != self.n_layer:
            raise PlanError(f"estimator: found {self.n_layer} layers, want {len(full)}, the model's")
        own = np.array(full)
        unit = np.where(own > 0, 1.0 if cost is None else cost, 1.0)
        base = np.minimum(own, k_base)
        want = total / own.sum() * (unit * own).sum()
        if not (unit * base).sum() <= want * (1 + 1e-9) or total > own.sum():
            raise PlanError(
                f"budget: found {total} activations, want {base.sum()} (k_base in every layer, at what they cost) to {own.sum()}"
                " under token rule 'estimate'"
            )
        # relative to the mean, so that equal costs change nothing
        offset = 0.5 * np.log(unit / unit[own > 0].mean())

        def means(limit: float) -> np.ndarray:
            return base + (own - base) * [self._share(il, limit + offset[il]) for il in range(len(full))]

        if total == own.sum():
            limit, mean = -np.inf, own.astype(float)
        elif want <= (unit * base).sum():
            limit, mean = np.inf, base.astype(float)
        else:
            low, high = self.quantiles.min() - abs(offset).max() - 1.0, self.quantiles.max() + abs(offset).max() + 1.0
            for _ in range(60):
                middle = (low + high) / 2
                low, high = (middle, high) if (unit * means(middle)).sum() > want else (low, middle)
            limit, mean = high, means(high)
        counts = _rounded(mean, np.where(own > 0, 1, 0), own, total if cost is None else int(mean.sum() + 0.5))
        threshold = np.where(own > 0, (limit + offset).astype(np.float32), 0.0)
        return Plan(counts, full, "estimate", k_base, threshold.tolist(), estimator=self)

    def shifted(self, limit: np.ndarray, shares: np.ndarray) -> Estimator:
        """With each layer's quantiles moved so that the given share of its candidates, [n_layer], has v of at least `limit`."""
        grid = np.linspace(0.0, 1.0, N_QUANTILES)
        shift = [t - np.interp(1.0 - share, grid, row) for t, share, row in zip(limit, shares, self.quantiles)]
        return replace(self, quantiles=self.quantiles + np.array(shift, np.float32)[:, None])

    def _share(self, il: int, limit: float) -> float:
        """Of a layer's candidates beyond the k_base best, those with v of at least `limit`."""
        row = self.quantiles[il]
        if limit > row[-1]:
            return 0.0
        return 1.0 - float(np.interp(limit, row, np.linspace(0.0, 1.0, N_QUANTILES)))


def _rounded(means: np.ndarray, low: np.ndarray, high: np.ndarray, total: int) -> list:
    """Integers with the sum `total`, from low to high, each near its mean: by largest remainders."""
    counts = np.clip(np.floor(means).astype(int), low, high)
    while counts.sum() < total:
        counts[np.argmax(np.where(counts < high, means - counts, -np.inf))] += 1
    while counts.sum() > total:
        counts[np.argmin(np.where(counts > low, means - counts, np.inf))] -= 1
    return counts.tolist()


def pack(values: np.ndarray) -> np.ndarray:
    """float16 values, four to a uint64, zeros at the end: metadata arrays of a quarter as many entries are quicker to read."""
    flat = np.asarray(values, "<f2").ravel()
    return np.concatenate([flat, np.zeros(-flat.size % 4, "<f2")]).view("<u8").astype(np.uint64)


def unpack(words: np.ndarray, shape: tuple) -> np.ndarray:
    """The inverse of `pack`, as float32 of a shape that takes as many values."""
    n = int(np.prod(shape))
    return words.astype("<u8").view("<f2")[:n].astype(np.float32).reshape(shape)

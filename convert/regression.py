"""The regressions of `estimate.py`: closed forms from sums over tokens, so that no text has to be held in memory, and for
directions that count where positive a small network, trained on inputs of fewer dimensions.

Sums are kept in float32 and solved in float64. All regressions are ridge regressions: a part of the mean of the inputs' squares, or
so many tokens' worth, is added to the diagonal of their matrix of products.
"""

from __future__ import annotations

from typing import List

from allocmoe_edge.plan.estimator import as_it_runs
import numpy as np

# of the mean of the inputs' squares, and of the squares of the weights that are skipped
_RIDGE, _RIDGE_WEIGHTS = 0.03, 0.02
# The directions for sizes are to hold on text unlike the calibration's: with a ridge of 0.03, inputs that vary little there and
# more elsewhere had sizes estimated too small by up to 0.5 in the testbed's last layers, on a manual, and 0.77 of the budget spent.
_RIDGE_DIRECTIONS = 1.0
# tokens' worth of belief that an expert's sizes depend on the input as all experts' do
PRIOR_TOKENS = 600.0
# a token with more than so many times the median of what is missing counts as if it had so much
_OUTLIER = 8.0
# Of the training of directions that count where positive: Adam's, the rate falling to zero. The penalty on the parameters' squares
# is what keeps them from learning the text by heart, a part of the gradient and not a decay beside it (as AdamW has it): where the
# text has something to say it weighs little. At a rate of 3e-3 without it up to half of the directions ended where no token is.
_EPOCHS, _BATCH, _RATE, PENALTY = 10, 128, 2e-3, 1e-3
# Of subspaces towards the main ones: where the smallest of those that are wanted hardly differ from those that are not, a few
# will do, and where their number is the rank of what is fitted, more.
_ITERATIONS, _ITERATIONS_OF_RANK = 3, 10
# rows up to which a whole decomposition takes next to no time
_WHOLE = 1024


def main_vectors(matrix: np.ndarray, n: int, iterations: int) -> np.ndarray:
    """float64 [len(matrix), n]: eigenvectors of the n largest eigenvalues of a symmetric matrix without negative ones, falling.

    Where n is few of all, by subspace iteration (Halko, Martinsson and Tropp, SIAM Review 2011): the decomposition of a matrix of
    2,048 rows takes longer than the model needs for a window in that layer. The same matrix gives the same vectors.
    """
    block = n + n // 16 + 16
    if len(matrix) <= max(2 * block, _WHOLE):
        return np.linalg.eigh(matrix)[1][:, ::-1][:, :n]
    basis = np.random.default_rng(0).standard_normal((len(matrix), block))
    for _ in range(iterations):
        basis = np.linalg.qr(matrix @ basis)[0]
    return basis @ np.linalg.eigh(basis.T @ matrix @ basis)[1][:, ::-1][:, :n]


class SizeSums:
    """Sums for directions of the input on which the sizes of the experts' outputs depend, of one layer."""

    def __init__(self, n_expert: int, n_embd: int):
        self.n = 0
        self.products = np.zeros((n_embd, n_embd), np.float32)
        self.inputs = np.zeros(n_embd)
        self.expert_n = np.zeros(n_expert)
        self.expert_sizes = np.zeros(n_expert)
        self.expert_inputs = np.zeros((n_expert, n_embd), np.float32)
        self.expert_products = np.zeros((n_expert, n_embd), np.float32)

    def add(self, x: np.ndarray, experts: np.ndarray, sizes: np.ndarray) -> None:
        """x: float32 [n, n_embd], inputs. experts: int [n, K], each token's. sizes: [n, K], log of their outputs' norms."""
        rows = np.arange(len(x))[:, None]
        used, of_size = (np.zeros((len(x), len(self.expert_n)), np.float32) for _ in range(2))
        used[rows, experts] = 1.0
        of_size[rows, experts] = sizes
        self.n += len(x)
        self.products += x.T @ x
        self.inputs += x.sum(axis=0, dtype=np.float64)
        self.expert_n += used.sum(axis=0)
        self.expert_sizes += of_size.sum(axis=0, dtype=np.float64)
        self.expert_inputs += used.T @ x
        self.expert_products += of_size.T @ x

    def directions(self, n_down: int) -> np.ndarray:
        """float64 [n_down, n_embd]: those that tell most about all experts' sizes, of variance 1; zeros where fewer do.

        Every expert's sizes are regressed on the input, with the covariance of all tokens' inputs in place of its own.
        The directions are the main ones of what the regressions predict (reduced-rank regression, Izenman 1975).
        """
        covariance = self._covariance()
        n = np.maximum(self.expert_n, 1.0)
        of_size = (self.expert_products - self.expert_inputs * (self.expert_sizes / n)[:, None]) / n[:, None]
        ridge = _RIDGE_DIRECTIONS * np.trace(covariance) / len(covariance)
        # never zero, for inputs that are all alike
        slopes = np.linalg.solve(covariance + (ridge + 1e-30) * np.eye(len(covariance)), of_size.T).T
        slopes *= np.sqrt(self.expert_n / self.n)[:, None]
        return _main_directions(slopes, covariance, n_down)

    def _covariance(self) -> np.ndarray:
        mean = self.inputs / self.n
        return self.products.astype(np.float64) / self.n - np.outer(mean, mean)

    def main_inputs(self, n: int) -> np.ndarray:
        """float64 [n, n_embd]: the n main directions of the inputs' covariance; divided by the root of their mean variance, so
        that one of n_embd inputs has a variance of 1 in the mean."""
        covariance = self._covariance()
        return main_vectors(covariance, n, _ITERATIONS).T / np.sqrt(max(np.trace(covariance) / len(covariance), 1e-30))


def _main_directions(slopes: np.ndarray, covariance: np.ndarray, n_down: int) -> np.ndarray:
    variance, mix = np.linalg.eigh(slopes @ covariance @ slopes.T)
    variance, mix = variance[::-1][:n_down], mix[:, ::-1][:, :n_down]
    some = variance > 1e-9 * max(variance[0], 1e-30)
    down = np.zeros((n_down, len(covariance)))
    down[: some.sum()] = (mix[:, some] / np.sqrt(variance[some])).T @ slopes
    return down


def fit_sizes(
    u: np.ndarray, experts: np.ndarray, sizes: np.ndarray, n_expert: int, *prior_tokens: float
) -> List[np.ndarray]:
    """Each expert's log size as a linear function of u, by ridge regression over the tokens that use it. Its slopes are drawn not
    to zero but to those that fit all experts at once, which are known from K times as many sizes.

    Args:
        u: [n, n_down]. experts: int [n, K]. sizes: [n, K].
        prior_tokens: how strongly they are drawn there, and those in common to zero: as by so many tokens of variance 1.

    Returns:
        For each of prior_tokens float64 [n_expert, n_down + 1], the constant last; those of all experts for one that no token uses.
    """
    n_down = u.shape[1]
    means, products, targets = {}, {}, {}
    for e in np.unique(experts):
        token, rank = np.nonzero(experts == e)
        inputs, values = u[token].astype(np.float64), sizes[token, rank].astype(np.float64)
        means[e] = inputs.mean(axis=0), values.mean()
        inputs -= means[e][0]
        products[e], targets[e] = inputs.T @ inputs, inputs.T @ (values - means[e][1])

    all_products, all_targets = sum(products.values()), sum(targets.values())

    def with_prior(prior: float) -> np.ndarray:
        diagonal = prior * np.eye(n_down)
        common = np.linalg.solve(all_products + diagonal, all_targets)
        found = np.tile(np.append(common, sizes.mean() - common @ u.mean(axis=0)), (n_expert, 1))
        for e, (mean, value) in means.items():
            slope = common + np.linalg.solve(products[e] + diagonal, targets[e] - products[e] @ common)
            found[e] = np.append(slope, value - slope @ mean)
        return found

    return [with_prior(prior) for prior in prior_tokens]


def sizes_of(fitted: np.ndarray, u: np.ndarray, experts: np.ndarray) -> np.ndarray:
    """[n, K]: the experts' log sizes by what `fit_sizes` gives, u [n, n_down], experts int [n, K]."""
    return np.einsum("tri,ti->tr", fitted[experts, :-1], u) + fitted[experts, -1]


def positive_directions(
    x: np.ndarray, u: np.ndarray, experts: np.ndarray, sizes: np.ndarray, n_expert: int, n: int
) -> np.ndarray:
    """Directions whose positive parts tell about the experts' sizes what is not linear: the first layer of a small network.

    Trained by Adam (Kingma and Ba, ICLR 2015) to predict the sizes from relu(directions x) and u; the same input gives the same
    directions.

    Args:
        x: float16 or float32 [n_tokens, n_input], of variance about 1. u: float32 [n_tokens, n_down], what sizes depend on linearly.
        experts: int [n_tokens, K]. sizes: [n_tokens, K].

    Returns:
        float32 [n, n_input].
    """
    rng = np.random.default_rng(0)
    used, wanted = (np.zeros((len(x), n_expert), np.float32) for _ in range(2))
    np.put_along_axis(used, experts, 1.0, axis=1)
    linear = fit_sizes(u, experts, sizes, n_expert, PRIOR_TOKENS)[0].astype(np.float32)
    np.put_along_axis(wanted, experts, sizes, axis=1)
    wanted -= used * linear[:, -1]
    directions = rng.standard_normal((x.shape[1], n), np.float32) / np.float32(np.sqrt(x.shape[1]))
    parameters = [
        directions,
        np.zeros((n, n_expert), np.float32),
        linear[:, :-1].T.copy(),
        np.zeros(n_expert, np.float32),
    ]
    moments = [(np.zeros_like(p), np.zeros_like(p)) for p in parameters]
    n_batches = -(-len(x) // _BATCH)
    for step in range(_EPOCHS * n_batches):
        if step % n_batches == 0:
            order = rng.permutation(len(x))
        rows = order[step % n_batches :: n_batches]
        gradients = _gradients(parameters, x[rows].astype(np.float32), u[rows], used[rows], wanted[rows])
        rate = _RATE * (1 - step / (_EPOCHS * n_batches))
        for parameter, gradient, (first, second) in zip(parameters, gradients, moments):
            gradient = gradient + np.float32(PENALTY) * parameter
            first += 0.1 * (gradient - first)
            second += 0.001 * (gradient**2 - second)
            corrected = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
            parameter -= rate * corrected[0] / (np.sqrt(corrected[1]) + 1e-8)
    return directions.T


def _gradients(parameters: list, x: np.ndarray, u: np.ndarray, used: np.ndarray, wanted: np.ndarray) -> list:
    """Of the mean squared error over the experts that are used."""
    directions, of_positive, of_linear, constant = parameters
    positive = np.maximum(x @ directions, 0.0)
    error = used * (positive @ of_positive + u @ of_linear + constant - wanted) * np.float32(2 / used.sum())
    back = (error @ of_positive.T) * (positive > 0)
    return [x.T @ back, positive.T @ error, u.T @ error, error.sum(axis=0)]


class MissingSums:
    """Sums for an estimate of what skipped experts would have given, of one layer."""

    def __init__(self, n_expert: int, n_embd: int):
        self.n_expert = n_expert
        size = n_expert + n_embd
        self.products = np.zeros((size, size), np.float32)
        self.targets = np.zeros((size, n_embd), np.float32)

    def add(self, x: np.ndarray, skipped: np.ndarray, missing: np.ndarray) -> None:
        """x: float32 [n, n_embd], inputs. skipped: [n, n_expert], weights of skipped experts. missing: [n, n_embd]."""
        norm = np.linalg.norm(missing, axis=1)
        some = norm > 0
        if not some.any():
            return
        # least squares would serve the few tokens alone whose activations are huge in many models, like a text's first
        limit = _OUTLIER * np.median(norm[some])
        scale = np.minimum(1.0, limit / norm[some])[:, None].astype(np.float32)
        skipped, x, missing = skipped[some] * scale, x[some], missing[some] * scale
        inputs = np.concatenate([skipped, skipped.sum(axis=1, keepdims=True) * x], axis=1).astype(np.float32)
        self.products += inputs.T @ inputs
        self.targets += inputs.T @ missing

    def fit(self, rank: int) -> tuple:
        """(output [n_expert, rank], down [rank, n_embd], up [rank, n_embd]), float64: missing is estimated as
        sum over skipped of weight * up^T (output_e + down x), by reduced-rank ridge regression; `up` to what is left of `down`
        when it runs."""
        n_expert, products = self.n_expert, self.products.astype(np.float64)
        square = products.diagonal().copy()
        ridge = np.full(len(square), _RIDGE * square[n_expert:].mean())
        ridge[:n_expert] = _RIDGE_WEIGHTS * square[:n_expert]
        # never zero, for experts that are never skipped
        products[np.diag_indices_from(products)] += ridge + 1e-6 * square.max() + 1e-30
        targets = self.targets.astype(np.float64)
        solved = np.linalg.solve(products, targets)
        up = main_vectors(targets.T @ solved, rank, _ITERATIONS_OF_RANK)
        inner = solved @ up
        # both factors of like size: entries are stored in float16
        scale = np.sqrt(np.abs(up).max(axis=0) / np.maximum(np.abs(inner).max(axis=0), 1e-30))
        scale = np.where(np.abs(inner).max(axis=0) > 0, scale, 1.0)
        inner = inner * scale
        inner[n_expert:] = as_it_runs(inner[n_expert:].T).T
        matrix = inner.T @ products @ inner
        matrix[np.diag_indices_from(matrix)] += 1e-6 * matrix.diagonal().max() + 1e-30
        up = np.linalg.solve(matrix, inner.T @ targets)
        return inner[:n_expert], inner[n_expert:].T, up

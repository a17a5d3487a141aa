"""The trained part of what token rule "estimate" goes by (`convert/regression.py`), by itself."""

from allocmoe_edge.convert.regression import (
    SizeSums,
    _gradients,
    fit_sizes,
    main_vectors,
    positive_directions,
    sizes_of,
)
import numpy as np
import pytest

N_TOKENS, N_INPUT, N_EXPERT, K = 12000, 20, 6, 3


def test_gradients_are_those_of_the_squared_error():
    """Against differences in float64; 1e-6, where a step of 1e-6 crosses no corner."""
    rng = np.random.default_rng(0)
    x, u = rng.standard_normal((8, 5)), rng.standard_normal((8, 2))
    used = (rng.random((8, 4)) < 0.6).astype(float)
    wanted = rng.standard_normal((8, 4)) * used
    parameters = [rng.standard_normal(shape) for shape in ((5, 3), (3, 4), (2, 4), (4,))]

    def loss():
        directions, of_positive, of_linear, constant = parameters
        found = np.maximum(x @ directions, 0) @ of_positive + u @ of_linear + constant
        return (used * (found - wanted) ** 2).sum() / used.sum()

    for parameter, gradient in zip(parameters, _gradients(parameters, x, u, used, wanted)):
        for i in np.ndindex(parameter.shape):
            before = parameter[i]
            parameter[i] = before + 1e-6
            high = loss()
            parameter[i] = before - 1e-6
            low = loss()
            parameter[i] = before
            assert gradient[i] == pytest.approx((high - low) / 2e-6, abs=1e-6)


def test_positive_directions_find_what_is_not_linear():
    """Sizes |a_e . x|, of which nothing linear tells anything: the positive parts of 16 directions tell nearly all."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2 * N_TOKENS, N_INPUT)).astype(np.float32)
    slopes = rng.standard_normal((N_EXPERT, N_INPUT)) / np.sqrt(N_INPUT)
    experts = np.array([rng.permutation(N_EXPERT)[:K] for _ in x])
    sizes = np.take_along_axis(np.abs(x @ slopes.T), experts, 1)
    fit, apart = slice(N_TOKENS), slice(N_TOKENS, None)

    def explained(u):
        found = fit_sizes(u[fit], experts[fit], sizes[fit], N_EXPERT, 16)[0]
        return 1 - ((sizes[apart] - sizes_of(found, u[apart], experts[apart])) ** 2).mean() / sizes[apart].var()

    linear = x[:, :4]
    directions = positive_directions(x[fit], linear[fit], experts[fit], sizes[fit], N_EXPERT, 16)
    assert directions.shape == (16, N_INPUT)
    assert explained(linear) < 0.05
    assert explained(np.concatenate([linear, np.maximum(x @ directions.T, 0)], 1)) > 0.8
    again = positive_directions(x[fit], linear[fit], experts[fit], sizes[fit], N_EXPERT, 16)
    assert np.array_equal(directions, again)


def test_directions_do_not_learn_the_text_by_heart():
    """Sizes that are half noise, which all of a token's experts have in common, of few tokens for so many inputs: a third of what other
    tokens' vary by is explained, without the penalty 0.06."""
    rng = np.random.default_rng(4)
    x = rng.standard_normal((8000, 100)).astype(np.float32)
    experts = np.array([rng.permutation(N_EXPERT)[:K] for _ in x])
    size = np.abs(x @ rng.standard_normal(100)) / 10 - 0.8 + 0.5 * rng.standard_normal(len(x))
    sizes = np.repeat(size[:, None], K, axis=1)
    fit, apart = slice(4000), slice(4000, None)
    linear = x[:, :1]
    directions = positive_directions(x[fit], linear[fit], experts[fit], sizes[fit], N_EXPERT, 24)
    u = np.concatenate([linear, np.maximum(x @ directions.T, 0)], 1)
    found = fit_sizes(u[fit], experts[fit], sizes[fit], N_EXPERT, 16)[0]
    left = sizes[apart] - sizes_of(found, u[apart], experts[apart])
    assert 1 - (left**2).mean() / sizes[apart].var() > 0.25


def test_slopes_are_drawn_to_those_in_common():
    """20 slopes that differ little from the others', of an expert that 12 tokens use and one that none does; drawn to zero, those of the
    first were a third off."""
    rng = np.random.default_rng(3)
    u = rng.standard_normal((2000, 20)).astype(np.float32)
    common = rng.standard_normal(20)
    slopes = common + 0.1 * rng.standard_normal((N_EXPERT, 20))
    experts = np.array([rng.permutation(N_EXPERT - 2)[:2] for _ in u])
    experts[:12, 0] = N_EXPERT - 2
    sizes = np.einsum("tri,ti->tr", slopes[experts], u) + 5.0
    found = fit_sizes(u, experts, sizes, N_EXPERT, 100)[0]
    for e, off in ((0, 0.1), (N_EXPERT - 2, 0.2), (N_EXPERT - 1, 0.2)):
        assert np.linalg.norm(found[e, :-1] - slopes[e]) < off * np.linalg.norm(slopes[e])
    assert found[:, -1] == pytest.approx(5.0, abs=0.5)


def test_main_inputs_are_the_main_directions():
    rng = np.random.default_rng(2)
    x = (rng.standard_normal((5000, 8)) * np.arange(1, 9) + 3).astype(np.float32)
    sums = SizeSums(N_EXPERT, 8)
    sums.add(x, np.zeros((5000, 1), int), np.zeros((5000, 1)))
    found = sums.main_inputs(3)
    # one of eight inputs has a variance of 1 in the mean: the largest are 64, 49 and 36 of 25.5
    np.testing.assert_allclose((x @ found.T).var(axis=0), np.array([64, 49, 36]) / 25.5, rtol=0.1)
    assert (np.abs(found).argmax(axis=1) == [7, 6, 5]).all()


def test_few_main_vectors_of_many():
    """By subspace iteration: they hold what the true ones hold of the matrix but for 1%, where eigenvalues fall as those of a
    layer's inputs do, and those that stand out are the true ones."""
    rng = np.random.default_rng(3)
    axes = np.linalg.qr(rng.standard_normal((1100, 1100)))[0]
    values = 1 / np.arange(1, 1101) ** 1.2
    matrix = axes @ np.diag(values) @ axes.T
    found = main_vectors(matrix, 40, 3)
    np.testing.assert_allclose(found.T @ found, np.eye(40), atol=1e-9)
    held = np.einsum("ij,ik,kj->j", found, matrix, found)
    assert held.sum() > 0.99 * values[:40].sum() and (np.diff(held) <= 0).all()
    assert (np.abs((axes[:, :5] * found[:, :5]).sum(axis=0)) > 0.999).all()
    assert np.array_equal(found, main_vectors(matrix, 40, 3))
    # half of them: exactly
    whole = main_vectors(matrix, 550, 0)
    np.testing.assert_allclose(np.einsum("ij,ik,kj->j", whole, matrix, whole), values[:550])

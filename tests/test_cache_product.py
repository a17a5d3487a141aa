"""One token's products with a half-precision cache, by themselves on the CPU: grouped heads, every remainder of the tiles."""

from __future__ import annotations

from ggml_ffi import OUR_FLOATS, base, compute, ffi
import numpy as np
import pytest

F32, F16 = 0, 1  # ggml.h
PADDING = 3  # elements after each line that are no part of the matrix
MATRICES = 2
# The rounding of sums of float32, as a share of the terms' sizes. llama.cpp's kernel, which runs where there is none of ours,
# rounds the heads to half precision first: each term by 2**-11 at most.
TOLERANCE = 2e-6 if OUR_FLOATS else 2e-6 + 2**-11


@pytest.mark.parametrize("n_heads", [2, 3, 4, 5, 8, 9, 16])  # that share a matrix; taken 2, 4 or 8 at a time
@pytest.mark.parametrize("n_lines", [1, 2, 3, 63, 64, 65, 130])  # in blocks of 64
@pytest.mark.parametrize("n", [1, 15, 16, 17, 31, 128, 576])  # vectors have 4, 8 or 16 elements
def test_product_with_shared_cache(cpu_backend, n, n_lines, n_heads):
    rng = np.random.default_rng(n + n_lines + n_heads)
    lines = rng.standard_normal((MATRICES, n_lines, n + PADDING)).astype(np.float16)
    heads = rng.standard_normal((MATRICES * n_heads, 1, n)).astype(np.float32)
    context = base.ggml_init({"mem_size": 1 << 20, "mem_buffer": ffi.NULL, "no_alloc": True})
    cache = base.ggml_new_tensor_3d(context, F16, n + PADDING, n_lines, MATRICES)
    view = base.ggml_view_3d(context, cache, n, n_lines, MATRICES, cache.nb[1], cache.nb[2], 0)
    # as queries lie: token by token, all heads of one together
    queries = base.ggml_new_tensor_3d(context, F32, n, MATRICES * n_heads, 1)
    permuted = base.ggml_view_3d(context, queries, n, 1, MATRICES * n_heads, queries.nb[2], queries.nb[1], 0)
    out = base.ggml_mul_mat(context, view, permuted)
    got = np.full((MATRICES * n_heads, n_lines), np.nan, np.float32)
    compute(cpu_backend, context, out, [(cache, lines), (queries, heads)], got)
    matrix = lines[:, :, :n].astype(np.float64).repeat(n_heads, axis=0)
    terms = matrix * heads
    assert np.abs(got - terms.sum(axis=2)).max() <= TOLERANCE * np.abs(terms).sum(axis=2).max()


def product(cpu_backend, lines, heads):
    """lines: [matrices, lines, n]. heads: [tokens, matrices*n_heads, n]. Returns [matrices*n_heads, tokens, lines]."""
    n_tokens, n_heads, n = heads.shape
    context = base.ggml_init({"mem_size": 1 << 20, "mem_buffer": ffi.NULL, "no_alloc": True})
    cache = base.ggml_new_tensor_3d(context, F16, n, lines.shape[1], lines.shape[0])
    queries = base.ggml_new_tensor_3d(context, F32, n, n_heads, n_tokens)
    permuted = base.ggml_view_3d(context, queries, n, n_tokens, n_heads, queries.nb[2], queries.nb[1], 0)
    got = np.full((n_heads, n_tokens, lines.shape[1]), np.nan, np.float32)
    heads = np.ascontiguousarray(heads)
    compute(cpu_backend, context, base.ggml_mul_mat(context, cache, permuted), [(cache, lines), (queries, heads)], got)
    return got


@pytest.mark.parametrize("n_heads", [1, 2, 3, 8])
@pytest.mark.parametrize("n_tokens", [2, 3, 5, 17, 32])
def test_tokens_together_are_as_alone(cpu_backend, n_heads, n_tokens):
    """Bit for bit: a draft is verified with the numbers of plain decoding. llama.cpp's kernels for several round otherwise."""
    rng = np.random.default_rng(n_heads * n_tokens)
    lines = rng.standard_normal((MATRICES, 67, 72)).astype(np.float16)
    heads = rng.standard_normal((n_tokens, MATRICES * n_heads, 72)).astype(np.float32)
    together = product(cpu_backend, lines, heads)
    for t in range(n_tokens if OUR_FLOATS else 0):  # elsewhere the second half alone is asked
        assert np.array_equal(together[:, t], product(cpu_backend, lines, heads[t : t + 1])[:, 0])
    terms = np.einsum("mln,tmhn->mhtln", lines.astype(np.float64), heads.reshape(n_tokens, MATRICES, n_heads, 72))
    wanted, size = terms.sum(-1).reshape(together.shape), np.abs(terms).sum(-1).max()
    assert np.abs(together - wanted).max() <= TOLERANCE * size


@pytest.mark.parametrize("n_tokens", [2, 3, 9, 32, 200])
def test_routers_of_tokens_together_are_as_alone(cpu_backend, n_tokens):
    """The same for a small matrix of floats."""
    rng = np.random.default_rng(n_tokens)
    router = rng.standard_normal((61, 576)).astype(np.float32)
    inputs = rng.standard_normal((n_tokens, 576)).astype(np.float32)

    def scores(x):
        context = base.ggml_init({"mem_size": 1 << 20, "mem_buffer": ffi.NULL, "no_alloc": True})
        matrix = base.ggml_new_tensor_3d(context, F32, 576, 61, 1)
        tokens = base.ggml_new_tensor_3d(context, F32, 576, len(x), 1)
        got = np.full((len(x), 61), np.nan, np.float32)
        out = base.ggml_mul_mat(context, matrix, tokens)
        compute(cpu_backend, context, out, [(matrix, router), (tokens, np.ascontiguousarray(x))], got)
        return got

    together = scores(inputs)
    assert all(np.array_equal(together[t], scores(inputs[t : t + 1])[0]) for t in range(n_tokens))
    terms = inputs[:, None].astype(np.float64) * router
    assert np.abs(together - terms.sum(-1)).max() <= 2e-6 * np.abs(terms).sum(-1).max()

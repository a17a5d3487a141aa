"""One token's products with a half-precision cache, by themselves on the CPU: grouped heads, every remainder of the tiles."""

from __future__ import annotations

from ggml_ffi import base, compute, ffi
import numpy as np
import pytest

F32, F16 = 0, 1  # ggml.h
PADDING = 3  # elements after each line that are no part of the matrix
MATRICES = 2


@pytest.mark.parametrize("n_heads", [2, 3, 4, 5, 8, 9, 16])  # that share a matrix; taken 2, 4 or 8 at a time
@pytest.mark.parametrize("n_lines", [1, 2, 3, 63, 64, 65, 130])  # in blocks of 64
@pytest.mark.parametrize("n", [1, 15, 16, 17, 31, 128, 576])  # vectors have 4, 8 or 16 elements
def test_product_with_shared_cache(cpu_backend, n, n_lines, n_heads):
    """To the rounding of sums of float32: llama.cpp's kernel, which rounds the heads to half precision, is 100 times as far off."""
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
    assert np.abs(got - terms.sum(axis=2)).max() <= 2e-6 * np.abs(terms).sum(axis=2).max()

"""CONT of a transposed matrix by itself on the CPU, as latent attention makes one of its value cache: exact, bit for bit."""

from __future__ import annotations

from ggml_ffi import base, compute, ffi
import numpy as np
import pytest

TYPES = {"f16": (1, np.uint16), "bf16": (30, np.uint16), "f32": (0, np.uint32)}  # ggml.h; f32 stays ggml's own
SIZES = (1, 31, 32, 33, 65)  # tiles are 32 by 32
N_MATRICES = 3
PADDING = 5  # elements after each row that are no part of the matrix, as keys' rotated part in a latent cache


@pytest.mark.parametrize("n_rows", SIZES)
@pytest.mark.parametrize("n_columns", SIZES)
@pytest.mark.parametrize("type_name", TYPES)
def test_transposed_copy(cpu_backend, type_name, n_columns, n_rows):
    number, dtype = TYPES[type_name]
    size = np.dtype(dtype).itemsize
    x = np.random.default_rng(0).integers(0, 2 ** (8 * size), (N_MATRICES, n_rows, n_columns + PADDING), dtype)
    context = base.ggml_init({"mem_size": 1 << 20, "mem_buffer": ffi.NULL, "no_alloc": True})
    assert ffi.string(base.ggml_type_name(number)).decode() == type_name
    cache = base.ggml_new_tensor_3d(context, number, n_columns + PADDING, n_rows, N_MATRICES)
    values = base.ggml_view_3d(context, cache, n_columns, n_rows, N_MATRICES, cache.nb[1], cache.nb[2], 0)
    out = base.ggml_cont(context, base.ggml_transpose(context, values))
    got = np.full((N_MATRICES, n_columns, n_rows), 0xABCD, dtype)
    compute(cpu_backend, context, out, [(cache, x)], got)
    np.testing.assert_array_equal(got, x[:, :, :n_columns].transpose(0, 2, 1))

"""MUL_MAT_ID and ADD_ID by themselves on the CPU: ids of -1, every kernel path, NaN in the result beforehand."""

from __future__ import annotations

from ggml_ffi import base, compute, ffi
import gguf
import numpy as np
import pytest

N_EXPERTS, N_IN, N_OUT = 6, 256, 64
# gemv for 1, below and above the 8 rows an expert from which the tiled kernel takes over
N_TOKENS = (1, 2, 33)
N_USED = 4
TYPES = (
    "f32 f16 bf16 q4_0 q4_1 q5_0 q5_1 q8_0 q2_K q3_K q4_K q5_K q6_K iq4_nl iq4_xs iq2_xxs iq2_xs iq2_s iq3_xxs iq3_s "
    "iq1_s iq1_m mxfp4 tq1_0 tq2_0"
).split()

# Of the results' standard deviation: activations are rounded to 8 bits for quantised weights, and to half precision for
# F16 and BF16. A wrong expert or row is off by 1 and more.
MAX_ERROR = 0.06


def repack_buffer_type(backend):
    device = base.ggml_backend_get_device(backend)
    registry = base.ggml_backend_dev_backend_reg(device)
    getter = base.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    found = ffi.cast("void ** (*)(void *)", getter)(device)
    while found[0]:
        if ffi.string(base.ggml_backend_buft_name(found[0])) == b"CPU_REPACK":
            return found[0]
        found += 1
    pytest.skip("this build repacks nothing")


def numbered(type_name: str) -> int:
    return next(i for i in range(64) if ffi.string(base.ggml_type_name(i)).decode() == type_name)


def quantised(type_name: str, weights: np.ndarray) -> bytes:
    number = numbered(type_name)
    out = ffi.new("char[]", base.ggml_row_size(number, N_IN) * N_EXPERTS * N_OUT)
    importance = np.ones(N_IN, np.float32)
    base.ggml_quantize_chunk(
        number,
        ffi.from_buffer("float *", weights),
        out,
        0,
        N_EXPERTS * N_OUT,
        N_IN,
        ffi.from_buffer("float *", importance),
    )
    return ffi.buffer(out)[:]


class MulMatId:
    """One graph of one MUL_MAT_ID; n_rows is 1 where all slots of a token share its input, as for gate and up."""

    def __init__(self, backend, type_name: str, repack: bool, n_tokens: int, n_rows: int, weights: bytes):
        self.backend = backend
        self.context = base.ggml_init({"mem_size": 1 << 20, "mem_buffer": ffi.NULL, "no_alloc": True})
        w = base.ggml_new_tensor_3d(self.context, numbered(type_name), N_IN, N_OUT, N_EXPERTS)
        self.x = base.ggml_new_tensor_3d(self.context, numbered("f32"), N_IN, n_rows, n_tokens)
        self.ids = base.ggml_new_tensor_2d(self.context, numbered("i32"), N_USED, n_tokens)
        self.out = base.ggml_mul_mat_id(self.context, w, self.x, self.ids)
        self.graph = base.ggml_new_graph(self.context)
        base.ggml_build_forward_expand(self.graph, self.out)
        self.buffers = []
        if repack:
            buffer_type = repack_buffer_type(backend)
            size = base.ggml_backend_buft_get_alloc_size(buffer_type, w)
            self.buffers.append(base.ggml_backend_buft_alloc_buffer(buffer_type, size))
            base.ggml_backend_tensor_alloc(self.buffers[0], w, base.ggml_backend_buffer_get_base(self.buffers[0]))
            if not w.extra:
                self.free()
                pytest.skip(f"{type_name} is not repacked on this CPU")
        self.buffers.append(base.ggml_backend_alloc_ctx_tensors(self.context, backend))
        base.ggml_backend_tensor_set(w, weights, 0, len(weights))

    def __call__(self, x: np.ndarray, ids: np.ndarray, before: bytes) -> np.ndarray:
        """float32 [n_tokens, N_USED, N_OUT]; the result's memory is filled with the byte `before` beforehand."""
        for tensor, data in ((self.x, x), (self.ids, ids)):
            base.ggml_backend_tensor_set(tensor, ffi.from_buffer(data), 0, data.nbytes)
        size = base.ggml_nbytes(self.out)
        ffi.memmove(self.out.data, before * size, size)
        assert base.ggml_backend_graph_compute(self.backend, self.graph) == 0
        return np.frombuffer(ffi.buffer(self.out.data, size)[:], np.float32).reshape(len(ids), N_USED, N_OUT)

    def free(self) -> None:
        for buffer in self.buffers:
            base.ggml_backend_buffer_free(buffer)
        base.ggml_free(self.context)


def id_sets(rng, n_tokens: int):
    """Names and [n_tokens, N_USED] ids: distinct experts for each token, -1 where the slot is skipped."""
    chosen = np.array([rng.permutation(N_EXPERTS)[:N_USED] for _ in range(n_tokens)], np.int32)
    yield "none", chosen
    for name, skipped in (
        ("first", [0]),
        ("last", [-1]),
        ("all but the first", slice(1, None)),
        ("all", slice(None)),
    ):
        ids = chosen.copy()
        ids[:, skipped] = -1
        yield name, ids
    ids = chosen.copy()
    ids[rng.random(ids.shape) < 0.5] = -1
    yield "random", ids
    ids = chosen.copy()
    ids[n_tokens // 2 :] = -1
    yield "whole tokens", ids
    # one expert for all tokens: many rows for one matrix, so that the tiled kernels see the gaps too
    ids = np.full((n_tokens, N_USED), -1, np.int32)
    ids[:, 2] = 3
    yield "one expert", ids


@pytest.mark.parametrize("repack", [False, True], ids=["plain", "repacked"])
@pytest.mark.parametrize("type_name", TYPES)
def test_skipped_slots_are_zero_and_the_rest_is_right(cpu_backend, type_name, repack):
    """Over a result buffer full of NaN: finite, zero where the id is -1, right elsewhere, and the same as over zeros."""
    rng = np.random.default_rng(0)
    weights = quantised(type_name, rng.standard_normal((N_EXPERTS * N_OUT, N_IN), np.float32))
    kind = gguf.GGMLQuantizationType[type_name.upper()]
    dense = (
        gguf.quants.dequantize(np.frombuffer(weights, np.uint8), kind)
        if kind > 1
        else np.frombuffer(weights, np.float32 if kind == 0 else np.float16)
    )
    dense = dense.reshape(N_EXPERTS, N_OUT, N_IN).astype(np.float64)
    for n_tokens in N_TOKENS:
        for n_rows in (1, N_USED):
            op = MulMatId(cpu_backend, type_name, repack, n_tokens, n_rows, weights)
            for name, ids in id_sets(rng, n_tokens):
                x = rng.standard_normal((n_tokens, n_rows, N_IN), np.float32)
                out = op(x, ids, before=b"\xff")
                case = (n_tokens, n_rows, name)
                assert np.isfinite(out).all(), case
                assert not out[ids < 0].any(), case
                assert np.array_equal(out, op(x, ids, before=b"\0")), case
                inputs = np.broadcast_to(x, (n_tokens, N_USED, N_IN)).astype(np.float64)
                expected = np.einsum("tuoi,tui->tuo", dense[ids], inputs)[ids >= 0]
                assert np.abs(out[ids >= 0] - expected).max(initial=0) < MAX_ERROR * N_IN**0.5, case
            op.free()


def test_add_id_adds_nothing_to_a_skipped_slot(cpu_backend):
    rng = np.random.default_rng(2)
    n = 70
    bias = rng.standard_normal((N_EXPERTS, n), np.float32)
    for n_tokens in N_TOKENS:
        x = rng.standard_normal((n_tokens, N_USED, n), np.float32)
        for name, ids in id_sets(rng, n_tokens):
            context = base.ggml_init({"mem_size": 1 << 20, "mem_buffer": ffi.NULL, "no_alloc": True})
            a = base.ggml_new_tensor_3d(context, numbered("f32"), n, N_USED, n_tokens)
            b = base.ggml_new_tensor_2d(context, numbered("f32"), n, N_EXPERTS)
            chosen = base.ggml_new_tensor_2d(context, numbered("i32"), N_USED, n_tokens)
            out = base.ggml_add_id(context, a, b, chosen)
            got = np.full_like(x, np.nan)
            compute(cpu_backend, context, out, [(a, x), (b, bias), (chosen, ids)], got)
            assert np.array_equal(got, x + np.where(ids[..., None] < 0, 0, bias[ids])), (n_tokens, name)

"""ggml's own C functions for tests that go below llama_cpp: single operations, and NaN in compute buffers."""

from __future__ import annotations

import contextlib
import os
import re

from allocmoe_edge import Llama
from allocmoe_edge._native import BUILD_DIR, LIB_DIR, _library_path
import cffi
import llama_cpp.llama_cpp as raw

# whether attention has kernels of ours on this CPU; llama.cpp's, which run elsewhere, round to half precision
OUR_FLOATS = any(name in raw.llama_print_system_info().decode() for name in ("AVX2 = 1", "AVX512 = 1", "NEON = 1"))


def _tensor_struct() -> str:
    """struct ggml_tensor from the header that the library was built with, so that no copy of it can grow stale."""
    header = re.sub(r"//[^\n]*", "", (BUILD_DIR / "include" / "ggml.h").read_text())
    body = re.search(r"struct ggml_tensor \{.*?\n    \};", header, re.S)[0]
    for name, value in re.findall(r"#\s*define (GGML_MAX_\w+)\s+(\d+)", header):
        body = re.sub(rf"\b{name}\b", value, body)
    body = re.sub(r"(\d+) / sizeof\(int32_t\)", lambda match: str(int(match[1]) // 4), body)
    return re.sub(r"enum ggml_\w+", "int", body)


GGML_TENSOR_FLAG_INPUT = 1  # ggml.h

ffi = cffi.FFI()
ffi.cdef(
    _tensor_struct()
    + """
struct ggml_init_params { size_t mem_size; void * mem_buffer; bool no_alloc; };
void * ggml_init(struct ggml_init_params params);
void   ggml_free(void * ctx);
struct ggml_tensor * ggml_new_tensor_2d(void * ctx, int type, int64_t ne0, int64_t ne1);
struct ggml_tensor * ggml_new_tensor_3d(void * ctx, int type, int64_t ne0, int64_t ne1, int64_t ne2);
struct ggml_tensor * ggml_new_tensor_4d(void * ctx, int type, int64_t ne0, int64_t ne1, int64_t ne2, int64_t ne3);
struct ggml_tensor * ggml_permute(void * ctx, struct ggml_tensor * a, int axis0, int axis1, int axis2, int axis3);
struct ggml_tensor * ggml_flash_attn_ext(void * ctx, struct ggml_tensor * q, struct ggml_tensor * k, struct ggml_tensor * v,
    struct ggml_tensor * mask, float scale, float max_bias, float logit_softcap);
void   ggml_flash_attn_ext_add_sinks(struct ggml_tensor * a, struct ggml_tensor * sinks);
struct ggml_tensor * ggml_mul_mat(void * ctx, struct ggml_tensor * a, struct ggml_tensor * b);
struct ggml_tensor * ggml_mul_mat_id(void * ctx, struct ggml_tensor * as, struct ggml_tensor * b, struct ggml_tensor * ids);
struct ggml_tensor * ggml_add_id(void * ctx, struct ggml_tensor * a, struct ggml_tensor * b, struct ggml_tensor * ids);
struct ggml_tensor * ggml_mul(void * ctx, struct ggml_tensor * a, struct ggml_tensor * b);
struct ggml_tensor * ggml_swiglu_split(void * ctx, struct ggml_tensor * a, struct ggml_tensor * b);
struct ggml_tensor * ggml_custom_4d(void * ctx, int type, int64_t ne0, int64_t ne1, int64_t ne2, int64_t ne3,
    struct ggml_tensor ** args, int n_args, void * fun, int n_tasks, void * userdata);
struct ggml_tensor * ggml_view_3d(void * ctx, struct ggml_tensor * a, int64_t ne0, int64_t ne1, int64_t ne2, size_t nb1, size_t nb2,
    size_t offset);
struct ggml_tensor * ggml_transpose(void * ctx, struct ggml_tensor * a);
struct ggml_tensor * ggml_cont(void * ctx, struct ggml_tensor * a);
void * ggml_new_graph(void * ctx);
void   ggml_build_forward_expand(void * graph, struct ggml_tensor * tensor);
size_t ggml_nbytes(const struct ggml_tensor * tensor);
const char * ggml_op_name(int op);
const char * ggml_type_name(int type);
size_t ggml_row_size(int type, int64_t ne);
size_t ggml_quantize_chunk(int type, const float * src, void * dst, int64_t start, int64_t nrows, int64_t n_per_row, const float * imatrix);

void * ggml_backend_get_device(void * backend);
void * ggml_backend_dev_backend_reg(void * device);
void * ggml_backend_reg_get_proc_address(void * reg, const char * name);
const char * ggml_backend_buft_name(void * buft);
void * ggml_backend_buft_alloc_buffer(void * buft, size_t size);
size_t ggml_backend_buft_get_alloc_size(void * buft, const struct ggml_tensor * tensor);
void * ggml_backend_buffer_get_base(void * buffer);
void   ggml_backend_buffer_free(void * buffer);
int    ggml_backend_tensor_alloc(void * buffer, struct ggml_tensor * tensor, void * addr);
void * ggml_backend_alloc_ctx_tensors(void * ctx, void * backend);
void   ggml_backend_tensor_set(struct ggml_tensor * tensor, const void * data, size_t offset, size_t size);
void   ggml_backend_tensor_get(const struct ggml_tensor * tensor, void * data, size_t offset, size_t size);
const char * ggml_backend_name(void * backend);
bool   ggml_backend_supports_op(void * backend, const struct ggml_tensor * op);
void * ggml_backend_dev_host_buffer_type(void * device);
int    ggml_backend_graph_compute(void * backend, void * graph);
void   ggml_backend_free(void * backend);

void * ggml_backend_init_by_type(int type, const char * params);
void * ggml_backend_load(const char * path);
void   ggml_backend_dev_memory(void * device, size_t * free, size_t * total);
"""
)
base = ffi.dlopen(str(_library_path(LIB_DIR, "ggml-base")))
ggml = ffi.dlopen(str(_library_path(LIB_DIR, "ggml")))

# a backend that was built by itself, for libraries without (make check-vulkan)
if "ALLOCMOE_TEST_BACKEND" in os.environ:
    assert ggml.ggml_backend_load(os.environ["ALLOCMOE_TEST_BACKEND"].encode())


def op_name(tensor) -> str:
    return ffi.string(base.ggml_op_name(tensor.op)).decode()


@contextlib.contextmanager
def threads(cpu_backend, n_threads: int):
    registry = base.ggml_backend_dev_backend_reg(base.ggml_backend_get_device(cpu_backend))
    of_registry = base.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_set_n_threads")
    set_threads = ffi.cast("void(*)(void *, int)", of_registry)
    set_threads(cpu_backend, n_threads)
    try:
        yield cpu_backend
    finally:
        set_threads(cpu_backend, 4)  # GGML_DEFAULT_N_THREADS


def compute(backend, context, out, inputs, got) -> None:
    """Computes the tensor `out` into the array `got`, from arrays: inputs is [(tensor, array)]. Frees the context.

    The result's memory holds what `got` held before.
    """
    graph = base.ggml_new_graph(context)
    base.ggml_build_forward_expand(graph, out)
    buffer = base.ggml_backend_alloc_ctx_tensors(context, backend)
    for tensor, array in [*inputs, (out, got)]:
        base.ggml_backend_tensor_set(tensor, ffi.from_buffer(array), 0, array.nbytes)
    assert base.ggml_backend_graph_compute(backend, graph) == 0
    base.ggml_backend_tensor_get(out, ffi.from_buffer(got), 0, got.nbytes)
    base.ggml_backend_buffer_free(buffer)
    base.ggml_free(context)


class Poison:
    """An evaluation callback that writes NaN into compute buffers.

    With when = "graph", all of the buffer before each graph: every node's result, except for where the graph's inputs
    lie. With "node", every node's result just before the node is computed, so that nothing earlier in the graph can
    have put harmless numbers there. None leaves the buffers alone. For models on the CPU alone: one graph, one split.
    """

    def __init__(self) -> None:
        self.when: str | None = None
        self.n_poisoned = 0  # results of MUL_MAT_ID that were overwritten
        self.after = None  # called with each tensor after it is computed, with when = "node"
        self.callback = raw.ggml_backend_sched_eval_callback(self._call)
        self._inputs: dict = {}

    def load(self, path, **kwargs) -> Llama:
        """A model whose evaluations go through the callback."""
        default = raw.llama_context_default_params

        def with_callback():
            params = default()
            params.cb_eval = self.callback
            return params

        raw.llama_context_default_params = with_callback
        try:
            return Llama(str(path), **kwargs)
        finally:
            raw.llama_context_default_params = default

    def new_graph(self) -> None:
        """To be called before each evaluation of one micro-batch."""
        self._inputs.clear()

    def _call(self, pointer, ask, _user_data) -> bool:
        tensor = ffi.cast("struct ggml_tensor *", pointer)
        if not ask:
            if self.after:
                self.after(tensor)
            return True
        sources = [source for source in tensor.src if source]
        # an input's memory may be used again once its last reader is done, or by that reader in place: remember it
        if self.when == "graph":
            for source in sources:
                address = int(ffi.cast("uintptr_t", source.data))
                if source.flags & GGML_TENSOR_FLAG_INPUT and address not in self._inputs:
                    self._inputs[address] = ffi.buffer(source.data, base.ggml_nbytes(source))[:]
        # a view computes nothing of its own; a node that works in place finds its source there
        in_place = self.when == "node" and any(source.data == tensor.data for source in sources)
        if self.when and not tensor.view_src and not in_place:
            self._fill(tensor)
        return self.when == "node"

    def _fill(self, tensor) -> None:
        size = base.ggml_nbytes(tensor)
        # all bits set is a NaN in every float type, but in an integer the id that is skipped
        integer = ffi.string(base.ggml_type_name(tensor.type)).startswith(b"i")
        ffi.memmove(tensor.data, (b"\x7f" if integer else b"\xff") * size, size)
        self.n_poisoned += op_name(tensor) == "MUL_MAT_ID"
        start = int(ffi.cast("uintptr_t", tensor.data))
        for address, data in self._inputs.items():
            if address < start + size and start < address + len(data):
                ffi.memmove(ffi.cast("char *", address), data, len(data))

"""A model on the CPU whose every node can be watched while it is computed, for the tools in this folder."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import multiprocessing
from pathlib import Path
from typing import Callable, Optional

import allocmoe_edge  # noqa: F401  first, so that llama_cpp loads our libraries
from allocmoe_edge._native import ffi, libllama
import llama_cpp
from llama_cpp._ctypes_extensions import load_shared_library
import numpy as np


def _ggml():
    ggml = load_shared_library("ggml-base", llama_cpp.llama_cpp._base_path)
    for name, result, *arguments in (
        ("ggml_get_name", ctypes.c_char_p, ctypes.c_void_p),
        ("ggml_op_desc", ctypes.c_char_p, ctypes.c_void_p),
        ("ggml_nelements", ctypes.c_int64, ctypes.c_void_p),
        ("ggml_backend_tensor_get", None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t),
        ("ggml_backend_tensor_set", None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t),
    ):
        function = getattr(ggml, name)
        function.restype, function.argtypes = result, arguments
    return ggml


class Node:
    """A node of the graph, valid while it is observed."""

    ggml = _ggml()

    def __init__(self, tensor: int):
        self._tensor = tensor
        self.name = (self.ggml.ggml_get_name(tensor) or b"").decode()

    @property
    def op(self) -> str:
        return self.ggml.ggml_op_desc(self._tensor).decode()

    def data(self) -> np.ndarray:
        """F32 values of a contiguous F32 node, flat."""
        out = np.empty(self.ggml.ggml_nelements(self._tensor), np.float32)
        self.ggml.ggml_backend_tensor_get(self._tensor, out.ctypes.data, 0, out.nbytes)
        return out

    def replace(self, values: np.ndarray) -> None:
        """What the nodes after it see, in place of its `data`; while it is observed after it has been computed."""
        values = np.ascontiguousarray(values, np.float32)
        self.ggml.ggml_backend_tensor_set(self._tensor, values.ctypes.data, 0, values.nbytes)


class ObservedModel:
    """Context manager. wants(node) is called before a node is computed and says whether it is watched: then it is
    computed by itself, and seen(node) is called after it. Raises RuntimeError where llama.cpp fails."""

    def __init__(
        self, path: Path, n_ctx: int, wants: Callable[[Node], bool], seen: Callable[[Node], None],
        n_ubatch: int = 128, n_threads: Optional[int] = None,
    ):  # fmt: skip
        logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)

        @llama_cpp.ggml_backend_sched_eval_callback
        def observe(tensor, ask, _user_data):
            if ask:
                return wants(Node(tensor))
            seen(Node(tensor))
            return True

        self.path, self.n_ubatch, self._observe = path, n_ubatch, observe
        with contextlib.ExitStack() as stack:
            params = llama_cpp.llama_model_default_params()
            params.n_gpu_layers = 0
            model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
            if not model:
                raise RuntimeError(f"{path}: llama.cpp cannot load it")
            stack.callback(llama_cpp.llama_model_free, model)
            self.vocab = llama_cpp.llama_model_get_vocab(model)
            self.n_vocab = llama_cpp.llama_vocab_n_tokens(self.vocab)
            params = llama_cpp.llama_context_default_params()
            params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, n_ubatch, n_ubatch
            params.n_threads = params.n_threads_batch = n_threads or multiprocessing.cpu_count()
            params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
            params.cb_eval = observe
            self.ctx = llama_cpp.llama_init_from_model(model, params)
            if not self.ctx:
                raise RuntimeError(f"{path}: llama.cpp cannot make a context for it")
            stack.callback(llama_cpp.llama_free, self.ctx)
            self._stack = stack.pop_all()

    def __enter__(self) -> ObservedModel:
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    def set_plan(self, plan) -> None:
        """An `allocmoe_edge.Plan`, any token rule but "estimate"."""
        rule = ffi.new("struct allocmoe_rule *")
        threshold = ffi.NULL if plan.threshold is None else ffi.new("float[]", plan.threshold)
        rule.token_rule = ("off", "batch", "threshold").index(plan.token_rule)
        rule.k_base, rule.strict, rule.threshold = plan.k_base, plan.strict, threshold
        counts = list(plan.expert_used_count)
        if libllama.allocmoe_set_plan(ffi.cast("struct llama_context *", self.ctx), counts, len(counts), rule) < 0:
            raise RuntimeError(f"{self.path}: the native library refused {plan}")

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.ctx), False)

    def decode(self, tokens: list, n_past: int, all_logits: bool = False) -> np.ndarray:
        """Evaluates tokens after n_past others; returns the last one's logits, F32 [n_vocab].

        all_logits: also compute every other token's, which is what makes the last layer see them all.
        """
        for start in range(0, len(tokens), self.n_ubatch):
            part = tokens[start : start + self.n_ubatch]
            batch = llama_cpp.llama_batch_init(len(part), 0, 1)
            batch.n_tokens = len(part)
            for i, token in enumerate(part):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, n_past + start + i, 1, 0
                batch.logits[i] = all_logits or start + i == len(tokens) - 1
            failed = llama_cpp.llama_decode(self.ctx, batch)
            llama_cpp.llama_batch_free(batch)
            if failed:
                raise RuntimeError(f"{self.path}: llama_decode failed")
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.ctx, -1), (self.n_vocab,)).copy()

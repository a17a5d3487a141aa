"""n_gpu_layers=None: how much of a model goes on the GPU, by llama.cpp's own choice for what is free there."""

from __future__ import annotations

import ctypes
import os
from typing import Any, Tuple

from ._native import ffi, libllama, llama_cpp
from .argument_error import ArgumentError

# bytes that stay free on each GPU: what llama.cpp's programs leave
MARGIN = 1 << 30


def is_possible() -> bool:
    """Whether there is a GPU. Raises ArgumentError where there is one for which this build cannot choose."""
    if not llama_cpp.llama_supports_gpu_offload():
        return False
    if not hasattr(libllama, "allocmoe_fit"):
        raise ArgumentError("n_gpu_layers", "found 'auto', want a number: this build was not made for a GPU")
    return True


def reason_for_none() -> str:
    """Why nothing goes on a GPU, where llama.cpp has found none."""
    built = hasattr(libllama, "allocmoe_fit")
    return "found no GPU, or no driver of one" if built else "this build was not made for a GPU"


def choose(path: str, model_params: Any, context_params: Any) -> Tuple[int, Any]:
    """Puts llama.cpp's choice into model_params (ctypes).

    Returns:
        The layers whose experts stay in the CPU's memory, in part or all, and what has to outlive the loading.

    Raises:
        ArgumentError: another argument leaves it no choice, or the model cannot be loaded.
    """
    split = ffi.new("float[]", llama_cpp.llama_max_devices())
    n_most = llama_cpp.llama_max_tensor_buft_overrides()
    overrides = ffi.new("struct llama_model_tensor_buft_override[]", n_most)
    pointers = (int(ctypes.addressof(params)) for params in (model_params, context_params))
    model, context = (ffi.cast(f"struct llama_{name}_params *", at) for name, at in zip(("model", "context"), pointers))
    if libllama.allocmoe_fit(os.fsencode(path), model, context, split, overrides, MARGIN) < 0:
        reason = ffi.string(libllama.allocmoe_last_error()).decode()
        raise ArgumentError("n_gpu_layers", f"found 'auto': {path}: {reason}")
    n_partial = 0
    while model_params.tensor_buft_overrides and overrides[n_partial].pattern:
        n_partial += 1
    return n_partial, (split, overrides)


def sentence(n_gpu_layers: int, n_partial: int, n_layer: int) -> str:
    """What has been chosen, for a model of n_layer layers. llama.cpp counts what is behind the last layer as one more."""
    n = n_layer if n_gpu_layers < 0 else min(max(n_gpu_layers - 1, 0), n_layer)
    if n == 0:
        return "no layer fits into what is free on the GPU: all on the CPU"
    part = f"all {n}" if n == n_layer else f"{n} of {n_layer}"
    partial = f", experts of {n_partial} of them in part or all on the CPU" if n_partial else ""
    return f"{part} layers on the GPU{partial}: what fits into its free memory"

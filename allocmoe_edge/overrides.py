"""What `kv_overrides` may make of a model's experts: checked before llama.cpp, which ends the process where they do not fit."""

from __future__ import annotations

import os
from typing import Mapping, Optional, Union

import numpy as np

from .gguf_file import MAX_EXPERTS, MAX_LAYERS, GGUFFile
from .plan import PlanError


def check(path: Union[str, os.PathLike], overrides: Optional[Mapping], planned: bool) -> Optional[int]:
    """Checks the overrides that concern experts and layers.

    Args:
        path: the model.
        overrides: as `llama_cpp.Llama` takes them.
        planned: whether a plan is to be run, which is for the file's own number of layers.

    Returns:
        The experts per token that they give every layer with experts; None where they say nothing of it.

    Raises:
        PlanError: names the override, the value found and the one wanted.
        GGUFError: as `GGUFFile`.
    """
    if not overrides:
        return None
    with GGUFFile(path) as file:
        arch = file.get("general.architecture")
        n_expert = file.get(f"{arch}.expert_count", 0)
        n_layer = file.get(f"{arch}.block_count", 0)
        used_key = f"{arch}.expert_used_count"
        used = file.get(used_key)
    _within(overrides, f"{arch}.expert_count", n_expert, n_expert, "as many as the file has")
    layers = (n_layer, n_layer) if planned else (1, MAX_LAYERS)
    _within(overrides, f"{arch}.block_count", *layers, "the layers that the plan is for" if planned else "")
    _within(overrides, f"{arch}.experts_per_group", 1, MAX_EXPERTS, "")
    least = 1 if n_expert else 0
    found = _within(overrides, used_key, least, n_expert, "the experts of the model" if n_expert else "a dense model")
    if found is not None and n_expert and not isinstance(used, int):
        what = "one number for each layer" if isinstance(used, np.ndarray) else "no number"
        raise PlanError(f"kv_overrides: {used_key} cannot be overridden in {path}, which has {what} there")
    return found or None


def _within(overrides: Mapping, key: str, low: int, high: int, why: str) -> Optional[int]:
    value = overrides.get(key)
    if key not in overrides:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        want = str(low) if low == high else f"{low} to {high}"
        raise PlanError(f"kv_overrides: {key} is {value!r}, want {want}" + (f" ({why})" if why else ""))
    return value

"""What `kv_overrides` may make of a model's experts: checked before llama.cpp, which ends the process where they do not fit."""

from __future__ import annotations

import os
from typing import Any, Iterator, Mapping, Optional, Union

import numpy as np

from .gguf_file import MAX_EXPERTS, GGUFError, GGUFFile, expert_used_count_full
from .plan import PlanError


class _Overridden(GGUFFile):
    """An open file's metadata as llama.cpp reads it under overrides, which do not reach arrays."""

    def __init__(self, file: GGUFFile, overrides: Mapping[str, Any]):
        self._file, self._overrides = file, overrides
        self.path, self.tensors, self.data_offset, self._ctx = file.path, file.tensors, file.data_offset, None

    def keys(self) -> Iterator[str]:
        return iter({*self._file.keys(), *self._overrides})

    def get(self, key: str, default: Any = None) -> Any:
        value = self._file.get(key, default)
        return self._overrides[key] if key in self._overrides and not isinstance(value, (list, np.ndarray)) else value


_BUDGET = "allocmoe.budget_total"


def check_ours(path: Union[str, os.PathLike], overrides: Optional[dict], beside: bool) -> None:
    """Refuses overrides of our keys, but for the one that is a budget.

    Args:
        path: the model's file.
        overrides: as `llama_cpp.Llama` takes them.
        beside: whether a budget, a token rule, or a plan in another file is asked for as well.

    Raises:
        PlanError: names the override, the value found and the one wanted.
    """
    for key, value in (overrides or {}).items():
        if not key.startswith("allocmoe."):
            continue
        if key != _BUDGET:
            raise PlanError(f"kv_overrides: {key} cannot be overridden, of our keys only {_BUDGET} can")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise PlanError(f"kv_overrides: {key} is {value!r}, want a whole number of expert activations per token")
        if beside:
            raise PlanError(f"kv_overrides: {key} is a budget: leave out budget, token_rule and plan_path")
        with GGUFFile(path) as file:
            if file.get(_BUDGET) is None:
                raise PlanError(f"kv_overrides: {key} is {value}, and {path} has no plan")


def check(path: Union[str, os.PathLike], overrides: Optional[Mapping], planned: bool) -> Optional[int]:
    """Checks the overrides that concern experts and layers.

    Args:
        path: a model that is fine without them.
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
        used_key = f"{arch}.expert_used_count"
        if used_key in overrides and isinstance(file.get(used_key), np.ndarray):
            raise PlanError(
                f"kv_overrides: {used_key} cannot be overridden in {path}, which has one number for each layer"
            )
        # what the weights in the file are, whatever is said of them
        fixed = [f"{arch}.expert_count"] + ([f"{arch}.block_count"] if planned else [])
        for key in fixed:
            own = file.get(key, 0)
            if overrides.get(key, own) != own:
                raise PlanError(f"kv_overrides: {key} is {overrides[key]!r}, want {own}, what the file has")
        group_key = f"{arch}.experts_per_group"
        if group_key in overrides and overrides[group_key] not in range(1, MAX_EXPERTS + 1):
            raise PlanError(f"kv_overrides: {group_key} is {overrides[group_key]!r}, want 1 to {MAX_EXPERTS}")
        try:
            expert_used_count_full(_Overridden(file, overrides))
        except GGUFError as error:
            raise PlanError(f"kv_overrides: {error}") from None
    return overrides.get(used_key) or None

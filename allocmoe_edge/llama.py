"""`Llama`: llama-cpp-python's class of that name, spending an expert activation budget."""

from __future__ import annotations

import contextlib
import inspect
import sys
import warnings
from typing import Dict, Optional, Sequence, Union

import numpy as np

from ._native import context_pointer, ffi, libllama, llama_cpp
from . import metadata
from .plan import Plan, PlanError, integer_tuple

Budget = Union[float, int, str]


class Llama(llama_cpp.Llama):
    """A language model from a GGUF file; everything that `llama_cpp.Llama` takes and does, and a budget.

    Args:
        model_path: GGUF file; the first one if the model is split.
        budget: None for the plan in the file (the model's own expert counts if it has none). A float in
            (0, 1] or a string like "50%" is a share of the model's own activations, an int is a total of
            expert activations per token; either is planned anew from the sensitivities in the file.
        **kwargs: see `llama_cpp.Llama`.

    Raises:
        GGUFError: the file is missing, not GGUF, damaged or truncated.
        PlanError: its plan does not fit the model, or the budget cannot be met.
        ValueError: anything `llama_cpp.Llama` refuses.
    """

    def __init__(self, model_path: str, *, budget: Optional[Budget] = None, **kwargs):
        self._stack = contextlib.ExitStack()  # what __del__ closes, also where the next line raises
        # before native code sees the file: it would abort the process, or say no more than "failed"
        self._stored = metadata.read(model_path)
        super().__init__(model_path, **kwargs)
        if budget is not None:
            plan = self.set_budget(budget)
            if self.verbose:  # the plan in the file has been logged by the native side
                print(f"allocmoe: {plan}", file=sys.stderr)

    @property
    def plan(self) -> Optional[Plan]:
        """The plan in force, as the native side has it; None for a dense model."""
        full = self._expert_used_count(libllama.allocmoe_get_full)
        if not any(full):
            return None
        return Plan(self._expert_used_count(libllama.allocmoe_get_plan), full)

    def set_budget(self, budget: Optional[Budget]) -> Plan:
        """Changes the budget of the live model; takes effect with the next token.

        The cached prompt is dropped where the plan changes, so that what follows depends on the new plan only.

        Args:
            budget: as in the constructor; None goes back to what the file says.

        Returns:
            The plan now in force.

        Raises:
            PlanError: a dense model, a budget out of range, or a file without sensitivities to plan from.
        """
        full = self._expert_used_count(libllama.allocmoe_get_full)
        if not any(full):
            raise PlanError(f"{self.model_path}: a dense model: it has no experts to budget")
        if budget is None:
            self.set_plan(self._stored.plan)
        elif self._stored.profile is not None:
            self.set_plan(self._stored.profile.plan(budget, full))
        elif metadata.parse_budget(budget, sum(full), sum(k > 0 for k in full)) == sum(full):
            self.set_plan(None)
        else:
            raise PlanError(
                f"{self.model_path}: budget={budget!r} needs the sensitivities that allocmoe-convert stores in the "
                "file; convert it first, or pass a plan of your own to set_plan"
            )
        return self.plan

    def set_plan(self, plan: Union[Plan, Sequence[int], None]) -> None:
        """Sets the experts per token of each layer directly.

        Args:
            plan: a Plan, or block_count ints, 0 for layers without routed experts; None for the model's own counts.

        Raises:
            PlanError: the plan does not fit the model.
        """
        before = self._expert_used_count(libllama.allocmoe_get_plan)
        if plan is None:
            libllama.allocmoe_clear_plan(context_pointer(self))
        else:
            counts = plan.expert_used_count if isinstance(plan, Plan) else plan
            full = self._expert_used_count(libllama.allocmoe_get_full)
            counts = Plan(integer_tuple("expert_used_count", counts), full).expert_used_count
            status = libllama.allocmoe_set_plan(context_pointer(self), list(counts), len(counts))
            if status != libllama.ALLOCMOE_OK:
                raise PlanError(f"the native library refused the plan (status {status})")
        if self._expert_used_count(libllama.allocmoe_get_plan) != before:
            self.reset()
            self._ctx.kv_cache_clear()

    def expert_stats(self, reset: bool = False) -> Dict[str, Dict[str, np.ndarray]]:
        """Expert activations so far, for prompt ("prefill") and generated ("decode") tokens apart.

        Args:
            reset: start counting anew afterwards.

        Returns:
            {"prefill": stats, "decode": stats}, where stats has int64 arrays of length block_count: `activations`,
            and `tokens` that reached the layer's router (the last layer sees only tokens whose logits are
            needed); and `mean`, float64, activations per token, 0 where no token came by.
        """
        stats = {}
        n_layer = libllama.allocmoe_n_layer(context_pointer(self))
        for phase, number in (
            ("prefill", libllama.ALLOCMOE_PHASE_PREFILL),
            ("decode", libllama.ALLOCMOE_PHASE_DECODE),
        ):
            activations, tokens = np.zeros(n_layer, np.int64), np.zeros(n_layer, np.int64)
            libllama.allocmoe_get_counts(
                context_pointer(self),
                number,
                ffi.from_buffer("int64_t *", activations),
                ffi.from_buffer("int64_t *", tokens),
                n_layer,
            )
            mean = activations / np.maximum(tokens, 1)
            stats[phase] = {"activations": activations, "tokens": tokens, "mean": mean}
        if reset:
            libllama.allocmoe_reset_counts(context_pointer(self))
        return stats

    def save_state(self):
        """As in `llama_cpp.Llama`; the state remembers the plan that it was made with."""
        state = super().save_state()
        state.expert_used_count = self._expert_used_count(libllama.allocmoe_get_plan)
        return state

    def load_state(self, state) -> None:
        """As in `llama_cpp.Llama`; warns if the state was made with another plan than the one in force."""
        now = self._expert_used_count(libllama.allocmoe_get_plan)
        then = getattr(state, "expert_used_count", now)
        if tuple(then) != now:
            warnings.warn(
                f"this state was saved with {sum(then)} expert activations per token in another plan, "
                f"the plan in force has {sum(now)}: its cached tokens are kept as they were computed",
                stacklevel=2,
            )
        super().load_state(state)

    def __getstate__(self):
        state = super().__getstate__()
        if libllama.allocmoe_has_plan(context_pointer(self)):
            state["expert_used_count"] = self._expert_used_count(libllama.allocmoe_get_plan)
        return state

    def __setstate__(self, state):
        state = dict(state)
        counts = state.pop("expert_used_count", None)
        self.__init__(**state)
        self.set_plan(counts)

    def _expert_used_count(self, getter) -> tuple:
        n_layer = libllama.allocmoe_n_layer(context_pointer(self))
        counts = ffi.new("int32_t[]", max(n_layer, 1))
        getter(context_pointer(self), counts, n_layer)
        return tuple(counts)[:n_layer]


def _signature() -> inspect.Signature:
    """llama_cpp.Llama's own signature with `budget`, for help() and tools that read it."""
    parameters = dict(inspect.signature(llama_cpp.Llama.__init__).parameters)
    extra = parameters.pop("kwargs")
    budget = inspect.signature(Llama.__init__).parameters["budget"]
    return inspect.Signature([*parameters.values(), budget, extra])


Llama.__init__.__signature__ = _signature()

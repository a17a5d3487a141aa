"""The instrument: what the layers of a model compute for a text, recorded by the runtime itself.

    with recording(llm, plan, inputs=True) as recorder:
        for il, layer in recorder.layers(token_windows, "experts", "norms"):
            ...

Needs a plan with a token rule; every expert runs, and later layers see what they see in the full model, whatever the
rule would leave out. For calibration: a model that only runs has no use for any of this.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Callable, Iterator, Optional, Tuple

import numpy as np

from .._native import context_pointer, ffi, libllama
from ..llama import Llama
from ..plan import TOKEN_RULES, Plan
from .perplexity import Reference, evaluate

_FLOATS = {"inputs": "INPUT", "weights": "WEIGHT", "norms": "NORM", "missing": "MISSING"}


def _nothing() -> np.ndarray:
    return np.empty(0, np.float32)


@dataclass(frozen=True)
class LayerRecord:
    """What a layer recorded of n tokens that use K experts each, best first. Empty what was not asked for.

    experts: int32 [n, K], ids. values: float32 [n, K], what the rule goes by: routing scores, or under "estimate" the
        estimated log sizes. errors: float64 [K + 1], with the 0..K best experts alone: |y_K - y_k|^2, summed over tokens;
        zeros where nothing is recorded.
    With `inputs` only, float32: inputs [n, n_embd] of the experts; weights [n, K], and norms [n, K] of their outputs;
        missing [n, n_embd], what the rule "estimate" would leave out.
    """

    experts: np.ndarray = field(default_factory=_nothing)
    values: np.ndarray = field(default_factory=_nothing)
    errors: np.ndarray = field(default_factory=_nothing)
    inputs: np.ndarray = field(default_factory=_nothing)
    weights: np.ndarray = field(default_factory=_nothing)
    norms: np.ndarray = field(default_factory=_nothing)
    missing: np.ndarray = field(default_factory=_nothing)


class Recorder:
    """Of a model whose plan has it record, see `recording`.

    works: whether the model, and the backend that it runs on, can run the plan's token rule: if not, nothing is recorded.
    """

    def __init__(self, llm: Llama, plan: Plan):
        self._llm, self._plan, self._context = llm, plan, context_pointer(llm)
        # a file's thresholds take the place of estimates that cannot be
        self.works = TOKEN_RULES[libllama.allocmoe_get_token_rule(self._context)] == plan.token_rule != "off"

    def layers(
        self, token_windows: np.ndarray, *what: str, progress: Optional[Callable[[], object]] = None
    ) -> Iterator[Tuple[int, LayerRecord]]:
        """(layer, record) for every window and layer with experts, window by window; none where it does not work.

        Args:
            token_windows: int32, shape [n_windows, n_ctx].
            what: names of a `LayerRecord`'s arrays, those that are to be taken.
            progress: called after each window.
        """
        if not self.works:
            return
        for window in token_windows:
            self.clear()
            evaluate(self._llm, window[None])
            for il in self._plan.moe_layers:
                yield il, self.take(il, *what)
            if progress is not None:
                progress()
        self.clear()

    def reference(self, window: np.ndarray) -> Tuple[Reference, dict]:
        """The model's distributions over a window, int32 [n], and every layer's `errors` by layer. Needs `logits`."""
        self.clear()
        reference = Reference(self._llm, window)
        errors = {il: self.take(il, "errors").errors for il in self._plan.moe_layers}
        self.clear()
        return reference, errors

    def take(self, il: int, *what: str) -> LayerRecord:
        """What the layer has recorded since it was last taken; each array is given once."""
        return LayerRecord(**{name: self._array(il, name) for name in what})

    def clear(self) -> None:
        libllama.allocmoe_clear_records(self._context)

    def _array(self, il: int, name: str) -> np.ndarray:
        n_used = self._plan.expert_used_count_full[il]
        if name == "experts":
            return self._copied(libllama.allocmoe_take_experts, il, "int32_t *", np.int32).reshape(-1, n_used)
        if name == "values":
            return self._copied(libllama.allocmoe_take_scores, il, "float *", np.float32).reshape(-1, n_used)
        if name == "errors":
            recorded = self._copied(libllama.allocmoe_take_errors, il, "double *", np.float64)
            return recorded if recorded.size else np.zeros(n_used + 1)
        number = getattr(libllama, f"ALLOCMOE_FLOATS_{_FLOATS[name]}")
        width = n_used if name in ("weights", "norms") else self._llm.n_embd()
        return self._copied(libllama.allocmoe_take_floats, il, "float *", np.float32, number).reshape(-1, width)

    def _copied(self, getter, il: int, ctype: str, dtype, *which: int) -> np.ndarray:
        values = np.empty(getter(self._context, *which, il, ffi.NULL, 0), dtype)
        getter(self._context, *which, il, ffi.from_buffer(ctype, values), values.size)
        return values


@contextlib.contextmanager
def recording(
    llm: Llama, plan: Plan, *, inputs: bool = False, keep_outputs: bool = False, logits: bool = False
) -> Iterator[Recorder]:
    """A recorder of `llm`, under a plan with a token rule, for the length of the block.

    Args:
        inputs: record what `LayerRecord` has with them, too.
        keep_outputs: of the last micro-batch keep every layer's output, so that `starting_at` can start late; they stay
            kept after the block.
        logits: compute them, for `Recorder.reference`.
    """
    llm.apply_plan(plan, record=True, record_inputs=inputs, keep_outputs=keep_outputs, skip_logits=not logits)
    recorder = Recorder(llm, plan)
    recorder.clear()
    try:
        yield recorder
    finally:
        recorder.clear()
        llm.apply_plan(plan)


def start_at(llm: Llama, plan: Plan, il: int) -> None:
    """Sets a plan under which `llm` runs layers from `il` on alone, over the text whose outputs have been kept, on what the
    layer before gave then. A whole run where nothing fits is kept."""
    llm.apply_plan(plan, start_layer=il)

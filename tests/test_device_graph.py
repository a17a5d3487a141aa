"""What plans add to the graph of a GPU: nodes a layer, counted. They are built here for the CPU, where no GPU is needed."""

from collections import Counter

from allocmoe_edge import Plan
from allocmoe_edge._native import context_pointer
from ggml_ffi import Poison, ffi, op_name
from gguf_factory import random_estimator
import native_testing
import pytest

N_LAYER, N_USED = 4, 4
VIEWS = {"NONE", "VIEW", "RESHAPE", "PERMUTE", "TRANSPOSE"}  # nothing is run for these
FULL, HALF = [N_USED] * N_LAYER, [N_USED // 2] * N_LAYER
PLANS = {
    "full": (Plan(FULL, FULL), {}),
    "two experts fewer": (Plan(HALF, FULL), {"ADD": -2}),
    "batch": (Plan(HALF, FULL, token_rule="batch"), {"CUSTOM": 2}),
    "threshold": (Plan(HALF, FULL, token_rule="threshold", threshold=[0.3] * N_LAYER), {"CUSTOM": 2}),
    "strict": (Plan(HALF, FULL, token_rule="threshold", threshold=[0.3] * N_LAYER, strict=True), {"CUSTOM": 2}),
    "estimate": (
        Plan(
            HALF,
            FULL,
            token_rule="estimate",
            threshold=[-1.4] * N_LAYER,
            estimator=random_estimator(4, 8, 256, 10, 7, 5),
        ),
        {"CUSTOM": 2, "MUL_MAT": 2, "ADD": 1},
    ),
}


class Operations(Poison):
    """Notes the operation of every node that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list = []

    def _call(self, pointer, ask, _user_data) -> bool:
        if ask:
            self.found.append(op_name(ffi.cast("struct ggml_tensor *", pointer)))
        return False

    def of(self, llm, n_tokens: int) -> Counter:
        llm.reset()
        self.found.clear()
        llm.eval(list(range(5, 5 + n_tokens)))
        return Counter(op for op in self.found if op not in VIEWS)


@pytest.fixture(scope="module")
def counted(tiny):
    """(counts of operations, the model built as a GPU gets it, its operations without a plan by the number of tokens)"""
    operations = Operations()
    llm = operations.load(tiny.gguf_path, n_ctx=64, verbose=False)
    native_testing.libllama.allocmoe_build_as_for_devices(context_pointer(llm), True)
    llm.set_plan(None)
    yield operations, llm, {n: operations.of(llm, n) for n in (1, 20)}
    native_testing.libllama.allocmoe_build_as_for_devices(context_pointer(llm), False)
    llm.close()


@pytest.mark.parametrize("name", PLANS)
def test_nodes_a_layer(counted, name):
    """As docs/gpu.md has it: a rule is two nodes of ours, estimates take two products and a sum besides."""
    operations, llm, without = counted
    plan, wanted = PLANS[name]
    llm.set_plan(plan)
    for n_tokens, before in without.items():
        after = operations.of(llm, n_tokens)
        assert {op: (after[op] - before[op]) / N_LAYER for op in after | before if after[op] != before[op]} == wanted

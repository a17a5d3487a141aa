"""Nothing that a token rule skips is read: NaN in the compute buffers changes no logit of any model, bit for bit."""

from __future__ import annotations

import ctypes

from allocmoe_edge import Plan
from ggml_ffi import Poison, ffi, op_name
import llama_cpp.llama_cpp as raw
import numpy as np
import pytest
from tiny_models import TINY_MODELS

N_TOKENS = 24


@pytest.fixture(scope="module")
def poison():
    return Poison()


SIZES = dict(n_ctx=64, logits_all=True, verbose=False)


def logits(llm, poison, tokens, n_batch) -> np.ndarray:
    llm.clear_cache()
    for start in range(0, len(tokens), n_batch):
        poison.new_graph()
        llm.eval(tokens[start : start + n_batch])
    return llm.scores[: len(tokens)].copy()


def rules(llm) -> dict:
    """Token rules by name: skipping all but the base, everything by chance, nothing."""
    full = llm.plan.expert_used_count_full
    counts = [k and max(2, k // 2) for k in full]

    def at(threshold):
        return Plan(counts, full, token_rule="threshold", threshold=[threshold] * len(full))

    return {
        "only the base": at(np.inf),
        "batch": Plan(counts, full, token_rule="batch"),
        "nothing skipped": at(-np.inf),
        "off": Plan(counts, full),
    }


def check(llm, poison, tokens) -> None:
    for name, plan in rules(llm).items():
        llm.set_plan(plan)
        assert llm.plan.token_rule == plan.token_rule
        for n_batch in (len(tokens), 1):
            poison.when = None
            clean = logits(llm, poison, tokens, n_batch)
            assert np.isfinite(clean).all()
            for poison.when in ("graph", "node"):
                poison.n_poisoned = 0
                found = logits(llm, poison, tokens, n_batch)
                assert poison.n_poisoned > 0
                assert np.array_equal(found, clean), (name, n_batch, poison.when)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_tiny_models(built, name, poison):
    llm = poison.load(built[name].gguf_path, **SIZES)
    check(llm, poison, np.random.default_rng(5).integers(1, 300, N_TOKENS).tolist())
    llm.close()


@pytest.fixture(scope="module", params=["Q8_0", "Q4_0"])
def testbed(request, testbed_path, tmp_path_factory, poison):
    """The testbed as it is, and in a type that ggml repacks on x86 and Arm."""
    path = testbed_path
    if request.param == "Q4_0":
        path = tmp_path_factory.mktemp("q4_0") / "testbed.gguf"
        params = raw.llama_model_quantize_default_params()
        params.ftype, params.allow_requantize, params.nthread = raw.LLAMA_FTYPE_MOSTLY_Q4_0, True, 2
        assert raw.llama_model_quantize(str(testbed_path).encode(), str(path).encode(), ctypes.byref(params)) == 0
    llm = poison.load(path, **SIZES)
    yield llm
    llm.close()


def test_testbed(testbed, poison):
    check(testbed, poison, testbed.tokenize(b"The history of the world begins with the first writing, and ends here."))


@pytest.mark.parametrize("slot, reaches", [(0, True), (1, False)], ids=["kept", "skipped"])
def test_a_number_left_in_a_row(testbed, poison, slot, reaches):
    """NaN put into the first token's rows after the down projection: from the row of the expert that is kept it reaches the
    logits, so that the other tests can fail; the skipped one's row is zero, and the sum does not read it at all."""
    tokens = testbed.tokenize(b"The history of the world")
    testbed.set_plan(rules(testbed)["only the base"])
    clean = logits(testbed, poison, tokens, len(tokens))

    def spoil(tensor):
        if op_name(tensor) == "MUL_MAT_ID" and ffi.string(tensor.name) == b"ffn_moe_down-7":
            row = ffi.buffer(ffi.cast("char *", tensor.data) + slot * tensor.nb[1], tensor.nb[1])
            assert np.frombuffer(row, np.float32).any() == (slot == 0)
            row[:] = b"\xff" * len(row)

    poison.when, poison.after = "node", spoil
    try:
        found = logits(testbed, poison, tokens, len(tokens))
    finally:
        poison.when = poison.after = None
    assert np.isnan(found[0]).all() if reaches else np.array_equal(found, clean)

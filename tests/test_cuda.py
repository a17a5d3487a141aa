"""ggml's CUDA backend with our hooks: ids of -1 in every kernel, token rules on the device, models on it.

Needs an NVIDIA GPU and a build with GGML_CUDA=ON; bench/gpu.py runs it, the kernels also under compute-sanitizer.
What needs no GPU: test_device_code.py.
"""

from __future__ import annotations

import ctypes

import llama_cpp
from llama_cpp._logger import llama_log_callback
from on_device import (  # noqa: F401
    TOKENS,
    batches,
    check_fused_gate_and_up,
    check_skipped_slots,
    device,
    load,
    logits,
    plans,
    test_a_full_plan_is_no_plan_on_the_gpu,
    test_add_id_adds_nothing_for_a_skipped_slot,
    test_custom_nodes_of_others_are_left_to_the_cpu,
    test_models_agree_with_the_cpu,
    test_rules_on_the_device,
    test_weights_of_skipped_slots,
)
import pytest

# mmvq up to 8 tokens, mmf with its own search for ids up to 16, with the id helper above; tiles of mmq up to 128
N_TOKENS = (1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129)
# by the path that they take: 64 rows suit mmq and mmf, 48 no tile of mmf, so floats are sorted on the host
PATHS = [(name, 64) for name in "q4_0 q4_1 q5_0 q8_0 q2_K q4_K q6_K iq4_nl iq3_xxs mxfp4 f32 f16 bf16".split()]
PATHS += [("f32", 48), ("f16", 48), ("bf16", 48), ("q4_0", 48)]


@pytest.fixture(scope="module")
def backend():
    yield from device("CUDA")


@pytest.mark.parametrize("type_name, n_out", PATHS)
def test_skipped_slots_are_zero_and_the_rest_is_right(backend, type_name, n_out):
    check_skipped_slots(backend, type_name, n_out, N_TOKENS, range(1, 17))


@pytest.mark.parametrize("type_name", ["q4_0", "q4_K", "q8_0", "mxfp4", "f16", "bf16", "f32"])
def test_fused_gate_and_up_skip_too(backend, type_name):
    check_fused_gate_and_up(backend, type_name, range(1, 10), (1, 3, 8))


@pytest.fixture
def graph_reuses():
    """Counts the debug lines that ggml's CUDA backend logs when it launches a CUDA graph anew without looking at it."""
    found = [0]

    @llama_cpp.llama_log_callback
    def count(_level, text, _user_data):
        found[0] += text.startswith(b"CUDA Graph id ")

    llama_cpp.llama_log_set(count, ctypes.c_void_p(0))
    yield found
    llama_cpp.llama_log_set(llama_log_callback, ctypes.c_void_p(0))


def test_cuda_graphs_stay_on_at_decode(backend, tiny, plans, graph_reuses):  # noqa: F811
    """As many launches of a ready graph under every plan as without one."""
    llm = load(tiny.gguf_path, n_gpu_layers=-1)
    launches = {}
    for name, plan in {"none": None, **plans}.items():
        llm.set_plan(plan)
        logits(llm, len(TOKENS))
        graph_reuses[0] = 0
        for token in TOKENS[:32]:
            llm.eval([token])
        launches[name] = graph_reuses[0]
    llm.close()
    if not launches["none"]:
        pytest.skip("this device or build runs no CUDA graphs")
    assert set(launches.values()) == {launches["none"]}, launches

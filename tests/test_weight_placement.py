"""n_cpu_moe, repack, n_gpu_layers=None: which tensors llama.cpp puts into the CPU's memory for it. On a GPU: test_vulkan.py."""

from __future__ import annotations

import ctypes
import pickle
import re

from allocmoe_edge import Llama, gpu_fit
from allocmoe_edge._native import context_pointer, ffi, libllama
from allocmoe_edge.chat import parser
import llama_cpp
from llama_cpp._logger import llama_log_callback
import numpy as np
import pytest

SIZES = dict(n_ctx=64, logits_all=True, verbose=False)


@pytest.fixture
def overridden():
    """(layer, tensor, buffer type) of every override that llama.cpp's loader reports, which it does at debug level only."""
    found = []

    @llama_cpp.llama_log_callback
    def record(_level, text, _user_data):
        match = re.match(rb"tensor blk\.(\d+)\.(\S+)\.weight .* buffer type overridden to (\S+)", text)
        if match:
            found.append((int(match[1]), match[2].decode(), match[3].decode()))

    llama_cpp.llama_log_set(record, ctypes.c_void_p(0))
    yield found
    llama_cpp.llama_log_set(llama_log_callback, ctypes.c_void_p(0))


@pytest.mark.parametrize("n_cpu_moe, n_layer", [(0, 0), (1, 1), (7, 7), (30, 30), (99, 30)])
def test_experts_of_the_first_layers_and_nothing_else(testbed_path, overridden, n_cpu_moe, n_layer):
    """As --n-cpu-moe of llama.cpp: three expert tensors in each of the first n layers."""
    llm = Llama(str(testbed_path), n_cpu_moe=n_cpu_moe, **SIZES)
    wanted = {(il, f"ffn_{name}_exps") for il in range(n_layer) for name in ("gate", "up", "down")}
    assert {(il, name) for il, name, _ in overridden} == wanted
    # CPU_REPACK too is the CPU's own memory
    assert all(buffer.startswith("CPU") for _, _, buffer in overridden)
    llm.close()


def test_logits_do_not_depend_on_it(testbed_path):
    """Without a GPU everything is on the CPU in any case: bit for bit the same."""
    tokens = list(range(100, 140))
    found = []
    for n_cpu_moe in (0, 12):
        llm = Llama(str(testbed_path), n_cpu_moe=n_cpu_moe, **SIZES)
        llm.eval(tokens)
        found.append(llm.scores[: len(tokens)].copy())
        llm.close()
    assert np.array_equal(*found)


def test_it_survives_pickling(testbed_path, overridden):
    llm = Llama(str(testbed_path), n_cpu_moe=2, **SIZES)
    overridden.clear()
    copy = pickle.loads(pickle.dumps(llm))
    assert {il for il, _, _ in overridden} == {0, 1}
    copy.close()


@pytest.mark.parametrize("n_cpu_moe", [-1, 1.0, True, "3", None])
def test_what_is_no_number_of_layers_is_refused(testbed_path, n_cpu_moe):
    with pytest.raises(ValueError, match="n_cpu_moe: found"):
        Llama(str(testbed_path), n_cpu_moe=n_cpu_moe, **SIZES)


def test_without_repacking_weights_stay_in_the_files_pages(testbed_path):
    """And the results are the same but for the rounding of sums."""
    found, places = [], []
    for repack in (True, False):
        llm = Llama(str(testbed_path), repack=repack, **SIZES)
        places.append(ffi.string(libllama.allocmoe_expert_placement(context_pointer(llm), 1, ffi.new("int64_t *"))))
        llm.eval(list(range(100, 140)))
        found.append(llm.scores[:40].copy())
        llm.close()
    assert places[1] in (b"CPU", b"CPU_Mapped")
    assert np.abs(found[0] - found[1]).max() < 0.05 * found[0].std()
    with pytest.raises(ValueError, match="repack: found 1"):
        Llama(str(testbed_path), repack=1, **SIZES)


@pytest.mark.skipif(llama_cpp.llama_supports_gpu_offload(), reason="there is a GPU")
def test_without_a_gpu_all_that_fits_is_nothing(testbed_path, capfd):
    """n_gpu_layers=None is 0, and says nothing; so is a number, and one line says so."""
    found = []
    for n_gpu_layers in (0, None, "auto", -1):
        llm = Llama(str(testbed_path), n_gpu_layers=n_gpu_layers, **SIZES)
        llm.eval(list(range(100, 140)))
        found.append((llm.scores[:40].copy(), llm.model_params.n_gpu_layers, llm.context_params.flash_attn_type))
        assert llm.__getstate__()["n_gpu_layers"] == (None if n_gpu_layers == "auto" else n_gpu_layers)
        llm.close()
    for other in found[1:]:
        assert np.array_equal(found[0][0], other[0]) and found[0][1:] == other[1:]
    err = capfd.readouterr().err
    assert err.startswith(f"allocmoe: {testbed_path}: ") and err.endswith(": all on the CPU\n") and err.count("\n") == 1


def test_what_fits_is_chosen_whole(testbed_path):
    with pytest.raises(ValueError, match="^n_cpu_moe: found 3, want 0 where 'auto' chooses"):
        Llama(str(testbed_path), n_gpu_layers=None, n_cpu_moe=3, **SIZES)
    assert parser().parse_args(["m.gguf", "--n-gpu-layers", "auto"]).n_gpu_layers is None


def test_numbers_of_layers_may_be_numpys(testbed_path):
    llm = Llama(str(testbed_path), n_gpu_layers=np.int64(0), n_cpu_moe=np.int32(2), **SIZES)
    assert llm.model_params.n_gpu_layers == 0 and llm.__getstate__()["n_cpu_moe"] == 2
    llm.close()


@pytest.mark.parametrize("value", ["all", "3", 1.5, True, -2, 2**31], ids=str)
def test_what_is_no_choice_of_layers_on_the_gpu_is_refused(testbed_path, value):
    with pytest.raises(ValueError, match="n_gpu_layers: found .*, want a number of layers, -1 for all, or 'auto'"):
        Llama(str(testbed_path), n_gpu_layers=value, **SIZES)


@pytest.mark.parametrize(
    "n_gpu_layers, n_partial, text",
    [
        (-1, 0, "all 30 layers on the GPU: what"),
        (31, 12, "all 30 layers on the GPU, experts of 12 of them in part or all on the CPU: what"),
        (21, 20, "20 of 30 layers on the GPU, experts of 20 of them in part or all on the CPU: what"),
        (1, 0, "no layer fits"),
        (0, 0, "no layer fits"),
    ],
)
def test_what_is_said_of_it(n_gpu_layers, n_partial, text):
    assert gpu_fit.sentence(n_gpu_layers, n_partial, 30).startswith(text)

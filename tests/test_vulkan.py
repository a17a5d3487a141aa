"""ggml's Vulkan backend with our hooks, on Mesa's software device: ids of -1, token rules on the device, models on it.

`make test-vulkan` builds for Vulkan and runs this. Without such a build, or without a device, it is skipped.
"""

from __future__ import annotations

import os
from pathlib import Path
import subprocess
import sys

from allocmoe_edge import Llama, Plan, gpu_fit
from allocmoe_edge._native import LIB_DIR, context_pointer, libggml_base, libllama
from allocmoe_edge._native import ffi as native_ffi
from conftest import ROOT
from ggml_ffi import base, ffi
import numpy as np
from on_device import (  # noqa: F401
    MAX_ERROR,
    MAX_LOGIT_ERROR,
    N_EXPERTS,
    N_IN,
    Graph,
    check_skipped_slots,
    device,
    id_sets,
    load,
    logits,
    numbered,
    plans,
    run_rule,
    set_node,
    tensors,
    test_a_full_plan_is_no_plan_on_the_gpu,
    test_add_id_adds_nothing_for_a_skipped_slot,
    test_custom_nodes_of_others_are_left_to_the_cpu,
    test_estimates_on_the_device,
    test_models_agree_with_the_cpu,
    test_rules_of_sequences_that_take_turns,
    test_rules_on_the_device,
    test_weights_of_skipped_slots,
    weights_of,
)
import pytest

pytestmark = pytest.mark.vulkan


@pytest.fixture(scope="module")
def backend():
    yield from device("Vulkan")


@pytest.fixture
def batches():
    """Few tokens where each is a run of the graph."""
    return [(80, 80), (7, 21), (1, 8)]


# One shader for up to 8 tokens, a dispatch each, another for more of them; BF16 takes the second for any number. Every
# shader is compiled on the CPU here, half a minute each at first, so there are few types: the simplest, a K-quant, one
# with a table, and floats.
@pytest.mark.parametrize("type_name", ["q4_0", "q4_K", "iq3_xxs", "mxfp4", "f16", "f32", "bf16"])
def test_skipped_slots_are_zero_and_the_rest_is_right(backend, type_name):
    check_skipped_slots(backend, type_name, 50, (1, 3, 8, 9, 40), (1, 4, 7))


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("n_tokens", [1, 9])
def test_fused_bias_and_weight_skip_too(backend, n_tokens, with_bias):
    """MUL_MAT_ID, ADD_ID and MUL, which for one token run as one."""
    rng = np.random.default_rng(3)
    n_out, k = 50, 6
    raw, dense = weights_of(rng, "q4_0", n_out)
    bias = rng.standard_normal((N_EXPERTS, n_out), np.float32)
    x = rng.standard_normal((n_tokens, 1, N_IN), np.float32)
    weights = rng.standard_normal((n_tokens, k, 1), np.float32)

    def build(context):
        w, x, ids = tensors(context, "q4_0", n_out, 1, k, n_tokens)
        b = base.ggml_new_tensor_2d(context, numbered("f32"), n_out, N_EXPERTS)
        scale = base.ggml_new_tensor_3d(context, numbered("f32"), 1, k, n_tokens)
        out = base.ggml_mul_mat_id(context, w, x, ids)
        if with_bias:
            out = base.ggml_add_id(context, out, b, ids)
        return {"w": w, "x": x, "ids": ids, "b": b, "scale": scale}, base.ggml_mul(context, out, scale)

    graph = Graph(backend, build)
    for name, data in (("w", raw), ("x", x), ("scale", weights)) + ((("b", bias),) if with_bias else ()):
        graph.set(name, data)
    every = np.einsum("eoi,ti->teo", dense, x[:, 0].astype(np.float64)) + (bias if with_bias else 0)
    for name, ids in id_sets(rng, n_tokens, k):
        graph.set("ids", ids)
        out = graph()[0]
        assert np.isfinite(out).all() and not out[ids < 0].any(), name
        t, slot = np.nonzero(ids >= 0)
        error = np.abs(out[t, slot] - every[t, ids[t, slot]] * weights[t, slot])
        assert error.max(initial=0) < 4 * MAX_ERROR * N_IN**0.5, name
    graph.free()


@pytest.mark.skipif("software_vulkan" not in os.environ.get("LD_PRELOAD", ""), reason="memory is the system's")
def test_new_memory_is_full_of_nan(backend):
    """So what rests on zeros there fails, here and in whole models."""

    def build(context):
        x = base.ggml_new_tensor_2d(context, numbered("f32"), 1000, 50)
        return {}, base.ggml_cont(context, base.ggml_transpose(context, x))

    graph = Graph(backend, build)
    data = bytearray(base.ggml_nbytes(graph.output))
    base.ggml_backend_tensor_get(graph.output, ffi.from_buffer(data), 0, len(data))
    assert data == b"\xff" * len(data)
    graph.free()


def test_odd_floats_in_the_rules(backend):
    """Scores that a device may take for zero, or divide another way than the CPU: ids bit for bit all the same."""
    rng = np.random.default_rng(11)
    n_tokens, n_used = 600, 8
    bits = rng.integers(0, 2**32, (n_tokens, n_used), np.uint32)
    bits[:200] &= 0x007FFFFF  # denormal
    bits[200:300] = np.where(rng.random((100, n_used)) < 0.5, bits[200:300] & 0xFF, bits[200:300] & 0x80FFFFFF)
    scores = bits.view(np.float32)
    scores[300:500] = rng.random((200, n_used), np.float32)  # what a router gives
    scores[500:520] = np.float32([1, 1e-45, 0, -0.0, -1e-45, np.inf, -np.inf, np.nan])
    with np.errstate(invalid="ignore"):
        scores = np.sort(scores, axis=1)[:, ::-1]  # NaN first: then no value of the token is a number
    for value in range(3):
        values = value_of(value, scores)
        for threshold in np.float32([0.0, 1e-40, 0.3, 0.9999, 1.0]):
            routed = run_rule(backend, scores, rule=2, value=value, k_base=1, k=4, threshold=threshold)
            reaches = values[:, 1:] >= threshold
            n_kept = 1 + np.cumprod(reaches, axis=1).sum(1)
            assert np.array_equal((routed >= 0).sum(1), n_kept), (value, threshold)


def value_of(value, scores):
    """By the definitions in float32, in which the CPU computes."""
    with np.errstate(all="ignore"):
        if value == 0:
            return scores
        best = scores[:, :1]
        if value == 1:
            return np.where(best > 0, scores / best, np.float32(0))
        left = [np.ones(len(scores), np.float32)]
        for column in scores.T[:-1]:
            left.append(left[-1] - column)
        return np.stack(left, axis=1)


@pytest.mark.parametrize("name", ["gpt-oss", "llama4"])
def test_biases_of_experts_and_weights_before_them(backend, name, tmp_path):
    """Architectures whose graphs differ: ADD_ID behind every product, weights that act on the experts' input."""
    pytest.importorskip("transformers", reason="the tiny models are made and converted with it")
    import tiny_models

    path = tiny_models.build(tmp_path, [tiny_models.TINY_MODELS[name]])[name].gguf_path
    cpu, gpu = load(path, op_offload=False), load(path, n_gpu_layers=-1)
    full = gpu.plan.expert_used_count_full
    half = [k and max(2, k // 2) for k in full]
    for plan in (
        Plan(half, full, token_rule="batch"),
        Plan(half, full, token_rule="threshold", threshold=[np.inf] * len(full)),  # one expert for every token
    ):
        for n_batch, n_tokens in ((40, 40), (1, 5)):
            found = []
            for llm in (cpu, gpu):
                llm.set_plan(plan)
                assert llm.plan == plan
                found.append((logits(llm, n_batch, n_tokens), llm.expert_stats()))
            (expected, counts), (out, gpu_counts) = found
            assert np.median(np.abs(out - expected).max(1)) < MAX_LOGIT_ERROR * expected.std(), (plan, n_batch)
            for phase in counts:
                assert np.array_equal(gpu_counts[phase]["activations"], counts[phase]["activations"])
    cpu.close()
    gpu.close()


class Overridden(Llama):
    """With what llama.cpp's --override-tensor does, for which Python has no argument: tensors of these names on the CPU."""

    patterns: tuple = ()

    @property
    def model_params(self):
        return Llama.model_params.fget(self)

    @model_params.setter
    def model_params(self, params):
        Llama.model_params.fset(self, params)
        texts = [native_ffi.new("char[]", pattern.encode()) for pattern in self.patterns]
        overrides = native_ffi.new("struct llama_model_tensor_buft_override[]", len(texts) + 1)
        for override, text in zip(overrides, texts):
            override.pattern, override.buft = text, libggml_base.ggml_backend_cpu_buffer_type()
        params.tensor_buft_overrides = int(native_ffi.cast("uintptr_t", overrides))
        self._overrides = overrides, texts


OVERRIDES = {
    "routers": ["ffn_gate_inp"],
    "one product of the experts": ["ffn_down_exps"],
    "attention": ["attn"],
    "shared experts": ["shexp"],
    "every second layer": [r"blk\.(1|3)\."],
    "experts of a layer, the router of another": [r"blk\.0\.ffn_.*_exps", r"blk\.2\.ffn_gate_inp\."],
}


PLACES = [pytest.param(name, marks=[] if name == "routers" else pytest.mark.slow) for name in OVERRIDES]


@pytest.mark.parametrize("name", PLACES)
def test_any_part_on_the_cpu(backend, tiny, plans, name, monkeypatch):  # noqa: F811
    """Rules run wherever their tensors are: the CPU's logits and counts."""
    monkeypatch.setattr(Overridden, "patterns", OVERRIDES[name])
    sizes = dict(n_ctx=128, n_batch=128, n_ubatch=128, logits_all=True, verbose=False)
    cpu, gpu = load(tiny.gguf_path, op_offload=False), Overridden(str(tiny.gguf_path), n_gpu_layers=-1, **sizes)
    for plan in ("off", "batch", "strict", "estimate"):
        for n_batch, n_tokens in ((80, 80), (1, 4)):
            found = []
            for llm in (cpu, gpu):
                llm.set_plan(plans[plan])
                assert llm.plan == plans[plan]
                found.append((logits(llm, n_batch, n_tokens), llm.expert_stats()))
            (expected, counts), (out, gpu_counts) = found
            assert np.median(np.abs(out - expected).max(1)) < MAX_LOGIT_ERROR * expected.std(), (plan, n_batch)
            for phase in counts:
                difference = gpu_counts[phase]["activations"] - counts[phase]["activations"]
                assert np.abs(difference).max() <= {"strict": 2, "estimate": 4}.get(plan, 0), (plan, n_batch)
    cpu.close()
    gpu.close()


def on_the_device(llm) -> list:
    """For each layer whether its experts are there."""
    names = [
        libllama.allocmoe_expert_placement(context_pointer(llm), il, native_ffi.new("int64_t *")) for il in range(4)
    ]
    return [native_ffi.string(name).startswith(b"Vulkan") for name in names]


@pytest.mark.skipif(not hasattr(libllama, "allocmoe_fit"), reason="the library was not built for a GPU")
def test_what_fits_into_the_devices_memory(backend, tiny, monkeypatch, capfd):
    """n_gpu_layers=None: all, all but some experts, some layers, nothing; one line says so; the CPU's logits."""
    free, total = ffi.new("size_t *"), ffi.new("size_t *")
    base.ggml_backend_dev_memory(base.ggml_backend_get_device(backend), free, total)
    cpu = load(tiny.gguf_path, op_offload=False)
    expected = logits(cpu, 80)
    cpu.close()
    found = []
    for n_bytes in (1 << 30, 26 << 20, 16 << 20, 0):
        monkeypatch.setattr(gpu_fit, "MARGIN", free[0] - n_bytes)
        llm = load(tiny.gguf_path, n_gpu_layers=None)
        line = capfd.readouterr().err
        assert line.startswith(f"allocmoe: {tiny.gguf_path}: ") and line.count("\n") == 1, line
        error = np.median(np.abs(logits(llm, 80) - expected).max(1))
        assert error < MAX_LOGIT_ERROR * expected.std(), n_bytes
        found.append((sum(on_the_device(llm)), llm.model_params.n_gpu_layers, line))
        llm.close()
    everything, most, some, nothing = found
    assert everything[:2] == (4, -1) and "all 4 layers on the GPU: " in everything[2]
    assert 0 < most[0] < 4 and most[1] == 5 and "all 4 layers on the GPU, experts of " in most[2]
    assert 0 < some[0] < most[0] and some[1] < 5 and "3 of 4 layers on the GPU, experts of " in some[2]
    assert nothing[:2] == (0, 0) and "no layer fits" in nothing[2]


def without_a_driver() -> dict:
    """The environment of a machine with the loader alone."""
    return {**os.environ, "VK_ICD_FILENAMES": "/nonexistent", "VK_DRIVER_FILES": "/nonexistent"}


def test_without_a_driver_all_is_on_the_cpu(backend, tiny):
    """And one line says so."""
    program = """if 1:
        import sys
        from allocmoe_edge import Llama
        llm = Llama(sys.argv[1], n_gpu_layers=-1, n_ctx=64, verbose=False)
        llm.eval([1, 2, 3])
        assert llm.model_params.n_gpu_layers == 0
        """
    command = [sys.executable, "-c", program, str(tiny.gguf_path)]
    done = subprocess.run(command, env=without_a_driver(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line.startswith("allocmoe: ") for line in done.stderr.splitlines()] == [True], done.stderr
    assert done.stderr.endswith(": all on the CPU\n")


@pytest.mark.slow
def test_conversion_on_the_device(backend, tiny, tmp_path):
    """allocmoe-convert --n-gpu-layers: profile and calibrated rule are those of a machine without a GPU but for rounding."""
    from allocmoe_edge.convert import cli
    from allocmoe_edge.plan import metadata

    (tmp_path / "text").write_text("The history of the world begins with the first writing. " * 40)
    sizes = ["--ctx-size", "64", "--calib-tokens", "128", "--estimate-tokens", "256"]
    arguments = [
        str(tiny.gguf_path),
        "--budget",
        "0.5",
        "--token-rule",
        "estimate",
        "--calib",
        str(tmp_path / "text"),
        *sizes,
    ]
    outputs = [tmp_path / "cpu.gguf", tmp_path / "gpu.gguf"]
    # with a device, ggml has it compute prompts of the CPU's layers as well
    command = [sys.executable, "-m", "allocmoe_edge.convert.cli", *arguments, "-o", str(outputs[0])]
    done = subprocess.run(command, env=without_a_driver(), capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert cli.main([*arguments, "--n-gpu-layers", "-1", "-o", str(outputs[1])]) == 0
    cpu, gpu = map(metadata.read, outputs)
    for row, wanted in zip(gpu.profile.sensitivity, cpu.profile.sensitivity):
        np.testing.assert_allclose(row, wanted, rtol=0.05)
    counts = np.array([plan.expert_used_count for plan in (gpu.plan, cpu.plan)])
    assert (counts.sum(1) == 8).all() and np.abs(counts[0] - counts[1]).max() <= 1
    np.testing.assert_allclose(gpu.plan.threshold, cpu.plan.threshold, atol=0.02)
    for name, tolerance in (("full", 0.01), ("uniform", 0.01), ("kl_uniform", 0.05), ("plan", 0.1), ("kl_plan", 0.2)):
        assert getattr(gpu.profile.held_out, name) == pytest.approx(getattr(cpu.profile.held_out, name), rel=tolerance)


@pytest.mark.slow
def test_the_small_real_model(backend, smolmoe_path):
    """A prompt and two tokens of 30 layers in Q4_1. The CPU rounds activations to 8 bits, which the device does not."""
    sizes = dict(n_ctx=64, n_batch=64, n_ubatch=64, logits_all=True, verbose=False)
    cpu = Llama(str(smolmoe_path), op_offload=False, **sizes)
    gpu = Llama(str(smolmoe_path), n_gpu_layers=-1, **sizes)
    tokens = cpu.tokenize(b"The history of the world begins with the first writing, and it is the history of people.")
    full = cpu.plan.expert_used_count_full
    for plan in (None, Plan([k // 2 for k in full], full, token_rule="batch")):
        found = []
        for llm in (cpu, gpu):
            llm.set_plan(plan)
            llm.reset()
            llm.expert_stats(reset=True)
            llm.eval(tokens[:-2])
            llm.eval(tokens[-2:-1])
            llm.eval(tokens[-1:])
            found.append((llm.scores[: len(tokens)].copy(), llm.expert_stats()))
        (expected, counts), (out, gpu_counts) = found
        assert np.square(out - expected).mean() ** 0.5 < 0.2 * expected.std()
        for phase in counts:
            assert np.array_equal(gpu_counts[phase]["activations"], counts[phase]["activations"])
    cpu.close()
    gpu.close()


@pytest.mark.slow
@pytest.mark.parametrize("op", ["MUL_MAT_ID", "ADD_ID"])
def test_cases_of_upstream(backend, op, tmp_path):
    """llama.cpp's own test of the operations that we touch, on our shaders."""
    done = subprocess.run([sys.executable, str(ROOT / "native" / "prepare.py")], capture_output=True, text=True)
    tree, program = Path(done.stdout.split()[-1]), tmp_path / "test-backend-ops"
    source, headers = tree / "tests" / "test-backend-ops.cpp", tree / "ggml" / "include"
    command = ["c++", "-std=c++17", "-O0", f"-I{headers}", str(source), "-o", str(program), f"-L{LIB_DIR}"]
    command += [f"-Wl,-rpath,{LIB_DIR}", "-Wl,--allow-shlib-undefined", "-lggml", "-lggml-base", "-pthread"]
    subprocess.run(command, check=True)
    done = subprocess.run([program, "test", "-b", "Vulkan0", "-o", op], capture_output=True, text=True)
    assert done.returncode == 0 and "OK" in done.stdout, done.stdout[-2000:]


LAYER = "VK_LAYER_KHRONOS_validation"
CHECKS = {  # whole models take hours with their shaders instrumented, so those of ours and those with ids alone
    "SYNCHRONIZATION_VALIDATION": "rules_on_the_device and (33 or 1025) or turns or estimates or weights_of or add_id or fused",
    "GPU_ASSISTED": "rules_on_the_device and 33 or turns and 300 or estimates and 7 or weights_of or add_id",
}


@pytest.mark.parametrize("check", CHECKS)
def test_validation_layers_report_nothing(backend, check, tmp_path):
    if not list(Path("/usr/share/vulkan/explicit_layer.d").glob("*khronos_validation*")):
        pytest.skip("no validation layers. On Debian: apt install vulkan-validationlayers")
    log, settings = tmp_path / "log.txt", tmp_path / "settings.txt"
    lines = {"debug_action": "VK_DBG_LAYER_ACTION_LOG_MSG", "report_flags": "error,warn,info", "log_filename": log}
    settings.write_text("".join(f"khronos_validation.{name} = {value}\n" for name, value in lines.items()))
    env = {
        **os.environ,
        "VK_INSTANCE_LAYERS": LAYER,
        "VK_LAYER_SETTINGS_PATH": str(settings),
        "VK_LAYER_ENABLES": f"VK_VALIDATION_FEATURE_ENABLE_{check}_EXT",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-m", "vulkan", "-k", CHECKS[check], __file__]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout
    messages = [line for line in log.read_text().splitlines() if line.startswith(("VUID", "SYNC", "UNASSIGNED"))]
    started = [line for line in messages if "(INFO" in line]
    assert any("Validation Layer Active" in line for line in started) and check in log.read_text()
    assert messages == started


def again(wanted: str, *options, **env) -> subprocess.CompletedProcess:
    """The tests of single operations that `wanted` names, on a device that is another one by the environment."""
    command = [sys.executable, "-m", "pytest", "-q", *options, "-m", "vulkan", "-k", wanted, __file__]
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True)


def test_without_half_precision(backend):
    """The shaders for devices that have none."""
    wanted = "odd_floats or estimates and 7 or add_id or fused or skipped_slots and (q4_0 or f32)"
    done = again(wanted, GGML_VK_DISABLE_F16="1")
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout


def test_with_integer_dot_products(backend):
    """The shaders for devices that have fast ones: the software device has slow ones, and says otherwise here.

    In subgroups of 16: with 8 llama.cpp's tiles for K-quants leave out half of the rows.
    """
    env = dict(ALLOCMOE_TEST_INTEGER_DOT="1", GGML_VK_FORCE_MMVQ="1", LP_NATIVE_VECTOR_WIDTH="512")
    done = again("fused or skipped_slots and (q4_0 or q4_K or mxfp4)", "-s", **env)
    if "int dot: 1" not in done.stdout + done.stderr:
        pytest.skip("not compiled: glslc is older than the extension of shaders for that (GL_EXT_integer_dot_product)")
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout

"""bench/shapes.py: models that llama.cpp loads and runs, in the types that llama-quantize would give them."""

import ctypes
import json

import allocmoe_edge  # noqa: F401
from allocmoe_edge import Llama
import expert_usage
import gguf
import llama_cpp
import numpy as np
import pytest
import random_gguf
import shapes

# the real models' structure at small sizes; 96 is no multiple of 256, so types have to fall back
SMALL = dict(
    hidden_size=256, vocab_size=300, intermediate_size=96, moe_intermediate_size=96, num_attention_heads=4, head_dim=64,
    num_key_value_heads=2, num_hidden_layers=9, shared_expert_intermediate_size=192, kv_lora_rank=256,
    qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=64, sliding_window=16,
)  # fmt: skip


def small(name: str) -> shapes.Shape:
    config = shapes.MODELS[name]
    changed = {**config, **{key: value for key, value in SMALL.items() if key in config}}
    if "head_dim" not in changed:
        changed["num_attention_heads"] = SMALL["num_attention_heads"]
    if config["model_type"] == "deepseek_v2":
        changed["num_hidden_layers"] = 27  # llama.cpp knows the Lite models by it
    return shapes.Shape(changed)


def types(path) -> dict:
    return {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(path).tensors}


@pytest.fixture(scope="module", params=shapes.MODELS)
def model(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("shapes") / "model.gguf"
    random_gguf.write(path, request.param, small(request.param), "Q8_0", 0)
    return request.param, path


def test_runs_with_finite_logits_and_routers_that_choose(model):
    name, path = model
    shape = small(name)
    layers, last = expert_usage.router_logits(path, None, 64)
    assert len(layers) == shape.n_layer - shape.n_dense
    assert np.isfinite(last).all() and last.std() > 0
    for logits in layers:
        found = expert_usage.usage(logits, shape.n_used)
        # two tokens of a collapsed model would choose the same experts, and one expert in K would be chosen always
        assert found["kept"] < 0.9 or shape.n_used == shape.n_expert
        assert 0.5 < found["entropy"] <= 1


@pytest.mark.parametrize("file_type, ftype", [("Q4_K_M", 15), ("Q4_0", 2), ("Q8_0", 7), ("MXFP4", 38)])
def test_types_are_those_of_llama_quantize(model, tmp_path, file_type, ftype):
    name, source = model
    ours, upstream = tmp_path / "ours.gguf", tmp_path / "upstream.gguf"
    random_gguf.write(ours, name, small(name), file_type, 0)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = ftype, True
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(upstream).encode(), ctypes.byref(params)) == 0
    assert types(ours) == types(upstream)


def test_loads_at_any_plan(model):
    llm = Llama(str(model[1]), n_ctx=32, n_batch=32, verbose=False)
    llm.set_plan([min(k, 1) for k in llm.plan.expert_used_count_full])
    llm.eval([1, 2, 3, 4])
    assert set(llm.expert_stats()["prefill"]["mean"]) <= {0, 1}


@pytest.mark.parametrize("type_", ["Q4_0", "Q8_0", "Q4_K", "Q6_K", "Q5_0", "MXFP4"])
def test_pool_has_the_variance_asked_for(type_):
    type_, rng = gguf.GGMLQuantizationType[type_], np.random.default_rng(0)
    rows = random_gguf.Pool(type_, 512, 0.02, 0.25, rng).draw(4000, rng)
    weights = gguf.dequantize(rows, type_)
    # 15%: MXFP4 has 4 bits and a scale that is a power of two; the others keep it within 2%
    assert weights.std() == pytest.approx(0.02, rel=0.15)
    assert (weights.mean(0) ** 2).mean() / weights.var() == pytest.approx(0.25, abs=0.06)
    # two pieces of one in 2,048 each: some 2 of the 8 million pairs of rows agree by chance
    assert len(np.unique(rows, axis=0)) > 3980


def test_parameters_of_real_models():
    """Against the model cards: totals in billions, to what their names round to."""
    cards = {"DeepSeek-V2-Lite": 15.7, "Qwen1.5-MoE-A2.7B": 14.3, "Qwen3-30B-A3B": 30.5, "OLMoE-1B-7B": 6.9,
             "gpt-oss-20b": 20.9, "Mixtral-8x7B": 46.7, "Granite-3.1-3B-A800M": 3.3}  # fmt: skip
    for name, billions in cards.items():
        total = sum(np.prod(tensor.shape, dtype=float) for tensor in shapes.load(name)[1].tensors()) / 1e9
        assert total == pytest.approx(billions, rel=0.01), name


def test_config_file(tmp_path):
    path = tmp_path / "tiny" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps({**shapes.MODELS["OLMoE-1B-7B"], "torch_dtype": "bfloat16"}))
    name, shape = shapes.load(str(path), 2)
    assert (name, shape.n_layer, shape.n_expert) == ("tiny", 2, 64)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "llama"}, "model_type: found 'llama', want one of"),
        ({"num_experts_per_tok": 65}, "want 1 to 64"),
        ({"num_experts": None}, "n_routed_experts or num_experts or num_local_experts: missing"),
        ({"hidden_size": "2048"}, "hidden_size: missing, or not a positive integer"),
        ({"intermediate_size": 100}, "multiples of 32"),
    ],
)
def test_errors_name_the_key(change, message):
    with pytest.raises(shapes.ShapeError, match=message):
        shapes.Shape({**shapes.MODELS["OLMoE-1B-7B"], **change})


def test_layers_that_llama_cpp_could_not_load():
    with pytest.raises(shapes.ShapeError, match="26 or 27"):
        shapes.load("DeepSeek-V2-Lite", 12)


def test_no_room_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(random_gguf.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1 << 20})())
    with pytest.raises(OSError, match="the disk has 0.0 GB free"):
        random_gguf.write(tmp_path / "x.gguf", "x", small("OLMoE-1B-7B"), "Q4_0", 0)
    assert not list(tmp_path.iterdir())


def test_interrupted_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(random_gguf.Pool, "draw", interrupt)
    with pytest.raises(KeyboardInterrupt):
        random_gguf.write(tmp_path / "x.gguf", "x", small("OLMoE-1B-7B"), "Q4_0", 0)
    assert not list(tmp_path.iterdir())

"""Every Mixture-of-Experts class of transformers that upstream's converter knows, as a tiny random model.

The classes are found, not listed: the causal and image-text models of transformers whose configuration counts
experts, as far as their name is among the architectures that upstream's converter has registered. Their configurations
are made small by the names of their fields (SMALL); what a class needs beyond that is in PARTICULAR.

    python architectures.py table UPSTREAM_FOLDER

prints the table of docs/architectures.md. The sweep runs this file for ROOT/NAME of each NAME, in processes of their own:

    python architectures.py convert UPSTREAM_FOLDER ROOT NAME [NAME ...]    to ROOT/NAME.gguf
    python architectures.py run ROOT NAME [NAME ...]                        at half budget, and again at full

Either leaves an error in ROOT/NAME.error. The second prints the name that it is at, since llama.cpp can end the process.
"""

from __future__ import annotations

import ast
from functools import partial
import importlib.util
import json
import os
from pathlib import Path
import subprocess
import sys
import tempfile
import traceback
from typing import Any

import numpy as np

# longer than the sliding window
TOKENS = np.random.default_rng(0).integers(1, 320, 20).tolist()
N_EXPERT, N_EXPERT_USED = 8, 4
# float32 on both sides, four layers: 1e-6 to 3e-4 where both compute the same
MAX_ERROR = 1e-3

SMALL: dict[str, Any] = dict(
    vocab_size=320,
    hidden_size=64,
    d_model=64,
    num_hidden_layers=4,
    n_layers=4,
    num_attention_heads=4,
    n_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=96,
    intermediate_size_mlp=96,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=32,
    moe_shared_expert_intermediate_size=32,
    shared_intermediate_size=32,
    num_experts=N_EXPERT,
    num_local_experts=N_EXPERT,
    n_routed_experts=N_EXPERT,
    moe_num_experts=N_EXPERT,
    num_experts_per_tok=N_EXPERT_USED,
    num_experts_per_token=N_EXPERT_USED,
    moe_k=N_EXPERT_USED,
    top_k_experts=N_EXPERT_USED,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    num_dense_layers=1,
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=16,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    mamba_n_heads=8,
    mamba_d_head=16,
    mamba_d_state=16,
    mamba_num_heads=8,
    mamba_head_dim=16,
    ssm_state_size=16,
    sliding_window=16,
    max_position_embeddings=256,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=None,
    num_nextn_predict_layers=0,
)


# of the 4 of 16 values of a head that these models turn by default
INTERLEAVED = dict(
    rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.25, mrope_section=[1, 1, 0], mrope_interleaved=True
)
# as released: a table of n-grams in one layer; llama.cpp knows no other gate
QWEN4 = dict(
    rope_parameters=INTERLEAVED, hc_lowrank=16, ple_layer_ids=[1], ngram_vocab_size_base=64, heads_per_ngram=2,
    split_ngram_parts=2, output_gate_type="sigmoid", indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=16,
    indexer_budget=32, indexer_compress_ratio=4,
)  # fmt: skip

# of the layers with a window, which have sizes of their own
DOTS3_WINDOW = dict(
    num_attention_heads=4, num_key_value_heads=4, q_lora_rank=32, kv_lora_rank=32, head_dim=32, qk_nope_head_dim=16,
    qk_rope_head_dim=16, v_head_dim=16,
)  # fmt: skip
DOTS3 = dict(shared_experts_intermediate_size=32, per_layer_config={2: DOTS3_WINDOW, 3: DOTS3_WINDOW})
DOTS3_AS_RELEASED = dict(
    scoring_func="sigmoid", apply_mla_qkv_lora_rescale=True, first_k_dense_replace=1, sliding_window_size=16,
    rope_parameters=dict(full_attention=dict(rope_type="default", rope_theta=80_000_000.0)),
    **{f"swa_{key}": value for key, value in DOTS3_WINDOW.items()},
)  # fmt: skip

# what a class needs beyond that, by its model_type
PARTICULAR: dict[str, dict] = {
    # as released: llama.cpp scales the embeddings always
    "afmoe": dict(mup_enabled=True),
    "deepseek_v4": dict(mlp_layer_types=["moe"] * 4),
    # as released: the shared experts are as wide as intermediate_size over num_key_value_heads, says the converter
    "ernie4_5_moe": dict(intermediate_size=128),
    "glm4v_moe": dict(
        # of the 8 of 16 values of a head that this model turns
        text_config=dict(
            rope_parameters=dict(
                rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5, mrope_section=[1, 1, 2]
            )
        ),
        vision_config=dict(num_heads=4, depth=2, out_hidden_size=64),
    ),  # fmt: skip
    "glm5_next": dict(
        # as released: its attention does not turn
        text_config=dict(
            qk_rope_head_dim=0, linear_head_dim=16, linear_num_heads=4, mlp_layer_types=["dense", *["sparse"] * 3]
        ),
        vision_config=dict(num_heads=4, depth=2, out_hidden_size=64, projection_intermediate_size=64),
    ),
    "granitemoehybrid": dict(layer_types=["linear_attention", "full_attention"] * 2),
    "kimi_linear": dict(
        layer_types=["linear_attention", "full_attention"] * 2,
        linear_head_dim=16,
        linear_num_heads=4,
        q_lora_rank=None,
        # transformers writes a dense layer under the name of the sparse ones, which the released files do not
        mlp_layer_types=["sparse"] * 4,
        # of the released 1e-5, see REASON
        rms_norm_eps=1e-6,
    ),  # fmt: skip
    # llama.cpp turns the layers with a window by the base of those without
    "mellum": dict(
        layer_types=["full_attention", *["sliding_attention"] * 3],
        rope_parameters=dict.fromkeys(
            ["full_attention", "sliding_attention"], dict(rope_type="default", rope_theta=10000.0)
        ),
    ),
    # as released: half of a head is turned
    "minimax_m2": dict(rotary_dim=8),
    "minimax_m3_vl": dict(
        text_config=dict(
            dense_intermediate_size=96,
            shared_intermediate_size=96,
            index_head_dim=16,
            index_n_heads=2,
            rotary_dim=8,
            layer_types=["full_attention", *["minimax_m3_sparse"] * 3],
            mlp_layer_types=["dense", *["sparse"] * 3],
            rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5),
        )
    ),  # fmt: skip
    # as released: no dense layer beside the experts
    "nemotron_h": dict(layers_block_type=["linear_attention", "moe", "full_attention", "moe"]),
    "qwen3_5_moe": dict(text_config=dict(rope_parameters=INTERLEAVED)),
    "qwen3_5_moe_text": dict(rope_parameters=INTERLEAVED),
    "qwen3_vl_moe": dict(
        text_config=dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[3, 3, 2]))
    ),
    "qwen4_exp": dict(text_config=QWEN4),
    "qwen4_exp_text": QWEN4,
    # as released: llama.cpp knows no window here
    "mixtral": dict(sliding_window=None),
    "mimo_v2_flash": dict(
        rope_parameters=dict(
            full_attention=dict(rope_type="default", rope_theta=500000.0, partial_rotary_factor=0.5),
            sliding_attention=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5),
        )
    ),
    # as released: llama.cpp does not read these from the file
    "olmoe": dict(num_key_value_heads=4),
    "qwen3_moe": dict(norm_topk_prob=True),
    "solar_open": dict(
        # as released: whole heads are turned
        rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=1.0)
    ),
    "step3p7": dict(
        text_config=dict(
            pad_token_id=0,
            share_expert_dim=32,
            layer_types=["full_attention", *["sliding_attention"] * 3],
            mlp_layer_types=["dense", *["sparse"] * 3],
            rope_parameters=dict(
                full_attention=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5),
                sliding_attention=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=1.0),
            ),
        )
    ),  # fmt: skip
    # its parts do not read rope_theta, which its own attention asks them for
    "dbrx": dict(
        attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=10000.0),
        ffn_config=dict(moe_num_experts=N_EXPERT, moe_top_k=N_EXPERT_USED, ffn_hidden_size=64),
        max_seq_len=256,
    ),
    "dots3_note": dict(
        text_config=DOTS3,
        vision_config=dict(mlp_layer_types=["dense"] * 4, adapter_in_dim=64, adapter_out_dim=64),
        audio_config=dict(adapter_input_size=64, adapter_out_dim=64, downsample_hidden_size=16),
    ),
    "dots3_note_text": DOTS3,
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    # as released: llama.cpp takes a window to mean this pattern
    "laguna": dict(layer_types=["full_attention", *["sliding_attention"] * 3]),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"] * 2),
}


# Keys of the released models' config.json that transformers' own class reads and does not write again
AS_RELEASED: dict[str, dict] = {
    "afmoe": dict(route_norm=True),
    # without the key the file means softmax
    "deepseek_v3": dict(scoring_func="sigmoid"),
    "deepseek_v32": dict(scoring_func="sigmoid"),
    "deepseek_v4": dict(num_hash_layers=0),
    "dots3_note": dict(text_config=DOTS3_AS_RELEASED),
    "dots3_note_text": DOTS3_AS_RELEASED,
    # llama.cpp knows the released one to be sigmoid by the sizes of its vocabulary and depth
    "glm4_moe_lite": dict(first_k_dense_replace=1, scoring_func="sigmoid"),
    "glm5_next": dict(
        text_config=dict(
            linear_attn_config=dict(num_heads=4, head_dim=16, short_conv_kernel_size=4, gate_lower_bound=-5.0),
            mla_use_nope=True,
            first_k_dense_replace=1,
        )
    ),  # fmt: skip
    "granitemoehybrid": dict(layer_types=["mamba", "attention"] * 2),
    "kimi_linear": dict(
        linear_attn_config=dict(
            full_attn_layers=[2, 4], kda_layers=[1, 3], head_dim=16, num_heads=4, short_conv_kernel_size=4
        ),
        num_experts=N_EXPERT,
        num_experts_per_token=N_EXPERT_USED,
        num_shared_experts=1,
        first_k_dense_replace=0,
        moe_router_activation_func="sigmoid",
        moe_renormalize=True,
    ),  # fmt: skip
    "mimo_v2_flash": dict(
        swa_head_dim=16,
        swa_num_attention_heads=4,
        swa_v_head_dim=16,
        swa_num_key_value_heads=4,
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        hybrid_layer_pattern=[0, 1, 1, 1],
        partial_rotary_factor=0.5,
    ),  # fmt: skip
    "exaone_moe": dict(scoring_func="sigmoid"),
    "minimax_m2": dict(rotary_dim=8, scoring_func="sigmoid"),
    "minimax_m3_vl": dict(
        text_config=dict(
            n_shared_experts=1,
            scoring_func="sigmoid",
            moe_layer_freq=[0, 1, 1, 1],
            sparse_attention_config=dict(
                sparse_num_index_heads=2,
                sparse_index_dim=16,
                sparse_topk_blocks=16,
                sparse_block_size=128,
                sparse_local_block=1,
                sparse_attention_freq=[0, 1, 1, 1],
            ),
        )
    ),
    "step3p7": dict(
        text_config=dict(
            num_attention_groups=2,
            moe_num_experts=N_EXPERT,
            moe_top_k=N_EXPERT_USED,
            norm_expert_weight=True,
            partial_rotary_factors=[0.5, 1.0, 1.0, 1.0],
            moe_layers_enum="1,2,3",
        )
    ),
}
# Experts that the released files hold transposed; transformers reads them either way and writes them as it computes
TRANSPOSED = {"qwen3_vl_moe"}
SENTENCEPIECE = {"ernie4_5_moe", "jamba"}
ADD_BOS = {"deepseek_v32"}
SPECIAL_TOKENS = [
    "<unk>",
    "<|endoftext|>",
    "[gMASK]",
    "<sop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
]
SPECIAL_TOKENS += ["<|endofassistant|>", "<|startoftext|>"]


# What docs/architectures.md says of a class beside its result, above all why it does not run
REASON: dict[str, str] = {
    "deepseek_v32": "the converter asks for a tokenizer that adds a start token, and transformers 5 drops that setting "
    "(`add_bos_token`) of every folder with a tokenizer.json; with vocab.json and merges.txt in its place it runs",
    "deepseek_v4": "the converter takes the routed experts as the released MXFP4 blocks only, "
    "and transformers writes them as plain numbers",
    **dict.fromkeys(
        ["dots3_note", "dots3_note_text"],
        "the converter asks for `num_hidden_layers` and `swa_...` at the top of config.json, as released, but reads the "
        "file through transformers, which knows the model and renames them; under an unknown `model_type` it runs",
    ),
    **dict.fromkeys(
        ["qwen4_exp", "qwen4_exp_text"],
        "by an indexer_budget that covers the text; beyond it transformers attends to chosen tokens, and llama.cpp, given "
        "a folder that transformers wrote, to all",
    ),
    "qwen3_vl_moe": "by an mrope_section of [3, 3, 2]; of [4, 2, 2] llama.cpp leaves one pair in eight unturned",
    "kimi_linear": "by an rms_norm_eps of 1e-6; llama.cpp takes that (released: 1e-5) also where transformers always "
    "has 1e-6, in the norms of latent keys and of the queries and keys of linear attention",
    "mimo_v2_flash": "the converter asks for `rope_parameters.partial_rotary_factor`, and transformers has it by the type "
    "of a layer only; with it added to config.json it runs",
    **dict.fromkeys(
        ["minimax_m3_vl", "step3p7"],
        "the converter asks for keys of the released `text_config` (`sparse_attention_config`, `num_attention_groups` and "
        "others) that transformers renames as it reads them; with them copied to the top of config.json it runs",
    ),
}


def registered(upstream: Path) -> set:
    """Names of the architectures that upstream's converter has registered for text models."""
    for node in ast.parse((upstream / "conversion" / "__init__.py").read_text()).body:
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "TEXT_MODEL_MAP":
            return set(ast.literal_eval(node.value))
    raise LookupError("TEXT_MODEL_MAP")


def counts_experts(config: dict) -> bool:
    return any(
        counts_experts(value)
        if isinstance(value, dict)
        else isinstance(key, str) and "expert" in key and isinstance(value, int) and value > 1
        for key, value in config.items()
    )


def find() -> dict:
    """(configuration class, model class) by model_type, for every model class in transformers that counts experts.

    One configuration for each model class; the text model's own where a multimodal one has it too.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    found: dict = {}
    for models in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES):
        for model_type, names in models.items():
            config_name = CONFIG_MAPPING_NAMES.get(model_type)
            name = names if isinstance(names, str) else names[0]
            if config_name is None or (name in found and not model_type.endswith("_text")):
                continue
            try:
                config = getattr(transformers, config_name)()
            except Exception:
                continue  # a configuration without defaults
            if counts_experts(config.to_dict()):
                found[name] = (model_type, config_name)
    return {model_type: (config_name, name) for name, (model_type, config_name) in sorted(found.items())}


def tiny_config(model_type: str, config_name: str):
    import transformers

    config_class = getattr(transformers, config_name)
    return config_class(**merged(small(config_class().to_dict()), PARTICULAR.get(model_type, {})))


def merged(config: dict, changes: dict) -> dict:
    """`config` with `changes`, which name in its parts only what is theirs."""
    parts = {key: merged(config[key], value) for key, value in changes.items() if isinstance(config.get(key), dict)}
    return {**config, **changes, **parts}


def small(defaults: dict) -> dict:
    """The values of SMALL for the fields that a configuration has, in its parts too."""
    found = {}
    for key, value in defaults.items():
        if key in SMALL:
            found[key] = SMALL[key]
        elif isinstance(value, dict) and key.endswith("_config"):
            # its own part only: what is common to all, such as the type, comes from the class
            found[key] = small(value)
    if "kv_lora_rank" in defaults:  # multi-head latent attention: as many key-value heads as heads
        found["num_key_value_heads"] = found["num_attention_heads"]
    return found


def sweep(upstream: Path, root: Path, found: dict) -> dict:
    """Takes every model of `found` from folder to generation, under `root`.

    Returns:
        (result, detail) by model_type. result: "runs", "differs" if its logits are not those of transformers, or where it
        ended: "transformers" (the model is not made, or does not run there), "converter", "llama.cpp". detail: the greatest
        difference of the logits, over their standard deviation, or the error.
    """
    results, written = {}, []
    for model_type, (config_name, model_name) in found.items():
        try:
            write_folder(model_type, config_name, model_name, root / model_type)
            written.append(model_type)
        except Exception as error:
            results[model_type] = ("transformers", f"{type(error).__name__}: {error}")
    for stage, function in (("converter", partial(convert, upstream)), ("llama.cpp", run)):
        function(root, [name for name in written if name not in results])
        for name in written:
            error = root / f"{name}.error"
            if error.exists() and name not in results:
                results[name] = (stage, error.read_text())
    for name in written:
        if name not in results:
            detail = (root / f"{name}.txt").read_text()
            results[name] = ("runs" if float(detail) < MAX_ERROR else "differs", detail)
    return results


def write_folder(model_type: str, config_name: str, model_name: str, path: Path) -> None:
    """A Hugging Face folder with random weights. Raises whatever transformers raises."""
    import safetensors.torch
    import torch
    import transformers

    config = tiny_config(model_type, config_name)
    with torch.device("meta"):
        n_weights = sum(p.numel() for p in getattr(transformers, model_name)(config).parameters())
    if n_weights > 50_000_000:
        raise ValueError(f"not tiny: {n_weights} weights; SMALL lacks a field")
    torch.manual_seed(0)
    model = getattr(transformers, model_name)(config).eval()
    for weight in model.parameters():
        if weight.ndim > 1 and not weight.any():  # routers that start at zero: all experts alike, the choice by chance
            torch.nn.init.normal_(weight, std=0.02)
    model.save_pretrained(path)
    if model_type in TRANSPOSED:
        weights = safetensors.torch.load((path / "model.safetensors").read_bytes())
        weights = {name: weight.mT.contiguous() if ".experts." in name else weight for name, weight in weights.items()}
        safetensors.torch.save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    if model_type in AS_RELEASED:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(merged(config, AS_RELEASED[model_type])))
    (write_sentencepiece if model_type in SENTENCEPIECE else write_tokenizer)(path)
    if model_type in ADD_BOS:
        config = json.loads((path / "tokenizer_config.json").read_text())
        (path / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": True}))
    with torch.inference_mode():
        np.save(f"{path}.npy", model(torch.tensor([TOKENS])).logits[0].float().numpy())


def write_tokenizer(path: Path) -> None:
    """The tiny models' byte-level BPE, with the special tokens that upstream looks up by name in some families."""
    import tiny_models
    from transformers import PreTrainedTokenizerFast

    tiny_models._write_tokenizer(path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    tokenizer.add_tokens(SPECIAL_TOKENS, special_tokens=True)
    assert len(tokenizer) <= SMALL["vocab_size"]
    tokenizer.save_pretrained(path)


def write_sentencepiece(path: Path) -> None:
    import sentencepiece

    text = path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(path / "tokenizer"), model_type="bpe", vocab_size=300, byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip


def convert(upstream: Path, root: Path, names: list) -> None:
    env = dict(os.environ, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="2")
    _script("convert", upstream, root, *names, env=env)


def run(root: Path, names: list) -> None:
    names = list(names)
    while names:
        done = _script("run", root, *names, env=dict(os.environ, GGML_NO_BACKTRACE="1"))
        if done.returncode == 0:
            break
        at = [line[3:] for line in done.stdout.splitlines() if line.startswith("at ")][-1]
        (root / f"{at}.error").write_text(f"llama.cpp ends the process: {done.stderr.strip()[-300:]}")
        names = names[names.index(at) + 1 :]


def _script(*args, **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable, __file__, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, **kwargs)


def _convert(upstream: str, root: str, *names: str) -> None:
    sys.path[:0] = [upstream, str(Path(upstream, "gguf-py"))]
    # by its path: the package around it would load our libraries
    spec = importlib.util.spec_from_file_location("upstream", Path(upstream).parent / "convert" / "upstream.py")
    runner = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(runner)
    for name in names:
        path = Path(root, name)
        try:
            runner.convert("gpt-2", [str(path), "--outfile", f"{path}.gguf", "--outtype", "f32"])
        except BaseException as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            Path(f"{path}.error").write_text(f"{type(error).__name__}: {error} ({Path(at.filename).name}: {at.line})")
            Path(f"{path}.gguf").unlink(missing_ok=True)


def _run(root: str, *names: str) -> None:
    from allocmoe_edge._native import llama_cpp

    log: list = []

    @llama_cpp.llama_log_callback
    def keep(level, text, user_data):
        if b"error" in text:
            log.append(text.decode().strip())

    llama_cpp.llama_log_set(keep, None)
    for name in names:
        print(f"at {name}", flush=True)
        path = Path(root, name)
        try:
            Path(f"{path}.txt").write_text(_run_one(path))
        except Exception as error:
            Path(f"{path}.error").write_text(f"{type(error).__name__}: {error} {log[-1:]}")
        log.clear()


def _run_one(path: Path) -> str:
    from allocmoe_edge import Llama, Plan
    from allocmoe_edge.convert import output
    from allocmoe_edge.plan import metadata

    # half of the experts in every layer that has some: no layer stays at full count by chance
    full = metadata.read(f"{path}.gguf").full
    plan = Plan([k // 2 for k in full], full)
    output.write_planned(Path(f"{path}.gguf"), Path(f"{path}-half.gguf"), plan, None)
    llm = Llama(f"{path}-half.gguf", n_ctx=64, n_threads=2, logits_all=True, type_k=0, type_v=0, verbose=False)
    generated = llm.generate(TOKENS, temp=0.0)
    for _ in range(4):
        next(generated)
    spent = llm.expert_stats()["decode"]["mean"].tolist()
    assert spent == list(plan.expert_used_count), f"spent {spent}, planned {plan.expert_used_count}"

    llm.set_plan(None)
    llm.reset()
    llm.eval(TOKENS)
    reference = np.load(f"{path}.npy")
    distance = np.abs(llm.scores[: len(TOKENS)] - reference).max() / reference.std()
    return f"{distance:.1e}"


def _table(upstream: str) -> None:
    names = registered(Path(upstream))
    found = {kind: classes for kind, classes in find().items() if classes[1] in names}
    with tempfile.TemporaryDirectory() as root:
        results = sweep(Path(upstream), Path(root), found)
    for kind, (result, detail) in results.items():
        if kind in REASON:
            detail = f"{detail}: {REASON[kind]}" if result in ("runs", "differs") else REASON[kind]
        print(f"| `{kind}` | `{found[kind][1]}` | {result} | {' '.join(detail.split())} |")


if __name__ == "__main__":
    {"convert": _convert, "run": _run, "table": _table}[sys.argv[1]](*sys.argv[2:])

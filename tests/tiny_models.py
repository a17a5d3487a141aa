"""Tiny random Mixture-of-Experts models, as Hugging Face folders and as float32 GGUF files.

`build` writes one folder per architecture (config, weights, tokenizer) and converts all of them
with the converter that upstream llama.cpp ships, so that a test compares two independent
implementations on the same weights. Nothing is downloaded.

Run as a script, this file is the converter process:

    python tiny_models.py HF_FOLDER GGUF_FILE [HF_FOLDER GGUF_FILE ...]
"""

from __future__ import annotations

from dataclasses import dataclass
import os
from pathlib import Path
import subprocess
import sys
from typing import Any, Iterable
import zlib

import numpy as np

VOCAB_SIZE = 320
N_LAYERS = 4

# Standard deviation of the router logits. Large enough that ranks are far apart (no flips from
# rounding), small enough that ranks 2 to 4 carry weight (a softmax over 8 experts gives the top
# four about 0.4, 0.2, 0.1, 0.1), so that every count in a plan shows in the logits.
ROUTER_LOGIT_STD = 1.2


@dataclass(frozen=True)
class TinyModel:
    """One architecture: `name`, its transformers classes, and what differs from COMMON.

    `renormalises`: the weights of a token's experts are scaled to a sum of 1 (or chosen to be so
    by a softmax over the chosen experts alone). `scores`: what its experts are chosen by, "softmax" or
    "sigmoid" of the router logits, or the "logits" themselves; a selection bias comes on top.
    """

    name: str
    config_class: str
    model_class: str
    config: dict[str, Any]
    renormalises: bool
    leading_dense: int = 0
    scores: str = "softmax"

    def plan(self, *counts: int) -> list[int]:
        """A plan of N_LAYERS entries from counts for the MoE layers; dense layers get 0.

        Counts are given for all N_LAYERS layers; those of leading dense layers are ignored.
        """
        assert len(counts) == N_LAYERS, counts
        return [0 if il < self.leading_dense else k for il, k in enumerate(counts)]


@dataclass(frozen=True)
class BuiltModel:
    """A `TinyModel` on disk: the Hugging Face folder and its float32 GGUF."""

    spec: TinyModel
    hf_path: Path
    gguf_path: Path


COMMON: dict[str, Any] = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=64,
    num_hidden_layers=N_LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_experts_per_tok=4,
    max_position_embeddings=256,
    tie_word_embeddings=False,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=None,
)

# llama.cpp takes a null q_lora_rank only for the layer counts of the released Lite models
# (src/models/deepseek2.cpp, is_lite), hence a low-rank query here.
MLA: dict[str, Any] = dict(
    num_key_value_heads=4,
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=16,
    intermediate_size=96,
    moe_intermediate_size=32,
    first_k_dense_replace=1,
)

TINY_MODELS: dict[str, TinyModel] = {
    model.name: model
    for model in (
        TinyModel(
            "olmoe",
            "OlmoeConfig",
            "OlmoeForCausalLM",
            dict(num_key_value_heads=4, intermediate_size=48, num_experts=8, norm_topk_prob=False),
            renormalises=False,
        ),
        TinyModel(
            "qwen2moe",
            "Qwen2MoeConfig",
            "Qwen2MoeForCausalLM",
            dict(
                intermediate_size=96,
                moe_intermediate_size=48,
                shared_expert_intermediate_size=64,
                num_experts=8,
                norm_topk_prob=False,
            ),
            renormalises=False,
        ),
        TinyModel(
            "qwen3moe",
            "Qwen3MoeConfig",
            "Qwen3MoeForCausalLM",
            dict(
                intermediate_size=96,
                moe_intermediate_size=48,
                head_dim=32,
                num_experts=8,
                norm_topk_prob=True,  # as released; the default of transformers is False
            ),
            renormalises=True,
        ),
        TinyModel(
            "mixtral",
            "MixtralConfig",
            "MixtralForCausalLM",
            dict(intermediate_size=48, num_local_experts=8),
            renormalises=True,
        ),
        TinyModel(
            "deepseek2",
            "DeepseekV2Config",
            "DeepseekV2ForCausalLM",
            dict(
                **MLA,
                n_routed_experts=8,
                n_shared_experts=2,
                topk_method="greedy",
                scoring_func="softmax",
                norm_topk_prob=False,
                routed_scaling_factor=1.5,
            ),
            renormalises=False,
            leading_dense=1,
        ),
        TinyModel(
            "deepseek3",
            "DeepseekV3Config",
            "DeepseekV3ForCausalLM",
            # scoring_func: transformers has sigmoid built in and does not write the key, and
            # without it the converter's file means softmax. 16 experts, so that the two groups
            # that stay hold more candidates (8) than a token uses (4).
            dict(
                **MLA,
                n_routed_experts=16,
                n_shared_experts=1,
                scoring_func="sigmoid",
                topk_method="noaux_tc",
                n_group=4,
                topk_group=2,
                norm_topk_prob=True,
                routed_scaling_factor=1.5,
                num_nextn_predict_layers=0,
            ),
            renormalises=True,
            leading_dense=1,
            scores="sigmoid",
        ),
        TinyModel(
            "gpt-oss",
            "GptOssConfig",
            "GptOssForCausalLM",
            dict(
                intermediate_size=64,
                head_dim=32,
                num_local_experts=8,
                sliding_window=16,
                rope_parameters=dict(rope_type="default", rope_theta=10000.0),
            ),
            renormalises=True,
            scores="logits",
        ),
        TinyModel(
            "granitemoe",
            "GraniteMoeConfig",
            "GraniteMoeForCausalLM",
            dict(
                intermediate_size=48,
                num_local_experts=8,
                attention_multiplier=0.25,
                embedding_multiplier=1.5,
                residual_multiplier=0.8,
                logits_scaling=2.0,
            ),
            renormalises=True,
        ),
        TinyModel(
            "llama4",
            "Llama4TextConfig",
            "Llama4ForCausalLM",
            # released with one expert a token; the weights act on the experts' input
            dict(
                intermediate_size=48,
                intermediate_size_mlp=96,
                head_dim=32,
                num_local_experts=16,
                rope_parameters=dict(rope_type="default", rope_theta=10000.0),
            ),
            renormalises=False,
            scores="logits",
        ),
    )
}


def upstream_dir() -> Path:
    """Folder with upstream's convert_hf_to_gguf.py, conversion/ and gguf-py/.

    ALLOCMOE_UPSTREAM_DIR overrides the copy that the installed package carries. Raises
    FileNotFoundError if the converter is not there.
    """
    override = os.environ.get("ALLOCMOE_UPSTREAM_DIR")
    if override:
        path = Path(override)
    else:
        import allocmoe_edge

        path = Path(allocmoe_edge.__file__).parent / "upstream"
    if not (path / "convert_hf_to_gguf.py").is_file():
        raise FileNotFoundError(f"no convert_hf_to_gguf.py in {path}; set ALLOCMOE_UPSTREAM_DIR")
    return path


def build(root: Path, models: Iterable[TinyModel] = tuple(TINY_MODELS.values())) -> dict[str, BuiltModel]:
    """Write and convert tiny models under `root`; returns them by name.

    One converter process for all of them: importing torch and transformers costs more than
    every conversion together. Raises RuntimeError with the converter's output if it fails.
    """
    built = {}
    for spec in models:
        hf_path = root / spec.name
        _write_hf_folder(spec, hf_path)
        built[spec.name] = BuiltModel(spec, hf_path, root / f"{spec.name}.gguf")

    command = [sys.executable, __file__]
    for model in built.values():
        command += [str(model.hf_path), str(model.gguf_path)]
    env = dict(os.environ, PYTHONPATH=str(upstream_dir()), HF_HUB_OFFLINE="1", OMP_NUM_THREADS="2")
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"convert_hf_to_gguf failed ({done.returncode}):\n{done.stderr[-4000:]}")
    return built


def _write_hf_folder(spec: TinyModel, path: Path) -> None:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    config = getattr(transformers, spec.config_class)(**{**COMMON, **spec.config})
    model = getattr(transformers, spec.model_class)(config)
    _randomise(model)
    model.save_pretrained(path)
    _write_tokenizer(path)


def _randomise(model: Any) -> None:
    """Draw every weight so that activations stay near unit size and every expert matters.

    Seeded by the tensor's name with NumPy, whose streams are the same on every platform, so that
    the routing margins the tests rely on do not depend on the torch build.
    """
    import torch

    # Registered buffers too: DeepSeek-V3's selection bias is one. Non-persistent ones (rope
    # frequencies) are not in the state dict and stay.
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            rng = np.random.default_rng(zlib.crc32(name.encode()))
            noise = torch.from_numpy(rng.standard_normal(tuple(tensor.shape), dtype=np.float32))
            tensor.copy_(_scaled(name, noise))


def _scaled(name: str, noise: Any) -> Any:
    """Scale unit noise for the tensor called `name`; fan-in scaling where it is a matrix."""
    if name.endswith("e_score_correction_bias"):
        return 0.2 * noise
    if noise.ndim == 1:  # norm gains, biases, attention sinks
        return 1 + 0.1 * noise if "norm" in name else 0.2 * noise
    if name.endswith("embed_tokens.weight"):
        return noise
    if name.endswith("_proj_bias"):  # GPT-OSS expert biases: [n_expert, n_ff]
        return 0.2 * noise
    fan_in = noise.shape[-1]
    if name.endswith((".gate.weight", ".router.weight")):
        return ROUTER_LOGIT_STD * fan_in**-0.5 * noise
    return 1.5 * fan_in**-0.5 * noise


def _write_tokenizer(path: Path) -> None:
    """A byte-level BPE of a few merges; llama.cpp refuses a file with none."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog " * 2], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>").save_pretrained(path)


def _convert(pairs: list[str]) -> None:
    """Convert (folder, file) pairs in this process; upstream is on PYTHONPATH."""
    from conversion.base import TextModel
    import convert_hf_to_gguf  # puts upstream's gguf-py on sys.path

    # The converter knows pre-tokenizers by a hash of released ones; ours is plain GPT-2.
    TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    for hf_path, gguf_path in zip(pairs[::2], pairs[1::2], strict=True):
        sys.argv = ["convert_hf_to_gguf.py", hf_path, "--outfile", gguf_path, "--outtype", "f32"]
        convert_hf_to_gguf.main()


if __name__ == "__main__":
    _convert(sys.argv[1:])

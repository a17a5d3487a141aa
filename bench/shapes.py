#!/usr/bin/env python3
"""Random-weight models at the true shapes of models people run, to measure speed on: no model hub, minutes, any type.

    python bench/shapes.py DeepSeek-V2-Lite -o dsv2l.gguf [--type Q4_K_M] [--layers N]
    python bench/shapes.py config.json -o model.gguf        # any Hugging Face config.json of these architectures

Stock llama.cpp loads the files. What they say is nonsense; what they cost is the real model's cost:
- tensors, their shapes, and their types per layer are those that llama-quantize gives the real model (its mixture of
  types, its fallbacks for rows that are no multiple of 256), without importance matrix;
- weights are normal, scaled so that activations stay of order 1 through all layers, and quantised by ggml;
- tokens differ, with a share of every embedding in common: so routers prefer some experts, as trained ones do. The
  share is set to the expert usage measured on a trained model; `bench/expert_usage.py FILE` shows what a file reaches;
- the tokenizer is a byte-level one padded to the vocabulary's size. RoPE scaling (YaRN) is left out: it costs nothing.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
import json
from pathlib import Path
import sys

import random_gguf

# As in each model's own config.json, what determines the cost of a token.
MODELS = {
    "DeepSeek-V2-Lite": dict(
        model_type="deepseek_v2", hidden_size=2048, num_hidden_layers=27, num_attention_heads=16, vocab_size=102400,
        intermediate_size=10944, moe_intermediate_size=1408, n_routed_experts=64, num_experts_per_tok=6,
        n_shared_experts=2, first_k_dense_replace=1, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
        v_head_dim=128),
    "Qwen1.5-MoE-A2.7B": dict(
        model_type="qwen2_moe", hidden_size=2048, num_hidden_layers=24, num_attention_heads=16, vocab_size=151936,
        moe_intermediate_size=1408, num_experts=60, num_experts_per_tok=4, shared_expert_intermediate_size=5632),
    "Qwen3-30B-A3B": dict(
        model_type="qwen3_moe", hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, vocab_size=151936,
        num_key_value_heads=4, head_dim=128, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8),
    "OLMoE-1B-7B": dict(
        model_type="olmoe", hidden_size=2048, num_hidden_layers=16, num_attention_heads=16, vocab_size=50304,
        intermediate_size=1024, num_experts=64, num_experts_per_tok=8),
    "gpt-oss-20b": dict(
        model_type="gpt_oss", hidden_size=2880, num_hidden_layers=24, num_attention_heads=64, vocab_size=201088,
        num_key_value_heads=8, head_dim=64, intermediate_size=2880, num_local_experts=32, num_experts_per_tok=4,
        sliding_window=128),
    "Mixtral-8x7B": dict(
        model_type="mixtral", hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000,
        num_key_value_heads=8, intermediate_size=14336, num_local_experts=8, num_experts_per_tok=2),
    "Granite-3.1-3B-A800M": dict(
        model_type="granitemoe", hidden_size=1536, num_hidden_layers=32, num_attention_heads=24, vocab_size=49155,
        num_key_value_heads=8, intermediate_size=512, num_local_experts=40, num_experts_per_tok=8,
        tie_word_embeddings=True, embedding_multiplier=12.0, attention_multiplier=0.015625, residual_multiplier=0.22,
        logits_scaling=6.0),
}  # fmt: skip

ARCHITECTURES = {
    "deepseek_v2": "deepseek2", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "olmoe": "olmoe",
    "gpt_oss": "gpt-oss", "mixtral": "llama", "granitemoe": "granitemoe",
}  # fmt: skip


class ShapeError(ValueError):
    """The description lacks something, or llama.cpp could not run what it describes."""


@dataclass(frozen=True)
class Tensor:
    """name and shape as in GGUF files (numpy order: the last axis is a row's length), std of its weights.

    std 0: a norm, all ones. common: share of the variance that all rows have in common.
    """

    name: str
    shape: tuple
    std: float
    common: float = 0.0


class Shape:
    """A model's dimensions, read from a config.json-like dict. Raises ShapeError."""

    def __init__(self, config: dict, n_layer: int | None = None):
        self.config = config
        self.arch = ARCHITECTURES.get(config.get("model_type"))
        if self.arch is None:
            raise ShapeError(f"model_type: found {config.get('model_type')!r}, want one of: {', '.join(ARCHITECTURES)}")
        self.n_layer = n_layer or self.need("num_hidden_layers")
        self.n_embd, self.n_vocab, self.n_head = map(self.need, ("hidden_size", "vocab_size", "num_attention_heads"))
        self.n_head_kv = config.get("num_key_value_heads", self.n_head)
        self.head_dim = config.get("head_dim") or self.n_embd // self.n_head
        self.n_expert = self.need("n_routed_experts", "num_experts", "num_local_experts")
        self.n_used = self.need("num_experts_per_tok")
        self.n_ff_exp = self.need("moe_intermediate_size", "intermediate_size")
        self.n_ff = config.get("intermediate_size", self.n_ff_exp)
        self.n_dense = config.get("first_k_dense_replace", 0)
        self.n_ff_shared = config.get("shared_expert_intermediate_size", 0)
        self.n_ff_shared = self.n_ff_shared or self.n_ff_exp * config.get("n_shared_experts", 0)
        self.tied = config.get("tie_word_embeddings", False)
        self.embedding_scale = config.get("embedding_multiplier", 1.0)
        if not 1 <= self.n_used <= self.n_expert:
            raise ShapeError(f"num_experts_per_tok: found {self.n_used}, want 1 to {self.n_expert}")
        if not self.n_dense < self.n_layer:
            raise ShapeError(f"{self.n_layer} layers, of which the first {self.n_dense} have no experts: want more")
        if self.arch == "deepseek2" and self.n_layer not in (26, 27) and not config.get("q_lora_rank"):
            raise ShapeError(f"{self.n_layer} layers: llama.cpp wants 26 or 27 of a deepseek2 without q_lora_rank")
        if self.n_embd % 32 or self.n_ff_exp % 32:
            raise ShapeError("hidden and expert sizes must be multiples of 32, the smallest quantisation block")

    def need(self, *names: str) -> int:
        for name in names:
            if isinstance(self.config.get(name), int) and self.config[name] > 0:
                return self.config[name]
        raise ShapeError(f"{' or '.join(names)}: missing, or not a positive integer")

    def tensors(self) -> list[Tensor]:
        # each of the 2L additions to the residual stream gets 1/2L of the embedding's variance at most: deep layers
        # still see which token they are at
        branch = (2 * self.n_layer) ** -0.5

        def matrix(name, *shape, gain=1.0, common=0.0):
            return Tensor(f"{name}.weight", shape, gain * shape[-1] ** -0.5, common)

        def norm(name, n):
            return Tensor(f"{name}.weight", (n,), 0.0)

        out = [Tensor("token_embd.weight", (self.n_vocab, self.n_embd), 1 / self.embedding_scale, random_gguf.COMMON)]
        out.append(norm("output_norm", self.n_embd))
        if not self.tied:
            out.append(matrix("output", self.n_vocab, self.n_embd))
        for il in range(self.n_layer):
            blk = f"blk.{il}."
            out.append(norm(blk + "attn_norm", self.n_embd))
            out += self._attention(blk, matrix, norm, branch)
            out.append(norm(blk + ("post_attention_norm" if self.arch == "gpt-oss" else "ffn_norm"), self.n_embd))
            widths = {"_exps": (self.n_ff_exp, (self.n_expert,))} if il >= self.n_dense else {"": (self.n_ff, ())}
            if il >= self.n_dense:
                out.append(matrix(blk + "ffn_gate_inp", self.n_expert, self.n_embd, gain=random_gguf.SPREAD))
                if self.n_ff_shared:
                    widths["_shexp"] = (self.n_ff_shared, ())
                if self.arch == "qwen2moe":
                    out.append(matrix(blk + "ffn_gate_inp_shexp", self.n_embd))
            for suffix, (n_ff, experts) in widths.items():
                for name in ("gate", "up"):
                    out.append(matrix(f"{blk}ffn_{name}{suffix}", *experts, n_ff, self.n_embd))
                out.append(matrix(f"{blk}ffn_down{suffix}", *experts, self.n_embd, n_ff, gain=branch))
            if self.arch == "gpt-oss":
                for name, shape in (("gate_inp", ()), ("gate_exps", (self.n_ff_exp,)), ("up_exps", (self.n_ff_exp,)),
                                    ("down_exps", (self.n_embd,))):  # fmt: skip
                    out.append(Tensor(f"{blk}ffn_{name}.bias", (self.n_expert, *shape), 0.01))
        return out

    def _attention(self, blk, matrix, norm, branch) -> list[Tensor]:
        n_embd, q, kv = self.n_embd, self.n_head * self.head_dim, self.n_head_kv * self.head_dim
        if self.arch == "deepseek2":
            rank, rope, nope, v = map(self.need, ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"))
            q, q_rank = self.n_head * (nope + rope), self.config.get("q_lora_rank")
            queries = [matrix(blk + "attn_q", q, n_embd)]
            if q_rank:
                queries = [matrix(blk + "attn_q_a", q_rank, n_embd), norm(blk + "attn_q_a_norm", q_rank),
                           matrix(blk + "attn_q_b", q, q_rank)]  # fmt: skip
            return queries + [
                matrix(blk + "attn_kv_a_mqa", rank + rope, n_embd),
                norm(blk + "attn_kv_a_norm", rank),
                matrix(blk + "attn_k_b", self.n_head, rank, nope),
                matrix(blk + "attn_v_b", self.n_head, v, rank),
                matrix(blk + "attn_output", n_embd, self.n_head * v, gain=branch),
            ]
        out = [matrix(blk + f"attn_{name}", rows, n_embd) for name, rows in (("q", q), ("k", kv), ("v", kv))]
        out.append(matrix(blk + "attn_output", n_embd, q, gain=branch))
        if self.arch in ("qwen2moe", "gpt-oss"):
            out += [Tensor(f"{blk}attn_{name}.bias", (rows,), 0.01) for name, rows in (("q", q), ("k", kv), ("v", kv))]
        if self.arch == "gpt-oss":
            out.append(Tensor(blk + "attn_output.bias", (n_embd,), 0.01))
            out.append(Tensor(blk + "attn_sinks.weight", (self.n_head,), 1.0))
        if self.arch in ("olmoe", "qwen3moe"):  # over all heads at once, or over each
            sizes = (q, kv) if self.arch == "olmoe" else (self.head_dim, self.head_dim)
            out += [norm(f"{blk}attn_{name}_norm", n) for name, n in zip("qk", sizes)]
        return out

    def write_keys(self, writer) -> None:
        """Everything about the model but its tokenizer, into a gguf.GGUFWriter."""
        config = self.config
        writer.add_block_count(self.n_layer)
        writer.add_context_length(config.get("max_position_embeddings", 32768))
        writer.add_embedding_length(self.n_embd)
        writer.add_feed_forward_length(self.n_ff)
        writer.add_head_count(self.n_head)
        writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
        writer.add_rope_freq_base(config.get("rope_theta", 10000.0))
        writer.add_vocab_size(self.n_vocab)
        writer.add_expert_count(self.n_expert)
        writer.add_expert_used_count(self.n_used)
        if self.arch in ("qwen2moe", "qwen3moe", "gpt-oss", "deepseek2"):
            writer.add_expert_feed_forward_length(self.n_ff_exp)
        if self.arch == "qwen2moe":
            writer.add_expert_shared_feed_forward_length(self.n_ff_shared)
        if self.arch == "gpt-oss":
            writer.add_sliding_window(self.need("sliding_window"))
        if self.arch == "granitemoe":
            for add, name in ((writer.add_attention_scale, "attention_multiplier"),
                              (writer.add_logit_scale, "logits_scaling"),
                              (writer.add_embedding_scale, "embedding_multiplier"),
                              (writer.add_residual_scale, "residual_multiplier")):  # fmt: skip
                add(float(config.get(name, 1.0)))
        if self.arch != "deepseek2":
            writer.add_head_count_kv(self.n_head_kv)
            writer.add_key_length(self.head_dim)
            writer.add_value_length(self.head_dim)
            writer.add_rope_dimension_count(self.head_dim)
            return
        rank, rope, nope, v = map(self.need, ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"))
        if config.get("q_lora_rank"):
            writer.add_q_lora_rank(config["q_lora_rank"])
        writer.add_head_count_kv(1)  # multi-head latent attention is multi-query attention on the latent vector
        writer.add_kv_lora_rank(rank)
        writer.add_key_length(rank + rope)
        writer.add_value_length(rank)
        writer.add_key_length_mla(nope + rope)
        writer.add_value_length_mla(v)
        writer.add_rope_dimension_count(rope)
        writer.add_leading_dense_block_count(self.n_dense)
        writer.add_expert_shared_count(config.get("n_shared_experts", 0))
        writer.add_expert_weights_scale(float(config.get("routed_scaling_factor", 1.0)))
        writer.add_expert_weights_norm(bool(config.get("norm_topk_prob", False)))


def load(description: str, n_layer: int | None = None) -> tuple[str, Shape]:
    """(name, shape) of a model named in MODELS, or described by a config.json. Raises ShapeError."""
    if description in MODELS:
        return description, Shape(MODELS[description], n_layer)
    path = Path(description)
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise ShapeError(f"{description}: no file ({error.strerror}), and not one of: {', '.join(MODELS)}") from None
    except ValueError as error:
        raise ShapeError(f"{path}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ShapeError(f"{path}: want a JSON object like a Hugging Face config.json")
    return path.resolve().parent.name, Shape(config, n_layer)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help=f"a config.json, or one of: {', '.join(MODELS)}")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the GGUF file to write")
    parser.add_argument("--type", choices=random_gguf.FILE_TYPES, default="Q4_K_M", help="default: Q4_K_M")
    parser.add_argument("--layers", type=int, metavar="N", help="fewer layers than the model has, for small memory")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    args = parser.parse_args()
    try:
        if args.layers is not None and args.layers < 1:
            raise ShapeError(f"--layers {args.layers}: want at least 1")
        name, shape = load(args.model, args.layers)
        print(random_gguf.write(args.output, name, shape, args.type, args.seed))
    except (ShapeError, OSError) as error:
        print(f"shapes.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Tiny random models of architectures whose routing is out of the ordinary and which transformers cannot supply.

GroveMoE is not in transformers; DeepSeek-V4 is, but upstream's converter reads only the released checkpoints' own tensor
names and FP4 experts. So these are written as float32 GGUF files directly, after llama.cpp's loaders
(src/models/grovemoe.cpp, deepseek4.cpp). There is no second implementation to compare with: tests compare the runtime
with itself, at expert counts that the file or the model's own rules give.
"""

from __future__ import annotations

from pathlib import Path
from typing import Optional, Sequence
import zlib

import gguf
import numpy as np

VOCAB_SIZE, N_EMBD, N_LAYER, N_HEAD, N_FF = 64, 64, 4, 4, 32
N_EXPERT, N_EXPERT_USED = 8, 4
SQRT_SOFTPLUS = 4  # gating function, llama-hparams.h
_HEAD_DIM = 32
# what stands for a line feed, a space and the other printed letters in a byte-level vocabulary
_LETTERS = ["\u010a", "\u0120", *map(chr, range(33, 127))]


def random_matrix(name: str, *shape: int, scale: float) -> np.ndarray:
    """float32 of a shape, drawn by the name, scaled by the last dimension."""
    noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)
    return np.float32(scale * shape[-1] ** -0.5) * noise


class _Writer(gguf.GGUFWriter):
    """A GGUF file with seeded random weights and a vocabulary that stands for nothing."""

    def __init__(
        self, path: Path, arch: str, head_dim: int, tokens: Optional[list] = None, n_ctx: int = 256,
        types: Optional[list] = None, merges: Sequence[str] = ("t 1",), pre: str = "gpt-2",
    ):  # fmt: skip
        super().__init__(str(path), arch)
        tokens = tokens or [f"t{i}" for i in range(VOCAB_SIZE)]
        self.add_block_count(N_LAYER)
        self.add_context_length(n_ctx)
        self.add_embedding_length(N_EMBD)
        self.add_head_count(N_HEAD)
        self.add_key_length(head_dim)
        self.add_value_length(head_dim)
        self.add_layer_norm_rms_eps(1e-5)
        self.add_expert_count(N_EXPERT)
        self.add_expert_used_count(N_EXPERT_USED)
        self.add_expert_feed_forward_length(N_FF)
        self.add_vocab_size(len(tokens))
        self.add_tokenizer_model("gpt2")
        self.add_tokenizer_pre(pre)
        self.add_token_list(tokens)
        self.add_token_types(types or [gguf.TokenType.NORMAL] * len(tokens))
        self.add_token_merges(list(merges))
        self.matrix("token_embd.weight", len(tokens), N_EMBD, scale=8)  # unit size
        self.matrix("output.weight", len(tokens), N_EMBD)
        self.ones("output_norm.weight", N_EMBD)

    def matrix(self, name: str, *shape: int, scale: float = 1.5) -> None:
        """A tensor with numpy's shape (llama.cpp's reversed), drawn by its name, scaled by its fan-in."""
        self.add_tensor(name, random_matrix(name, *shape, scale=scale))

    def ones(self, name: str, *shape: int) -> None:
        self.add_tensor(name, np.ones(shape, np.float32))

    def experts(self, il: int, suffix: str, n_expert: int) -> None:
        self.matrix(f"blk.{il}.ffn_gate_{suffix}.weight", n_expert, N_FF, N_EMBD)
        self.matrix(f"blk.{il}.ffn_up_{suffix}.weight", n_expert, N_FF, N_EMBD)
        self.matrix(f"blk.{il}.ffn_down_{suffix}.weight", n_expert, N_EMBD, N_FF)

    def finish(self) -> None:
        self.write_header_to_file()
        self.write_kv_data_to_file()
        self.write_tensors_to_file()
        self.close()


def write_qwen3moe(path: Path, more: Sequence[str] = (), n_ctx: int = 256) -> Path:
    """Nothing odd, with a vocabulary of single letters in which any English text can be written, and of `more`."""
    w = _Writer(path, "qwen3moe", _HEAD_DIM, tokens=[*_LETTERS, "<|endoftext|>", *more], n_ctx=n_ctx)
    w.add_eos_token_id(len(_LETTERS))
    w.add_head_count_kv(N_HEAD)
    _qwen3_layers(w)
    w.finish()
    return path


class _Talker(_Writer):
    def matrix(self, name: str, *shape: int, scale: float = 1.5) -> None:
        values = random_matrix(name, *shape, scale=scale)
        if name == "output.weight":
            values[self.silent] = 0  # the others are up to three times their deviation above that
        self.add_tensor(name, values)


def write_talker(path: Path, vocabulary_of: Optional[Path] = None) -> Path:
    """One that talks without end, in a context of some size: for a server's tests.

    Args:
        vocabulary_of: a GGUF file with a GPT-2 vocabulary, whose tokens and template are taken; None for single bytes.
    """
    if vocabulary_of is None:
        tokens, _Talker.silent, extra = [*byte_tokens(), "<|endoftext|>"], [256], {}
        eos = bos = 256
    else:
        fields = gguf.GGUFReader(vocabulary_of).fields
        read = {
            name.removeprefix("tokenizer."): field.contents()
            for name, field in fields.items()
            if name.startswith("tokenizer.")
        }
        tokens, eos, bos = read["ggml.tokens"], read["ggml.eos_token_id"], read["ggml.bos_token_id"]
        _Talker.silent = [i for i, kind in enumerate(read["ggml.token_type"]) if kind != gguf.TokenType.NORMAL]
        extra = dict(types=read["ggml.token_type"], merges=read["ggml.merges"], pre=read["ggml.pre"])
    w = _Talker(path, "qwen3moe", _HEAD_DIM, tokens=tokens, n_ctx=4096, **extra)
    if vocabulary_of is not None:
        w.add_chat_template(read["chat_template"])
    w.add_eos_token_id(eos)
    w.add_bos_token_id(bos)
    w.add_add_bos_token(False)
    w.add_head_count_kv(N_HEAD)
    _qwen3_layers(w)
    w.finish()
    return path


def byte_tokens() -> list:
    """GPT-2's names for the 256 bytes: printable ones as they are, the rest from 256 up."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = iter(range(256, 512))
    return [chr(byte if byte in printable else next(rest)) for byte in range(256)]


def write_grovemoe(path: Path) -> Path:
    """Each chosen expert brings in, beside itself, the adjugate expert of its group of two."""
    w = _Writer(path, "grovemoe", _HEAD_DIM)
    w.add_head_count_kv(N_HEAD)
    w.add_expert_chunk_feed_forward_length(N_FF)
    w.add_experts_per_group(2)
    w.add_expert_group_scale(0.5)
    _qwen3_layers(w)
    for il in range(N_LAYER):
        w.experts(il, "chexps", N_EXPERT // 2)
    w.finish()
    return path


def _qwen3_layers(w: _Writer) -> None:
    for il in range(N_LAYER):
        for name in ("attn_norm", "ffn_norm"):
            w.ones(f"blk.{il}.{name}.weight", N_EMBD)
        for name in ("attn_q_norm", "attn_k_norm"):
            w.ones(f"blk.{il}.{name}.weight", _HEAD_DIM)
        for name in ("attn_q", "attn_k", "attn_v"):
            w.matrix(f"blk.{il}.{name}.weight", N_HEAD * _HEAD_DIM, N_EMBD)
        w.matrix(f"blk.{il}.attn_output.weight", N_EMBD, N_HEAD * _HEAD_DIM)
        w.matrix(f"blk.{il}.ffn_gate_inp.weight", N_EXPERT, N_EMBD)
        w.experts(il, "exps", N_EXPERT)


def write_deepseek4(path: Path, n_hash_layers: int, table_seed: int = 0) -> Path:
    """The first n_hash_layers layers take their experts from a table by token id, drawn with table_seed."""
    head_dim, q_rank, o_groups, o_rank, hc = 64, 32, 2, 32, 4
    # window attention alone, or with one of the two kinds of compressed keys; llama.cpp divides by zero without a 4
    compress_ratios, indexer_heads, indexer_dim = [0, 128, 4, 0], 4, 64
    w = _Writer(path, "deepseek4", head_dim)
    w.add_head_count_kv(1)
    w.add_rope_dimension_count(32)
    w.add_q_lora_rank(q_rank)
    w.add_sliding_window(128)
    w.add_expert_shared_count(1)
    w.add_expert_weights_scale(1.5)
    w.add_expert_weights_norm(True)
    w.add_uint32("deepseek4.expert_gating_func", SQRT_SOFTPLUS)
    w.add_array("deepseek4.swiglu_clamp_exp", [10.0] * N_LAYER)
    w.add_uint32("deepseek4.attention.indexer.head_count", indexer_heads)
    w.add_uint32("deepseek4.attention.indexer.key_length", indexer_dim)
    w.add_uint32("deepseek4.attention.indexer.top_k", 8)
    w.add_uint32("deepseek4.attention.output_group_count", o_groups)
    w.add_uint32("deepseek4.attention.output_lora_rank", o_rank)
    w.add_array("deepseek4.attention.compress_ratios", compress_ratios)
    w.add_float32("deepseek4.attention.compress_rope_freq_base", 10000.0)
    w.add_uint32("deepseek4.hyper_connection.count", hc)
    w.add_uint32("deepseek4.hyper_connection.sinkhorn_iterations", 4)
    w.add_float32("deepseek4.hyper_connection.epsilon", 1e-6)
    w.add_uint32("deepseek4.hash_layer_count", n_hash_layers)
    w.add_uint32("deepseek4.embedding_length_out", hc * N_EMBD)

    def hyper_connection(name: str, n_out: int, n_scale: int) -> None:
        w.matrix(f"{name}_fn.weight", n_out, hc * N_EMBD)
        w.matrix(f"{name}_base.weight", n_out)
        w.ones(f"{name}_scale.weight", n_scale)

    def compressor(name: str, ratio: int, dim: int) -> None:
        n_out = dim * (2 if ratio == 4 else 1)
        w.matrix(f"{name}_kv.weight", n_out, N_EMBD)
        w.matrix(f"{name}_gate.weight", n_out, N_EMBD)
        w.matrix(f"{name}_ape.weight", ratio, n_out)
        w.ones(f"{name}_norm.weight", dim)

    hyper_connection("output_hc", hc, 1)
    table = np.random.default_rng(table_seed)
    for il in range(N_LAYER):
        blk = f"blk.{il}"
        for name, n in (
            ("attn_norm", N_EMBD),
            ("ffn_norm", N_EMBD),
            ("attn_q_a_norm", q_rank),
            ("attn_kv_a_norm", head_dim),
        ):
            w.ones(f"{blk}.{name}.weight", n)
        w.matrix(f"{blk}.attn_sinks.weight", N_HEAD)
        w.matrix(f"{blk}.attn_q_a.weight", q_rank, N_EMBD)
        w.matrix(f"{blk}.attn_q_b.weight", N_HEAD * head_dim, q_rank)
        w.matrix(f"{blk}.attn_kv.weight", head_dim, N_EMBD)
        w.matrix(f"{blk}.attn_output_a.weight", o_groups * o_rank, N_HEAD * head_dim // o_groups)
        w.matrix(f"{blk}.attn_output_b.weight", N_EMBD, o_groups * o_rank)
        if compress_ratios[il]:
            compressor(f"{blk}.attn_compressor", compress_ratios[il], head_dim)
        if compress_ratios[il] == 4:
            compressor(f"{blk}.indexer_compressor", 4, indexer_dim)
            w.matrix(f"{blk}.indexer.proj.weight", indexer_heads, N_EMBD)
            w.matrix(f"{blk}.indexer.attn_q_b.weight", indexer_heads * indexer_dim, q_rank)
        hyper_connection(f"{blk}.hc_attn", (2 + hc) * hc, 3)
        hyper_connection(f"{blk}.hc_ffn", (2 + hc) * hc, 3)
        w.matrix(f"{blk}.ffn_gate_inp.weight", N_EXPERT, N_EMBD)
        if il < n_hash_layers:
            ids = [table.permutation(N_EXPERT)[:N_EXPERT_USED] for _ in range(VOCAB_SIZE)]
            w.add_tensor(f"{blk}.ffn_gate_tid2eid.weight", np.array(ids, np.int32))
        else:
            w.matrix(f"{blk}.exp_probs_b.bias", N_EXPERT)
        w.experts(il, "exps", N_EXPERT)
        for name, shape in (("gate", (N_FF, N_EMBD)), ("up", (N_FF, N_EMBD)), ("down", (N_EMBD, N_FF))):
            w.matrix(f"{blk}.ffn_{name}_shexp.weight", *shape)
    w.finish()
    return path

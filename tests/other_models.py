"""Tiny random models that have nothing for a budget to do, or not what most have: dense, embedding, recurrent, hybrid.

Written as float32 GGUF files after llama.cpp's loaders (src/models/llama.cpp, bert.cpp, gpt2.cpp, mamba.cpp, jamba.cpp). Text is bytes: one
token each, and an end of text; the embedding model has words.
"""

from __future__ import annotations

from pathlib import Path
from typing import Optional

import gguf
import numpy as np
from odd_models import byte_tokens, random_matrix

N_EMBD, N_LAYER, N_HEAD, N_FF, N_CTX = 64, 2, 2, 96, 256
D_INNER, D_STATE, D_CONV, DT_RANK = 2 * N_EMBD, 16, 4, 4
N_EXPERT, N_EXPERT_USED = 4, 2
BERT_WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "▁hello", "▁world", "▁a", "▁different", "▁prompt")


class _Writer(gguf.GGUFWriter):
    def __init__(self, path: Path, arch: str):
        super().__init__(str(path), arch)
        self.add_block_count(N_LAYER)
        self.add_context_length(N_CTX)
        self.add_embedding_length(N_EMBD)
        self.add_feed_forward_length(N_FF)
        self.add_head_count(N_HEAD)

    def byte_vocabulary(self) -> None:
        self.add_tokenizer_model("gpt2")
        self.add_tokenizer_pre("gpt-2")
        self.add_token_list([*byte_tokens(), "<|endoftext|>"])
        self.add_token_types([gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL])
        self.add_token_merges(["ÿ ÿ"])
        self.add_bos_token_id(256)
        self.add_eos_token_id(256)
        self.add_add_bos_token(False)
        self.matrix("token_embd.weight", 257, N_EMBD, scale=8)
        self.matrix("output.weight", 257, N_EMBD)
        self.ones("output_norm.weight", N_EMBD)
        self.add_layer_norm_rms_eps(1e-5)

    def matrix(self, name: str, *shape: int, scale: float = 1.5) -> None:
        self.add_tensor(name, random_matrix(name, *shape, scale=scale))

    def ones(self, name: str, *shape: int) -> None:
        self.add_tensor(name, np.ones(shape, np.float32))

    def zeros(self, name: str, *shape: int) -> None:
        self.add_tensor(name, np.zeros(shape, np.float32))

    def attention(self, il: int) -> None:
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            self.matrix(f"blk.{il}.{name}.weight", N_EMBD, N_EMBD)

    def ffn(self, il: int) -> None:
        self.ones(f"blk.{il}.ffn_norm.weight", N_EMBD)
        for name in ("gate", "up"):
            self.matrix(f"blk.{il}.ffn_{name}.weight", N_FF, N_EMBD)
        self.matrix(f"blk.{il}.ffn_down.weight", N_EMBD, N_FF)

    def ssm_sizes(self) -> None:
        self.add_ssm_conv_kernel(D_CONV)
        self.add_ssm_inner_size(D_INNER)
        self.add_ssm_state_size(D_STATE)
        self.add_ssm_time_step_rank(DT_RANK)

    def ssm(self, il: int) -> None:
        blk = f"blk.{il}"
        self.matrix(f"{blk}.ssm_in.weight", 2 * D_INNER, N_EMBD)
        self.matrix(f"{blk}.ssm_conv1d.weight", D_INNER, D_CONV)
        self.zeros(f"{blk}.ssm_conv1d.bias", D_INNER)
        self.matrix(f"{blk}.ssm_x.weight", DT_RANK + 2 * D_STATE, D_INNER)
        self.matrix(f"{blk}.ssm_dt.weight", D_INNER, DT_RANK)
        self.zeros(f"{blk}.ssm_dt.bias", D_INNER)
        self.add_tensor(f"{blk}.ssm_a", -np.tile(np.arange(1, D_STATE + 1, dtype=np.float32), (D_INNER, 1)))
        self.ones(f"{blk}.ssm_d", D_INNER)
        self.matrix(f"{blk}.ssm_out.weight", N_EMBD, D_INNER)

    def finish(self) -> None:
        self.write_header_to_file()
        self.write_kv_data_to_file()
        self.write_tensors_to_file()
        self.close()


def write_dense(path: Path, chat_template: Optional[str] = None) -> Path:
    """llama: attention and one FFN a layer."""
    w = _Writer(path, "llama")
    if chat_template is not None:
        w.add_chat_template(chat_template)
    w.byte_vocabulary()
    w.add_head_count_kv(N_HEAD)
    w.add_rope_dimension_count(N_EMBD // N_HEAD)
    for il in range(N_LAYER):
        w.ones(f"blk.{il}.attn_norm.weight", N_EMBD)
        w.attention(il)
        w.ffn(il)
    w.finish()
    return path


def write_bert(path: Path, ranks: bool = False) -> Path:
    """bert: embeddings of texts, by the mean of their tokens, or a score of each; no memory of tokens before."""
    w = _Writer(path, "bert")
    w.add_head_count_kv(N_HEAD)
    w.add_layer_norm_eps(1e-6)
    w.add_causal_attention(False)
    w.add_pooling_type(gguf.PoolingType.RANK if ranks else gguf.PoolingType.MEAN)
    w.add_token_type_count(2)
    if ranks:
        w.matrix("cls.output.weight", 1, N_EMBD)
        w.zeros("cls.output.bias", 1)
    w.add_tokenizer_model("bert")
    w.add_token_list(BERT_WORDS)
    w.add_token_types([gguf.TokenType.CONTROL] * 4 + [gguf.TokenType.NORMAL] * (len(BERT_WORDS) - 4))
    for name, token in (("bos", 2), ("eos", 3), ("unk", 1), ("sep", 3), ("pad", 0)):
        getattr(w, f"add_{name}_token_id")(token)
    w.matrix("token_embd.weight", len(BERT_WORDS), N_EMBD, scale=8)
    w.matrix("position_embd.weight", N_CTX, N_EMBD)
    w.matrix("token_types.weight", 2, N_EMBD)
    w.ones("token_embd_norm.weight", N_EMBD)
    w.zeros("token_embd_norm.bias", N_EMBD)
    for il in range(N_LAYER):
        w.attention(il)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_down"):
            w.zeros(f"blk.{il}.{name}.bias", N_EMBD)
        w.matrix(f"blk.{il}.ffn_up.weight", N_FF, N_EMBD)
        w.zeros(f"blk.{il}.ffn_up.bias", N_FF)
        w.matrix(f"blk.{il}.ffn_down.weight", N_EMBD, N_FF)
        for name in ("attn_output_norm", "layer_output_norm"):
            w.ones(f"blk.{il}.{name}.weight", N_EMBD)
            w.zeros(f"blk.{il}.{name}.bias", N_EMBD)
    w.finish()
    return path


def write_gpt2(path: Path) -> Path:
    """gpt2: positions are learned one by one, N_CTX of them."""
    w = _Writer(path, "gpt2")
    w.byte_vocabulary()
    w.add_layer_norm_eps(1e-5)
    w.matrix("position_embd.weight", N_CTX, N_EMBD)
    w.zeros("output_norm.bias", N_EMBD)
    for il in range(N_LAYER):
        for name, n_in, n_out in (
            ("attn_qkv", N_EMBD, 3 * N_EMBD), ("attn_output", N_EMBD, N_EMBD), ("ffn_up", N_EMBD, N_FF), ("ffn_down", N_FF, N_EMBD),
        ):  # fmt: skip
            w.matrix(f"blk.{il}.{name}.weight", n_out, n_in)
            w.zeros(f"blk.{il}.{name}.bias", n_out)
        for name in ("attn_norm", "ffn_norm"):
            w.ones(f"blk.{il}.{name}.weight", N_EMBD)
            w.zeros(f"blk.{il}.{name}.bias", N_EMBD)
    w.finish()
    return path


def write_mamba(path: Path) -> Path:
    """mamba: recurrent; its memory cannot forget the last tokens alone."""
    w = _Writer(path, "mamba")
    w.byte_vocabulary()
    w.ssm_sizes()
    for il in range(N_LAYER):
        w.ones(f"blk.{il}.attn_norm.weight", N_EMBD)
        w.ssm(il)
    w.finish()
    return path


def write_jamba(path: Path) -> Path:
    """jamba: a recurrent layer with an FFN, and one of attention with experts."""
    w = _Writer(path, "jamba")
    w.byte_vocabulary()
    w.ssm_sizes()
    w.add_head_count_kv([0, N_HEAD])
    w.add_expert_count(N_EXPERT)
    w.add_expert_used_count(N_EXPERT_USED)
    for il in range(N_LAYER):
        w.ones(f"blk.{il}.attn_norm.weight", N_EMBD)
    w.ssm(0)
    w.ones("blk.0.ssm_dt_norm.weight", DT_RANK)
    w.ones("blk.0.ssm_b_norm.weight", D_STATE)
    w.ones("blk.0.ssm_c_norm.weight", D_STATE)
    w.ffn(0)
    w.attention(1)
    w.ones("blk.1.ffn_norm.weight", N_EMBD)
    w.matrix("blk.1.ffn_gate_inp.weight", N_EXPERT, N_EMBD)
    for name in ("gate", "up"):
        w.matrix(f"blk.1.ffn_{name}_exps.weight", N_EXPERT, N_FF, N_EMBD)
    w.matrix("blk.1.ffn_down_exps.weight", N_EXPERT, N_EMBD, N_FF)
    w.finish()
    return path


def write_projector(path: Path, n_embd: int = N_EMBD) -> Path:
    """A projector (mmproj) as LLaVA's for models of a width: it makes four places of a picture, of 2x2 patches of 4x4 pixels."""
    w = gguf.GGUFWriter(str(path), "clip")
    w.add_type("mmproj")
    w.add_bool("clip.has_vision_encoder", True)
    w.add_string("clip.projector_type", "mlp")
    for name, value in dict(embedding_length=N_EMBD, feed_forward_length=N_FF, block_count=3, projection_dim=n_embd, image_size=8,
                            patch_size=4).items():  # fmt: skip
        w.add_uint32(f"clip.vision.{name}", value)
    w.add_uint32("clip.vision.attention.head_count", N_HEAD)
    w.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-5)
    w.add_array("clip.vision.image_mean", [0.5, 0.5, 0.5])
    w.add_array("clip.vision.image_std", [0.5, 0.5, 0.5])

    def matrix(name: str, *shape: int) -> None:
        w.add_tensor(name, random_matrix(name, *shape, scale=1.5))

    def norm(name: str) -> None:
        w.add_tensor(f"{name}.weight", np.ones(N_EMBD, np.float32))
        w.add_tensor(f"{name}.bias", np.zeros(N_EMBD, np.float32))

    w.add_tensor("v.patch_embd.weight", random_matrix("patch", N_EMBD, 3 * 4 * 4, scale=1.5).reshape(N_EMBD, 3, 4, 4))
    w.add_tensor("v.class_embd", random_matrix("class", 1, N_EMBD, scale=1.5).reshape(N_EMBD))
    matrix("v.position_embd.weight", 5, N_EMBD)
    norm("v.pre_ln")
    norm("v.post_ln")
    for il in range(3):
        for name in ("q", "k", "v", "out"):
            matrix(f"v.blk.{il}.attn_{name}.weight", N_EMBD, N_EMBD)
            w.add_tensor(f"v.blk.{il}.attn_{name}.bias", np.zeros(N_EMBD, np.float32))
        norm(f"v.blk.{il}.ln1")
        norm(f"v.blk.{il}.ln2")
        matrix(f"v.blk.{il}.ffn_up.weight", N_FF, N_EMBD)
        w.add_tensor(f"v.blk.{il}.ffn_up.bias", np.zeros(N_FF, np.float32))
        matrix(f"v.blk.{il}.ffn_down.weight", N_EMBD, N_FF)
        w.add_tensor(f"v.blk.{il}.ffn_down.bias", np.zeros(N_EMBD, np.float32))
    for i, n_out in ((0, N_EMBD), (2, n_embd)):
        matrix(f"mm.{i}.weight", n_out, N_EMBD)
        w.add_tensor(f"mm.{i}.bias", np.zeros(n_out, np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path

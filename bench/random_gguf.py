"""Writes a GGUF file of random weights, one tensor in memory at a time: the writing half of bench/shapes.py."""

from __future__ import annotations

import ctypes
import functools
import math
import os
from pathlib import Path
import shutil

import allocmoe_edge  # noqa: F401  first, so that llama_cpp loads our libraries
import gguf
import llama_cpp
from llama_cpp._ctypes_extensions import load_shared_library
import numpy as np
from tqdm import tqdm

# Share of the embeddings' variance that all tokens have in common, and standard deviation of router logits.
# Set by bench/expert_usage.py on a trained model, see docs/notes/2026-11-speed.md.
COMMON, SPREAD = 0.1, 1.5

Type = gguf.GGMLQuantizationType
FILE_TYPES = {
    "Q4_K_M": (gguf.LlamaFileType.MOSTLY_Q4_K_M, Type.Q4_K), "Q4_0": (gguf.LlamaFileType.MOSTLY_Q4_0, Type.Q4_0),
    "Q8_0": (gguf.LlamaFileType.MOSTLY_Q8_0, Type.Q8_0), "MXFP4": (gguf.LlamaFileType.MOSTLY_MXFP4_MOE, Type.Q8_0),
}  # fmt: skip
# of llama-quantize, for rows that are no multiple of 256
FALLBACK = {Type.Q4_K: Type.Q5_0, Type.Q5_K: Type.Q5_1, Type.Q6_K: Type.Q8_0}
POOL_ELEMENTS = 1 << 20


def tensor_type(name: str, shape: tuple, file_type: str, n_layer: int, n_expert: int, tied: bool) -> Type:
    """The type that llama-quantize gives a tensor: llama_tensor_get_type in llama.cpp's src/llama-quant.cpp."""
    kind = name.split(".")[-2]
    if len(shape) < 2 or kind == "ffn_gate_inp" or not name.endswith(".weight"):
        return Type.F32
    wanted = FILE_TYPES[file_type][1]
    il = int(name.split(".")[1]) if name.startswith("blk.") else 0
    more_bits = il < n_layer // 8 or il >= 7 * n_layer // 8 or (il - n_layer // 8) % 3 == 2
    if kind == "output" or (kind == "token_embd" and tied):
        wanted = Type.Q8_0 if wanted == Type.Q8_0 else Type.Q6_K
    elif file_type == "MXFP4" and len(shape) == 3:
        wanted = Type.MXFP4
    elif kind in ("attn_k", "attn_v") and n_expert == 8:
        wanted = Type.Q8_0
    elif file_type == "Q4_K_M" and (kind == "attn_v" or kind.startswith("ffn_down")) and more_bits:
        wanted = Type.Q6_K
    elif file_type == "Q4_K_M" and kind == "attn_output" and n_expert == 8:
        wanted = Type.Q5_K
    return FALLBACK[wanted] if wanted in FALLBACK and shape[-1] % 256 else wanted


@functools.cache
def _ggml():
    ggml = load_shared_library("ggml-base", llama_cpp.llama_cpp._base_path)
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, integer, integer, integer, pointer]
    return ggml


class Pool:
    """Normal weights of one type, row length and standard deviation, quantised once; tensors are shuffled from it.

    A row of a tensor takes each of its pieces of 256 weights (less where the row is no multiple) from a random row of
    the pool, so that rows hardly ever repeat. common: see `shapes.Tensor`.
    """

    def __init__(self, type_: Type, n_in: int, std: float, common: float, rng: np.random.Generator):
        block, block_bytes = gguf.GGML_QUANT_SIZES[type_]
        self.n_rows = max(64, POOL_ELEMENTS // n_in)
        mean = math.sqrt(common) * std * rng.standard_normal(n_in, np.float32)
        rows = math.sqrt(1 - common) * std * rng.standard_normal((self.n_rows, n_in), np.float32) + mean
        rows = np.ascontiguousarray(rows, np.float32)
        quantised = np.empty((self.n_rows, n_in // block * block_bytes), np.uint8)
        source, target = rows.ctypes.data, quantised.ctypes.data
        written = _ggml().ggml_quantize_chunk(type_, source, target, 0, self.n_rows, n_in, None)
        if written != quantised.nbytes:
            raise RuntimeError(f"ggml_quantize_chunk wrote {written} bytes of {type_.name}, want {quantised.nbytes}")
        self.n_pieces = n_in // max(math.gcd(n_in, 256), block)
        self.pieces = quantised.reshape(self.n_rows * self.n_pieces, -1)

    def draw(self, n_rows: int, rng: np.random.Generator) -> np.ndarray:
        """uint8, shape [n_rows, bytes of a row]."""
        picks = rng.integers(self.n_rows, size=(n_rows, self.n_pieces), dtype=np.uint32) * np.uint32(self.n_pieces)
        picks += np.arange(self.n_pieces, dtype=np.uint32)
        return self.pieces.take(picks.ravel(), axis=0).reshape(n_rows, -1)


def _write_tokenizer(writer: gguf.GGUFWriter, n_vocab: int) -> None:
    """Byte-level BPE of 256 bytes and one merge (llama.cpp wants a list), padded with unused tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's way to show bytes
    shifted = iter(range(256, 512))
    tokens = [chr(b if b in printable else next(shifted)) for b in range(256)] + ["Ġt", "<|endoftext|>"]
    types = [gguf.TokenType.NORMAL] * 257 + [gguf.TokenType.CONTROL]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens + [f"[PAD{i}]" for i in range(len(tokens), n_vocab)])
    writer.add_token_types(types + [gguf.TokenType.UNUSED] * (n_vocab - len(types)))
    writer.add_token_merges(["Ġ t"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(257)
    writer.add_add_bos_token(False)


def write(path: Path, name: str, shape, file_type: str, seed: int) -> str:
    """Writes the model that a `shapes.Shape` describes; returns what was written, in a line.

    The file appears under its name when it is complete. Raises OSError, also where the disk is too small.
    """
    if shape.n_vocab < 258:
        raise OSError(f"a vocabulary of {shape.n_vocab}: want at least 258, the bytes and two tokens more")
    rng = np.random.default_rng(seed)
    tensors = []
    for tensor in shape.tensors():
        type_ = tensor_type(tensor.name, tensor.shape, file_type, shape.n_layer, shape.n_expert, shape.tied)
        block, block_bytes = gguf.GGML_QUANT_SIZES[type_]
        tensors.append((tensor, type_, math.prod(tensor.shape) // block * block_bytes))
    n_bytes = sum(size for *_, size in tensors)
    free = shutil.disk_usage(path.resolve().parent).free
    if free < n_bytes + (64 << 20):
        raise OSError(f"{path}: needs {n_bytes / 1e9:.1f} GB, and the disk has {free / 1e9:.1f} GB free")

    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    pools: dict = {}
    try:
        writer = gguf.GGUFWriter(temporary, shape.arch)
        writer.add_name(f"{name}, random weights")
        writer.add_file_type(FILE_TYPES[file_type][0])
        shape.write_keys(writer)
        _write_tokenizer(writer, shape.n_vocab)
        for tensor, type_, size in tensors:
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, type_)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with tqdm(total=n_bytes, desc=path.name, unit="B", unit_scale=True, disable=None) as bar:
            for tensor, type_, size in tensors:
                if type_ == Type.F32:
                    data = np.ones(tensor.shape, np.float32)
                    if tensor.std:
                        data = rng.standard_normal(tensor.shape, np.float32) * np.float32(tensor.std)
                else:
                    key = type_, tensor.shape[-1], tensor.std, tensor.common
                    if key not in pools:
                        pools[key] = Pool(*key, rng)
                    data = pools[key].draw(math.prod(tensor.shape[:-1]), rng)
                writer.write_tensor_data(data)
                bar.update(size)
        writer.close()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

    total = sum(math.prod(tensor.shape) for tensor, *_ in tensors)
    idle = sum(math.prod(t.shape) * (1 - shape.n_used / shape.n_expert) for t, *_ in tensors if "_exps." in t.name)
    if not shape.tied:
        idle += (shape.n_vocab - 1) * shape.n_embd  # a token reads one row of its embeddings
    return (
        f"{path}: {name}, {shape.n_layer} layers, {file_type}: {path.stat().st_size / 1e9:.2f} GB, "
        f"{total / 1e9:.2f} B parameters, {(total - idle) / 1e9:.2f} B of them active per token"
    )

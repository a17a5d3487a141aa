"""Looks for weights that are NaN or infinite: only where a model has computed such, for it reads all of the file."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

from allocmoe_edge.gguf_file import GGUFFile, Tensor, model_paths
import gguf
import numpy as np

from .progress import progress_bar

# bytes that are turned into numbers at a time
_CHUNK = 8 << 20


def weights_not_finite(model: Path) -> Optional[str]:
    """The name of the first tensor with a weight that is no finite number, with the expert if it is one of experts; None
    where all weights are finite, as far as gguf knows their types."""
    paths = model_paths(model)
    with progress_bar("checking weights", sum(p.stat().st_size for p in paths), "B", unit_scale=True) as bar:
        for path in paths:
            with GGUFFile(path) as file:
                n_expert = file.get(f"{file.get('general.architecture')}.expert_count", 0)
                for tensor in file.tensors:
                    at = _first_not_finite(path, file.data_offset + tensor.offset, tensor)
                    if at is not None:
                        expert = f", expert {at * n_expert // tensor.n_elements}" if "_exps." in tensor.name else ""
                        return tensor.name + expert
                    bar.update(tensor.n_bytes)
    return None


def _first_not_finite(path: Path, offset: int, tensor: Tensor) -> Optional[int]:
    """The index of an element, None if all are finite or of a type that is not known."""
    try:
        kind = gguf.GGMLQuantizationType[tensor.type_name]
        block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    except KeyError:
        return None
    step = _CHUNK // n_bytes * n_bytes
    with open(path, "rb") as file, np.errstate(all="ignore"):
        for start in range(0, tensor.n_bytes, step):
            file.seek(offset + start)
            data = np.frombuffer(file.read(min(step, tensor.n_bytes - start)), np.uint8)
            try:
                values = gguf.dequantize(data.reshape(-1, n_bytes), kind)
            except NotImplementedError:
                return None
            bad = np.flatnonzero(~np.isfinite(values.reshape(-1)))
            if bad.size:
                return start // n_bytes * block + int(bad[0])
    return None

"""How many bytes of weights a generated token reads, from the GGUF's table of tensors."""

from __future__ import annotations

import os
import re
from typing import Sequence, Union

import numpy as np

from ..gguf_file import EXPERTS, GGUFFile, expert_used_count_full, model_paths

_EXPERTS = re.compile(EXPERTS)
_BLOCK = re.compile(r"blk\.(\d+)\.")
# a token takes one row of these: kilobytes, left out of what is read
_ROW_LOOKUP = re.compile(r"(?:token_embd|per_layer_token_embd|position_embd|token_types)\.weight|.*_tid2eid\.weight")


class WeightTraffic:
    """A model's weights by what decides whether a token reads them.

    total: bytes of all.
    expert: bytes of one routed expert of each layer, length block_count; 0 where a plan has none to count.
    fixed: bytes that every token reads: all but those, tables of which it takes a row, and layers that are not run (for
        multi-token prediction). The output matrix, also where it is a table of embeddings. Experts that are given by the
        token id, as many as the model uses.

    Weights only: the key-value cache, which grows with depth, comes on top.

    Raises:
        GGUFError: as `GGUFFile`, and for a model of keys that contradict each other.
    """

    def __init__(self, path: Union[str, os.PathLike]):
        with GGUFFile(path) as file:
            arch, full = file.need("general.architecture"), expert_used_count_full(file) or ()
            n_expert, own = file.get(f"{arch}.expert_count", 0), file.get(f"{arch}.expert_used_count", 0)
            n_run = file.get(f"{arch}.block_count", 0) - file.get(f"{arch}.nextn_predict_layers", 0)
        tensors = []
        for part in model_paths(path):
            with GGUFFile(part) as file:
                tensors += file.tensors
        self.total = sum(tensor.n_bytes for tensor in tensors)
        self.expert, self.fixed = [0] * len(full), 0
        tied = not any(tensor.name == "output.weight" for tensor in tensors)
        for tensor in tensors:
            block = _BLOCK.match(tensor.name)
            il = int(block[1]) if block else -1
            if block and il >= n_run:
                continue
            if il < len(full) and _EXPERTS.match(tensor.name):
                one = tensor.n_bytes // n_expert
                if full[il]:
                    self.expert[il] += one
                else:
                    self.fixed += one * int(own[il] if isinstance(own, np.ndarray) else own)
            elif not _ROW_LOOKUP.fullmatch(tensor.name) or (tied and tensor.name == "token_embd.weight"):
                self.fixed += tensor.n_bytes

    def of_experts(self, activations: Sequence[float]) -> float:
        """Bytes of the experts that a token activates, so many in each layer."""
        return sum(size * k for size, k in zip(self.expert, activations))

    def per_token(self, activations: Sequence[float]) -> float:
        """Bytes read for such a token."""
        return float(self.fixed + self.of_experts(activations))

"""How many bytes of weights a generated token reads, from the GGUF's table of tensors."""

from __future__ import annotations

from pathlib import Path
import re
from typing import Sequence

import numpy as np

from ..gguf_file import GGUFFile, split_paths


class WeightTraffic:
    """A model's weights by what decides whether a token reads them.

    fixed: bytes that every token reads: all but experts and embeddings, and one row of the embeddings. Where the
        output matrix is the embeddings' own (tied), all of them.
    experts: bytes of all experts of each layer, float64, length block_count. n_expert of them share the bytes evenly.

    Weights only: the key-value cache, which grows with depth, comes on top.

    Raises:
        GGUFError: as `GGUFFile`.
    """

    def __init__(self, path: Path):
        with GGUFFile(path) as file:
            arch = file.need("general.architecture")
            self.n_expert = file.need(f"{arch}.expert_count")
            n_layer = file.need(f"{arch}.block_count")
            # layers that only speculative decoding evaluates
            n_layer_used = n_layer - file.get(f"{arch}.nextn_predict_layers", 0)
            n_vocab = file.get(f"{arch}.vocab_size") or len(file.get("tokenizer.ggml.tokens", ())) or 1
            tensors = list(file.tensors)
            n_split = file.get("split.count", 0)
        if n_split > 1:
            for shard in split_paths(Path(path), n_split)[1:]:
                with GGUFFile(shard) as file:
                    tensors += file.tensors
        self.total = sum(tensor.n_bytes for tensor in tensors)
        self.experts = np.zeros(n_layer)
        self.fixed = 0.0
        tied = not any(tensor.name == "output.weight" for tensor in tensors)
        for tensor in tensors:
            block = re.match(r"blk\.(\d+)\.", tensor.name)
            if block and int(block[1]) >= n_layer_used:
                continue
            if block and "_exps." in tensor.name:
                self.experts[int(block[1])] += tensor.n_bytes
            elif tensor.name == "token_embd.weight" and not tied:
                self.fixed += tensor.n_bytes / n_vocab
            else:
                self.fixed += tensor.n_bytes

    def per_token(self, activations: Sequence[float]) -> float:
        """Bytes read for a token that activates so many experts in each layer."""
        return self.fixed + float(self.experts @ np.asarray(activations, float)) / self.n_expert

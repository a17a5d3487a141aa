"""How much memory a model larger than memory gets for its experts."""

from __future__ import annotations

import os
import re
from typing import Iterator, Optional, Union

import numpy as np

from .argument_error import ArgumentError
from .gguf_file import EXPERTS, GGUFFile, model_paths
from .measure import memory

# read by the native side from the overrides that a model is loaded with
KEY = "allocmoe.expert_cache_bytes"

PRICE_KEY = "allocmoe.miss_price"

_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
# of the memory that is free: for this program, and for what else the machine does
_LEFT_FREE = 0.15
# an expert is read in whole blocks
_AROUND = 2 * 4096
_EXPERTS = re.compile(EXPERTS + "weight$")


def parse(value: Union[int, str]) -> int:
    """Bytes from a number of them or a string like "6GB", "500 MB", "1.5GiB". Raises ArgumentError."""
    wrong = ArgumentError("expert_cache", f"found {str(value)[:40]!r}, want a size like '6GB', or bytes, or 0 for none")
    if isinstance(value, bool):
        raise wrong
    if isinstance(value, str):
        found = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,9})?)\s*([kmgt]i?|)b?\s*", value, re.IGNORECASE)
        if found is None:
            raise wrong
        value = int(float(found[1]) * _UNITS[found[2].lower()])
    if not isinstance(value, int) or not 0 <= value < 2**62:
        raise wrong
    return value


def price(value: Union[float, str]) -> float:
    """The price of a miss: how many times as long an expert takes that has to be read. 0 for "auto", to have it measured. Raises
    ArgumentError."""
    if isinstance(value, str) and value == "auto":
        return 0.0
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not 1 <= value <= 1e6:
        raise ArgumentError("miss_price", f"found {str(value)[:40]!r}, want a number from 1 to 1e6, or 'auto'")
    return float(value)


def least(path: Union[str, os.PathLike]) -> int:
    """Bytes of one layer's routed experts, the largest one's, with what is read around them: what a cache needs at least. 0
    for a dense model."""
    layers: dict = {}
    for layer, n_bytes in _experts(path):
        layers[layer] = layers.get(layer, 0) + n_bytes
    return max(layers.values(), default=0)


def of_experts(path: Union[str, os.PathLike]) -> int:
    """Bytes of all routed experts, with what is read around them."""
    return sum(n_bytes for _, n_bytes in _experts(path))


def choose(
    path: Union[str, os.PathLike], value: Union[int, str, None], by_default: bool, n_ctx: int = 0, n_ubatch: int = 512
) -> int:
    """Bytes of the cache for a model that is about to be loaded; 0 for none. Raises ArgumentError, GGUFError.

    Args:
        value: what a user asks for, None where that is nothing.
        by_default: whether None may become a cache, if the file is larger than the memory.
        n_ctx, n_ubatch: of the context that there will be, 0 for the length that the file says it was trained for.
    """
    free = memory.available()
    if value is not None or not by_default or free is None:
        return asked(path, value, free)
    return default(path, free - context_bytes(path, n_ctx, n_ubatch)) if memory.is_beyond(model_paths(path)) else 0


def asked(path: Union[str, os.PathLike], value: Union[int, str, None], free: Optional[int]) -> int:
    """The size that a user asks for, in bytes; 0 for none. Raises ArgumentError where it cannot be had.

    Args:
        free: bytes of memory that can be had, None where unknown.
    """
    n_bytes = 0 if value is None else parse(value)
    if not n_bytes:
        return 0
    if os.name == "nt":
        raise ArgumentError("expert_cache", "there is none on Windows")
    smallest = least(path)
    if not smallest:
        raise ArgumentError("expert_cache", f"{path} has no routed experts")
    if n_bytes < smallest:
        raise ArgumentError(
            "expert_cache",
            f"found {_gigabytes(n_bytes)}, want at least {_gigabytes(smallest)}, one layer's experts",
        )
    if free is not None and n_bytes > free:
        raise ArgumentError(
            "expert_cache", f"found {_gigabytes(n_bytes)}, and there are {_gigabytes(free)} of memory free"
        )
    return n_bytes


def context_bytes(path: Union[str, os.PathLike], n_ctx: int, n_ubatch: int) -> int:
    """About what a context takes beside the weights: keys and values in 16 bits, and what one micro-batch computes."""
    with GGUFFile(path) as file:
        arch = file.get("general.architecture")

        def number(key: str, otherwise: int) -> int:
            found = file.get(f"{arch}.{key}", otherwise)
            if isinstance(found, (list, np.ndarray)):  # one for each layer
                found = max(found, default=otherwise)
            return int(found) if isinstance(found, (int, float, np.number)) else otherwise

        n_embd, n_head = number("embedding_length", 4096), max(1, number("attention.head_count", 1))
        latent = number("attention.kv_lora_rank", 0)
        if latent:
            per_token = 2 * latent + number("rope.dimension_count", 64)
        else:
            length = number("attention.key_length", n_embd // n_head)
            per_token = number("attention.head_count_kv", n_head) * (length + number("attention.value_length", length))
        n_vocab = next((t.n_elements // max(1, n_embd) for t in file.tensors if t.name == "token_embd.weight"), 0)
        n_ff = number("expert_feed_forward_length", number("feed_forward_length", n_embd))
        experts = number("expert_used_count", 0) * (3 * n_ff + 2 * n_embd)
        n_ctx = n_ctx or number("context_length", 4096)
        return 2 * n_ctx * number("block_count", 0) * per_token + 4 * n_ubatch * (n_vocab + 32 * n_embd + experts)


def default(path: Union[str, os.PathLike], free: int) -> int:
    """What `free` bytes of memory leave for experts beside the other weights; 0 where that is less than a cache needs."""
    in_files = of_experts(path)
    others = sum(os.path.getsize(each) for each in model_paths(path)) - in_files
    n_bytes = min(int(free * (1 - _LEFT_FREE)) - others, in_files)
    # room for one layer's experts goes off before any is kept
    return n_bytes if os.name != "nt" and 0 < 1.2 * least(path) <= n_bytes else 0


def _experts(path: Union[str, os.PathLike]) -> Iterator[tuple]:
    """(layer, bytes) of every tensor of routed experts."""
    n_expert = 0
    for each in model_paths(path):
        with GGUFFile(each) as file:
            n_expert = n_expert or int(file.get(f"{file.get('general.architecture')}.expert_count", 0))
            for tensor in file.tensors:
                found = _EXPERTS.match(tensor.name)
                if found:
                    yield int(found[1]), tensor.n_bytes + n_expert * _AROUND


def _gigabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e7 else f"{n_bytes} bytes"

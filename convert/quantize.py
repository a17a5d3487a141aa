"""Quantisation by llama.cpp's own quantiser, which is in libllama.

Which tensor gets which type is upstream's choice (routers, norms and other small tensors stay as they are).
"""

from __future__ import annotations

import ctypes
import json
import os
from pathlib import Path
import re
import sys
from typing import Optional

from allocmoe_edge import GGUFError
from allocmoe_edge._native import llama_cpp
from allocmoe_edge.gguf_file import GGUFFile
import numpy as np

from . import ConvertError, subprocesses

# upstream's quantiser holds 8 GiB of rows by default, more than a small machine has
_MAX_BUFFER = 512 << 20
_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "MXFP4": "MXFP4_MOE"}
# a type of llama.cpp that its quantiser does not make
_NOT_MADE = {"NVFP4"}

FTYPES = {
    match[1]: value
    for name, value in vars(llama_cpp).items()
    if (match := re.fullmatch(r"LLAMA_FTYPE_(?:MOSTLY|ALL)_(\w+)", name)) and match[1] not in _NOT_MADE
}


def ftype(name: str) -> str:
    """The name of a llama_ftype as upstream writes it, from the same in any case or upstream's short form of it.

    Raises:
        ValueError: there is no such type.
    """
    found = _ALIASES.get(name.upper(), name.upper())
    if found not in FTYPES:
        raise ValueError(f"{name}: no such quantisation; there are: {', '.join(FTYPES)}")
    return found


def n_bytes(n_elements: int, name: str) -> int:
    """Estimated size of a model in `name`: the bits in the name, and 1.5 for scales and what mixtures keep higher."""
    return int(n_elements * (int(re.findall(r"\d+", name)[0]) + 1.5) / 8)


def quantize(
    source: Path,
    target: Path,
    name: str,
    *,
    n_threads: int,
    expected: int,
    imatrix: Optional[Path] = None,
    allow_requantize: bool = False,
) -> None:
    """Writes `source` (the first file, if split) in the type `name` to the one file `target`.

    Args:
        expected: estimated size of the target in bytes, for the progress bar.
        imatrix: an importance matrix, as from `llama-imatrix`.
        allow_requantize: accept tensors that are quantised already.

    Raises:
        ConvertError: upstream's quantiser refuses, or memory or disk run out.
    """
    job = {
        "source": str(source),
        "target": str(target),
        "ftype": FTYPES[name],
        "n_threads": n_threads,
        "imatrix": imatrix and str(imatrix),
        "allow_requantize": allow_requantize,
    }
    # without the current folder on the path, which may hold a checkout of this package
    code = f"import sys; sys.path[:] = filter(None, sys.path); from {__name__} import main; main()"
    try:
        subprocesses.run([sys.executable, "-c", code, json.dumps(job)], target, expected, f"quantising to {name}")
    except subprocesses.ChildFailed as error:
        reason = error.reason.rpartition("failed to quantize: ")[2]
        if "requantizing" in reason:
            reason += (
                ": the model is quantised already, and doing so twice loses more; --allow-requantize does it anyway"
            )
        elif "imatrix" in reason or "importance matrix" in reason:
            reason += " (--imatrix FILE, made by llama-imatrix from this model)"
        raise ConvertError(f"quantising {source.name} to {name}: {reason}") from None


def read_imatrix(path: Path) -> dict:
    """An importance matrix: float32 arrays by tensor name, the mean squares of what each weight's column is multiplied
    with, of shape [n_expert * ne0] for experts' tensors and [ne0] for others (upstream: common/imatrix-loader.cpp).

    Raises:
        ConvertError: not an importance matrix in GGUF form, or a damaged one.
    """
    try:
        with GGUFFile(path) as file, open(path, "rb") as data:
            arrays = {}
            for tensor in file.tensors:
                if tensor.n_bytes != 4 * tensor.n_elements:
                    raise ConvertError(f"{path}: {tensor.name} is not F32")
                data.seek(file.data_offset + tensor.offset)
                arrays[tensor.name] = np.frombuffer(data.read(tensor.n_bytes), np.float32)
    except GGUFError as error:
        raise ConvertError(f"importance matrix: {error}") from None
    matrix = {}
    for name in [name[: -len(".in_sum2")] for name in arrays if name.endswith(".in_sum2")]:
        counts = arrays.get(f"{name}.counts")
        sums = arrays[f"{name}.in_sum2"]
        if counts is None or not counts.size or sums.size % counts.size:
            raise ConvertError(f"{path}: the counts of {name} do not fit its sums")
        counts = counts.round().reshape(-1, 1)
        sums = sums.reshape(counts.size, -1)
        # an expert that no token reached says nothing: all its columns count the same
        values = np.where(counts > 0, sums / np.maximum(counts, 1), 1).astype(np.float32)
        if not np.isfinite(values).all() or (values < 0).any():
            raise ConvertError(f"{path}: {name} holds numbers that are negative or not finite, which no mean square is")
        matrix[name] = values.ravel()
    if not matrix:
        raise ConvertError(f"{path}: no importance matrix (no tensor *.in_sum2)")
    return matrix


def _c_imatrix(matrix: dict) -> ctypes.Array:
    entries = (llama_cpp.llama_model_imatrix_data * (len(matrix) + 1))()  # the last one, all zero, ends the list
    for entry, (name, values) in zip(entries, matrix.items()):
        entry.name = name.encode()
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = values.size
    return entries


def _c_notes(path: str, n_entries: int) -> ctypes.Array:
    """The keys by which a quantised file names its importance matrix, as llama-quantize writes them."""
    notes = (llama_cpp.llama_model_kv_override * 3)()
    notes[0].tag, notes[0].key = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_STR, b"quantize.imatrix.file"
    notes[0].value.val_str = os.fsencode(Path(path).name)[:127]
    notes[1].tag, notes[1].key = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT, b"quantize.imatrix.entries_count"
    notes[1].value.val_i64 = n_entries
    return notes


def main() -> None:
    """The process that `quantize` starts; its job is the last argument."""
    job = json.loads(sys.argv[-1])
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = job["n_threads"]
    params.ftype = job["ftype"]
    params.allow_requantize = job["allow_requantize"]
    params.max_buf_size = _MAX_BUFFER
    if job["imatrix"]:
        matrix = read_imatrix(Path(job["imatrix"]))
        entries, notes = _c_imatrix(matrix), _c_notes(job["imatrix"], len(matrix))
        params.imatrix = entries
        params.kv_overrides = notes
    sys.exit(
        llama_cpp.llama_model_quantize(os.fsencode(job["source"]), os.fsencode(job["target"]), ctypes.byref(params))
    )

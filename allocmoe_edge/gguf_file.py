"""Metadata and tensor table of a GGUF file, read and rewritten by ggml's own gguf functions (ggml/include/gguf.h).

Tensor data is never touched or loaded, so that opening a 40 GB file costs milliseconds.
"""

import contextlib
import hashlib
import math
import os
from pathlib import Path
import re
from typing import Any, Iterator, NamedTuple, Optional, Set, Union

import numpy as np

from ._native import ffi
from ._native import libggml_base as gguf

_STRING, _ARRAY = 8, 9
# enum gguf_type
_DTYPES = {
    0: np.uint8, 1: np.int8, 2: np.uint16, 3: np.int16, 4: np.uint32, 5: np.int32, 6: np.float32,
    7: np.bool_, 10: np.uint64, 11: np.int64, 12: np.float64,
}  # fmt: skip
_TYPE_IDS = {np.dtype(dtype): type_id for type_id, dtype in _DTYPES.items()}


# LLAMA_MAX_LAYERS and LLAMA_MAX_EXPERTS: above them llama.cpp aborts the process, as where counts of layers, experts and groups
# contradict each other (llama_model_base::load_hparams)
MAX_LAYERS, MAX_EXPERTS = 512, 1024


_MAMBA2 = ("ssm.group_count", "ssm.time_step_rank")
# what llama.cpp divides by without a look, by architecture: a zero ends the process by a signal, which nothing catches
_DIVISORS = {
    "deepseek4": ("attention.output_group_count",), "dflash": ("attention.output_group_count", "conv_group_size"),
    "ernie4_5-moe": ("interleave_moe_layer_step",), "falcon-h1": _MAMBA2, "granitehybrid": _MAMBA2, "mamba2": _MAMBA2,
    "nemotron_h": _MAMBA2, "nemotron_h_moe": _MAMBA2, "gemma2": ("attention.head_count",), "gemma3": ("attention.head_count",),
    "olmo2": ("attention.head_count",), "phimoe": ("attention.head_count",), "rwkv6": ("wkv.head_size",),
    "rwkv6qwen2": ("wkv.head_size",), "rwkv7": ("wkv.head_size",), "arwkv7": ("wkv.head_size",),
}  # fmt: skip

# tensors of routed experts: llama.cpp's LLM_FFN_EXPS_REGEX (common/common.h), and the layer
EXPERTS = r"blk\.(\d+)\.ffn_(?:up|down|gate|gate_up)_(?:ch)?exps\."

# types that nothing multiplies by: a model's file may have them, and no matrix of it
_NO_WEIGHTS = ("F64", "I8", "I16", "I64")


# of a file's tensor data, for its fingerprint
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16


class GGUFError(ValueError):
    """The file is no GGUF file, is damaged, or lacks what is needed from it."""


def _why_no_file(path: Path) -> str:
    if not path.is_dir():
        return "not a file" if path.exists() else "no such file"
    inside = sorted(path.glob("*.gguf"))
    if inside:
        return f"a folder; name the file in it, such as {inside[0].name}"
    return "a folder; of a model in Hugging Face's format allocmoe-convert makes a file"


class Tensor(NamedTuple):
    name: str
    offset: int  # bytes from the start of the tensor data
    n_bytes: int
    n_elements: int
    type_name: str  # ggml's: F16, Q4_K, ...


class GGUFFile:
    """An open GGUF file's metadata. Use as a context manager.

    Raises:
        GGUFError: the file does not exist, is not GGUF, or is shorter than its own table of tensors says.
    """

    def __init__(self, path: Union[str, os.PathLike]):
        self.path = Path(path)
        self._ctx = None
        if not self.path.is_file():
            raise GGUFError(f"{self.path}: {_why_no_file(self.path)}")
        with open(self.path, "rb") as file:
            try:
                magic = file.read(4)
            except OSError as error:  # which does not know the file
                raise GGUFError(f"{self.path}: cannot be read: {error.strerror}") from None
        if magic != b"GGUF":
            raise GGUFError(f"{self.path}: not a GGUF file (it starts with {magic!r}, not with b'GGUF')")
        params = ffi.new("struct gguf_init_params *", {"no_alloc": True})
        ctx = gguf.gguf_init_from_file(os.fsencode(self.path), params[0])
        if ctx == ffi.NULL:
            raise GGUFError(f"{self.path}: damaged or truncated GGUF file: its metadata cannot be read")
        self._ctx = ffi.gc(ctx, gguf.gguf_free)
        self.tensors = [_tensor(ctx, i) for i in range(gguf.gguf_get_n_tensors(ctx))]
        self.data_offset = gguf.gguf_get_data_offset(ctx)
        wanted = self.data_offset + max((t.offset + t.n_bytes for t in self.tensors), default=0)
        found = self.path.stat().st_size
        if found < wanted:
            self.close()
            raise GGUFError(f"{self.path}: truncated: {found} bytes, but its tensors end at byte {wanted}")

    @classmethod
    def empty(cls, path: Union[str, os.PathLike]) -> "GGUFFile":
        """Metadata in memory, without a key or a tensor, that is to become the file `path`."""
        file = cls.__new__(cls)
        file.path, file.tensors = Path(path), []
        file._ctx = ffi.gc(gguf.gguf_init_empty(), gguf.gguf_free)
        file.data_offset = 0
        return file

    def __enter__(self) -> "GGUFFile":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        if self._ctx is not None:
            ffi.release(self._ctx)
            self._ctx = None

    def keys(self) -> Iterator[str]:
        return (_text(gguf.gguf_get_key(self._ctx, i)) for i in range(gguf.gguf_get_n_kv(self._ctx)))

    def get(self, key: str, default: Any = None) -> Any:
        """Value of `key`: int, float, bool, str, list of str, or a numpy array with the file's own dtype."""
        i = gguf.gguf_find_key(self._ctx, key.encode())
        if i < 0:
            return default
        type_id = gguf.gguf_get_kv_type(self._ctx, i)
        if type_id == _STRING:
            return _text(gguf.gguf_get_val_str(self._ctx, i))
        if type_id != _ARRAY:
            return _array(gguf.gguf_get_val_data(self._ctx, i), type_id, 1)[0].item()
        n = gguf.gguf_get_arr_n(self._ctx, i)
        type_id = gguf.gguf_get_arr_type(self._ctx, i)
        if type_id == _STRING:
            return [_text(gguf.gguf_get_arr_str(self._ctx, i, j)) for j in range(n)]
        return _array(gguf.gguf_get_arr_data(self._ctx, i), type_id, n)

    def need(self, key: str) -> Any:
        """Like `get`, but a missing key is a GGUFError."""
        value = self.get(key)
        if value is None:
            raise GGUFError(f"{self.path}: the key {key} is missing")
        return value

    def set(self, key: str, value: Union[int, str, np.ndarray, None]) -> None:
        """Sets `key` in memory: an int as uint32, a str, an array with its dtype; None removes it."""
        name = key.encode()
        if value is None:
            gguf.gguf_remove_key(self._ctx, name)
        elif isinstance(value, str):
            gguf.gguf_set_val_str(self._ctx, name, value.encode(errors="replace"))
        elif isinstance(value, int):
            gguf.gguf_set_val_u32(self._ctx, name, value)
        else:
            data = np.ascontiguousarray(value)
            gguf.gguf_set_arr_data(self._ctx, name, _TYPE_IDS[data.dtype], ffi.from_buffer(data), data.size)

    def write_metadata(self, path: Union[str, os.PathLike]) -> None:
        """Writes header, metadata and tensor table, padded to where the tensor data starts, to a new file.

        Raises:
            OSError: the file could not be written in full.
        """
        if not gguf.gguf_write_to_file(self._ctx, os.fsencode(path), True):
            raise OSError(f"{path}: could not write the GGUF metadata")


def split_paths(path: Path, n_split: int) -> list:
    """Every file of a split model (NAME-00001-of-0000N.gguf), given its first one."""
    prefix, mark, _ = path.name.rpartition(f"-00001-of-{n_split:05d}.gguf")
    if not mark:
        raise GGUFError(f"{path}: one of {n_split} files of a split model, but not named like the first of them")
    return [path.with_name(f"{prefix}-{i:05d}-of-{n_split:05d}.gguf") for i in range(1, n_split + 1)]


def model_paths(path: Union[str, os.PathLike]) -> list:
    """The files of a GGUF model: the one file, or every file of a split one of which `path` is the first.

    Raises:
        GGUFError: not a GGUF file, or another file of a split model than its first.
    """
    with GGUFFile(path) as file:
        n_split = _n_split(file)
        return split_paths(file.path, n_split) if n_split > 1 else [file.path]


def fingerprint(model: Union[str, os.PathLike], *, metadata: bool = True) -> str:
    """Hash of a model's or adapter's metadata, and of samples from its tensor data: quick for any size, blind to name and date.

    metadata: False for no more of it than what its architecture computes with.
    """
    digest = hashlib.sha256()
    for path in model_paths(model):
        with GGUFFile(path) as file:
            data_offset = file.data_offset
            if not metadata:
                arch = str(file.get("general.architecture"))
                names = sorted(key for key in file.keys() if key.startswith((arch + ".", "adapter.")))
                digest.update(repr([arch, *((key, file.get(key)) for key in names)]).encode())
        size = path.stat().st_size
        digest.update((size - data_offset).to_bytes(8, "little"))
        with open(path, "rb") as data:
            if metadata:
                digest.update(data.read(data_offset))
            for start in np.linspace(data_offset, max(data_offset, size - _SAMPLE_BYTES), _SAMPLES).astype(int):
                data.seek(start)
                digest.update(data.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def ranks(path: Union[str, os.PathLike]) -> bool:
    """Whether the model can rank texts: has tensors that a score comes from. Raises GGUFError."""
    for part in model_paths(path):
        with GGUFFile(part) as file:
            if any(tensor.name.startswith("cls.") for tensor in file.tensors):
                return True
    return False


def _n_split(file: GGUFFile) -> int:
    """Files of the split model that `file` is the first of; 0 or 1 if it is not split. GGUFError for another file of it."""
    n_split = _bounded(file, "split.count", 0, 65535, default=0)
    number = _bounded(file, "split.no", 0, 65535, default=0)
    if n_split > 1 and number > 0:
        first = re.sub(r"-\d{5}(-of-\d{5}\.gguf)$", r"-00001\1", file.path.name)
        raise GGUFError(f"{file.path}: file {number + 1} of {n_split} of a split model: give the first one, {first}")
    return n_split


def expert_used_count_full(file: GGUFFile) -> Optional[tuple]:
    """The model's own experts per token in each layer, 0 where a layer has no experts that a plan could count.

    Checks on the way all that llama.cpp would end the process for.

    Layers whose experts are given by the token id (hash-routed) count as having none, and so do the last ones if they
    predict further tokens (nextn_predict_layers): decoding does not run them.

    Returns:
        ints, length block_count, or None if the model has no experts at all.

    Raises:
        GGUFError: the keys that describe the model's layers and experts are missing or contradict each other, or the file is
            another one of a split model than the first.
    """
    n_split = _n_split(file)
    _check_types(file)
    arch = file.need("general.architecture")
    if not isinstance(arch, str):
        raise GGUFError(f"{file.path}: general.architecture is {arch!r}, wanted a string")
    _check_numbers(file, arch)
    n_expert = _bounded(file, f"{arch}.expert_count", 0, MAX_EXPERTS, default=0)
    n_group = _bounded(file, f"{arch}.expert_group_count", 0, max(n_expert - 1, 0), default=0)
    if n_group > 1:
        _bounded(file, f"{arch}.expert_group_used_count", 1, n_group - 1)
        if n_expert % n_group:
            raise GGUFError(
                f"{file.path}: {arch}.expert_group_count is {n_group}, wanted one that divides {n_expert} experts"
            )
    if n_expert == 0:
        n_layer = _bounded(file, f"{arch}.block_count", 1, MAX_LAYERS, default=1)
        _bounded(file, f"{arch}.nextn_predict_layers", 0, n_layer, default=0)
        if not isinstance(file.get(f"{arch}.expert_used_count"), np.ndarray):
            _bounded(file, f"{arch}.expert_used_count", 0, 0, default=0)
        return None
    n_layer = _bounded(file, f"{arch}.block_count", 1, MAX_LAYERS)
    used = file.need(f"{arch}.expert_used_count")
    used = [int(k) for k in used] if isinstance(used, np.ndarray) else [used] * n_layer
    if len(used) < n_layer:
        raise GGUFError(f"{file.path}: {arch}.expert_used_count has {len(used)} entries for {n_layer} layers")
    for il, k in enumerate(used[:n_layer]):
        if isinstance(k, bool) or not isinstance(k, int) or not 0 <= k <= n_expert:
            raise GGUFError(f"{file.path}: {arch}.expert_used_count is {k} in layer {il}, wanted 0 to {n_expert}")
    if not any(used[:n_layer]):
        raise GGUFError(f"{file.path}: {arch}.expert_used_count is 0 in every layer, wanted 1 to {n_expert} somewhere")

    names: Set[str] = set()
    for part in split_paths(file.path, n_split) if n_split > 1 else [file.path]:
        with contextlib.nullcontext(file) if part == file.path else GGUFFile(part) as each:
            _check_types(each)
            names.update(tensor.name for tensor in each.tensors)
            for tensor in each.tensors:
                if tensor.name.endswith(".ffn_gate_tid2eid.weight") and tensor.type_name == "I32":
                    _check_table(each, tensor, n_expert)

    # layers that predict further tokens come last; llama.cpp neither loads them nor runs them with the model
    n_run = n_layer - _bounded(file, f"{arch}.nextn_predict_layers", 0, n_layer, default=0)

    def routed(il: int) -> bool:
        return (
            il < n_run
            and f"blk.{il}.ffn_gate_inp.weight" in names
            and f"blk.{il}.ffn_down_exps.weight" in names
            and f"blk.{il}.ffn_gate_tid2eid.weight" not in names
        )

    return tuple(used[il] if routed(il) else 0 for il in range(n_layer))


def _check_numbers(file: GGUFFile, arch: str) -> None:
    """Refuses numbers that end the process where they are used, and not where they are read."""
    for name in _DIVISORS.get(arch, ()):
        value = file.get(f"{arch}.{name}")
        if not isinstance(value, np.ndarray) and value == 0:
            raise GGUFError(f"{file.path}: {arch}.{name} is 0, wanted at least 1")
    for key in file.keys():
        if key.startswith(f"{arch}.") and key.endswith("epsilon"):
            value = file.get(key)
            if isinstance(value, float) and not 0 <= value < math.inf:
                raise GGUFError(f"{file.path}: {key} is {value}, wanted at least 0")


def _check_types(file: GGUFFile) -> None:
    """What else a tensor cannot be, such as a norm in float16, is refused by the library (native/allocmoe-cpu-types.cpp)."""
    for tensor in file.tensors:
        if tensor.type_name in _NO_WEIGHTS:
            raise GGUFError(
                f"{file.path}: {tensor.name} is stored as {tensor.type_name}, which llama.cpp cannot compute with: "
                "wanted a floating-point type of 32 bits or less, or a quantised one"
            )


def _check_table(file: GGUFFile, tensor: Tensor, n_expert: int) -> None:
    """Refuses a table of experts by token that names others than there are: llama.cpp looks them up without a look."""
    with open(file.path, "rb") as data:
        data.seek(file.data_offset + tensor.offset)
        experts = np.frombuffer(data.read(tensor.n_bytes), "<i4")
    wrong = experts[(experts < 0) | (experts >= n_expert)]
    if wrong.size:
        raise GGUFError(f"{file.path}: {tensor.name} names expert {wrong[0]}, wanted 0 to {n_expert - 1}")


def _bounded(file: GGUFFile, key: str, low: int, high: int, default: Optional[int] = None) -> int:
    value = file.need(key) if default is None else file.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise GGUFError(f"{file.path}: {key} is {value!r}, wanted an integer from {low} to {high}")
    return value


def _tensor(ctx, i: int) -> Tensor:
    type_id, n_bytes = gguf.gguf_get_tensor_type(ctx, i), gguf.gguf_get_tensor_size(ctx, i)
    return Tensor(
        _text(gguf.gguf_get_tensor_name(ctx, i)),
        gguf.gguf_get_tensor_offset(ctx, i),
        n_bytes,
        n_bytes // gguf.ggml_type_size(type_id) * gguf.ggml_blck_size(type_id),
        _text(gguf.ggml_type_name(type_id)).upper(),
    )


def _text(pointer) -> str:
    return ffi.string(pointer).decode("utf-8", errors="replace")


def _array(pointer, type_id: int, n: int) -> np.ndarray:
    dtype = np.dtype(_DTYPES[type_id])
    return np.frombuffer(ffi.buffer(pointer, n * dtype.itemsize), dtype=dtype).copy() if n else np.empty(0, dtype)

"""What a profile has measured so far, kept in a file beside the output so that an interrupted run can go on."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Callable, Dict, Optional, Union

from allocmoe_edge.gguf_file import GGUFFile, model_paths
import numpy as np

from . import ConvertError

_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16


def fingerprint(model: Path) -> str:
    """Hash of a model's metadata and of samples from its tensor data: quick for any size, blind to name and date."""
    digest = hashlib.sha256()
    for path in model_paths(model):
        with GGUFFile(path) as file:
            data_offset = file.data_offset
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with open(path, "rb") as data:
            digest.update(data.read(data_offset))
            for start in np.linspace(data_offset, max(data_offset, size - _SAMPLE_BYTES), _SAMPLES).astype(int):
                data.seek(start)
                digest.update(data.read(_SAMPLE_BYTES))
    return digest.hexdigest()


class Checkpoint:
    """Named results on disk, one JSON line each, appended as they come; a line cut short by a kill is not read.

    A name says all that its result depends on beside the model (text, layer, k, ...), so that whatever still fits after a
    change of options is used and the rest is not. The first line names the model; the file of another model is
    started anew.

    Use as a context manager: a file without results is removed at the end, any other is left for the next run.

    Raises:
        ConvertError: the file cannot be read or written, or is not such a file.
    """

    def __init__(self, path: Path, model: Path):
        self.path = path
        self._results: Dict[str, object] = {}
        self.restarted = False  # there was one, of another model
        self._complete = True  # its last line, that is
        header = {"allocmoe_profile": 1, "model": fingerprint(model)}
        try:
            if path.exists():
                with open(path, encoding="utf-8", errors="replace") as file:
                    self._read(file.read().split("\n"), header)
            fresh = not self._results
            self._file = open(path, "w" if fresh else "a", encoding="utf-8")
            if fresh:
                self._write(header)
            elif not self._complete:
                self._file.write("\n")
        except OSError as error:
            raise ConvertError(f"{path}: {error.strerror}") from None

    def _read(self, lines: list, header: dict) -> None:
        first = _parse(lines[0])
        if lines[0].strip() and (first is None or "allocmoe_profile" not in first):
            raise ConvertError(f"{self.path}: is no profile of allocmoe-convert's; move it away")
        self.restarted = first is not None and first != header
        if first != header:
            return
        self._complete = not lines[-1]
        for line in lines[1:]:
            entry = _parse(line)
            if entry and "name" in entry:
                self._results[entry["name"]] = entry.get("result")

    def get(self, name: str) -> Optional[object]:
        return self._results.get(name)

    def put(self, name: str, result: Union[dict, list]) -> None:
        self._results[name] = result
        try:
            self._write({"name": name, "result": result})
        except OSError as error:
            raise ConvertError(f"{self.path}: {error.strerror}") from None

    def arrays(self, name: str, compute: Callable[[], Optional[dict]]) -> Optional[dict]:
        """A dict of arrays: what compute() returned before under this name, bit for bit, or returns now; None is not kept."""
        stored = self.get(name)
        if stored is not None:
            return {
                what: np.frombuffer(base64.b64decode(data), dtype).reshape(shape)
                for what, (dtype, shape, data) in stored.items()
            }
        found = compute()
        if found is not None:
            packed = {
                what: (str(a.dtype), a.shape, base64.b64encode(a.tobytes()).decode()) for what, a in found.items()
            }
            self.put(name, packed)
        return found

    def _write(self, entry: dict) -> None:
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_) -> None:
        self._file.close()
        if not self._results:
            self.path.unlink(missing_ok=True)


def _parse(line: str) -> Optional[dict]:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def window_name(window: np.ndarray) -> str:
    """Hash of a window's token ids, int32."""
    return hashlib.sha256(np.ascontiguousarray(window, np.int32).tobytes()).hexdigest()[:16]

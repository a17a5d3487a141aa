"""What a profile has measured so far, kept in a file beside the output so that an interrupted run can go on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Union
import zipfile
import zlib

from allocmoe_edge.gguf_file import fingerprint
import numpy as np

from . import ConvertError
from .progress import say


class Checkpoint:
    """Named results on disk, one JSON line each, appended as they come; a line cut short by a kill is not read.

    Arrays are in files of their own, in a folder beside it. A name says all that its result depends on beside the model
    (text, layer, k, ...), so that whatever still fits after a change of options is used and the rest is not. The first
    line names the model; the file of another model is started anew.

    Use as a context manager: a file without results is removed at the end, any other is left for the next run.

    Raises:
        ConvertError: the file cannot be read or written, or is not such a file.
    """

    def __init__(self, path: Path, model: Path):
        self.path = path
        self.folder = _array_folder(path)
        self._results: Dict[str, Any] = {}
        self._arrays: Dict[str, str] = {}  # names of files
        self.restarted = False  # there was one, of another model
        self._complete = True  # its last line, that is
        self.model = fingerprint(model)
        header = {"allocmoe_profile": 1, "model": self.model}
        try:
            if path.exists():
                self._read(path.read_text(encoding="utf-8", errors="replace").split("\n"), header)
            fresh = not (self._results or self._arrays)
            if fresh:
                _remove_arrays(self.folder)
            # without a buffer: nothing is left to be written, and to fail again, when it is closed
            self._file = open(path, "wb" if fresh else "ab", buffering=0)
            if fresh:
                self._write(header)
            elif not self._complete:
                self._file.write(b"\n")
        except OSError as error:
            raise ConvertError(f"{path}: {error.strerror}") from None

    def _read(self, lines: list, header: dict) -> None:
        first = _parse(lines[0])
        if len(lines) == 1 and json.dumps(header).startswith(lines[0]):
            return  # a first line that was cut short: nothing had been measured
        if lines[0].strip() and (first is None or "allocmoe_profile" not in first):
            raise ConvertError(f"{self.path}: is no profile of allocmoe-convert's; move it away")
        self.restarted = first is not None and first != header
        if first != header:
            return
        self._complete = not lines[-1]
        for line in lines[1:]:
            entry = _parse(line)
            if entry and "arrays" in entry:
                self._arrays[entry["name"]] = entry["arrays"]
            elif entry and "name" in entry:
                self._results[entry["name"]] = entry.get("result")

    def get(self, name: str) -> Any:
        """What was put under the name, None if nothing was."""
        return self._results.get(name)

    def put(self, name: str, result: Union[dict, list]) -> None:
        self._results[name] = result
        self._append({"name": name, "result": result})

    def arrays(self, name: str, compute: Callable[[], Optional[dict]]) -> Optional[dict]:
        """A dict of arrays: what compute() returned before under this name, bit for bit, or returns now; None is not kept."""
        if name in self._arrays:
            path = self.folder / self._arrays[name]
            try:
                with np.load(path, allow_pickle=False) as stored:
                    return dict(stored)
            except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
                say(f"{path}: damaged, computed anew ({error})")
        found = compute()
        if found is not None:
            file = hashlib.sha256(name.encode()).hexdigest()[:16] + ".npz"
            self._write_arrays(self.folder / file, found)
            self._arrays[name] = file
            self._append({"name": name, "arrays": file})
        return found

    def _write_arrays(self, path: Path, arrays: dict) -> None:
        partial = path.with_suffix(".partial")
        try:
            self.folder.mkdir(exist_ok=True)
            with open(partial, "wb") as file:
                np.savez(file, **arrays)
            os.replace(partial, path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise ConvertError(f"{path}: {error.strerror}") from None

    def _append(self, entry: dict) -> None:
        try:
            self._write(entry)
        except OSError as error:
            raise ConvertError(f"{self.path}: {error.strerror}") from None

    def _write(self, entry: dict) -> None:
        data = json.dumps(entry).encode() + b"\n"
        while data:
            data = data[self._file.write(data) :]

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_) -> None:
        self._file.close()
        if not (self._results or self._arrays):
            self.remove()

    def remove(self) -> None:
        """Removes it with its arrays."""
        remove(self.path)


def remove(path: Path) -> None:
    """Removes the checkpoint `path`, if there is one, with its arrays."""
    _remove_arrays(_array_folder(path))
    path.unlink(missing_ok=True)


def remove_ours(path: Path) -> None:
    """As `remove`, of a checkpoint alone and no other file of that name."""
    if path.is_file():
        with open(path, "rb") as file:
            first = _parse(file.readline(1000).decode(errors="replace"))
        if first and "allocmoe_profile" in first:
            remove(path)


def _array_folder(path: Path) -> Path:
    return path.with_name(path.name + ".arrays")


def _remove_arrays(folder: Path) -> None:
    for path in (*folder.glob("*.npz"), *folder.glob("*.partial")):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # there is none, or it holds what is not ours
        folder.rmdir()


def _parse(line: str) -> Optional[dict]:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def window_name(window: np.ndarray) -> str:
    """Hash of a window's token ids, int32."""
    return hashlib.sha256(np.ascontiguousarray(window, np.int32).tobytes()).hexdigest()[:16]

"""One run at a time to one output, and nothing left of one that was killed."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
import re
from typing import IO, Iterator, Optional

from allocmoe_edge.output_file import followed

from . import ConvertError
from . import output as output_files

try:
    import fcntl
except ImportError:  # on Windows, where nothing is kept
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def claimed(output: Path) -> Iterator[None]:
    """Keeps `output` for this run: another one to the same file is refused meanwhile. Temporary files that an earlier run has
    left, because it was killed, are removed, and files that it had moved away are put back.

    By a lock on a file beside it, which ends with the process, whatever ends that. Where there are no such locks, and where
    nothing can be written, nothing is kept.

    Raises:
        ConvertError: another run has it.
    """
    output = followed(output)
    if fcntl is None or (output.exists() and not output.is_file()):
        yield  # what it is instead is refused elsewhere
        return
    # m.gguf and m-00001-of-00003.gguf are one output
    stem = re.sub(r"-00001-of-\d{5}(?=\.gguf$)", "", output.name).removesuffix(".gguf")
    path = output.with_name(f".{stem}.lock")
    lock = _lock(path, output)
    try:
        if lock is not None:
            _remove_left(output.parent, stem)
        yield
    finally:
        if lock is not None:
            path.unlink(missing_ok=True)
            lock.close()


def _lock(path: Path, output: Path) -> Optional[IO]:
    while True:
        try:
            lock = open(path, "ab")
        except OSError:
            return None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise ConvertError(f"{output}: another allocmoe-convert is writing it; wait for that, or stop it") from None
        except OSError:  # a file system without locks
            lock.close()
            path.unlink(missing_ok=True)
            return None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                return lock
        lock.close()  # the run before has removed it, between our two calls


def _remove_left(folder: Path, stem: str) -> None:
    made = r"\.\d+\.(partial|converted|quantized)"
    part = r"-\d{5}-of-\d{5}"
    name = rf"\.{re.escape(stem)}({part})?(\.gguf)?{made}"
    pattern = re.compile(rf"{name}|\.{name}\.\d+\.header")
    moved = re.compile(rf"\.{re.escape(stem)}{part}\.gguf\.\d+\.old")
    with contextlib.suppress(OSError):
        output_files.put_back([path for path in folder.iterdir() if moved.fullmatch(path.name) and path.is_file()])
    for path in folder.iterdir():
        if pattern.fullmatch(path.name) and path.is_file():
            with contextlib.suppress(OSError):
                path.unlink()

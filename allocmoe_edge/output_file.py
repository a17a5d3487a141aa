"""Files that a command writes beside what it prints: checked before the work, whole or not there after it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Iterable

from .command import CommandError


def check(path: Path, inputs: Iterable[Path] = ()) -> None:
    """Refuses, before any work is done, a file that could not be written at the end of it.

    Raises:
        CommandError: no such folder, no right to write there, a folder itself, or one of the files that are read.
    """
    for given in inputs:
        if path.exists() and given.exists() and os.path.samefile(path, given):
            raise CommandError(f"{path}: is {given}, which is read; give it another name")
    if path.is_dir():
        raise CommandError(f"{path}: is a folder, want the name of a file")
    if not path.parent.is_dir():
        raise CommandError(f"{path}: no such folder: {path.parent}")
    target = path if _is_special(path) else path.resolve().parent
    if not os.access(target, os.W_OK):
        raise CommandError(f"{path}: no permission to write there")


def write(path: Path, data: bytes) -> None:
    """Writes a file; one that exists is replaced when the new one is complete. Devices and pipes are written to.

    Raises:
        CommandError: the file could not be written; a new one is not left behind.
    """
    target = path if _is_special(path) else followed(path)
    partial = target if _is_special(path) else target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
        if partial != target:
            os.replace(partial, target)
    except OSError as error:
        raise CommandError(f"{path}: could not be written: {error.strerror}") from None
    finally:
        if partial != target:
            partial.unlink(missing_ok=True)


def followed(path: Path) -> Path:
    """What a link points to, and not the link: where cp writes."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def _is_special(path: Path) -> bool:
    """Whether there is something that is neither a file nor a folder: replacing /dev/null would be no kindness."""
    return path.exists() and not path.is_file() and not path.is_dir()

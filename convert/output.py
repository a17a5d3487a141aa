"""Writes the planned file: new metadata, then the source's tensor data byte for byte, never a half-written file."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Optional

from allocmoe_edge import GGUFError, Plan
from allocmoe_edge import metadata
from allocmoe_edge.gguf_file import GGUFFile

from . import ConvertError

# room for our keys, generously: tens of kilobytes
_METADATA_SLACK = 16 << 20


def check_target(source: Path, target: Path, force: bool) -> None:
    """Refuses, before any work is done, a target that could not be written at the end.

    Raises:
        ConvertError: the target is the source, exists (without force), its folder is missing or cannot be
            written, or the disk is too full.
    """
    folder = target.parent
    if not folder.is_dir():
        raise ConvertError(f"{target}: no such folder: {folder}")
    if target.exists():
        if target.is_dir():
            raise ConvertError(f"{target}: is a folder, want the name of a file")
        if target.samefile(source):
            raise ConvertError(f"{target}: is the input itself; give the output another name")
        if not force:
            raise ConvertError(f"{target}: exists; --force replaces it")
    if not os.access(folder, os.W_OK):
        raise ConvertError(f"{folder}: no permission to write there")
    needed = source.stat().st_size + _METADATA_SLACK
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConvertError(f"{folder}: {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB needed for {target.name}")


def write_planned(source: Path, target: Path, plan: Plan, profile: Optional[metadata.Profile]) -> None:
    """Copies `source` to `target` with the plan in its metadata.

    The copy is made under a temporary name in the target's folder and renamed when it is complete and on disk.

    Raises:
        ConvertError: the copy could not be completed (disk full, quota, ...); nothing is left behind.
        GGUFError: the source cannot be read.
    """
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with GGUFFile(source) as file:
            metadata.write(file, plan, profile)
            file.write_metadata(partial)
            with open(source, "rb") as data, open(partial, "ab") as copy:
                data.seek(file.data_offset)
                shutil.copyfileobj(data, copy, 16 << 20)
                copy.flush()
                os.fsync(copy.fileno())
        with GGUFFile(partial) as check:
            if check.get("allocmoe.version") != metadata.VERSION:
                raise GGUFError(f"{partial}: the plan is not in the file that was written")
        os.replace(partial, target)
    except OSError as error:
        raise ConvertError(f"{target}: could not be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)

"""Writes the planned file: new metadata, the tensor data byte for byte as it was, never a half-written file."""

from __future__ import annotations

import os
from pathlib import Path
import re
import shutil
from typing import Iterable, Iterator, Optional, Tuple

from allocmoe_edge import GGUFError, Plan
from allocmoe_edge.gguf_file import GGUFFile, model_paths, split_paths
from allocmoe_edge.output_file import followed
from allocmoe_edge.plan import metadata

from . import ConvertError
from .progress import progress_bar

# room for our keys, generously: megabytes with an estimator, else kilobytes
METADATA_SLACK = 64 << 20
_BLOCK = 16 << 20


def target_paths(target: Path, n_split: int) -> list:
    """The files that a model of n_split files is written to: out.gguf for one, out-00001-of-0000N.gguf ... for N; where one is
    a link, what it points to."""
    if n_split == 1:
        return [followed(target)]
    prefix = target.name
    for end in (".gguf", f"-00001-of-{n_split:05d}"):
        prefix = prefix[: -len(end)] if prefix.endswith(end) else prefix
    first = target.with_name(f"{prefix}-00001-of-{n_split:05d}.gguf")
    return [followed(path) for path in split_paths(first, n_split)]


def check_target(
    sources: list, target: Path, force: bool, inputs: Iterable = (), n_split: Optional[int] = None
) -> None:
    """Refuses, before any work is done, a target that could not be written at the end, or that is an input.

    Inputs are told by what they are and not by their names: a link to one is one.

    Args:
        sources: the files of the input, as from `model_paths`; empty if the model is made from something else.
        inputs: further files, and folders, that the command reads.
        n_split: how many files are written, by default as many as there are sources.

    Raises:
        ConvertError: the target is a file of the input, exists (without force), or its folder is missing or cannot be written.
    """
    for i, path in enumerate(target_paths(target, n_split or max(1, len(sources)))):
        if not path.parent.is_dir():
            raise ConvertError(f"{path}: no such folder: {path.parent}")
        if not path.exists():
            if not os.access(path.parent, os.W_OK):
                raise ConvertError(f"{path.parent}: no permission to write there")
            continue
        if not path.is_file():
            raise ConvertError(f"{path}: is a {'folder' if path.is_dir() else 'device'}, want the name of a file")
        # what an earlier run has linked to the same file of the input is linked to it again
        again = sources[i] if 0 < i < len(sources) else None
        for file in _files([*sources, *inputs]):
            if file != again and path.samefile(file):
                what = "the input itself" if file in sources[:1] else f"a file of the input, {file}"
                raise ConvertError(f"{path}: is {what}; give the output another name")
        if not force:
            raise ConvertError(f"{path}: exists; --force replaces it")
        if not os.access(path.parent, os.W_OK):
            raise ConvertError(f"{path.parent}: no permission to write there")


def _files(paths: list) -> Iterator[Path]:
    """The paths that exist, and of folders all that is in them."""
    for path in paths:
        if path.is_dir():
            yield from (file for file in path.rglob("*") if file.is_file())
        elif path.exists():
            yield path


def free_space(folder: Path) -> int:
    """Bytes, where `folder` is (or will be)."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def check_space(folder: Path, needed: int, purpose: str) -> None:
    """Raises ConvertError if less than `needed` bytes are free where `folder` is (or will be)."""
    free = free_space(folder)
    if free < needed:
        has, wants = sizes(free, needed)
        raise ConvertError(f"{folder}: {has} free, {wants} needed for {purpose}")


def sizes(free: int, needed: int) -> Tuple[str, str]:
    """Bytes as text, that never says as much is free as is needed."""
    unit, n_digits, name = (10**8, 1, "GB") if needed >= 10**10 else (10**6, 0, "MB")
    has, wants = (f"{n / 10**n_digits:,.{n_digits}f} {name}" for n in (free // unit, -(-needed // unit)))
    return has, wants


def copy_size(sources: list, target: Path) -> int:
    """Bytes that a planned copy of `sources` takes beside `target`: the first file, and the others if links do not do."""
    linked = sources[1:] if sources[0].stat().st_dev == target.parent.stat().st_dev else []
    return sum(path.stat().st_size for path in sources if path not in linked) + METADATA_SLACK


def hidden(target: Path, what: str) -> Path:
    """A temporary name beside `target`, this process's own."""
    return target.with_name(f".{target.name}.{os.getpid()}.{what}")


def write_planned(
    source: Path, target: Path, plan: Plan, profile: Optional[metadata.Profile], consume: bool = False
) -> list:
    """Writes `source` with the plan in its metadata to `target`.

    Of a split source the first file is rewritten, as target-00001-of-0000N.gguf; the others are hard links to the
    source's files where the file system can, else copies. Everything is made under temporary names in the target's
    folder and renamed when it is complete and on disk.

    Args:
        consume: `source` is a temporary file of one part, which is changed in place and renamed instead of copied.

    Returns:
        the paths that were written.

    Raises:
        ConvertError: the files could not be completed (disk full, quota, ...); nothing is left behind.
        GGUFError: the source cannot be read.
    """
    sources = model_paths(source)
    targets = target_paths(target, len(sources))
    partial = [hidden(path, "partial") for path in targets]
    try:
        for from_, to in zip(sources[1:], partial[1:]):
            _link_or_copy(from_, to)
        if consume:
            os.replace(source, partial[0])
            _plan_in_place(partial[0], plan, profile)
        else:
            _plan_copy(source, partial[0], plan, profile)
        with GGUFFile(partial[0]) as check:
            if check.get("allocmoe.version") != metadata.VERSION:
                raise GGUFError(f"{partial[0]}: the plan is not in the file that was written")
        _rename_all(partial, targets)
    except OSError as error:
        raise ConvertError(f"{target}: could not be written: {error.strerror or error}") from error
    finally:
        for path in partial:
            path.unlink(missing_ok=True)
    return targets


def write_side_file(target: Path, model: metadata.ModelPlan, plan: Plan, profile: Optional[metadata.Profile]) -> Path:
    """Writes the plan without the model to `target`, and returns it.

    Raises:
        ConvertError: the file could not be completed; nothing is left behind.
    """
    target = followed(target)
    partial = hidden(target, "partial")
    try:
        metadata.write_side_file(partial, model, plan, profile)
        with open(partial, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(partial, target)
    except OSError as error:
        raise ConvertError(f"{target}: could not be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return target


def _plan_copy(source: Path, target: Path, plan: Plan, profile: Optional[metadata.Profile]) -> None:
    with GGUFFile(source) as file:
        metadata.write(file, plan, profile)
        file.write_metadata(target)
        _copy(source, target, "ab", file.data_offset)


def _copy(source: Path, target: Path, mode: str, start: int) -> None:
    """Writes what `source` has from a byte on to `target`, down to the disk."""
    bar = progress_bar("writing the model", source.stat().st_size - start, "B", unit_scale=True)
    with bar, open(source, "rb") as data, open(target, mode) as copy:
        data.seek(start)
        while block := data.read(_BLOCK):
            bar.update(copy.write(block))
        copy.flush()
        os.fsync(copy.fileno())


def _plan_in_place(path: Path, plan: Plan, profile: Optional[metadata.Profile]) -> None:
    """Moves the tensor data to where the new metadata ends: no second copy of the model on the disk."""
    header = hidden(path, "header")
    try:
        with GGUFFile(path) as file:
            metadata.write(file, plan, profile)
            file.write_metadata(header)
            start = file.data_offset
        added = header.stat().st_size - start
        bar = progress_bar("writing the plan", path.stat().st_size - start, "B", unit_scale=True)
        with bar, open(path, "r+b") as data:
            size = data.seek(0, os.SEEK_END)
            blocks = range(start, size, _BLOCK)
            # in the order in which nothing is overwritten before it has been moved
            for begin in reversed(blocks) if added > 0 else blocks:
                data.seek(begin)
                block = data.read(min(_BLOCK, size - begin))
                data.seek(begin + added)
                bar.update(data.write(block))
            data.truncate(size + added)
            data.seek(0)
            data.write(header.read_bytes())
            data.flush()
            os.fsync(data.fileno())
    finally:
        header.unlink(missing_ok=True)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        # resolved: a link in a download cache is no file to link to
        os.link(source.resolve(), target)
    except OSError:
        _copy(source, target, "wb", 0)


def _rename_all(partial: list, targets: list) -> None:
    """Puts the files in their places, or none of them; a single file in one step.

    Of a split model the first file, which names the others, goes away first and comes last: no moment shows files of two
    models as one. What was there before is kept until then. If the process is killed meanwhile, the next run to this output
    puts that back or removes it (`put_back`).
    """
    if all(target.exists() and path.samefile(target) for path, target in zip(partial[1:], targets[1:])):
        os.replace(partial[0], targets[0])  # the others are the links that they are to be
        return
    olds = [hidden(target, "old") for target in targets]
    try:
        for target, old in zip(targets, olds):
            if target.exists():
                os.replace(target, old)
        for path, target in reversed(list(zip(partial, targets))):
            os.replace(path, target)
    except BaseException:
        for path, target, old in zip(partial, targets, olds):
            if old.exists():
                os.replace(old, target)
            elif not path.exists():
                target.unlink(missing_ok=True)
        raise
    for old in olds:
        old.unlink(missing_ok=True)


def put_back(left: list) -> None:
    """After a run was killed: the files that it had moved out of the way go back to where they were, or away if it had done its
    work, which is so when the first of the split model is not among them.

    Args:
        left: paths as `_rename_all` names them, .TARGET.PROCESS.old.
    """
    names = {path: re.sub(r"^\.|\.\d+\.old$", "", path.name) for path in left}
    unfinished = any(re.search(r"-00001-of-\d{5}\.gguf$", name) for name in names.values())
    # the first one last: until then the next run, too, sees that there is work
    for path in sorted(left, key=lambda path: names[path], reverse=True):
        if unfinished:
            os.replace(path, path.with_name(names[path]))
        else:
            path.unlink()

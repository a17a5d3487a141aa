"""How much memory there is for a model's weights."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
import sys
from typing import Iterable, Iterator, Optional

from .control_groups import group_folders


def available() -> Optional[int]:
    """Bytes of memory that this process can still have, file pages included; None where unknown.

    What the system calls available (all of it where it does not say), or what the control groups that the process is in
    leave it, if that is less.
    """
    found = read_meminfo("MemAvailable")
    if found is None:
        try:
            found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, OSError, ValueError):  # Windows
            return None
    return min([found, *_group_rooms(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])


def is_beyond(files: Iterable[Path]) -> bool:
    """Whether files are larger together than the memory that this process can still have."""
    free = available()
    return free is not None and sum(os.path.getsize(path) for path in files) > free


def peak() -> Optional[int]:
    """Bytes of memory that this process has had at most, file pages included; None where unknown."""
    found = _read_kilobytes(Path("/proc/self/status"), "VmHWM")
    if found is not None:
        return found
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak() -> None:
    """From now on `peak` says what the process has had at most since; without effect but on Linux."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def read_meminfo(key: str) -> Optional[int]:
    """Bytes under a key of Linux's /proc/meminfo; None elsewhere."""
    return _read_kilobytes(Path("/proc/meminfo"), key)


def _read_kilobytes(path: Path, key: str) -> Optional[int]:
    try:
        for line in path.read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _group_rooms(membership: Path, root: Path) -> Iterator[int]:
    """Bytes under their limits that the control groups in a /proc/*/cgroup still have, of version 1 or 2, and the groups
    above them. File pages count as free: they are dropped before a limit is enforced."""
    for folder, version_1 in group_folders(membership, root, "memory"):
        limit = _read_number(folder / ("memory.limit_in_bytes" if version_1 else "memory.max"))
        if limit is not None:  # version 2 says "max" where there is none
            used = _read_number(folder / ("memory.usage_in_bytes" if version_1 else "memory.current")) or 0
            pages = _file_pages(folder / "memory.stat", "total_" if version_1 else "")
            yield max(limit - max(used - pages, 0), 0)


def _read_number(path: Path) -> Optional[int]:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _file_pages(path: Path, prefix: str) -> int:
    """Bytes of file pages in a control group's memory.stat, those of the groups below it included."""
    try:
        counts = dict(line.split() for line in path.read_text().splitlines())
        return sum(int(counts.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
    except (OSError, ValueError):
        return 0

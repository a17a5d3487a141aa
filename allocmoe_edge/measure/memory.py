"""How much memory there is for a model's weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Iterator, Optional


def available() -> Optional[int]:
    """Bytes of memory that this process can still have, file pages included; None where unknown.

    What the system calls available (all of it where it does not say), or the lowest limit of the control groups that the
    process is in, if that is less.
    """
    found = read_meminfo("MemAvailable")
    if found is None:
        try:
            found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, OSError, ValueError):  # Windows
            return None
    return min([found, *_group_limits(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])


def read_meminfo(key: str) -> Optional[int]:
    """Bytes under a key of Linux's /proc/meminfo; None elsewhere."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _group_limits(membership: Path, root: Path) -> Iterator[int]:
    """Memory limits in bytes of the control groups in a /proc/*/cgroup, of version 1 or 2, and of the groups above them."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        # in a container the path may be the host's, and the container's own group what is mounted as the root
        top = root / controllers
        own = top / group.lstrip("/")
        for folder in (own, *own.parents):
            try:
                text = (folder / ("memory.limit_in_bytes" if controllers else "memory.max")).read_text().strip()
            except OSError:
                text = ""
            if text.isdecimal():  # version 2 says "max" where there is none
                yield int(text)
            if folder == top:
                break

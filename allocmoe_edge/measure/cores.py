"""How many cores this process can use: the number of threads that computing goes fastest with."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Iterator

from .control_groups import group_folders


def physical_cores() -> int:
    """Cores that this process may run on, at least 1; those that two processors share count once.

    On Linux the processors that the process may be scheduled on, and of CPUs with two kinds of cores the faster ones alone,
    as llama.cpp counts; no more than its control groups' share of CPU time. Elsewhere processors up to 4, and half of them
    where there are more.
    """
    try:
        allowed = os.sched_getaffinity(0)
    except AttributeError:  # macOS, Windows
        found = os.cpu_count() or 1
        return found if found <= 4 else found // 2
    fast = _processors(Path("/sys/devices/cpu_core/cpus"))
    cores = _cores(allowed & fast or allowed, Path("/sys/devices/system/cpu"))
    limit = min(_group_limits(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")), default=math.inf)
    return max(1, min(cores, math.ceil(limit) if limit < cores else cores))


def _cores(processors: set, root: Path) -> int:
    """Distinct sets of processors that share a core; a processor that the system says nothing of has its own."""
    siblings = set()
    for processor in processors:
        try:
            siblings.add((root / f"cpu{processor}" / "topology" / "thread_siblings_list").read_text().strip())
        except OSError:
            siblings.add(str(processor))
    return len(siblings)


def _processors(path: Path) -> set:
    """The numbers in a list like "0-3,8"; none where there is no such file."""
    try:
        parts = path.read_text().strip().split(",")
    except OSError:
        return set()
    ranges = [part.split("-") for part in parts if part]
    return {number for ends in ranges for number in range(int(ends[0]), int(ends[-1]) + 1)}


def _group_limits(membership: Path, root: Path) -> Iterator[float]:
    """Shares of CPU time, in processors, that the control groups in a /proc/*/cgroup and those above them may have."""
    for folder, version_1 in group_folders(membership, root, "cpu"):
        try:
            if version_1:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            else:
                quota, period = (folder / "cpu.max").read_text().split()
            if float(quota) > 0:  # version 1 says -1 where there is none, version 2 "max"
                yield float(quota) / float(period)
        except (OSError, ValueError, ZeroDivisionError):
            pass

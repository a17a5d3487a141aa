"""Which control groups of Linux a process is in."""

from __future__ import annotations

from pathlib import Path
from typing import Iterator, Tuple


def group_folders(membership: Path, root: Path, controller: str) -> Iterator[Tuple[Path, bool]]:
    """The folders of the groups in a /proc/*/cgroup that have a controller ("cpu", "memory"), and of the groups above them.

    Args:
        membership: the file /proc/*/cgroup; where there is none, nothing is found.
        root: where control groups are mounted.

    Yields:
        (folder, whether its files are those of version 1).
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        # in a container the path may be the host's, and the container's own group what is mounted as the root
        top = root / controllers
        own = top / group.lstrip("/")
        for folder in (own, *own.parents):
            yield folder, bool(controllers)
            if folder == top:
                break

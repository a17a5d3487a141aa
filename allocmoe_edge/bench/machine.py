"""What the figures were measured on: CPU, memory bandwidth, energy counters, load by others."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
import platform
import threading
import time
from typing import Optional

import numpy as np

from ..measure.memory import available, read_meminfo

_BANDWIDTH_BYTES = 1 << 30
_BANDWIDTH_PASSES = 8


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def describe() -> dict:
    """Hardware and system in words and numbers; load_average is that of the last minute, None where unknown."""
    return {
        "cpu": cpu_name(),
        "logical_cpus": os.cpu_count(),
        "memory_bytes": read_meminfo("MemTotal"),
        "system": platform.platform(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def read_bandwidth(n_threads: int) -> float:
    """Bytes per second that n_threads threads read from memory together: the best of 8 passes.

    Each thread compares two halves of its part of 1 GiB (a quarter of the memory that is left if that is less), far more than
    caches hold, with the C library's memcmp: vectorised, nothing but reads, and without Python's global lock.
    """
    memcmp = ctypes.CDLL("msvcrt" if os.name == "nt" else None).memcmp
    memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    free = available()
    size = _BANDWIDTH_BYTES if free is None else min(_BANDWIDTH_BYTES, max(free // 4, n_threads << 20))
    half = size // n_threads // 2
    data = np.ones(2 * half * n_threads, np.uint8)  # written, so that it is memory and not a page of zeros
    barrier = threading.Barrier(n_threads + 1)

    def read(start: int) -> None:
        for _ in range(_BANDWIDTH_PASSES):
            barrier.wait()
            memcmp(start, start + half, half)
            barrier.wait()

    starts = [data.ctypes.data + 2 * half * i for i in range(n_threads)]
    threads = [threading.Thread(target=read, args=(start,), daemon=True) for start in starts]
    for thread in threads:
        thread.start()
    seconds = []
    for _ in range(_BANDWIDTH_PASSES):
        barrier.wait()
        start = time.perf_counter()
        barrier.wait()
        seconds.append(time.perf_counter() - start)
    return data.nbytes / min(seconds)


class EnergyCounter:
    """The CPU packages' energy counters (RAPL), where the system has them and lets this user read them."""

    def __init__(self, root: str = "/sys/class/powercap"):
        self._zones = []
        for zone in sorted(Path(root).glob("intel-rapl:*")):
            if zone.name.count(":") != 1:  # intel-rapl:0:0 is a part of intel-rapl:0
                continue
            try:
                self._zones.append((zone / "energy_uj", int((zone / "max_energy_range_uj").read_text())))
                int((zone / "energy_uj").read_text())
            except (OSError, ValueError):
                self._zones = []
                return

    @property
    def available(self) -> bool:
        return bool(self._zones)

    def read(self) -> list:
        return [int(path.read_text()) for path, _ in self._zones]

    def joules(self, before: list, after: list) -> float:
        """Energy between two `read`s less than one overflow (minutes at least) apart."""
        pairs = zip(before, after, self._zones)
        return sum(b - a if b >= a else b - a + wrap for a, b, (_, wrap) in pairs) * 1e-6


def stolen_time() -> Optional[tuple]:
    """(stolen, total) CPU time since boot in ticks: what other guests of a virtual machine's host took."""
    try:
        ticks = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except OSError:
        return None
    return ticks[7], sum(ticks)

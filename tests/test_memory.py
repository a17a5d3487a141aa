"""How much memory is left: the system's figure, and what control groups allow."""

import os
import subprocess
import sys

from allocmoe_edge.measure import memory
import pytest


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory():
    """256 MB in a new process, which has next to nothing before, and keeps none of it; allocmoe-bench counts what it measures alone."""
    code = (
        "from allocmoe_edge.measure.memory import forget_peak, peak; a = peak(); x = b'x' * (256 << 20); del x;"
        "b = peak(); forget_peak(); print(a, b, peak())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after, forgotten = map(int, done.stdout.split())
    assert 10 << 20 < before < 1 << 30 and 200 << 20 < after - before < 300 << 20
    if os.access("/proc/self/clear_refs", os.W_OK):
        assert forgotten < before + (50 << 20)


def test_peak_memory_without_proc(monkeypatch):
    pytest.importorskip("resource", reason="there is none on Windows")
    here = memory.peak()
    monkeypatch.setattr(memory, "_read_kilobytes", lambda *_: None)
    assert memory.peak() > 0.9 * here  # it counts what the process that began this one had, too


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_available_memory():
    found = memory.available()
    assert 1 << 20 < found <= memory.read_meminfo("MemTotal")


@pytest.mark.parametrize(
    "membership, files, rooms",
    [
        ("0::/a/b\n", {"a/b/memory.max": "max", "a/memory.max": "1000"}, [1000]),
        ("0::/a\n", {"a/memory.max": "7", "memory.max": "9"}, [7, 9]),
        ("0::/not/ours\n", {"memory.max": "5000"}, [5000]),  # a container that sees the host's path
        ("3:cpu:/a\n2:memory:/a\n0::/\n", {"memory/a/memory.limit_in_bytes": "10", "cpu/a/memory.max": "1"}, [10]),
        ("3:cpu:/\n", {"memory/memory.limit_in_bytes": "10"}, []),
    ],
)
def test_limits_of_control_groups(tmp_path, membership, files, rooms):
    write(tmp_path, membership, files)
    assert list(memory._group_rooms(tmp_path / "cgroup", tmp_path / "root")) == rooms
    assert list(memory._group_rooms(tmp_path / "no such file", tmp_path / "root")) == []


def write(folder, membership, files):
    (folder / "cgroup").write_text(membership)
    for name, text in files.items():
        (folder / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "root" / name).write_text(text + "\n")


V2, V1 = ("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")


@pytest.mark.parametrize(
    "membership, folder, names, stat",
    [
        ("0::/a\n", "a", V2, "anon 600\nfile 250\nshmem 50\nactive_file 120\ninactive_file 80"),
        ("2:memory:/a\n", "memory/a", V1, "active_file 1\ntotal_active_file 120\ntotal_inactive_file 80"),
        ("0::/a\n", "a", V2, "damaged"),
    ],
)
def test_what_a_control_group_uses_is_not_free(tmp_path, membership, folder, names, stat):
    """But for file pages, which it gives back."""
    pages = 0 if stat == "damaged" else 200
    files = {f"{folder}/{names[0]}": "1000", f"{folder}/{names[1]}": "850", f"{folder}/memory.stat": stat}
    write(tmp_path, membership, files)
    assert list(memory._group_rooms(tmp_path / "cgroup", tmp_path / "root")) == [1000 - 850 + pages]
    write(tmp_path, membership, {f"{folder}/{names[1]}": "1300"})  # a limit that was lowered since
    assert list(memory._group_rooms(tmp_path / "cgroup", tmp_path / "root")) == [0]

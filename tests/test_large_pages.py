"""Repacked weights ask for pages of 2 MB."""

import ctypes
import mmap
from pathlib import Path
import re
import sys

from allocmoe_edge._native import LIB_DIR
import pytest

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
PAGE = 2 << 20


def in_large_pages(first: int) -> int:
    """KB of the mapping that begins at an address."""
    mappings = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    [found] = [
        of for of in mappings if of and int(of.split("-")[0], 16) <= first < int(of.split("-")[1].split()[0], 16)
    ]
    return int(re.search(r"AnonHugePages: +(\d+)", found)[1])


@pytest.mark.skipif(sys.platform != "linux" or not ENABLED.exists(), reason="needs Linux with transparent huge pages")
@pytest.mark.skipif(ENABLED.exists() and "[never]" in ENABLED.read_text(), reason="huge pages are off")
@pytest.mark.parametrize("size, large", [(300 << 20, True), (100 << 20, False)])
def test_large_buffers_alone_get_large_pages(size, large):
    if not large and "[always]" in ENABLED.read_text():
        pytest.skip("every buffer gets them")
    library = ctypes.CDLL(str(LIB_DIR / "libggml-cpu.so"))
    library.allocmoe_ask_for_large_pages.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        pointer = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        library.allocmoe_ask_for_large_pages(pointer + 64, size - 64)
        start = -(-(pointer + 64) // PAGE) * PAGE - pointer
        memory[start : start + 4 * PAGE] = b"\1" * 4 * PAGE
        assert (in_large_pages(pointer + start) > 0) == large

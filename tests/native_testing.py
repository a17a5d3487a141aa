"""libllama with the functions that only tests call, which native/allocmoe-testing.h declares."""

from allocmoe_edge._native import cdef_of, ffi, libllama
from conftest import ROOT

__all__ = ["ffi", "libllama"]

ffi.cdef(cdef_of(ROOT / "native" / "allocmoe-testing.h"))

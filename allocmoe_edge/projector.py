"""Files of projectors (mmproj), by which a model sees and hears: looked at before llama.cpp loads one."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Union

import numpy as np

from ._native import LIB_DIR, _library_path
from .gguf_file import GGUFError, GGUFFile

_TRY = """
import ctypes, os, sys
ggml, mtmd = (ctypes.CDLL(path) for path in sys.argv[1:3])
if ggml.ggml_backend_reg_count() == 0:
    ggml.ggml_backend_load_all_from_path(os.fsencode(sys.argv[3]))
mtmd.allocmoe_try_projector(os.fsencode(sys.argv[4]))
"""
_MOST_SECONDS = 60


def _python() -> Union[str, None]:
    """What starts Python, None in a program that has it inside: started again, that would do whatever it is for."""
    name = os.path.basename(sys.executable or "").lower()
    return None if getattr(sys, "frozen", False) or not name.startswith(("python", "pypy")) else sys.executable


def check(path: Union[str, os.PathLike]) -> None:
    """Refuses what would end the process in llama.cpp, or be computed with to no end.

    What its loader asserts is an error in this process already. For the rest a process of its own builds the projector's
    graphs, without its weights: some 50 ms. Not where this program is not Python's own: frozen, or one that embeds Python.

    Raises:
        GGUFError: there is no such file, it is damaged, truncated or no projector, llama.cpp crashes on it, or that process
            failed in another way.
    """
    with GGUFFile(path) as file:
        names = [name for name in file.keys() if name.startswith("clip.")]
        if not names:
            raise GGUFError(
                f"{path}: no projector: its architecture is {file.get('general.architecture')!r}, and it has no key clip.*"
            )
        for name in names:
            value = file.get(name)
            numbers = np.atleast_1d(value) if isinstance(value, (float, np.ndarray)) else np.empty(0)
            if numbers.dtype.kind == "f" and not np.isfinite(numbers).all():
                raise GGUFError(f"{path}: {name} is {value}, wanted finite numbers")
            if name.endswith("epsilon") and isinstance(value, float) and not 0 <= value < math.inf:
                raise GGUFError(f"{path}: {name} is {value}, wanted at least 0")
    python = _python()
    if python is None:
        return
    libraries = [str(_library_path(LIB_DIR, name)) for name in ("ggml", "mtmd")]
    command = [python, "-I", "-S", "-c", _TRY, *libraries, str(LIB_DIR), os.fsdecode(path)]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=_MOST_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise GGUFError(f"{path}: llama.cpp does not come to an end with this projector") from None
    except OSError as error:
        raise GGUFError(f"{path}: cannot be tried, {python} does not start: {error.strerror}") from None
    if done.returncode < 0 or done.returncode >= 0xC0000000:  # a signal, or an exception of Windows
        raise GGUFError(f"{path}: llama.cpp crashes on this projector (exit status {done.returncode})")
    if done.returncode:
        lines = done.stderr.decode(errors="replace").split("\n")
        said = next((line.strip() for line in reversed(lines) if line.strip()), f"exit status {done.returncode}")
        raise GGUFError(f"{path}: cannot be tried: {said}")

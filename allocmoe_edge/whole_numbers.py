"""Whole numbers from outside: native code would cut off what does not fit, or end the process."""

from __future__ import annotations

from typing import Any, Optional

import numpy as np

from .plan import shown

MOST_INT32 = 2**31 - 1
# GGML_MAX_N_THREADS
MOST_THREADS = 512


def whole(name: str, value: Any, least: int, most: int = MOST_INT32, want: Optional[str] = None) -> int:
    """The value, a Python or numpy integer from `least` to `most`, as Python's. Raises ValueError.

    Args:
        name, want: as the error calls it, and what is wanted.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not least <= value <= most:
        raise ValueError(f"{name}: found {shown(value)}, want {want or f'a whole number from {least} to {most}'}")
    return int(value)

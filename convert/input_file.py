"""The inputs of all layers' experts over a text, in a file that nobody sees: in memory they could be a fifth of a model."""

from __future__ import annotations

import os
from pathlib import Path
import tempfile
from typing import Iterator, Optional

import numpy as np

from . import ConvertError

_LARGEST = np.finfo(np.float16).max


class InputFile:
    """Inputs of layers, window by window, in float16; gone when closed, or with the process.

    Use as a context manager. Reading may go on in several threads.

    Raises:
        ConvertError: there is no space left, or the file cannot be written or read.
    """

    def __init__(self, folder: Optional[Path], layers: list, n_ctx: int, n_embd: int):
        """folder: where it takes its space, by default where temporary files go. layers: those that are written, in their order."""
        self._layers, self._shape = {il: i for i, il in enumerate(layers)}, (n_ctx, n_embd)
        self._n_bytes = 2 * n_ctx * n_embd
        self._folder, self._n_written = folder or Path(tempfile.gettempdir()), 0
        try:
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)
        except OSError as error:
            raise self._failed(error) from None

    def append(self, x: np.ndarray) -> None:
        """x: float32 [n_ctx, n_embd], of the next layer, after the last one of the first layer of the next window."""
        data = memoryview(np.clip(x, -_LARGEST, _LARGEST).astype(np.float16)).cast("B")
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            raise self._failed(error) from None
        self._n_written += 1

    def windows(self, il: int) -> Iterator[np.ndarray]:
        """float32 [n_ctx, n_embd] of a layer, window by window, rounded to float16."""
        for i in range(self._layers[il], self._n_written, len(self._layers)):
            try:
                data = os.pread(self._file.fileno(), self._n_bytes, i * self._n_bytes)
            except OSError as error:
                raise self._failed(error) from None
            yield np.frombuffer(data, np.float16).reshape(self._shape).astype(np.float32)

    def _failed(self, error: OSError) -> ConvertError:
        return ConvertError(f"{self._folder}: a temporary file of the experts' inputs: {error.strerror}")

    def __enter__(self) -> InputFile:
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

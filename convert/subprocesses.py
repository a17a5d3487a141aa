"""Runs a long native job in a process of its own, so that Ctrl-C stops it at once and a crash or the kernel's
out-of-memory killer takes only that process down."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
import re
import signal
import subprocess
import tempfile
import threading
from typing import Optional

from .progress import progress_bar

# what is kept of the output: enough for any traceback
_LOG_BYTES = 1 << 16


class ChildFailed(Exception):
    """log: the end of what the process printed. out_of_memory: it was killed, or says that memory ran out. out_of_disk: it
    says that it could not write."""

    def __init__(self, returncode: int, log: str):
        super().__init__(returncode)
        self.returncode = returncode
        self.log = log.strip()
        killed = os.name == "posix" and returncode == -signal.SIGKILL
        words = ("MemoryError", "bad_alloc", "not enough memory", "can't allocate memory", "Cannot allocate memory")
        self.out_of_memory = killed or any(word in self.log for word in words)
        # the last two are NumPy's and the C++ library's way to say so
        disk_words = ("No space left", "File too large", "requested and", "iostream error")
        self.out_of_disk = any(word in self.log for word in disk_words)

        self.crashed = os.name == "posix" and returncode < 0 and not killed

    @property
    def reason(self) -> str:
        """Why it failed, in one line."""
        if self.out_of_memory:
            return "out of memory"
        if self.out_of_disk:
            return "out of disk, or of what you may write on it"
        lines = self.log.splitlines()
        if self.crashed:
            # ggml's own words, if it has found something wrong itself
            words = [match[1] for match in map(re.compile(r"\S+\.\w+:\d+: (.+)").match, lines) if match]
            return f"llama.cpp crashed: {words[0] if words else signal.strsignal(-self.returncode)}"
        return lines[-1].strip() if lines else "no message"


@contextlib.contextmanager
def _signals_wait():
    """Signals that a handler answers take effect when the block is left: in the midst of Popen, a handler's exception would
    leave a process behind that nobody knows."""
    arrived, handlers = [], {}
    if threading.current_thread() is threading.main_thread():
        numbers = (getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP"))
        handlers = {number: signal.getsignal(number) for number in numbers if number is not None}
        handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in handlers:
        signal.signal(number, lambda number, _frame: arrived.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in arrived:
            signal.raise_signal(number)


def run(command: list, written: Path, expected: int, desc: str, env: Optional[dict] = None) -> str:
    """Runs `command` to its end; shows how far the file that it writes has grown.

    Args:
        written: the file that the process writes.
        expected: its estimated size in bytes.
        env: variables to add to the environment.

    Returns:
        the end of what the process printed.

    Raises:
        ChildFailed: the process did not exit with status 0.
    """
    # a debugger that ggml would start in a process that is about to end says nothing to a user
    env = {**os.environ, "GGML_NO_BACKTRACE": "1", **(env or {})}
    with tempfile.TemporaryFile() as log:
        process = None
        try:
            with _signals_wait():
                process = subprocess.Popen(
                    list(map(str, command)),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=env,
                )
            with progress_bar(desc, expected, "B", unit_scale=True) as bar:
                while process.poll() is None:
                    try:
                        process.wait(0.2)
                    except subprocess.TimeoutExpired:
                        size = written.stat().st_size if written.exists() else 0
                        bar.total = max(expected, size)
                        bar.update(size - bar.n)
        finally:
            # only if we are being stopped: it holds nothing that it would have to put in order
            if process is not None and process.poll() is None:
                process.kill()
                process.wait()
        log.seek(max(0, log.seek(0, os.SEEK_END) - _LOG_BYTES))
        text = log.read().decode("utf-8", errors="replace")
    if process.returncode:
        raise ChildFailed(process.returncode, text)
    return text

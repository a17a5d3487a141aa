"""What a conversion says while it works: lines, and on a terminal how far it is; nothing but lines in a pipe."""

from __future__ import annotations

import contextlib
import sys
import threading
from typing import Iterator

from tqdm import tqdm


def say(line: str) -> None:
    """A line for the user, on stderr."""
    print(line, file=sys.stderr, flush=True)


def progress_bar(what: str, total: float, unit: str, **options) -> tqdm:
    """A bar, on a terminal, that goes when it is done; what takes more than two seconds has one. Options are tqdm's."""
    return tqdm(total=total, desc=what, unit=unit, disable=None, **{"leave": False, **options})


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Counts the seconds, on a terminal, of work that cannot say how far it is."""
    done = threading.Event()
    with progress_bar(what, 0, "s", bar_format="{desc}: {elapsed}") as bar:

        def count() -> None:
            while not done.wait(1.0):
                bar.refresh()

        counter = threading.Thread(target=count, daemon=True)
        if not bar.disable:
            counter.start()
        try:
            yield
        finally:
            done.set()
            if counter.is_alive():
                counter.join()

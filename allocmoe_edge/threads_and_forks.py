"""One model for several threads, in turn, and in the child of a fork."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from typing import Any, Callable, ContextManager, Generator, Protocol
import weakref


class Forkable(Protocol):
    def forked(self) -> None:
        """Called in the child after a fork."""


def in_turn(method: Callable) -> Callable:
    """A method of an object that one thread may work with at a time: it waits for the object's lock, `_turn`."""

    @functools.wraps(method)
    def waiting(self, *args, **kwargs):
        with self._turn:
            return method(self, *args, **kwargs)

    return waiting


def turns(lock: ContextManager, steps: Generator) -> Generator:
    """The generator `steps`, each step with the lock held; in between, and where nobody reads on, others have it."""
    sent = None
    try:
        while True:
            with lock:
                try:
                    value = steps.send(sent)
                except StopIteration:
                    return
            sent = yield value
    finally:
        with lock:
            steps.close()


_living: Any = weakref.WeakSet()


def keep_over_forks(model: Forkable) -> None:
    """From now on `model` is told, in the child, of a fork."""
    _living.add(model)


def _before_fork() -> None:
    # a child has none of the threads that GCC's OpenMP keeps waiting, and would wait for them: it makes new ones after this
    with contextlib.suppress(OSError, AttributeError):  # there is none, or an old one
        loaded = ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD)
        loaded.omp_pause_resource_all(_OMP_PAUSE_SOFT)


def _after_fork() -> None:
    for model in list(_living):
        model.forked()


_OMP_PAUSE_SOFT = 1
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_child=_after_fork)

"""The command allocmoe-bench: what a budget buys on this machine."""

from ..command import CommandError


class BenchError(CommandError):
    """The measurement cannot be made as asked; the message says why."""

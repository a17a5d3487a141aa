"""The command allocmoe-bench: what a budget buys on this machine."""


class BenchError(Exception):
    """The measurement cannot be made as asked; the message says why."""

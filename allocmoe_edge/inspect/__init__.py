"""allocmoe-inspect: shows what a GGUF file holds, what its plan buys, and how well a model suits expert offloading."""

from ..command import CommandError


class InspectError(CommandError):
    """What was asked for cannot be shown, drawn or measured."""

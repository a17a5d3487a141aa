"""allocmoe-convert: profiles a Mixture-of-Experts model and writes a plan for its expert activations."""

from allocmoe_edge.command import CommandError


class ConvertError(CommandError):
    """Something about the input, the output or the calibration text keeps the conversion from being done."""


class CalibrationError(Exception):
    """What a model gives on a text is nothing to calibrate on; the message says why.

    finite: false where the model computes NaN or infinity.
    """

    def __init__(self, reason: str, finite: bool = True):
        super().__init__(reason)
        self.finite = finite

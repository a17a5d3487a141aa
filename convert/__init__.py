"""allocmoe-convert: profiles a Mixture-of-Experts model and writes a plan for its expert activations."""


class ConvertError(Exception):
    """Something about the input, the output or the calibration text keeps the conversion from being done."""

"""Inputs of the experts in a temporary file: what was written is read, and a full disk is an error that says so."""

import resource

from allocmoe_edge.convert import ConvertError
from allocmoe_edge.convert.input_file import InputFile
import numpy as np
import pytest


def test_layers_are_read_as_they_were_written(tmp_path):
    """Three windows of two layers of four; float16 has 11 bits, and ends at 65,504."""
    windows = np.random.default_rng(0).standard_normal((3, 2, 8, 32)).astype(np.float32)
    windows[1, 1, 2, 3] = -1e6
    with InputFile(tmp_path, [1, 3], 8, 32) as inputs:
        for window in windows:
            for layer in window:
                inputs.append(layer)
        assert not list(tmp_path.iterdir())
        for position, il in enumerate((1, 3)):
            np.testing.assert_allclose(
                np.stack(list(inputs.windows(il))), windows[:, position].clip(-65504, 65504), rtol=2**-11, atol=1e-7
            )


def test_no_space_is_said_and_leaves_nothing(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with InputFile(tmp_path, [0], 64, 64) as inputs:
        inputs.append(np.ones((64, 64), np.float32))
        resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, hard))
        try:
            with pytest.raises(ConvertError, match="temporary file of the experts' inputs: File too large"):
                inputs.append(np.ones((64, 64), np.float32))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_takes_no_files(tmp_path):
    with pytest.raises(ConvertError, match="missing: a temporary file .* No such file"):
        InputFile(tmp_path / "missing", [0], 8, 8)

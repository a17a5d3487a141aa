"""The patched CUDA files compile where nvcc is; no GPU is needed. Minutes: pytest -m slow."""

import subprocess
import sys

from conftest import ROOT
import pytest


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["75", "90"])
def test_touched_cuda_files_compile_without_a_warning_of_ours(arch):
    command = [sys.executable, str(ROOT / "native" / "check_cuda.py"), "--arch", arch]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 3:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout + done.stderr

"""The CPU's own matrix kernels, in mul_mat_test.cpp: every type and layout, against double precision."""

import os
from pathlib import Path
import shutil
import subprocess

from allocmoe_edge._native import BUILD_DIR, LIB_DIR, _library_path
import pytest

SOURCE = Path(__file__).parent / "native" / "mul_mat_test.cpp"


def test_every_type_and_layout(tmp_path):
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if not compiler:
        pytest.skip("needs a C++ compiler: CXX, or c++ on the PATH")
    try:
        libraries = [str(_library_path(LIB_DIR, name)) for name in ("ggml-cpu", "ggml-base")]
    except ImportError:
        pytest.skip("a portable build: the CPU backend is not a library to link with")
    program = tmp_path / "mul_mat_test"
    command = [
        compiler,
        "-std=c++17",
        "-O2",
        f"-I{BUILD_DIR / 'include'}",
        str(SOURCE),
        *libraries,
        f"-Wl,-rpath,{LIB_DIR}",
    ]
    subprocess.run([*command, "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr

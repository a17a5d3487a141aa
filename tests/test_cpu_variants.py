"""tests/cpu_variants.py runs tests, and the programs that they start, with the installed package and the variant's libraries."""

import os
import shutil

from allocmoe_edge._native import LIB_DIR
from conftest import ROOT
import cpu_variants
import pytest

TEST = """
import subprocess, sys
import allocmoe_edge
from allocmoe_edge._native import LIB_DIR

def test_same_package():
    program = "import allocmoe_edge; from allocmoe_edge._native import LIB_DIR; print(allocmoe_edge.__file__, LIB_DIR)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout
    assert found == f"{allocmoe_edge.__file__} {LIB_DIR}\\n"
"""


@pytest.mark.skipif(not (LIB_DIR / "libggml-cpu.so").is_file(), reason="a build with variants, or for another system")
def test_programs_that_tests_start(tmp_path, monkeypatch):
    """They took the checkout's package, which stands in the folder where tests are started."""
    libraries = tmp_path / "lib"
    libraries.mkdir()
    for file in LIB_DIR.glob("*.so"):
        shutil.copy(file, libraries / file.name.replace("libggml-cpu", "libggml-cpu-here"))
    (tmp_path / "test_it.py").write_text(TEST)
    monkeypatch.chdir(ROOT)
    tests = os.path.relpath(tmp_path / "test_it.py")
    passed, last_line = cpu_variants.run(libraries, libraries / "libggml-cpu-here.so", [f"{tests}::test_same_package"])
    assert passed and last_line.startswith("1 passed"), last_line

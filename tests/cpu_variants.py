#!/usr/bin/env python3
"""Runs tests under each variant of the CPU backend that this machine can execute, and looks for our kernels in all of them.

    python tests/cpu_variants.py FOLDER [--only haswell,zen4] tests/test_mul_mat.py ...

FOLDER holds the libraries of a build for any CPU of the platform: allocmoe_edge/lib of an installed wheel, see docs/install.md.
There the best variant is chosen at load; here each is the only one.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
import subprocess
import sys
import tempfile

KERNELS = (
    "allocmoe_mul_mat",
    "allocmoe_mul_mat_cache",
    "allocmoe_mul_mat_floats",
    "allocmoe_flash_attention",
    "allocmoe_transpose",
)
# in a process of its own: one variant's symbols would hide another's. 0: this CPU lacks something that it needs
LOOK = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
print(library.ggml_backend_score(), *(name for name in sys.argv[2:] if not hasattr(library, name)))
"""


def look(library: Path) -> tuple[int, list[str]]:
    """(score on this machine, 0 where it cannot be executed; the kernels that are not in it)"""
    command = [sys.executable, "-c", LOOK, str(library), *KERNELS]
    score, *missing = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return int(score), missing


def run(folder: Path, library: Path, tests: list[str]) -> tuple[bool, str]:
    """(whether the tests pass, pytest's last line), with this library as the only CPU backend."""
    with tempfile.TemporaryDirectory(dir=folder) as alone:
        for file in folder.glob("*.so"):
            if not file.name.startswith("libggml-cpu"):
                os.link(file, Path(alone, file.name))
        # under its own name for what is linked with it, and under the one that llama.cpp and the tests look for
        for name in (library.name, "libggml-cpu.so"):
            os.link(library, Path(alone, name))
        env = {**os.environ, "LLAMA_CPP_LIB_PATH": alone, "MTMD_CPP_LIB": alone}
        # not in this folder, nor with -m: programs that tests start, and pytest, would take a checkout's package for the installed one
        command = [str(Path(sys.executable).parent / "pytest"), "-q", *map(whole_path, tests)]
        process = subprocess.run(command, env=env, cwd=alone, capture_output=True, text=True)
    lines = process.stdout.splitlines() or process.stderr.splitlines() or [f"exit code {process.returncode}"]
    if process.returncode:
        print("\n".join(line for line in lines if line.startswith(("FAILED", "ERROR", "E  "))), file=sys.stderr)
    return process.returncode == 0, lines[-1]


def whole_path(test: str) -> str:
    """Of a test that pytest is to find from any folder; what is none, as an option, stays."""
    path, colons, name = test.partition("::")
    return f"{Path(path).resolve()}{colons}{name}" if Path(path).exists() else test


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", type=lambda text: text.split(","), help="these variants alone")
    parser.add_argument("tests", nargs="*", help="for pytest; without any the variants are only looked at")
    args = parser.parse_intermixed_args()
    prefix = "libggml-cpu-"
    libraries = {file.stem[len(prefix) :]: file for file in sorted(args.folder.resolve().glob(f"{prefix}*.so"))}
    unknown = set(args.only or ()) - set(libraries)
    if unknown or not libraries:
        parser.error(
            f"{args.folder}: found the variants {', '.join(libraries) or 'none'}, want {', '.join(unknown) or 'some'}"
        )
    good = True
    print("| variant | MB | our kernels | score here | tests |\n| --- | ---: | --- | ---: | --- |")
    for name, library in libraries.items():
        if args.only and name not in args.only:
            continue
        score, missing = look(library)
        passed, outcome = True, "cannot be executed here" if not score else "not run"
        if score and args.tests:
            passed, outcome = run(args.folder.resolve(), library, args.tests)
        good = good and passed and not missing
        kernels = f"without {', '.join(missing)}" if missing else "all"
        print(f"| {name} | {library.stat().st_size / 1e6:.1f} | {kernels} | {score} | {outcome} |", flush=True)
    return not good


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Compiles the CUDA files that native/patches touch, and ours with them; needs nvcc and no GPU.

    python native/check_cuda.py [--arch 75 90] [--jobs N]

Exits with 0 if all compile without a warning about our code, 1 if not, 3 if nvcc or a header is missing here.
cublas_v2.h may come from the toolkit, from a folder in CPATH, or from the package nvidia-cublas of this Python.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
import os
from pathlib import Path
import re
import shutil
import subprocess
import sys
import tempfile
import time

NATIVE = Path(__file__).resolve().parent
CUDA = "ggml/src/ggml-cuda"
# as upstream's CMakeLists.txt of the backend and of ggml
FLAGS = ["-std=c++17", "-O3", "-use_fast_math", "-extended-lambda", "-Xcompiler=-fPIC,-Wall,-Wextra"]
DEFINES = ["GGML_BACKEND_BUILD", "GGML_BACKEND_SHARED", "GGML_SHARED"]
DEFINES += ["GGML_CUDA_USE_GRAPHS", "GGML_CUDA_PEER_MAX_BATCH_SIZE=128"]


# warnings in our files, or about our names
OURS = re.compile(r"allocmoe-[a-z-]+\.(cuh|h)\b.*warning|warning.*allocmoe_")


class Missing(Exception):
    """nvcc or a header is not there."""


def touched_files() -> list:
    """Paths below llama.cpp of the .cu files that patches touch."""
    text = "".join(path.read_text() for path in sorted((NATIVE / "patches").glob("*.patch")))
    return sorted(set(re.findall(rf"^\+\+\+ b/({CUDA}/\S+\.cu)$", text, re.M)))


def find_nvcc() -> str:
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if not nvcc:
        raise Missing("nvcc is not on the PATH, nor in /usr/local/cuda/bin")
    return nvcc


def cublas_include(nvcc: str) -> list:
    """What -I the headers of cuBLAS need; nothing where nvcc finds them by itself."""
    toolkit = Path(os.path.realpath(nvcc)).parent.parent
    named = map(Path, os.environ.get("CPATH", "").split(os.pathsep))
    known = [toolkit / "include", *toolkit.glob("targets/*/include"), *named]
    if any((folder / "cublas_v2.h").is_file() for folder in known):
        return []
    for entry in map(Path, sys.path):
        for header in entry.glob("nvidia/*/include/cublas_v2.h"):
            return [f"-I{header.parent}"]
    raise Missing("cublas_v2.h: pip install nvidia-cublas, or name its folder in CPATH")


def compile_file(command: list, source: Path, arch: str, target: Path) -> tuple:
    """(whether it compiled without a warning about our code, a line to print)"""
    start = time.perf_counter()
    gencode = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    done = subprocess.run([*command, gencode, "-c", str(source), "-o", str(target)], capture_output=True, text=True)
    ours = [line for line in (done.stdout + done.stderr).splitlines() if OURS.search(line)]
    line = f"{source.name:16} sm_{arch}  {time.perf_counter() - start:6.1f} s"
    if done.returncode:
        return False, f"{line}  failed\n{done.stderr}"
    return not ours, line + "".join(f"\n  {warning}" for warning in ours)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=["75", "90"], metavar="N", help="capabilities. Default: 75 90")
    parser.add_argument("--files", nargs="+", metavar="NAME", help="only these, e.g. mmid.cu")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="files at a time, half a GB each. Default: 1")
    args = parser.parse_args()
    try:
        nvcc = find_nvcc()
        include = cublas_include(nvcc)
    except Missing as missing:
        print(f"not checked: {missing}", file=sys.stderr)
        return 3
    done = subprocess.run([sys.executable, str(NATIVE / "prepare.py")], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return 1
    llama_cpp = Path(done.stdout.strip().splitlines()[-1])
    folders = [llama_cpp / "ggml/src", llama_cpp / "ggml/include", NATIVE]
    include += [f"-I{folder}" for folder in folders]
    command = [nvcc, *FLAGS, *(f"-D{define}" for define in DEFINES), *include]
    sources = [llama_cpp / path for path in touched_files() if not args.files or Path(path).name in args.files]
    good = bool(sources)
    with tempfile.TemporaryDirectory() as tmp, ThreadPoolExecutor(args.jobs) as pool:
        work = [(source, arch) for arch in args.arch for source in sources]
        for fine, line in pool.map(
            lambda item: compile_file(command, *item, Path(tmp) / f"{item[0].name}.{item[1]}.o"), work
        ):
            print(line, flush=True)
            good = good and fine
    print("all compile" if good else "not all compile, or not without warnings")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

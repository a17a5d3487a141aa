"""What bench/gpu.py takes to a machine without a network: wheels, and the pinned source archive in two pieces."""

from __future__ import annotations

import json
import os
from pathlib import Path
import shutil
import subprocess
import sys

NATIVE = Path(__file__).resolve().parent.parent / "native"
PIN = json.loads((NATIVE / "upstream.json").read_text())


def preparation(site: Path = NATIVE):
    """The module native/prepare.py; site: where the package patch-ng is that it needs."""
    sys.path[:0] = [str(NATIVE), str(site)]
    import prepare

    return prepare


def archive_name() -> str:
    """The archive's file name, as pip gives it."""
    return f"{PIN['name'].replace('-', '_')}-{PIN['version']}.tar.gz"


def source_tree(cache: Path) -> Path:
    """The folder of llama.cpp in a cache of native/prepare.py."""
    return cache / f"{PIN['name']}-{PIN['version']}-{PIN['sha256'][:12]}" / "vendor" / "llama.cpp"


def pack(folder: Path, python: str) -> None:
    """Fills the folder, by pip, for x86-64 Linux; python is the other machine's version, like 3.12."""
    prepare = preparation()
    folder.mkdir(parents=True, exist_ok=True)
    cache = prepare.cache_dir()
    cache.mkdir(parents=True, exist_ok=True)
    data = prepare.obtain_archive(cache).read_bytes()
    for i, piece in enumerate((data[: len(data) // 2], data[len(data) // 2 :])):
        (folder / f"{archive_name()}.{i}").write_bytes(piece)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    env = {**os.environ, "CMAKE_ARGS": "-DLLAMA_BUILD=OFF"}
    only = ["--no-deps", "--no-cache-dir", "-w", str(folder)]
    subprocess.run([*pip, "wheel", *only, prepare.PIN_NAME], check=True, env=env)
    # the rest is common, and large: pip lists what is missing there
    platform = [f"--platform=manylinux{n}_x86_64" for n in ("2014", "_2_17", "_2_28", "_2_27")]
    few = ["cffi", "pycparser", "diskcache", "gguf", "patch-ng"]
    command = [*pip, "download", "--no-deps", "--only-binary=:all:", f"--python-version={python}", *platform]
    subprocess.run([*command, "-d", str(folder), *few], check=True)


def unpack(folder: Path, target: Path) -> bool:
    """Copies pieces of the archive from `folder` to `target`, joins them once both are there; whether they are."""
    pieces = [target / f"{archive_name()}.{i}" for i in range(2)]
    for piece in pieces:
        if (folder / piece.name).is_file():
            shutil.copyfile(folder / piece.name, piece)
    if not all(piece.is_file() for piece in pieces):
        return False
    (target / archive_name()).write_bytes(b"".join(piece.read_bytes() for piece in pieces))
    return True

#!/usr/bin/env python3
"""Gets the pinned upstream source, verifies it, unpacks it into build/upstream, applies our patches and adds our shaders.

CMake runs this at configure time and reads the last line it prints: the folder of llama.cpp. By hand:

    python native/prepare.py

The archive comes from pip (`pip download`, with the user's own pip configuration) unless
ALLOCMOE_UPSTREAM_ARCHIVE names a local copy, and is kept in allocmoe-edge in XDG_CACHE_HOME or ~/.cache. Where
ALLOCMOE_CACHE_DIR names a folder, it is kept and unpacked there.

Running it again is cheap and safe: every file that a patch touches is computed anew from the archive and
written only if it differs, so that an edited patch rebuilds just what it changes.
"""

import hashlib
import json
import os
from pathlib import Path
import shutil
import subprocess
import sys
import tarfile
import tempfile

try:
    import patch_ng
except ImportError:
    sys.exit("native/prepare.py needs the package patch-ng: python3 -m pip install patch-ng")

NATIVE = Path(__file__).resolve().parent
PIN = json.loads((NATIVE / "upstream.json").read_text())
PIN_NAME = f"{PIN['name']}=={PIN['version']}"
LLAMA_CPP = "vendor/llama.cpp"
SHADERS = "ggml/src/ggml-vulkan/vulkan-shaders"


def cache_dir() -> Path:
    """Folder for the archive, outside the source tree."""
    if "ALLOCMOE_CACHE_DIR" in os.environ:
        return Path(os.environ["ALLOCMOE_CACHE_DIR"]).expanduser().resolve()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "allocmoe-edge"


def trees_dir() -> Path:
    """Folder for the unpacked source. Of this checkout alone: another one may have other patches, and build meanwhile."""
    return cache_dir() if "ALLOCMOE_CACHE_DIR" in os.environ else NATIVE.parent / "build" / "upstream"


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def verify(path: Path, origin: str) -> Path:
    found = sha256(path)
    if found != PIN["sha256"]:
        sys.exit(f"{origin}: sha256 is {found}, but native/upstream.json pins {PIN_NAME} to {PIN['sha256']}")
    return path


def obtain_archive(cache: Path) -> Path:
    """The pinned source archive, verified: from ALLOCMOE_UPSTREAM_ARCHIVE, the cache, or pip."""
    local = os.environ.get("ALLOCMOE_UPSTREAM_ARCHIVE")
    if local:
        if not Path(local).is_file():
            sys.exit(f"ALLOCMOE_UPSTREAM_ARCHIVE: no such file: {local}")
        return verify(Path(local), f"ALLOCMOE_UPSTREAM_ARCHIVE={local}")

    archive = cache / f"{PIN['name'].replace('-', '_')}-{PIN['version']}.tar.gz"
    if archive.is_file() and sha256(archive) == PIN["sha256"]:
        return archive

    print(f"downloading the source of {PIN_NAME} with pip", flush=True)
    with tempfile.TemporaryDirectory(dir=cache) as tmp:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
        command += ["--no-binary", PIN["name"], "--dest", tmp, PIN_NAME]
        # the archive's own build is not wanted, only its files: keep our compiler flags out of it
        env = {k: v for k, v in os.environ.items() if k not in ("CMAKE_ARGS", "SKBUILD_CMAKE_ARGS")}
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
        found = list(Path(tmp).glob("*.tar.gz"))
        if done.returncode or not found:
            sys.exit(
                f"{done.stdout}\npip could not download the source archive of {PIN_NAME}; "
                "ALLOCMOE_UPSTREAM_ARCHIVE can name a local copy of it"
            )
        os.replace(verify(found[0], f"{PIN_NAME} from pip"), archive)
    return archive


def unpack(archive: Path, trees: Path) -> Path:
    """Unpacks llama.cpp and its licence-bearing neighbours once; returns the folder of llama.cpp."""
    target = trees / f"{PIN['name']}-{PIN['version']}-{PIN['sha256'][:12]}"
    if not target.is_dir():
        trees.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=trees) as tmp:
            with tarfile.open(archive) as tar:
                # the "data" filter refuses names that leave the folder; Pythons without it are still patched ones
                extra = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
                tar.extractall(tmp, **extra)  # noqa: S202 - its hash is the pinned one
            try:
                os.replace(next(Path(tmp).iterdir()), target)
            except OSError:
                if not target.is_dir():  # as it is where another build was first
                    raise
    return target / LLAMA_CPP


def apply_patches(archive: Path, llama_cpp: Path) -> None:
    """Brings the unpacked tree to: archive + native/patches, in the order of their names, without fuzz."""
    patches = sorted((NATIVE / "patches").glob("*.patch"))
    parsed = [(path, patch_ng.fromfile(str(path))) for path in patches]
    for path, patch in parsed:
        if not patch:
            sys.exit(f"native/patches/{path.name}: not a unified diff")
    touched = {os.fsdecode(item.target).split("/", 1)[1] for _, patch in parsed for item in patch.items}

    # a tree patched earlier may hold files that no patch touches any more
    state = llama_cpp / ".allocmoe-patched"
    restore = touched | set(state.read_text().split("\n") if state.is_file() else [])
    restore.discard("")

    with tempfile.TemporaryDirectory() as tmp:
        root = Path(tmp)
        with tarfile.open(archive) as tar:
            top = tar.next().name.split("/", 1)[0]
            for name in sorted(restore):
                try:
                    source = tar.extractfile(f"{top}/{LLAMA_CPP}/{name}")
                except KeyError:
                    sys.exit(f"a patch in native/patches touches {name}, which {PIN_NAME} does not have")
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_bytes(source.read())
        for path, patch in parsed:
            if not patch.apply(strip=1, root=str(root), fuzz=False):
                sys.exit(
                    f"fatal: native/patches/{path.name} does not apply to {PIN_NAME} (sha256 {PIN['sha256'][:12]})"
                )
        # named before the files change: a run cut short is put right by the next one
        state.write_text("\n".join(sorted(restore)))
        for name in sorted(restore):
            if (llama_cpp / name).read_bytes() != (root / name).read_bytes():
                shutil.copyfile(root / name, llama_cpp / name)
    state.write_text("\n".join(sorted(touched)))


def add_shaders(llama_cpp: Path) -> None:
    """Puts our shaders beside upstream's, where its generator compiles them and its shaders include them."""
    ours = [path for pattern in ("allocmoe-*.comp", "allocmoe-*.glsl") for path in NATIVE.glob(pattern)]
    folder = llama_cpp / SHADERS
    for path in folder.glob("allocmoe-*"):
        if not (NATIVE / path.name).is_file():
            path.unlink()
    for path in ours:
        copy = folder / path.name
        if not copy.is_file() or copy.read_bytes() != path.read_bytes():
            shutil.copyfile(path, copy)


def main() -> None:
    cache = cache_dir()
    cache.mkdir(parents=True, exist_ok=True)
    archive = obtain_archive(cache)
    llama_cpp = unpack(archive, trees_dir())
    apply_patches(archive, llama_cpp)
    add_shaders(llama_cpp)
    print(llama_cpp.as_posix())


if __name__ == "__main__":
    main()

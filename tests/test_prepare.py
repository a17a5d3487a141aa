"""native/prepare.py: the pin, and patches that apply exactly or not at all."""

from importlib import metadata
import json
import os
from pathlib import Path
import re
import shutil
import subprocess
import sys

import pytest

NATIVE = Path(__file__).resolve().parent.parent / "native"
PIN = json.loads((NATIVE / "upstream.json").read_text())


def prepare(native: Path, **env) -> subprocess.CompletedProcess:
    command = [sys.executable, str(native / "prepare.py")]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env})


@pytest.fixture(scope="module")
def archive() -> Path:
    """The pinned archive: where the build keeps it, fetched by pip if it is not there any more."""
    if "ALLOCMOE_UPSTREAM_ARCHIVE" in os.environ:
        return Path(os.environ["ALLOCMOE_UPSTREAM_ARCHIVE"])
    assert prepare(NATIVE).returncode == 0
    code = "import prepare; print(prepare.obtain_archive(prepare.cache_dir()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=NATIVE, check=True)
    return Path(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def env(archive, tmp_path_factory) -> dict:
    return {"ALLOCMOE_UPSTREAM_ARCHIVE": str(archive), "ALLOCMOE_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}


@pytest.fixture()
def native(tmp_path) -> Path:
    """A copy of native/ to spoil."""
    return Path(shutil.copytree(NATIVE, tmp_path / "native"))


def test_second_run_writes_nothing(env):
    first = prepare(NATIVE, **env)
    assert first.returncode == 0, first.stderr
    tree = Path(first.stdout.split()[-1])
    assert "allocmoe_model" in (tree / "src" / "llama-model.h").read_text()
    before = {path: path.stat().st_mtime_ns for path in (tree / "src").iterdir()}
    assert prepare(NATIVE, **env).stdout == first.stdout
    assert {path: path.stat().st_mtime_ns for path in (tree / "src").iterdir()} == before


def test_two_first_runs_at_once(env, tmp_path):
    """The second one to have unpacked ended in an OSError."""
    command, env = [sys.executable, NATIVE / "prepare.py"], {**os.environ, **env, "ALLOCMOE_CACHE_DIR": str(tmp_path)}
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env) for _ in range(2)]
    (one, one_said), (other, other_said) = (run.communicate() for run in runs)
    assert one == other and [run.returncode for run in runs] == [0, 0], (one_said + other_said).decode()
    assert len([*tmp_path.iterdir()]) == 1


def test_checkouts_have_trees_of_their_own(env, native, tmp_path):
    """They shared one, which each patched anew under the other's build."""
    for path in (native / "patches").iterdir():
        path.unlink()
    names = {name: value for name, value in os.environ.items() if name != "ALLOCMOE_CACHE_DIR"}
    names |= {"ALLOCMOE_UPSTREAM_ARCHIVE": env["ALLOCMOE_UPSTREAM_ARCHIVE"], "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, native / "prepare.py"], capture_output=True, text=True, env=names)
    tree = Path(done.stdout.split()[-1])
    assert tree.is_relative_to(native.parent / "build" / "upstream"), done.stderr
    assert "allocmoe" not in (tree / "src" / "llama-model.h").read_text()
    assert not [*(tmp_path / "cache" / "allocmoe-edge").iterdir()]  # the archive was given


def test_removed_patch_is_taken_back(env, native):
    tree = Path(prepare(native, **env).stdout.split()[-1])
    patch = sorted((native / "patches").iterdir())[0]
    patch.unlink()
    assert prepare(native, **env).returncode == 0
    assert "allocmoe" not in (tree / "src" / "llama-model.h").read_text()
    assert prepare(NATIVE, **env).returncode == 0
    assert "allocmoe" in (tree / "src" / "llama-model.h").read_text()


def test_patch_that_does_not_apply_is_fatal(env, native):
    patch = native / "patches" / "01-load-plan-with-model.patch"
    spoiled = patch.read_text().replace("    llama_hparams hparams = {};", "    llama_hparams hparams = {0};")
    assert spoiled != patch.read_text()
    patch.write_text(spoiled)
    done = prepare(native, **env)
    assert done.returncode != 0
    assert "01-load-plan-with-model.patch does not apply" in done.stderr
    assert f"{PIN['name']}=={PIN['version']}" in done.stderr


def test_patch_off_by_some_lines_is_fatal(env, native):
    """Zero fuzz: the right lines in the wrong place are the wrong lines."""
    patch = native / "patches" / "01-load-plan-with-model.patch"
    moved = patch.read_text().replace("@@ -635,6 +635,", "@@ -600,6 +600,")
    assert moved != patch.read_text()
    patch.write_text(moved)
    assert prepare(native, **env).returncode != 0


def test_archive_with_another_hash_is_refused(env, tmp_path):
    (tmp_path / "other.tar.gz").write_bytes(b"not the archive")
    done = prepare(NATIVE, **{**env, "ALLOCMOE_UPSTREAM_ARCHIVE": str(tmp_path / "other.tar.gz")})
    assert done.returncode != 0
    assert PIN["sha256"] in done.stderr and "other.tar.gz" in done.stderr


def test_missing_local_archive_is_named(env, tmp_path):
    done = prepare(NATIVE, **{**env, "ALLOCMOE_UPSTREAM_ARCHIVE": str(tmp_path / "none.tar.gz")})
    assert done.returncode != 0
    assert "ALLOCMOE_UPSTREAM_ARCHIVE: no such file" in done.stderr


def test_bill_of_materials(env):
    """Names what is installed, the pinned archive, and all that it carries."""
    tree = Path(prepare(NATIVE, **env).stdout.split()[-1])
    done = subprocess.run(
        [sys.executable, NATIVE / "sbom.py"], capture_output=True, text=True, env={**os.environ, **env}
    )
    assert done.returncode == 0, done.stderr
    bill = json.loads(done.stdout)
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.5")
    found = {each["name"]: each for each in bill["components"]}
    assert found["llama.cpp"]["hashes"] == [{"alg": "SHA-256", "content": PIN["sha256"]}]
    for name in ("llama-cpp-python", "numpy", "cffi", "gguf", "tqdm", "jinja2"):
        assert found[name]["version"] == metadata.version(name)
    carried = found["llama.cpp"]["components"]
    assert all(each["licenses"] for each in carried)
    versions = {each["name"]: each.get("version", "1") for each in carried}
    assert all(re.fullmatch(r"\d+(\.\d+)*", version) for version in versions.values()), versions
    named = set(re.findall(r'"((?:hash/)?[\w-]+)/[\w.-]+\.h(?:pp)?"', (NATIVE / "sbom.py").read_text()))
    folders = {path for path in (*(tree / "vendor").iterdir(), *(tree / "vendor" / "hash").iterdir()) if path.is_dir()}
    assert named == {path.relative_to(tree / "vendor").as_posix() for path in folders} - {"hash"}

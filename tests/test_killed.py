"""A converter that is killed, or whose disk is full, at any moment: the input is as it was, the output is not there or whole, and
the same command goes on to the same file. On a tiny random model, one thread, so that a run is a second and its result exact."""

import functools
import os
from pathlib import Path
import random
import resource
import signal
import subprocess
import sys
import time

from allocmoe_edge.gguf_file import GGUFFile
import odd_models
import pytest

OPTIONS = ["--budget", "0.5", "--ctx-size", "32", "--calib-tokens", "64", "--estimate-tokens", "128", "--threads", "1"]


def command(model: Path, output: Path) -> list:
    return [sys.executable, "-m", "allocmoe_edge.convert.cli", str(model), *OPTIONS, "-o", str(output)]


def finish(model: Path, output: Path, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(command(model, output), capture_output=True, text=True, cwd="/", **kwargs)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return odd_models.write_qwen3moe(tmp_path_factory.mktemp("model") / "m.gguf")


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory) -> tuple:
    """What an undisturbed run writes, and the seconds that it takes."""
    output = tmp_path_factory.mktemp("whole") / "o.gguf"
    start = time.monotonic()
    done = finish(model, output)
    assert done.returncode == 0, done.stderr
    return output.read_bytes(), time.monotonic() - start


def check(model: Path, before: bytes, out: Path, expected: bytes) -> None:
    """After a run that has not ended well."""
    assert model.read_bytes() == before
    if (out / "o.gguf").exists():
        assert (out / "o.gguf").read_bytes() == expected


@pytest.mark.slow
def test_killed_at_random_moments(model, whole, out):
    expected, seconds = whole
    before, rng, reached = model.read_bytes(), random.Random(0), set()
    for i in range(50):
        process = subprocess.Popen(
            command(model, out / "o.gguf"), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, cwd="/"
        )
        time.sleep(seconds * (i + rng.random()) / 50)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        check(model, before, out, expected)
        reached.add(tuple(sorted(path.suffix for path in out.iterdir())))
        done = finish(model, out / "o.gguf")
        if process.returncode == 0 or (done.returncode and "exists; --force" in done.stderr):  # it was through
            assert (out / "o.gguf").exists()
        else:
            assert done.returncode == 0, done.stderr
            assert [path.name for path in out.iterdir()] == ["o.gguf"]
        assert (out / "o.gguf").read_bytes() == expected
        for path in out.iterdir():
            path.unlink()
    assert len(reached) >= 3, reached  # before there was a checkpoint, with one, with arrays


@pytest.mark.slow
def test_killed_again_and_again(model, whole, out):
    """Runs that each come a little further, until one is through."""
    expected, seconds = whole
    before = model.read_bytes()
    for i in range(40):
        process = subprocess.Popen(
            command(model, out / "o.gguf"), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, cwd="/"
        )
        try:
            process.communicate(timeout=seconds * (0.4 + i / 40))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
        check(model, before, out, expected)
        if (out / "o.gguf").exists():  # a kill may come between that and the end
            break
    assert "exists; --force" in finish(model, out / "o.gguf").stderr
    assert {path.name for path in out.iterdir()} - {"o.gguf.profile", "o.gguf.profile.arrays"} == {"o.gguf"}
    assert (out / "o.gguf").read_bytes() == expected


def limited(n_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))


@pytest.mark.slow
def test_disk_that_is_full_anywhere(model, whole, out):
    """No file may be longer than so many bytes: the checkpoint, its arrays, or the output cannot be written to the end."""
    expected, _ = whole
    before, last = model.read_bytes(), ""
    for n_bytes in (0, 10, 300, 1000, 3000, 10_000, 50_000, 300_000, len(before), len(expected) - 1):
        done = finish(model, out / "o.gguf", preexec_fn=functools.partial(limited, n_bytes))
        last = done.stderr.splitlines()[-1]
        assert done.returncode == 1 and last.startswith("allocmoe-convert: error: "), done.stderr
        assert "File too large" in last and "Traceback" not in done.stderr
        assert model.read_bytes() == before and not (out / "o.gguf").exists()
        assert all(path.name.startswith("o.gguf.profile") for path in out.iterdir()), os.listdir(out)
        if n_bytes in (300, 10_000):
            assert finish(model, out / "o.gguf").returncode == 0
            assert (out / "o.gguf").read_bytes() == expected
            (out / "o.gguf").unlink()
    done = finish(model, out / "o.gguf", preexec_fn=functools.partial(limited, len(expected)))
    assert done.returncode == 0 and (out / "o.gguf").read_bytes() == expected
    assert [path.name for path in out.iterdir()] == ["o.gguf"]


@pytest.mark.slow
def test_side_file_on_a_full_disk(model, out):
    for n_bytes in (0, 1000, 10_000):
        done = subprocess.run(
            [*command(model, out / "p.gguf"), "--plan-only"],
            capture_output=True,
            text=True,
            cwd="/",
            preexec_fn=functools.partial(limited, n_bytes),
        )
        assert done.returncode == 1 and not (out / "p.gguf").exists(), done.stderr
        assert done.stderr.splitlines()[-1].startswith("allocmoe-convert: error: ") and "Traceback" not in done.stderr
    done = subprocess.run([*command(model, out / "p.gguf"), "--plan-only"], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0
    with GGUFFile(out / "p.gguf") as file:
        assert file.get("general.type") == "allocmoe-plan"

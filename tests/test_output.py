"""What is written: the plan in a copy or in place, split models, all of it or nothing."""

import functools
import os
from pathlib import Path
import resource
import shutil
import signal
import subprocess
import sys

from allocmoe_edge import Llama, Plan
from allocmoe_edge.convert import ConvertError, output, output_lock
from allocmoe_edge.plan import metadata
from gguf_factory import plan_keys, write_gguf, write_imatrix
import numpy as np
import pytest
from test_convert import COMMAND, refused, run, tensor_hashes


def test_plan_in_place_is_the_plan_in_a_copy(tmp_path, monkeypatch):
    """Longer metadata and shorter, in blocks that do not divide the data."""
    monkeypatch.setattr(output, "_BLOCK", 1000)
    plain = write_gguf(tmp_path / "plain.gguf")
    long = write_gguf(tmp_path / "long.gguf", keys=plan_keys(sensitivity=np.ones(8), note="x" * 5000))
    for original in (plain, long):
        used = Path(shutil.copy(original, tmp_path / "used.gguf"))
        plan = Plan((0, 2, 3), (0, 4, 4))
        output.write_planned(original, tmp_path / "copy.gguf", plan, None)
        output.write_planned(used, tmp_path / "moved.gguf", plan, None, consume=True)
        assert (tmp_path / "moved.gguf").read_bytes() == (tmp_path / "copy.gguf").read_bytes()
        assert not used.exists()


# no output is a file of the input


@pytest.mark.parametrize("options", [("--plan-only",), ("--quantize", "Q8_0"), ("--quantize", "Q8_0", "--plan-only")])
def test_output_is_another_file_of_a_split_input(tiny_split, options):
    """In the modes that write one file; by another name, too."""
    before = [path.read_bytes() for path in tiny_split]
    for target in (tiny_split[1], tiny_split[0].parent / "." / tiny_split[2].name):
        refused(tiny_split[0], *options, "--force", "-o", target, expect=f"a file of the input, {tiny_split[0].parent}")
    assert [path.read_bytes() for path in tiny_split] == before


def test_output_is_a_link_to_a_file_of_the_input(tiny_split, out):
    os.link(tiny_split[2], out / "hard.gguf")
    (out / "soft.gguf").symlink_to(tiny_split[1])
    for name in ("hard.gguf", "soft.gguf"):
        refused(tiny_split[0], "--plan-only", "--force", "-o", out / name, expect="a file of the input")
    assert (out / "soft.gguf").is_symlink()


@pytest.mark.parametrize("option", ["--calib", "--imatrix"])
def test_output_is_a_text_or_an_importance_matrix(tiny_planned, out, option):
    other = write_imatrix(out / "other", {"w": (np.ones((1, 4)), np.ones(1))})
    if option == "--calib":
        other.write_text("text")
    before = other.read_bytes()
    refused(tiny_planned, "--quantize", "Q8_0", option, other, "--force", "-o", other, expect="a file of the input")
    assert other.read_bytes() == before


def test_output_is_in_a_folder_that_is_converted(tiny, tmp_path):
    folder = Path(shutil.copytree(tiny.hf_path, tmp_path / "model"))
    for name in ("config.json", "model.safetensors"):
        refused(folder, "--force", "-o", folder / name, expect="a file of the input")
    (tmp_path / "link").symlink_to(folder / "tokenizer.json")
    refused(folder, "--force", "-o", tmp_path / "link", expect="a file of the input")


def test_output_is_no_file(tiny_planned, out):
    refused(tiny_planned, "--force", "-o", out, expect="is a folder")
    refused(tiny_planned, "--force", "-o", "/dev/null", expect="is a device")


def test_output_that_is_a_link_is_written_through(tiny_planned, tiny_split, out, tmp_path):
    """As cp does it, also to another folder; what is made on the way is made there."""
    there = tmp_path / "there"
    there.mkdir()
    for name, options in (
        ("m.gguf", ()),
        ("plan.gguf", ("--plan-only",)),
        ("q.gguf", ("--quantize", "Q8_0", "--token-rule", "off", "--calib-tokens", "64", "--ctx-size", "32")),
    ):
        (out / name).symlink_to(there / name)
        done = run(tiny_planned, *options, "-o", out / name)
        assert done.returncode == 0, done.stderr
        refused(tiny_planned, *options, "-o", out / name, expect=f"{there / name}: exists")
    (out / "s-00001-of-00003.gguf").symlink_to(there / "s1.gguf")
    assert run(tiny_split[0], "-o", out / "s.gguf").returncode == 0
    assert sorted(path.name for path in there.iterdir()) == ["m.gguf", "plan.gguf", "q.gguf", "s1.gguf"]
    assert all((out / name).is_symlink() for name in ("m.gguf", "plan.gguf", "q.gguf", "s-00001-of-00003.gguf"))
    (out / "nowhere.gguf").symlink_to(tmp_path / "none" / "m.gguf")
    refused(tiny_planned, "-o", out / "nowhere.gguf", expect=f"no such folder: {tmp_path / 'none'}")


# one run at a time


def test_two_runs_to_one_output(tiny_planned, tiny_split, out):
    """The second is refused, by whatever name; one to another output is not."""
    (out / "link.gguf").symlink_to(out / "m.gguf")
    with output_lock.claimed(out / "m.gguf"):
        refused(tiny_planned, "-o", out / "m.gguf", expect="m.gguf: another allocmoe-convert is writing it")
        refused(tiny_planned, "--force", "--plan-only", "-o", out / "link.gguf", expect="another allocmoe-convert")
        refused(tiny_split[0], "-o", out / "m-00001-of-00003.gguf", expect="another allocmoe-convert")
        assert run(tiny_planned, "-o", out / "n.gguf").returncode == 0
    assert run(tiny_planned, "-o", out / "m.gguf").returncode == 0
    assert sorted(path.name for path in out.iterdir()) == ["link.gguf", "m.gguf", "n.gguf"]


def test_two_runs_that_begin_at_once(tiny_planned, out):
    """However they meet, one ends well and the others say why."""
    command = [*COMMAND, str(tiny_planned), "-o", str(out / "m.gguf")]
    runs = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True, stdout=subprocess.DEVNULL) for _ in range(3)]
    errors = [each.communicate()[1] for each in runs]
    assert sorted(each.returncode for each in runs) == [0, 1, 1]
    refusals = [error for error, each in zip(errors, runs) if each.returncode]
    assert all("is writing it" in error or "exists; --force" in error for error in refusals), refusals
    assert [path.name for path in out.iterdir()] == ["m.gguf"]


def test_output_of_a_run_that_was_killed(tiny_planned, out):
    """It keeps nobody away, and what it has left goes; files of others stay."""
    code = "import sys, time; from pathlib import Path; from allocmoe_edge.convert import output_lock\n"
    code += "with output_lock.claimed(Path(sys.argv[1])): print(flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code, out / "m.gguf"], stdout=subprocess.PIPE, cwd=out)
    holder.stdout.readline()
    refused(tiny_planned, "-o", out / "m.gguf", expect="is writing it")
    holder.kill()
    holder.communicate()
    stale = [f".m.gguf.{holder.pid}.{what}" for what in ("partial", "converted", "quantized")]
    stale += [f".m-00002-of-00003.gguf.{holder.pid}.partial", f"..m.gguf.{holder.pid}.partial.{holder.pid}.header"]
    others = [".mm.gguf.1.partial", ".m.gguf.partial", ".m.gguf.1.old", "m.gguf.1.partial", ".M.gguf.1.partial"]
    for name in stale + others:
        (out / name).write_text("x")
    assert run(tiny_planned, "-o", out / "m.gguf").returncode == 0
    assert sorted(path.name for path in out.iterdir()) == sorted(["m.gguf", *others])


# splits


def test_split(tiny_split, tiny_planned, out):
    done = run(tiny_split[0], "--budget", "0.75", "-o", out / "m.gguf", stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    written = sorted(out.iterdir())
    assert [path.name for path in written] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    assert metadata.read(written[0]).plan.budget_total == 12
    assert [path.stat().st_ino for path in written[1:]] == [path.stat().st_ino for path in tiny_split[1:]]
    assert {k: v for path in written for k, v in tensor_hashes(path).items()} == tensor_hashes(tiny_planned)
    llm = Llama(str(written[0]), n_ctx=64, n_threads=2, verbose=False)
    assert llm.plan == metadata.read(written[0]).plan
    assert next(llm.generate([1, 2, 3])) is not None


def test_split_on_another_file_system(tiny_split, out):
    shm = Path("/dev/shm")
    if not os.access(shm, os.W_OK) or shm.stat().st_dev == tiny_split[0].stat().st_dev:
        pytest.skip("needs a second file system, at /dev/shm")
    there = [Path(shutil.copy(path, shm / f"allocmoe-test-{os.getpid()}{path.name[4:]}")) for path in tiny_split]
    try:
        done = run(there[0], "-o", out / "m.gguf")
    finally:
        for path in there:
            path.unlink()
    assert done.returncode == 0, done.stderr
    assert [path.read_bytes() for path in sorted(out.iterdir())[1:]] == [path.read_bytes() for path in tiny_split[1:]]


def test_split_replanned_onto_itself(tiny_split, out):
    """--force over an earlier output whose files are links to the input's."""
    for budget, total in (("0.5", 8), ("0.75", 12)):
        done = run(tiny_split[0], "--budget", budget, "-o", out / "m-00001-of-00003.gguf", "--force")
        assert done.returncode == 0, done.stderr
        assert len(list(out.iterdir())) == 3
        assert metadata.read(out / "m-00001-of-00003.gguf").plan.budget_total == total
    refused(tiny_split[0], "-o", out / "m.gguf", expect="m-00001-of-00003.gguf: exists; --force")
    refused(tiny_split[0], "-o", tiny_split[0].with_name("tiny.gguf"), "--force", expect="the input itself")


def test_split_not_the_first_file(tiny_split, out):
    refused(
        tiny_split[1],
        "-o",
        out / "m.gguf",
        expect="file 2 of 3 of a split model: give the first one, tiny-00001-of-00003.gguf",
    )


def test_split_with_a_file_missing(tiny_split, tmp_path, out):
    for path in tiny_split[:2]:
        shutil.copy(path, tmp_path)
    refused(tmp_path / tiny_split[0].name, "-o", out / "m.gguf", expect="tiny-00003-of-00003.gguf: no such file")


def test_split_disk_full(tiny_split, out):
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (50_000, 50_000))
    refused(tiny_split[0], "-o", out / "m.gguf", expect="could not be written", preexec_fn=limit)
    assert list(out.iterdir()) == []


def killed(moment: int, source: Path, target: Path) -> bool:
    """Writes in a child that gets SIGKILL before the given one of the steps in which files are put into their places. Whether
    it came to that."""
    pid = os.fork()
    if pid == 0:
        left, rename_all = [moment], output._rename_all

        def step(function, *args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        def from_here_on(*args):
            os.replace = functools.partial(step, os.replace)
            Path.unlink = functools.partialmethod(lambda *args, **kw: step(unlink, *args, **kw))
            rename_all(*args)

        unlink, output._rename_all, code = Path.unlink, from_here_on, 1
        try:
            model = metadata.read(source)
            output.write_planned(source, target, model.plan, model.profile)
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status != 0


def test_split_is_replaced_by_a_run_that_is_killed(tiny_split, out):
    """At whatever step: the old model or the new one as a whole, or none by that name until the next run, which leaves nothing."""
    targets = output.target_paths(out / "m.gguf", 3)
    old = {path.name: f"precious {path.name}" for path in targets}
    seen = set()
    for moment in range(20):
        for path in out.iterdir():
            path.unlink()
        for path in targets:
            path.write_text(old[path.name])
        if not killed(moment, tiny_split[0], out / "m.gguf"):
            break
        first = targets[0].read_bytes() if targets[0].exists() else None
        assert first in (None, old[targets[0].name].encode()) or b"precious" not in b"".join(
            map(Path.read_bytes, targets)
        )
        with output_lock.claimed(out / "m.gguf"):
            pass
        found = {path.name: path.read_bytes() for path in out.iterdir()}
        assert found.keys() == old.keys()
        kept = all(found[name] == text.encode() for name, text in old.items())
        assert kept or (metadata.read(targets[0]).plan and b"precious" not in b"".join(found.values()))
        seen.add(kept)
    assert moment > 8 and seen == {True, False}


def test_replanned_in_one_step(tiny_split, out, monkeypatch):
    """What differs is the first file alone, so that no moment is without an output."""
    run(tiny_split[0], "--budget", "0.5", "-o", out / "m.gguf")
    model, calls, rename = metadata.read(tiny_split[0]), [], os.replace
    monkeypatch.setattr(output.os, "replace", lambda *args: (calls.append(args), rename(*args)))
    output.write_planned(tiny_split[0], out / "m.gguf", model.plan, model.profile)
    assert [target.name for _, target in calls] == ["m-00001-of-00003.gguf"]
    assert sorted(path.name for path in out.iterdir()) == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]


@pytest.mark.parametrize("failing", range(6))
def test_split_is_renamed_entirely_or_not_at_all(tiny_split, out, monkeypatch, failing):
    """Whichever of the six renames fails, what was there before is there again."""
    before = {}
    for path in output.target_paths(out / "m.gguf", 3):
        path.write_text(f"precious {path.name}")
        before[path.name] = path.read_text()
    model = metadata.read(tiny_split[0])
    rename, calls = os.replace, []

    def replace(*args):
        calls.append(args)
        if len(calls) == failing + 1:
            raise OSError(5, "Input/output error")
        rename(*args)

    monkeypatch.setattr(output.os, "replace", replace)
    with pytest.raises(ConvertError, match="Input/output error"):
        output.write_planned(tiny_split[0], out / "m.gguf", model.plan, model.profile)
    assert {path.name: path.read_text() for path in out.iterdir()} == before

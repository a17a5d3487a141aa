"""allocmoe-convert: the command as a user runs it, and one test per way it refuses."""

import functools
import hashlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from allocmoe_edge import Llama, Plan, metadata
from allocmoe_edge.gguf_file import GGUFFile
from allocmoe_edge.perplexity import negative_log_likelihood, perplexity
from allocmoe_edge.convert import cli, sensitivity

from gguf_factory import plan_keys, write_gguf

COMMAND = [shutil.which("allocmoe-convert", path=os.path.dirname(sys.executable))]
# small enough to profile 30 layers x 12 experts in a minute or two
QUICK = ["--ctx-size", "32", "--calib-tokens", "32"]


def run(*args, **kwargs) -> subprocess.CompletedProcess:
    command = [*COMMAND, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, **kwargs)


@pytest.fixture(scope="module")
def converted(testbed_path, tmp_path_factory):
    """The testbed at half budget, and what the command printed."""
    path = tmp_path_factory.mktemp("converted") / "half.gguf"
    done = run(testbed_path, "--budget", "0.5", *QUICK, "-o", path)
    assert done.returncode == 0, done.stderr
    return path, done


def tensor_hashes(path) -> dict:
    with GGUFFile(path) as file, open(path, "rb") as data:
        hashes = {}
        for tensor in file.tensors:
            data.seek(file.data_offset + tensor.offset)
            hashes[tensor.name] = hashlib.sha256(data.read(tensor.n_bytes)).hexdigest()
        return hashes


def test_plan_is_in_the_file(converted):
    path, done = converted
    model = metadata.read(path)
    assert model.plan.budget_total == 180
    assert all(len(row) == 12 and np.isfinite(row).all() for row in model.profile.sensitivity)
    assert model.profile.calibration.source == "self-generated, seed 0"
    assert "180 of 360" in done.stdout
    assert "331 passes" in done.stderr


def test_tensors_are_byte_identical(converted, testbed_path):
    assert tensor_hashes(converted[0]) == tensor_hashes(testbed_path)


def test_other_keys_are_kept(converted, testbed_path):
    with GGUFFile(testbed_path) as before, GGUFFile(converted[0]) as after:
        for key in before.keys():
            np.testing.assert_array_equal(before.get(key), after.get(key), err_msg=key)
        added = set(after.keys()) - set(before.keys())
    assert added and all(key.startswith("allocmoe.") for key in added)


def test_sensitivity_is_the_isolated_profile(converted, testbed_path):
    """Cells of S measured again by hand: layer l at k, layers before it at 12, layers after it at 1."""
    profile = metadata.read(converted[0]).profile
    llm = Llama(str(testbed_path), n_ctx=32, n_batch=32, n_threads=os.cpu_count(), verbose=False)
    from allocmoe_edge.convert.calibration import self_generated

    text = self_generated(llm, 32, 32, 0)
    assert text.source == profile.calibration
    for layer, k in ((0, 1), (0, 12), (1, 1), (14, 5), (29, 1), (29, 12)):
        llm.set_plan([12] * layer + [k] + [1] * (29 - layer))
        assert perplexity(llm, text.profile) == pytest.approx(profile.sensitivity[layer][k - 1], rel=1e-6)
    assert profile.sensitivity[0][11] == profile.sensitivity[1][0]


def test_plan_is_optimal_for_the_stored_sensitivities(converted):
    model = metadata.read(converted[0])
    assert model.plan == model.profile.plan(180, model.full)
    if model.profile.allocation == "uniform":
        assert model.plan.expert_used_count == Plan.uniform(model.full, 180).expert_used_count
    chosen = f"{model.profile.allocation}, token rule {model.plan.token_rule}:"
    values = {line.split(None, 1)[1]: float(line.split()[0]) for line in converted[1].stderr.splitlines() if " activations" in line}
    assert len(values) == 4 and min(values, key=values.get).startswith(chosen)


def test_replanning_needs_no_profile(converted, tmp_path):
    done = run(converted[0], "--budget", "33%", "-o", tmp_path / "third.gguf")
    assert done.returncode == 0, done.stderr
    assert "planning from the sensitivities" in done.stderr and "passes" not in done.stderr
    assert metadata.read(tmp_path / "third.gguf").plan.budget_total == 119
    assert tensor_hashes(tmp_path / "third.gguf") == tensor_hashes(converted[0])


def test_the_result_runs(converted):
    llm = Llama(str(converted[0]), n_ctx=128, verbose=False)
    answer = llm.create_chat_completion([{"role": "user", "content": "Say hello."}], max_tokens=8)
    assert answer["usage"]["completion_tokens"] > 0
    mean = llm.expert_stats()["decode"]["mean"]
    assert 30 <= mean.sum() <= 360


def test_sensitivity_of_a_small_model(tmp_path):
    """A plan for every cell, in the order that the formula asks for, whatever the layers' own counts are."""

    class Recorder:
        def __init__(self):
            self.plans = []

        def set_plan(self, counts):
            self.plans.append(tuple(counts))

    recorder = Recorder()
    original, sensitivity.negative_log_likelihood = sensitivity.negative_log_likelihood, lambda llm, w: np.log(len(llm.plans))
    try:
        rows = sensitivity.isolated(recorder, (0, 2, 3), np.zeros((1, 4)))
    finally:
        sensitivity.negative_log_likelihood = original
    assert recorder.plans == [(0, 1, 1), (0, 2, 1), (0, 2, 2), (0, 2, 3)]
    assert [np.round(row).tolist() for row in rows] == [[], [1, 2], [2, 3, 4]]
    assert sensitivity.n_passes((0, 2, 3)) == 4


def test_calibration_from_a_file(testbed_path, tmp_path):
    from allocmoe_edge.convert.calibration import from_file

    llm = Llama(str(testbed_path), n_ctx=32, n_batch=32, verbose=False)
    (tmp_path / "book.txt").write_text("It was the best of times, it was the worst of times. Café. " * 40)
    text = from_file(llm, tmp_path / "book.txt", 96, 32)
    assert text.profile.shape[1] == 32 and len(text.profile) >= 3 and len(text.held_out) >= 1
    nll = negative_log_likelihood(llm, text.profile)
    assert nll.shape == (len(text.profile), 31) and (nll > 0).all()


# refusals


def refused(*args, expect: str, code: int = 1, **kwargs) -> str:
    done = run(*args, **kwargs)
    assert done.returncode == code, done.stdout + done.stderr
    assert expect in done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_help_teaches():
    done = run("--help")
    assert done.returncode == 0
    for word in ("--budget", "--calib", "examples:", "share"):
        assert word in done.stdout


def test_missing_input(tmp_path):
    refused(tmp_path / "none.gguf", "-o", tmp_path / "o.gguf", expect="no such file")


def test_not_a_gguf(tmp_path):
    (tmp_path / "m.gguf").write_text("hello")
    refused(tmp_path / "m.gguf", "-o", tmp_path / "o.gguf", expect="not a GGUF file")


def test_truncated(testbed_path, tmp_path):
    (tmp_path / "m.gguf").write_bytes(testbed_path.read_bytes()[:10_000_000])
    refused(tmp_path / "m.gguf", "-o", tmp_path / "o.gguf", expect="truncated")


def test_dense_model(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", expert_count=0)
    refused(path, "-o", tmp_path / "o.gguf", expect="no experts to allocate")


@pytest.mark.parametrize("budget", ["0.01", "5", "361", "1.5", "nan", "half", "-1"])
def test_budget_out_of_range(testbed_path, tmp_path, budget):
    refused(testbed_path, f"--budget={budget}", "-o", tmp_path / "o.gguf", expect="budget")
    assert list(tmp_path.iterdir()) == []


def test_output_exists(converted, tmp_path):
    target = tmp_path / "o.gguf"
    target.write_text("precious")
    refused(converted[0], "-o", target, expect="--force")
    assert target.read_text() == "precious"
    assert run(converted[0], "-o", target, "--force").returncode == 0
    assert metadata.read(target).plan.budget_total == 180


def test_output_is_the_input(converted, tmp_path):
    before = tensor_hashes(converted[0])
    refused(converted[0], "-o", converted[0], "--force", expect="the input itself")
    (tmp_path / "link.gguf").symlink_to(converted[0])
    refused(converted[0], "-o", tmp_path / "link.gguf", "--force", expect="the input itself")
    assert tensor_hashes(converted[0]) == before


def test_output_folder_is_missing(converted, tmp_path):
    refused(converted[0], "-o", tmp_path / "no" / "o.gguf", expect="no such folder")


def test_disk_full_while_writing(converted, tmp_path):
    """The write fails half-way: an error, no file under the final name, no rest under another."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000_000, 50_000_000))

    refused(converted[0], "-o", tmp_path / "o.gguf", expect="could not be written", preexec_fn=limit)
    assert list(tmp_path.iterdir()) == []


def test_disk_too_small_is_seen_before_the_work(testbed_path, tmp_path, monkeypatch, capsys):
    from allocmoe_edge.convert import output

    class Usage:
        free = 1_000_000

    monkeypatch.setattr(output.shutil, "disk_usage", lambda folder: Usage)
    assert cli.main([str(testbed_path), "-o", str(tmp_path / "o.gguf")]) == 1
    assert "0.0 GB free, 0.2 GB needed" in capsys.readouterr().err


def test_stored_plan_is_damaged(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", keys=plan_keys((0, 2, 99)))
    refused(path, "-o", tmp_path / "o.gguf", expect="layer 2: found 99")


def test_calibration_file_is_missing(testbed_path, tmp_path):
    refused(testbed_path, *QUICK, "--calib", tmp_path / "x.txt", "-o", tmp_path / "o.gguf", expect="No such file")


def test_calibration_file_is_not_text(testbed_path, tmp_path):
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe\x00\x01" * 100)
    refused(testbed_path, *QUICK, "--calib", tmp_path / "x.txt", "-o", tmp_path / "o.gguf", expect="not UTF-8")


def test_too_little_calibration_text(testbed_path, tmp_path):
    (tmp_path / "x.txt").write_text("Too short.")
    refused(testbed_path, *QUICK, "--calib", tmp_path / "x.txt", "-o", tmp_path / "o.gguf", expect="want at least 64")


def test_model_that_llama_cpp_cannot_load(tmp_path):
    """Metadata and tensor table are fine, but it is no model: the error names the file."""
    refused(write_gguf(tmp_path / "m.gguf"), "-o", tmp_path / "o.gguf", expect="llama.cpp cannot load it")


def test_interrupt_leaves_nothing(testbed_path, tmp_path):
    command = [*COMMAND, str(testbed_path), *QUICK, "-o", str(tmp_path / "o.gguf")]
    # a test run in the background of a shell has SIGINT ignored, and children inherit that
    default = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=default)
    while "passes" not in process.stderr.readline():
        pass
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "nothing was written" in rest and "Traceback" not in rest
    assert list(tmp_path.iterdir()) == []

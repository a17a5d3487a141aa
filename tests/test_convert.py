"""allocmoe-convert: the command as a user runs it, and one test per way it refuses."""

from contextlib import redirect_stderr, redirect_stdout
import functools
import hashlib
import io
import os
from pathlib import Path
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

from allocmoe_edge import Llama, Plan
from allocmoe_edge.convert import choose, cli, pipeline, source, task
from allocmoe_edge.convert.calibration import CalibrationText
from allocmoe_edge.convert.settings import Settings
from allocmoe_edge.gguf_file import GGUFFile
from allocmoe_edge.measure.perplexity import negative_log_likelihood
from allocmoe_edge.plan import TOKEN_RULES, metadata
from gguf_factory import plan_keys, write_gguf
import numpy as np
import odd_models
import pytest

COMMAND = [shutil.which("allocmoe-convert", path=os.path.dirname(sys.executable))]
# small enough to profile 30 layers in seconds
TEXT = ["--ctx-size", "32", "--calib-tokens", "32"]
QUICK = [*TEXT, "--estimate-tokens", "64"]
NO_RULE = [*TEXT, "--token-rule", "off"]  # calibrates no estimates, which takes longer than all else


def run(*args, **kwargs) -> subprocess.CompletedProcess:
    """The command in this process, or, with arguments for that, in one of its own."""
    command = [str(arg) for arg in args]
    if kwargs:
        return subprocess.run([*COMMAND, *command], capture_output=True, text=True, **kwargs)
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        code = cli.main(command)
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def converted(testbed_path, tmp_path_factory):
    """The testbed at half budget, and what the command printed."""
    path = tmp_path_factory.mktemp("converted") / "half.gguf"
    done = run(testbed_path, "--budget", "0.5", *QUICK, "-o", path, stdin=subprocess.DEVNULL)
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
    assert "31 passes" in done.stderr
    held_out = model.profile.held_out
    # 32 tokens are too few for perplexities to be in order
    assert held_out.n_tokens == 32 and min(held_out.full, held_out.plan, held_out.uniform) > 1
    assert 0 < held_out.kl_plan <= held_out.kl_uniform


def test_tensors_are_byte_identical(converted, testbed_path):
    assert tensor_hashes(converted[0]) == tensor_hashes(testbed_path)


def test_other_keys_are_kept(converted, testbed_path):
    with GGUFFile(testbed_path) as before, GGUFFile(converted[0]) as after:
        for key in before.keys():
            np.testing.assert_array_equal(before.get(key), after.get(key), err_msg=key)
        added = set(after.keys()) - set(before.keys())
    assert added and all(key.startswith("allocmoe.") for key in added)


def test_plan_is_optimal_for_the_stored_sensitivities(converted):
    model = metadata.read(converted[0])
    assert model.plan == model.profile.plan(180, model.full)
    chosen = f"{model.profile.allocation}, token rule {model.plan.token_rule}"
    if model.plan.token_rule != "estimate" and model.profile.allocation == "uniform":
        assert model.plan.expert_used_count == Plan.uniform(model.full, 180).expert_used_count
    lines = [line.split(None, 3) for line in converted[1].stderr.splitlines() if "token rule" in line]
    values = {name: float(kl) for _, kl, _, name in lines}
    if model.plan.token_rule == "estimate":
        chosen = min((name for name in values if "estimate" in name), key=values.get)
    assert len(values) == 7 and values[chosen] == min(values.values())


def test_replanning_needs_no_profile(converted, tmp_path):
    done = run(converted[0], "--budget", "33%", "-o", tmp_path / "third.gguf")
    assert done.returncode == 0, done.stderr
    assert "using the sensitivities" in done.stderr and "passes" not in done.stderr
    assert metadata.read(tmp_path / "third.gguf").plan.budget_total == 119
    assert tensor_hashes(tmp_path / "third.gguf") == tensor_hashes(converted[0])


@pytest.fixture(scope="module")
def estimated(testbed_path, tmp_path_factory):
    """The testbed at half budget under token rule "estimate", and what the command printed."""
    path = tmp_path_factory.mktemp("estimated") / "half.gguf"
    tokens = ["--ctx-size", "64", "--calib-tokens", "64", "--estimate-tokens", "128"]
    done = run(testbed_path, "--budget", "0.5", "--token-rule", "estimate", *tokens, "-o", path)
    assert done.returncode == 0, done.stderr
    return path, done


def test_estimate_is_taken_as_asked(estimated):
    """And compared with plain plans, so that one sees what it is worth."""
    path, done = estimated
    model = metadata.read(path)
    assert model.plan.token_rule == model.profile.token_rule == "estimate" and model.plan.budget_total == 180
    assert model.plan == model.profile.plan(180, model.full)
    names = [line.split(None, 3)[3] for line in done.stderr.splitlines() if "token rule" in line]
    assert names[:3] == ["alloc-l, token rule off", "uniform, token rule off", "token rule estimate"]
    assert "on self-generated, seed 0: 31 passes over 1 windows of 64 tokens" in done.stderr
    assert "estimates of experts on 128 tokens" in done.stderr and "GB beside the model" in done.stderr
    llm = Llama(str(path), n_ctx=128, verbose=False)
    assert llm.plan == model.plan
    # another budget, and the other rules, from the same file
    assert llm.set_budget(0.3).budget_total == 108
    assert llm.set_budget(0.3, token_rule="off") == model.profile.plan(108, model.full, "off")


def test_estimate_replans_without_a_profile(estimated, tmp_path):
    done = run(estimated[0], "--budget", "25%", "--plan-only", "-o", tmp_path / "quarter.gguf")
    assert done.returncode == 0, done.stderr
    assert "passes" not in done.stderr
    found = metadata.read(tmp_path / "quarter.gguf")
    assert found.plan.token_rule == "estimate" and found.plan.budget_total == 90
    llm = Llama(str(estimated[0]), n_ctx=64, plan_path=str(tmp_path / "quarter.gguf"), verbose=False)
    assert llm.plan == found.plan


def test_estimates_are_calibrated_with_stored_sensitivities(tiny_planned, tmp_path):
    """A file that was converted without them: the model runs, but takes no new profile."""
    done = run(tiny_planned, "--budget", "0.5", "--token-rule", "estimate", *QUICK, "-o", tmp_path / "half.gguf")
    assert done.returncode == 0, done.stderr
    assert (
        "using the sensitivities" in done.stderr
        and "calibrating estimates" in done.stderr
        and "profiling" not in done.stderr
    )
    assert metadata.read(tmp_path / "half.gguf").plan.token_rule == "estimate"


@pytest.mark.parametrize("option", ["--estimate-tokens", "--calib-tokens"])
def test_more_tokens_than_the_text_has(tiny, tmp_path, option):
    """What there is is taken; room for it was asked for as if all were there."""
    (tmp_path / "small.txt").write_text("It was the best of times, it was the worst of times. " * 60)
    text = ["--ctx-size", "64", "--calib-tokens", "64", "--estimate-tokens", "128", "--calib", tmp_path / "small.txt"]
    done = run(tiny.gguf_path, *text, option, "999999999", "-o", tmp_path / "m.gguf")
    assert done.returncode == 0, done.stderr
    assert "not tried" not in done.stderr and "calibrating estimates" in done.stderr


@pytest.fixture(scope="module")
def planned_task(testbed_path):
    def plan(**options):
        settings = Settings(testbed_path, Path("out.gguf"), ctx_size=32, **options)
        return task.plan_task(settings, source.Source(testbed_path, temporary=False))

    return plan


def test_a_profile_for_estimates_takes_less_text(planned_task):
    """By default; what the user asks for is what is taken. At full budget nothing is estimated."""
    tokens = {rule: planned_task(token_rule=rule).calib_tokens for rule in (None, *TOKEN_RULES)}
    assert tokens == {None: 1024, "estimate": 1024, "threshold": 2048, "batch": 2048, "off": 2048}
    assert planned_task(calib_tokens=64).calib_tokens == 64 and planned_task(budget="1.0").calib_tokens == 2048


def test_estimates_are_not_tried_without_the_memory(planned_task, monkeypatch, capsys):
    planned = planned_task(estimate_tokens=64)
    monkeypatch.setattr(pipeline.memory, "available", lambda: 10**6)
    found = pipeline._with_room(planned)
    assert not found.tries_estimates and found.calib_tokens == 2048
    assert re.search(r"not tried: to calibrate them takes \d+ MB of memory, and 1 MB are free", capsys.readouterr().err)


def test_estimates_are_not_tried_without_the_disk_space(planned_task, monkeypatch, capsys):
    monkeypatch.setattr(pipeline.output, "free_space", lambda folder: 10**8)
    assert not pipeline._with_room(planned_task()).tries_estimates
    assert "MB of disk space, and 100 MB are free" in capsys.readouterr().err
    asked = planned_task(token_rule="estimate")
    assert pipeline._with_room(asked) is asked


def test_memory_is_looked_at_before_the_work(tiny, tmp_path, monkeypatch):
    """Not after text and profile: the first line says what is left out, and nothing is calibrated."""
    monkeypatch.setattr(pipeline.memory, "available", lambda: 10**5)
    done = run(tiny.gguf_path, *QUICK, "-o", tmp_path / "m.gguf")
    assert done.returncode == 0, done.stderr
    assert "estimates of experts are not tried" in done.stderr.splitlines()[0] and "calibrating" not in done.stderr
    assert metadata.read(tmp_path / "m.gguf").profile.estimator is None


def test_the_result_runs(converted):
    llm = Llama(str(converted[0]), n_ctx=128, verbose=False)
    answer = llm.create_chat_completion([{"role": "user", "content": "Say hello."}], max_tokens=8)
    assert answer["usage"]["completion_tokens"] > 0
    mean = llm.expert_stats()["decode"]["mean"]
    assert 30 <= mean.sum() <= 360


def test_calibration_from_a_file(testbed_path, tmp_path):
    from allocmoe_edge.convert.calibration import from_file

    llm = Llama(str(testbed_path), n_ctx=32, n_batch=32, verbose=False)
    (tmp_path / "book.txt").write_text("It was the best of times, it was the worst of times. Café. " * 40)
    text = from_file(llm, tmp_path / "book.txt", 96, 32)
    assert text.profile.shape[1] == 32 and len(text.profile) >= 3 and len(text.held_out) >= 1
    nll = negative_log_likelihood(llm, text.profile)
    assert nll.shape == (len(text.profile), 31) and (nll > 0).all()
    # more for what takes few runs: the same windows and others, apart from what is held out
    more = from_file(llm, tmp_path / "book.txt", 96, 32, n_fit=320)
    assert more.profile.shape == text.profile.shape and len(more.held_out) == 2
    assert len(more.fit) == 10 and len(more.spend) == 2

    def rows(windows):
        return {window.tobytes() for window in windows}

    assert rows(more.profile) <= rows(more.fit) and rows(more.held_out) <= rows(more.spend)
    assert np.array_equal(text.fit, text.profile) and np.array_equal(text.spend, text.held_out)


def test_calibration_windows_of_many_places(testbed_path, tmp_path):
    """Of a text with more than enough windows are put together of pieces from far apart, 128 tokens each; held-out ones are not."""
    from allocmoe_edge.convert.calibration import from_file

    llm = Llama(str(testbed_path), n_ctx=256, n_batch=256, verbose=False)
    (tmp_path / "book.txt").write_text(" ".join(f"{n} sheep" for n in range(20000)))
    tokens = llm.tokenize((tmp_path / "book.txt").read_bytes(), add_bos=False)
    place = {tuple(tokens[i : i + 128]): i for i in range(len(tokens) - 127)}

    def starts(windows):
        return [(place[tuple(row[:128].tolist())], place[tuple(row[128:].tolist())]) for row in windows]

    text = from_file(llm, tmp_path / "book.txt", 1024, 256)
    assert [len(rows) for rows in text[:4]] == [4, 4, 1, 1]
    apart = starts(text.fit)
    assert all(second - first > len(tokens) / 3 for first, second in apart)
    assert apart[0][0] == 0 and apart[-1][1] > 0.8 * len(tokens)
    [(first, second)] = starts(text.held_out)
    assert second == first + 128
    taken = {n for start in sum(apart, ()) for n in range(start, start + 128)}
    assert not taken & set(range(first, first + 256))
    # no more text than is asked for: windows as they are
    short = tmp_path / "short.txt"
    short.write_bytes((tmp_path / "book.txt").read_bytes()[: len("12345 sheep") * 300])
    few = from_file(llm, short, 1024, 256)
    assert all(second == first + 128 for first, second in starts(few.fit))


def test_calibration_that_the_model_writes(tiny, tmp_path, monkeypatch):
    """The same seed gives the same text, which a checkpoint gives back; documents are short, however long the windows are."""
    from allocmoe_edge.convert import calibration
    from allocmoe_edge.convert.calibration import self_generated
    from allocmoe_edge.convert.checkpoint import Checkpoint

    model = tiny.gguf_path
    llm = Llama(str(model), n_ctx=32, n_batch=32, verbose=False)
    with Checkpoint(tmp_path / "c", model) as checkpoint:
        text = self_generated(llm, 64, 32, 7, checkpoint)
    assert [len(rows) for rows in text[:4]] == [2, 2, 1, 1] and text.source.source == "self-generated, seed 7"
    with Checkpoint(tmp_path / "again", model) as checkpoint:
        assert np.array_equal(self_generated(llm, 64, 32, 7, checkpoint).fit, text.fit)
    with Checkpoint(tmp_path / "c", model) as checkpoint, monkeypatch.context() as patch:
        patch.setattr(calibration, "write_documents", None)  # what was written is not written again
        assert np.array_equal(self_generated(llm, 64, 32, 7, checkpoint).fit, text.fit)
        with pytest.raises(TypeError, match="not callable"):
            self_generated(llm, 64, 32, 8, checkpoint)
    with Checkpoint(tmp_path / "more", model) as checkpoint:
        assert [len(rows) for rows in self_generated(llm, 64, 32, 7, checkpoint, n_fit=128)[:4]] == [2, 4, 1, 1]
    llm = Llama(str(model), n_ctx=160, n_batch=160, verbose=False)
    monkeypatch.setattr(calibration, "_SIDE_BY_SIDE", 2)
    with Checkpoint(tmp_path / "long", model) as checkpoint:
        assert self_generated(llm, 160, 160, 7, checkpoint).fit.shape == (1, 160)
        first = checkpoint.get("256 tokens in documents from seed 7, up to 128 each, 2 at a time")
        bos = llm.token_bos()
        rest = 2 * (160 - (calibration.bos_token(llm) == bos)) - 256
        second = checkpoint.get(
            f"{rest} tokens in documents from seed {7 + len(first)}, up to 128 each, {-(-rest // 128)} at a time"
        )
    assert sum(map(len, first)) == 256 and sum(map(len, second)) == rest
    assert max(map(len, first)) <= 128


@pytest.mark.parametrize("cache, tolerance", [("GGML_TYPE_Q8_0", 0.05), ("GGML_TYPE_F16", 1e-3)])
def test_documents_side_by_side_are_what_the_model_would_write(tiny_planned, monkeypatch, cache, tolerance):
    """Every token is among the likeliest that have 95% together, by the model alone at full budget, whatever its file plans;
    those of documents that take the place of others, too.

    0.05: keys and values are kept in 8 bits (0.021 was found). 1e-3: in 16, of one token and of many in their last bits.
    """
    from allocmoe_edge._native import llama_cpp
    from allocmoe_edge.convert.self_generated import write_documents

    monkeypatch.setattr(llama_cpp, "GGML_TYPE_Q8_0", getattr(llama_cpp, cache))
    n_tokens = 200
    llm = Llama(str(tiny_planned), n_ctx=64, n_batch=64, verbose=False)
    start, planned = llm.token_bos(), llm.plan
    documents = write_documents(llm, start, 24, n_tokens, 0, 5, lambda: None)
    assert documents == write_documents(llm, start, 24, n_tokens, 0, 5, lambda: None)
    assert sum(map(len, documents)) == n_tokens and len(documents) >= 5
    written = [tuple(tokens) for tokens in documents if len(tokens) > 4]
    assert len(written) >= 10 and len(set(written)) == len(written) and max(map(len, written)) <= 24
    assert llm.plan == planned and llm.n_tokens == 0
    llm.set_plan(None)
    for tokens in written:
        for logits, token in zip(llm.decode([start, *tokens], logits_all=True), tokens):
            p = np.exp(logits - logits.max(), dtype=np.float64)
            assert p[p > p[token]].sum() / p.sum() <= 0.95 + tolerance


def test_a_cache_in_8_bits_that_cannot_be_is_nothing_to_speak_of(built, out, capfd):
    """Heads of 16 values: the text is written with a cache of floats, as llama.cpp's line on the terminal did not say."""
    assert cli.main([str(built["olmoe"].gguf_path), *NO_RULE, "-o", str(out / "m.gguf")]) == 0
    assert "q8_0" not in capfd.readouterr().err


def test_sampling_by_probability_among_the_likeliest():
    """Of five tokens, of which three have 95%: 20,000 draws within five standard deviations (0.0035 each at most)."""
    from allocmoe_edge.convert import CalibrationError
    from allocmoe_edge.convert.self_generated import sample

    p = np.array([0.02, 0.5, 0.1, 0.36, 0.02])
    rng = np.random.default_rng(0)
    logits = np.log(p).astype(np.float32) + 3
    found = np.bincount([sample(logits, rng) for _ in range(20000)], minlength=5) / 20000
    kept = np.where(p > 0.05, p, 0.0)
    np.testing.assert_allclose(found, kept / kept.sum(), atol=5 * 0.0035)
    assert found[0] == found[4] == 0
    for bad in (np.nan, np.inf):
        logits[2] = bad
        with pytest.raises(CalibrationError) as error:
            sample(logits, rng)
        assert not error.value.finite


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
    assert re.search("1 MB free, [12]\\d\\d MB needed", capsys.readouterr().err)


def test_what_is_short_looks_short():
    from allocmoe_edge.convert import output

    for free, needed, *expected in (
        (219_999_999, 220_000_000, "219 MB", "220 MB"),
        (0, 3_600_001, "0 MB", "4 MB"),
        (12_340_000_000, 12_350_000_000, "12.3 GB", "12.4 GB"),
        (9_999_000_000, 9_999_500_000, "9,999 MB", "10,000 MB"),
    ):
        assert list(output.sizes(free, needed)) == expected


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


def test_interrupted_and_continued(testbed_path, tmp_path):
    """Ctrl-C leaves what was measured and no output; the same command measures only the rest and comes to the same."""
    command = [testbed_path, *NO_RULE, "--calib-tokens", "64", "--budget", "0.5", "-o", tmp_path / "o.gguf"]
    # a test run in the background of a shell has SIGINT ignored, and children inherit that
    default = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    kept = tmp_path / "o.gguf.profile"
    with subprocess.Popen(
        [*COMMAND, *map(str, command)], stderr=subprocess.PIPE, text=True, preexec_fn=default
    ) as process:
        try:
            while "passes" not in process.stderr.readline():
                assert process.poll() is None
            while sum(" full" not in line for line in kept.read_text().splitlines()) < 20:
                time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            _, rest = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "no output was written" in rest and str(kept) in rest and "Traceback" not in rest
    assert list(tmp_path.iterdir()) == [kept]

    with open(kept, "a") as file:
        file.write('{"name": "cut short by a ki')
    done = run(*command)
    assert done.returncode == 0, done.stderr
    reused = int(done.stderr.split(" cells of the profile had been measured before")[0].split()[-1])
    assert 10 <= reused <= 60
    assert list(tmp_path.iterdir()) == [tmp_path / "o.gguf"]
    fresh = run(*command[:-1], tmp_path / "fresh.gguf")
    assert fresh.returncode == 0 and "measured before" not in fresh.stderr
    again, first = (metadata.read(tmp_path / name).profile for name in ("o.gguf", "fresh.gguf"))
    np.testing.assert_allclose(np.concatenate(again.sensitivity), np.concatenate(first.sensitivity), rtol=1e-9)


def test_interrupted_when_all_is_written(tiny, tmp_path, monkeypatch, capsys):
    from allocmoe_edge.convert import cli, pipeline

    out, kept = tmp_path / "o.gguf", tmp_path / "o.gguf.profile"
    remove = pipeline.checkpoint.remove

    def interrupt(path):
        assert out.exists() and kept.exists()
        monkeypatch.setattr(pipeline.checkpoint, "remove", remove)
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline.checkpoint, "remove", interrupt)
    assert cli.main([str(tiny.gguf_path), *NO_RULE, "--calib-tokens", "64", "-o", str(out)]) == 130
    assert f"interrupted: {out} was written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [out] and metadata.read(out).plan


def test_budget_in_milliseconds(testbed_path, tmp_path):
    done = run(testbed_path, *NO_RULE, "--cost", "ms", "-o", tmp_path / "o.gguf")
    assert done.returncode == 0, done.stderr
    profile = metadata.read(tmp_path / "o.gguf").profile
    # all layers are alike, so they cost the same, and the plan is the one that counts activations
    assert profile.cost_unit == "ms" and len(set(profile.cost)) == 1 and 0 < profile.cost[0] < 100
    assert metadata.read(tmp_path / "o.gguf").plan.budget_total == 180


def test_target_tps(tiny, tmp_path):
    refused(tiny.gguf_path, *NO_RULE, "--target-tps", "1e9", "-o", tmp_path / "o.gguf", expect="out of reach")
    kept = tmp_path / "o.gguf.profile"
    assert list(tmp_path.iterdir()) == [kept]  # the text was not for nothing
    done = run(tiny.gguf_path, *NO_RULE, "--target-tps", "0.001", "-o", tmp_path / "o.gguf")
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stderr and metadata.read(tmp_path / "o.gguf").plan.budget_total == 16


def test_max_ppl_increase(converted, tmp_path):
    """From stored sensitivities: no profile, but the model is run on text."""
    totals = []
    for share in ("0%", "60%", "1000000%"):
        done = run(converted[0], *NO_RULE, "--max-ppl-increase", share, "-o", tmp_path / "o.gguf", "--force")
        assert done.returncode == 0, done.stderr
        assert "using the sensitivities" in done.stderr and "profiling" not in done.stderr
        totals.append(metadata.read(tmp_path / "o.gguf").plan.budget_total)
    assert totals[0] > totals[1] > totals[2] == 30


@pytest.fixture
def smallest(monkeypatch):
    """choose.smallest_total of a model of 16 activations whose perplexity rises by so much, and with such errors, by total."""

    def find(limit, increases, errors) -> int:
        def scores(llm, full, plans, windows):
            found = {
                name: choose.Score(1 + increases[plan.budget_total], 1.0, 0.0, errors[plan.budget_total])
                for name, plan in plans.items()
            }
            return {"full": choose.Score(1.0, 0.0, 0.0, 0.0), **found}

        monkeypatch.setattr(choose, "scores", scores)
        calibration = metadata.Calibration("made up", 1, "0" * 64)
        profile = metadata.Profile((np.linspace(2, 1, 4),) * 4, (1.0,) * 4, calibration)
        text = CalibrationText(*[np.zeros((1, 8), np.int32)] * 4, calibration)
        return choose.smallest_total(None, profile, (4,) * 4, text, limit)

    return find


@pytest.mark.parametrize("error", [0.004, 0.006])
def test_an_increase_is_printed_on_its_side_of_the_limit(smallest, capsys, error):
    """+1.04% was "+1.0%", and refused for being above 1.0%. And a limit that so few tokens do not tell is said to be one."""
    limit, increases = 0.01, {10: 0.0104, 13: 0.00996, 11: 0.0100004, 12: 0.0099999}
    assert smallest(limit, increases, dict.fromkeys(increases, error)) == 12
    printed = capsys.readouterr().err
    warning = "a limit of 1% cannot be told on 8 held-out tokens: by chance perplexity is off by up to 1.2% there"
    assert (warning in printed) == (error == 0.006) and f"standard error {error:.2%}" in printed
    said = re.findall(r"(\d+) of 16 activations: perplexity \+([\d.]+)%", printed)
    assert [int(total) for total, _ in said] == [10, 13, 12, 11]
    for total, shown in said:
        assert (float(shown) <= 100 * limit) == (increases[int(total)] <= limit), (total, shown)


def test_a_limit_that_no_step_is_within(smallest, capsys):
    """That the tokens are too few was said of budgets within the limit alone. What is far above it, or no number, tells nothing."""
    increases = {10: np.inf, 13: 0.3, 15: 0.02}
    for error, said in ((0.05, True), (0.004, False)):
        assert smallest(0.01, increases, {10: np.inf, 13: 0.06, 15: error}) == 16
        assert ("by chance perplexity is off by up to 10.0% there" in capsys.readouterr().err) == said


@pytest.mark.parametrize("rule", ["off", "batch", "threshold", "estimate"])
def test_max_ppl_increase_looks_at_plans_of_its_rule(tiny, tmp_path, rule):
    """Under "estimate" it looked at plans without, too, and wrote one above the limit without a word."""
    done = run(tiny.gguf_path, *TEXT, "--token-rule", rule, "--max-ppl-increase", "2%", "-o", tmp_path / "o.gguf")
    assert done.returncode == 0, done.stderr
    plan, held_out = metadata.read(tmp_path / "o.gguf").plan, metadata.read(tmp_path / "o.gguf").profile.held_out
    assert plan.token_rule == rule and held_out.plan <= 1.02 * held_out.full
    steps = dict(re.findall(r"(\d+) of 16 activations: perplexity ([+-][\d.]+)%", done.stderr))
    found = steps.get(str(plan.budget_total), "0")
    assert float(found) == pytest.approx(100 * (held_out.plan / held_out.full - 1), abs=0.1)


def test_a_model_that_is_replaced_meanwhile(tiny, tmp_path, monkeypatch, capsys):
    """The output had the new tensors and the plan of the old ones."""
    model = tmp_path / "m.gguf"
    model.write_bytes(Path(tiny.gguf_path).read_bytes())
    measured = pipeline._measured

    def replaced(*args):
        choice = measured(*args)
        with GGUFFile(model) as file:
            begin = file.data_offset
        data = bytearray(model.read_bytes())
        data[begin] ^= 1
        (tmp_path / "new.gguf").write_bytes(data)
        os.replace(tmp_path / "new.gguf", model)
        return choice

    monkeypatch.setattr(pipeline, "_measured", replaced)
    assert cli.main([str(model), *map(str, TEXT), "--token-rule", "off", "-o", str(tmp_path / "o.gguf")]) == 1
    assert "m.gguf: has been replaced or written to since the conversion began" in capsys.readouterr().err
    assert not (tmp_path / "o.gguf").exists()


def test_interrupted_after_an_output_that_was_just_written(tiny, tmp_path, monkeypatch, capsys):
    """Of the run before: it was said to be this one's, whose measurements were removed."""
    out = tmp_path / "o.gguf"
    out.write_bytes(b"of the run before")

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "measure", stop)
    assert cli.main([str(tiny.gguf_path), *map(str, TEXT), "--force", "-o", str(out)]) == 130
    assert "no output was written" in capsys.readouterr().err and out.read_bytes() == b"of the run before"


def test_estimates_stay_where_another_rule_is_ahead(tiny, tmp_path, monkeypatch):
    """For other budgets of the file, which had none."""
    scores = choose.scores

    def worse(*args):
        found = scores(*args)
        return {name: score._replace(kl=score.kl + 9 * name.startswith("token rule")) for name, score in found.items()}

    monkeypatch.setattr(choose, "scores", worse)
    assert cli.main([str(tiny.gguf_path), *map(str, TEXT), "-o", str(tmp_path / "o.gguf")]) == 0
    found = metadata.read(tmp_path / "o.gguf")
    assert found.plan.token_rule != "estimate" and found.profile.estimator is not None
    llm = Llama(tmp_path / "o.gguf", n_ctx=64, verbose=False)
    assert llm.set_budget(0.5, token_rule="estimate").token_rule == "estimate"
    llm.close()


def test_max_ppl_increase_without_a_plan_within_it(capsys):
    """Not even full budget, where estimates take experts out: said."""
    calibration = metadata.Calibration("made up", 1, "0" * 64)
    held_out = metadata.HeldOut(8, 1.0, 1.0, 1.031, 0.1, 0.1)
    profile = metadata.Profile((np.linspace(2, 1, 4),) * 4, (1.0,) * 4, calibration, held_out=held_out)
    choice = choose.Choice(profile, profile.plan(8, (4,) * 4), {}, {}, 0)
    choose.report(choice, 0.03)
    assert "no plan is within the limit: perplexity +3.1%" in capsys.readouterr().err
    choose.report(choice, 0.04)
    assert "limit" not in capsys.readouterr().err


def test_what_decides_for_uniform_k_is_said(capsys):
    """Only that Alloc-L's plan does not beat it, below a table where it had the better perplexity."""
    calibration = metadata.Calibration("made up", 1, "0" * 64)
    held_out = metadata.HeldOut(1024, 25.0, 28.0, 28.0, 0.071, 0.071)
    profile = metadata.Profile((np.linspace(2, 1, 4),) * 4, (1.0,) * 4, calibration, "uniform", held_out=held_out)
    scores = {
        "full": choose.Score(25.0, 0.0, 16.0, 0.0),
        "alloc-l, token rule off": choose.Score(27.1, 0.0724, 8.0, 0.01),
        "alloc-l, token rule threshold": choose.Score(27.2, 0.0725, 8.0, 0.01),
        "uniform, token rule off": choose.Score(28.0, 0.0710, 8.0, 0.01),
    }
    choose.report(choose.Choice(profile, profile.plan(8, (4,) * 4), scores, {}, 0))
    printed = capsys.readouterr().err
    assert "divergence decides, and is 0.0724 by Alloc-L's plan and 0.0710 by uniform k" in printed
    assert "On 1024 tokens a small difference may be chance" in printed
    # the limit goes before the divergence
    scores["alloc-l, token rule off"] = choose.Score(30.0, 0.0700, 8.0, 0.01)
    choose.report(choose.Choice(profile, profile.plan(8, (4,) * 4), scores, {}, 0), 0.15)
    assert "Alloc-L's plan does not keep to the limit of perplexity: the uniform plan" in capsys.readouterr().err


def test_max_ppl_increase_leaves_k_base(tiny, tmp_path):
    """No budget below what every token keeps is looked at, however much may be lost: it was 4."""
    options = *TEXT, "--token-rule", "threshold", "--k-base", "2", "--max-ppl-increase", "1000000%"
    done = run(tiny.gguf_path, *options, "-o", tmp_path / "o.gguf")
    assert done.returncode == 0, done.stderr
    assert metadata.read(tmp_path / "o.gguf").plan.budget_total == 8


def test_windows_of_two_tokens(tiny, tmp_path):
    """The model writes documents of one token then; of none, it divided by zero."""
    done = run(
        tiny.gguf_path, "--ctx-size", "2", "--calib-tokens", "8", "--token-rule", "off", "-o", tmp_path / "o.gguf"
    )
    assert done.returncode == 0, done.stderr


def test_a_model_whose_layers_have_no_output_to_keep(tmp_path):
    """DeepSeek-V4's: its profile ended in a fault, for a graph with nothing added had its leafs in another order."""
    model = odd_models.write_deepseek4(tmp_path / "m.gguf", 1)
    options = "--ctx-size", "64", "--calib-tokens", "128", "--token-rule", "off"
    done = run(model, *options, "-o", tmp_path / "o.gguf", stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert metadata.read(tmp_path / "o.gguf").plan.expert_used_count[0] == metadata.read(model).full[0]


def test_one_expert_a_token(tmp_path, monkeypatch):
    monkeypatch.setattr(odd_models, "N_EXPERT_USED", 1)
    model = odd_models.write_qwen3moe(tmp_path / "m.gguf")
    refused(model, *TEXT, "-o", tmp_path / "o.gguf", expect="there is none to leave out; --budget 1.0 writes the file")
    for rule in ((), ("--token-rule", "estimate")):
        done = run(model, *QUICK, *rule, "--budget", "1.0", "-o", tmp_path / "o.gguf", "--force")
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("pair", [("--budget=0.5", "--target-tps=9"), ("--target-tps=9", "--max-ppl-increase=3%")])
def test_targets_exclude_each_other(testbed_path, tmp_path, pair):
    refused(testbed_path, *pair, "-o", tmp_path / "o.gguf", expect="not allowed with", code=2)


# the side file


@pytest.fixture(scope="module")
def side_file(planned_path, tmp_path_factory):
    path = tmp_path_factory.mktemp("side") / "plan.gguf"
    done = run(planned_path, "--budget", "0.4", "--plan-only", "-o", path)
    assert done.returncode == 0, done.stderr
    return path


def test_side_file_is_the_plan_alone(side_file, planned_path):
    assert side_file.stat().st_size < 20_000
    found, source = metadata.read(side_file), metadata.read(planned_path)
    assert found.side_file and found.full == source.full and found.architecture == source.architecture
    assert found.plan == source.profile.plan(0.4, source.full)
    np.testing.assert_array_equal(np.concatenate(found.profile.sensitivity), np.concatenate(source.profile.sensitivity))


def test_side_file_runs_with_the_model(side_file, testbed_path, planned_path):
    import pickle

    llm = Llama(str(testbed_path), plan_path=str(side_file), n_ctx=64, verbose=False)
    assert llm.plan.budget_total == 144
    assert llm.set_budget(0.6).budget_total == 216
    assert llm.set_budget().budget_total == 144
    assert pickle.loads(pickle.dumps(llm)).plan == llm.plan
    # it takes the place of a plan in the model's own file
    llm = Llama(str(planned_path), plan_path=str(side_file), n_ctx=64, verbose=False)
    assert llm.plan.budget_total == 144


def test_side_file_in_place_of_a_model(side_file, tiny, capsys):
    """Commands say what to do in their own options; another model's plan is named in a line that can be read."""
    from allocmoe_edge import PlanError, chat
    from allocmoe_edge.bench import cli as bench

    for command, expect in ((chat, "pass it as --plan"), (bench, "as allocmoe-convert writes without --plan-only")):
        assert command.main([str(side_file)]) == 1
        said = capsys.readouterr().err
        assert "has a plan and no model" in said and expect in said and "plan_path" not in said
    with pytest.raises(PlanError, match=r"experts per token 12 x30\) than this \(.*, 4 x4\)"):
        metadata.read_for(side_file, metadata.read(tiny.gguf_path))


def test_what_a_killed_run_has_left_goes_with_the_output(tiny_planned, tmp_path):
    """Whatever kind of run completes that. Another file of that name stays."""
    from allocmoe_edge.convert.checkpoint import Checkpoint

    left = tmp_path / "m.gguf.profile"
    with Checkpoint(left, tiny_planned) as results:
        results.put("a cell", [1])
        results.arrays("sizes", lambda: {"a": np.zeros(2)})
    assert run(tiny_planned, "-o", tmp_path / "m.gguf").returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    left.write_text("mine")
    assert run(tiny_planned, "--force", "-o", tmp_path / "m.gguf").returncode == 0
    assert left.read_text() == "mine"


def test_side_file_is_planned_again_in_a_blink(side_file, tmp_path):
    done = run(side_file, "--budget", "0.3", "--plan-only", "-o", tmp_path / "p.gguf")
    assert done.returncode == 0, done.stderr
    assert metadata.read(tmp_path / "p.gguf").plan.budget_total == 108
    refused(side_file, "--budget", "0.3", "-o", tmp_path / "q.gguf", expect="--plan-only")
    refused(side_file, "--target-tps", "3", "--plan-only", "-o", tmp_path / "q.gguf", expect="needs the model")


def test_side_file_of_another_model_is_refused(side_file, tmp_path, testbed_path):
    other = tmp_path / "other.gguf"
    with GGUFFile(side_file) as file:
        file.set("allocmoe.model.architecture", "mixtral")
        file.write_metadata(other)
    with pytest.raises(ValueError, match="another model"):
        Llama(str(testbed_path), plan_path=str(other), verbose=False)
    with pytest.raises(ValueError, match="has no plan"):
        Llama(str(testbed_path), plan_path=str(testbed_path), verbose=False)
    with pytest.raises(ValueError, match="plan_path"):
        Llama(str(side_file), verbose=False)

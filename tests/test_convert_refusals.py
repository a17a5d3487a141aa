"""Malformed files, absurd numbers, options that have no say: one line, exit code 1 or 2, no output, before any work."""

import json
from pathlib import Path
import shutil
import subprocess

from allocmoe_edge.convert import cli, estimate, output
from allocmoe_edge.convert.progress import Conversion
from allocmoe_edge.plan import metadata
import gguf
from gguf_factory import random_estimator, write_imatrix
import numpy as np
import odd_models
import pytest
from test_convert import COMMAND, run

TEXT = "It was the best of times, it was the worst of times. " * 200


@pytest.fixture
def refused(out, capsys):
    """Runs the command in this process and checks how it ends; returns what it has said before."""

    def check(*args, expect: str, code: int = 1) -> str:
        before = sorted(out.iterdir())
        assert cli.main([str(arg) for arg in args]) == code
        said, printed = capsys.readouterr()[::-1]
        assert printed == "" and "Traceback" not in said and "should not happen" not in said
        *lines, last = said.splitlines()
        assert last.startswith("allocmoe-convert: error: ") and expect in last, said
        assert not [line for line in lines if "error" in line]
        assert sorted(out.iterdir()) == before
        return "\n".join(lines)

    return check


@pytest.fixture
def folder(tiny, tmp_path) -> Path:
    """A copy of the Hugging Face folder, to be damaged."""
    return Path(shutil.copytree(tiny.hf_path, tmp_path / "in" / "model"))


# numbers


@pytest.mark.parametrize(
    "option, value",
    [
        ("--ctx-size", "1"),
        ("--ctx-size", "0"),
        ("--ctx-size", "1e3"),
        ("--ctx-size", "99999999999"),
        ("--seed", "-1"),
        ("--seed", str(2**32)),
        ("--threads", "0"),
        ("--threads", "100000"),
        ("--k-base", "0"),
        ("--calib-tokens", "0"),
        ("--estimate-tokens", "-5"),
        ("--n-gpu-layers", "-7"),
        ("--n-cpu-moe", "-1"),
        ("--target-tps", "nan"),
        ("--target-tps", "0"),
        ("--target-tps", "fast"),
        ("--max-ppl-increase", "-3%"),
        ("--max-ppl-increase", "%"),
        ("--max-ppl-increase", "inf"),
        ("--max-ppl-increase", "1e308"),
        ("--max-ppl-increase", "1e9%"),
        ("--max-ppl-increase", "1"),
        ("--quantize", "Q99"),
        ("--profile", "slow"),
    ],
)
def test_numbers_out_of_range(tiny_planned, out, refused, option, value):
    refused(tiny_planned, f"{option}={value}", "-o", out / "m.gguf", expect=f"argument {option}: ", code=2)


def test_experts_on_the_cpu_without_a_gpu(tiny_planned, out, refused):
    refused(tiny_planned, "--n-cpu-moe", "1", "-o", out / "m.gguf", expect="has no effect without --n-gpu-layers")


def test_per_cent_without_their_sign(tiny_planned, out, refused):
    """3 was 300%, and nothing said so."""
    options = ["--max-ppl-increase", "3", "-o", out / "m.gguf"]
    refused(tiny_planned, *options, expect="3 per cent are written 3%", code=2)
    assert cli._share("300%") == 3.0 and cli._share("3%") == cli._share("0.03") == 0.03


@pytest.mark.parametrize("budget", ["nan", "1e999", "-1", "", "0", "²", "9" * 30])
def test_budgets_that_are_none(tiny_planned, out, refused, budget):
    refused(tiny_planned, f"--budget={budget}", "-o", out / "m.gguf", expect="budget")


def test_budgets_by_name_are_of_a_plan(tiny_planned, out, refused):
    refused(tiny_planned, "--budget", "fast", "-o", out / "m.gguf", expect="names are of budgets of a plan")


def test_numbers_that_the_model_cannot_have(tiny_planned, tiny, out, refused):
    target = ["-o", out / "m.gguf"]
    refused(tiny.gguf_path, "--ctx-size", "257", *target, expect="--ctx-size 257: the model reads 256 tokens at most")
    refused(tiny.gguf_path, "--k-base", "5", *target, expect="--k-base 5: the model's tokens use 4 experts a layer")
    refused(tiny.gguf_path, "--k-base", "3", *target, expect="8 activations, fewer than the 12 of --k-base 3")
    options = ["--token-rule", "estimate", "--k-base", "3"]
    refused(tiny.gguf_path, *options, *target, expect="8 activations, fewer than the 12 of --k-base 3")


# token rules


@pytest.mark.parametrize("rule", ["estimate", "threshold", "batch"])
def test_a_rule_that_the_model_cannot_run(out, refused, tmp_path, rule):
    """Before text and profile, which take hours."""
    model = odd_models.write_grovemoe(tmp_path / "m.gguf")
    expect = f"token rule {rule}: this model, or the backend that it runs on, "
    assert refused(model, "--token-rule", rule, "-o", out / "m.gguf", expect=expect) == ""


def test_estimates_that_the_model_cannot_have(out, tmp_path, capsys, monkeypatch):
    """They are left out at once, the profile takes as much text as without, and no time is expected for them."""
    expected, expect = [], Conversion.expect
    monkeypatch.setattr(Conversion, "expect", lambda self, stages: expected.append(stages) or expect(self, stages))
    model = odd_models.write_grovemoe(tmp_path / "m.gguf")
    assert cli.main([str(model), "--ctx-size", "128", "-o", str(out / "m.gguf")]) == 0
    first, *rest = capsys.readouterr().err.splitlines()
    assert "token rule estimate is left out" in first
    assert any("passes over 16 windows" in line for line in rest)
    assert not [name for name, _ in expected[-1] if name.startswith("estimates")]


@pytest.mark.parametrize("rule", [[], ["--token-rule", "estimate"]], ids=["tried", "asked for"])
def test_estimates_in_the_file_that_the_model_cannot_have(out, refused, tmp_path, capsys, rule):
    """They were compared with other rules, and written, where they did nothing."""
    source = odd_models.write_grovemoe(tmp_path / "source.gguf")
    full = metadata.read(source).full
    rows, calibration = tuple(np.linspace(2, 1, k) for k in full), metadata.Calibration("made up", 1, "0" * 64)
    estimator = random_estimator(len(full), odd_models.N_EXPERT, odd_models.N_EMBD, 4, 0, 1)
    profile = metadata.Profile(rows, (1.0,) * len(full), calibration, estimator=estimator)
    model = tmp_path / "m.gguf"
    output.write_planned(source, model, profile.plan(0.5, full), profile)
    options = [str(model), "--max-ppl-increase", "50%", "--ctx-size", "32", "--calib-tokens", "64", *rule]
    said = "this model, or the backend that it runs on, has no estimates"
    if rule:
        refused(*options, "-o", out / "m.gguf", expect=f"token rule estimate: {said}")
        return
    assert cli.main([*options, "-o", str(out / "m.gguf")]) == 0
    assert f"token rule estimate is left out: {said}" in capsys.readouterr().err
    assert metadata.read(out / "m.gguf").profile.estimator is None


def test_no_estimates_after_all(out, tmp_path, capsys, monkeypatch):
    """A calibration that gives none is said to, whoever has found them possible."""
    monkeypatch.setattr(estimate, "possible", lambda *_: True)
    model, text = odd_models.write_grovemoe(tmp_path / "m.gguf"), ["--ctx-size", "32", "--calib-tokens", "64"]
    said = "this model, or the backend that it runs on, has no estimates"
    assert cli.main([str(model), "--token-rule", "estimate", *text, "-o", str(out / "m.gguf")]) == 1
    assert f"error: token rule estimate: {said}" in capsys.readouterr().err
    assert cli.main([str(model), *text, "-o", str(out / "m.gguf")]) == 0
    assert f"token rule estimate is left out: {said}" in capsys.readouterr().err


def test_thresholds_do_not_stand_in_for_estimates(built, out, refused, capsys):
    """Llama 4's weights act on the experts' input: it has thresholds and no estimates. Some were calibrated where a file had those."""
    text = ["--ctx-size", "32", "--calib-tokens", "64"]
    options = [*text, "--token-rule", "threshold", "-o", str(out / "m.gguf")]
    assert cli.main([str(built["llama4"].gguf_path), *options]) == 0
    capsys.readouterr()
    options = [*text, "--token-rule", "estimate", "-o", out / "e.gguf"]
    refused(out / "m.gguf", *options, expect="token rule estimate: this model")


# files


@pytest.mark.parametrize("content, expect", [(b"\xff\xfe\x00\x01" * 100, "not UTF-8"), (None, "Is a directory")])
def test_calibration_text_is_looked_at_first(tiny_planned, out, refused, tmp_path, content, expect):
    """Before a model is converted, quantised or loaded."""
    text = tmp_path / "x.txt"
    text.mkdir() if content is None else text.write_bytes(content)
    for model in (tiny_planned, tmp_path / "no such model"):
        assert refused(model, "--calib", text, "-o", out / "m.gguf", expect=f"text {text}: {expect}") == ""
    refused(tiny_planned, "--calib", tmp_path / "none", "-o", out / "m.gguf", expect="No such file")


def test_empty_calibration_text(tiny_planned, out, refused, tmp_path):
    (tmp_path / "x.txt").touch()
    refused(tiny_planned, "--calib", tmp_path / "x.txt", "-o", out / "m.gguf", expect="0 tokens, want at least 512")


@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf])
def test_importance_that_is_no_mean_square(tiny_planned, out, refused, tmp_path, value):
    """llama.cpp's quantiser would stop with an assertion, and print a debugger's words."""
    sums = np.ones((8, 256))
    sums[3, 7] = value
    imatrix = write_imatrix(tmp_path / "imatrix.gguf", {"blk.1.ffn_gate_exps.weight": (sums, np.ones(8))})
    options = ["--quantize", "IQ2_XXS", "--imatrix", imatrix]
    refused(tiny_planned, *options, "-o", out / "m.gguf", expect="blk.1.ffn_gate_exps.weight holds numbers that are")


def test_crash_of_llama_cpp_is_one_line(tiny, tmp_path, monkeypatch):
    """Its own words where it has some; without a debugger."""
    from allocmoe_edge.convert import subprocesses

    code = "import os, sys; print('[Inferior 1 detached]'); print('/x/y/ggml-quants.c:17: GGML_ASSERT(a > 0) failed'); os.abort()"
    for program, reason in (
        (code, "llama.cpp crashed: GGML_ASSERT(a > 0) failed"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "llama.cpp crashed: Segmentation fault"),
        ("import os; assert os.environ['GGML_NO_BACKTRACE']; print('enough'); raise SystemExit(3)", "enough"),
    ):
        with pytest.raises(subprocesses.ChildFailed) as error:
            subprocesses.run(["python3", "-c", program], tmp_path / "none", 1, "crashing")
        assert error.value.reason == reason


def test_no_importance_matrix(tiny_planned, out, refused, tmp_path):
    (tmp_path / "text").write_text("1")
    for path, expect in (
        (tmp_path / "text", "not a GGUF file"),
        (tmp_path, "a folder"),
        (tmp_path / "none", "no such"),
    ):
        refused(tiny_planned, "--quantize", "Q4_0", "--imatrix", path, "-o", out / "m.gguf", expect=expect)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + b"\xff" * 500])
def test_damaged_gguf(out, refused, tmp_path, content):
    (tmp_path / "m.gguf").write_bytes(content)
    refused(tmp_path / "m.gguf", "-o", out / "m.gguf", expect="m.gguf: ")


NESTED = "[" * 100_000


@pytest.mark.parametrize("content", ["", "{", "[]", "3", NESTED, b"\xff\xfe"], ids=lambda content: str(content)[:3])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_that_is_none(folder, out, refused, name, content):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(folder, "-o", out / "m.gguf", expect=f"its {name} cannot be read")


@pytest.mark.parametrize(
    "content", [{}, {"weight_map": 3}, {"weight_map": {}}, {"weight_map": {"a": 5}}, {"weight_map": []}]
)
def test_index_without_files(folder, out, refused, content):
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    refused(folder, "-o", out / "m.gguf", expect="names no files of weights (weight_map)")


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": ["x"]}},
        {"a": {"dtype": "F32", "shape": [1.5]}},
        {"a": {"dtype": "F32", "shape": 3}},
        {"a": {"dtype": "F32", "shape": [10**30, 10**300]}},
        {"a": {"dtype": "F32", "shape": [-5]}},
        {"a": []},
        [],
        NESTED,
    ],
    ids=lambda header: str(header)[:40],
)
def test_safetensors_with_a_damaged_header(folder, out, refused, header):
    data = (header if isinstance(header, str) else json.dumps(header)).encode()
    (folder / "model.safetensors").write_bytes(len(data).to_bytes(8, "little") + data)
    refused(folder, "-o", out / "m.gguf", expect="its header cannot be read")


def test_damaged_tokenizer(folder, out, refused):
    """Upstream's own error, found by the converter's process."""
    (folder / "tokenizer.json").write_text('{"model": 3}')
    refused(folder, "--pre-tokenizer", "gpt-2", "-o", out / "m.gguf", expect=f"converting {folder}: ")


def test_checkpoint_is_a_folder(tiny, out, refused):
    (out / "m.gguf.profile").mkdir()
    refused(tiny.gguf_path, "-o", out / "m.gguf", expect="m.gguf.profile: Is a directory")


def test_output_that_no_file_can_have(tiny_planned, out, refused):
    refused(tiny_planned, "-o", out / ("m" * 300), expect="File name too long")
    refused(tiny_planned, "-o", "", expect="is a folder")
    refused(tiny_planned, "--force", "-o", "/dev/full", expect="/dev/full: is a device")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_full_device_behind_the_output(tiny_planned, out):
    with open("/dev/full", "w") as full:
        command = [*COMMAND, str(tiny_planned), "-o", str(out / "m.gguf")]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == "allocmoe-convert: error: No space left on device"


# options that have no say


@pytest.mark.parametrize(
    "option",
    [
        "--k-base=2",
        "--profile=isolated",
        "--metric=perplexity",
        "--calib-tokens=64",
        "--estimate-tokens=64",
        "--ctx-size=32",
        "--seed=1",
    ],
)
def test_options_beside_stored_sensitivities(tiny_planned, out, refused, option):
    name = option.partition("=")[0]
    said = refused(tiny_planned, option, "-o", out / "m.gguf", expect=f"{name}: has no effect")
    assert "using the sensitivities" in said
    # even where the model is run on text
    if name in ("--k-base", "--profile", "--metric"):
        options = ["--max-ppl-increase", "3%"]
        refused(tiny_planned, option, *options, "-o", out / "m.gguf", expect="--reprofile measures anew")


def test_options_that_say_what_is_stored(tiny_planned, out):
    options = ["--k-base", "1", "--profile", "fast", "--metric", "kl"]
    assert cli.main([str(tiny_planned), *options, "-o", str(out / "m.gguf")]) == 0


@pytest.mark.parametrize(
    "options, expect",
    [
        (["--calib", "TEXT", "--seed", "3"], "--seed is for the text that the model writes"),
        (["--token-rule", "off", "--estimate-tokens", "64"], "--estimate-tokens is for token rule estimate"),
        (["--target-tps", "3", "--cost", "activations"], "--target-tps spends milliseconds"),
        (["--imatrix", "TEXT"], "--imatrix is for --quantize"),
        (["--allow-requantize"], "--allow-requantize is for --quantize"),
        (["--pre-tokenizer", "gpt-2"], "--pre-tokenizer is for Hugging Face models"),
    ],
)
def test_options_that_contradict_each_other(tiny, out, refused, tmp_path, options, expect):
    (tmp_path / "text.txt").write_text(TEXT)
    options = [str(tmp_path / "text.txt") if option == "TEXT" else option for option in options]
    assert refused(tiny.gguf_path, *options, "-o", out / "m.gguf", expect=expect) == ""


def test_planned_anew_is_not_checked(tiny_planned, out, capsys):
    """And says so, on the terminal and in the file."""
    assert cli.main([str(tiny_planned), "-o", str(out / "m.gguf")]) == 0
    assert "not checked on held-out text" in capsys.readouterr().out
    assert metadata.read(out / "m.gguf").profile.held_out is None


# numbers that are none, from the model


QUICK = ["--ctx-size", "32", "--calib-tokens", "64", "--estimate-tokens", "64"]


@pytest.fixture(scope="module")
def with_nan(tiny, tmp_path_factory) -> Path:
    """The tiny model with an expert of which nothing is a number."""
    path = Path(shutil.copy(tiny.gguf_path, tmp_path_factory.mktemp("nan") / "nan.gguf"))
    tensor = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}["blk.2.ffn_down_exps.weight"]
    size = int(tensor.n_bytes) // 8
    with open(path, "r+b") as file:
        file.seek(int(tensor.data_offset) + 5 * size)
        file.write(np.full(size // 4, np.nan, np.float32).tobytes())
    return path


@pytest.mark.parametrize("options", [[], ["--token-rule", "off"]])
def test_weights_that_are_not_finite_are_named(with_nan, out, refused, tmp_path, options):
    (tmp_path / "text.txt").write_text(TEXT)
    text = QUICK[: 4 if options else 6]
    refused(
        with_nan,
        *text,
        *options,
        "--calib",
        tmp_path / "text.txt",
        "-o",
        out / "m.gguf",
        expect="nan.gguf: blk.2.ffn_down_exps.weight, expert 5 holds weights that are NaN or infinite",
    )


def test_weights_that_are_not_finite_and_text_of_the_model(with_nan, out, refused):
    refused(with_nan, *QUICK, "-o", out / "m.gguf", expect="blk.2.ffn_down_exps.weight, expert 5 holds")


def test_text_of_one_character(built, out, tmp_path, capsys):
    """Estimates are left out; where they are asked for, nothing is written."""
    (tmp_path / "a.txt").write_text("a" * 20_000)
    command = [built["olmoe"].gguf_path, *QUICK, "--calib", tmp_path / "a.txt", "-o", out / "m.gguf"]
    assert cli.main([*map(str, command)]) == 0
    assert "token rule estimate is left out: cannot be calibrated on this text" in capsys.readouterr().err
    found = metadata.read(out / "m.gguf")
    assert found.plan.token_rule != "estimate" and found.profile.estimator is None
    (out / "m.gguf").unlink()
    assert cli.main([*map(str, command), "--token-rule", "estimate"]) == 1
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("allocmoe-convert: error: token rule estimate: cannot be calibrated")
    assert "Warning" not in said and not (out / "m.gguf").exists()


def test_whole_number_that_looks_like_a_percentage(planned_path, out):
    """Taken as what it is, and said so."""
    done = run(planned_path, "--budget", "50", "--plan-only", "-o", out / "p.gguf")
    assert done.returncode == 0 and metadata.read(out / "p.gguf").plan.budget_total == 50
    assert (
        "--budget 50: 50 of the model's 360 expert activations per token; 50 per cent of them are written 50%"
        in done.stderr
    )
    for budget in ("50%", "180", "0.14"):
        assert (
            "per cent"
            not in run(planned_path, "--force", "--budget", budget, "--plan-only", "-o", out / "p.gguf").stderr
        )

"""allocmoe-convert on Hugging Face folders and repositories, and one test per way it refuses them."""

import functools
import json
import os
from pathlib import Path
import resource
import shutil
import signal
import subprocess
import sys
import time

from allocmoe_edge import Llama
from allocmoe_edge.convert import ConvertError, cli, huggingface, output, source, subprocesses
from allocmoe_edge.convert.settings import Settings
from allocmoe_edge.plan import metadata
from fake_hub import serve
import gguf
import pytest
from test_convert import COMMAND, refused, run, tensor_hashes
from test_quantize import check_q8_0

QUICK = ["--ctx-size", "32", "--calib-tokens", "64", "--token-rule", "off"]
GPT2 = ["--pre-tokenizer", "gpt-2"]


@pytest.fixture
def folder(tiny, tmp_path) -> Path:
    """A copy of the Hugging Face folder, to be damaged."""
    return Path(shutil.copytree(tiny.hf_path, tmp_path / "in" / "model"))


def test_folder_in_one_command(tiny, out):
    done = run(tiny.hf_path, *GPT2, "--outtype", "f32", *QUICK, "--budget", "0.5", "-o", out / "m.gguf")
    assert done.returncode == 0, done.stderr
    # also: no bar in a pipe, no log of upstream's
    assert "converting" in done.stderr and "hf-to-gguf" not in done.stderr and "%|" not in done.stderr
    assert [path.name for path in out.iterdir()] == ["m.gguf"]
    assert metadata.read(out / "m.gguf").plan.budget_total == 8
    # upstream's file of the same folder, made without us
    assert tensor_hashes(out / "m.gguf") == tensor_hashes(tiny.gguf_path)
    next(Llama(str(out / "m.gguf"), n_ctx=64, verbose=False).generate([1, 2, 3]))


def test_folder_quantised_in_one_command(tiny, out):
    done = run(tiny.hf_path, *GPT2, "--outtype", "f32", "--quantize", "q8_0", *QUICK, "-o", out / "m.gguf")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in out.iterdir()] == ["m.gguf"]
    check_q8_0(out / "m.gguf", tiny.gguf_path)
    assert metadata.read(out / "m.gguf").plan.budget_total == 8


# repositories


def hub_env(endpoint: str, home: Path) -> dict:
    names = dict(HF_ENDPOINT=endpoint, HF_HOME=str(home), HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1")
    return {**{k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}, **names}


def test_repository(tiny, tiny_planned, out, tmp_path):
    """Downloaded, converted, named after the repository; a second time from the cache, without a network."""
    (tiny.hf_path / "evil.py").write_text("")
    args = ["org/Tiny-MoE", *GPT2, "--outtype", "f32", *QUICK, "-o", out / "m.gguf", "--force"]
    with serve(tiny.hf_path, "org/Tiny-MoE") as (endpoint, asked):
        env = hub_env(endpoint, tmp_path / "home")
        done = run(*args, env=env)
        assert done.returncode == 0, done.stderr
        assert not [path for path in asked if path.endswith(".py")]
    (tiny.hf_path / "evil.py").unlink()
    assert tensor_hashes(out / "m.gguf") == tensor_hashes(tiny.gguf_path)
    assert gguf.GGUFReader(out / "m.gguf").get_field("general.name").contents() == "Tiny-MoE"
    code = "import sys; from allocmoe_edge.convert import huggingface; print(huggingface.download(sys.argv[1]))"
    command, env = [sys.executable, "-c", code, "org/Tiny-MoE"], {**env, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert (Path(done.stdout.strip()) / "model.safetensors").is_file(), done.stderr


def test_weights_of_before_safetensors(folder, tiny, out, tmp_path):
    """Fetched where there are no others; it was said that there are none."""
    from safetensors.torch import load_file
    import torch

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    code = "import sys; from allocmoe_edge.convert import huggingface; print(huggingface.download(sys.argv[1]))"
    for name, other in (("model.safetensors", "pytorch_model.bin"), ("pytorch_model.bin", "model.safetensors")):
        with serve(folder, "org/name") as (endpoint, _):
            command, env = [sys.executable, "-c", code, "org/name"], hub_env(endpoint, tmp_path / name)
            done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
        fetched = Path(done.stdout.strip())
        assert (fetched / name).is_file() and not (fetched / other).exists(), done.stderr
        (folder / "model.safetensors").unlink(missing_ok=True)
    size = huggingface.converted_size(huggingface.check_folder(fetched), "f32")
    huggingface.convert(fetched, out / "m.gguf", "f32", size, "gpt-2", "Tiny")
    assert tensor_hashes(out / "m.gguf") == tensor_hashes(tiny.gguf_path)


def test_dense_repository_is_not_downloaded(folder, out, tmp_path):
    edit_config(folder, num_experts=0, num_local_experts=0, moe_intermediate_size=None)
    with serve(folder, "org/dense") as (endpoint, asked):
        refused("org/dense", "-o", out / "m.gguf", expect="no experts to allocate", env=hub_env(endpoint, tmp_path))
        assert not [path for path in asked if "safetensors" in path]


def test_missing_repositories(folder, out, tmp_path):
    with serve(folder, "org/name") as (endpoint, _):
        env = hub_env(endpoint, tmp_path)
        refused("org/none", "-o", out / "m.gguf", expect="no such folder here, and no such repository", env=env)
        (folder / "config.json").unlink()
        refused("org/name", "-o", out / "m.gguf", expect="has no config.json", env=env)


def test_gated_repository(folder, out, tmp_path):
    """The token is sent, and said to nobody else."""
    edit_config(folder, num_experts=0, num_local_experts=0, moe_intermediate_size=None)  # which shows that it was read
    wanted, other = "hf_" + "S" * 34, "hf_" + "SSS" + "T" * 31
    with serve(folder, "org/name", token=wanted) as (endpoint, _):
        for token, expected in ((None, "gated"), (other, "gated"), (wanted, "no experts to allocate")):
            env = {name: value for name, value in hub_env(endpoint, tmp_path).items() if name != "HF_TOKEN"}
            if token is not None:
                env["HF_TOKEN"] = token
            done = run("org/name", "-o", out / "m.gguf", "--debug", env=env)
            assert done.returncode == 1 and expected in done.stderr, (token, done.stderr)
            assert "SSS" not in done.stderr + done.stdout


@pytest.mark.slow
def test_no_network(out, tmp_path):
    """Takes the 23 seconds for which huggingface_hub tries again."""
    refused("org/name", "-o", out / "m.gguf", expect="cannot be reached", env=hub_env("http://127.0.0.1:9", tmp_path))


def test_offline(out, tmp_path):
    env = {**hub_env("http://127.0.0.1:9", tmp_path), "HF_HUB_OFFLINE": "1"}
    refused("org/name", "-o", out / "m.gguf", expect="HF_HUB_OFFLINE", env=env)


# refusals


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused_here(capsys, *args, expect: str) -> None:
    """Like `refused`, without a process: for what is refused before anything runs."""
    assert cli.main([str(arg) for arg in args]) == 1
    assert expect in capsys.readouterr().err


def test_no_such_folder(out, capsys):
    refused_here(capsys, out / "none" / "model", "-o", out / "m.gguf", expect="no such file or folder")
    refused_here(
        capsys, "../none", "-o", out / "m.gguf", expect="../none: no such file or folder here, and no name of a rep"
    )


def test_no_model_in_the_folder(tmp_path, out, capsys):
    refused_here(capsys, tmp_path, "-o", out / "m.gguf", expect="it has no config.json")
    (tmp_path / "m-Q4_K_M.gguf").touch()
    refused_here(capsys, tmp_path, "-o", out / "m.gguf", expect="give one of them (m-Q4_K_M.gguf)")


def test_folder_is_looked_at_before_the_packages(tmp_path, out, capsys, monkeypatch):
    """None of them makes a model of it."""
    monkeypatch.setattr(huggingface, "_NEEDED", ("a_package_that_is_not_there",))
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path, "", "."):
        refused_here(capsys, folder, "-o", out / "m.gguf", expect="it has no config.json")
    (tmp_path / "m-Q4_K_M.gguf").touch()
    refused_here(capsys, tmp_path, "-o", out / "m.gguf", expect="give one of them (m-Q4_K_M.gguf)")
    refused_here(capsys, "org/name", "-o", out / "m.gguf", expect="needs a_package_that_is_not_there")


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_config_is_damaged(folder, out, capsys, text):
    (folder / "config.json").write_text(text)
    refused_here(capsys, folder, "-o", out / "m.gguf", expect="config.json cannot be read")


def test_dense_folder(folder, out, capsys):
    edit_config(folder, num_experts=1, num_local_experts=1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if "moe" not in k}))
    refused_here(capsys, folder, "-o", out / "m.gguf", expect="no experts to allocate")


def test_tokenizer_is_missing(folder, out, capsys):
    (folder / "tokenizer.json").unlink()
    refused_here(capsys, folder, "-o", out / "m.gguf", expect="the tokenizer is missing")


def test_weights_are_missing(folder, out, capsys):
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(b"\xff" * 100)
    refused_here(capsys, folder, "-o", out / "m.gguf", expect="its header cannot be read")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-00001-of-00002.safetensors").write_bytes(data)
    refused_here(capsys, folder, "-o", out / "m.gguf", expect="1 of 2 weight files are missing: model-00002")
    for path in folder.glob("model*"):
        path.unlink()
    refused_here(capsys, folder, "-o", out / "m.gguf", expect="the weights are missing")


def test_truncated_weights(folder, out):
    """Upstream's own error, found by the converter's process."""
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100_000])
    refused(folder, *GPT2, "-o", out / "m.gguf", expect=f"converting {folder}:")
    assert list(out.iterdir()) == []


def test_pre_tokenizer_is_not_recognised(folder, out):
    error = refused(folder, "-o", out / "m.gguf", expect="--pre-tokenizer: ")
    assert "gpt-2" in error and "llama-bpe" in error
    assert list(out.iterdir()) == []


def test_pre_tokenizer_is_unknown(folder, out, capsys):
    refused_here(
        capsys, folder, "--pre-tokenizer", "gpt-3", "-o", out / "m.gguf", expect="llama.cpp has none of that name"
    )


def test_architecture_is_not_supported(folder, out):
    edit_config(folder, architectures=["NoSuchMoeForCausalLM"], model_type="no_such")
    error = refused(folder, "-o", out / "m.gguf", expect="NoSuchMoeForCausalLM is not supported")
    assert "Qwen3MoeForCausalLM" in error and "MixtralForCausalLM" in error and "BertModel" not in error


def test_code_of_the_model_is_not_run(folder, out, tmp_path):
    """Though upstream's converter has transformers run it, for some architectures."""
    ran = tmp_path / "ran"
    (folder / "tokenization_own.py").write_text(f"open({str(ran)!r}, 'w')\nclass OwnTokenizer: ...\n")
    path = folder / "tokenizer_config.json"
    own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **own}))
    edit_config(folder, model_type="own")
    with pytest.raises(ConvertError, match="Python code of its own, which is never run"):
        huggingface.convert(folder, out / "m.gguf", "f32", 1 << 20, "gpt-2", None)
    as_upstream = f"from transformers import AutoTokenizer\nAutoTokenizer.from_pretrained({str(folder)!r}, trust_remote_code=True)"
    for first, runs in (("from upstream import run_no_code_of_models\nrun_no_code_of_models()\n", False), ("", True)):
        done = subprocess.run(
            [sys.executable, "-c", first + as_upstream],
            env={**os.environ, "HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(Path(source.__file__).parent)},
            capture_output=True,
            text=True,
        )
        assert ran.exists() == runs, done.stderr  # the second time: the test itself would see it
        assert runs or "Python code of its own" in done.stderr


@pytest.mark.parametrize("name", ["torch", "transformers"])
def test_extra_is_not_installed(folder, out, capsys, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)  # what Python itself takes as "cannot be imported"
    refused_here(capsys, folder, "-o", out / "m.gguf", expect='pip install "allocmoe-edge[hf]"')


def test_options_are_checked_first(folder, tiny_planned, out, tmp_path, capsys):
    target = ["-o", out / "m.gguf"]
    refused_here(capsys, folder, "--budget", "1.5", *target, expect="budget")
    refused_here(capsys, folder, "--calib", tmp_path / "none.txt", *target, expect="No such file")
    refused_here(capsys, folder, "--imatrix", tiny_planned, *target, expect="--imatrix is for --quantize")
    refused_here(
        capsys, folder, "--quantize", "Q4_0", "--imatrix", tiny_planned, *target, expect="no importance matrix"
    )
    refused_here(capsys, tiny_planned, "--outtype", "f16", *target, expect="--outtype is for Hugging Face models")
    refused_here(capsys, folder, "-o", out / "no" / "m.gguf", expect="no such folder")
    (out / "m.gguf").touch()
    refused_here(capsys, folder, *target, expect="--force")
    assert run(folder, "--quantize", "Q4_KM", *target).returncode == 2


def test_disk_too_small_is_seen_before_the_work(folder, tiny, tiny_split, out, monkeypatch, capsys):
    class Usage:
        free = 1_000_000

    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: Usage)
    refused_here(capsys, folder, "--outtype", "f32", "-o", out / "m.gguf", expect="MB needed for m.gguf in f32")
    refused_here(capsys, folder, "--quantize", "Q8_0", "-o", out / "m.gguf", expect="and, meanwhile, the same in auto")
    refused_here(capsys, tiny.gguf_path, "--quantize", "Q8_0", "-o", out / "m.gguf", expect="needed for m.gguf")
    refused_here(capsys, tiny_split[0], "-o", out / "m.gguf", expect="needed for m.gguf")


def test_a_plan_alone_needs_little_disk(tiny_planned, out, monkeypatch):
    class Usage:
        free = 4_000_000

    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: Usage)
    done = run(tiny_planned, "--plan-only", "-o", out / "plan.gguf")
    assert done.returncode == 0, done.stderr
    assert (out / "plan.gguf").stat().st_size < source._plan_size(tiny_planned)


def test_sizes_are_estimated_well(tiny):
    """To 10% of what is written: F32 tensors in 16-bit files, the vocabulary and padding make the difference."""
    n_weights = huggingface.check_folder(tiny.hf_path)
    size = tiny.gguf_path.stat().st_size
    assert abs(huggingface.converted_size(n_weights, "f32") - size) < 0.1 * size


@pytest.mark.parametrize("options", [[], ["--quantize", "Q8_0"]])
def test_out_of_disk(tiny, out, options):
    """While converting, and while quantising (32-bit numbers: the conversion fits the limit, by its end)."""
    size = 100_000
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
    model = [tiny.gguf_path] if options else [tiny.hf_path, *GPT2]
    refused(*model, *options, "-o", out / "m.gguf", expect="out of disk", preexec_fn=limit)
    assert list(out.iterdir()) == []


def start_converting(folder: Path, out: Path) -> tuple:
    """The command, at work in upstream's converter, and that process's id."""
    command = [*COMMAND, str(folder), *GPT2, *QUICK, "-o", str(out / "m.gguf")]
    # a test run in the background of a shell has SIGINT ignored, and children inherit that
    default = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=default)
    while "converting" not in process.stderr.readline():
        assert process.poll() is None
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 60
    while not children.read_text().split() and time.monotonic() < deadline:
        time.sleep(0.05)
    return process, int(children.read_text().split()[0])


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the process in /proc")


@linux
@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_while_converting(tiny, out, number, status):
    process, child = start_converting(tiny.hf_path, out)
    process.send_signal(number)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == status, rest
    assert "Traceback" not in rest
    assert list(out.iterdir()) == []
    assert not Path(f"/proc/{child}").exists()


def test_interrupted_while_starting_a_child(tmp_path, monkeypatch):
    """What Popen has started is stopped even where the signal comes before Popen returns."""
    started = []

    class Interrupted(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            started.append(self)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(subprocesses.subprocess, "Popen", Interrupted)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            subprocesses.run([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "none", 1, "waiting")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, handler)
    assert len(started) == 1 and started[0].returncode is not None


@linux
def test_out_of_memory(tiny, out):
    """The kernel ends the process that takes too much with SIGKILL."""
    process, child = start_converting(tiny.hf_path, out)
    os.kill(child, signal.SIGKILL)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "out of memory" in rest and "Traceback" not in rest
    assert list(out.iterdir()) == []


def test_terminated_while_profiling(testbed_path, out):
    command = [*COMMAND, str(testbed_path), "--quantize", "F16", "--allow-requantize", "-o", str(out / "m.gguf")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            while "calibration text" not in process.stderr.readline():
                assert process.poll() is None
            assert any(path.suffix == ".quantized" for path in out.iterdir())
            process.terminate()
            process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 143
    # of all that was made for the run, what has been measured is kept for the next one
    assert {path.name for path in out.iterdir()} <= {"m.gguf.profile"}


def test_source_is_what_the_user_gave_when_it_is_a_gguf(tiny_planned, out):
    with source.as_gguf(Settings(tiny_planned, out / "m.gguf")) as found:
        assert found == source.Source(tiny_planned, temporary=False)
    assert tiny_planned.exists()

"""Whatever is given to a command, it ends in one line and an exit code: malformed files, absurd numbers, odd outputs."""

import os
from pathlib import Path
import shutil
import subprocess
import sys

from allocmoe_edge import chat
from allocmoe_edge.bench import cli as bench
from allocmoe_edge.gguf_file import GGUFFile
from allocmoe_edge.inspect import cli as inspect
from allocmoe_edge.measure.cores import physical_cores
from gguf_factory import plan_keys, split_gguf, write_gguf
import numpy as np
import other_models
import pytest

BIN = os.path.dirname(sys.executable)
# each with what makes it run the model, and little of it
RUN = {
    "allocmoe-inspect": (
        inspect.main,
        ["--measure-curve", "TEXT", "--routing", "TEXT", "--tokens", "32", "--ctx-size", "16"],
    ),
    "allocmoe-chat": (chat.main, []),
    "allocmoe-bench": (bench.main, ["--prompt", "4", "--gen", "1", "--repeats", "1", "--budgets", "0.5"]),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("Once upon a time there was a model. " * 50)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny one with experts, that runs and whose vocabulary takes any text."""
    return other_models.write_jamba(tmp_path_factory.mktemp("model") / "model.gguf")


def ends_in_a_line(capfd, command: str, *args) -> str:
    """Runs a command that must fail; the reason that it gives."""
    code = RUN[command][0]([str(arg) for arg in args])
    err = capfd.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith(f"{command}: error: ")]
    assert code in (1, 2) and len(lines) == 1, err
    assert err.rstrip().endswith(lines[0]) and "Traceback" not in err and "should not happen" not in err, err
    return lines[0]


def patched(path: Path, target: Path, changes: dict) -> Path:
    """A model file with other values of some keys; None removes one."""
    with GGUFFile(path) as file:
        for key, value in changes.items():
            file.set(key, value)
        file.write_metadata(target)
        with open(path, "rb") as data, open(target, "ab") as copy:
            data.seek(file.data_offset)
            shutil.copyfileobj(data, copy)
    return target


def write(folder: Path, kind: str, model: Path) -> Path:
    """A file, or what stands for one, that is no model to run."""
    path = folder / "m.gguf"
    content = model.read_bytes()
    if kind in _BYTES:
        path.write_bytes(_BYTES[kind](content))
    elif kind == "folder":
        path.mkdir()
    elif kind == "missing":
        pass
    elif kind == "second shard":
        return split_gguf(model, folder / "m", 8)[1]
    elif kind == "first shard alone":
        first, *others = split_gguf(model, folder / "m", 8)
        for other in others:
            other.unlink()
        return first
    elif kind == "metadata alone":
        write_gguf(path)
    elif kind == "plan alone":
        keys = {"model.expert_used_count": np.array([0, 4, 4], np.int32), "model.architecture": "deepseek"}
        write_gguf(path, keys=[("general.type", "allocmoe-plan"), *plan_keys(**keys)])
    elif kind == "dense":
        other_models.write_dense(path)
    elif kind == "embedding":
        other_models.write_bert(path)
    elif kind == "no layers":
        patched(model, path, {"jamba.block_count": 0})
    elif kind == "no architecture":
        patched(model, path, {"general.architecture": None})
    elif kind == "unknown architecture":
        patched(model, path, {"general.architecture": "jumbo"})
    elif kind == "no vocabulary":
        patched(model, path, {"tokenizer.ggml.model": None})
    elif kind == "too many experts":
        patched(model, path, {"jamba.expert_count": 5000})
    elif kind == "another number of experts":
        patched(model, path, {"jamba.expert_count": 8})
    elif kind == "experts of no token":
        patched(model, path, {"jamba.expert_used_count": 0})
    elif kind == "a name for a number":
        patched(model, path, {"jamba.expert_count": "four"})
    elif kind == "plan of another model":
        patched(model, path, {"allocmoe.version": 1, "allocmoe.expert_used_count": np.array([0, 3], np.int32)})
    return path


_BYTES = {
    "empty": lambda content: b"",
    "text": lambda content: b"Once upon a time there was no model",
    "GGUF and nothing": lambda content: b"GGUF",
    "GGUF and noise": lambda content: b"GGUF\x03\x00\x00\x00" + b"\xff" * 1000,
    "version 99": lambda content: content[:4] + b"\x63" + content[5:],
    "cut in the metadata": lambda content: content[:3000],
    "cut in the weights": lambda content: content[:-1000],
    "noise in the metadata": lambda content: content[:40] + bytes(range(200)) + content[240:],
}
_OTHERS = [
    "folder", "missing", "second shard", "first shard alone", "metadata alone", "plan alone", "dense", "embedding",
    "no layers", "no architecture", "unknown architecture", "no vocabulary", "too many experts",
    "another number of experts", "experts of no token", "a name for a number", "plan of another model",
]  # fmt: skip


@pytest.mark.parametrize(
    "command, kind",
    # a chat takes models without experts, too: tests/test_chat.py
    [
        (c, kind)
        for c in RUN
        for kind in (*_BYTES, *_OTHERS)
        if c != "allocmoe-chat" or kind not in ("dense", "embedding")
    ],
)
def test_files_that_are_no_model_to_run(command, kind, model, text, tmp_path, capfd):
    path = write(tmp_path, kind, model)
    options = [text if option == "TEXT" else option for option in RUN[command][1]]
    line = ends_in_a_line(capfd, command, path, *options)
    assert path.stem[:2] in line and str(path.parent) in line, line


NUMBERS = ["-1", "0", "1", "x", "", "nan", "1e3", "2147483648", "9" * 400, "0.5", "-0", "²"]
INSPECT = ["--tokens", "--ctx-size", "--threads", "--n-gpu-layers", "--n-cpu-moe", "--budgets"]
BENCH = [
    "--prompt", "--depth", "--gen", "--repeats", "--seed", "--threads", "--ubatch", "--n-gpu-layers", "--n-cpu-moe",
    "--noise-limit", "--budgets",
]  # fmt: skip


@pytest.mark.parametrize(
    "command, option",
    [*(("allocmoe-inspect", option) for option in INSPECT), *(("allocmoe-bench", option) for option in BENCH)],
)
def test_absurd_numbers(command, option, model, text, capfd):
    """Refused, or taken: nothing else."""
    options = [str(text) if each == "TEXT" else each for each in RUN[command][1]]
    for number in NUMBERS:
        code = RUN[command][0]([str(model), *options, f"{option}={number}"])
        out, err = capfd.readouterr()
        assert code in (0, 1, 2), (number, err)
        assert "Traceback" not in err and "should not happen" not in err, (number, err)
        assert (code == 0) == bool(out) and (code == 0 or f"{command}: error: " in err), (number, err)


def test_more_tokens_than_there_is_memory_for(model, capfd):
    """Refused before it is asked for: a system that promises more than it has would kill the process."""
    for option in ("--prompt", "--depth", "--gen"):
        line = ends_in_a_line(capfd, "allocmoe-bench", model, option, 2_000_000_000)
        assert "want a whole number from 0 to 16777216" in line


@pytest.mark.parametrize("command", RUN)
def test_what_we_refuse_is_not_llama_cpps(command, model, text, capfd):
    """It was said that llama.cpp could not load the model, and in Python's names."""
    common = [text if each == "TEXT" else each for each in RUN[command][1]]
    options = ["--n-cpu-moe", 2, "--n-gpu-layers", "auto"]
    line = ends_in_a_line(capfd, command, model, *common, *options)
    assert line == f"{command}: error: --n-cpu-moe: found 2, want 0 where 'auto' chooses what goes on the GPU"
    if command != "allocmoe-inspect":
        line = ends_in_a_line(capfd, command, model, *common, "--expert-cache", 1)
        assert line.startswith(f"{command}: error: --expert-cache: found 1 bytes, want at least ")


@pytest.mark.parametrize(
    "command, options, message",
    [
        *(
            ("allocmoe-inspect", [option, value], f"{option}: has no effect without --measure-curve or --routing")
            for option, value in (
                ("--tokens", 64), ("--ctx-size", 64), ("--threads", physical_cores() + 1), ("--n-gpu-layers", 1), ("--n-cpu-moe", 1),
            )
        ),
        ("allocmoe-inspect", ["--budgets", "0.5"], "--budgets: has no effect without --measure-curve"),
        ("allocmoe-inspect", ["--routing", "TEXT", "--budgets", "0.5"], "--budgets: has no effect without --measure-curve"),
        *(
            (command, [*RUN[command][1], "--n-cpu-moe", 1], "--n-cpu-moe: has no effect without --n-gpu-layers: all experts")
            for command in RUN
        ),
        *(
            (command, [*RUN[command][1], "--miss-price", price, *more], message)
            for command in ("allocmoe-chat", "allocmoe-bench")
            for price, more, message in (
                ("auto", ["--expert-cache", 0], "--miss-price: has no effect without an expert cache"),
                (4, ["--expert-cache", "10MB"], "--miss-price: has no effect but under token rule 'estimate'"),
            )
        ),
    ],
    ids=str,
)  # fmt: skip
def test_options_without_effect(command, options, message, model, text, capfd):
    """They were accepted, and nothing said that they change nothing."""
    line = ends_in_a_line(capfd, command, model, *(text if each == "TEXT" else each for each in options))
    assert line.startswith(f"{command}: error: {message}"), line


def test_miss_price_where_the_memory_decides(model, capfd):
    """By itself a file gets an expert cache where it is larger than the memory: what works there is no error elsewhere."""
    assert bench.main([str(model), *map(str, RUN["allocmoe-bench"][1]), "--miss-price", "4"]) == 0
    assert "--miss-price has no effect here: there is no expert cache" in capfd.readouterr().err


def test_a_text_that_is_none(model, tmp_path, capfd):
    """allocmoe-bench measured on it, for its speed is that of any other tokens, and wrote its name into the results."""
    binary = tmp_path / "text.txt"
    binary.write_bytes(b"\xff\xfe" + bytes(range(256)) * 100)
    options = RUN["allocmoe-bench"][1]
    assert "not UTF-8 text" in ends_in_a_line(capfd, "allocmoe-bench", model, *options, "--text", binary)


# --- outputs


@pytest.mark.parametrize("option", ["--json", "--csv"])
@pytest.mark.parametrize(
    "name, message", [(".", "is a folder"), ("none/x", "no such folder"), ("MODEL", "which is read")]
)
def test_outputs_that_cannot_be_written(model, tmp_path, capfd, option, name, message):
    target = model if name == "MODEL" else tmp_path / name
    before = model.read_bytes()
    line = ends_in_a_line(capfd, "allocmoe-bench", model, *RUN["allocmoe-bench"][1], option, target)
    assert message in line and model.read_bytes() == before and os.listdir(tmp_path) == []


def test_figures_over_what_is_read(model, tmp_path, capfd):
    pytest.importorskip("matplotlib")
    text = tmp_path / "text.svg"
    text.write_text("Once upon a time " * 50)
    assert "which is read" in ends_in_a_line(capfd, "allocmoe-inspect", model, "--measure-curve", text, "--plot", text)
    assert text.read_text().startswith("Once")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize(
    "arguments",
    [["allocmoe-inspect", "MODEL"], ["allocmoe-inspect", "MODEL", "--json"], ["allocmoe-bench", "MODEL", "--prompt", "4", "--gen", "0"],
     ["allocmoe-inspect", "--help"], ["allocmoe-bench", "--version"]],
    ids=" ".join,
)  # fmt: skip
def test_full_device(model, arguments):
    command = [os.path.join(BIN, arguments[0]), *(model if each == "MODEL" else each for each in arguments[1:])]
    # argparse passes over what it cannot print at once
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == f"{arguments[0]}: error: No space left on device"
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


def test_full_device_as_a_file(model, capfd):
    if not Path("/dev/full").exists():
        pytest.skip("no device that is always full")
    line = ends_in_a_line(capfd, "allocmoe-bench", model, *RUN["allocmoe-bench"][1], "--json", "/dev/full")
    assert "/dev/full: could not be written: No space left on device" in line
    assert Path("/dev/full").is_char_device()


def test_names_that_the_terminal_cannot_show(tmp_path, model):
    """Neither an error nor a control sequence."""
    path = patched(model, tmp_path / "m.gguf", {"general.name": "Modèle 日本 \x1b[2J"})
    for command in (
        [os.path.join(BIN, "allocmoe-inspect"), path],
        [os.path.join(BIN, "allocmoe-bench"), path, *RUN["allocmoe-bench"][1]],
    ):
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
        assert done.returncode == 0, done.stderr
        assert "Mod?le ?? ?[2J" in done.stdout and "\x1b" not in done.stdout

"""Paths as people have them: letters beyond ASCII, blanks, links, and models in folders where nobody may write."""

import ctypes
import os
from pathlib import Path
import shutil
import subprocess
import sys

from allocmoe_edge import Llama
from allocmoe_edge.plan import metadata
import fuzz_gguf
import httpx
import odd_models
import other_models
import pytest
from test_hostile_files import write_adapter
from test_projector import answer, handler

FOLDER = "Modèle 模型 ☃ {0} %s 'x' \"y\""
SIZES = dict(n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False)
OPTIONS = ["--budget", "0.5", "--ctx-size", "32", "--calib-tokens", "64", "--estimate-tokens", "128", "--threads", "1"]
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With a planned model, its plan beside it, a dense one, an adapter and a projector."""
    made = tmp_path_factory.mktemp("paths") / FOLDER
    made.mkdir()
    fuzz_gguf.write_bases(made)
    other_models.write_projector(made / "mm ü.gguf")
    odd_models.write_qwen3moe(made / "plain ü.gguf")
    write_adapter(made / "lora ü.gguf", made / "plain ü.gguf", 8)
    model = metadata.read(made / "planned.gguf")
    metadata.write_side_file(made / "plan ü.gguf", model, model.profile.plan(0.75, model.full), model.profile)
    return made


def as_others(command, **kwargs) -> subprocess.CompletedProcess:
    """Where permissions are those of the owner also for root."""

    def without_override() -> None:
        if os.geteuid() == 0:
            assert ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0) == 0

    return subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        encoding="utf-8",
        preexec_fn=without_override,
        cwd="/",  # the installed package, not the checkout's folder of that name
        **kwargs,
    )


def convert(model: Path, output: Path, *options) -> subprocess.CompletedProcess:
    return as_others([sys.executable, "-m", "allocmoe_edge.convert.cli", model, *options, "-o", output])


@pytest.mark.parametrize("as_text", [False, True])
def test_models_of_all_kinds(folder, as_text):
    def path(name: str):
        return str(folder / name) if as_text else folder / name

    llm = Llama(path("planned.gguf"), **SIZES)
    expected = llm("abc", max_tokens=4, temperature=0.0)["choices"][0]["text"]
    for options in (
        dict(plan_path=path("plan ü.gguf")),
        dict(repack=False, expert_cache="16MB"),
        dict(repack=False, prefetch=True),
    ):
        other = Llama(path("planned.gguf"), **SIZES, **options)
        if "plan_path" in options:
            assert other.plan.budget_total == 12 != llm.plan.budget_total
        else:
            assert other("abc", max_tokens=4, temperature=0.0)["choices"][0]["text"] == expected
    Llama(path("plain ü.gguf"), **SIZES, lora_path=path("lora ü.gguf")).close()
    assert answer(Llama(path("other-0.gguf"), **SIZES, chat_handler=handler(path("mm ü.gguf"))))


def test_conversion(folder, tmp_path):
    """Model, text, output, the checkpoint beside it, the side file."""
    there = tmp_path / FOLDER
    there.mkdir()
    (there / "Text ß.txt").write_text("It was the best of times, it was the worst of times. " * 60, encoding="utf-8")
    done = convert(folder / "plain ü.gguf", there / "halb ü.gguf", *OPTIONS, "--calib", there / "Text ß.txt")
    assert done.returncode == 0, done.stderr
    assert metadata.read(there / "halb ü.gguf").plan.budget_total == 8
    assert [path.name for path in there.glob("*.gguf*")] == ["halb ü.gguf"]
    inspected = as_others([sys.executable, "-m", "allocmoe_edge.inspect.cli", there / "halb ü.gguf", "--json"])
    assert inspected.returncode == 0 and '"budget_total": 8' in inspected.stdout, inspected.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="file names are any bytes on Linux")
def test_names_that_are_no_text(folder, tmp_path):
    """In another encoding than UTF-8, or with what commands a terminal."""
    model = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9\x1b[31m.gguf"))
    shutil.copy(folder / "planned.gguf", model)
    expected = Llama(folder / "planned.gguf", **SIZES).plan
    assert Llama(model, **SIZES).plan == Llama(str(model), **SIZES).plan == expected
    done = convert(model, tmp_path / "\x1b[31m.gguf", "--budget", "0.75")
    assert done.returncode == 0 and "\x1b" not in done.stdout + done.stderr, done.stderr
    assert "caf??[31m.gguf" in done.stderr and "?[31m.gguf" in done.stdout
    text = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt"))
    text.write_text("It was the best of times, it was the worst of times. " * 60, encoding="utf-8")
    done = convert(model, tmp_path / "measured.gguf", *OPTIONS, "--calib", text, "--reprofile")
    assert (
        done.returncode == 0 and metadata.read(tmp_path / "measured.gguf").profile.calibration.source == "file caf?.txt"
    )


def test_server(folder):
    from test_llama_server import serving  # skips where there is none

    options = ["--plan", folder / "plan ü.gguf", "-c", "512", "-t", "1"]
    with serving(folder, folder / "planned.gguf", *options) as (url, _, _):
        found = httpx.post(f"{url}/completion", json={"prompt": "abc", "n_predict": 4}, timeout=600)
        assert found.status_code == 200 and found.json()["tokens_predicted"] == 4


@pytest.fixture
def read_only(folder, tmp_path):
    there = tmp_path / "read only"
    there.mkdir()
    shutil.copy(folder / "planned.gguf", there)
    (there / "planned.gguf").chmod(0o444)
    there.chmod(0o555)
    yield there
    there.chmod(0o755)


def test_folder_of_models_that_is_read_only(read_only, tmp_path):
    before = {path.name: path.read_bytes() for path in read_only.iterdir()}
    code = "import sys; from allocmoe_edge import Llama; Llama(sys.argv[1], n_ctx=64, verbose=False, n_threads=1).eval([1])"
    done = as_others([sys.executable, "-c", code, read_only / "planned.gguf"])
    assert done.returncode == 0, done.stderr
    budget = ["--budget", "0.75"]  # with the sensitivities in the file
    done = convert(read_only / "planned.gguf", read_only / "o.gguf", *budget)
    assert done.returncode == 1 and done.stderr.startswith("allocmoe-convert: error: "), done.stderr
    assert "no permission to write there" in done.stderr and len(done.stderr.splitlines()) == 1
    done = convert(read_only / "planned.gguf", tmp_path / "o.gguf", *budget)
    assert done.returncode == 0, done.stderr
    assert metadata.read(tmp_path / "o.gguf").plan.budget_total == 12
    assert {path.name: path.read_bytes() for path in read_only.iterdir()} == before


def test_links(folder, tmp_path):
    """To the model, to its folder, to a link; one that leads nowhere, or round."""
    (tmp_path / "folder").symlink_to(folder, target_is_directory=True)
    (tmp_path / "link.gguf").symlink_to(tmp_path / "folder" / "planned.gguf")
    (tmp_path / "second.gguf").symlink_to("link.gguf")
    expected = Llama(folder / "planned.gguf", **SIZES).plan
    for path in (tmp_path / "folder" / "planned.gguf", tmp_path / "link.gguf", tmp_path / "second.gguf"):
        assert Llama(path, **SIZES).plan == expected
    (tmp_path / "round.gguf").symlink_to("round.gguf")
    (tmp_path / "nowhere.gguf").symlink_to("none.gguf")
    for name in ("round.gguf", "nowhere.gguf"):
        with pytest.raises(ValueError, match=name):
            Llama(tmp_path / name, **SIZES)
    done = convert(tmp_path / "nowhere.gguf", tmp_path / "o.gguf")
    assert done.returncode == 1 and "Traceback" not in done.stderr and "nowhere.gguf" in done.stderr
    done = convert(tmp_path / "second.gguf", tmp_path / "link.gguf", "--force")  # its own input
    assert done.returncode == 1 and (tmp_path / "link.gguf").is_symlink(), done.stderr

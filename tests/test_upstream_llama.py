"""llama-cpp-python's own tests of `Llama`, from its source archive, on ours: with models at hand in place of downloads."""

import os
from pathlib import Path
import subprocess
import sys
import xml.etree.ElementTree

import llama_cpp
import other_models
import pytest

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("huggingface_hub", reason="upstream's tests import it")


@pytest.fixture(scope="module")
def upstream() -> Path:
    """The source tree of llama-cpp-python that our libraries were built from."""
    prepare = [sys.executable, str(ROOT / "native" / "prepare.py")]
    patched = Path(subprocess.run(prepare, capture_output=True, text=True, check=True).stdout.split()[-1])
    return patched.parent.parent


def own_words(source: str, model: Path) -> str:
    """Upstream's tests expecting of another model than theirs what the stock class says with it, three times."""
    stock = llama_cpp.Llama(str(model), n_ctx=32, n_batch=32, flash_attn=True, verbose=False)
    prompt = "The quick brown fox jumps over the lazy dog. The quick brown fox"
    text = stock(prompt, max_tokens=6, temperature=0.0)["choices"][0]["text"]
    tokens = stock.tokenize(b"Hello, world!", add_bos=True, special=True)
    assert source.count('== " jumps over the lazy dog."') == 2 and source.count("== [9419, 11, 1814, 0]") == 1
    return source.replace('== " jumps over the lazy dog."', f"== {text!r}").replace("[9419, 11, 1814, 0]", str(tokens))


def test_upstreams_tests_pass(upstream, dense_path, tmp_path):
    (tmp_path / "instruct.gguf").symlink_to(dense_path)
    for kind in ("dense", "bert", "mamba", "jamba"):
        getattr(other_models, f"write_{kind}")(tmp_path / f"{kind}.gguf")
    for file in (upstream / "tests").glob("test_*.py"):
        source = file.read_text(encoding="utf-8")
        source = own_words(source, dense_path) if file.name == "test_llama.py" else source
        (tmp_path / file.name).write_text(source, encoding="utf-8")
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "upstream_plugin", "-p", "no:cacheprovider"]
    environment = {
        **os.environ, "SMALL_MODELS": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    # from its tree: some of the tests read the vocabularies that are there
    command += [f"--junitxml={report}", f"--rootdir={tmp_path}", str(tmp_path)]
    done = subprocess.run(command, cwd=upstream, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    suite = xml.etree.ElementTree.parse(report).getroot().find("testsuite")
    assert int(suite.get("tests")) >= 26 and suite.get("skipped") == "0"

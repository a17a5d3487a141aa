"""Llama.from_pretrained, with huggingface_hub's own client and a hub on this machine."""

import subprocess
import sys

from fake_hub import serve
from gguf_factory import split_gguf
import odd_models
import pytest
from test_source import hub_env

pytest.importorskip("huggingface_hub", reason="from_pretrained needs it")

PROGRAM = """
import sys
from pathlib import Path
from allocmoe_edge import Llama

options = dict(n_ctx=64, verbose=False)

llm = Llama.from_pretrained("org/name", "whole.gguf", additional_files=["*.txt"], budget="full", **options)
assert llm.plan.budget == 1.0 and llm([5, 6, 7], max_tokens=2)["usage"]["completion_tokens"] == 2
assert (Path(llm.model_path).parent / "README.txt").is_file()

for pattern in ("split-00001-*", "split-*"):
    llm = Llama.from_pretrained("org/name", pattern, local_dir=sys.argv[1], **options)
    assert Path(llm.model_path).parent == Path(sys.argv[1]) and llm.plan.budget == 1.0

for pattern, reason in (("*.gguf", "several files fit"), ("none", "no file fits 'none'; it has: README.txt, ")):
    try:
        Llama.from_pretrained("org/name", pattern, **options)
    except ValueError as error:
        assert str(error).startswith("org/name: " + reason), error
    else:
        raise AssertionError(pattern)
try:
    Llama.from_pretrained("org/name", "whole.gguf", cache_dir=sys.argv[2], n_ctxx=64)
except TypeError as error:
    assert "did you mean n_ctx" in str(error) and not Path(sys.argv[2]).exists()
else:
    raise AssertionError("an argument that there is not")
Llama.from_pretrained("org/name", "whole.gguf", local_dir_use_symlinks=False, **options)
try:
    Llama.from_pretrained("org/none", "whole.gguf")
except OSError as error:
    assert "org/none" in str(error)
else:
    raise AssertionError("a repository that there is not")
"""


def test_from_pretrained(tmp_path):
    folder = tmp_path / "hub"
    folder.mkdir()
    whole = odd_models.write_qwen3moe(folder / "whole.gguf")
    assert len(split_gguf(whole, folder / "split", 20)) > 1
    (folder / "README.txt").write_text("A model.")
    with serve(folder, "org/name") as (endpoint, asked):
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / "here"), str(tmp_path / "cache")]
        done = subprocess.run(command, capture_output=True, text=True, env=hub_env(endpoint, tmp_path / "home"))
        assert done.returncode == 0, done.stderr[-3000:]
        # the other model was downloaded for nobody
        assert len([path for path in asked if path.endswith("whole.gguf")]) <= 3

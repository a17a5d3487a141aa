"""The programs in bench that no other test starts, as a user starts them, on a tiny model: that they end well and print numbers."""

import re
import subprocess
import sys

from allocmoe_edge import llama_server
from allocmoe_edge.command import CommandError
from allocmoe_edge.convert import cli
from conftest import ROOT
import numpy as np
import odd_models
import pytest

TEXT = ROOT / "docs" / "how-it-works.md"
# name, arguments after the model or, of a program with commands, around it ("MODEL")
PROGRAMS = {
    "token_rule_cost": ["MODEL", "--prompt", "24", "--gen", "4", "--repeats", "1", "--threads", "1"],
    "node_profile": ["MODEL", "--prompt", "24", "--gen", "4", "--batch-rule"],
    "speculative replay": ["replay", "MODEL", "--tokens", "24", "--turns", "1", "--acceptance", "0.7", "--threads", "1"],
    "speculative limit": ["limit", "MODEL", "--tokens", "48", "--shares", "0.5", "--threads", "1"],
    "speculative limit, on a text": ["limit", "MODEL", "--text", TEXT, "--tokens", "48", "--shares", "0.5", "--threads", "1"],
    "speculative real": ["real", "MODEL", "--prompts", "PROMPTS", "--same", "0.5", "--tokens", "64", "--threads", "1"],
    "expert_usage": ["MODEL", "--tokens", "64"],
    "expert_replay": ["MODEL", "--text", TEXT, "--skip", "0", "--tokens", "64"],
    "expert_rules": ["MODEL", "--text", TEXT, "--skip", "0", "--prompt", "8", "--gen", "4", "-o", "FOLDER"],
    "expert_cache quality": ["quality", "MODEL", "--text", TEXT, "--prompt", "8", "--gen", "4"],
    "server_load": ["MODEL", "--seconds", "0.05", "--slots", "1", "--gen", "2", "--prompt", "4", "--threads", "1"],
}  # fmt: skip
# by program what it measures: a column of its tables by its heading, or where in a line
NUMBERS = {
    "token_rule_cost": "tokens/s",
    "node_profile": re.compile(r"^\| sum \| (\S+) ", re.M),
    "speculative replay": "times as fast",
    "speculative limit": "time",
    "speculative limit, on a text": "time",
    "speculative real": "times as fast",
    "expert_usage": re.compile(r"^entropy (\S+) ", re.M),
    "expert_replay": "hit rate, 0.5 of the experts",
    "expert_rules": re.compile(r", (\S+) experts a layer$", re.M),
    "expert_cache quality": "experts run",
    "server_load": re.compile(r"^(?:full|half|adaptive)\b.* (\S+) \(.* \(", re.M),
}


def numbers(printed: str, where) -> list:
    """The first of every cell below a heading, in tables of Markdown; or what a pattern's group finds."""
    if not isinstance(where, str):
        return [float(found) for found in where.findall(printed)]
    found, at = [], None
    for line in printed.splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if where in cells:
            at = cells.index(where)
        elif len(cells) == 1:
            at = None
        elif at is not None and cells[at].strip("-:"):
            found.append(float(cells[at].split()[0]))
    return found


@pytest.fixture(scope="module")
def model(dense_path, tmp_path_factory):
    """Converted, with estimates, and a vocabulary of a true one's size."""
    folder = tmp_path_factory.mktemp("bench_programs")
    text = ["--calib", str(TEXT), "--ctx-size", "32", "--calib-tokens", "64", "--estimate-tokens", "256"]
    source = odd_models.write_talker(folder / "source.gguf", vocabulary_of=dense_path)
    assert cli.main([str(source), *text, "--token-rule", "estimate", "-o", str(folder / "model.gguf")]) == 0
    return folder / "model.gguf"


@pytest.mark.parametrize("name", PROGRAMS)
def test_it_runs(name, model, tmp_path):
    if name == "server_load":
        try:
            llama_server.binary()
        except CommandError as missing:
            pytest.skip(str(missing))
    (tmp_path / "prompts.txt").write_text("the quick brown\n")
    given = {"MODEL": model, "PROMPTS": tmp_path / "prompts.txt", "FOLDER": tmp_path / "out"}
    arguments = [str(given.get(part, part)) for part in PROGRAMS[name]]
    program = ROOT / "bench" / f"{re.split('[ ,]', name)[0]}.py"
    done = subprocess.run([sys.executable, program, *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = numbers(done.stdout, NUMBERS[name])
    assert found and all(0 < number < np.inf for number in found), done.stdout


def test_texts_as_tokens(dense_path, tmp_path, monkeypatch):
    """bench/upcycle/text_tokens.py."""
    monkeypatch.syspath_prepend(ROOT / "bench" / "upcycle")
    import base
    import text_tokens

    monkeypatch.setattr(base, "source", lambda folder: dense_path)
    monkeypatch.setattr(sys, "argv", ["text_tokens.py", "-o", str(tmp_path), str(TEXT)])
    assert text_tokens.main() == 0
    ids = np.load(tmp_path / "how-it-works.npy")
    assert ids.dtype == np.uint16 and 1000 < len(ids) < len(TEXT.read_bytes())


def test_server_load_says_why_the_server_did_not_start(tmp_path):
    """Only that it did not, as where it is not built."""
    command = [sys.executable, ROOT / "bench" / "server_load.py", tmp_path / "missing.gguf"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "did not start: allocmoe-server: error: " in done.stderr

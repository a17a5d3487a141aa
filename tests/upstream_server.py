#!/usr/bin/env python3
"""llama.cpp's own tests of its server, from the source archive, on ours or on another binary, with small models at hand in
place of those that they download.

    python tests/upstream_server.py [--server build/baseline/bin/llama-server] [unit/test_completion.py ...]

Needs the packages of upstream's tools/server/tests/requirements.txt in the Python that runs it. The one that talks is random, a MoE
with a plan for half budget and the vocabulary of a real model: where a test looks for another model's words any will do, and a
test that counts another model's tokens fails on any server.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
from pathlib import Path
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree

_CACHED = {
    "tinygemma3-GGUF": "tinygemma3-Q8_0.gguf",
    "test-model-stories260K": "stories260K-F32.gguf",
    "test-model-stories260K-infill": "stories260K-infill-F32.gguf",
}
ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("aiohttp", "filelock", "numpy", "openai", "prometheus_client", "requests", "wget")


def upstream_tests() -> Path:
    """The folder tools/server/tests of the source tree that our libraries were built from."""
    prepare = [sys.executable, str(ROOT / "native" / "prepare.py")]
    done = subprocess.run(prepare, capture_output=True, text=True, check=True)
    return Path(done.stdout.split("\n")[-2]) / "tools" / "server" / "tests"


def write_models(folder: Path) -> None:
    from conftest import plan_from_made_up_profile
    import odd_models
    import other_models
    import testbed

    with tempfile.TemporaryDirectory() as download:
        vocabulary = testbed.source_model(Path(download))
        source = odd_models.write_talker(folder / "source.gguf", vocabulary)
    plan_from_made_up_profile(source, folder / "talker.gguf")
    other_models.write_bert(folder / "bert.gguf")
    # in llama.cpp's cache, as what the router's tests name; they have it downloaded before
    for name, file in _CACHED.items():
        repository, commit = folder / f"models--ggml-org--{name}", "1" * 40
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(commit)
        (repository / "snapshots" / commit).mkdir(parents=True)
        (repository / "snapshots" / commit / file).symlink_to(folder / "talker.gguf")


def run(server: Path, tests: Path, models: Path, arguments: list, timeout: float) -> dict:
    """(outcome, reason) by the name of a test: passed, failed, or skipped.

    Args:
        tests: upstream's folder.
        models: what `write_models` has filled.
        timeout: seconds for all.
    """
    report = models / "report.xml"
    # a copy, since they write into their folder; they name templates by a path from it
    here = models / "upstream" / "tools" / "server" / "tests"
    shutil.copytree(tests, here)
    (here / "tmp").mkdir()
    (models / "upstream" / "models").symlink_to(tests.parents[2] / "models")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "upstream_server_plugin", "-p", "no:cacheprovider"]
    command += ["-m", "not slow", "-o", "addopts=", f"--junitxml={report}", *(arguments or ["unit"])]
    environment = {
        **os.environ, "SMALL_MODELS": str(models), "LLAMA_SERVER_BIN_PATH": str(server), "LLAMA_CACHE": str(models),
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
        "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    with open(models / "log.txt", "w") as log:
        subprocess.run(command, cwd=here, env=environment, stdout=log, stderr=log, timeout=timeout)
    if not report.is_file():
        sys.exit((models / "log.txt").read_text()[-3000:])
    found = {}
    for case in xml.etree.ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        bad = [each for each in case if each.tag in ("failure", "error", "skipped")]
        outcome = "passed" if not bad else "skipped" if bad[0].tag == "skipped" else "failed"
        found[name] = (outcome, " ".join((bad[0].get("message") or "").split())[:200] if bad else "")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", type=Path, help="default: the installed package's")
    parser.add_argument("--json", type=Path, help="where the outcomes go, too")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for all. Default: %(default)s")
    parser.add_argument("arguments", nargs="*", help="of pytest, from upstream's folder")
    args = parser.parse_args()
    from allocmoe_edge import llama_server

    server = (args.server or llama_server.binary()).resolve()
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder))
        found = run(server, upstream_tests(), Path(folder), args.arguments, args.timeout)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))
    for name, (outcome, reason) in found.items():
        if outcome != "passed":
            print(f"{outcome:8} {name}: {reason}")
    print(collections.Counter(outcome for outcome, _ in found.values()))


if __name__ == "__main__":
    main()

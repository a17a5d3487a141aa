"""bench/gpu.py and gpu_time.py as far as they go without a GPU: stages, time limits, and timing, here on the CPU."""

import json
import subprocess
import sys
import time

from conftest import ROOT
import gpu
import gpu_carry
import pytest

TINY = ["--n-gpu-layers", "0", "--prompt", "16", "--steps", "3", "--batches", "1,3", "--rounds", "1"]


@pytest.fixture
def out(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "OUT", tmp_path)
    return tmp_path


def run(out, **options):
    import argparse

    arguments = dict(minutes=None, only=None, lib=out, models=["OLMoE-1B-7B"], testbed=False, carried=None)
    return gpu.Run(argparse.Namespace(**{**arguments, "arch": "90", "layers": None, **options}))


@pytest.fixture(scope="module")
def rows(testbed_path, tmp_path_factory):
    """What two runs of gpu_time.py wrote: ours under its plans, and upstream's graph with 6 experts in every layer."""
    path = tmp_path_factory.mktemp("gpu") / "results.jsonl"
    for extra in ([], ["--uniform", "6"]):
        command = [sys.executable, str(ROOT / "bench" / "gpu_time.py"), str(testbed_path), *TINY, *extra]
        done = subprocess.run([*command, "--json", str(path)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_timings_are_of_the_plans_that_they_name(rows):
    found = {(row["phase"], row["size"], row["plan"]): row for row in rows}
    items = [("prefill", 16), ("decode", 1), ("decode", 3)]
    assert set(found) == {(*item, plan) for item in items for plan in ("full", "half", "half, thresholds", "uniform 6")}
    for (phase, size, plan), row in found.items():
        assert row["tokens_per_second"] > 0 and row["range"][0] <= row["tokens_per_second"] <= row["range"][1]
        # calibrated on the first of the sequences, on other tokens than those that are generated
        wanted = {"full": 360, "half": 180, "uniform 6": 180, "half, thresholds": pytest.approx(180, rel=0.3)}[plan]
        assert row["experts"] == wanted, (phase, size, plan)
        assert bool(row["gigabytes_per_second"]) == ((phase, size) == ("decode", 1))


def test_summary_is_a_table_of_the_last_results(rows, out, monkeypatch):
    monkeypatch.setitem(gpu.MODELS, rows[0]["model"], 6)
    stock = [{**row, "library": "stock"} for row in rows if row["plan"] == "uniform 6"]
    doubled = [{**row, "tokens_per_second": 2 * row["tokens_per_second"]} for row in stock]
    (out / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows + doubled + stock))
    table = [line.split("|") for line in gpu.summary().splitlines() if line.startswith("|")][2:]
    assert len(table) == len(rows) + len(stock)
    assert {row[6].strip() for row in table if row[4].strip() == "stock, uniform 6"} == {"1.00"}
    assert {row[6].strip() for row in table if row[4].strip() == "ours, uniform 6"} == {"1.00"}


def test_a_stage_ends_with_its_time_and_all_that_it_started(out):
    start = time.monotonic()
    with pytest.raises(gpu.Unfinished):
        run(out).run("sleep", ["sh", "-c", "sleep 60 & echo $!; wait"], 5)
    assert time.monotonic() - start < 30
    child = int((out / "sleep.log").read_text().split()[-1])
    for _ in range(50):  # until init has collected it
        if subprocess.run(["kill", "-0", str(child)], capture_output=True).returncode:
            break
        time.sleep(0.1)
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(child)], capture_output=True, text=True).stdout.strip()
    assert state in ("", "Z")
    with pytest.raises(gpu.Unfinished):
        run(out, minutes=0.01).run("late", ["true"], 60)


def test_a_failure_names_its_log(out):
    with pytest.raises(RuntimeError, match=r"fail\.log:\n\$ .*\nwhy$"):
        run(out).run("fail", ["sh", "-c", "echo why; exit 3"], 60)


def test_archive_is_put_together_from_pieces_that_come_one_by_one(out, tmp_path_factory, monkeypatch):
    carried = tmp_path_factory.mktemp("carried")
    name = gpu_carry.archive_name()
    work = run(out, carried=carried)
    monkeypatch.setattr(work, "run", lambda *args, **kwargs: None)  # no wheels to install
    (carried / f"{name}.0").write_bytes(b"first")
    with pytest.raises(gpu.Unfinished, match="other piece"):
        work.setup()
    (carried / f"{name}.0").unlink()
    (carried / f"{name}.1").write_bytes(b" second")
    work.setup()
    assert (out / name).read_bytes() == b"first second"
    assert work.env["ALLOCMOE_UPSTREAM_ARCHIVE"] == str(out / name)


def test_every_stage_of_the_plan_is_there(out):
    stages = list(run(out, lib=None).stages())
    assert stages[:4] == ["setup", "configure", "build", "install"]
    wanted = {"backend-ops", "tests", "sanitize-memcheck", "sanitize-racecheck", "sanitize-initcheck", "stock"}
    wanted |= {"model-OLMoE-1B-7B", "time-OLMoE-1B-7B-gpu", "time-OLMoE-1B-7B-cpu-moe"}
    wanted |= {f"stock-OLMoE-1B-7B-{where}-{count}" for where in ("gpu", "cpu-moe") for count in (8, 4)}
    assert set(stages[4:]) == wanted

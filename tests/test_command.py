"""How commands end: with an exit code and one line, whatever is wrong; and the arguments and files that they share."""

import argparse
import os
from pathlib import Path
import signal
import subprocess
import sys
import time

from allocmoe_edge import GGUFError, PlanError, arguments, output_file
from allocmoe_edge.command import CommandError, run_command
from allocmoe_edge.measure import cores
import pytest


def run(work, *argv, **kwargs) -> int:
    parser = argparse.ArgumentParser(prog="prog")
    parser.add_argument("--number", type=arguments.positive)
    return run_command(parser, work, argv, **kwargs)


def raising(error):
    def work(args):
        raise error

    return work


def test_success(capsys):
    assert run(lambda args: print(args.number), "--number", "3") == 0
    assert capsys.readouterr() == ("3\n", "")


@pytest.mark.parametrize(
    "error, line",
    [
        (CommandError("nothing to do"), "nothing to do"),
        (GGUFError("m.gguf: damaged"), "m.gguf: damaged"),
        (PlanError("budget: found 2"), "budget: found 2"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (FileNotFoundError(2, "No such file or directory", "a.txt"), "a.txt: No such file or directory"),
        (PermissionError(13, "Permission denied", b"a.txt"), "a.txt: Permission denied"),
        (MemoryError(), "out of memory"),
        (CommandError("two\n  lines"), "two lines"),
        (TypeError("len() of None"), "TypeError: len() of None (this should not happen; --debug shows where it does)"),
        (AssertionError(), "AssertionError (this should not happen; --debug shows where it does)"),
    ],
    ids=repr,
)
def test_errors_are_one_line(capsys, error, line):
    assert run(raising(error)) == 1
    assert capsys.readouterr() == ("", f"prog: error: {line}\n")


def test_debug_shows_the_trace(capsys):
    assert run(raising(CommandError("no")), "--debug") == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and "in work" in err and err.endswith("\nprog: error: no\n")


def test_refused_arguments_and_help(capsys):
    assert run(print, "--number", "0") == 2
    assert "want a whole number from 1" in capsys.readouterr().err
    assert run(print, "--help") == 0
    assert "--debug" in capsys.readouterr().out


@pytest.mark.parametrize("end, code", [(None, 0), (0, 0), (3, 3), ("words", 1)])
def test_exits_of_others(capsys, end, code):
    assert run(raising(SystemExit(end))) == code
    assert capsys.readouterr().err == ("prog: error: words\n" if end == "words" else "")


def test_interrupt(capsys):
    assert run(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "\nprog: interrupted\n"
    assert run(raising(KeyboardInterrupt()), interrupted=lambda args: "nothing was written") == 130
    assert capsys.readouterr().err == "\nprog: interrupted: nothing was written\n"


def test_unknown_arguments_can_be_kept():
    found = []
    assert run(lambda args: found.append(args.rest), "--number", "1", "--other", "2", known_only=True) == 0
    assert found == [["--other", "2"]]


SCRIPT = """
import argparse, sys
from allocmoe_edge.command import run_command
def work(args):
    print("x" * int(sys.argv.pop()))
sys.exit(run_command(argparse.ArgumentParser(prog="prog"), work, []))
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("length", [1, 100_000], ids=["flushed at the end", "flushed on the way"])
def test_full_device_behind_the_output(length):
    command = [sys.executable, "-c", SCRIPT, str(length)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
        assert (done.returncode, done.stderr) == (1, "prog: error: No space left on device\n")
        # with nowhere left to say it
        assert subprocess.run(command, stdout=full, stderr=full).returncode == 1


def test_reader_that_stops_reading():
    """The status is that of a program which the system ends for this, as cat."""
    command = f"(trap '' PIPE; {sys.executable} -c '{SCRIPT}' 1000000; echo $? >&2) | head -c 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("x", "141\n")


# a command that says when its imports begin: before that, it is Python itself that begins
BEGINS = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
import allocmoe_commands
real = allocmoe_commands.importlib.import_module
def import_module(name):
    print(flush=True)
    return real(name)
allocmoe_commands.importlib.import_module = import_module
"""


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
@pytest.mark.parametrize(
    "command, seconds",
    [(name, 0.1) for name in ("bench", "convert", "inspect", "rpc_server", "server")]
    + [("chat", seconds) for seconds in (0.02, 0.1, 0.25)],
)
def test_interrupt_while_a_command_begins(command, seconds):
    """As the installed script calls it: most of this time goes into imports."""
    script = BEGINS + f"raise SystemExit(allocmoe_commands.{command}())"
    command = [sys.executable, "-c", script, "none.gguf"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.readline()
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    # on a fast machine it had the time to refuse its arguments
    assert process.returncode in (-signal.SIGINT, 130, 1, 2) and "Traceback" not in errors, errors


def test_closed_output():
    done = subprocess.run(f"{sys.executable} -c '{SCRIPT}' 1 >&-", shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# --- arguments


@pytest.mark.parametrize(
    "kind, low, high",
    [
        (arguments.not_negative, 0, 2**31 - 1),
        (arguments.positive, 1, 2**31 - 1),
        (arguments.seed, 0, 2**32 - 2),
        (arguments.context_size, 2, 2**24),
        (arguments.n_tokens, 0, 2**24),
    ],
)
def test_whole_numbers(kind, low, high):
    assert kind(str(low)) == low and kind(f" {high} ") == high
    for text in (str(low - 1), str(high + 1), "", "-", "--1", "1.0", "1e3", "nan", "1_0", "9" * 5000, "x", "³"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"want a whole number from {low} to {high}"):
            kind(text)


# --- files


def test_file_is_replaced_whole(tmp_path):
    path = tmp_path / "a.json"
    for data in (b"first", b"second"):
        output_file.check(path)
        output_file.write(path, data)
        assert path.read_bytes() == data and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.skipif(os.name != "posix", reason="links and devices")
def test_links_and_devices_stay(tmp_path):
    """A link still points where it did, and /dev/null is not replaced by a file."""
    (tmp_path / "real").write_bytes(b"old")
    link, fifo = tmp_path / "link", tmp_path / "null"
    link.symlink_to("real")
    output_file.write(link, b"new")
    assert link.is_symlink() and (tmp_path / "real").read_bytes() == b"new"
    os.mkfifo(fifo)
    reader = subprocess.Popen(["cat", fifo], stdout=subprocess.PIPE)
    output_file.check(fifo)
    output_file.write(fifo, b"through")
    assert reader.communicate()[0] == b"through" and fifo.is_fifo()


def test_files_that_cannot_be_written(tmp_path):
    for path, message in ((tmp_path, "is a folder"), (tmp_path / "none" / "a", "no such folder")):
        with pytest.raises(CommandError, match=message):
            output_file.check(path)
        with pytest.raises(CommandError, match="could not be written"):
            output_file.write(path, b"x")
    assert os.listdir(tmp_path) == []
    if Path("/dev/full").exists():
        with pytest.raises(CommandError, match="/dev/full: could not be written: No space left"):
            output_file.write(Path("/dev/full"), b"x")


# --- threads


def made_up_processors(root: Path, siblings) -> Path:
    for processor, line in enumerate(siblings):
        folder = root / f"cpu{processor}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(line + "\n")
    return root


def test_processors_of_one_core_count_once(tmp_path):
    root = made_up_processors(tmp_path, ["0,2", "1,3", "0,2", "1,3"])
    assert cores._cores({0, 1, 2, 3}, root) == 2
    assert cores._cores({0, 2}, root) == 1  # all that an affinity leaves
    assert cores._cores({0, 1, 7, 8}, root) == 4  # of the last two nothing is known


def test_list_of_processors(tmp_path):
    (tmp_path / "cpus").write_text("0-2,8,10-11\n")
    assert cores._processors(tmp_path / "cpus") == {0, 1, 2, 8, 10, 11}
    assert cores._processors(tmp_path / "none") == set()


def test_control_groups_limit_cores(tmp_path):
    """The lowest limit of the process's groups and those above them counts, in either version."""
    root, membership = tmp_path / "cgroup", tmp_path / "membership"
    (root / "a" / "b").mkdir(parents=True)
    (root / "cpu,cpuacct" / "c").mkdir(parents=True)
    membership.write_text("0::/a/b\n5:cpu,cpuacct:/c\n3:memory:/c\n2:cpuset:/c\n")
    assert list(cores._group_limits(membership, root)) == []
    (root / "a" / "b" / "cpu.max").write_text("max 100000\n")
    (root / "a" / "cpu.max").write_text("150000 100000\n")
    (root / "cpu,cpuacct" / "cpu.cfs_quota_us").write_text("-1\n")
    (root / "cpu,cpuacct" / "cpu.cfs_period_us").write_text("100000\n")
    assert list(cores._group_limits(membership, root)) == [1.5]
    (root / "cpu,cpuacct" / "c" / "cpu.cfs_quota_us").write_text("50000\n")
    (root / "cpu,cpuacct" / "c" / "cpu.cfs_period_us").write_text("100000\n")
    assert sorted(cores._group_limits(membership, root)) == [0.5, 1.5]
    assert list(cores._group_limits(tmp_path / "none", root)) == []


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_affinity_limits_threads():
    found = cores.physical_cores()
    assert 1 <= found <= os.cpu_count()
    script = (
        "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
        "from allocmoe_edge.measure.cores import physical_cores; print(physical_cores())"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "1\n"


def test_lm_eval_without_the_package(tmp_path):
    (tmp_path / "lm_eval.py").write_text("raise ImportError('not here')")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "allocmoe_edge.lm_eval", "--tasks", "hellaswag"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "pip install lm_eval" in done.stderr

"""Whatever takes more than two seconds says how far it is: stage, share and time left, beside a bar or in a line now and then."""

import os
import re
import struct
import subprocess
import time

from allocmoe_edge.convert import cli, progress, stages
import pytest
from test_convert import COMMAND, run

pty, fcntl, termios = (pytest.importorskip(name, reason="needs terminals") for name in ("pty", "fcntl", "termios"))

OPTIONS = ["--ctx-size", "32", "--calib-tokens", "64", "--estimate-tokens", "64", "--cost", "ms", "--threads", "1"]
STAGES = (
    "loading the model",
    "calibration text",
    "decode cost",
    "sensitivity",
    "estimates, sizes",
    "estimates, directions",
    "estimates, positive directions",
    "estimates, outputs",
    "estimates, ranks",
    "estimates, spend",
    "thresholds",
    "held-out check",
    "writing the model",
)


def on_a_terminal(*args) -> str:
    """What a command prints on stderr there."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    with subprocess.Popen([*COMMAND, *map(str, args)], stdout=subprocess.DEVNULL, stderr=its) as process:
        os.close(its)
        printed = b""
        try:
            while data := os.read(ours, 1 << 16):
                printed += data
        except OSError:  # what Linux says at the end of one
            pass
    os.close(ours)
    assert process.returncode == 0, printed.decode()
    return printed.decode()


def test_progress_on_a_terminal(tiny, out):
    printed = on_a_terminal(tiny.gguf_path, *OPTIONS, "-o", out / "m.gguf")
    assert [stage for stage in STAGES if f"{stage}: " not in printed] == []
    # every bar has the share of the whole, which never falls, and the time left as soon as something has been done
    shares = [int(share) for share in re.findall(r"(\d+)% of the conversion, ", printed)]
    assert len(shares) >= len(STAGES) and shares == sorted(shares) and shares[0] == 0 and 90 <= shares[-1] <= 100
    assert re.search(r"held-out check: .*% of the conversion, about \d+ s left", printed)


def test_a_short_conversion_in_a_pipe_says_how_long_it_took(tiny, out):
    piped = run(tiny.gguf_path, *OPTIONS, "-o", out / "n.gguf", stdin=subprocess.DEVNULL)
    assert piped.returncode == 0, piped.stderr
    assert "\r" not in piped.stderr and "|" not in piped.stderr
    assert re.search(r"^took \d+ (s|min).*; at most \d+\.\d GB of memory$", piped.stderr, re.MULTILINE)


def test_lines_now_and_then_in_a_pipe(capfd):
    """Two stages, the second twice the work: lines of both, shares that grow, times left that are right once they are known.

    Times: what is left is told within half of the truth, which sleeping processes keep on a busy machine.
    """
    with progress.conversion(line_seconds=0.1) as conversion:
        with progress.progress_bar("before it is known", 2, "step") as bar:
            bar.update()
            time.sleep(0.25)
        conversion.expect([("skipped", 0.0), ("one", 10.0), ("two", 20.0), ("rest", 30.0)])
        for name in ("one", "two"):
            with progress.progress_bar(name, 4, "step") as bar:
                for _ in range(4):
                    time.sleep(0.15 if name == "one" else 0.3)
                    bar.update()
        left, share = conversion.left, conversion.share
    printed = capfd.readouterr().err
    lines = printed.splitlines()
    assert share == pytest.approx(0.5) and 0.9 < left < 3.6
    for name in ("one", "two"):
        assert any(re.fullmatch(rf"{name}: \d+% of the conversion, about \d+ s left", line) for line in lines)
    assert any(line.startswith("before it is known: about ") for line in lines)
    assert "one: 0% of the conversion, time left not known yet" in lines
    shares = [int(share) for share in re.findall(r"(\d+)% of", printed)]
    assert shares == sorted(shares) and 3 <= len(lines) <= 25
    assert re.fullmatch(r"took \d s: one 1 s, two 1 s", conversion.summary()), conversion.summary()


def test_what_an_earlier_run_has_done_tells_nothing_of_speed():
    """Half of a stage is there already: the other half takes as long as it takes. 50%: as above."""
    with progress.conversion() as conversion:
        conversion.expect([("one", 10.0), ("two", 10.0)])
        with progress.progress_bar("one", 10, "step") as bar:
            bar.skip(5)
            assert conversion.share == pytest.approx(0.25) and conversion.left is None
            for _ in range(5):
                time.sleep(0.1)
                bar.update()
        assert conversion.left == pytest.approx(1.0, rel=0.5)


@pytest.mark.parametrize("budget, n_plans", [("16", 2), ("4", 2), ("8", 4)])
def test_plans_that_are_one_are_expected_once(tiny, out, monkeypatch, budget, n_plans):
    """Alloc-L's and uniform k's of all experts, or of one in each layer: two of them were expected, with thresholds of each."""
    expected, opened, expect, open_ = [], [], progress.Conversion.expect, progress.Conversion.open
    monkeypatch.setattr(progress.Conversion, "expect", lambda self, all_: expected.append(all_) or expect(self, all_))
    monkeypatch.setattr(progress.Conversion, "open", lambda self, bar: opened.append(bar) or open_(self, bar))
    monkeypatch.setattr("allocmoe_edge.convert.task.Task.tries_estimates", False)
    options = [
        "--budget",
        budget,
        "--calib-tokens",
        "64",
        "--ctx-size",
        "32",
        "--threads",
        "1",
        "-o",
        str(out / "m.gguf"),
    ]
    assert cli.main([str(tiny.gguf_path), *options]) == 0
    work = dict(expected[-1])
    bars = [bar for bar in opened if bar.desc in work]
    assert [bar.desc for bar in bars] == [name for name, _ in expected[-1]]
    check = next(bar for bar in bars if bar.desc == "held-out check")
    assert check.total == 1 + n_plans and work[check.desc] == 32 * (1 + stages._HALF * n_plans)


@pytest.mark.parametrize(
    "seconds, said", [(0.2, "0 s"), (99.4, "99 s"), (99.6, "2 min"), (3600, "60 min"), (7500, "2 h 5 min")]
)
def test_durations(seconds, said):
    assert progress.duration(seconds) == said


def test_progress_of_quantising(tiny, out):
    options = [*OPTIONS[:-4], "--threads", "1", "--quantize", "Q8_0", "--token-rule", "estimate"]
    printed = on_a_terminal(tiny.gguf_path, *options, "-o", out / "m.gguf")
    for stage in ("quantising to Q8_0", "writing the plan"):
        assert f"{stage}: " in printed

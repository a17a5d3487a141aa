"""What takes more than two seconds shows on a terminal how far it is, and nothing in a pipe."""

import os
import struct
import subprocess

import pytest
from test_convert import COMMAND, run

pty, fcntl, termios = (pytest.importorskip(name, reason="needs terminals") for name in ("pty", "fcntl", "termios"))

OPTIONS = ["--ctx-size", "32", "--calib-tokens", "64", "--estimate-tokens", "64", "--cost", "ms", "--threads", "1"]
STAGES = (
    "loading the model",
    "calibration text",
    "decode cost",
    "sensitivity",
    "estimates, directions",
    "estimates, sizes",
    "estimates, positive directions",
    "estimates, outputs",
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


def test_progress_on_a_terminal_and_none_in_a_pipe(tiny, out):
    printed = on_a_terminal(tiny.gguf_path, *OPTIONS, "-o", out / "m.gguf")
    assert [stage for stage in STAGES if f"{stage}: " not in printed] == []
    piped = run(tiny.gguf_path, *OPTIONS, "-o", out / "n.gguf", stdin=subprocess.DEVNULL)
    assert piped.returncode == 0, piped.stderr
    assert "\r" not in piped.stderr and not [stage for stage in STAGES if f"{stage}: " in piped.stderr]


def test_progress_of_quantising(tiny, out):
    options = [*OPTIONS[:-4], "--threads", "1", "--quantize", "Q8_0", "--token-rule", "estimate"]
    printed = on_a_terminal(tiny.gguf_path, *options, "-o", out / "m.gguf")
    for stage in ("quantising to Q8_0", "writing the plan"):
        assert f"{stage}: " in printed

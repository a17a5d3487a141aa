"""allocmoe-chat: in a pseudo-terminal as a person uses it, and in a pipe. Where replies are long the tests are among the slow."""

import json
import os
from pathlib import Path
import re
import select
import signal
import subprocess
import sys
import time

from conftest import plan_from_made_up_profile
import odd_models
import other_models
import pytest

pty = pytest.importorskip("pty", reason="needs a pseudo-terminal")
COMMAND = [sys.executable, "-m", "allocmoe_edge.chat"]


@pytest.fixture(scope="module")
def model(smolmoe_path, tmp_path_factory):
    """The trained model, with a plan for half of its 240 activations."""
    return plan_from_made_up_profile(smolmoe_path, tmp_path_factory.mktemp("chat") / "smolmoe.gguf")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random model of 16 activations."""
    folder = tmp_path_factory.mktemp("tiny")
    return plan_from_made_up_profile(odd_models.write_qwen3moe(folder / "source.gguf"), folder / "tiny.gguf")


class Session:
    """A chat in a terminal."""

    def __init__(self, *arguments, **environment):
        environment = {**os.environ, "TERM": "xterm", "PYTHONIOENCODING": "utf-8", **environment}
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored where the tests run in a shell's background
            os.execvpe(COMMAND[0], [*COMMAND, *map(str, arguments)], environment)
        self.all = ""

    def send(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def until(self, pattern: str, timeout: float = 60) -> str:
        """What comes up to a match of the pattern, which is looked for in what has not been read yet."""
        read, end = "", time.monotonic() + timeout
        while not re.search(pattern, read):
            ready, _, _ = select.select([self._fd], [], [], max(0, end - time.monotonic()))
            assert ready, f"no {pattern!r} in {read!r}"
            try:
                data = os.read(self._fd, 65536)
            except OSError:  # it has ended
                data = b""
            assert data, f"it has ended, and no {pattern!r} in {read!r}"
            read += data.decode(errors="replace")
            self.all += data.decode(errors="replace")
        return read

    def end(self) -> int:
        """The exit code, after what it still has to say."""
        while True:
            try:
                data = os.read(self._fd, 65536)
            except OSError:
                data = b""
            if not data:
                break
            self.all += data.decode(errors="replace")
        os.close(self._fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


PROMPT = r"> (\x1b\[0m)?$"


def piped(text, *arguments, **options) -> subprocess.CompletedProcess:
    data = text if isinstance(text, bytes) else text.encode()
    command = [*COMMAND, *map(str, arguments)]
    done = subprocess.run(command, input=data, capture_output=True, timeout=120, **options)
    done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_a_chat_in_a_terminal(model, tmp_path):
    """The commands, one after the other."""
    chat = Session(model, "--max-tokens", 8, "--temperature", 0)
    assert "120 of 240" in chat.until(PROMPT)
    chat.send("What is the capital of France?\r")
    assert re.search(r"Paris(.|\n)*\(budget 0.50, \d tokens, [\d.]+ tokens/s, 120.0 activations", chat.until(PROMPT))
    chat.send("/bud\t 0.4\r")  # Tab completes it
    assert "96 of 240" in chat.until(PROMPT)
    chat.send("\x1b[A\x1b[A\r")  # the line before the last one, called back
    assert "budget 0.40" in chat.until(PROMPT)
    chat.send("/stats\r")
    found = chat.until(PROMPT)
    assert "first token after" in found and re.search("layer by layer: [▁-█]{30}", found)
    assert re.search(r"[1-9]\d* of 4096 tokens of context", found)
    chat.send("/budget 0.3\r")
    chat.until(PROMPT)
    chat.send("/stats\r")  # of the last reply, whatever is cached now
    assert re.search(r"[1-9]\d* of 4096 tokens of context", chat.until(PROMPT))
    chat.send("/budget 0.4\r")
    chat.until(PROMPT)
    chat.send("/compare 0.5 1.0\r")
    found = chat.until(PROMPT)
    assert re.search(r"at budget 0.5:(.|\n)*120.0 activations(.|\n)*at budget 1.0:(.|\n)*240.0 activations", found)
    chat.send("Two\\\rlines\r")
    chat.until(PROMPT)
    chat.send('"""And\r\rthree"""\r')
    chat.until(PROMPT)
    chat.send("\x1b[200~Pasted\ntext\x1b[201~\r")
    chat.until(PROMPT)
    saved = tmp_path / "a chat.json"
    chat.send(f"/save {saved}\r")
    assert "10 messages saved" in chat.until(PROMPT)
    messages = json.loads(saved.read_text())["messages"]
    assert [m["content"] for m in messages[4::2]] == ["Two\nlines", "And\n\nthree", "Pasted\ntext"]
    chat.send("/reset\r")
    chat.until(PROMPT)
    chat.send("/compare 0.5\r")
    assert "there is none yet" in chat.until(PROMPT)
    chat.send(f"/load {saved}\r")
    assert "10 messages" in chat.until(PROMPT)
    chat.send("half a mess")
    chat.until("half a mess$")
    time.sleep(0.2)  # a signal that comes just before Python's readline waits for a key is missed until the next key
    chat.send("\x03")
    assert "Ctrl-D or /quit ends the chat" in chat.until(PROMPT)
    chat.send("/budget\r")
    assert "96 of 240" in chat.until(PROMPT)
    chat.send("\x04")
    assert chat.end() == 0
    assert "\x1b[2m(" in chat.all and "\x1b[1m" in chat.all


# of which the trained model talks without end, if it takes the likeliest token always
STORY = "Tell me a long story about a dog."


@pytest.mark.slow
def test_ctrl_c_stops_a_reply(model):
    """And not the program: the next message is answered."""
    chat = Session(model, "--temperature", 0, NO_COLOR="1")
    chat.until(PROMPT)
    for _ in range(2):
        chat.send(f"{STORY}\r")
        chat.until(r"dog\.\r\n(.|\n){80}")
        chat.send("\x03")
        assert re.search(r"\(budget 0.50, \d+ tokens, .*, stopped\)", chat.until(PROMPT))
    chat.send("/compare 0.5 1.0\r")
    chat.until("at budget 0.5:\r\n(.|\n){40}")
    chat.send("\x03")
    assert "at budget 1.0" not in chat.until(PROMPT)
    chat.send("/quit\r")
    assert chat.end() == 0
    assert not re.search(r"\x1b\[\d*m", chat.all)  # NO_COLOR


@pytest.mark.slow
def test_ctrl_c_while_the_prompt_is_read(model, tmp_path):
    long = [{"role": "user", "content": "word " * 2500}, {"role": "assistant", "content": "Yes."}]
    (tmp_path / "long.json").write_text(json.dumps({"messages": long}))
    chat = Session(model, "--load", tmp_path / "long.json", "--max-tokens", 4)
    chat.until(PROMPT)
    chat.send("Go on\r")
    chat.until("Go on\r\n")
    time.sleep(0.5)
    chat.send("\x03")
    assert "0 tokens, stopped" in chat.until(PROMPT)
    chat.send("/reset\r")
    chat.until(PROMPT)
    chat.send("What is the capital of France?\r")
    assert re.search(r"\d tokens, .* activations", chat.until(PROMPT))
    chat.send("\x04")
    assert chat.end() == 0


def test_compared_replies_differ_by_their_budget_alone(model):
    done = piped("Hello\n/compare 0.5 1.0 50 %\n", model, "--max-tokens", 6)
    replies = re.split("at budget .*:\n", done.stdout)[1:]
    assert done.returncode == 0 and len(replies) == 3 and replies[0] == replies[2]


@pytest.mark.slow
def test_in_a_pipe(model, tmp_path):
    """Replies go to stdout, and nothing else; the same seed gives the same."""
    text = 'Hello\n/budget fast\n\n"""Two\nlines"""\n/compare 0.25\n'
    options = ["--max-tokens", 6, "--seed", 3, "--system", "Be brief."]
    done = piped(text, model, *options)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout == piped(text.replace("\n", "\r\n"), model, *options).stdout
    lines = done.stdout.splitlines()
    assert "80 of 240" in done.stdout and "at budget 0.25:" in lines and "\x1b" not in done.stdout
    # the end of the input is the end of a text that is not ended
    assert piped("Hello", model, *options).stdout == piped('"""Hello', model, *options).stdout == lines[0] + "\n"
    assert piped("", model).stdout == ""


def test_what_cannot_be_done_in_a_pipe(tiny, tmp_path):
    """One line on stderr each, and an exit code of 1 at the end; what comes after it is answered."""
    other = tmp_path / "other.json"
    other.write_text('{"a": 1}')
    files = {
        "missing": "missing: No such file or directory",
        "~nobody-here/a.json": "No such file or directory",
        "/dev/zero": "is no file",
        ".": "is no file",
        "other.json": 'want an object with "messages"',
        "list.json": 'want an object with "messages"',
        "text.json": "not JSON",
        "binary.json": "not JSON",
        "deep.json": "not JSON",
        "role.json": "message 1: want role and content",
        "late.json": "message 2: want role and content",
        "number.json": "message 1: want role and content",
    }
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "text.json").write_text("Hello")
    (tmp_path / "binary.json").write_bytes(bytes(range(256)))
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "role.json").write_text('{"messages": [{"role": "tool", "content": ""}]}')
    (tmp_path / "late.json").write_text(
        '{"messages": [{"role": "user", "content": ""}, {"role": "system", "content": ""}]}'
    )
    (tmp_path / "number.json").write_text('{"messages": [{"role": "user", "content": 5}]}')
    lines = {
        "Hello": "", "/compare 0.5 nan": 'found "nan"', "/compare 1.0 fast 0.1": "(= 2 activations)", "/reset": "",
        "/compare 0.5": "there is none yet", "/stats": "there is none yet", "/nothing": "no such command",
        "/budget 1.5": "budget: found '1.5'", "/budget nan": 'found "nan"', "/budget 0.5 0.6": "takes one budget",
        "/save": "wants the name of a file", "/save other.json": 'want an object with "messages"',
        "/save none/a.json": "no such folder", "/save .": "is a folder", "/help me": "takes nothing more",
        **{f"/load {name}": want for name, want in files.items()},
    }  # fmt: skip
    done = piped("\n".join(lines) + "\n/budget\n", tiny, "--max-tokens", 2, cwd=tmp_path)
    assert done.returncode == 1 and "at budget" not in done.stdout
    lines = {line: want for line, want in lines.items() if want}
    errors = done.stderr.splitlines()
    for line, error, want in zip(lines, errors, lines.values()):
        assert error.startswith("error: ") and want in error, line
    assert len(errors) == len(lines)
    assert "8 of 16" in done.stdout
    assert json.loads(other.read_text()) == {"a": 1}


def test_the_file_on_the_page(tiny, tmp_path):
    """docs/chat.md shows one: it can be loaded, and what is saved reads like it."""
    page = (Path(__file__).parent.parent / "docs" / "chat.md").read_text()
    text = re.search(r"```json\n(.*?)```", page, re.DOTALL)[1]
    (tmp_path / "a.json").write_text(text)
    done = piped("/load a.json\n/save b.json\n", tiny, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads((tmp_path / "b.json").read_text()) == json.loads(text)


def test_whose_system_message(tiny, tmp_path):
    """A file's own, else that of --system."""
    user = {"role": "user", "content": "Hello"}
    for name, messages in (("none", [user]), ("own", [{"role": "system", "content": "Own"}, user])):
        (tmp_path / f"{name}.json").write_text(json.dumps({"messages": messages}))
    lines = "/save a.json\n/load own.json\n/save b.json\n/load none.json\n/save c.json\n"
    done = piped(lines, tiny, "--system", "Given", "--load", "none.json", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stderr == "(the system message in the file takes the place of --system)\n"
    heads = [json.loads((tmp_path / f"{name}.json").read_text())["messages"][0]["content"] for name in "abc"]
    assert heads == ["Given", "Own", "Given"]


def test_odd_text_in_a_pipe(tiny, tmp_path):
    """Bytes that are no text, a NUL, a surrogate from a file; in a locale that knows ASCII only."""
    (tmp_path / "a.json").write_text('{"messages": [{"role": "user", "content": "\\ud800"}]}')
    text = b"\xff\xfe\nab\0cd\n\xc3\xa9\xe2\x82\xac\n/load a.json\n Go on\n/stats\n/save b.json\n"
    for locale in ("C.UTF-8", "C"):
        environment = {**os.environ, "LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        done = piped(text, tiny, "--max-tokens", 5, "--seed", 1, cwd=tmp_path, env=environment)
        assert (done.returncode, done.stderr) == (0, "")
        assert len(json.loads((tmp_path / "b.json").read_text(encoding="utf-8"))["messages"]) == 3


def test_a_chat_that_outgrows_the_context(tiny):
    """The oldest messages are left out, and it says so; what can never fit is refused and changes nothing."""
    lines = ["word " * 20] * 6 + ["word " * 400, "Hello"]
    done = piped("\n".join(lines), tiny, "--ctx-size", 256, "--max-tokens", 10, "--seed", 1)
    assert "of the oldest messages do not fit into the context any more" in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and "this does not fit into the context of 256 tokens" in errors[0]


@pytest.mark.slow
def test_reply_to_the_end_of_the_context(model):
    done = piped(f"{STORY}\n/stats\n", model, "--ctx-size", 256, "--temperature", 0)
    assert "the context is full" in done.stdout and "255 of 256 tokens of context" in done.stdout


def test_text_beyond_the_positions_that_a_model_has_learned(tmp_path):
    """The process ended there, and the chat with it; by default the context is larger."""
    done = piped("Hello\n/stats\n", other_models.write_gpt2(tmp_path / "gpt2.gguf"))
    assert done.returncode == 0 and "256 tokens of context used" in done.stdout and not done.stderr, done.stderr


def test_models_without_a_choice(tmp_path):
    dense = other_models.write_dense(tmp_path / "dense.gguf")
    done = piped("Hello\n/budget\n/stats\n/budget 0.5\n", dense, "--max-tokens", 4)
    assert done.returncode == 1 and "a model without experts" in done.stdout and "4 tokens" in done.stdout
    assert done.stderr.count("\n") == 1 and "a dense model" in done.stderr
    bert = other_models.write_bert(tmp_path / "bert.gguf")
    done = piped("Hello\n", bert)
    assert done.returncode == 1 and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "template, message",
    [
        ("{% for", "unexpected 'end of template'"),
        ("{{ nope() }}", "'nope' is undefined"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_a_broken_chat_template_is_the_files(tmp_path, template, message):
    path = other_models.write_dense(tmp_path / "model.gguf", template)
    done = piped("Hello\n", path)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "should not happen" not in done.stderr
    assert f"{path}: its chat template: " in done.stderr and message in done.stderr


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["none.gguf"], 1, "none.gguf"),
        (["MODEL", "--budget", "99%%"], 1, "budget: found"),
        (["MODEL", "--temperature", "nan"], 2, "want a number from 0 to 100"),
        (["MODEL", "--ctx-size", "-1"], 2, "want a whole number"),
        (["MODEL", "--load", "none.json"], 1, "none.json"),
        (["MODEL", "--load", "/proc/self/mem"], 1, "/proc/self/mem: Input/output error"),
        (["MODEL", "--plan", "none.gguf"], 1, "none.gguf"),
        (["MODEL", "--expert-cache", "x"], 2, "argument --expert-cache: found 'x', want a size"),
        (["."], 1, ".: a folder; of a model in Hugging Face's format allocmoe-convert makes a file"),
        ([], 2, "MODEL"),
    ],
    ids=str,
)
def test_refused_arguments(tiny, tmp_path, arguments, code, message):
    done = piped("", *[tiny if argument == "MODEL" else argument for argument in arguments], cwd=tmp_path)
    assert done.returncode == code and message in done.stderr.splitlines()[-1]


def test_closed_streams(tiny):
    for closed in ("<&-", ">&-"):
        done = subprocess.run(["sh", "-c", f'"$@" {closed}', "sh", *COMMAND, tiny], capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.endswith("have to be open\n"), done.stderr


@pytest.mark.slow
def test_reader_that_goes_away(tiny):
    """head -1, say."""
    with subprocess.Popen(
        [*COMMAND, tiny], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdin.write(b"Hello\n" * 5)
        process.stdin.flush()
        process.stdout.read(1)
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == b"" and process.wait(60) == 141


@pytest.mark.slow
def test_ctrl_c_in_a_pipe(tiny):
    with subprocess.Popen(
        [*COMMAND, tiny], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdin.write(b"Hello\n")
        process.stdin.flush()
        process.stdout.read(10)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 130 and b"Traceback" not in errors


def test_what_the_model_says_does_not_command_the_terminal():
    """Colours and titles are the program's to set."""
    code = (
        "from allocmoe_edge.terminal import Terminal; Terminal().write('a\\x1b]0;title\\x07b\\x9b31m\\n\\t\\u200dc\\n')"
    )
    pid, fd = pty.fork()
    if pid == 0:
        os.execvp(sys.executable, [sys.executable, "-c", code])
    read = b""
    while not read.endswith(b"c\r\n"):
        read += os.read(fd, 1000)
    os.waitpid(pid, 0)
    os.close(fd)
    assert read.decode() == "a\ufffd]0;title\ufffdb\ufffd31m\r\n\t\u200dc\r\n"

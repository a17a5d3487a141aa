"""python -m allocmoe_edge.server: llama-cpp-python's server, running our Llama."""

import argparse
import contextlib
import os
import socket
import subprocess
import sys
import time

from allocmoe_edge import server
from allocmoe_edge.measure.cores import physical_cores
import other_models
import pytest

httpx = pytest.importorskip("httpx", reason="asks the server over HTTP")
pytest.importorskip("uvicorn", reason="the extra 'server' is not installed")


@contextlib.contextmanager
def serving(folder, *options):
    """(URL, log file) of a server, until the block is left."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "allocmoe_edge.server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        *map(str, options),
    ]
    log = folder / "server.log"
    with open(log, "w") as output, subprocess.Popen(command, stdout=output, stderr=output, cwd=folder) as process:
        try:
            url = f"http://127.0.0.1:{port}/v1"
            for _ in range(240):
                assert process.poll() is None, log.read_text()
                try:
                    assert httpx.get(f"{url}/models").status_code == 200
                    break
                except httpx.TransportError:
                    time.sleep(0.5)
            yield url, log
            assert process.poll() is None, log.read_text()
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def dense(dense_path, tmp_path_factory):
    """A server of the real model without experts."""
    with serving(tmp_path_factory.mktemp("server"), "--model", dense_path, "--n_ctx", "256") as found:
        yield found


def complete(url, **body):
    return httpx.post(
        f"{url}/completions", json={"prompt": "The capital of France", "max_tokens": 8, **body}, timeout=60
    )


def test_chat_over_http_under_the_files_plan(planned_path, tmp_path):
    with serving(tmp_path, "--model", planned_path, "--n_ctx", "256", "--n_cpu_moe", "2") as (url, log):
        body = {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 8}
        answer = httpx.post(f"{url}/chat/completions", json=body, timeout=60).json()
        # what it answers is the model's business, which may be nothing at half budget
        assert answer["object"] == "chat.completion" and answer["usage"]["prompt_tokens"] > 0
    assert "allocmoe: budget 0.50: 180 of 360" in log.read_text()
    # the loader's only line about it at this level
    assert "tensor overrides to CPU are used" in log.read_text()


def test_model_without_experts(dense):
    answer = complete(dense[0], temperature=0.0).json()
    assert answer["object"] == "text_completion" and answer["usage"]["completion_tokens"] > 0


def test_embedding_model(tmp_path):
    model = other_models.write_bert(tmp_path / "bert.gguf")
    with serving(tmp_path, "--model", model, "--n_ctx", "64", "--embedding", "true") as (url, _):
        answer = httpx.post(f"{url}/embeddings", json={"input": ["hello world", "a prompt"]}, timeout=60).json()
        assert [len(each["embedding"]) for each in answer["data"]] == [64, 64]


def test_threads_are_the_physical_cores(monkeypatch):
    """Where neither an option nor a variable says otherwise."""
    from llama_cpp.server.cli import parse_model_from_args
    from llama_cpp.server.settings import ModelSettings

    for name in ("N_THREADS", "N_THREADS_BATCH", "n_threads"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ, n_threads_batch="3"))
    server._default_threads()
    assert os.environ["N_THREADS"] == str(physical_cores()) and "N_THREADS_BATCH" not in os.environ
    monkeypatch.undo()
    monkeypatch.setenv("N_THREADS", "5")
    assert ModelSettings(model="x").n_threads == 5
    parsed = parse_model_from_args(ModelSettings, argparse.Namespace(model="x", n_threads=7))
    assert parsed.n_threads == 7


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("grammar", ["not a grammar", "root ::= root", 'x ::= "a"', "root ::= " + "(" * 100_000])
def test_bad_grammar_is_an_error_of_the_request(dense, grammar, stream):
    """And not the end of the server."""
    answer = complete(dense[0], grammar=grammar, stream=stream)
    assert answer.status_code == 400 and answer.json()["error"]["message"].startswith("grammar: ")
    assert complete(dense[0], grammar='root ::= "red" | "blue"').json()["choices"][0]["text"] in ("red", "blue")


@pytest.mark.parametrize("content", [b"", b"{", b"not JSON", b'{"prompt": "x"', b"\xff\xfe", b'{"prompt": "x"} more'])
def test_malformed_json_is_an_error_of_the_request(dense, content):
    url, _ = dense
    for path in ("completions", "chat/completions", "embeddings"):
        answer = httpx.post(f"{url}/{path}", content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body, message",
    [
        ({"max_tokens": "many"}, "max_tokens"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": ""}, "the prompt has no tokens"),
        ({"prompt": "x " * 1000}, "maximum context length is 256 tokens"),
    ],
    ids=str,
)
def test_wrong_values_are_errors_of_the_request(dense, body, message):
    answer = complete(dense[0], **body)
    assert answer.status_code == 400 and message in answer.json()["error"]["message"]
    assert complete(dense[0]).status_code == 200


def test_lists_instead_of_an_object(dense):
    for body in ([], [1], "text", 5, None):
        assert httpx.post(f"{dense[0]}/completions", json=body).status_code == 400


def run(*options, **environment) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "allocmoe_edge.server", *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


def test_options():
    shown = run("--help")
    assert shown.returncode == 0 and "--n_cpu_moe N" in shown.stdout and "--n_gpu_layers" in shown.stdout
    for arguments in (["--n_cpu_moe", "-1"], ["--n_cpu_moe", "x"], ["--model"], ["--no_such_option"], ["--n_ctx", "x"]):
        done = run(*arguments)
        assert done.returncode == 2 and "Traceback" not in done.stderr and "error: " in done.stderr


def test_model_that_llama_cpp_cannot_load(tmp_path):
    from gguf_factory import write_gguf

    done = run("--model", write_gguf(tmp_path / "m.gguf"))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "m.gguf: llama.cpp cannot load it" in done.stderr.splitlines()[-1]


def test_port_that_is_taken(dense_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = run("--model", dense_path, "--host", "127.0.0.1", "--port", taken.getsockname()[1])
    assert done.returncode == 3  # uvicorn's own
    assert "Traceback" not in done.stderr and "address already in use" in done.stderr

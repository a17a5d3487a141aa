"""python -m allocmoe_edge.server: llama-cpp-python's server, running our Llama."""

import socket
import subprocess
import sys
import time

import pytest

httpx = pytest.importorskip("httpx", reason="asks the server over HTTP")
pytest.importorskip("uvicorn", reason="the extra 'server' is not installed")


def test_chat_over_http_under_the_files_plan(planned_path, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "allocmoe_edge.server", "--model", str(planned_path)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--n_ctx", "256", "--n_cpu_moe", "2"]
    log = tmp_path / "server.log"
    with open(log, "w") as output, subprocess.Popen(command, stdout=output, stderr=output, cwd=tmp_path) as server:
        try:
            url = f"http://127.0.0.1:{port}/v1"
            for _ in range(240):
                assert server.poll() is None, log.read_text()
                try:
                    assert httpx.get(f"{url}/models").status_code == 200
                    break
                except httpx.TransportError:
                    time.sleep(0.5)
            body = {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 8}
            answer = httpx.post(f"{url}/chat/completions", json=body, timeout=60).json()
            # what it answers is the model's business, which may be nothing at half budget
            assert answer["object"] == "chat.completion" and answer["usage"]["prompt_tokens"] > 0
        finally:
            server.terminate()
    assert "allocmoe: budget 0.50: 180 of 360" in log.read_text()
    # the loader's only line about it at this level
    assert "tensor overrides to CPU are used" in log.read_text()

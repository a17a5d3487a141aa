"""allocmoe-server as strangers meet it: where it listens, what it tells of its key, and that what they do leaves nothing behind.

On a tiny random model that talks without end. bench/server_soak.py is the same for half an hour.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
import http.client
import itertools
import json
import os
from pathlib import Path
import socket
import time
from urllib.parse import urlsplit

import odd_models
import pytest
from test_llama_server import httpx, serving

KEY = "sk-of-nobody-else-4711"
HEADERS = {"Authorization": f"Bearer {KEY}"}

needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="what the process has is read from /proc")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("safety")
    path = odd_models.write_talker(folder / "talker.gguf")
    options = ["-c", "512", "-np", "2", "-t", "1", "--metrics", "--slots", "--api-key", KEY, "-lv", "5"]
    with serving(folder, "-m", path, *options) as (url, log, process):
        yield url, log, process


@needs_proc
def test_it_listens_on_this_machine_only(server):
    """Whoever wants more says --host."""
    port = urlsplit(server[0]).port
    listening = []
    for family in ("tcp", "tcp6"):
        rows = [line.split() for line in Path(f"/proc/net/{family}").read_text().splitlines()[1:]]
        listening += [row[1].split(":")[0] for row in rows if row[3] == "0A" and int(row[1].split(":")[1], 16) == port]
    assert listening == ["0100007F"]  # 127.0.0.1


def test_a_key_is_wanted_and_not_told(server):
    """By no answer, to a right request or a wrong one, and by no line of the log, however much is logged."""
    url, log, _ = server
    paths = ("/props", "/slots", "/metrics", "/v1/models", "/health", "/budget", "/no/such/path")
    texts = []
    for headers, path in itertools.product(({}, HEADERS, {"Authorization": "Bearer wrong"}, {"X-Api-Key": KEY}), paths):
        texts.append(httpx.get(url + path, headers=headers, timeout=60).text)
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Bearer {KEY[:-1]}"},
        {"Authorization": KEY[:5]},
    ):
        for path in ("/completion", "/v1/chat/completions", "/v1/messages", "/props", "/slots/0?action=erase"):
            found = httpx.post(url + path, json={"prompt": "x", "n_predict": 1}, headers=headers, timeout=60)
            assert found.status_code == 401, (path, found.text)
            texts.append(found.text)
    for body in (
        b"{",
        json.dumps({"prompt": "x", "n_predict": 1, "budget": "much"}).encode(),
        b'{"prompt": "x", "n_predict": 2}',
    ):
        texts.append(httpx.post(f"{url}/completion", content=body, headers=HEADERS, timeout=60).text)
    assert not any(KEY in text for text in texts)
    logged = log.read_bytes()
    assert len(logged) > 10_000 and KEY.encode() not in logged


def rude(port: int, number: int) -> None:
    """A client that asks wrongly, goes away in the midst of an answer, or says no more."""
    if number % 4 == 3:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(b"POST /completion HTTP/1.1\r\nContent-Length: 1000000\r\n\r\n{")
        return
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        if number % 4 == 0:
            connection.request("POST", "/completion", "{" * 1000, HEADERS)
            assert connection.getresponse().status in (400, 500)
        else:
            body = {
                "prompt": "abc " * (number % 3),
                "n_predict": 400 if number % 4 == 1 else 4,
                "stream": number % 4 == 1,
            }
            connection.request("POST", "/completion", json.dumps(body), HEADERS)
            response = connection.getresponse()
            assert response.status == 200
            response.read(100)
    finally:
        connection.close()


def held(pid: int, settled: int = -1) -> tuple:
    """(open files, MiB of memory); of the files at most `settled`, or what there are after some seconds."""
    for _ in range(50):
        n_files = len(os.listdir(f"/proc/{pid}/fd"))
        if settled < 0 or n_files <= settled:
            break
        time.sleep(0.1)
    status = Path(f"/proc/{pid}/status").read_text()
    return n_files, int(status.split("VmRSS:")[1].split()[0]) / 1024


@needs_proc
def test_rude_clients_leave_nothing_behind(server):
    url, _, process = server
    port = urlsplit(url).port
    with ThreadPoolExecutor(8) as clients:
        list(clients.map(lambda i: rude(port, i), range(40)))  # what is allocated once is
        time.sleep(1)
        files, memory = held(process.pid)
        list(clients.map(lambda i: rude(port, i), range(160)))
    now = held(process.pid, files)
    print(f"{files} open files and {memory:.1f} MiB, then {now[0]} and {now[1]:.1f}")
    assert now[0] <= files and now[1] < memory + 16
    found = httpx.post(f"{url}/completion", json={"prompt": "x", "n_predict": 4}, headers=HEADERS, timeout=60)
    assert found.status_code == 200 and found.json()["tokens_predicted"] == 4

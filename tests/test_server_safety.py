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
    (folder / "saved").mkdir()
    options = ["-c", "512", "-np", "2", "-t", "1", "--metrics", "--slots", "--api-key", KEY, "-lv", "5"]
    options += ["--slot-save-path", folder / "saved"]
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


FILES = ["/../../etc/passwd", "/..%2f..%2fetc%2fpasswd", "//etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/v1/../../etc/passwd",
    "/....//etc/passwd", r"/\..\..\etc\passwd", "http://x/etc/passwd", "file:///etc/passwd", "/%00", "/slots/../../etc/passwd", "/server.log"]  # fmt: skip
NAMES = [
    "../talker.gguf",
    "..",
    ".",
    "",
    "a/b",
    "/etc/passwd",
    "..\\x",
    "C:\\x",
    "a\0b",
    "a" * 300,
    " x",
    "x.",
    None,
    5,
    [],
]


def got(port: int, path: str) -> bytes:
    """What there is at a path that a client library would have put in order first."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        request = f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nConnection: close\r\n\r\n"
        connection.sendall(request.encode())
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_paths_lead_nowhere_else(server):
    """Neither those of requests, nor names of files to keep a slot's text in."""
    url, log, _ = server
    for path in FILES:
        found = got(urlsplit(url).port, path)
        assert found.startswith(b"HTTP/1.1 404 "), (path, found[:200])
    folder = log.parent
    before = sorted(folder.rglob("*")), (folder / "talker.gguf").stat().st_mtime_ns
    for name, action in itertools.product(NAMES, ("save", "restore")):
        found = httpx.post(f"{url}/slots/0?action={action}", json={"filename": name}, headers=HEADERS, timeout=60)
        assert found.status_code == 400, (name, action, found.text)
    assert (sorted(folder.rglob("*")), (folder / "talker.gguf").stat().st_mtime_ns) == before


def test_models_are_those_of_the_folder(tmp_path):
    """By no other path either."""
    (tmp_path / "models").mkdir()
    odd_models.write_talker(tmp_path / "models" / "in.gguf")
    other = odd_models.write_talker(tmp_path / "out.gguf")
    with serving(tmp_path, "--models-dir", tmp_path / "models", "-c", "256", "-np", "1", "-t", "1") as (url, log, _):
        for name in (
            "out",
            "../out",
            "../out.gguf",
            str(other),
            f"file://{other}",
            "models/../../out.gguf",
            "..",
            "/",
            "",
        ):
            found = httpx.post(f"{url}/completion", json={"model": name, "prompt": "x", "n_predict": 1}, timeout=60)
            assert found.status_code in (400, 404), (name, found.text)
        found = httpx.post(f"{url}/completion", json={"model": "in", "prompt": "x", "n_predict": 1}, timeout=60)
        assert found.status_code == 200, found.text


@pytest.mark.parametrize(
    "prompt", ["abc " * 2000, [1] * 256, [1] * 5000], ids=lambda prompt: f"{len(prompt)} of {type(prompt)}"
)
def test_prompts_longer_than_the_context(server, prompt):
    """Of 256 tokens a slot: refused, whole or streamed, and the next request is served."""
    for stream in (False, True):
        body = {"prompt": prompt, "n_predict": 4, "stream": stream}
        found = httpx.post(f"{server[0]}/completion", json=body, headers=HEADERS, timeout=60)
        assert found.status_code == 400 and "exceeds the available context size (256 tokens" in found.text, found.text
    found = httpx.post(
        f"{server[0]}/completion", json={"prompt": [1] * 250, "n_predict": -1}, headers=HEADERS, timeout=60
    )
    assert found.status_code == 200 and 0 < found.json()["tokens_predicted"] <= 6 and found.json()["truncated"]


DEEP = 200_000 * "["


@pytest.mark.parametrize(
    "body",
    [
        DEEP.encode(),
        b"\xef\xbb\xbf" + DEEP.encode(),
        json.dumps({"prompt": DEEP}).encode(),
        json.dumps({"prompt": json.dumps({"in a string in a string": 2000 * "["})}).encode(),
        b'{"prompt": "' + 200_000 * b"\\u005b" + b'"}',
        b'["[' + b"[".join(b"\\" + k * b"u005c" + b"u0022" for k in range(40)),
    ],
    ids=["plain", "byte order mark", "in a string", "in a string of a string", "escaped", "strings of strings"],
)
def test_json_that_nests_deep_is_refused(server, body):
    """Also in a string, where a tool's arguments are: what reads or copies it recurses."""
    found = httpx.post(f"{server[0]}/completion", content=body, headers=HEADERS, timeout=60)
    assert found.status_code == 400 and "nested more than 500 deep" in found.text, found.text


@pytest.mark.parametrize(
    "body",
    [
        {"grammar": 'root ::= "a"{3,1}'},
        {"json_schema": {"type": "string", "minLength": 3, "maxLength": 1}},
        {"grammar": "root ::= " + 100_000 * "("},
        {"grammar": "root ::= " + 20 * ('"' + 10_000 * "x" + '"{0,2000} ')},
        {"grammar": 'root ::= b root "z" | "x"\nb ::= c\nc ::= "y"?\n'},
    ],
    ids=lambda body: json.dumps(body)[:60],
)
def test_grammars_without_end_are_refused(server, body):
    """One took all memory, or the server with it, and held every other request meanwhile."""
    body = {"prompt": "abc", "n_predict": 4, **body}
    found = httpx.post(f"{server[0]}/completion", json=body, headers=HEADERS, timeout=60)
    assert found.status_code == 400 and "failed to parse grammar" in found.text, found.text


def test_brackets_in_a_text_are_text(server):
    log = "[INFO] " + 600 * "\x1b[31mx"
    for prompt in ("see " + DEEP[:600], 300 * "[" + 300 * "]" + 300 * "[", '"' * 9 + "\\" * 9 + "\x00[{", log):
        found = httpx.post(f"{server[0]}/tokenize", json={"content": prompt}, headers=HEADERS, timeout=60)
        assert found.status_code == 200, found.text


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
                "temperature": 0.0,  # else it may write bytes that are no UTF-8, which is an error
            }
            connection.request("POST", "/completion", json.dumps(body), HEADERS)
            response = connection.getresponse()
            assert response.status == 200, response.read()
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

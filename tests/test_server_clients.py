"""allocmoe-server and the clients that people have: OpenAI's and Anthropic's own, and those that behave badly."""

from concurrent.futures import ThreadPoolExecutor
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

from allocmoe_edge import Llama, PlanError
from conftest import plan_from_made_up_profile
import odd_models
import pytest
from test_llama_server import PROMPT, answer, ask, httpx, serving, spent


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny random one of 16 activations, which talks without end."""
    folder = tmp_path_factory.mktemp("talker")
    return plan_from_made_up_profile(odd_models.write_talker(folder / "source.gguf"), folder / "talker.gguf")


@pytest.fixture(scope="module")
def server(model):
    with serving(model.parent, model, "-c", "4096", "-np", "4", "--timeout", "20") as (url, _, process):
        yield url, process.pid


MESSAGES = [{"role": "user", "content": "Say hello."}]


BLANKS = "\t 50 %\r\n"
WRITTEN = ["0.5", ".5", "5.", "1", "1.0", "1.", "100%", "100.0 %", "35 %", " 35%", BLANKS, "0.124", "0.2500000000000000001", "25.e0", "8", " 8 ",
    "08", "16", "17", "3", "4", "0", "0.0", "%", ".", "", " ", "..5", "+8", "-8", "1e0", "0x8", "inf", "nan", "8 8", "8,0", "50%%", "% 50",
    "000000000000000008", "0000000000000000008", "0.5" + "0" * 500, "\u0665\u0660%", "\u20038", "fast", "fast ", "\tfull\n", "Fast", "full!",
    "balanced", "half", "true", "null"]  # fmt: skip
# of JSON and of Python
NUMBERS = [0, 1, 3, 4, 16, 17, -1, 10**30, 0.0, 0.25, 0.03, 1.0, 1.0000001, 8.0, True, False, [], {}]


def test_a_budget_is_the_same_in_python(server, model):
    """Each is taken, for the same total, or refused by both: Python and the server read them in different languages."""
    llm = Llama(model, n_ctx=256, verbose=False)
    taken = 0
    for budget in [*WRITTEN, *NUMBERS]:
        found = ask(server[0], budget=budget, n_predict=1)
        try:
            wanted = llm.budget_total(budget)
        except PlanError:
            wanted = None
        assert (spent(found.json())["total"] if found.status_code == 200 else None) == wanted, repr(budget)
        assert found.status_code in (200, 400)
        taken += wanted is not None
    assert 20 < taken < len(WRITTEN)
    assert llm.budget_total("fast ") == llm.budget_total("fast") == 5 and llm.budget_total("35 %") == 6


@pytest.mark.slow
def test_openai(server):
    openai = pytest.importorskip("openai", reason="pip install openai")
    client = openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none")
    assert client.models.list().data
    budget = dict(extra_body={"budget": 0.375})
    found = client.chat.completions.create(model="any", messages=MESSAGES, max_tokens=8, **budget)
    assert found.choices[0].message.content and found.usage.completion_tokens == 8
    assert found.model_extra["budget"]["total"] == 6
    chunks = list(client.chat.completions.create(model="any", messages=MESSAGES, max_tokens=8, stream=True, **budget))
    assert len(chunks) > 5 and chunks[-1].model_extra["budget"]["total"] == 6
    assert client.completions.create(model="any", prompt=PROMPT, max_tokens=4, n=2, **budget).choices[1].text
    asked = dict(model="any", input="Say hello.", max_output_tokens=8, **budget)
    *_, last = client.responses.create(**asked, stream=True)
    for answered in (client.responses.create(**asked), last.response):
        assert answered.output and answered.model_extra["budget"]["total"] == 6
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    called = client.chat.completions.create(model="any", messages=MESSAGES, tools=tools, max_tokens=8, **budget)
    assert called.choices[0].finish_reason == "length"  # a random model calls nothing
    with pytest.raises(openai.BadRequestError, match="from 4 to 16"):
        client.chat.completions.create(model="any", messages=MESSAGES, extra_body={"budget": 99})


@pytest.mark.slow
def test_anthropic(server):
    anthropic = pytest.importorskip("anthropic", reason="pip install anthropic")
    client = anthropic.Anthropic(base_url=server[0], api_key="none")
    request = dict(model="any", max_tokens=8, messages=MESSAGES)
    budget = dict(extra_body={"budget": 0.375})
    found = client.messages.create(**request, **budget)
    assert found.content[0].text and found.usage.output_tokens == 8 and found.model_extra["budget"]["total"] == 6
    with client.messages.stream(**request, **budget) as stream:
        assert "".join(stream.text_stream) and stream.get_final_message().stop_reason == "max_tokens"
    assert client.messages.count_tokens(model="any", messages=MESSAGES).input_tokens > 0
    with pytest.raises(anthropic.BadRequestError, match="from 4 to 16"):
        client.messages.create(**request, extra_body={"budget": 99})


# clients that behave badly: the others are served

LONG = dict(n_predict=3000, stream=True, ignore_eos=True)


def busy(url) -> int:
    """Slots that are at work."""
    return sum(slot["is_processing"] for slot in httpx.get(f"{url}/slots", timeout=30).json())


def is_idle(url, seconds=30) -> bool:
    end = time.monotonic() + seconds
    while busy(url):
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def is_served(url) -> bool:
    return spent(answer(url, n_predict=4, budget=0.375))["total"] == 6


def connect(url, timeout=30) -> socket.socket:
    host, _, port = url.rpartition("/")[2].partition(":")
    return socket.create_connection((host, int(port)), timeout)


READER = """
import json, sys, urllib.request
request = urllib.request.Request(sys.argv[1] + "/completion", sys.argv[2].encode(), {"Content-Type": "application/json"})
with urllib.request.urlopen(request) as stream:
    stream.read(100)
    print("reading", flush=True)
    stream.read()
"""


def test_client_that_is_killed_in_the_middle_of_a_stream(server):
    url, _ = server
    body = json.dumps({"prompt": PROMPT, **LONG})
    clients = [
        subprocess.Popen([sys.executable, "-c", READER, url, body], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        for _ in range(2)
    ]
    for client in clients:
        assert client.stdout.readline() == b"reading\n"
        client.send_signal(signal.SIGKILL)
        client.wait()
        client.stdout.close()
    assert is_idle(url) and is_served(url)


@pytest.mark.slow
def test_body_of_100_megabytes(server):
    """An error; others are served while it is read, and memory is given back."""
    url, pid = server
    before = memory(pid)
    for body in (b"x" * 100_000_000, b'{"prompt": "' + b"a" * 100_000_000 + b'"}'):
        with ThreadPoolExecutor(1) as pool:
            posted = pool.submit(httpx.post, f"{url}/completion", content=body, timeout=600)
            n_meanwhile = 0
            while not posted.done():
                assert is_served(url)
                n_meanwhile += not posted.done()
        assert 400 <= posted.result().status_code < 500
        assert is_served(url)
    assert n_meanwhile > 3  # the second takes long: it is made tokens
    assert memory(pid) < before + 1000


def memory(pid) -> float:
    """Megabytes."""
    with open(f"/proc/{pid}/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024


def test_body_that_never_comes(server):
    """Announced and not sent: whoever waits for it is not who is served."""
    url, _ = server
    waiting = []
    for _ in range(8):
        client = connect(url)
        client.sendall(
            b"POST /completion HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"
        )
        waiting.append(client)
    assert is_served(url)
    for client in waiting:
        client.close()
    assert is_served(url)


def test_reader_that_does_not_read(server):
    """A stream whose reader takes nothing of it, beside others."""
    url, _ = server
    client = connect(url)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    body = json.dumps({"prompt": PROMPT, **LONG}).encode()
    client.sendall(
        b"POST /completion HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        % len(body)
        + body
    )
    assert is_served(url)
    client.close()
    assert is_idle(url) and is_served(url)


@pytest.mark.parametrize("data", [b"\x00" * 1000, b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", b"A" * 100_000, b"POST /completion HTTP/1.1\r\nContent-Length: -5\r\n\r\n", b"POST /completion HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n"], ids=range(6))  # fmt: skip
def test_what_is_no_http(server, data):
    url, _ = server
    with connect(url, 0.5) as client:
        try:
            client.sendall(data)
            client.recv(1000)
        except OSError:
            pass
    assert is_served(url)


@pytest.mark.slow
def test_a_thousand_idle_connections(server):
    """Somebody else's open connections keep nobody out, and are given back."""
    import resource

    url, pid = server
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 1100:
        pytest.skip(f"at most {hard} open files here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1100), hard))
    before = len(os.listdir(f"/proc/{pid}/fd"))
    idle = []
    try:
        for _ in range(1000):
            idle.append(connect(url))
        assert is_served(url)
    finally:
        for client in idle:
            client.close()
    for _ in range(100):
        if len(os.listdir(f"/proc/{pid}/fd")) <= before + 5:
            break
        time.sleep(0.2)
    assert len(os.listdir(f"/proc/{pid}/fd")) <= before + 5
    assert is_served(url)


@pytest.mark.slow
def test_many_at_once_beside_one_that_breaks_off(server):
    """More requests than slots, at mixed budgets, while streams are begun and left: each gets its own answer."""
    url, _ = server
    wanted = {budget: answer(url, budget=budget, cache_prompt=False)["content"] for budget in (0.375, "full", None)}
    done, stopping = [], threading.Event()

    def leave():
        while not stopping.is_set():
            with httpx.stream("POST", f"{url}/completion", json={"prompt": PROMPT, **LONG}, timeout=60) as stream:
                next(stream.iter_bytes())

    def work(budget):
        for _ in range(3):
            done.append(ask(url, budget=budget, cache_prompt=False).json()["content"] == wanted[budget])

    leaving = threading.Thread(target=leave)
    leaving.start()
    threads = [threading.Thread(target=work, args=(budget,)) for budget in (*wanted, *wanted)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stopping.set()
    leaving.join()
    assert len(done) == 18
    # a batch rounds differently, so a text may part from what it is alone
    assert sum(done) >= 14 and is_idle(url)

"""allocmoe-server: llama.cpp's server with a budget for each request, running as a user starts it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
import contextlib
import json
from pathlib import Path
import re
import signal
import socket
import subprocess
import sys
import time

from allocmoe_edge import expert_cache, llama_server
from allocmoe_edge._native import llama_cpp
from allocmoe_edge.command import CommandError
from conftest import plan_under_rule
from gguf_factory import changed_keys, changed_token
import odd_models
import other_models
import pytest
from test_docs import LLAMA_SERVER_OPTIONS

httpx = pytest.importorskip("httpx", reason="asks the server over HTTP")
try:
    llama_server.binary()
except CommandError as missing:
    pytest.skip(str(missing), allow_module_level=True)

FULL, PLANNED = 360, 180
PROMPT = "The capital of France is a city that"
# whether a token's numbers are the same in any batch, to the last bit
EXACT = b"AVX2 = 1" in llama_cpp.llama_print_system_info()
# Of a log probability, where one token and several go through kernels that round differently. Other budgets are off by 0.2 and
# more, and by other tokens.
MAX_ERROR = 0.05


@contextlib.contextmanager
def serving(folder, *options, ends=False):
    """(URL, log file, process) of a server, until the block is left, which it has to survive unless it is to end there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "allocmoe_edge.llama_server", *map(str, options), "--port", str(port)]
    log = folder / "server.log"
    with open(log, "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=folder)
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(3000):
            assert process.poll() is None, log.read_text()
            if f"ready at {url}" in log.read_text():
                break
            time.sleep(0.1)
        else:
            raise AssertionError(log.read_text())
        yield url, log, process
        assert ends or process.poll() is None, log.read_text()[-3000:]
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module", params=["off", "threshold", "estimate"])
def planned(request, testbed_path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    return plan_under_rule(testbed_path, folder / "planned.gguf", request.param)


@pytest.fixture(scope="module")
def server(planned):
    options = ["-c", "2048", "-np", "4", "--metrics", "--slot-save-path", planned.parent]
    with serving(planned.parent, planned, *options) as (url, _, _):
        yield url


def ask(url, path="/completion", **body):
    body = {"prompt": PROMPT, "n_predict": 12, "temperature": 0, "seed": 1, **body}
    return httpx.post(url + path, json=body, timeout=120)


def answer(url, path="/completion", **body) -> dict:
    found = ask(url, path, **body)
    assert found.status_code == 200, found.text
    return found.json()


def spent(found: dict) -> dict:
    return found["budget"]


def scored(url, **body) -> list:
    """[(token, its log probability, the distance to the next)] of a greedy answer whose prompt is computed anew."""
    found = answer(url, n_probs=2, cache_prompt=False, ignore_eos=True, **body)
    rows = found["completion_probabilities"]
    return [(row["id"], row["logprob"], row["logprob"] - row["top_logprobs"][1]["logprob"]) for row in rows]


def check_same(found: list, wanted: list) -> None:
    assert len(found) == len(wanted)
    if EXACT:
        assert found == wanted
    for (token, logprob, _), (wanted_token, wanted_logprob, gap) in zip(found, wanted):
        if token != wanted_token:
            assert gap < 2 * MAX_ERROR  # two tokens alike: from here on the texts are different ones
            return
        assert abs(logprob - wanted_logprob) < MAX_ERROR


@pytest.mark.parametrize(
    "budget, total",
    [(None, PLANNED), (0.25, 90), ("25%", 90), (90, 90), ("90", 90), (1, FULL), (1.0, FULL)]
    + [("fast", 120), ("balanced", PLANNED), ("full", FULL)],
    ids=str,
)
def test_what_a_budget_may_be(server, budget, total):
    found = spent(answer(server, budget=budget, n_predict=4))
    assert (found["asked"], found["total"], found["share"]) == (budget, total, total / FULL)
    assert found["prompt"]["tokens"] > 0 and found["predicted"]["tokens"] == 3  # the fourth is never put in


@pytest.mark.parametrize(
    "budget", [0, 0.01, 1.5, 29, 361, 1e300, -0.5, "", "x", "0.5.5", "nan", "101%", "29.e3", True, [0.5], {}], ids=str
)
@pytest.mark.parametrize("path", ["/completion", "/v1/completions", "/v1/chat/completions", "/v1/responses"])
def test_budget_out_of_range(server, path, budget):
    body = {"messages": [{"role": "user", "content": "Hi"}], "input": "Hi"}
    if path == "/v1/responses":
        del body["messages"]
    found = ask(server, path, budget=budget, **body)
    assert found.status_code == 400, found.text
    message = found.json()["error"]["message"]
    assert "from 0.0834 to 1" in message and "from 30 to 360" in message
    assert f"found {json.dumps(budget, separators=(',', ':'))}" in message or isinstance(budget, float)


def test_a_budget_that_looks_like_a_percentage(server):
    assert "per cent are written with their sign" in ask(server, budget=20).json()["error"]["message"]
    assert "decimal point" in ask(server, budget=96.0).json()["error"]["message"]
    long = ask(server, budget="x" * 10_000).json()["error"]["message"]
    assert len(long) < 500


def test_flags_are_flags(server):
    for name in ("cache_any_budget", "budget_layers"):
        found = ask(server, **{name: "yes"})
        assert found.status_code == 400 and name in found.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_every_endpoint_says_what_was_spent(server, path, stream):
    body = {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 6}
    if path == "/v1/responses":
        body = {"input": "Say hello.", "max_output_tokens": 6}
    found = ask(server, path, budget=0.4, stream=stream, **body)
    assert found.status_code == 200, found.text
    if stream:
        chunks = [json.loads(line[6:]) for line in found.text.split("\n") if line.startswith("data: {")]
        last = next(chunk.get("response", chunk) for chunk in reversed(chunks) if chunk.get("type") != "message_stop")
    else:
        last = found.json()
    assert last["budget"]["total"] == 144 and last["budget"]["asked"] == 0.4
    # upstream's own: numbers alone
    assert all(isinstance(value, (int, float)) for value in last.get("timings", {}).values())


def test_activations_are_those_of_the_plan(server, planned):
    """Under `off` a token spends its budget exactly; the others meet it in the mean over text like the calibration's."""
    for budget in (60, PLANNED, 300, FULL):
        found = spent(answer(server, budget=budget, budget_layers=True, cache_prompt=False, ignore_eos=True))
        prompt, predicted = found["prompt"], found["predicted"]
        for part in (prompt, predicted):
            assert sum(part["layers"]) == pytest.approx(part["activations_per_token"])
            assert len(part["layers"]) == 30 and all(1 <= k <= 12 for k in part["layers"])
        assert len(found["last"]) == 30
        if "off" in str(planned_rule(server)) or budget == FULL:
            assert prompt["activations_per_token"] == predicted["activations_per_token"] == budget
            assert sum(found["last"]) == budget


def planned_rule(url) -> str:
    return httpx.get(f"{url}/props").json()["budget"]["token_rule"]


def metrics(url) -> dict:
    lines = httpx.get(f"{url}/metrics").text.split("\n")
    return {name: float(value) for name, value in (line.split() for line in lines if line and line[0] != "#")}


def test_requests_do_not_depend_on_each_other(server):
    """Four budgets at once, each the numbers that it has alone; at another budget they are others."""
    budgets = [60, 150, PLANNED, FULL]
    alone = [scored(server, budget=budget, n_predict=24) for budget in budgets]
    assert len(set(map(tuple, alone))) == len(budgets)
    before = metrics(server)["llamacpp:n_decode_total"]
    with ThreadPoolExecutor(len(budgets)) as pool:
        for _ in range(2):
            together = list(pool.map(lambda budget: scored(server, budget=budget, n_predict=24), budgets))
            for found, wanted in zip(together, alone):
                check_same(found, wanted)
    # they did share batches: one after the other takes 24 of them each
    assert metrics(server)["llamacpp:n_decode_total"] - before < 0.7 * 2 * 4 * 24


def test_answers_of_one_prompt_share_its_budget(server):
    """n completions of a prompt that is computed once: each spends the request's budget, and they are the same text."""
    found = answer(server, "/v1/completions", budget=60, n=3, n_probs=0, ignore_eos=True, cache_prompt=False)
    texts = [choice["text"] for choice in found["choices"]]
    assert len(texts) == 3 and spent(found)["total"] == 60
    alone = answer(server, "/v1/completions", budget=60, ignore_eos=True, cache_prompt=False)["choices"][0]["text"]
    if EXACT:
        assert texts == [alone] * 3
    # else the batch of three rounds differently, so the texts part somewhere
    assert all(text.split()[:3] == alone.split()[:3] for text in texts)


def cached(found: dict) -> int:
    return found["timings"]["cache_n"]


def test_cached_text_is_of_the_same_budget(server):
    prompt = "Once upon a time there was a small server that had read this before, and it said so: "
    n_prompt = answer(server, prompt=prompt, budget=100, n_predict=1)["timings"]["prompt_n"]
    assert cached(answer(server, prompt=prompt, budget=100)) == n_prompt - 1
    assert cached(answer(server, prompt=prompt, budget=200)) == 0
    # both are there now, in slots or in the host's memory
    assert cached(answer(server, prompt=prompt, budget=200)) == n_prompt - 1
    assert cached(answer(server, prompt=prompt, budget=100)) == n_prompt - 1
    assert cached(answer(server, prompt=prompt, budget=300)) == 0
    # where the request allows it
    assert cached(answer(server, prompt=prompt, budget=250, cache_any_budget=True)) == n_prompt - 1
    # and what comes of that counts as neither
    assert cached(answer(server, prompt=prompt + "yes", budget=250)) < n_prompt


def test_text_from_the_cache_goes_on_as_text_just_read(server):
    """A prompt whose beginning is cached, and a second turn after what was generated: to the last bit on this CPU."""
    prompt = "The city lies on a river, and its bridges have been built and lost and built again. Its merchants "
    body = dict(budget=PLANNED, n_predict=12, n_probs=2, ignore_eos=True, id_slot=1)

    def rows(**more):
        found = answer(server, **{**body, **more})
        return cached(found), found["content"], [row["logprob"] for row in found["completion_probabilities"]]

    _, text, wanted = rows(prompt=prompt, cache_prompt=False)
    answer(server, **{**body, "prompt": "Something else.", "cache_prompt": False})
    rows(prompt=prompt[:60])
    n_cached, _, found = rows(prompt=prompt)
    assert n_cached > 5
    turn = prompt + text + " And then"
    n_more, _, second = rows(prompt=turn)
    assert n_more > n_cached
    if EXACT:
        assert found == wanted
        assert rows(prompt=turn, cache_prompt=False)[2] == second


def test_cached_text_in_a_slot_that_is_asked_for(server):
    prompt = "A slot of its own, which the request names, has this text at one budget: "
    first = answer(server, prompt=prompt, budget=100, id_slot=2, n_predict=1)
    assert cached(answer(server, prompt=prompt, budget=120, id_slot=2)) == 0
    again = answer(server, prompt=prompt, budget=120, id_slot=2)
    assert cached(again) == first["timings"]["prompt_n"] - 1


def test_text_from_the_hosts_memory_goes_on_the_same(planned, tmp_path):
    """One slot, whose text another request displaces: what a strict rule has left over comes back with it."""
    with serving(tmp_path, planned, "-c", "512", "-np", "1") as (url, _, _):
        prompt = PROMPT + " was founded by people who wanted to live on an island in the river, and which"
        first = answer(url, prompt=prompt, budget=100, n_predict=24, ignore_eos=True, return_tokens=True)
        wanted = answer(url, prompt=prompt + first["content"] + " and", budget=100, n_probs=2, ignore_eos=True)
        assert cached(wanted) > 20
        answer(url, prompt="Something else altogether, and rather long, so that nothing of it is the same", budget=140)
        answer(url, prompt=prompt, budget=100, n_predict=1)
        found = answer(url, prompt=prompt + first["content"] + " and", budget=100, n_probs=2, ignore_eos=True)
        assert cached(found) > 20
        check_same(
            *([(row["id"], row["logprob"], 1.0) for row in run["completion_probabilities"]] for run in (found, wanted))
        )


@pytest.mark.skipif(sys.platform != "linux", reason="a limit to the size of another process's files")
def test_slot_that_cannot_be_saved(planned_path, tmp_path):
    """As on a full disk: what has been saved by that name before is as it was, and nothing else is left."""
    import resource

    with serving(tmp_path, planned_path, "-c", "1024", "-np", "1", "--slot-save-path", tmp_path) as (url, _, process):

        def post(action: str) -> int:
            return httpx.post(f"{url}/slots/0?action={action}", json={"filename": "a.bin"}).status_code

        def files() -> dict:
            return {path.name: path.read_bytes() for path in tmp_path.glob("a.bin*")}

        answer(url, prompt=PROMPT, budget=100, n_predict=1)
        assert post("save") == 200
        saved = files()
        assert {*saved} == {"a.bin", "a.bin.budget"}
        answer(url, prompt=20 * PROMPT, budget=200, n_predict=1)
        room, most = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (2 * len(saved["a.bin"]), most))
        assert post("save") == 500 and files() == saved
        assert post("restore") == 200
        assert cached(answer(url, prompt=PROMPT + " lies", budget=100)) > 3
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (room, most))
        answer(url, prompt=20 * PROMPT, budget=200, n_predict=1)
        assert post("save") == 200 and {*files()} == {*saved} and files() != saved


def test_what_has_run_goes_with_a_text(testbed_path, tmp_path):
    """With a price of misses: a chat goes on the same that has been in the host's memory, or in a file, meanwhile."""
    path = plan_under_rule(testbed_path, tmp_path / "planned.gguf", "estimate")
    size = int(expert_cache.least(path) * 20)
    options = ["-c", "512", "-np", "1", "--slot-save-path", tmp_path, "--expert-cache", size, "--miss-price", "50"]
    with serving(tmp_path, path, *options) as (url, _, _):
        body = dict(budget=90, ignore_eos=True, n_probs=1, return_tokens=True)
        first = answer(url, "/tokenize", content=PROMPT)["tokens"]

        def begins() -> list:
            return first + answer(url, prompt=first, cache_prompt=False, **body)["tokens"]

        def goes_on(text: list) -> list:
            found = answer(url, prompt=text, **body)
            assert cached(found) == len(text) - 1
            return [(row["id"], row["logprob"]) for row in found["completion_probabilities"]]

        def other() -> None:
            answer(url, prompt="Something else altogether, and rather long, so that nothing of it is the same", **body)

        def post(action: str) -> None:
            assert httpx.post(f"{url}/slots/0?action={action}", json={"filename": "a.bin"}).status_code == 200

        text = begins()
        post("save")
        other()
        found = goes_on(text)  # out of the host's memory
        assert begins() == text
        wanted = goes_on(text)
        other()
        post("restore")
        assert found == wanted == goes_on(text)
        # without what stands beside the file nothing is at hand
        (tmp_path / "a.bin.budget").unlink()
        body["cache_any_budget"] = True
        post("restore")
        assert goes_on(text) != wanted


def test_saved_slots_know_their_budget(server):
    prompt = "What a slot holds can be written to a file, and read from it at some other time: "
    n_prompt = answer(server, prompt=prompt, budget=100, id_slot=1, n_predict=1)["timings"]["prompt_n"]

    def post(slot, action):
        return httpx.post(f"{server}/slots/{slot}?action={action}", json={"filename": "a.bin"})

    assert post(1, "save").status_code == 200
    for budget, reused in ((150, 0), (100, n_prompt - 1)):
        assert post(3, "restore").status_code == 200
        assert cached(answer(server, prompt=prompt, budget=budget, id_slot=3, n_predict=1)) == reused


def test_props_and_metrics(server):
    props = httpx.get(f"{server}/props").json()["budget"]
    assert (props["full"], props["default"], props["least"]) == (FULL, PLANNED, 30)
    assert props["presets"] == {"fast": 120, "balanced": PLANNED, "full": FULL}
    assert props["expert_used_count_full"] == [12] * 30

    before = metrics(server)
    found = answer(server, budget=FULL, n_predict=5, ignore_eos=True, cache_prompt=False)
    after = metrics(server)
    more = {name: after[name] - before[name] for name in after}
    n_prompt = found["timings"]["prompt_n"]
    # the last layer sees the prompt's last token alone
    assert more['allocmoe:activations_total{phase="prompt"}'] == FULL * n_prompt - 12 * (n_prompt - 1)
    assert more['allocmoe:activations_total{phase="predicted"}'] == FULL * 4
    assert more['allocmoe:tokens_total{phase="prompt"}'] == n_prompt
    assert more['allocmoe:tokens_total{phase="predicted"}'] == 4
    assert more["allocmoe:requests_total"] == 1 and more["allocmoe:request_budgets_total"] == FULL
    assert after["allocmoe:budget_now"] == FULL and after["allocmoe:budget_default"] == PLANNED


def test_a_stream_says_what_each_token_spends(server):
    found = ask(server, budget=60, stream=True, timings_per_token=True, budget_layers=True, ignore_eos=True)
    chunks = [json.loads(line[6:]) for line in found.text.split("\n") if line.startswith("data: {")]
    last = [chunk["budget"]["last"] for chunk in chunks if "budget" in chunk]
    assert len(last) >= 12 and all(len(row) == 30 for row in last)
    if planned_rule(server) == "off":
        assert {sum(row) for row in last} == {60}


@pytest.mark.parametrize(
    "body", ["", "nonsense", '{"prompt": [', "[" * 100_000, '{"prompt": ' + "[" * 1000 + "]" * 1000 + "}"]
)
def test_malformed_json(server, body):
    for path in ("/completion", "/v1/chat/completions", "/v1/responses"):
        assert httpx.post(server + path, content=body, timeout=60).status_code == 400
    assert httpx.get(f"{server}/health").status_code == 200


def test_the_servers_own_budget(planned_path, tmp_path):
    with serving(tmp_path, planned_path, "--budget", "fast", "-c", "512") as (url, _, _):
        assert httpx.get(f"{url}/props").json()["budget"]["default"] == 120
        assert spent(answer(url))["total"] == 120
        assert spent(answer(url, budget=0.5))["total"] == 180


def test_a_budget_that_follows_the_load(planned_path, tmp_path):
    """Two slots: nobody waits, one does, two or more do. What is named stays, and so does what has begun."""
    with serving(tmp_path, planned_path, "--budget", "full", "--adaptive-budget", "0.25", "-c", "1024", "-np", "2") as (
        url,
        _,
        _,
    ):
        assert httpx.get(f"{url}/props").json()["budget"]["adaptive_floor"] == 90
        first = answer(url, n_predict=1)
        assert spent(first)["total"] == FULL
        long = dict(n_predict=24, ignore_eos=True)
        with ThreadPoolExecutor(8) as pool:
            named = pool.submit(answer, url, budget=0.5, **long)
            found = list(pool.map(lambda _: answer(url, **long), range(7)))
        totals = [spent(each)["total"] for each in found]
        assert set(totals) <= {FULL, 225, 90} and {FULL, 90} <= set(totals)
        for each in found:
            assert spent(each)["predicted"]["activations_per_token"] == spent(each)["total"]
        assert spent(named.result())["total"] == 180
        # and back
        again = answer(url, n_predict=1)
        assert spent(again)["total"] == FULL and cached(again) == first["timings"]["prompt_n"] - 1
        answers = answer(url, "/v1/completions", n=2, n_predict=4)
        assert spent(answers)["total"] == FULL
        assert cached(answer(url, n_predict=1, cache_any_budget=False, budget=0.3)) == 0


def test_what_is_left_over_does_not_matter_to_the_next_request(planned, tmp_path):
    """The same request again and again in one slot, with others of other budgets between them."""
    with serving(tmp_path, planned, "-c", "512", "-np", "1", "--no-cache-prompt") as (url, _, _):
        assert [cached(answer(url, n_predict=2, budget=100)) for _ in range(2)] == [0, 0]
        wanted = scored(url, budget=100)
        for between in (30, FULL, PLANNED):
            scored(url, budget=between)
            assert scored(url, budget=100) == wanted


def started(folder, *options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "allocmoe_edge.llama_server", *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=120)


def test_models_without_a_choice(dense_path, testbed_path, tmp_path):
    for path, reason in ((dense_path, "a dense model: it has no experts"), (testbed_path, "convert it first")):
        with serving(tmp_path, path, "-c", "512", "--metrics") as (url, _, _):
            found = answer(url, n_predict=4)
            assert found["timings"]["predicted_n"] == 4
            assert cached(answer(url, n_predict=4)) == found["timings"]["prompt_n"] - 1
            if path == dense_path:
                assert "budget" not in found and httpx.get(f"{url}/props").json()["budget"] is None
                assert "allocmoe" not in httpx.get(f"{url}/metrics").text
            else:
                assert spent(found)["predicted"]["activations_per_token"] == FULL
            refused = ask(url, budget=0.5)
            assert refused.status_code == 400 and reason in refused.json()["error"]["message"]
        done = started(tmp_path, path, "--budget", "0.5")
        assert done.returncode == 1 and reason in done.stderr.splitlines()[-1]
        done = started(tmp_path, path, "--adaptive-budget", "0.5")
        assert done.returncode == 1 and reason in done.stderr.splitlines()[-1]


def test_prefetch(planned_path, tmp_path):
    """Where experts stay in the file's pages; by default not for a model that the memory has room for."""
    wanted = None
    for options, prefetched in ((["--prefetch", "on", "--no-repack"], True), (["--no-repack"], False)):
        with serving(tmp_path, planned_path, "-c", "512", "-lv", "4", *options) as (url, log, _):
            assert ("experts are prefetched" in log.read_text()) == prefetched
            found = scored(url, n_predict=6)
            wanted = wanted or found
            check_same(found, wanted)


def test_what_keeps_it_from_starting(planned_path, testbed_path, tmp_path):
    """The last line says what, and nothing else does; where that can be known before the model is loaded, at once."""
    broken, cut, changed = tmp_path / "broken.gguf", tmp_path / "cut.gguf", tmp_path / "changed.gguf"
    data = planned_path.read_bytes()
    cut.write_bytes(data[:-4096])
    broken.write_bytes(data.replace(b"allocmoe.expert_used_count_full", b"allocmoe.expert_used_count_fulk", 1))
    changed.write_bytes(data.replace(b"tokenizer.ggml.model", b"tokenizer.ggml.modle", 1))
    with socket.socket() as other:  # which speaks no HTTP
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        for options, message in [
            ([], "which model? allocmoe-server MODEL, or --models-dir FOLDER for several; see --help"),
            ([tmp_path / "missing.gguf"], f"{tmp_path / 'missing.gguf'}: no such file"),
            ([tmp_path], f"{tmp_path}: a folder; name the file in it, such as broken.gguf"),
            ([cut], "truncated: "),
            ([broken], "allocmoe.expert_used_count_full: found nothing"),
            ([changed, "-c", "512"], "error loading model vocabulary: "),
            ([planned_path, "--plan", tmp_path / "none.gguf"], f"{tmp_path / 'none.gguf'}: no such file"),
            ([planned_path, "--plan", testbed_path], "testbed"),
            (
                [planned_path, "--port", taken],
                f"127.0.0.1:{taken}: another program listens there; --port takes another",
            ),
            ([planned_path, "--port", 99999], "want a number from 0 to 65535"),
            ([planned_path, "--port", -1], "want a number from 0 to 65535"),
            ([planned_path, "--budget", ""], "--budget: found nothing, want a value"),
            (["-c", "512", planned_path], f"{planned_path}: the model comes first: allocmoe-server {planned_path} ..."),
            (["-hf", "none/none", "--offline"], "llama_model_load_from_file_impl"),
            ([planned_path, "--host", "192.0.2.1"], "192.0.2.1:8080: Cannot assign requested address"),
            ([planned_path, "--budget", 7], "from 30 to 360"),
            ([planned_path, "--budget", 0.4, "--adaptive-budget", 0.6], "is above the server's budget"),
            ([planned_path, "--no-such-option"], "--no-such-option"),
            ([planned_path, "-b", 1, "--parallel", 1], "--batch-size: found 1, want at least 2"),
            ([planned_path, "--batch-size", 3], "--batch-size: found 3, want at least 4"),
            ([planned_path, "--ctx-size", 1], "--ctx-size: found 1, want at least 2, or 0"),
            ([planned_path, "-c", -1], "--ctx-size: found -1, want at least 2, or 0"),
            ([planned_path, "--reranking"], f"--reranking: {planned_path} is no reranker"),
            ([planned_path, "--pooling", "rank"], f"--reranking: {planned_path} is no reranker"),
            ([planned_path, "-c", "512", "--grammar", "x"], "failed to parse grammar"),
            # without end, before
            ([planned_path, "-c", "512", "--grammar", 'root ::= "a"{3,1}'], "failed to parse grammar"),
        ]:
            # an unspecific port where it is not the point
            free = [] if "--port" in options or "--host" in options else ["--port", 0]
            done = started(tmp_path, *options, *free)
            assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
            last = done.stderr.splitlines()[-1]
            assert "error: " in last and message in last, done.stderr[-3000:]


def test_several_models(planned_path, dense_path, tmp_path):
    """Each is loaded when it is asked for, in a server of its own, and has budgets by its own file."""
    models = tmp_path / "models"
    models.mkdir()
    (models / "planned.gguf").symlink_to(planned_path)
    (models / "dense.gguf").symlink_to(dense_path)
    with serving(tmp_path, "--models-dir", models, "-c", "512", "-np", "1", "--metrics") as (url, _, _):
        assert spent(answer(url, model="planned", budget=0.25, n_predict=4))["total"] == 90
        assert spent(answer(url, model="planned", n_predict=4))["total"] == PLANNED
        assert httpx.get(f"{url}/props?model=planned").json()["budget"]["presets"]["fast"] == 120
        assert "allocmoe:requests_total 2" in httpx.get(f"{url}/metrics?model=planned").text
        assert "budget" not in answer(url, model="dense", n_predict=4)
        refused = ask(url, model="dense", budget=0.5)
        assert refused.status_code == 400 and "a dense model" in refused.json()["error"]["message"]
        assert ask(url, model="planned", budget=7).status_code == 400


def test_rule_batch_is_not_served(testbed_path, tmp_path):
    path = plan_under_rule(testbed_path, tmp_path / "batch.gguf", "batch")
    with serving(tmp_path, path, "-c", "512") as (url, log, _):
        assert planned_rule(url) == "threshold"
        assert "token rule batch shares a budget" in log.read_text()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it(planned_path, tmp_path, sent):
    with serving(tmp_path, planned_path, "-c", "512", ends=True) as (url, log, process):
        process.send_signal(sent)
        assert process.wait(30) == 0, log.read_text()
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{url}/health")


def test_closed_streams(planned_path, tmp_path):
    """Whoever starts it may have closed all three."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = (
        f"{sys.executable} -m allocmoe_edge.llama_server {planned_path} -c 512 --port {port} --log-file {tmp_path}/log"
    )
    process = subprocess.Popen(["sh", "-c", f"exec {command} <&- >&- 2>&-"])
    try:
        for _ in range(300):
            if (tmp_path / "log").is_file() and "listening on" in (tmp_path / "log").read_text():
                break
            assert process.poll() is None
            time.sleep(0.1)
        else:
            raise AssertionError("it does not start")
    finally:
        process.terminate()
        process.wait(30)


def test_help_has_both():
    done = subprocess.run(
        [sys.executable, "-m", "allocmoe_edge.llama_server", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "--adaptive-budget" in done.stdout
    for option in LLAMA_SERVER_OPTIONS:
        assert re.search(rf"{option}\b", done.stdout), f"{option}: the pages name it"


def test_a_draft_model(server, planned, dense_path, tmp_path):
    """The text is that without one, at every request's own budget. Tokens that are drafted in vain are spent, too."""
    if planned_rule(server) != "estimate":
        pytest.skip("a server more for every rule: the one that depends on most is enough")
    body = dict(n_predict=32, ignore_eos=True, return_tokens=True, cache_prompt=False)
    budgets = (0.3, None, 1.0)
    wanted = [answer(server, budget=budget, **body) for budget in budgets]
    draft = ["--model-draft", dense_path, "--spec-draft-n-max", "4"]
    devices = ["--threads-draft", "1", "--gpu-layers-draft", "0"]
    with serving(tmp_path, planned, "-c", "512", "-np", "1", *draft, *devices) as (url, _, _):
        found = [answer(url, budget=budget, **body) for budget in budgets]
    for with_draft, without in zip(found, wanted):
        assert with_draft["tokens"] == without["tokens"]
        timings = with_draft["timings"]
        assert timings["draft_n"] >= timings["draft_n_accepted"]
        assert spent(with_draft)["total"] == spent(without)["total"]
        n_tokens = spent(with_draft)["predicted"]["tokens"]
        assert (
            31 <= n_tokens <= 31 + timings["draft_n"] - timings["draft_n_accepted"] + 4
        )  # the last step may go beyond
    assert sum(each["timings"]["draft_n_accepted"] for each in found) > 10


def test_a_draft_model_is_used(dense_path, tmp_path, monkeypatch):
    """llama-server leaves one unused that is no head of the model, unless it is told to use it."""
    options = lambda *given: llama_server._draft_options(None, [*map(str, given)])  # noqa: E731
    used = ["--spec-type", "draft-simple"]
    for name in ("--model-draft", "-md", "--spec-draft-model"):
        assert options("--port", "1", name, dense_path) == used
    assert options("--model-draft", dense_path, "--spec-type", "ngram-simple") == []
    assert options("--port", "1") == options("--model-draft") == options("-hfd", "a/b", "-md", "c.gguf") == []
    done = subprocess.run(
        [sys.executable, "-m", "allocmoe_edge.llama_server", dense_path, "--model-draft", tmp_path / "none.gguf"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and "none.gguf" in done.stderr and "Traceback" not in done.stderr
    monkeypatch.setenv("LLAMA_ARG_SPEC_DRAFT_MODEL", str(dense_path))
    assert options() == used
    monkeypatch.setenv("LLAMA_ARG_SPEC_TYPE", "none")
    assert options() == options("--model-draft", dense_path) == []


@pytest.fixture(scope="module")
def drafts(tmp_path_factory):
    """A model, and files that cannot be a draft for it."""
    folder = tmp_path_factory.mktemp("drafts")
    paths = {
        name: write(folder / f"{name}.gguf")
        for name, write in (
            ("model", odd_models.write_talker), ("letters", odd_models.write_qwen3moe), ("bert", other_models.write_bert),
            ("mamba", other_models.write_mamba), ("jamba", other_models.write_jamba),
        )
    }  # fmt: skip
    paths["begins"] = changed_keys(paths["model"], folder / "begins.gguf", {"tokenizer.ggml.add_bos_token": True})
    paths["token"] = changed_token(paths["model"], folder / "token.gguf", 7, "another")
    return paths


@pytest.mark.parametrize(
    "options, message",
    [
        (["letters"], "letters.gguf: its vocabulary is not that of"),
        (["token"], "token 7 is 'another', want"),
        (["begins"], "its BOS token at a text is 256, want None"),
        (["bert"], "cannot go on from a text"),
        (["mamba"], "cannot forget tokens"),
        (["jamba"], "cannot forget tokens"),
        (["letters", "--spec-type", "draft-simple"], "its vocabulary is not that of"),
        (["letters", "--spec-type", "draft-simple", "--spec-type", "ngram-mod"], "its vocabulary is not that of"),
        (["model", "--spec-draft-n-max", "0"], "--spec-draft-n-max: found 0, want at least 1"),
        (["model", "--spec-draft-n-max", "600"], "--batch-size: found 2048, want at least 2404"),
        (["model", "-b", "16", "-np", "5"], "--batch-size: found 16, want at least 20"),
        (["model", "-td", "1000"], "--threads-draft: found 1000, want at most 512"),
        (["model", "-tbd", "1000"], "--threads-batch-draft: found 1000, want at most 512"),
    ],
    ids=str,
)
def test_drafts_that_there_are_not(drafts, capsys, monkeypatch, options, message):
    """llama-server would go on without the draft, or end at the first tokens."""
    monkeypatch.delattr(llama_server, "_become")
    assert llama_server.main([str(drafts["model"]), "--model-draft", str(drafts[options[0]]), *options[1:]]) == 1
    assert message in capsys.readouterr().err


def test_drafts_for_models_that_are_named_otherwise(drafts, capsys, monkeypatch):
    """Of llama-server's own option the model is known; of a folder, or one that is fetched, it is not: what can draft for none is
    refused there. A file that was yet to be fetched was refused, for there was no such file."""
    monkeypatch.delattr(llama_server, "_become")
    folder, model = ["--models-dir", str(drafts["model"].parent)], ["-m", str(drafts["model"])]
    for options, name, message in (
        (folder, "mamba", "cannot forget tokens"),
        (folder, "bert", "cannot go on from a text"),
        (model, "jamba", "cannot forget tokens"),
        (model, "letters", "its vocabulary is not that of"),
    ):
        assert llama_server.main([*options, "--model-draft", str(drafts[name])]) == 1
        assert message in capsys.readouterr().err
    monkeypatch.delattr("allocmoe_edge.draft.check_fits")  # which would ask for every token of a vocabulary
    draft, used = ["-md", str(drafts["letters"])], ["--spec-type", "draft-simple"]
    monkeypatch.setenv("LLAMA_ARG_MODEL", "")
    assert llama_server._draft_options(None, [*folder, *draft]) == used
    monkeypatch.setenv("LLAMA_ARG_MODEL", str(drafts["model"].parent / "not there yet.gguf"))
    for names, variable in (
        (("-mu", "--model-url"), "LLAMA_ARG_MODEL_URL"),
        (("-hf", "-hfr", "--hf-repo"), "LLAMA_ARG_HF_REPO"),
        (("-dr", "--docker-repo"), "LLAMA_ARG_DOCKER_REPO"),
    ):
        for name in names:
            for file in ([], model):
                assert llama_server._draft_options(None, [*file, name, "a/b", *draft]) == used
        with monkeypatch.context() as patch:
            patch.setenv(variable, "a/b")
            assert llama_server._draft_options(None, [*model, *draft]) == used


@pytest.mark.parametrize(
    "options, message",
    [
        (["--threads", "100000"], "--threads: found 100000, want at most 512"),
        (["--threads-http", "100000"], "--threads-http: found 100000, want at most 16384"),
        (["--spec-type", "ngram-mod", "-b", "64", "-np", "1"], "--batch-size: found 64, want at least 65"),
        (["--spec-type", "ngram-cache", "-b", "8", "-np", "1"], "--batch-size: found 8, want at least 9"),
        (
            ["--spec-type", "ngram-mod", "--spec-type", "none", "-b", "64", "-np", "1"],
            "--batch-size: found 64, want at least 65",
        ),
        (["--spec-default", "-b", "64", "-np", "1"], "--batch-size: found 64, want at least 65"),
    ],
    ids=str,
)
def test_numbers_that_end_it(drafts, capsys, monkeypatch, options, message):
    monkeypatch.delattr(llama_server, "_become")
    assert llama_server.main([str(drafts["model"]), *options]) == 1
    assert message in capsys.readouterr().err


def test_more_threads_for_http_than_can_compute():
    """They were refused above 512, as those that compute are."""
    llama_server._check_threads(["--threads-http", "600"])

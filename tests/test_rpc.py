"""Layers on other machines: allocmoe-server with two of ggml's RPC servers, here on the loopback."""

import contextlib
import socket
import subprocess
import sys
import time

from allocmoe_edge import llama_server
from allocmoe_edge.command import CommandError
from conftest import plan_from_made_up_profile
import odd_models
import pytest
from test_llama_server import answer, ask, httpx, scored, serving, spent, started

try:
    llama_server.rpc_binary()
except CommandError as missing:
    pytest.skip(str(missing), allow_module_level=True)


@contextlib.contextmanager
def rpc_server():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "from allocmoe_edge.llama_server import rpc_main; rpc_main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "--host", "127.0.0.1", "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(300):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert process.poll() is None
            time.sleep(0.1)
        yield f"127.0.0.1:{port}"
        assert process.poll() is None
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module", params=["off", "threshold"])
def model(request, tmp_path_factory):
    """4 layers, 4 of 8 experts, a plan for half of them."""
    from dataclasses import replace

    from allocmoe_edge.convert import output
    from allocmoe_edge.plan import metadata
    import numpy as np

    folder = tmp_path_factory.mktemp("rpc")
    source = odd_models.write_talker(folder / "source.gguf")
    planned = metadata.read(plan_from_made_up_profile(source, folder / "made-up.gguf"))
    table = tuple(np.linspace(0.5, 0.0, k, dtype=np.float32) for k in planned.full)
    profile = replace(planned.profile, threshold_table=table, token_rule=request.param)
    output.write_planned(source, folder / "planned.gguf", profile.plan(0.5, planned.full), profile)
    return folder / "planned.gguf", folder / "made-up.gguf", request.param


@pytest.fixture(scope="module")
def machines():
    with rpc_server() as one, rpc_server() as two:
        yield f"{one},{two}"


def test_layers_on_two_machines(model, machines, tmp_path):
    """The plan's experts per layer, and the text that they give here; what a rule would add is off, and says so once."""
    path, without_rule, rule = model
    with serving(tmp_path, without_rule, "-c", "512") as (url, _, _):
        here = scored(url, n_predict=12)
    with serving(tmp_path, path, "-c", "512", "--rpc", machines, "-ngl", "99", "-lv", "4") as (url, log, _):
        lines = log.read_text()
        for machine in machines.split(","):
            assert f"[{machine}]" in lines  # what it holds
        assert lines.count("token rule threshold is off: only the CPU") == (rule == "threshold")
        found = spent(answer(url, n_predict=8, ignore_eos=True, budget_layers=True))
        assert found["predicted"]["activations_per_token"] == 8
        there = scored(url, n_predict=12)
        assert [row[0] for row in there] == [row[0] for row in here]
        refused = ask(url, budget=0.75)
        assert (
            refused.status_code == 400 and "backends can leave out single experts" in refused.json()["error"]["message"]
        )
        assert "only the CPU" in httpx.get(f"{url}/props").json()["budget"]["obstacle"]
    with serving(tmp_path, path, "-c", "512", "--rpc", machines, "-ngl", "99", "--budget", "0.75") as (url, _, _):
        assert spent(answer(url, n_predict=8, ignore_eos=True))["predicted"]["activations_per_token"] == 12


def test_machine_that_is_not_there(model, tmp_path):
    done = started(tmp_path, model[0], "--rpc", "127.0.0.1:9", "-ngl", "99")
    assert done.returncode != 0 and "127.0.0.1:9" in done.stderr


def test_adaptive_budget_is_refused(model, machines, tmp_path):
    done = started(tmp_path, model[0], "--rpc", machines, "-ngl", "99", "--adaptive-budget", "0.4")
    assert done.returncode == 1 and "backends can leave out single experts" in done.stderr

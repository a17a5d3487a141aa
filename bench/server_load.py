#!/usr/bin/env python3
"""What budgets do for allocmoe-server under a load that is too much for the full model.

    python bench/server_load.py model-half.gguf [--floor 0.25] [--seconds 60] [--rounds 2]

Requests arrive at random times (Poisson, the same ones for every server), more than the full model can serve: --load times
its rate, which is measured first with every slot busy. Three servers take turns: full budget, half, and the adaptive one
between full and --floor. Of the requests that began in the window: time to the first token, from arrival on, time for each
further one, and requests answered per minute of the time from the first arrival to the last answer.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
import contextlib
import json
import os
from pathlib import Path
import random
import socket
import subprocess
import sys
import threading
import time
from typing import Iterator, List, Tuple
import urllib.request

import numpy as np


@contextlib.contextmanager
def serving(model: Path, slots: int, threads: int, *options: str) -> Iterator[Tuple[str, subprocess.Popen]]:
    """(address, process) of a server that is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "allocmoe_edge.llama_server", str(model), "--port", port]
    command += ["-np", str(slots), "-c", str(512 * slots), "-t", str(threads), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")
    try:
        line = ""
        for line in process.stderr:
            if "ready at" in line:
                break
        else:
            raise SystemExit(f"the server did not start: {line.strip() or 'it said nothing'}")
        # its log is read, so that it never waits for a reader
        threading.Thread(target=lambda: [None for _ in process.stderr], daemon=True).start()
        yield f"http://127.0.0.1:{port}", process
        if process.poll() is not None:
            raise SystemExit(f"the server has ended: {process.returncode}")
    finally:
        process.terminate()
        process.wait()


def request(url: str, n_prompt: int, n_gen: int, seed: int) -> dict:
    """One request: its times in seconds, and what it spent."""
    letters = random.Random(seed)
    prompt = "".join(letters.choice("abcdefghijklmnopqrstuvwxyz ") for _ in range(n_prompt))
    body = {"prompt": prompt, "n_predict": n_gen, "ignore_eos": True, "temperature": 0, "cache_prompt": False}
    data = json.dumps(body).encode()
    start = time.monotonic()
    posted = urllib.request.Request(f"{url}/completion", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(posted, timeout=600) as found:
        answer = json.load(found)
    end, timings = time.monotonic(), answer["timings"]
    return {
        "end": end,
        "first": end - start - timings["predicted_ms"] / 1e3,
        "token": timings["predicted_per_token_ms"] / 1e3,
        "total": answer["budget"]["total"],
    }


def capacity(url: str, slots: int, args: argparse.Namespace) -> float:
    """Requests per second with every slot busy, after one each to warm up."""
    with ThreadPoolExecutor(slots) as pool:
        list(pool.map(lambda seed: request(url, args.prompt, args.gen, -1 - seed), range(slots)))
        start = time.monotonic()
        list(pool.map(lambda seed: request(url, args.prompt, args.gen, -100 - seed), range(2 * slots)))
        return 2 * slots / (time.monotonic() - start)


def under_load(url: str, arrivals: List[float], args: argparse.Namespace) -> dict:
    request(url, args.prompt, args.gen, -1)
    with ThreadPoolExecutor(len(arrivals)) as pool:
        start, waiting = time.monotonic(), []
        for seed, arrival in enumerate(arrivals):
            time.sleep(max(0.0, start + arrival - time.monotonic()))
            waiting.append(pool.submit(request, url, args.prompt, args.gen, seed))
        done = [each.result() for each in waiting]
    took = max(each["end"] for each in done) - start - arrivals[0]
    return {"done": done, "per_minute": 60 * len(done) / took}


def line(name: str, runs: List[dict]) -> str:
    done = [each for run in runs for each in run["done"]]
    first, token = (np.percentile([each[key] for each in done], [50, 95]) for key in ("first", "token"))
    rate = [run["per_minute"] for run in runs]
    totals = [each["total"] for each in done]
    return (
        f"{name:9} {len(done):4} {first[0]:7.2f} {first[1]:7.2f}   {1e3 * token[0]:6.0f} {1e3 * token[1]:6.0f}   "
        f"{np.mean(rate):6.1f} ({min(rate):.1f} to {max(rate):.1f})   {np.mean(totals):.1f} ({min(totals)} to {max(totals)})"
    )


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", type=Path, help="a converted GGUF file")
    p.add_argument("--floor", default="0.25", help="of the adaptive budget. Default: 0.25")
    p.add_argument("--load", type=float, default=1.5, help="arrivals, in the full model's rate. Default: 1.5")
    p.add_argument("--slots", type=int, default=4, help="requests served at a time. Default: 4")
    p.add_argument("--seconds", type=float, default=40, help="of arrivals in each run. Default: 40")
    p.add_argument("--rounds", type=int, default=1, help="runs of each server, in turns. Default: 1")
    p.add_argument("--prompt", type=int, default=96, help="characters of each prompt. Default: 96")
    p.add_argument("--gen", type=int, default=32, help="tokens of each answer. Default: 32")
    p.add_argument("--threads", type=int, default=os.cpu_count(), help="default: the CPU's")
    args = p.parse_args()
    servers = {
        "full": ("--cache-ram", "0", "--budget", "full"),
        "half": ("--cache-ram", "0", "--budget", "0.5"),
        "adaptive": ("--cache-ram", "0", "--budget", "full", "--adaptive-budget", args.floor),
    }
    with serving(args.model, args.slots, args.threads, *servers["full"]) as (url, _):
        rate = args.load * capacity(url, args.slots, args)
    print(f"{args.model.name}: {60 * rate:.1f} requests a minute arrive, {args.load} times what the full model serves")
    clock, arrivals = random.Random(7), [0.0]
    while arrivals[-1] < args.seconds:
        arrivals.append(arrivals[-1] + clock.expovariate(rate))
    runs: dict = {name: [] for name in servers}
    for _ in range(args.rounds):
        for name, options in servers.items():
            with serving(args.model, args.slots, args.threads, *options) as (url, _):
                runs[name].append(under_load(url, arrivals, args))
    print("                first token, s    token, ms       requests a minute        budget, mean")
    print("server       n     p50     p95      p50    p95")
    for name, found in runs.items():
        print(line(name, found))


if __name__ == "__main__":
    main()

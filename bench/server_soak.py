#!/usr/bin/env python3
"""allocmoe-server under many clients for a long time: whether anything is lost, or grows.

    python bench/server_soak.py model-half.gguf [--minutes 30] [--clients 16]

Every client asks one request after the other, from a list of some dozens: completions and chats, whole and streamed, at mixed
budgets; each tenth stream is broken off by the client. Memory, open files and threads of the server are sampled on the way.
At the end: requests that were lost (must be none), whether the same request got the same answer each time, and the samples in
six equal parts of the time. Exit code 1 if a request was lost, or if the last part has more than 5% more memory or 5 more open
files than the second.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
import http.client
import itertools
import json
import os
from pathlib import Path
import random
import sys
import threading
import time
from typing import List, Tuple
from urllib.parse import urlsplit

from server_load import serving

BUDGETS = (0.25, "fast", "balanced", 0.75, "full", None)
PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a small dog that",
    "Water boils when it is heated because",
    "A list of colours: red, green,",
)


def requests(n_gen: int) -> List[Tuple[str, dict]]:
    """(path, body) of all of them. A seed and a budget each: nothing about the answer is left to chance."""
    found = []
    for i, (budget, prompt) in enumerate(itertools.product(BUDGETS, PROMPTS)):
        body = {"seed": i, "temperature": 0.7, "max_tokens": n_gen + 4 * (i % 5), "cache_prompt": i % 2 == 0}
        body.update({} if budget is None else {"budget": budget})
        for stream in (False, True):
            found.append(("/v1/completions", {**body, "prompt": prompt, "stream": stream}))
            chat = [{"role": "user", "content": prompt}]
            found.append(("/v1/chat/completions", {**body, "messages": chat, "stream": stream}))
    return found


def answer(port: int, path: str, body: dict, break_off: bool) -> str:
    """The text that comes back; "" if it is to be broken off."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    try:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if break_off:
            response.read(200)
            return ""
        text = response.read().decode()
        if response.status != 200:
            raise ValueError(f"{response.status}: {text[:200]}")
    finally:
        connection.close()
    if not body["stream"]:
        choices = [json.loads(text)["choices"][0]]
        return choices[0]["text"] if "text" in choices[0] else choices[0]["message"]["content"]
    lines = text.split("\n")
    if "data: [DONE]" not in lines:
        raise ValueError(f"a stream without its end: ...{text[-200:]}")
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    choices = [chunk["choices"][0] for chunk in chunks if chunk.get("choices")]
    return "".join(c["text"] if "text" in c else c["delta"].get("content") or "" for c in choices)


def sample(pid: int) -> dict:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return {
        "memory": int(status["VmRSS"].split()[0]) / 1024,
        "files": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(status["Threads"]),
    }


class Soak:
    def __init__(self, port: int, asked: List[Tuple[str, dict]]):
        self.port, self.asked, self.end = port, asked, float("inf")
        self.lock = threading.Lock()
        self.texts: dict = defaultdict(Counter)  # by the number of the request
        self.lost: List[str] = []
        self.n_done = self.n_broken_off = 0

    def client(self, seed: int) -> None:
        chance = random.Random(seed)
        while time.monotonic() < self.end:
            number = chance.randrange(len(self.asked))
            path, body = self.asked[number]
            break_off = body["stream"] and chance.random() < 0.1
            try:
                text = answer(self.port, path, body, break_off)
            except Exception as error:
                with self.lock:
                    self.lost.append(f"{path} {body.get('budget')}: {type(error).__name__}: {error}")
                continue
            with self.lock:
                self.n_done += 1
                self.n_broken_off += break_off
                if not break_off:
                    self.texts[number][text] += 1


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", type=Path, help="a converted GGUF file")
    p.add_argument("--minutes", type=float, default=30, help="default: 30")
    p.add_argument("--clients", type=int, default=16, help="default: 16")
    p.add_argument("--slots", type=int, default=8, help="requests served at a time. Default: 8")
    p.add_argument("--gen", type=int, default=8, help="tokens of the shortest answer. Default: 8")
    p.add_argument("--threads", type=int, default=os.cpu_count(), help="default: the CPU's")
    args = p.parse_args()
    samples = []
    with serving(args.model, args.slots, args.threads, "--metrics", "--cache-ram", "64") as (url, process):
        soak = Soak(urlsplit(url).port, requests(args.gen))
        begin = time.monotonic()
        soak.end = begin + 60 * args.minutes
        clients = [threading.Thread(target=soak.client, args=(i,)) for i in range(args.clients)]
        for client in clients:
            client.start()
        while time.monotonic() < soak.end:
            time.sleep(min(5.0, max(0.0, soak.end - time.monotonic())))
            samples.append(sample(process.pid))
        for client in clients:
            client.join()
        took = time.monotonic() - begin
    print(
        f"{soak.n_done} requests by {args.clients} clients in {took / 60:.1f} min, {soak.n_broken_off} broken off by the client"
    )
    print(f"lost: {len(soak.lost)}")
    for line in soak.lost[:10]:
        print(f"  {line}")
    same = sum(texts.most_common(1)[0][1] for texts in soak.texts.values())
    print(
        f"the same request had its most frequent answer {same} times of {sum(sum(t.values()) for t in soak.texts.values())}"
    )
    parts = [samples[len(samples) * i // 6 : len(samples) * (i + 1) // 6] for i in range(6)]
    print("part of the time   memory, MB (highest)   open files (highest)   threads (highest)")
    highest = []
    for i, part in enumerate(parts):
        highest.append({key: max((each[key] for each in part), default=0) for key in ("memory", "files", "threads")})
        print(f"{i + 1:16} {highest[-1]['memory']:22.0f} {highest[-1]['files']:22} {highest[-1]['threads']:19}")
    grows = highest[5]["memory"] > 1.05 * highest[1]["memory"] or highest[5]["files"] > highest[1]["files"] + 5
    return int(bool(soak.lost) or grows)


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Measures models larger than memory: decode from a file under a limit of memory, and what a price of misses costs in quality.

    python bench/expert_cache.py time olmoe.gguf --memory 0.5,0.25       # as root, or where control groups can be made
    python bench/expert_cache.py quality smolmoe.gguf --text prose.txt   # a converted model with an estimator

time: every method is a process of its own in a control group whose limit is a share of the file's size; the file's pages
are dropped first. The model may have random weights. Tokens repeat: each is, with the probability --repeat, one of the 32
before it, which is what makes its experts come back; the hit rate says how much that is. Methods at half budget spend half
of the activations, as sizes have it that are drawn once for each expert: their own values matter to no time.

quality: divergence from the full budget, token by token, with the runtime's cache and its real hits and misses, against
what is read. "drop" is the same without estimates: by weight alone, and nothing in place of what is left out.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
import json
import os
from pathlib import Path
import resource
import subprocess
import sys
import time

from allocmoe_edge import Llama, Plan
from allocmoe_edge._native import libllama
from allocmoe_edge.measure.control_groups import group_folders
from allocmoe_edge.measure.cores import physical_cores
from allocmoe_edge.plan.estimator import N_QUANTILES, Estimator
import numpy as np

WARM = 48  # tokens that fill the cache, and are not timed
PRICE = 6.0

# name: (half budget, arguments of Llama, llama.cpp's own kernels)
METHODS = {
    "llama.cpp, mapped": (False, dict(prefetch=False), True),
    "prefetch": (False, dict(prefetch=True), False),
    "cache": (False, dict(), False),
    "prefetch, half budget": (True, dict(prefetch=True), False),
    "cache, half budget": (True, dict(), False),
    f"cache, half budget, price {PRICE:g}": (True, dict(miss_price=PRICE), False),
}  # fmt: skip


def tokens(n: int, n_vocab: int, repeat: float) -> np.ndarray:
    rng = np.random.default_rng(0)
    out = list(rng.integers(1, n_vocab, 32))
    while len(out) < n:
        out.append(out[-rng.integers(1, 33)] if rng.random() < repeat else int(rng.integers(1, n_vocab)))
    return np.array(out[:n])


def random_estimator(llm) -> Estimator:
    rng = np.random.default_rng(1)
    n_layer, n_embd = len(llm.expert_used_count_full), llm.n_embd()
    n_expert = next(int(v) for k, v in llm.metadata.items() if k.endswith(".expert_count"))
    log_norm = np.zeros((n_layer, n_expert, 33), np.float32)
    log_norm[:, :, -1] = 0.5 * rng.standard_normal((n_layer, n_expert))
    draw = lambda *shape: (0.01 * rng.standard_normal(shape)).astype(np.float32)  # noqa: E731
    return Estimator(
        down=draw(n_layer, 32, n_embd), log_norm=log_norm, output=draw(n_layer, n_expert, 32),
        up=draw(n_layer, 32, n_embd), quantiles=np.zeros((n_layer, N_QUANTILES)),
    )  # fmt: skip


def half_plan(llm, thresholds) -> Plan:
    full = llm.expert_used_count_full
    return Plan(
        [max(1, k // 2) if k else 0 for k in full], full, token_rule="estimate", k_base=1, threshold=tuple(thresholds),
        strict=True, estimator=random_estimator(llm),
    )  # fmt: skip


def find_thresholds(path: Path) -> list:
    """For half of the activations in every layer of a prompt, by halving intervals."""
    llm = Llama(path, n_ctx=128, n_batch=64, repack=False, expert_cache=0, prefetch=False, verbose=False)
    n_layer = len(llm.expert_used_count_full)
    low, high = np.full(n_layer, -12.0), np.full(n_layer, 4.0)
    text = tokens(64, llm.n_vocab(), 0.0)
    for _ in range(9):
        middle = (low + high) / 2
        plan = replace(half_plan(llm, middle), strict=False)
        llm.apply_plan(plan)
        llm.clear_cache()
        llm.expert_stats(reset=True)
        llm.eval(text)
        more = llm.expert_stats()["prefill"]["mean"] > plan.expert_used_count
        low, high = np.where(more, middle, low), np.where(more, high, middle)
    llm.close()
    return list(map(float, (low + high) / 2))


def read_so_far() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("read_bytes")))


def run_one(args: argparse.Namespace) -> None:
    """In the control group: one method, its figures as JSON on the last line."""
    half, arguments, stock = METHODS[args.method]
    libllama.allocmoe_set_cpu_kernels(not stock)
    start = time.perf_counter()
    llm = Llama(
        args.model, n_ctx=1024, n_batch=args.prompt or 1, n_ubatch=args.prompt or 1, repack=False, verbose=False, n_threads=args.threads,
        n_threads_batch=args.threads, **arguments,
    )  # fmt: skip
    loaded = time.perf_counter() - start
    if half:
        llm.apply_plan(half_plan(llm, json.loads(args.thresholds)))
    text = tokens(args.prompt + WARM + args.gen, llm.n_vocab(), args.repeat)
    result = dict(method=args.method, load_s=loaded, cache_bytes=llm.expert_cache)
    if args.prompt:
        start = time.perf_counter()
        llm.eval(text[: args.prompt])
        result["prefill"] = args.prompt / (time.perf_counter() - start)
    for token in text[args.prompt : args.prompt + WARM]:
        llm.eval([int(token)])
    llm.expert_stats(reset=True)
    before, times = read_so_far(), []
    used = resource.getrusage(resource.RUSAGE_SELF)
    for token in text[args.prompt + WARM :]:
        start = time.perf_counter()
        llm.eval([int(token)])
        times.append(time.perf_counter() - start)
    now = resource.getrusage(resource.RUSAGE_SELF)
    stats = llm.expert_stats()["decode"]
    result.update(
        user_ms=1e3 * (now.ru_utime - used.ru_utime) / len(times),
        system_ms=1e3 * (now.ru_stime - used.ru_stime) / len(times),
        tps=len(times) / sum(times),
        p95_ms=1e3 * float(np.quantile(times, 0.95)),
        mb_per_token=(read_so_far() - before) / len(times) / 1e6,
        experts=float(stats["activations"].sum() / max(1, stats["tokens"].sum())),
    )
    if llm.expert_cache:
        result["hit_rate"] = float(stats["hits"].sum() / (stats["hits"].sum() + stats["misses"].sum()))
        result["absent"] = float(stats["absent"].sum() / max(1, stats["tokens"].sum()))
    print(json.dumps(result))


class Group:
    """A control group of this process's own, with a limit of memory. Removed at the end."""

    def __init__(self, n_bytes: int):
        found = next(group_folders(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"), "memory"), None)
        if found is None:
            sys.exit("there are no control groups for memory here")
        parent, version_1 = found
        self.folder = (parent if parent.is_dir() else Path("/sys/fs/cgroup/memory")) / f"expert_cache-{os.getpid()}"
        self.folder.mkdir()
        limit = self.folder / ("memory.limit_in_bytes" if version_1 else "memory.max")
        limit.write_text(str(n_bytes))

    def __enter__(self):
        return self

    def enter(self) -> None:
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def __exit__(self, *_) -> None:
        for _ in range(50):
            try:
                return self.folder.rmdir()
            except OSError:
                time.sleep(0.1)


def drop_pages(path: Path) -> None:
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure_time(args: argparse.Namespace) -> None:
    size = args.model.stat().st_size
    chosen = args.methods.split(";") if args.methods else list(METHODS)
    thresholds = find_thresholds(args.model) if any(METHODS[name][0] for name in chosen) else []
    results: list = []
    for share in map(float, args.memory.split(",")):
        for round_ in range(args.rounds):
            for name in chosen if round_ % 2 == 0 else reversed(chosen):
                drop_pages(args.model)
                with Group(int(share * size)) as group:
                    command = [sys.executable, __file__, "one", str(args.model), "--method", name]
                    for option in ("gen", "prompt", "repeat", "threads"):
                        command += [f"--{option}", str(getattr(args, option))]
                    command += ["--thresholds", json.dumps(thresholds)]
                    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, preexec_fn=group.enter)
                if done.returncode:
                    print(f"{name}: failed with {done.returncode}", file=sys.stderr)
                    continue
                results.append(dict(json.loads(done.stdout.splitlines()[-1]), memory=share))
                print(results[-1], file=sys.stderr, flush=True)
    print("| memory, of the file | | tokens/s | p95, ms | read, MB a token | hit rate | experts |")
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    for share in map(float, args.memory.split(",")):
        for name in chosen:
            runs = [r for r in results if r["memory"] == share and r["method"] == name]
            if runs:
                m = {key: float(np.median([r[key] for r in runs])) for key in runs[0] if key not in ("method",)}
                rate = f"{m['hit_rate']:.2f}" if "hit_rate" in m else ""
                print(
                    f"| {share:g} | {name} | {m['tps']:.2f} | {m['p95_ms']:.0f} | {m['mb_per_token']:.0f} | {rate} | "
                    f"{m['experts']:.1f} |"
                )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


def kl(full: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Nats, token by token. [n, n_vocab] logits each."""
    p = full - full.max(1, keepdims=True)
    p -= np.log(np.exp(p).sum(1, keepdims=True))
    q = other - other.max(1, keepdims=True)
    q -= np.log(np.exp(q).sum(1, keepdims=True))
    return (np.exp(p) * (p - q)).sum(1)


def measure_quality(args: argparse.Namespace) -> None:
    least = 0
    with open(args.text, "rb") as file:
        text = file.read(8 * (args.prompt + args.gen))
    llm = Llama(
        args.model, n_ctx=args.prompt + args.gen, n_batch=args.prompt, repack=False, verbose=False, n_threads=args.threads,
        n_threads_batch=args.threads, expert_cache=cache_for(args.model, args.share), logits_all=False,
    )  # fmt: skip
    del least
    ids = llm.tokenize(text)[: args.prompt + args.gen]

    def run():
        llm.clear_cache()
        llm.eval(ids[: args.prompt])
        llm.expert_stats(reset=True)
        out = []
        for i, token in enumerate(ids[args.prompt :]):
            out.append(llm.decode([token], args.prompt + i)[0].astype(np.float32))
        return np.array(out), llm.expert_stats()["decode"]

    llm.set_budget(1.0)
    full, stats = run()
    n_token = len(ids) - args.prompt
    print(f"{n_token} tokens after {args.prompt}, cache of {llm.expert_cache / 1e6:.0f} MB")
    print("| budget | | price | KL, nats | hit rate | read, MB a token | experts run |")
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: |")

    def row(budget, name, price, logits, stats):
        seen = max(1, (stats["hits"] + stats["misses"]).sum())
        print(
            f"| {budget:g} | {name} | {price:g} | {kl(full, logits).mean():.4f} | {stats['hits'].sum() / seen:.3f} | "
            f"{stats['bytes_read'].sum() / n_token / 1e6:.2f} | {stats['activations'].sum() / stats['tokens'].sum():.2f} |",
            flush=True,
        )

    row(1, "full", 1, full, stats)
    for budget in map(float, args.budgets.split(",")):
        llm.set_budget(budget, token_rule="off")
        llm.miss_price = 1
        row(budget, "top-k, no estimates", 1, *run())
        for name in ("estimate", "drop"):
            llm.set_budget(budget, token_rule="estimate")
            if name == "drop":
                llm.set_plan(without_estimates(llm))
            for price in map(float, args.prices.split(",")):
                llm.miss_price = price
                row(budget, name, price, *run())


def without_estimates(llm) -> Plan:
    """The plan in force by weight alone, with nothing in place of what is left out."""
    plan, own = llm.plan, llm.stored.estimator
    nothing = {name: np.zeros_like(getattr(own, name)) for name in ("log_norm", "output", "up")}
    return replace(plan, estimator=replace(own, **nothing), threshold=(float(np.log(0.5 / max(plan.expert_used_count))),) * plan.n_layer)


def cache_for(path: Path, share: float) -> int:
    from allocmoe_edge import expert_cache

    experts = sum(n_bytes for _, n_bytes in expert_cache._experts(path))
    return int(expert_cache.least(path) * (1 - share) + experts * share) + (2 << 20)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=("time", "quality", "one"))
    p.add_argument("model", type=Path)
    p.add_argument("--memory", default="0.5,0.25", help="limits, as shares of the file's size")
    p.add_argument("--methods", help="some of them, separated by semicolons")
    p.add_argument("--method", help=argparse.SUPPRESS)
    p.add_argument("--thresholds", default="[]", help=argparse.SUPPRESS)
    p.add_argument("--repeat", type=float, default=0.5, help="how often a token is one of the 32 before it")
    p.add_argument("--rounds", type=int, default=1)
    p.add_argument("--gen", type=int, default=48)
    p.add_argument("--prompt", type=int, default=0)
    p.add_argument("--threads", type=int, default=physical_cores())
    p.add_argument("--json", type=Path)
    p.add_argument("--text", type=Path)
    p.add_argument("--share", type=float, default=0.5, help="quality: experts that the cache holds")
    p.add_argument("--budgets", default="0.5")
    p.add_argument("--prices", default="1,2,4,8,16,64")
    args = p.parse_args()
    {"time": measure_time, "quality": measure_quality, "one": run_one}[args.what](args)


if __name__ == "__main__":
    main()

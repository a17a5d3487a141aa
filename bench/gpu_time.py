#!/usr/bin/env python3
"""Times prefill and decode of one model on a GPU, for one and for many sequences at once, in turns under several plans.

    python bench/gpu_time.py model.gguf [--n-cpu-moe N] [--batches 1,4,16] [--uniform K] [--json FILE]

Plans: full budget, half of every layer's experts, and half by thresholds calibrated on the very tokens that are timed.
With --uniform the model is loaded with so many experts in every layer and no plan, as --override-kv of llama.cpp does:
with the libraries of another build (LLAMA_CPP_LIB_PATH), what upstream reaches. bench/gpu.py runs both.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
import statistics
import sys
import time

from allocmoe_edge import GGUFError, Llama, Plan, PlanError
from allocmoe_edge._native import LIB_DIR, llama_cpp
from allocmoe_edge.bench import machine
from allocmoe_edge.bench.measure import turns
from allocmoe_edge.convert import thresholds
from allocmoe_edge.measure.traffic import WeightTraffic
from allocmoe_edge.plan.profile import thresholds_at
import numpy as np

WARMUP = 8  # steps before the clock starts: ggml's CUDA graphs are ready after two


class Sequences(Llama):
    """A model whose context holds `n_seq` sequences."""

    def __init__(self, path: Path, n_seq: int, **kwargs):
        self._n_seq = n_seq
        super().__init__(str(path), **kwargs)

    @property
    def context_params(self):
        return self._context_params

    @context_params.setter
    def context_params(self, params) -> None:
        params.n_seq_max, params.kv_unified = self._n_seq, True
        self._context_params = params


def evaluate(llm: Sequences, batch, tokens: np.ndarray, n_past: int) -> None:
    """Evaluates tokens [n_seq, n]: n more of each sequence, logits for the last of each; does not wait for them."""
    n_seq, n = tokens.shape
    batch.n_tokens = n_seq * n
    for i, (seq, at) in enumerate(np.ndindex(n_seq, n)):
        batch.token[i], batch.pos[i], batch.logits[i] = int(tokens[seq, at]), n_past + at, at == n - 1
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, seq
    if llama_cpp.llama_decode(llm.ctx, batch) != 0:
        raise RuntimeError(f"llama.cpp failed to evaluate {n} tokens of {n_seq} sequences after {n_past}")


def timed(llm: Sequences, batch, item: tuple, tokens: np.ndarray) -> float:
    """Seconds for one run of an item: ("prefill", tokens) or ("decode", sequences), the latter per step."""
    phase, n = item
    llm.clear_cache()
    if phase == "prefill":
        evaluate(llm, batch, tokens[:1, :n], 0)  # a warm-up of the same shape: buffers, graphs
        llama_cpp.llama_synchronize(llm.ctx)
        llm.clear_cache()
        start = time.perf_counter()
        evaluate(llm, batch, tokens[:1, :n], 0)
        llama_cpp.llama_synchronize(llm.ctx)
        return time.perf_counter() - start
    steps = tokens.shape[1]
    for at in range(steps):
        if at == WARMUP:
            llm.expert_stats(reset=True)
            start = time.perf_counter()
        evaluate(llm, batch, tokens[:n, at : at + 1], at)
        llama_cpp.llama_synchronize(llm.ctx)  # a user samples here
    return (time.perf_counter() - start) / (steps - WARMUP)


def plans(llm: Llama, tokens: np.ndarray) -> dict:
    """By name; the first is the reference. Thresholds are left out where the backend cannot skip single experts."""
    full = llm.plan.expert_used_count_full
    half = Plan([max(1, k // 2) if k else 0 for k in full], full)
    found = {"full": Plan(full, full), "half": half}
    table = thresholds.calibrate(llm, half, tokens[:1, : llm.n_batch].astype(np.int32))
    if table is not None:
        cut = thresholds_at(table, half.expert_used_count)
        found["half, thresholds"] = Plan(half.expert_used_count, full, token_rule="threshold", threshold=cut)
    llm.set_plan(None)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--n-gpu-layers", type=int, default=-1, metavar="N", help="default: all")
    parser.add_argument("--n-cpu-moe", type=int, default=0, metavar="N", help="first layers with experts on the CPU")
    parser.add_argument("--prompt", type=int, default=512, metavar="N", help="default: 512")
    parser.add_argument("--steps", type=int, default=64, metavar="N", help="decode steps timed. Default: 64")
    parser.add_argument("--batches", default="1,4,16", metavar="LIST", help="sequences at once. Default: 1,4,16")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default: 3")
    parser.add_argument("--threads", type=int, metavar="N", help="default: as llama_cpp.Llama")
    parser.add_argument("--uniform", type=int, metavar="K", help="load with K experts in every layer, and use no plan")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append one line a result")
    args = parser.parse_args()

    batches = [int(n) for n in args.batches.split(",")]
    traffic = WeightTraffic(args.model)
    options = dict(n_gpu_layers=args.n_gpu_layers, n_cpu_moe=args.n_cpu_moe, verbose=False)
    if args.threads:
        options.update(n_threads=args.threads, n_threads_batch=args.threads)
    if args.uniform:
        # a pair: the override's architecture has to be named
        from allocmoe_edge.gguf_file import GGUFFile

        with GGUFFile(args.model) as file:
            options["kv_overrides"] = {f"{file.need('general.architecture')}.expert_used_count": args.uniform}
    n_tokens = max(args.prompt, WARMUP + args.steps)
    n_ctx = max(args.prompt, max(batches) * (WARMUP + args.steps)) + 256
    n_batch = max(args.prompt, max(batches))
    llm = Sequences(args.model, max(batches), n_ctx=n_ctx, n_batch=n_batch, n_ubatch=n_batch, **options)
    tokens = np.random.default_rng(0).integers(1, llm.n_vocab(), (max(batches), n_tokens))
    configurations = {f"uniform {args.uniform}": None} if args.uniform else plans(llm, tokens)
    items = [("prefill", args.prompt)] * (args.prompt > 0) + [("decode", n) for n in batches]

    batch = llama_cpp.llama_batch_init(n_batch, 0, 1)
    for item in items:
        seconds = {name: [] for name in configurations}
        spent = {}
        for order in turns(list(configurations), args.rounds):
            for name in order:
                if configurations[name] is not None:
                    llm.apply_plan(configurations[name])
                llm.expert_stats(reset=True)
                steps = tokens[:, : WARMUP + args.steps] if item[0] == "decode" else tokens
                seconds[name].append(timed(llm, batch, item, steps))
                spent[name] = llm.expert_stats()[item[0]]["mean"]
        for name, found in seconds.items():
            median, per_run = statistics.median(found), item[1]
            alone = item == ("decode", 1)
            row = {
                "library": LIB_DIR.parent.name, "model": args.model.stem, "n_cpu_moe": args.n_cpu_moe,
                "phase": item[0], "size": item[1], "plan": name, "tokens_per_second": per_run / median,
                "range": [per_run / max(found), per_run / min(found)], "experts": float(spent[name].sum()),
                "gigabytes_per_second": traffic.per_token(spent[name]) / median / 1e9 if alone else None,
                "threads": llm.n_threads, "cpu": machine.cpu_name(),
            }  # fmt: skip
            speed = f"{row['tokens_per_second']:9.1f} t/s  experts {row['experts']:.1f}"
            print(f"{item[0]:8}{item[1]:5}  {name:18}{speed}", flush=True)
            if args.json:
                with open(args.json, "a") as file:
                    file.write(json.dumps(row) + "\n")
    llama_cpp.llama_batch_free(batch)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (GGUFError, PlanError, OSError, RuntimeError) as error:
        sys.exit(f"gpu_time: {error}")

#!/usr/bin/env python3
"""The main job, end to end: a trained MoE model is converted, answers at three budgets, and two tables say what it costs.

    python bench/demo.py [--budget 0.5] [--dir build/demo]

Quality is measured on the model itself (bench/upcycle: SmolLM2-135M as a Mixture of Experts). Speed is not: a model that
small spends its time in the output matrix. It is measured on random weights of the shape of OLMoE-1B-7B, a quarter of it:
4 of the 16 layers, and a quarter of the vocabulary, so that every part has its share of the time of the whole.
"""

from __future__ import annotations

import argparse
from pathlib import Path
import sys
import time

from allocmoe_edge import Llama, Plan, parse_budget
from allocmoe_edge.bench import measure, report
from allocmoe_edge.convert import cli as convert
from allocmoe_edge.measure.cores import physical_cores
from allocmoe_edge.measure.perplexity import Reference, bos_token, windows
from allocmoe_edge.measure.traffic import WeightTraffic
import numpy as np
import random_gguf
import shapes

sys.path.insert(0, str(Path(__file__).parent / "upcycle"))

import build

QUESTION = "What is the capital of France, and what is it known for?"
LOWER = "0.33"  # the budget below the one that the file is converted for
TEXT_TOKENS, N_CTX = 4096, 512
SPEED_ITEMS = (measure.Item("prefill", 256), measure.Item("decode", 0, 32))
ROUNDS = 3
SHAPE, PARTS = "OLMoE-1B-7B", 4
N_THREADS = physical_cores()


def reference_text() -> bytes:
    """English prose that every Python installation carries: its language reference, as help() shows it."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics)).encode()


def chat(llm: Llama, budget: str) -> None:
    llm.set_budget(budget)
    print(f"\n> {QUESTION}   [budget {budget}]")
    messages = [{"role": "user", "content": QUESTION}]
    for chunk in llm.create_chat_completion(messages, max_tokens=64, temperature=0.0, repeat_penalty=1.1, stream=True):
        print(chunk["choices"][0]["delta"].get("content", ""), end="", flush=True)
    print()


def quality(llm: Llama, budgets: list) -> list:
    """Rows of (what, experts per token, perplexity, share of tokens whose likeliest next one is full budget's)."""
    tokens = llm.tokenize(reference_text()[: 16 * TEXT_TOKENS], add_bos=False)
    held = windows(tokens[:TEXT_TOKENS], N_CTX, bos_token(llm))
    llm.set_plan(None)
    full = llm.expert_used_count_full
    plans = {}
    for budget in budgets:
        plans[f"{budget}, the plan"] = llm.set_budget(budget)
        plans[f"{budget}, uniform k"] = Plan.uniform(full, plans[f"{budget}, the plan"].budget_total)
    found: dict = {name: [] for name in ("full", *plans)}
    spent = {"full": float(sum(full))}
    for window in held:
        llm.set_plan(None)
        reference = Reference(llm, window)
        found["full"].append((reference.nll, np.ones(len(reference.nll), bool)))
        for name, plan in plans.items():
            llm.set_plan(plan)
            llm.expert_stats(reset=True)
            nll, _, same = reference.compare_tokens(llm)
            found[name].append((nll, same))
            spent[name] = spent.get(name, 0.0) + llm.expert_stats()["prefill"]["mean"].sum() / len(held)
    rows = []
    for name, windows_found in found.items():
        nll, same = (np.concatenate(values) for values in zip(*windows_found))
        rows.append((name, spent[name], float(np.exp(nll.mean())), float(same.mean())))
    return rows


def speed(path: Path, budgets: list) -> list:
    """The rows of allocmoe-bench: llama.cpp's own kernels at full budget, ours, and ours at each budget, uniform k."""
    items = list(SPEED_ITEMS)
    n_ctx = max(item.context for item in items)
    llm = Llama(str(path), n_ctx=n_ctx, n_batch=n_ctx, n_threads=N_THREADS, n_threads_batch=N_THREADS, verbose=False)
    full = llm.expert_used_count_full
    plans = {measure.STOCK: Plan.full(full), "full": Plan.full(full)}
    for budget in budgets:
        plans[budget] = Plan.uniform(full, parse_budget(budget, sum(full), len(full)))
    tokens = np.random.default_rng(0).integers(llm.n_vocab(), size=n_ctx).tolist()
    result = measure.run(llm, plans, items, ROUNDS, tokens)
    llm.close()
    return report.rows(result, plans, WeightTraffic(path), bandwidth=1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="0.5", help="as for allocmoe-convert. Default: 0.5")
    parser.add_argument("--dir", type=Path, default=Path("build/demo"), help="where the models go. Default: build/demo")
    args = parser.parse_args()
    budgets = [args.budget, LOWER]
    began = time.monotonic()

    args.dir.mkdir(parents=True, exist_ok=True)
    model, planned = args.dir / "smolmoe.gguf", args.dir / "smolmoe-planned.gguf"
    if not model.exists():
        print(f"building {model}: SmolLM2-135M-Instruct as a Mixture of Experts", flush=True)
        build.build(model)
    command = [str(model), "--budget", args.budget, "-o", str(planned), "--force"]
    print("$ allocmoe-convert " + " ".join(command), flush=True)
    if convert.main(command):
        sys.exit(1)

    llm = Llama(str(planned), n_ctx=1024, n_batch=N_CTX, n_threads=N_THREADS, verbose=False)
    for budget in ("1.0", *budgets):
        chat(llm, budget)
    rows = quality(llm, budgets)
    n_full = rows[0][1]
    llm.close()

    print(f"\nQuality: {planned} on {TEXT_TOKENS} tokens of the Python reference, windows of {N_CTX}\n")
    cells = [(name, f"{n:.0f} ({n / n_full:.0%})", f"{ppl:.2f}", f"{same:.1%}") for name, n, ppl, same in rows]
    print(report.markdown(("budget", "experts per token", "perplexity", "same next token as full"), cells))

    shaped = args.dir / "olmoe-quarter.gguf"
    if not shaped.exists():
        config = dict(shapes.MODELS[SHAPE])
        config["vocab_size"] //= PARTS
        random_gguf.write(shaped, SHAPE, shapes.Shape(config, config["num_hidden_layers"] // PARTS), "Q4_K_M", 0)
    found = speed(shaped, budgets)
    print(
        f"\nSpeed: random weights of the shape of {SHAPE}, Q4_K_M, a quarter of it; {N_THREADS} threads; "
        f"{SPEED_ITEMS[0].length} prompt tokens, {SPEED_ITEMS[1].n_gen} generated, medians of {ROUNDS} rounds in turn\n"
    )
    names = {measure.STOCK: "llama.cpp's kernels, full", "full": "ours, full"}
    columns = [[row for row in found if row["phase"] == phase] for phase in ("prefill", "decode")]
    cells = []
    for phases in zip(*columns):
        plan = phases[0]["plan"]
        # the reference's own ratio is its noise around 1
        ratios = [1.0 if plan == measure.STOCK else row["ratio"] for row in phases]
        speeds = [f"{row['tokens_per_second']:.1f} ({ratio:.2f}x)" for row, ratio in zip(phases, ratios)]
        cells.append((names.get(plan, f"ours, {plan}"), *speeds))
    print(report.markdown(("budget", "prefill tokens/s", "decode tokens/s"), cells))
    print(
        f"\nIn all {time.monotonic() - began:.0f} s. With a model of yours: allocmoe-convert model.gguf --budget {args.budget} "
        "-o model-planned.gguf\n"
        f"then in Python: from allocmoe_edge import Llama; Llama(model_path='model-planned.gguf', budget={args.budget})"
    )


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""The main job, end to end: a real MoE model, converted at half budget, answers, and a table says what it cost.

    python bench/demo.py [--budget 0.5] [--dir build/demo]

Builds the small real MoE model (bench/testbed.py) unless it is there already, converts it with allocmoe-convert,
chats one turn, and measures perplexity, prefill and decode speed at full budget, with uniform k, and with the plan.
"""

from __future__ import annotations

import argparse
from pathlib import Path
import statistics
import sys
import time

from allocmoe_edge import Llama, Plan
from allocmoe_edge.convert import cli as convert
from allocmoe_edge.measure.cores import physical_cores
from allocmoe_edge.measure.perplexity import bos_token, perplexity, windows
import testbed

QUESTION = "What is the capital of France, and what is it known for?"
PPL_TOKENS = 4096
PREFILL_TOKENS = 512
DECODE_TOKENS = 48
ROUNDS = 3
N_THREADS = physical_cores()


def reference_text() -> bytes:
    """English prose that every Python installation carries: its language reference, as help() shows it."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics)).encode()


def chat(llm: Llama, name: str) -> None:
    print(f"\n> {QUESTION}   [{name}]")
    messages = [{"role": "user", "content": QUESTION}]
    for chunk in llm.create_chat_completion(messages, max_tokens=64, temperature=0.0, repeat_penalty=1.1, stream=True):
        print(chunk["choices"][0]["delta"].get("content", ""), end="", flush=True)
    print("\n")


def speeds(llm: Llama, plans: dict, tokens: list) -> dict:
    """Tokens per second, (prefill, decode), per plan: medians of ROUNDS runs that take turns."""
    runs: dict = {name: ([], []) for name in plans}
    for _ in range(ROUNDS):
        for name, plan in plans.items():
            llm.set_plan(plan)
            llm.eval(tokens[:8])  # the graph for the new plan is built here
            llm.reset()
            start = time.perf_counter()
            llm.eval(tokens[:PREFILL_TOKENS])
            middle = time.perf_counter()
            for token in tokens[:DECODE_TOKENS]:
                llm.eval([token])
            end = time.perf_counter()
            runs[name][0].append(PREFILL_TOKENS / (middle - start))
            runs[name][1].append(DECODE_TOKENS / (end - middle))
            llm.reset()
    return {name: tuple(statistics.median(values) for values in pair) for name, pair in runs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="0.5", help="as for allocmoe-convert. Default: 0.5")
    parser.add_argument("--dir", type=Path, default=Path("build/demo"), help="where the models go. Default: build/demo")
    parser.add_argument("--calib-tokens", default="2048", help="as for allocmoe-convert. Default: 2048")
    args = parser.parse_args()

    args.dir.mkdir(parents=True, exist_ok=True)
    model, planned = args.dir / "testbed.gguf", args.dir / "testbed-planned.gguf"
    if not model.exists():
        print(f"building {model}: SmolLM2-135M-Instruct, its feed-forward layers split into experts", flush=True)
        testbed.build(model)
    command = [str(model), "--budget", args.budget, "--calib-tokens", args.calib_tokens, "-o", str(planned), "--force"]
    print("$ allocmoe-convert " + " ".join(command), flush=True)
    if convert.main(command):
        sys.exit(1)

    llm = Llama(str(planned), n_ctx=1024, n_threads=N_THREADS, verbose=False)
    plan = llm.plan
    plans = {
        "full budget": Plan.full(plan.expert_used_count_full),
        "uniform k": Plan.uniform(plan.expert_used_count_full, plan.budget_total),
        "the plan": plan,
    }
    for name in ("full budget", "the plan"):
        llm.set_plan(plans[name])
        chat(llm, name)

    tokens = llm.tokenize(reference_text()[:80_000], add_bos=False)
    held = windows(tokens[:PPL_TOKENS], 512, bos_token(llm))
    found, spent = {}, {}
    for name, candidate in plans.items():
        llm.set_plan(candidate)
        llm.expert_stats(reset=True)
        found[name] = perplexity(llm, held)
        spent[name] = llm.expert_stats()["prefill"]["mean"].sum()
    speed = speeds(llm, plans, tokens)

    full = speed["full budget"]
    print("|             | experts per token | perplexity | prefill tokens/s |  decode tokens/s |")
    print("| ----------- | ----------------: | ---------: | ---------------: | ---------------: |")
    for name, candidate in plans.items():
        prefill, decode = speed[name]
        print(
            f"| {name:11} | {spent[name]:8.0f} ({spent[name] / candidate.budget_full:4.0%}) | {found[name]:10.2f} "
            f"| {prefill:7.1f} ({prefill / full[0]:.2f}x) | {decode:7.1f} ({decode / full[1]:.2f}x) |"
        )
    print(
        f"\nPerplexity on {held.size} tokens of the Python reference, windows of 512, and the experts that were spent on it "
        f"(planned: {plan.budget_total}). Speed: {PREFILL_TOKENS} prompt and "
        f"{DECODE_TOKENS} generated tokens, medians of {ROUNDS} runs in turn, {N_THREADS} threads.\n"
        f"The planned model is {planned}; try: Llama(model_path={str(planned)!r}, budget=0.7)"
    )


if __name__ == "__main__":
    main()

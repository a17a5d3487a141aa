#!/usr/bin/env python3
"""Perplexity of the token rules at equal budgets, as a Markdown table.

    python bench/token_rules.py model.gguf --text wiki.test.raw --calib gutenberg.txt [--window 512] [--windows 8]

Every layer gets the same share of its experts (uniform plans), so that only the rule differs between columns. Thresholds
are calibrated on the --calib text under each plan, as allocmoe-convert does; "spent" is what the rule then activated on
the --text, per token and layer, and in percent of the plan. At full budget every rule must give the logits of the model
without a plan, bit for bit: the script stops if one does not.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from allocmoe_edge import Llama, Plan
from allocmoe_edge.convert import calibration, thresholds
from allocmoe_edge.perplexity import bos_token, negative_log_likelihood, windows
from allocmoe_edge.plan import parse_budget


def evenly_spread(llm: Llama, path: Path, n_ctx: int, n_windows: int) -> np.ndarray:
    """int32 windows, shape [n_windows, n_ctx], spread over the whole text."""
    cut = windows(llm.tokenize(path.read_bytes(), add_bos=False, special=False), n_ctx, bos_token(llm))
    if len(cut) < n_windows:
        sys.exit(f"{path}: {len(cut)} windows of {n_ctx} tokens, wanted {n_windows}")
    return calibration.spread(cut, n_windows)


def rules(llm: Llama, plan: Plan, calib: np.ndarray) -> dict:
    """The plan under every rule that shares a layer's experts among tokens, with thresholds calibrated for it."""
    table = thresholds.calibrate(llm, plan, calib)
    if table is None:
        sys.exit("token rules do not run on this model's backend")
    threshold = [float(row[k - 1]) if k else 0.0 for row, k in zip(table, plan.expert_used_count)]
    by_score = replace(plan, token_rule="threshold", threshold=threshold)
    return {"off": plan, "batch": replace(plan, token_rule="batch"), "threshold": by_score}


def measure(llm: Llama, plan, text: np.ndarray) -> tuple:
    """(negative log-likelihoods, activations per token summed over layers) under a plan, None for no plan."""
    llm.set_plan(plan)
    llm.expert_stats(reset=True)
    nll = negative_log_likelihood(llm, text)
    return nll, llm.expert_stats()["prefill"]["mean"].sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True, help="text to measure on")
    parser.add_argument("--calib", type=Path, required=True, help="other text, to calibrate thresholds on")
    parser.add_argument("--window", type=int, default=512, help="tokens in a window. Default: 512")
    parser.add_argument("--windows", type=int, default=8, help="windows to measure. Default: 8")
    parser.add_argument("--calib-tokens", type=int, default=8192, help="tokens to calibrate on. Default: 8192")
    parser.add_argument("--budgets", type=float, nargs="+", default=[1.0, 0.67, 0.5, 0.33])
    args = parser.parse_args()

    # one micro-batch a window: what the rule "batch" shares among
    n_threads = multiprocessing.cpu_count()
    sizes = dict(n_ctx=args.window, n_batch=args.window, n_ubatch=args.window, n_threads=n_threads, n_threads_batch=n_threads)
    llm = Llama(args.model, **sizes, verbose=False)
    text = evenly_spread(llm, args.text, args.window, args.windows)
    calib = calibration.from_file(llm, args.calib, args.calib_tokens, args.window).profile
    full = llm.plan.expert_used_count_full
    n_moe = sum(k > 0 for k in full)

    reference, _ = measure(llm, None, text)
    print(
        f"{Path(args.model).name}: {np.exp(reference.mean()):.2f} without a plan, {sum(full) / n_moe:g} experts a layer; "
        f"{text.size} tokens of {args.text.name} in windows of {args.window}, thresholds from {calib.size} tokens of "
        f"{args.calib.name}\n"
    )
    print("| budget | experts a layer | off | batch | threshold | threshold spent |")
    print("| -----: | --------------: | --: | ----: | --------: | --------------: |", flush=True)
    for budget in args.budgets:
        plan = Plan.uniform(full, parse_budget(budget, sum(full), n_moe))
        found = {rule: measure(llm, candidate, text) for rule, candidate in rules(llm, plan, calib).items()}
        if budget == 1.0:
            changed = [rule for rule, (nll, _) in found.items() if not np.array_equal(nll, reference)]
            if changed:
                sys.exit(f"full budget differs from no plan under: {', '.join(changed)}")
        perplexities = " | ".join(f"{np.exp(nll.mean()):.2f}" for nll, _ in found.values())
        spent = found["threshold"][1]
        print(
            f"| {budget:g} | {plan.mean:.2f} | {perplexities} | {spent / n_moe:.2f} ({spent / plan.budget_total:.1%}) |",
            flush=True,
        )


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""What plans win back on texts of several kinds: rows are texts, columns plans that were calibrated on different ones.

    python bench/quality/across.py model.gguf --plans own.gguf books.gguf --texts wiki.raw manual.txt -o build/across

Plans are files of allocmoe-convert --plan-only (or with the model), all of one budget. Of each text, windows spread over all
of it. Perplexity at full budget, with uniform k, and of each plan; in brackets what the plan wins back of uniform k's loss in
nats, and of its divergence (KL). Every cell is saved as it is measured: the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
import sys

from allocmoe_edge import GGUFError, Llama, Plan, PlanError
from allocmoe_edge.convert.calibration import spread
from allocmoe_edge.convert.checkpoint import Checkpoint
from allocmoe_edge.measure.cores import physical_cores
from allocmoe_edge.measure.perplexity import bos_token, read_tokens, windows
from allocmoe_edge.plan import metadata
import metrics
import numpy as np


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", type=Path, help="GGUF file in one piece")
    p.add_argument("--plans", type=Path, nargs="+", required=True, help="columns, by their names without .gguf")
    p.add_argument("--texts", type=Path, nargs="+", required=True, help="UTF-8 texts: rows")
    p.add_argument("-o", "--output", type=Path, required=True, help="folder for results and what is measured so far")
    p.add_argument("--tokens", type=int, default=4096, help="of each text. Default: 4096")
    p.add_argument("--ctx-size", type=int, default=512, help="tokens in a window. Default: 512")
    p.add_argument("--decode", action="store_true", help="token by token instead of a window at a time")
    p.add_argument("--threads", type=int, default=physical_cores(), help="Default: physical cores")
    return p


def plans_of(paths: list[Path]) -> dict[str, Plan]:
    """By column. Raises PlanError where a file has none, or budgets differ."""
    found = {}
    for path in paths:
        plan = metadata.read(path).plan
        if plan is None:
            raise PlanError(f"{path}: has no plan; allocmoe-convert makes one")
        found[path.name.removesuffix(".gguf").removesuffix(".plan")] = plan
    first = next(iter(found.values()))
    totals = {plan.budget_total for plan in found.values()}
    if len(totals) > 1:
        raise PlanError(f"plans of {sorted(totals)} activations: want one budget")
    return {"uniform k": Plan.uniform(first.expert_used_count_full, first.budget_total), **found}


def measure(args: argparse.Namespace) -> dict:
    """By text and column: `metrics.summary`."""
    plans = plans_of(args.plans)
    full = next(iter(plans.values())).expert_used_count_full
    args.output.mkdir(parents=True, exist_ok=True)

    def load(n_batch: int) -> Llama:
        threads = dict(n_threads=args.threads, n_threads_batch=args.threads)
        llm = Llama(str(args.model), n_ctx=args.ctx_size, n_batch=n_batch, n_ubatch=n_batch, **threads, verbose=False)
        llm.set_plan(None)
        return llm

    models = {False: load(args.ctx_size)}
    if args.decode:
        models[True] = load(1)
    candidates = {name: (plan, args.decode) for name, plan in plans.items()}
    candidates["full"] = (Plan.full(full), False)
    table: dict = {}
    with Checkpoint(args.output / "cells", args.model) as checkpoint:
        for path in args.texts:
            cut = windows(read_tokens(models[False], path), args.ctx_size, bos_token(models[False]))
            cut = spread(cut, max(1, args.tokens // args.ctx_size))
            cells = metrics.measure(models, full, candidates.values(), cut, checkpoint)
            table[path.stem] = {
                name: metrics.summary(cells[metrics.candidate_name(c)]) for name, c in candidates.items()
            }
    return table


def markdown(table: dict) -> str:
    columns = [name for name in next(iter(table.values())) if name not in ("full", "uniform k")]
    lines = ["| text | full | uniform k: perplexity, KL | " + " | ".join(columns) + " |"]
    lines.append("| --- | ---: | --- |" + " --- |" * len(columns))
    for text, row in table.items():
        full, uniform = row["full"], row["uniform k"]
        cells = [text, f"{full['perplexity']:.2f}", f"{uniform['perplexity']:.2f}, {uniform['kl']:.4f}"]
        for name in columns:
            nats = metrics.recovery_by_perplexity(row[name]["perplexity"], uniform["perplexity"], full["perplexity"])
            kl = metrics.recovery(row[name]["kl"], uniform["kl"])
            cells.append(f"{row[name]['perplexity']:.2f} ({nats:.0%}, {kl:.0%})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv=None) -> int:
    args = parser().parse_args(argv)
    try:
        table = measure(args)
    except (GGUFError, PlanError, ValueError) as error:
        print(f"bench/quality/across.py: error: {error}", file=sys.stderr)
        return 1
    (args.output / "result.json").write_text(json.dumps(table, indent=1) + "\n")
    (args.output / "table.md").write_text(markdown(table) + "\n")
    print(markdown(table))
    spent = {text: {n: round(float(np.mean(v["spent"])), 1) for n, v in row.items()} for text, row in table.items()}
    print(f"\nactivations per token: {spent}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

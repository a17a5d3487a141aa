#!/usr/bin/env python3
"""What the token rules cost: plain top-k against them at the same mean activations, in turns on one loaded model.

    python bench/token_rule_cost.py model.gguf [--budget 0.5] [--prompt 256] [--gen 64] [--repeats 10]

Thresholds are calibrated on the very tokens that are timed, for prefill and decode apart, so that both sides activate
the same number of experts and what is left is the rule's own cost. `batch` at decode is top-k, and is left out there.
`estimate` goes by a random estimator of the size that allocmoe-convert makes: what it costs does not depend on its numbers.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
import sys

from allocmoe_edge import GGUFError, Llama, Plan, PlanError, parse_budget
from allocmoe_edge.bench import BenchError, machine, measure, report
from allocmoe_edge.convert import estimate, thresholds
from allocmoe_edge.convert.estimator_fit import N_RELU, N_SIZE, RANK
from allocmoe_edge.measure.cores import physical_cores
from allocmoe_edge.measure.traffic import WeightTraffic
from allocmoe_edge.plan.estimator import N_QUANTILES, Estimator
from allocmoe_edge.plan.profile import thresholds_at
import numpy as np


def plans_for(llm: Llama, item: measure.Item, plan: Plan, tokens: list) -> dict:
    """{"off": plan, "threshold": the same with thresholds, ...} for one item."""
    window = np.array([tokens[: item.context]], np.int32)
    table = thresholds.calibrate(llm, plan, window)
    if table is None:
        raise BenchError("the model's backend cannot leave out single experts: there is nothing to measure")
    llm.set_plan(plan)  # calibrate left its own
    cut = thresholds_at(table, plan.expert_used_count)
    plans = {"off": plan, "threshold": replace(plan, token_rule="threshold", threshold=cut)}
    if item.phase == "prefill":
        plans["batch"] = replace(plan, token_rule="batch")
    by_size = replace(
        plan, token_rule="estimate", threshold=(0.0,) * plan.n_layer, estimator=random_estimator(llm, plan.n_layer)
    )
    sizes = thresholds.recorded_values(llm, by_size, window)
    if sizes is not None:
        table = [thresholds.table_row(np.sort(rows)[:, ::-1], plan.k_base) if rows.size else [] for rows in sizes]
        cut = thresholds_at(table, plan.expert_used_count)
        plans["estimate"] = replace(by_size, threshold=cut)
    llm.set_plan(plan)
    return plans


def random_estimator(llm: Llama, n_layer: int) -> Estimator:
    rng = np.random.default_rng(0)
    n_embd, rank, n_down = llm.n_embd(), RANK, RANK + N_SIZE + N_RELU
    n_expert = estimate.n_expert_of(llm)

    def draw(*shape, scale):
        return rng.standard_normal(shape, np.float32) * np.float32(scale)

    return Estimator(
        draw(n_layer, n_down, n_embd, scale=n_embd**-0.5),
        draw(n_layer, n_expert, n_down + 1, scale=0.1),
        draw(n_layer, n_expert, rank, scale=0.1),
        draw(n_layer, rank, n_embd, scale=0.01),
        np.zeros((n_layer, N_QUANTILES)),
        N_RELU,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a GGUF file with experts")
    parser.add_argument("--budget", default="0.5", help="default: 0.5")
    parser.add_argument("--prompt", type=int, default=256, metavar="N", help="prompt tokens, 0 for none. Default: 256")
    parser.add_argument("--gen", type=int, default=64, metavar="N", help="generated tokens, 0 for none. Default: 64")
    parser.add_argument("--repeats", type=int, default=10, metavar="N", help="rounds. Default: 10")
    parser.add_argument("--threads", type=int, default=physical_cores(), metavar="N", help="default: physical cores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every single run")
    args = parser.parse_args()
    items = [measure.Item("prefill", args.prompt)] if args.prompt else []
    items += [measure.Item("decode", 0, args.gen)] if args.gen else []
    try:
        n_ctx = max(item.context for item in items)
        llm = Llama(
            str(args.model),
            n_ctx=n_ctx,
            n_batch=512,
            n_threads=args.threads,
            n_threads_batch=args.threads,
            verbose=False,
        )
        if llm.plan is None:
            raise BenchError(f"{args.model}: a dense model: it has no experts to budget")
        full = llm.plan.expert_used_count_full
        plan = Plan.uniform(full, parse_budget(args.budget, sum(full), sum(k > 0 for k in full)))
        tokens = np.random.default_rng(0).integers(llm.n_vocab(), size=n_ctx).tolist()
        traffic, bandwidth = WeightTraffic(args.model), machine.read_bandwidth(args.threads)
        found = []
        for item in items:
            plans = plans_for(llm, item, plan, tokens)
            result = measure.run(llm, plans, [item], args.repeats, tokens)
            found += report.rows(result, plans, traffic, bandwidth)
    except (BenchError, GGUFError, PlanError) as error:
        print(f"token_rule_cost.py: error: {error}", file=sys.stderr)
        return 1
    print(report.table(found))
    if args.json:
        report.write_json(args.json, {"model": str(args.model), "machine": machine.describe(), "results": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Where the time of prefill and decode goes, node by node, at full budget and at others.

    python bench/node_profile.py model.gguf [--budgets 1.0,0.5] [--prompt 256] [--gen 16] [--nodes]

Every node of the graph is computed and timed by itself, each node's time being its median over the generated tokens (of
3 passes at prefill). That costs a few microseconds a node: small nodes look dearer than they are, at decode above all.
`sum` is the sum of these times; compare it with what allocmoe-bench measures. At decode, GB/s of weights stand beside the
groups that read any, caches and activations not counted.
"""

from __future__ import annotations

import argparse
import collections
from dataclasses import replace
from pathlib import Path
import re
import sys
import time

from allocmoe_edge import GGUFError, Plan, PlanError, parse_budget
from allocmoe_edge.gguf_file import GGUFFile
from allocmoe_edge.measure.traffic import WeightTraffic
from allocmoe_edge.plan import metadata
import numpy as np
import observed  # first, so that llama_cpp loads our libraries

# the nodes of a group, and its tensors: first match wins, of "name op" with llama.cpp's names (cb() in its graph builders), and
# of the tensor's name, both without layer
GROUPS = (
    ("routed experts, matrices", r".* MUL_MAT_ID$", r".*_exps\."),
    # the sum over experts is made of nodes without a name
    (
        "routed experts, the rest",
        r"ffn_moe_(silu|swiglu|gelu|geglu|relu|reglu|situ|weighted|out|gate|up|down)| ADD$",
        None,
    ),
    ("router and token rule", r"ffn_moe_|.* CUSTOM$", r"ffn_gate_inp\."),
    ("shared expert, dense FFN", r"ffn_(?!inp|norm)", r"ffn_(?!norm)"),
    ("output matrix", r"result_output", r"output\."),
    ("norms", r".*norm", None),
    ("attention and the rest", r"", r"attn_.*[^m]\.weight"),
)
PREFILL_PASSES = 3
VIEWS = {"VIEW", "RESHAPE", "PERMUTE", "TRANSPOSE", "NONE"}


class Profile:
    """Times of every node, one list a pass over the same graph."""

    def __init__(self):
        self.passes: list = []
        self._start = 0.0

    def new_pass(self) -> None:
        self.passes.append([])

    def wants(self, _node: observed.Node) -> bool:
        self._start = time.perf_counter()
        return True

    def seen(self, node: observed.Node) -> None:
        elapsed = time.perf_counter() - self._start
        op = node.op
        if op not in VIEWS and self.passes:
            self.passes[-1].append((re.sub(r"-\d+| \(.*\)|^node_\d+|^leaf_\d+", "", node.name), op, elapsed))

    def seconds(self) -> dict:
        """Seconds of a pass by (name without layer, operation): each node's median over the passes, summed over layers."""
        nodes = [[node[:2] for node in one] for one in self.passes]
        if any(one != nodes[0] for one in nodes):
            raise RuntimeError("the passes computed different graphs")
        out: dict = collections.defaultdict(float)
        medians = np.median([[node[2] for node in one] for one in self.passes], axis=0)
        for key, value in zip(nodes[0], medians):
            out[key] += value
        return out


def group(name: str, op: str) -> str:
    return next(title for title, pattern, _ in GROUPS if re.match(pattern, f"{name} {op}"))


def weights_read(path: Path, counts) -> dict:
    """Bytes of weights that a generated token reads, by group, with counts[il] experts in layer il."""
    traffic = WeightTraffic(path)
    out: dict = collections.Counter()
    with GGUFFile(path) as file:
        tied = not any(tensor.name == "output.weight" for tensor in file.tensors)
        for tensor in file.tensors:
            name = re.sub(r"^blk\.\d+\.", "", tensor.name)
            name = "output.weight" if tied and name == "token_embd.weight" else name
            title = next((title for title, _, pattern in GROUPS if pattern and re.match(pattern, name)), "")
            out[title] += tensor.n_bytes
    out[GROUPS[0][0]] = traffic.of_experts(counts)
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a GGUF file with experts, in one piece")
    parser.add_argument("--budgets", default="1.0,0.5", metavar="LIST", help="default: 1.0,0.5")
    parser.add_argument("--batch-rule", action="store_true", help="the smallest budget also under token rule batch")
    parser.add_argument("--prompt", type=int, default=256, metavar="N", help="default: 256")
    parser.add_argument("--gen", type=int, default=16, metavar="N", help="default: 16")
    parser.add_argument("--nodes", action="store_true", help="print single nodes above 0.5%% too")
    args = parser.parse_args()
    try:
        full = metadata.read(args.model).full
        if full is None:
            raise GGUFError(f"{args.model}: a dense model: it has no experts to budget")
        n_moe = sum(k > 0 for k in full)
        plans = {b: Plan.uniform(full, parse_budget(b, sum(full), n_moe)) for b in args.budgets.split(",")}
        if args.batch_rule:
            name, plan = min(plans.items(), key=lambda pair: pair[1].budget_total)
            plans[f"{name}, batch"] = replace(plan, token_rule="batch")
        found: dict = {}
        profile = Profile()
        n_ctx = args.prompt + args.gen + 8
        # late, because every phase has its own profile
        watch = (lambda node: profile.wants(node)), (lambda node: profile.seen(node))
        with observed.ObservedModel(args.model, n_ctx, *watch, n_ubatch=512) as model:
            tokens = np.random.default_rng(0).integers(model.n_vocab, size=n_ctx).tolist()
            for name, plan in plans.items():
                model.set_plan(plan)
                model.clear()
                profile = Profile()  # records nothing before new_pass
                model.decode(tokens[:8], 0)
                found["prefill", name] = profile
                for _ in range(PREFILL_PASSES):
                    model.clear()
                    profile.new_pass()
                    model.decode(tokens[: args.prompt], 0)
                model.clear()
                profile = Profile()
                model.decode(tokens[:1], 0)
                found["decode", name] = profile
                for i in range(1, args.gen + 1):
                    profile.new_pass()
                    model.decode([tokens[i]], i)
    except (GGUFError, PlanError, RuntimeError) as error:
        print(f"node_profile.py: error: {error}", file=sys.stderr)
        return 1
    read = {name: weights_read(args.model, plan.expert_used_count) for name, plan in plans.items()}
    for phase, n in (("prefill", args.prompt), ("decode", 1)):
        show(phase, n, {name: found[phase, name].seconds() for name in plans}, args.nodes, read if n == 1 else {})
    return 0


def show(phase: str, n: int, profiles: dict, nodes: bool, read: dict) -> None:
    """A Markdown table of one phase, n tokens a pass: milliseconds per token, shares, and GB/s of the bytes in `read`."""
    print(f"\n| {phase}, ms per token | " + " | ".join(profiles) + " |\n| --- |" + " ---: |" * len(profiles))
    totals = {name: sum(seconds.values()) for name, seconds in profiles.items()}

    def line(title: str, values: dict) -> None:
        cells = []
        for name in profiles:
            n_bytes = read[name].get(title) if read else None
            speed = f", {n_bytes / values[name] / 1e9:.1f} GB/s" if n_bytes and values[name] else ""
            cells.append(f"{values[name] / n * 1e3:.3f} ({values[name] / totals[name]:.1%}{speed})")
        print(f"| {title} | " + " | ".join(cells) + " |")

    grouped = {name: collections.Counter() for name in profiles}
    single = {name: collections.Counter() for name in profiles}
    for name, seconds in profiles.items():
        for key, value in seconds.items():
            grouped[name][group(*key)] += value
            single[name][" ".join(key).strip()] += value
    for title, _, _ in GROUPS:
        line(title, {name: grouped[name][title] for name in profiles})
    line("sum", totals)
    if nodes:
        keys = {key for name in profiles for key, value in single[name].items() if value > 0.005 * totals[name]}
        for key in sorted(keys, key=lambda key: -max(single[name][key] for name in profiles)):
            line(f"`{key}`", {name: single[name][key] for name in profiles})


if __name__ == "__main__":
    sys.exit(main())

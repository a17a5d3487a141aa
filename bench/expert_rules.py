#!/usr/bin/env python3
"""What it costs to read fewer experts: our prices beside the rules of those that have no estimates.

    python bench/expert_rules.py planned.gguf --text prose.txt -o folder

Divergence from the full model, token by token after a prompt, against what is read, in one cache of a share of each layer's
experts. Without estimates, by llama.cpp's own graph with other routing weights, hits and misses by the same cache replayed:
- drop: of the experts that would have to be read those of a small weight are left out, below so many times the mean of the
  token's own; or all but so many of each layer;
- substitute: an expert that would have to be read gives its place to the best one at hand, if that one's weight is at
  least so many times its own (0: whichever there is).
Both at the model's own expert counts and at those of half budget. The prompt is computed by the full model for all. Ours: token rule "estimate" at --budgets and --prices, in
the runtime with its own cache. Writes table.md and, with matplotlib, plot.svg.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Callable

from allocmoe_edge import Llama, Plan
import expert_cache as bench
import numpy as np
import observed

# what a rule leaves of a token's experts: (probabilities [n_expert], the K best ids in order, bool [n_expert] at hand)
Rule = Callable[[np.ndarray, np.ndarray, np.ndarray], list]


def keep_all(p: np.ndarray, best: np.ndarray, here: np.ndarray) -> list:
    return list(best)


def drop_below(share: float, p: np.ndarray, best: np.ndarray, here: np.ndarray) -> list:
    limit = share * p[best].mean()
    return [e for e in best if here[e] or p[e] >= limit]


def read_at_most(n: int, p: np.ndarray, best: np.ndarray, here: np.ndarray) -> list:
    absent = [e for e in best if not here[e]][:n]
    return [e for e in best if here[e] or e in absent]


def substitute(share: float, p: np.ndarray, best: np.ndarray, here: np.ndarray) -> list:
    spare = [e for e in np.argsort(-p, kind="stable") if here[e] and e not in best]
    out = []
    for e in best:
        if not here[e] and spare and p[spare[0]] >= share * p[e]:
            e = spare.pop(0)
        out.append(e)
    return out


RULES: dict[str, Rule] = {
    "nothing": keep_all,
    **{f"drop below {x:g}": partial(drop_below, x) for x in (0.9, 1.0, 1.1)},
    **{f"read at most {n}": partial(read_at_most, n) for n in (1, 0)},
    **{f"substitute from {x:g}": partial(substitute, x) for x in (0.9, 0.8, 0)},
}


class Replayed:
    """A model whose routing follows a rule after the prompt, and what it would read."""

    def __init__(self, path: Path, n_ctx: int, n_batch: int, n_slots: list, full: tuple):
        self.rule: Rule = keep_all
        self.counts, self.n_slots = full, n_slots
        self.recent: list = []
        self.n_expert = self.n_read = self.n_run = 0
        self.counting = False
        self.model = observed.ObservedModel(path, n_ctx, self._wants, self._seen, n_ubatch=n_batch, n_threads=1)
        self.model.set_plan(Plan.full(full))  # not the file's

    def _wants(self, node: observed.Node) -> bool:
        if node.name.startswith("ffn_moe_probs_"):
            raise SystemExit(f"{node.name}: the rules here are for routers that choose by probability alone")
        return node.name.startswith("ffn_moe_probs-") and node.name[14:].isdecimal()

    def _seen(self, node: observed.Node) -> None:
        il = int(node.name[14:])
        rows = node.data().reshape(-1, self.n_expert)
        recent = self.recent[il]
        for p in rows:
            best = np.argsort(-p, kind="stable")[: self.counts[il]]
            if self.counting:
                here = np.zeros(self.n_expert, bool)
                here[recent[: self.n_slots[il]]] = True
                best = self.rule(p, best, here)
                self.n_read += int((~here[best]).sum())
                self.n_run += len(best)
            recent[:] = [*best, *(e for e in recent if e not in best)]
            left_out = np.ones(self.n_expert, bool)
            left_out[best] = False
            p[left_out] = 0
        node.replace(rows)

    def run(self, ids: list, n_prompt: int, full: tuple, counts: tuple, rule: Rule, n_expert: int) -> np.ndarray:
        """Logits of the tokens after the prompt, which is routed as the full model does, by `full`. A layer runs its own number of
        experts all the same: those left out have a weight of 0."""
        self.n_expert, self.rule, self.recent = n_expert, rule, [[] for _ in counts]
        self.n_read = self.n_run = 0
        self.model.clear()
        self.counting, self.counts = False, full
        self.model.decode(ids[:n_prompt], 0, all_logits=True)
        self.counting, self.counts = True, counts
        return np.array([self.model.decode([t], n_prompt + i) for i, t in enumerate(ids[n_prompt:])])


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", type=Path, help="converted, with an estimator, or with --plan")
    p.add_argument("--plan", type=Path, help="a side file with the plan, as allocmoe-convert --plan-only writes it")
    p.add_argument("--text", type=Path, required=True)
    p.add_argument("--skip", type=int, default=0, help="bytes of the text before what is read")
    p.add_argument("--prompt", type=int, default=128)
    p.add_argument("--gen", type=int, default=256)
    p.add_argument("--share", type=float, default=0.6, help="of each layer's experts that the cache holds, about")
    p.add_argument("--budgets", default="1,0.75,0.5")
    p.add_argument("--prices", default="1,2,4,8,16,64")
    p.add_argument("-o", "--out", type=Path, required=True)
    args = p.parse_args()
    with open(args.text, "rb") as file:
        file.seek(args.skip)
        text = file.read(8 * (args.prompt + args.gen))
    n_ctx = args.prompt + args.gen
    llm = Llama(
        args.model, n_ctx=n_ctx, n_batch=args.prompt, repack=False, verbose=False, n_threads=1, n_threads_batch=1,
        expert_cache=bench.cache_for(args.model, args.share), miss_price=1, plan_path=args.plan,
    )  # fmt: skip
    ids = [int(t) for t in llm.tokenize(text)[:n_ctx]]
    n_expert = next(int(v) for k, v in llm.metadata.items() if k.endswith(".expert_count"))
    rows: list = []  # group, name, KL, reads, MB, experts per layer

    llm.set_budget(1.0)
    full, stats = bench.one_by_one(llm, ids, args.prompt)
    per_read = stats["bytes_read"].sum() / max(1, stats["misses"].sum()) / 1e6
    n_layer = int((stats["tokens"] > 0).sum())

    def add(group: str, name: str, divergence: float, n_read: float, n_run: float) -> None:
        rows.append(
            (group, name, divergence, n_read / args.gen, n_read / args.gen * per_read, n_run / args.gen / n_layer)
        )
        print(
            f"{group}, {name}: KL {divergence:.4f}, {rows[-1][3]:.1f} reads, {rows[-1][5]:.2f} experts a layer",
            flush=True,
        )

    add("ours", "exact", 0.0, stats["misses"].sum(), stats["activations"].sum())
    for budget in map(float, args.budgets.split(",")):
        plan = llm.set_budget(budget, token_rule="estimate")
        for price in map(float, args.prices.split(",")):
            if budget == 1 and price == 1:
                continue
            llm.miss_price = price
            logits, stats = bench.one_by_one(llm, ids, args.prompt, plan)
            divergence = bench.kl(full, logits).mean()
            add(
                "ours, full budget" if budget == 1 else f"ours, budget {budget:g}",
                f"price {price:g}",
                divergence,
                stats["misses"].sum(),
                stats["activations"].sum(),
            )
    all_counts, half = llm.expert_used_count_full, llm.set_budget(0.5, token_rule="off").expert_used_count
    n_slots = bench.slots(llm)
    llm.close()

    replayed = Replayed(args.model, n_ctx, args.prompt, n_slots, all_counts)
    with replayed.model:
        own = replayed.run(ids, args.prompt, all_counts, all_counts, keep_all, n_expert)
        for group, counts in (("full budget", all_counts), ("half budget by top-k", half)):
            for name, rule in RULES.items():
                logits = replayed.run(ids, args.prompt, all_counts, counts, rule, n_expert)
                add(group, name, bench.kl(own, logits).mean(), replayed.n_read, replayed.n_run)
    write(args, rows, n_slots, n_expert)


def write(args: argparse.Namespace, rows: list, n_slots: list, n_expert: int) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    lines = [
        f"{args.model.name}, {args.gen} tokens after {args.prompt}, cache for {min(n_slots)} to {max(n_slots)} of {n_expert} "
        "experts a layer",
        "",
        "| | rule | KL, nats | reads a token | MB a token | experts a layer |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
        *(f"| {g} | {n} | {d:.3f} | {r:.1f} | {mb:.2f} | {k:.2f} |" for g, n, d, r, mb, k in rows),
    ]
    (args.out / "table.md").write_text("\n".join(lines) + "\n")
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        return
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "allocmoe", "font.size": 9})
    figure, axes = plt.subplots(figsize=(6.4, 4))
    lines_of: dict = {}
    for group, name, divergence, _, mb, _ in rows:
        what = "" if name.startswith("price") or name == "exact" else ", " + name.split()[0]
        lines_of.setdefault(group + what, []).append((mb, divergence))
    for label, points in lines_of.items():
        ours = label.startswith("ours")
        axes.plot(*zip(*sorted(points)), marker="o", ms=4, lw=2.2 if ours else 1, ls="-" if ours else "--", label=label)
    axes.set(xlabel="read, MB a token", ylabel="divergence from the full model, nats", ylim=(0, None), xlim=(0, None))
    axes.legend(frameon=False, fontsize=7)
    figure.tight_layout()
    figure.savefig(args.out / "plot.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()

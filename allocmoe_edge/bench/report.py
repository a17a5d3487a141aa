"""Turns what was measured into rows, and rows into a table, JSON, CSV and a plot."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Dict, List, Optional, Sequence

import numpy as np

from .. import output_file
from ..measure.traffic import WeightTraffic
from ..plan import Plan
from .measure import STOCK, Item, Result, Samples


def rows(result: Result, plans: Dict[str, Plan], traffic: WeightTraffic, bandwidth: float) -> List[dict]:
    """One dict for every item and plan, the item's reference first.

    Medians over the runs, with the quartiles of what is compared. `ratio` is the reference's speed into this plan's,
    round by round, each run against the mean time of the two reference runs around it; the reference's own ratio is
    its first run against its last, so its spread is what the machine does to equal work.
    """
    out = []
    for item, by_name in result.samples.items():
        reference = np.array(next(iter(by_name.values())).seconds).reshape(-1, 2)
        for i, (name, samples) in enumerate(by_name.items()):
            ratios = reference[:, 0] / reference[:, 1] if i == 0 else reference.mean(1) / np.array(samples.seconds)
            out.append(_row(item, name, plans[name], samples, ratios, traffic, bandwidth))
    return out


def _row(item: Item, name: str, plan: Plan, samples: Samples, ratios, traffic: WeightTraffic, bandwidth: float) -> dict:
    seconds = float(np.median(samples.seconds))
    activations = np.mean(samples.activations, axis=0)
    row = {
        "phase": item.phase,
        "n_prompt" if item.phase == "prefill" else "depth": item.length,
        "n_tokens": item.n_tokens,
        "plan": name,
        "budget": plan.budget,
        "token_rule": plan.token_rule,
        "activations_per_token": float(activations.sum()),
        "tokens_per_second": item.n_tokens / seconds,
        "ratio": float(np.median(ratios)),
        "ratio_quartiles": np.percentile(ratios, (25, 75)).tolist(),
        "seconds": samples.seconds,
        "joules_per_token": float(np.median(samples.joules)) / item.n_tokens if samples.joules else None,
    }
    if item.phase == "prefill":
        return {**row, "time_to_first_token": seconds}
    steps = np.concatenate(samples.step_seconds)
    n_bytes = traffic.per_token(activations)
    return {
        **row,
        "step_seconds": samples.step_seconds,
        "p50_ms": float(np.percentile(steps, 50)) * 1e3,
        "p95_ms": float(np.percentile(steps, 95)) * 1e3,
        "gb_per_token": n_bytes / 1e9,
        "gb_per_second": n_bytes * row["tokens_per_second"] / 1e9,
        "bandwidth_share": n_bytes * row["tokens_per_second"] / bandwidth,
        "ratio_of_bytes": traffic.per_token(plan.expert_used_count_full) / n_bytes,
    }


# what the first row of an item may be
_REFERENCES = {"full": "full budget", STOCK: "stock llama.cpp"}


def noise(all_rows: List[dict]) -> Dict[tuple, float]:
    """By (phase, length): how far the quartiles of the reference against itself lie from 1."""
    found: Dict[tuple, float] = {}
    for row in all_rows:
        # the item's first row is its reference
        found.setdefault(_item(row), max(abs(q - 1) for q in row["ratio_quartiles"]))
    return found


def warnings(all_rows: List[dict], limit: float) -> List[str]:
    """What the reader must not conclude from these rows."""
    out = []
    floor, reference = noise(all_rows), _REFERENCES[all_rows[0]["plan"]]
    for (phase, length), value in floor.items():
        if value > limit:
            out.append(
                f"{phase} {length}: a noisy machine: {reference} against itself differs by {value:.0%} (quartiles): conclude "
                "nothing from smaller differences. Stop other programs, or ask for more rounds (--repeats)"
            )
    seen = set()
    for row in all_rows:
        key = _item(row)
        low, high = row["ratio_quartiles"]
        if key in seen and (low <= 1 <= high or abs(row["ratio"] - 1) <= floor[key]):
            out.append(f"{key[0]} {key[1]}: no difference between {row['plan']} and {reference} beyond the noise")
        seen.add(key)
    return out


def _item(row: dict) -> tuple:
    return row["phase"], row["n_prompt"] if row["phase"] == "prefill" else row["depth"]


def table(all_rows: List[dict]) -> str:
    """Two Markdown tables, prefill and decode."""
    parts = []
    for phase, columns in (("prefill", _PREFILL), ("decode", _DECODE)):
        found = [row for row in all_rows if row["phase"] == phase]
        columns = [c for c in columns if c[0] != "J/token" or any(row["joules_per_token"] for row in found)]
        titles = [title.format(all_rows[0]["plan"]) for title, _ in columns]
        if found:
            parts.append(markdown(titles, [[show(row) for _, show in columns] for row in found]))
    return "\n\n".join(parts)


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of cells, aligned to the right, that also reads well as it is."""
    cells = [titles, *rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["| " + " | ".join(cell.rjust(width) for cell, width in zip(line, widths)) + " |" for line in cells]
    lines.insert(1, "| " + " | ".join("-" * (width - 1) + ":" for width in widths) + " |")
    return "\n".join(lines)


def _ratio(row: dict) -> str:
    return f"{row['ratio']:.3f}x ({row['ratio_quartiles'][0]:.3f}-{row['ratio_quartiles'][1]:.3f})"


_COMMON: list = [
    ("budget", lambda row: row["plan"]),
    ("experts/token", lambda row: f"{row['activations_per_token']:.1f}"),
    ("tokens/s", lambda row: f"{row['tokens_per_second']:.2f}"),
    ("x {} (quartiles)", _ratio),
]
_ENERGY: tuple = ("J/token", lambda row: "" if row["joules_per_token"] is None else f"{row['joules_per_token']:.2f}")
_PREFILL: List[tuple] = [
    ("prefill", lambda row: str(row["n_prompt"])),
    *_COMMON,
    ("first token after", lambda row: f"{row['time_to_first_token']:.2f} s"),
    _ENERGY,
]
_DECODE: List[tuple] = [
    ("decode at", lambda row: str(row["depth"])),
    *_COMMON,
    ("bytes allow", lambda row: f"{row['ratio_of_bytes']:.2f}x"),
    ("p50 ms", lambda row: f"{row['p50_ms']:.1f}"),
    ("p95 ms", lambda row: f"{row['p95_ms']:.1f}"),
    ("GB/token", lambda row: f"{row['gb_per_token']:.3f}"),
    ("GB/s", lambda row: f"{row['gb_per_second']:.1f} ({row['bandwidth_share']:.0%})"),
    _ENERGY,
]


def write_json(path: Path, report: dict) -> None:
    output_file.write(path, (json.dumps(report, indent=1) + "\n").encode())


def write_csv(path: Path, all_rows: List[dict]) -> None:
    """One line a row, without the single runs, which only the JSON has."""
    flat = []
    for row in all_rows:
        row = {key: value for key, value in row.items() if key not in ("seconds", "step_seconds")}
        row["ratio_q1"], row["ratio_q3"] = row.pop("ratio_quartiles")
        flat.append(row)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in flat for key in row)))
    writer.writeheader()
    writer.writerows(flat)
    output_file.write(path, text.getvalue().encode())


PLOT_SUFFIXES = (".png", ".svg", ".pdf")


def write_plot(path: Path, all_rows: List[dict], title: str) -> None:
    """Speed against budget: a line for every prompt length and depth, quartiles as bars, and for decode what the bytes
    allow. The path ends in one of PLOT_SUFFIXES. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure, reference = Figure(figsize=(10, 4), layout="constrained"), all_rows[0]["plan"]
    for axes, phase in zip(figure.subplots(1, 2), ("prefill", "decode")):
        for key in dict.fromkeys(_item(row) for row in all_rows if row["phase"] == phase):
            found = sorted((row for row in all_rows if _item(row) == key), key=lambda row: row["budget"])
            budgets, ratios = [row["budget"] for row in found], np.array([row["ratio"] for row in found])
            quartiles = np.array([row["ratio_quartiles"] for row in found])
            # the reference's ratio is its own noise around 1
            ratios[[row["plan"] == reference for row in found]] = 1.0
            bars = np.abs(quartiles.T - ratios)
            line = axes.errorbar(budgets, ratios, bars, marker="o", capsize=3, label=f"{phase} {key[1]}")
            if phase == "decode":
                bound = [row["ratio_of_bytes"] for row in found]
                axes.plot(budgets, bound, "--", color=line[0].get_color(), label="bytes read allow")
        axes.set(xlabel="share of expert activations", ylabel=f"speed, {_REFERENCES[reference]} = 1", title=phase)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    figure.suptitle(title)
    data = io.BytesIO()
    figure.savefig(data, format=path.suffix.lower()[1:])
    output_file.write(path, data.getvalue())


def gigabytes(n_bytes: Optional[float]) -> str:
    return "unknown" if n_bytes is None else f"{n_bytes / 1e9:.2f} GB"

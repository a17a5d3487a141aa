"""The measurements as JSON rows, one Markdown table and one plot."""

from __future__ import annotations

from pathlib import Path
from typing import Dict, List

from methods import METHODS
import metrics
import numpy as np

# a mean further than this from the budget is corrected for in the column "at the budget"
TOLERANCE = 0.005


def rows(found: List[dict], cells: Dict[str, dict], full: dict, totals: Dict[float, int]) -> List[dict]:
    """One row for each budget, method and phase.

    Args:
        found: dicts of budget, method, sample, decode, name (`metrics.candidate_name`).
        cells: from `metrics.measure`.
        full: `metrics.summary` of the full model; `spent` is the sum of K_l.
        totals: activations per token by budget.
    """
    measured: dict = {}
    for entry in found:
        line = measured.setdefault((entry["method"], entry["decode"]), {}).setdefault(entry["sample"], {})
        line[entry["budget"]] = metrics.summary(cells[entry["name"]])
    uniform = measured["uniform", False][0]

    def losses(values: dict) -> dict:
        return {"perplexity": float(np.log(values["perplexity"] / full["perplexity"])), "kl": values["kl"]}

    result = []
    for budget, total in totals.items():
        baseline = losses(uniform[budget])
        for (method, decode), by_sample in measured.items():
            samples = []
            if budget not in by_sample[min(by_sample)]:
                continue  # not run token by token at this budget
            for curve in by_sample.values():
                spent = [full["spent"], *(values["spent"] for values in curve.values())]
                values, recovered, corrected = curve[budget], {}, {}
                for what, loss in losses(values).items():
                    recovered[what] = metrics.recovery(loss, baseline[what])
                    line = [0.0, *(losses(other)[what] for other in curve.values())]
                    corrected[what] = metrics.recovery(metrics.at_equal_budget(spent, line, total), baseline[what])
                samples.append({**values, "recovered": recovered, "recovered_at_budget": corrected})
            phase = ("decode" if decode else "prefill") if METHODS[method].decode else ""
            result.append({"budget": budget, "total": total, "method": method, "phase": phase, "samples": samples})
    return result


def table(result: dict) -> str:
    """The rows in Markdown; a figure with a range is the mean over calibration samples, their least and greatest."""
    full, floor = result["full"], result["floor"]
    lines = [
        "| budget | method | experts per token | perplexity | KL mean | KL median | same top-1 "
        "| recovered: perplexity, KL | at the budget exactly |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | --- | --- |",
        f"| 1 | full model | {full['spent']:.0f} | {full['perplexity']:.2f} | 0 | 0 | 100% | | |",
        f"| 1 | full model, token by token (noise floor) | {floor['spent']:.0f} | | {abs(floor['kl']):.1g} "
        f"| {abs(floor['kl_median']):.1g} | {floor['top1']:.2%} | | |",
    ]
    for row in result["rows"]:
        samples = row["samples"]

        def mean(what: str) -> float:
            return float(np.mean([sample[what] for sample in samples]))

        def share(kind: str) -> str:
            return ", ".join(_range([sample[kind][what] for sample in samples]) for what in ("perplexity", "kl"))

        phase = f" ({row['phase']})" if row["phase"] else ""
        is_uniform = row["method"] == "uniform"
        off = max(abs(sample["spent"] / row["total"] - 1) for sample in samples) > TOLERANCE
        spent = f"{mean('spent'):.1f} ({mean('spent') / row['total']:.1%})"
        recovered = "" if is_uniform else share("recovered")
        corrected = share("recovered_at_budget") if off and not is_uniform else ""
        lines.append(
            f"| {row['budget']:g} | {METHODS[row['method']].title}{phase} | {spent} | {mean('perplexity'):.2f} "
            f"| {mean('kl'):.4f} | {mean('kl_median'):.4f} | {mean('top1'):.1%} | {recovered} | {corrected} |"
        )
    return "\n".join(lines)


def noise_line(result: dict) -> str:
    """How far the recovered shares depend on which windows were evaluated."""
    medians = []
    for what, name in (("perplexity", "perplexity"), ("kl", "KL")):
        errors = [entry[what] for entry in result["text_noise"] if entry["method"] != "uniform"]
        medians.append(f"{name} {np.median(errors):.0%} (at most {max(errors):.0%})" if errors else f"{name} none")
    return f"Standard error of a recovered share over the choice of evaluation windows, median: {', '.join(medians)}."


def _range(values: List[float]) -> str:
    low, mean, high = (f"{round(value, 2) + 0.0:.0%}" for value in (min(values), np.mean(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def task_table(tasks: List[dict]) -> str:
    """Accuracy with its standard error, a column for each plan."""
    names = list(dict.fromkeys(entry["plan"] for entry in tasks))
    lines = [
        "| task | items | metric | chance | " + " | ".join(names) + " |",
        "| --- | ---: | --- | ---: |" + " ---: |" * len(names),
    ]
    for task in dict.fromkeys(entry["task"] for entry in tasks):
        by_plan = {entry["plan"]: entry for entry in tasks if entry["task"] == task}
        first = next(iter(by_plan.values()))
        values = [f"{by_plan[name]['accuracy']:.1%} ± {by_plan[name]['standard_error']:.1%}" for name in names]
        cells = [task, str(first["items"]), first["metric"], f"{first['chance']:.1%}", *values]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(result: dict, path: Path) -> None:
    """Divergence and the share of uniform k's that is won back, over realised activations; the file type is path's."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "allocmoe", "font.size": 9})
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.6))
    full = result["full"]["spent"]
    keys = dict.fromkeys((row["method"], row["phase"]) for row in result["rows"])
    colours = dict(zip(METHODS, pyplot.get_cmap("tab20").colors))
    for method, phase in keys:
        mine = [row for row in result["rows"] if (row["method"], row["phase"]) == (method, phase)]
        style = dict(
            color="black" if method == "uniform" else colours[method],
            linestyle=":" if phase == "decode" else "-",
            linewidth=2.4 if method in ("ours", "uniform") else 1,
            marker="o",
            markersize=3,
        )
        spent = [np.mean([s["spent"] for s in row["samples"]]) / full for row in mine]
        label = METHODS[method].title + (f" ({phase})" if phase else "")
        left.plot(spent, [np.mean([s["kl"] for s in row["samples"]]) for row in mine], label=label, **style)
        if method != "uniform":
            won = [np.array([s["recovered_at_budget"]["kl"] for s in row["samples"]]) for row in mine]
            right.plot([row["total"] / full for row in mine], [w.mean() for w in won], **style)
    left.set_yscale("log")
    left.set(xlabel="experts activated, share of the full model's", ylabel="KL from the full model, nats per token")
    right.axhline(0, color="black", linewidth=0.8)
    right.set(xlabel="budget", ylabel="share of uniform k's KL that is won back")
    figure.legend(*left.get_legend_handles_labels(), loc="outside center right", fontsize=7, frameon=False)
    text = result["evaluation"]
    figure.suptitle(f"{result['model']}, {text['tokens']} tokens of {text['text']}", fontsize=10)
    figure.set_layout_engine("constrained")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)

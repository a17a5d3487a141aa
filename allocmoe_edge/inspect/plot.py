"""The report as figures: sensitivities, experts per layer, perplexity against budget. Needs matplotlib."""

from __future__ import annotations

import html
import io
from pathlib import Path
import re
from typing import Iterable, Sequence
import warnings

import numpy as np

from .. import output_file
from . import InspectError

_SUFFIXES = (".png", ".svg", ".html")
_DPI = 120
_PLAN, _FULL, _OTHER = "#1b6ca8", "#d5dde5", "#c2571a"
# Colours span three decades. The largest few cells are often out of all proportion (the first layer at one expert): the
# scale ends at ten times the 98th percentile where that is less than the maximum, and what lies beyond is black.
_DECADES, _QUANTILE, _BEYOND = 3, 0.98, 10

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1 { font-size: 1.4rem } svg { width: 100%; height: auto } table { border-collapse: collapse; margin-bottom: 2rem }
th { text-align: left; font-weight: 600; padding: .15rem 1.5rem .15rem 0; vertical-align: top; white-space: nowrap }
td { padding: .15rem 0 }"""


_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
<table>
{rows}
</table>
{svg}
</body>
</html>
"""


def check_target(target: Path, inputs: Iterable[Path] = (), suffixes: Sequence[str] = _SUFFIXES) -> None:
    """Refuses, before any work is done, a plot that could not be written at the end.

    Raises:
        CommandError: an unknown suffix, a file that cannot be written, or matplotlib is not installed.
    """
    if target.suffix.lower() not in suffixes:
        raise InspectError(f"{target}: want a name that ends in {', '.join(suffixes[:-1])} or {suffixes[-1]}")
    output_file.check(target, inputs)
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise InspectError(f'--plot needs matplotlib ({error}): pip install "allocmoe-edge[plot]"') from None


def write(report: dict, target: Path) -> None:
    """Draws a report into a PNG, SVG or HTML file; one that exists is replaced when the new one is complete.

    Args:
        report: from `report.build`, with predicted_curve.

    Raises:
        CommandError: there is nothing to draw, or the file cannot be written.
    """
    kind = target.suffix.lower()[1:]
    figure = draw(report)
    data = io.BytesIO()
    with warnings.catch_warnings():
        # a name in a script that the font lacks: boxes in the title, which is no news to the user's terminal
        warnings.filterwarnings("ignore", message="Glyph")
        if kind == "png":
            figure.savefig(data, format="png", dpi=_DPI)
        else:
            figure.savefig(data, format="svg", metadata={"Date": None})
    content = data.getvalue()
    if kind != "png":
        # matplotlib repeats texts in comments, and control characters in a name would not be XML
        svg = re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f]", "?", content.decode())
        content = (page(report, svg) if kind == "html" else svg).encode()
    output_file.write(target, content)


def draw(report: dict):
    """The figure: a panel for each part that the report has. Raises InspectError if it has none."""
    from matplotlib.figure import Figure

    panels = []
    if report["profile"]:
        panels.append((_sensitivity, 3))
    if report["plan"]:
        panels.append((_layers, 2))
    if report["measured_curve"] or report["predicted_curve"]:
        panels.append((_curve, 3))
    if report["routing"]:
        panels.append((_routing, 3))
    if not panels:
        raise InspectError(
            f"{report['file']['path']}: nothing to draw: it has no plan (allocmoe-convert makes one), and nothing was "
            "measured (--measure-curve, --routing)"
        )
    heights = [height for _, height in panels]
    figure = Figure(figsize=(11, 1.1 * sum(heights) + 0.6), layout="constrained")
    figure.suptitle(_title(report), parse_math=False)
    axes = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
    for (panel, _), ax in zip(panels, axes):
        panel(ax, report)
    return figure


def _title(report: dict) -> str:
    model = report["model"]
    name = model["name"] or Path(report["file"]["path"]).name
    plan = report["plan"]
    spent = f": {plan['budget_total']} of {plan['budget_full']} expert activations per token" if plan else ""
    return name + spent


def _sensitivity(ax, report: dict) -> None:
    """Heat map: what a layer at k costs beyond itself at K, log scale; layers across, k up."""
    import matplotlib
    from matplotlib.colors import LogNorm

    rows = report["profile"]["sensitivity"]
    damage = np.full((max(map(len, rows)), len(rows)), np.nan)
    for il, row in enumerate(rows):
        if row:
            damage[: len(row), il] = np.array(row) - row[-1]
    costly = damage[damage > 0]
    # where nothing costs anything, any scale will do
    top = min(costly.max(), _BEYOND * np.quantile(costly, _QUANTILE)) if costly.size else 1.0
    colours = matplotlib.colormaps["YlOrRd"].with_extremes(over="black")
    mesh = ax.pcolormesh(
        np.arange(len(rows) + 1) - 0.5,
        np.arange(len(damage) + 1) + 0.5,
        # no loss, or less than none, is drawn like the smallest one
        np.ma.masked_invalid(np.maximum(damage, top * 10.0**-_DECADES)),
        norm=LogNorm(top * 10.0**-_DECADES, top),
        cmap=colours,
        edgecolors="white",
        linewidth=0.4,
    )
    metric = report["profile"]["metric"]
    bar = ax.figure.colorbar(mesh, ax=ax, extend="both" if costly.size and costly.max() > top else "min", pad=0.01)
    bar.set_label(f"{metric} beyond k = K", parse_math=False)
    if report["plan"]:
        planned = report["plan"]["experts_per_token"]
        layers = [il for il, k in enumerate(planned) if k]
        ax.plot(
            layers,
            [planned[il] for il in layers],
            "o",
            markersize=5,
            markerfacecolor="white",
            markeredgecolor="black",
            markeredgewidth=0.9,
            label="the plan",
        )
        ax.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False, borderaxespad=0.2)
    ax.set_title(f"Sensitivity of each layer ({metric}, {report['profile']['mode']})", loc="left", parse_math=False)
    ax.set_ylabel("experts k")
    _integer_axis(ax.yaxis, len(damage))
    _layer_axis(ax, len(rows))


def _layers(ax, report: dict) -> None:
    planned, full = report["plan"]["experts_per_token"], report["plan"]["experts_per_token_full"]
    layers = np.arange(len(full))
    ax.bar(layers, full, width=0.8, color=_FULL, label="the model's own K")
    ax.bar(layers, planned, width=0.8, color=_PLAN, label="planned k")
    ax.set_title("Experts per token in each layer", loc="left")
    ax.set_ylabel("experts")
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, borderaxespad=0.2)
    _integer_axis(ax.yaxis, max(full))
    _layer_axis(ax, len(full))


def _curve(ax, report: dict) -> None:
    measured, predicted = report["measured_curve"], report["predicted_curve"]
    if measured:
        budgets = [100 * point["budget"] for point in measured["points"]]
        ax.plot(budgets, [point["uniform"] for point in measured["points"]], "s--", color=_OTHER, label="uniform k")
        if measured["points"][0]["plan"] is not None:
            ax.plot(budgets, [point["plan"] for point in measured["points"]], "o-", color=_PLAN, label="the plan")
        ax.set_ylabel("perplexity")
        title = f"Perplexity on {measured['n_tokens']:,} tokens of {measured['source']}"
    lines = list(ax.get_lines())
    if predicted:
        # beside a measured curve the prediction gets an axis of its own: the two are not in the same unit
        own = ax.twinx() if measured else ax
        budgets = [100 * point["budget"] for point in predicted]
        style: dict = {"marker": "."}
        mark = ""
        if measured:
            mark, style = " (predicted)", {"linewidth": 1, "alpha": 0.75, "linestyle": ":"}
        for key, label, colour in (("damage_uniform", "uniform k", _OTHER), ("damage", "the plan", _PLAN)):
            own.plot(budgets, [point[key] for point in predicted], color=colour, label=label + mark, **style)
        metric = report["profile"]["metric"]
        own.set_ylabel(f"predicted: {metric}" if measured else metric, parse_math=False)
        lines += own.get_lines()
        # near one expert a layer the damage can be a thousand times what it is elsewhere: there it leaves the picture
        usual = [point["damage_uniform"] for point in predicted if point["budget"] >= 0.25]
        if usual and max(usual) > 0:
            top, low = 1.5 * max(usual), min(0.0, min(point["damage"] for point in predicted))
            own.set_ylim(low - 0.05 * (top - low), min(own.get_ylim()[1], top))
        if not measured:
            title = f"Predicted damage: {metric} beyond k = K, summed over the layers"
    ax.set_title(title, loc="left", parse_math=False)
    if report["plan"]:
        here = 100 * report["plan"]["budget"]
        lines.append(ax.axvline(here, color="#555555", linewidth=1, zorder=0, label="this file"))
    ax.legend(handles=lines, loc="upper right", frameon=False)
    ax.set_xlabel("budget, % of the model's own expert activations")


def _routing(ax, report: dict) -> None:
    routing = report["routing"]
    layers = [row["layer"] for row in routing["layers"]]
    for i, m in enumerate(routing["segment_lengths"]):
        ax.plot(layers, [100 * row["srp"][i] for row in routing["layers"]], ".-", linewidth=1, label=f"m = {m}")
    ax.set_ylim(0, 100)
    ax.set_ylabel("SRP, %")
    ax.set_title(
        f"Local routing consistency: best F1 of one choice of experts for m tokens ({routing['source']})",
        loc="left",
        parse_math=False,
    )
    ax.legend(loc="upper right", ncols=4, frameon=False)
    _layer_axis(ax, len(report["model"]["experts_per_token"]))


def _layer_axis(ax, n_layer: int) -> None:
    ax.set_xlim(-0.5, n_layer - 0.5)
    _integer_axis(ax.xaxis, n_layer, 24)
    ax.set_xlabel("layer")


def _integer_axis(axis, n: int, ticks: int = 8) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=min(max(n, 1), ticks), integer=True))


def page(report: dict, svg: str) -> str:
    """One HTML page that fetches nothing: the figure and the report's key facts as a table."""
    from .text import facts

    rows = "\n".join(
        f"<tr><th>{html.escape(label)}</th><td>{html.escape(value)}</td></tr>" for label, value in facts(report)
    )
    return _PAGE.format(
        title=html.escape(_title(report)), style=_STYLE, rows=rows, svg=svg[svg.index("<svg") :].rstrip()
    )

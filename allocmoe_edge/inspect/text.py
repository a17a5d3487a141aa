"""The report as text for a terminal."""

from __future__ import annotations

import textwrap
from typing import Iterator

from ..command import printable
from ..plan import Plan, share_text

_LABEL = 15
_MIN_BAR, _MAX_CELL = 8, 3


def render(report: dict, width: int, unicode: bool) -> str:
    """The report as lines of at most `width` columns (the bars and tables need about 40).

    Args:
        report: from `report.build`.
        width: columns of the terminal.
        unicode: draw with block characters; else with ASCII.
    """
    blocks = [_model(report), _plan(report), _curve(report), _routing(report)]
    lines: list = []
    for block in blocks:
        rows = list(block)
        lines += [""] * bool(lines and rows)
        for row in rows:
            lines += [row] if isinstance(row, str) else _wrapped(row[0], row[1], width)
    if report["plan"]:
        lines += ["", *bars(report, width, unicode)]
    return "\n".join(printable(line) for line in lines) + "\n"


def facts(report: dict) -> Iterator:
    """(label, value) pairs on the file, the model and its plan."""
    yield from _model(report)
    yield from _plan(report)


def _wrapped(label: str, value: str, width: int) -> list:
    return textwrap.wrap(
        value,
        max(width, 2 * _LABEL),
        initial_indent=f"{label:<{_LABEL}}",
        subsequent_indent=" " * _LABEL,
        break_long_words=False,  # a path is for copying
        break_on_hyphens=False,
    )


def _model(report: dict) -> Iterator:
    file, model = report["file"], report["model"]
    size = _bytes(file["bytes"]) + (f" in {file['n_files']} files" if file["n_files"] > 1 else "")
    yield "file", f"{file['path']}, {size}"
    if model["name"]:
        yield "model", model["name"]
    if file["kind"] == "plan":
        yield (
            "architecture",
            f"{model['architecture']} (a plan alone: for --plan of allocmoe-chat and allocmoe-server, or plan_path of Llama)",
        )
        return
    yield "architecture", f"{model['architecture']}, {_count(model['parameters'])} parameters"
    full = [k for k in model["experts_per_token"] if k]
    if not full:
        yield "layers", f"{model['layers']}; a dense model: it has no experts to budget"
    else:
        share = "all with experts" if len(full) == model["layers"] else f"{len(full)} with experts"
        used = str(full[0]) if len(set(full)) == 1 else f"{min(full)} to {max(full)}"
        shared = f", and {model['shared_experts']} shared" if model["shared_experts"] else ""
        yield "layers", f"{model['layers']}, {share}: {used} of {model['experts']} per token{shared}"
    for part, types in model["types"].items():
        total = sum(entry["bytes"] for entry in types.values())
        if total:
            bits = 8 * total / sum(entry["parameters"] for entry in types.values())
            mix = ", ".join(f"{name} {entry['bytes'] / total:.0%}" for name, entry in types.items())
            label = part if full else "tensors"
            yield label, f"{_bytes(total)}, {bits:.1f} bits per weight ({mix})"


def _plan(report: dict) -> Iterator:
    plan, profile = report["plan"], report["profile"]
    if not plan:
        if report["model"]["moe_layers"]:
            yield "plan", "none: the model runs at full budget (allocmoe-convert makes a plan)"
        return
    obj = Plan(plan["experts_per_token"], plan["experts_per_token_full"])
    yield (
        "budget",
        f"{share_text(obj.budget)}: {obj.budget_total} of {obj.budget_full} expert activations per token, mean {obj.mean:.1f} "
        f"of {obj.mean_full:.1f}",
    )
    rule = plan["token_rule"]
    if rule == "off":
        yield "token rule", "off: every token gets its layer's number"
    else:
        by = "estimated size, and an estimate of the others" if rule == "estimate" else "their scores"
        yield "token rule", f"{rule}: every token keeps {plan['k_base']}, more by {by}"
    read = plan["bytes_per_token"]
    if read and read["experts_full"]:
        whole = read["experts_full"] + read["other"]
        yield (
            "a token reads",
            f"{_bytes(read['experts'] + read['other'])} of {_bytes(whole)} ({read['share']:.1%}), "
            f"of the experts {read['expert_share']:.1%}; at most {1 / read['share']:.2f} times as fast",
        )
    if plan["cost"]:
        cost = plan["cost"]
        yield (
            "cost",
            f"{cost['spent']:.3g} of {cost['full']:.3g} {cost['unit']} per token for experts ({cost['share']:.1%}), by "
            "the costs in the file",
        )
    if profile:
        uniform = profile["allocation"] == "uniform"
        text = profile["calibration"]
        yield (
            "allocation",
            "uniform under rules other than estimate: Alloc-L lost on held-out text" if uniform else "Alloc-L",
        )
        yield "profile", f"{profile['metric']}, {profile['mode']}; {text['source']}, {text['n_tokens']:,} tokens"
        yield "sensitivity", _sensitivity(profile)
    held_out = report["held_out"]
    if held_out:
        yield (
            "held out",
            f"perplexity on {held_out['n_tokens']:,} tokens: full {held_out['full']:.2f}, uniform "
            f"{held_out['uniform']:.2f}, plan {held_out['plan']:.2f}; divergence from full (KL, nats): uniform "
            f"{held_out['kl_uniform']:.4f}, plan {held_out['kl_plan']:.4f}",
        )
    elif profile:
        yield "held out", "not checked: planned from sensitivities that were stored in a file"


def _sensitivity(profile: dict) -> str:
    damage = {il: row[0] - row[-1] for il, row in enumerate(profile["sensitivity"]) if row}
    order = sorted(damage, key=lambda il: -damage[il])
    n = max(1, min(3, len(order) // 2))
    top, low = (", ".join(map(str, layers)) for layers in (order[:n], order[-n:]))
    if len(order) == 1:
        return f"{_signed(damage[order[0]])} at 1 expert"
    return f"at 1 expert most in layers {top} (up to {_signed(damage[order[0]])}), least in {low}"


def bars(report: dict, width: int, unicode: bool) -> list:
    """A line per layer with experts: k of K as a bar, and what the profile says the plan costs there."""
    planned, full = report["plan"]["experts_per_token"], report["plan"]["experts_per_token_full"]
    rows = report["profile"] and report["profile"]["sensitivity"]
    on, off = ("█", "░") if unicode else ("#", ".")
    digits = len(str(max(full)))
    lead = max(5, len(str(len(full)))) + 2 * digits + 8
    most = max(full)
    notes = bool(rows) and width >= lead + most + 22
    room = max(_MIN_BAR, width - lead - (22 if notes else 0))
    cells = min(_MAX_CELL, room // most)
    head = f"{'layer':>5}  {'experts':<{2 * digits + 4}}  "
    length = most * cells if cells else room
    lines = [head + " " * length + f"  {'at k':>8}  {'at 1':>8}" if notes else head.rstrip()]
    for il, (k, used) in enumerate(zip(planned, full)):
        if not used:
            continue
        if cells:
            bar = on * (k * cells) + off * ((used - k) * cells)
        else:  # more experts than columns
            filled, total = max(1, round(k / most * room)), max(1, round(used / most * room))
            bar = on * filled + off * (total - filled)
        line = f"{il:>5}  {k:>{digits}} of {used:>{digits}}  {bar:<{length}}"
        if notes:
            line += f"  {_signed(rows[il][k - 1] - rows[il][-1]):>8}  {_signed(rows[il][0] - rows[il][-1]):>8}"
        lines.append(line.rstrip())
    if notes:
        lines.append("")
        metric = report["profile"]["metric"]
        lines += textwrap.wrap(f"at k, at 1: {metric} beyond the layer's at its own number of experts", width)
    return lines


def _curve(report: dict) -> Iterator:
    curve = report["measured_curve"]
    if not curve:
        return
    yield f"perplexity on {curve['n_tokens']:,} tokens of {curve['source']}"
    yield f"  {'budget':>6}  {'experts':>7}  {'plan':>9}  {'uniform':>9}"
    for point in curve["points"]:
        plan = "-" if point["plan"] is None else f"{point['plan']:.2f}"
        yield f"  {share_text(point['budget']):>6}  {point['budget_total']:>7}  {plan:>9}  {point['uniform']:>9.2f}"


_HIT_RATES = (0.5, 0.75, 0.9, 0.95, 0.99)


def _routing(report: dict) -> Iterator:
    routing = report["routing"]
    if not routing:
        return
    yield f"local routing consistency on {routing['n_tokens']:,} tokens of {routing['source']} (mean over layers)"
    ratios = routing["cache_ratios"]
    yield f"  {'segment':>7}  {'SRP':>6}  {'size':>6}" + "".join(f"  {f'SCH {r:g}x':>8}" for r in ratios)
    mean = routing["mean"]
    for i, m in enumerate(routing["segment_lengths"]):
        hits = "".join(f"  {rate:>8.1%}" for rate in mean["sch"][i])
        yield f"  {m:>7}  {mean['srp'][i]:>6.1%}  {mean['size_ratio'][i]:>5.2f}x{hits}"
    yield ""
    yield "SRP", "how well one set of experts serves a segment of that many tokens (F1); size: that set's, in K"
    yield "SCH", "hit rate of a cache of 1, 1.5, ... times K experts that sees that many tokens ahead"
    yield ""
    yield "what an expert cache needs that keeps the experts used last (Llama(expert_cache=...)), on the same text"
    yield f"  {'at hand':>7}  {'experts':>7}  {'memory':>8}"
    model = report["model"]
    n_bytes = sum(entry["bytes"] for entry in model["types"]["experts"].values())
    for rate in _HIT_RATES:
        n = next((n for n, found in enumerate(mean["hit_rate"]) if found >= rate), None)
        if n is not None:
            share = n / model["experts"]
            # beside its slots, room for the rest of one layer
            need = n_bytes * (share + (1 - share) / len(routing["layers"]))
            yield f"  {rate:>7.0%}  {n:>7}  {_bytes(need):>8}"
    yield "experts", "of each layer that it holds; what is not at hand is read from the file"


def _count(n: int) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return str(n)


def _bytes(n: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n:.0f} B"


def _signed(value: float) -> str:
    return f"{value:+.3g}" if abs(value) < 1000 else f"{value:+,.0f}"

"""The measurements of allocmoe-inspect that run the model: perplexity against budget, and local routing consistency."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .. import Llama, Plan, parse_budget
from ..command import load_errors
from ..measure.perplexity import bos_token, perplexity, read_tokens, windows
from . import InspectError, routing

_SHARES = (0.25, 0.375, 0.5, 0.75, 1.0)


def add(report: dict, args: argparse.Namespace) -> None:
    """Runs the model of a report and puts what was asked for into its measured_curve and routing.

    Args:
        report: from `report.build`.
        args: of allocmoe-inspect; file, measure_curve, budgets, routing, tokens, ctx_size, threads, n_gpu_layers, n_cpu_moe.

    Raises:
        CommandError: there is no model with experts, llama.cpp cannot load it, or a text cannot be used.
        PlanError: a budget that the model cannot have.
    """
    if report["file"]["kind"] != "model":
        raise InspectError(f"{args.file}: a plan alone, without the model that it is for: nothing to measure")
    full = tuple(report["model"]["experts_per_token"])
    if not any(full):
        raise InspectError(f"{args.file}: a dense model: it has no experts to measure")
    least = sum(k > 0 for k in full)
    budgets = args.budgets or [max(round(share * sum(full)), least) for share in _SHARES]
    names = [budget for budget in budgets if isinstance(budget, str) and budget.strip().isalpha()]
    totals = {parse_budget(budget, sum(full), least) for budget in budgets if budget not in names}
    with load_errors(args.file):
        llm = Llama(
            args.file,
            n_ctx=args.ctx_size,
            n_batch=args.ctx_size,
            n_ubatch=min(args.ctx_size, 512),
            n_threads=args.threads,
            n_threads_batch=args.threads,
            n_gpu_layers=args.n_gpu_layers,
            n_cpu_moe=args.n_cpu_moe,
            verbose=False,
        )
    totals.update(map(llm.budget_total, names))  # which the plan in the file says
    if args.measure_curve:
        text = read_windows(llm, args.measure_curve, args.tokens, args.ctx_size)
        report["measured_curve"] = {
            "source": args.measure_curve.name,
            "n_tokens": text.size,
            "n_ctx": text.shape[1],
            "points": measured_curve(llm, text, sorted(totals), full),
        }
    if args.routing:
        text = read_windows(llm, args.routing, args.tokens, args.ctx_size)
        try:
            with tqdm(total=len(text), desc="routing", unit="window", disable=None, leave=False) as bar:
                experts = routing.record(llm, text, progress=bar.update)
        except ValueError as error:
            raise InspectError(f"{args.file}: this model's routing cannot be recorded: {error}") from None
        if experts is None:
            raise InspectError(f"{args.file}: routing can only be recorded where the model is on the CPU alone")
        with tqdm(total=sum(k > 0 for k in full), desc="consistency", unit="layer", disable=None, leave=False) as bar:
            found = routing.consistency(experts, report["model"]["experts"], progress=bar.update)
        report["routing"] = {"source": args.routing.name, "n_tokens": text.size, "n_ctx": text.shape[1], **found}


def measured_curve(llm: Llama, token_windows: np.ndarray, totals: list, full: tuple) -> list:
    """Perplexity at several budgets, of the plans from the file's profile and of uniform k.

    Args:
        token_windows: int32, shape [n_windows, n_ctx].
        totals: expert activations per token.
        full: K_l per layer.

    Returns:
        Dicts of budget_total, budget, plan (None for a file without a profile) and uniform. The plan of `llm` is left
        as it was set last.
    """
    profile = llm.stored.profile
    points, n_runs = [], 2 * len(totals) * len(token_windows)
    with tqdm(total=n_runs, desc="perplexity", unit="window", disable=None, leave=False) as bar:

        def under(plan: Plan) -> float:
            llm.set_plan(plan)
            return perplexity(llm, token_windows, progress=bar.update)

        for total in totals:
            uniform = Plan.uniform(full, total)
            point = {"budget_total": total, "budget": total / sum(full), "plan": None, "uniform": under(uniform)}
            if profile is not None:
                plan = profile.plan(total, full)
                # at full budget there is nothing to choose, and a profile may say uniform
                point["plan"] = point["uniform"] if total == sum(full) or plan == uniform else under(plan)
            points.append(point)
    return points


def read_windows(llm: Llama, path: Path, n_tokens: int, n_ctx: int) -> np.ndarray:
    """About n_tokens tokens in windows of n_ctx, spread evenly over a UTF-8 text file: int32, [n_windows, n_ctx].

    Raises:
        InspectError: the file cannot be read, is not text, or is shorter than a window.
    """
    try:
        tokens = read_tokens(llm, path)
    except ValueError as error:
        raise InspectError(str(error)) from None
    cut = windows(tokens, n_ctx, bos_token(llm))
    if not len(cut):
        raise InspectError(f"text {path}: {len(tokens)} tokens, want at least {n_ctx} (--ctx-size)")
    return cut[np.linspace(0, len(cut) - 1, min(max(1, n_tokens // n_ctx), len(cut))).astype(int)]

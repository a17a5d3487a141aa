#!/usr/bin/env python3
"""What fewer experts cost in quality: every method of spending a budget, in one runtime, at equal mean activations.

    python bench/quality model.gguf --text wiki.test.raw --calib gutenberg.txt enwik.txt -o build/quality-model

Writes table.md, plot.svg and result.json into the output folder, and the table to the terminal. Perplexity, divergence
(KL) from the full model and top-1 agreement are on windows spread over --text. Whatever a method calibrates is
calibrated on --calib, on places that share no sentence with --text, --repeats times on different places; without it, on
what the model writes, with as many seeds. "Recovered" is the share of uniform k's loss that a method wins back,
1 - ln(P/P_full) / ln(P_uniform/P_full) and 1 - KL/KL_uniform.

Every plan and cell is saved as it is measured: the same command goes on where it stopped. After a change of a method
in the program, name it with --again. With --tasks, accuracy on multiple-choice and last-word tasks.
"""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
import json
from pathlib import Path
import sys
from typing import Optional, Sequence

from allocmoe_edge import GGUFError, Llama, Plan, PlanError, __version__, parse_budget
from allocmoe_edge.bench import machine
from allocmoe_edge.convert import ConvertError, calibration
from allocmoe_edge.convert.checkpoint import Checkpoint, window_name
from allocmoe_edge.measure.cores import physical_cores
from allocmoe_edge.measure.perplexity import bos_token, read_tokens, windows
from allocmoe_edge.plan import metadata
from methods import METHODS, Setting, plan_path
import metrics
import numpy as np
import report
import tasks
import texts
from tqdm import tqdm

# the noise floor needs no more text: it is a few orders of magnitude below anything else
_FLOOR_WINDOWS = 2


def parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(prog="bench/quality", description=__doc__, formatter_class=raw)
    p.add_argument("model", type=Path, help="GGUF file in one piece")
    p.add_argument("--text", type=Path, required=True, help="UTF-8 text to evaluate on")
    p.add_argument(
        "--calib",
        type=Path,
        nargs="+",
        default=[],
        help="UTF-8 texts to calibrate on. Default: the model writes its own",
    )
    p.add_argument("-o", "--output", type=Path, required=True, help="folder for results and what is measured so far")
    p.add_argument("--budgets", type=float, nargs="+", default=[0.83, 0.67, 0.5, 0.33], help="shares beside 1.0")
    p.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="M", help=", ".join(METHODS))
    p.add_argument("--again", nargs="+", choices=METHODS, default=[], metavar="M", help="plan these anew")
    p.add_argument("--repeats", type=int, default=3, help="calibration samples. Default: 3")
    p.add_argument("--tokens", type=int, default=12288, help="tokens to evaluate on. Default: 12288")
    p.add_argument("--calib-tokens", type=int, default=4096, help="tokens in a calibration sample. Default: 4096")
    p.add_argument("--estimate-tokens", type=int, default=12288, help="tokens for ours' estimates. Default: 12288")
    p.add_argument("--isolated-tokens", type=int, help="fewer of them for the isolated profile, which needs many runs")
    p.add_argument("--ctx-size", type=int, default=512, help="tokens in a window. Default: 512")
    p.add_argument(
        "--decode-budgets",
        type=float,
        nargs="*",
        metavar="B",
        help="where methods that differ are run token by token. Default: all",
    )
    p.add_argument("--tasks", type=Path, nargs="+", default=[], help="JSON-lines files of tasks")
    p.add_argument("--task-items", type=int, default=200, help="items of each task. Default: 200")
    p.add_argument("--task-budgets", type=float, nargs="+", default=[0.5], help="budgets to run tasks at. Default: 0.5")
    p.add_argument("--task-methods", nargs="+", choices=METHODS, default=["uniform", "ours"], metavar="M")
    p.add_argument("--threads", type=int, default=physical_cores(), help="Default: physical cores")
    return p


def main(argv=None) -> int:
    args = parser().parse_args(argv)
    try:
        run(args)
    except (ConvertError, GGUFError, PlanError, ValueError) as error:
        print(f"bench/quality: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nbench/quality: interrupted; the same command goes on from {args.output / 'cells'}", file=sys.stderr)
        return 130
    return 0


def load(args: argparse.Namespace, n_batch: int) -> Llama:
    threads = dict(n_threads=args.threads, n_threads_batch=args.threads)
    llm = Llama(str(args.model), n_ctx=args.ctx_size, n_batch=n_batch, n_ubatch=n_batch, **threads, verbose=False)
    llm.set_plan(None)
    return llm


def run(args: argparse.Namespace) -> dict:
    """Measures what is missing, writes the results and returns them."""
    full = metadata.read(args.model).full
    if full is None or not any(full):
        raise PlanError(f"{args.model}: a dense model: it has no experts to leave out")
    n_moe = sum(k > 0 for k in full)
    totals = {budget: parse_budget(budget, sum(full), n_moe) for budget in args.budgets}
    if "uniform" not in args.methods:
        args.methods = ["uniform", *args.methods]
    args.output.mkdir(parents=True, exist_ok=True)
    with Checkpoint(args.output / "cells", args.model) as checkpoint:
        decoded = args.budgets if args.decode_budgets is None else args.decode_budgets
        models = {False: load(args, args.ctx_size), True: load(args, 1)}
        text = evaluation_windows(models[False], args)
        found, plans = [], {}
        for sample, path in enumerate(calibration_paths(args)):
            calib = calibration_windows(models[False], path, sample, args)
            setting = Setting(models[False], full, args.model, calib, path, sample, args)
            for method, budget, plan in planned(setting, totals, sample, checkpoint):
                # one sample is enough to show that it is plain top-k, and token by token is slow
                single = METHODS[method].decode and sample == 0 and budget in decoded
                for decode in (False, True) if single else (False,):
                    name = metrics.candidate_name((plan, decode))
                    plans[name] = (plan, decode)
                    found.append(dict(budget=budget, method=method, sample=sample, decode=decode, name=name))
        whole = (Plan.full(full), False)
        cells = metrics.measure(models, full, [whole, *plans.values()], text, checkpoint)
        floor = metrics.measure(models, full, [(whole[0], True)], text[:_FLOOR_WINDOWS], checkpoint)
        whole_cells = cells[metrics.candidate_name(whole)]
        summary = metrics.summary(whole_cells)
        result = {
            "model": args.model.name,
            "experts_per_token": list(full),
            "program": __version__,
            "machine": machine.describe(),
            "evaluation": {"text": args.text.name, "tokens": int(text.size), "ctx_size": args.ctx_size},
            "calibration": {
                "texts": [path.name for path in args.calib] or ["self-generated"],
                "tokens": args.calib_tokens,
                "isolated_tokens": args.isolated_tokens or args.calib_tokens,
                "samples": args.repeats,
            },
            "full": summary,
            "floor": metrics.summary(next(iter(floor.values()))),
            "rows": report.rows(found, cells, summary, totals),
            "text_noise": text_noise(found, cells, whole_cells),
            "plans": [{**entry, "plan": _stored(plans[entry["name"]][0])} for entry in found],
        }
        result["tasks"] = accuracy(models[False], args, full, found, plans, checkpoint)
    write(result, args.output)
    return result


def calibration_paths(args: argparse.Namespace) -> Sequence[Optional[Path]]:
    """Of a text for each calibration sample, or None where the model writes its own."""
    if not args.calib:
        return [None] * args.repeats
    # a quarter as many tokens again for the held-out check of allocmoe-convert, some to spare, and all that its windows are
    # pieces of
    n_tokens = int(max(args.calib_tokens, args.estimate_tokens) * 1.4 * calibration.n_pieces(args.ctx_size))
    return texts.samples(args.calib, args.text, n_tokens, args.repeats, args.output)


def calibration_windows(llm: Llama, path: Optional[Path], sample: int, args: argparse.Namespace) -> np.ndarray:
    """int32 windows, shape [n, n_ctx]: those that allocmoe-convert profiles on."""
    if path is not None:
        return calibration.from_file(llm, path, args.calib_tokens, args.ctx_size, args.estimate_tokens).profile
    # in allocmoe-convert's checkpoint, so that `ours` finds them
    with Checkpoint(args.output / f"self-generated-{sample}.plan.profile", args.model) as written:
        return calibration.self_generated(
            llm, args.calib_tokens, args.ctx_size, sample, written, args.estimate_tokens
        ).profile


def planned(setting: Setting, totals: dict, sample: int, checkpoint: Checkpoint):
    """(method, budget, Plan) for all that are asked for; plans are kept in the checkpoint."""
    args = setting.args
    text = f"{window_name(setting.calib.ravel())} {setting.calib.shape}"
    methods = [m for m in args.methods if METHODS[m].calibrated or sample == 0]
    with tqdm(total=len(methods) * len(totals), desc=f"plans, sample {sample}", unit="plan", disable=None) as bar:
        for method in methods:
            for budget, total in totals.items():
                isolated = f" {args.isolated_tokens}" if "paper" in method else ""
                key = f"plan {method} {total} on {text if METHODS[method].calibrated else 'nothing'}{isolated}"
                stored = None if method in args.again else checkpoint.get(key)
                if stored is None:
                    stored = _stored(METHODS[method].plan(setting, total))
                    checkpoint.put(key, stored)
                plan = Plan(**stored)
                if plan.token_rule == "estimate":
                    plan = replace(plan, estimator=metadata.read(plan_path(setting, method, total)).plan.estimator)
                yield method, budget, plan
                bar.update()


def _stored(plan: Plan) -> dict:
    values = {field.name: getattr(plan, field.name) for field in fields(plan) if field.name != "estimator"}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def evaluation_windows(llm: Llama, args: argparse.Namespace) -> np.ndarray:
    """int32 windows, shape [n, n_ctx], spread evenly over the evaluation text."""
    cut = windows(read_tokens(llm, args.text), args.ctx_size, bos_token(llm))
    wanted = max(1, args.tokens // args.ctx_size)
    if len(cut) < wanted:
        raise ValueError(f"text {args.text}: {len(cut)} windows of {args.ctx_size} tokens, want {wanted} (--tokens)")
    return calibration.spread(cut, wanted)


def text_noise(found: list, cells: dict, full: dict) -> list:
    """Standard errors of the recovered shares over the choice of evaluation windows, one dict for each plan."""
    uniform = {e["budget"]: _losses(cells[e["name"]], full) for e in found if e["method"] == "uniform"}
    noise = []
    for entry in found:
        own, base = _losses(cells[entry["name"]], full), uniform[entry["budget"]]
        errors = {}
        for what, (mine, theirs) in {what: (own[what], base[what]) for what in own}.items():
            errors[what] = metrics.text_noise(lambda i: metrics.recovery(mine[i].mean(), theirs[i].mean()), len(mine))
        noise.append({**{key: entry[key] for key in ("budget", "method", "sample", "decode")}, **errors})
    return noise


def _losses(cell: dict, full: dict) -> dict:
    """By window, in nats over the full model."""
    return {"perplexity": np.array(cell["nll"]) - np.array(full["nll"]), "kl": np.array(cell["mean_kl"])}


def accuracy(llm: Llama, args, full: tuple, found: list, plans: dict, checkpoint: Checkpoint) -> list:
    """A dict for each task and plan: the full model, and the first sample's plans of what was asked for."""
    chosen = {"full": Plan.full(full)}
    for e in found:
        wanted = e["method"] in args.task_methods and e["budget"] in args.task_budgets
        if wanted and e["sample"] == 0 and not e["decode"]:
            # a token rule that looks at other tokens would see those of the choices: as in decoding, it is off
            plan = plans[e["name"]][0]
            plan = replace(plan, token_rule="off", value="score") if plan.token_rule == "batch" else plan
            chosen[f"{METHODS[e['method']].title}, {e['budget']:g}"] = plan
    results = []
    for path in args.tasks:
        items = tasks.read(path, args.task_items, args.ctx_size, llm)
        with tqdm(total=len(items) * len(chosen), desc=path.stem, unit="item", disable=None) as bar:
            for name, plan in chosen.items():
                scores = []
                for item in items:
                    tokens = np.array(sum(item["continuations"], item["context"]), np.int32)
                    key = f"item {path.stem} {window_name(tokens)} {metrics.candidate_name((plan, False))}"
                    score = checkpoint.get(key)
                    if score is None:
                        llm.apply_plan(plan)
                        score = tasks.score(llm, item)
                        checkpoint.put(key, score)
                    scores.append(score)
                    bar.update()
                metric = tasks.main_metric(items[0])
                value = float(np.mean([score[metric] for score in scores]))
                error = tasks.standard_error(value, len(items))
                entry = dict(task=path.stem, plan=name, items=len(items), metric=metric, chance=tasks.chance(items))
                results.append({**entry, "accuracy": value, "standard_error": error})
    return results


def write(result: dict, folder: Path) -> None:
    markdown = report.table(result) + "\n\n" + report.noise_line(result) + "\n"
    if result["tasks"]:
        markdown += "\n" + report.task_table(result["tasks"]) + "\n"
    print(markdown)
    (folder / "table.md").write_text(markdown)
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    try:
        report.plot(result, folder / "plot.svg")
    except ImportError:
        print("no plot: it needs matplotlib (pip install '.[plot]')", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())

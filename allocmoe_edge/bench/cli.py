"""The command allocmoe-bench."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
import sys
import time
from typing import Dict, List, Optional, Sequence

import numpy as np

from .. import Llama, Plan, PlanError, __version__, output_file, parse_budget
from .._native import llama_cpp
from ..arguments import add_expert_cache, add_gpu, add_threads, check_gpu, check_miss_price, n_tokens, positive, seed
from ..command import load_errors, need_model, printable, run_command
from ..inspect import plot
from ..measure import memory
from ..measure.perplexity import read_text
from ..measure.traffic import WeightTraffic
from ..plan import TOKEN_RULES, share_text
from . import BenchError, machine, measure, report

_DESCRIPTION = """\
Measures what an activation budget buys on this machine: prefill and decode speed of a model at full budget and at each
of the budgets given, in turns on one loaded model, so that what else the machine does hits them alike."""

_EPILOG = """\
how to read it:
  x full        median over the rounds of this budget's speed into full budget's, which runs before and after it in
                every round; quartiles in brackets. In the line of full budget itself: its first run against its last,
                so the brackets show what the machine does to equal work. Differences within that mean nothing.
                With --stock it is x stock: what llama.cpp's own kernels do at full budget takes full budget's place.
  bytes allow   full budget's bytes of weights per token into this budget's: the limit where memory decides
  GB/s          bytes of weights read per second of decode, and their share of the bandwidth measured beforehand
  experts/token activations per token over all layers, as counted while measuring

examples:
  allocmoe-bench model-half.gguf
      full budget against the file's own plan
  allocmoe-bench model.gguf --budgets 0.67,0.5,0.33 --prompt 512 --depth 0,4096 --json bench.json --plot bench.png
      any model, also one that was never converted: every layer then gets the same share"""


# a text is read so far: no tokenizer needs more
_BYTES_PER_TOKEN = 16

_PREFETCH = {"auto": None, "on": True, "off": False}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="allocmoe-bench",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("model", type=Path, help="the model: a GGUF file with experts")
    p.add_argument(
        "--budgets",
        type=_names,
        metavar="LIST",
        help="budgets to compare with full budget, each a share (0.5, 50%%), a total of activations per token, or fast or "
        "balanced. "
        "Default: the plan in the file, or 0.5 if it has none",
    )
    p.add_argument("--token-rule", choices=TOKEN_RULES, help="for the budgets. Default: the file's")
    p.add_argument(
        "--stock",
        action="store_true",
        help="compare with llama.cpp's own CPU kernels at full budget, in a line of their own, instead of with full "
        "budget by ours",
    )
    p.add_argument(
        "--prompt",
        type=_lengths,
        default=[512],
        metavar="LIST",
        help="prompt lengths to time; 0 for none. Default: 512",
    )
    p.add_argument(
        "--depth", type=_lengths, default=[0], metavar="LIST", help="tokens before those that are generated. Default: 0"
    )
    p.add_argument("--gen", type=n_tokens, default=32, metavar="N", help="tokens to generate. Default: 32")
    p.add_argument("--repeats", type=positive, default=5, metavar="N", help="rounds. Default: 5")
    p.add_argument("--text", type=Path, metavar="FILE", help="text to evaluate, UTF-8. Default: random tokens")
    p.add_argument("--seed", type=seed, default=0, help="of the random tokens. Default: 0")
    add_threads(p)
    p.add_argument("--ubatch", type=positive, default=512, metavar="N", help="micro-batch, in tokens. Default: 512")
    add_gpu(p)
    p.add_argument(
        "--no-repack", action="store_true",
        help="leave the weights as the file has them: less memory, slower prefill; for models larger than memory",
    )  # fmt: skip
    p.add_argument(
        "--prefetch", choices=_PREFETCH, default="auto",
        help="read the experts that a layer has chosen from the file ahead of their use, with --no-repack. "
        "Default: auto, if the file is larger than the memory",
    )  # fmt: skip
    add_expert_cache(p)
    p.add_argument(
        "--flash-attn", action=argparse.BooleanOptionalAction, default=None,
        help="flash attention, or none. Default: where no layer is on a GPU",
    )  # fmt: skip
    p.add_argument(
        "--noise-limit", type=float, default=0.03, metavar="X",
        help="warn where full budget against itself differs by more. Default: 0.03",
    )  # fmt: skip
    p.add_argument("--json", type=Path, metavar="FILE", help="write everything, every single run included")
    p.add_argument("--csv", type=Path, metavar="FILE", help="write the table")
    p.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw speed against budget, as .png, .svg or .pdf (needs matplotlib)"
    )
    p.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    return p


def _names(text: str) -> List[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _lengths(text: str) -> List[int]:
    return [n_tokens(part) for part in _names(text)]


def main(argv: Optional[Sequence[str]] = None) -> int:
    return run_command(parser(), bench, argv)


def bench(args: argparse.Namespace) -> None:
    check_gpu(args)
    items = [measure.Item("prefill", n) for n in args.prompt if n]
    items += [measure.Item("decode", n, args.gen) for n in args.depth if args.gen]
    if not items:
        raise BenchError("nothing to measure: want a prompt length above 0, or tokens to generate and a depth")
    need_model(
        args.model, "allocmoe-bench takes a model that the plan is in, as allocmoe-convert writes without --plan-only"
    )
    _check_outputs(args)
    n_ctx = max(item.context for item in items)
    text = None
    if args.text:
        try:
            text = read_text(args.text)[: _BYTES_PER_TOKEN * n_ctx]
        except ValueError as error:
            raise BenchError(str(error)) from None
    bandwidth = machine.read_bandwidth(args.threads)
    memory.forget_peak()  # which is that measurement's
    start = time.perf_counter()
    with load_errors(args.model):
        llm = Llama(
            args.model, n_ctx=n_ctx, n_batch=max(args.ubatch, 512), n_ubatch=args.ubatch, n_threads=args.threads,
            n_threads_batch=args.threads, n_gpu_layers=args.n_gpu_layers, n_cpu_moe=args.n_cpu_moe,
            repack=not args.no_repack, prefetch=_PREFETCH[args.prefetch], expert_cache=args.expert_cache,
            miss_price=args.miss_price, flash_attn=args.flash_attn,
            verbose=False,
        )  # fmt: skip
    load_seconds = time.perf_counter() - start

    plans = configurations(llm, args.budgets, args.token_rule)
    check_miss_price(args, llm.expert_cache, [plan.token_rule for plan in plans.values()])
    if args.stock:
        plans = {measure.STOCK: plans["full"], **plans}
    tokens = _tokens(llm, text, n_ctx, args)
    traffic = WeightTraffic(args.model)
    result_head = {
        "allocmoe_edge": __version__,
        "llama_cpp_python": llama_cpp.__version__,
        "system_info": llama_cpp.llama_print_system_info().decode(),
        "model": {"path": str(args.model), "name": llm.metadata.get("general.name"), "bytes": traffic.total},
        "machine": machine.describe(),
        "workload": {
            "threads": args.threads, "ubatch": args.ubatch, "n_gpu_layers": llm.model_params.n_gpu_layers if args.n_gpu_layers is None else args.n_gpu_layers,
            "n_cpu_moe": args.n_cpu_moe, "repack": not args.no_repack, "prefetch": llm.prefetch,
            "expert_cache": llm.expert_cache,
            "miss_price": llm.miss_price,
            "flash_attn": llm.context_params.flash_attn_type != llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED, "repeats": args.repeats,
            "tokens": str(args.text) if args.text else f"random, seed {args.seed}",
        },
        "plans": {name: list(plan.expert_used_count) for name, plan in plans.items()},
        "load_seconds": load_seconds,
        "bandwidth_bytes_per_second": bandwidth,
    }  # fmt: skip
    print(_head(result_head), flush=True)

    stolen = machine.stolen_time()
    result = measure.run(llm, plans, items, args.repeats, tokens)
    found = report.rows(result, plans, traffic, bandwidth)
    complaints = report.warnings(found, args.noise_limit)
    after = machine.stolen_time()
    share = (after[0] - stolen[0]) / max(1, after[1] - stolen[1]) if stolen and after else None
    peak = memory.peak()
    whole = {
        **result_head,
        "peak_memory_bytes": peak,
        "stolen_cpu_share": share,
        "order": {str(item): order for item, order in result.order.items()},
        "results": found,
        "warnings": complaints,
    }
    print("\n" + report.table(found) + "\n")
    print(f"peak memory {report.gigabytes(peak)} (file: {report.gigabytes(traffic.total)}), energy "
          + ("in the table" if found[0]["joules_per_token"] else "not available")
          + ("" if share is None else f", CPU time taken by other virtual machines {share:.1%}"))  # fmt: skip
    for complaint in complaints:
        print(f"warning: {complaint}", file=sys.stderr)
    if args.json:
        report.write_json(args.json, whole)
    if args.csv:
        report.write_csv(args.csv, found)
    if args.plot:
        title = f"{args.model.name}, {result_head['machine']['cpu']}, {args.threads} threads"
        report.write_plot(args.plot, found, title)


def configurations(llm: Llama, budgets: Optional[Sequence[str]], token_rule: Optional[str]) -> Dict[str, Plan]:
    """The plans to compare by name, "full" first.

    Raises:
        PlanError: a dense model, a budget out of range, or a token rule that the file cannot serve.
    """
    stored = llm.stored
    if stored.full is None or not any(stored.full):
        raise PlanError(f"{llm.model_path}: a dense model: it has no experts to budget")
    llm.set_plan(None)
    full = llm.expert_used_count_full
    plans = {"full": Plan.full(full)}
    if budgets is None and stored.plan is not None:
        plans[f"{share_text(stored.plan.budget)} (file)"] = llm.set_budget(None, token_rule=token_rule)
    for budget in budgets if budgets is not None else () if stored.plan else ("0.5",):
        total = (
            llm.budget_total(budget) if budget.isalpha() else parse_budget(budget, sum(full), sum(k > 0 for k in full))
        )
        if total == sum(full):
            continue
        if stored.profile is not None:
            plans[budget] = llm.set_budget(total, token_rule=token_rule)
            continue
        plan = Plan.uniform(full, total)
        if token_rule in ("threshold", "estimate"):
            what = "a threshold table" if token_rule == "threshold" else "an estimator"
            raise PlanError(f"{llm.model_path}: token rule {token_rule!r} needs {what}: allocmoe-convert makes one")
        llm.set_plan(replace(plan, token_rule=token_rule or "off"))
        plans[budget] = llm.plan
    return plans


def _tokens(llm: Llama, text: Optional[bytes], n: int, args: argparse.Namespace) -> List[int]:
    if text is None:
        return np.random.default_rng(args.seed).integers(llm.n_vocab(), size=n).tolist()
    tokens = llm.tokenize(text, add_bos=True, special=False)
    if len(tokens) < n:
        raise BenchError(f"{args.text}: {len(tokens)} tokens, want {n}")
    return tokens[:n]


def _check_outputs(args: argparse.Namespace) -> None:
    """Refuses, before anything is measured, files that could not be written at the end."""
    inputs = [args.model, *([args.text] if args.text else [])]
    targets = [path for path in (args.json, args.csv, args.plot) if path]
    for path in targets:
        output_file.check(path, inputs)
    if args.plot:
        plot.check_target(args.plot, inputs, report.PLOT_SUFFIXES)
    # a device takes several
    files = [path.resolve() for path in targets if path.is_file() or not path.exists()]
    if len({*files}) < len(files):
        raise BenchError("--json, --csv, --plot: want different files")


def _head(head: dict) -> str:
    found, work = head["machine"], head["workload"]
    load = "" if found["load_average"] is None else f", load average {found['load_average']:.1f} at the start"
    return (
        f"allocmoe-edge {head['allocmoe_edge']} on llama.cpp of llama-cpp-python {head['llama_cpp_python']}\n"
        f"machine: {found['cpu']}, {found['logical_cpus']} logical CPUs, "
        f"memory {report.gigabytes(found['memory_bytes'])}, read at {head['bandwidth_bytes_per_second'] / 1e9:.1f} GB/s "
        f"by {work['threads']} threads{load}\n"
        f"model: {printable(head['model']['path'])} ({printable(str(head['model']['name']))}), {report.gigabytes(head['model']['bytes'])}, "
        f"loaded in {head['load_seconds']:.1f} s\n"
        f"workload: {work['threads']} threads, micro-batch {work['ubatch']}, GPU layers {work['n_gpu_layers']}"
        f"{', experts of the first ' + str(work['n_cpu_moe']) + ' on the CPU' if work['n_cpu_moe'] else ''}, "
        f"{'' if work['repack'] else 'weights not repacked, '}"
        f"{'experts prefetched, ' if work['prefetch'] else ''}"
        f"{'expert cache ' + report.gigabytes(work['expert_cache']) + ', miss price ' + format(work['miss_price'], 'g') + ', ' if work['expert_cache'] else ''}"
        f"flash attention {'on' if work['flash_attn'] else 'off'}, {work['repeats']} rounds, tokens: {work['tokens']}"
    )


if __name__ == "__main__":
    sys.exit(main())

"""The command allocmoe-convert."""

from __future__ import annotations

import argparse
from dataclasses import replace
import multiprocessing
from pathlib import Path
import sys
import time
from typing import Optional, Sequence

from allocmoe_edge import GGUFError, Llama, PlanError, __version__, parse_budget
from allocmoe_edge.arguments import add_n_cpu_moe, positive
from allocmoe_edge.measure import memory
from allocmoe_edge.plan import TOKEN_RULES, metadata

from . import ConvertError, calibration, checkpoint, choose, costs, estimate, output, sensitivity, source
from .checkpoint import Checkpoint

_DESCRIPTION = """\
Works out where a Mixture-of-Experts model needs its experts, and writes a copy of the model that spends a given
share of them: first it measures how much each layer suffers with fewer experts, on this very file, then it finds the
best plan for the budget, checks it on held-out text, and writes it into the new file's metadata. The tensors stay
byte for byte as they are; stock llama.cpp runs the new file at full budget. An interrupted run goes on where it was
when the same command is given again."""

_EPILOG = """\
examples:
  allocmoe-convert model.gguf --budget 0.5 -o model-half.gguf
      half of the expert activations; the calibration text is written by the model itself
  allocmoe-convert model.gguf --budget 0.5 --calib book.txt --calib-tokens 16384 -o model-half.gguf
      calibrated on a text of yours: better if it resembles what the model will read
  allocmoe-convert model-half.gguf --budget 0.35 -o model-third.gguf
      another budget, from the sensitivities stored in model-half.gguf: takes no new profile
  allocmoe-convert my-model/ --quantize Q4_K_M --budget 0.5 -o model-half.gguf
      from a Hugging Face folder, quantised on the way; a repository's id (org/name) does as well
  allocmoe-convert model.gguf --max-ppl-increase 3% -o model-fast.gguf
      the smallest budget that keeps perplexity on held-out text within 3% of the full model's
  allocmoe-convert model.gguf --target-tps 12 --plan-only -o plan.gguf
      the largest budget that decodes 12 tokens/s on this machine, as a small file for Llama(model, plan_path=...)"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="allocmoe-convert",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "model",
        type=Path,
        help="the model: a GGUF file of any quantisation, the first file of a split one, a Hugging Face folder, or the id "
        "of a repository there (org/name)",
    )
    p.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        help="the file to write; of a split model, its files, named after this",
    )
    p.add_argument(
        "--plan-only", action="store_true", help="write the plan alone, without the model, for Llama(plan_path=...)"
    )
    p.add_argument("--force", action="store_true", help="replace the output if it exists")

    spend = p.add_argument_group("how much to spend (one of these)").add_mutually_exclusive_group()
    spend.add_argument(
        "--budget",
        help="expert activations to spend: a share of the model's own (0.5, 50%%) or a total per token over all "
        "layers (96). Default: 0.5",
    )
    spend.add_argument(
        "--max-ppl-increase",
        type=_share,
        metavar="P",
        help="as little as keeps perplexity on held-out text within this share of the full model's (3%%, 0.03)",
    )
    spend.add_argument(
        "--target-tps",
        type=_positive_float,
        metavar="N",
        help="as much as still decodes N tokens/s on this machine, measured",
    )

    where = p.add_argument_group("where to spend it")
    where.add_argument(
        "--profile",
        choices=sensitivity.MODES,
        default="fast",
        help="how the layers' sensitivities are measured. fast: one run a layer, at half its experts, and the rest from "
        "the layer's own output errors; single: a run for every layer and count; isolated: the same with one expert "
        "in all later layers, as Alloc-MoE's authors do it. Default: fast",
    )
    where.add_argument(
        "--metric",
        choices=sensitivity.METRICS,
        default="kl",
        help="kl: divergence from the full model; perplexity: of the text, which needs more of it. Default: kl",
    )
    where.add_argument(
        "--cost",
        choices=("activations", "ms"),
        help="what the budget counts: expert activations, all alike, or milliseconds of decoding on this machine, "
        "measured for each kind of layer (quantisation, GPU or CPU). Default: activations; ms for --target-tps",
    )
    where.add_argument(
        "--token-rule",
        choices=TOKEN_RULES[::-1],
        help="how activations are shared among tokens. estimate: a token's experts run where what they would give is "
        "estimated to be large, and a low-rank estimate stands in for the others (CPU and CUDA; to calibrate it takes "
        "memory beside the model, which is printed); threshold: a token gets more where its routing scores are high and less "
        "where they are low; batch: the same by ranking each micro-batch, which does nothing for single tokens; off: the "
        "same number for all. Default: estimate, threshold or off, whichever does best on held-out text",
    )
    where.add_argument(
        "--k-base", type=positive, default=1, metavar="N", help="experts that every token keeps. Default: 1"
    )
    where.add_argument(
        "--reprofile", action="store_true", help="measure again although the input carries sensitivities"
    )

    text = p.add_argument_group("calibration text")
    text.add_argument(
        "--calib",
        type=Path,
        metavar="FILE",
        help="UTF-8 text, best of many subjects: of a long one, windows are put together of short pieces from all over it. "
        "Default: the model writes its own, at its decode speed",
    )
    text.add_argument(
        "--calib-tokens",
        type=positive,
        default=4096,
        metavar="N",
        help="tokens to profile on; a quarter as many again check the plan. More is slower and less noisy. Default: 4096",
    )
    text.add_argument(
        "--estimate-tokens",
        type=positive,
        default=12288,
        metavar="N",
        help="tokens to calibrate token rule estimate on, of which --calib-tokens are profiled on too; what --calib has, if "
        "that is less. A quarter as many again are held out. Two or three passes over them; ten times as many pay where the "
        "model loses much. Default: 12288",
    )
    text.add_argument("--ctx-size", type=positive, default=512, metavar="N", help="tokens per window. Default: 512")
    text.add_argument("--seed", type=int, default=0, help="for the text that the model writes. Default: 0")

    source.add_arguments(p)
    machine = p.add_argument_group("machine")
    machine.add_argument(
        "--threads", type=positive, default=multiprocessing.cpu_count(), metavar="N", help="default: all cores"
    )
    machine.add_argument(
        "--n-gpu-layers", type=int, default=0, metavar="N", help="layers on the GPU, -1 for all. Default: 0"
    )
    add_n_cpu_moe(machine)
    p.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    return p


def _positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: want a number above 0")
    return value


def _share(text: str) -> float:
    value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: want a share of at least 0, like 3% or 0.03")
    return value


def main(argv: Optional[Sequence[str]] = None) -> int:
    args = parser().parse_args(argv)
    try:
        convert(args)
    except (ConvertError, GGUFError, PlanError) as error:
        print(f"allocmoe-convert: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nallocmoe-convert: interrupted, no output was written", file=sys.stderr)
        if _checkpoint_path(args).exists():
            print(
                f"  what was measured is in {_checkpoint_path(args)}; the same command goes on from there",
                file=sys.stderr,
            )
        return 130
    return 0


def convert(args: argparse.Namespace) -> None:
    with source.as_gguf(args) as gguf:
        model = metadata.read(gguf.path)
        if model.full is None or not any(model.full):
            raise ConvertError(f"{args.model}: a dense model: it has no experts to allocate")
        if model.side_file and not args.plan_only:
            raise ConvertError(f"{args.model}: has a plan and no model: only --plan-only can write from it")
        profile, plan = _planned(args, gguf.path, model)
        if args.plan_only:
            written = [output.write_side_file(args.output, model, plan, profile)]
        else:
            written = output.write_planned(gguf.path, args.output, plan, profile, consume=gguf.temporary)
    checkpoint.remove(_checkpoint_path(args))
    print(f"wrote {written[0]}" + (f" and {len(written) - 1} more" if written[1:] else ""))
    uniform = profile.allocation == "uniform" and plan.token_rule != "estimate"
    print(f"  {plan}" + (" (uniform)" if uniform else ""))
    print(f"  experts per layer: {' '.join(map(str, plan.expert_used_count))}")


def _planned(args: argparse.Namespace, path: Path, model: metadata.ModelPlan) -> tuple:
    """(Profile, Plan), from the file's sensitivities if they will do, else measured."""
    full = model.full
    total = parse_budget(args.budget or "0.5", sum(full), sum(k > 0 for k in full))
    # sensitivities are those of the weights that they were measured on
    stored = None if args.calib or args.reprofile or args.quantize else model.profile
    if stored is not None:
        _say(f"using the sensitivities in {args.model} (measured on {stored.calibration.source})")
        known = args.token_rule != "estimate" or stored.estimator is not None
        if (
            known
            and args.max_ppl_increase is None
            and args.target_tps is None
            and args.cost in (None, stored.cost_unit)
        ):
            profile = replace(stored, held_out=None)
            return profile, profile.plan(total, full, args.token_rule)
    if model.side_file:
        raise ConvertError(
            f"{args.model}: has sensitivities and no model, and this needs the model; give the model's file"
        )
    return measure(args, path, full, total, stored)


def measure(args: argparse.Namespace, path: Path, full: tuple, total: int, stored: Optional[metadata.Profile]) -> tuple:
    """(Profile, Plan) by running the model; its sensitivities are measured unless `stored` has them."""
    llm = _load(args, path)
    with Checkpoint(_checkpoint_path(args), path) as results:
        if results.restarted:
            _say(f"{results.path} was of another model: measuring anew")
        calibrated = stored is not None and stored.estimator is not None
        n_fit = args.estimate_tokens if _tries_estimates(args, full, total) and not calibrated else 0
        if args.calib is not None:
            text = calibration.from_file(llm, args.calib, args.calib_tokens, args.ctx_size, n_fit)
        else:
            _say("the model writes its own calibration text (--calib FILE gives it one)")
            text = calibration.self_generated(llm, args.calib_tokens, args.ctx_size, args.seed, results, n_fit)
        profile = stored or _profile(args, llm, full, text, results)

        decoded = text.held_out.ravel()
        if args.cost == "ms" or args.target_tps is not None:
            cost = costs.measure(llm, full, decoded)
            profile = replace(profile, cost=cost.activation_ms, cost_unit="ms")
            _say(
                f"decoding takes {cost.decode_ms(full):.1f} ms a token at full budget, {cost.fixed_ms:.1f} ms of it not experts"
            )
        elif args.cost == "activations":
            profile = replace(profile, cost=(1.0,) * len(full), cost_unit="activations")
        if args.target_tps is not None:
            total = costs.largest_total(cost, full, args.target_tps)
        profile = replace(profile, estimator=_estimator(args, llm, profile, full, total, text, results))
    if args.max_ppl_increase is not None:
        _say(f"looking for the smallest budget within {args.max_ppl_increase:.1%} of the full model's perplexity")
        total = choose.smallest_total(llm, profile, full, text, args.max_ppl_increase)

    limit = {} if args.max_ppl_increase is None else {"max_increase": args.max_ppl_increase}
    choice = choose.choose(llm, profile, total, full, text, args.token_rule, **limit)
    _say("on held-out text:  perplexity  divergence (nats)  activations")
    for name, score in choice.found.items():
        _say(f"  {score.perplexity:26.3f}  {score.kl:17.4f}  {score.spent:11.0f}  {name}")
    if choice.plan.token_rule == "estimate":
        if choice.profile.held_out.kl_plan > choice.profile.held_out.kl_uniform:
            _say("this plan does worse than uniform k on held-out text; it is written because --token-rule asks for it")
    elif choice.profile.allocation == "uniform":
        _say(
            "Alloc-L's plan does not beat uniform k on held-out text, so the uniform plan is written; more calibration text "
            "(--calib, --calib-tokens) gives a better profile"
        )
    if args.target_tps is not None:
        _say(f"measured with this plan: {1000 / costs.decode_ms(llm, choice.plan, decoded):.1f} tokens/s")
    return choice.profile, choice.plan


def _profile(
    args, llm: Llama, full: tuple, text: calibration.CalibrationText, checkpoint: Checkpoint
) -> metadata.Profile:
    passes = sensitivity.n_passes(full, args.profile)
    windows = f"{len(text.profile)} windows of {args.ctx_size} tokens"
    _say(f"profiling ({args.profile}, {args.metric}) on {text.source.source}: {passes} passes over {windows}")
    start = time.monotonic()
    rows, reused = sensitivity.measure(llm, full, text.profile, args.profile, args.metric, checkpoint)
    _say(
        f"profiled in {time.monotonic() - start:.0f} s" + (f", {reused} cells of it measured before" if reused else "")
    )
    return metadata.Profile(
        rows, (1.0,) * len(full), text.source, metric=args.metric, mode=args.profile, k_base=args.k_base
    )


def _tries_estimates(args: argparse.Namespace, full: tuple, total: int) -> bool:
    """Whether token rule "estimate" is asked for, or among those to be tried and possible at this budget."""
    possible = sum(min(k, args.k_base) for k in full) <= total < sum(full)
    return args.token_rule == "estimate" or (args.token_rule is None and possible)


def _estimator(args, llm: Llama, profile: metadata.Profile, full: tuple, total: int, text, checkpoint: Checkpoint):
    """The profile's Estimator or a new one, if estimates are to be tried and there is memory for them; else None."""
    if not _tries_estimates(args, full, total):
        return None
    if profile.estimator is not None:
        return profile.estimator
    asked = args.token_rule == "estimate"
    needed, free = estimate.memory(full, llm, text.fit.shape), memory.available()
    if not asked and free is not None and needed > free:
        _say(
            f"estimates of experts are not tried: to calibrate them takes {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB "
            "are free (--token-rule estimate tries them all the same)"
        )
        return None
    _say(f"calibrating estimates of experts on {text.fit.size} tokens, {needed / 1e9:.1f} GB beside the model")
    # at full budget nothing is skipped to learn from
    at = total if total < sum(full) else parse_budget("0.5", sum(full), sum(k > 0 for k in full))
    found = estimate.calibrate(llm, profile, at, full, text.fit, text.spend, checkpoint=checkpoint)
    if found is None:
        message = "token rule estimate: this model, or the backend that it runs on, cannot leave out single experts of a token"
        if asked:
            raise ConvertError(message)
        _say(message)
    return found


def _load(args: argparse.Namespace, path: Path) -> Llama:
    try:
        llm = Llama(
            str(path),
            n_ctx=args.ctx_size,
            n_batch=args.ctx_size,
            # a window in one piece, so that a run can start at a later layer
            n_ubatch=args.ctx_size,
            n_threads=args.threads,
            n_threads_batch=args.threads,
            n_gpu_layers=args.n_gpu_layers,
            n_cpu_moe=args.n_cpu_moe,
            seed=args.seed,
            verbose=False,
        )
    except ValueError as error:
        raise ConvertError(f"{args.model}: llama.cpp cannot load it: {error}") from None
    llm.set_plan(None)
    return llm


def _checkpoint_path(args: argparse.Namespace) -> Path:
    return args.output.with_name(args.output.name + ".profile")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

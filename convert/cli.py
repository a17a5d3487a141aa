"""The command allocmoe-convert."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Optional, Sequence

from allocmoe_edge import GGUFError, Llama, PlanError, __version__, metadata, parse_budget
from allocmoe_edge.perplexity import perplexity
from allocmoe_edge.plan import TOKEN_RULES

from . import ConvertError, calibration, output, sensitivity, source, thresholds

_DESCRIPTION = """\
Works out where a Mixture-of-Experts model needs its experts, and writes a copy of the model that spends a given
share of them: first it measures how much each layer suffers with fewer experts (perplexity on calibration text, on
this very file), then it finds the best plan for the budget, then it writes the plan into the new file's metadata.
The tensors stay byte for byte as they are; stock llama.cpp runs the new file at full budget."""

_EPILOG = """\
examples:
  allocmoe-convert model.gguf --budget 0.5 -o model-half.gguf
      half of the expert activations; the calibration text is written by the model itself
  allocmoe-convert model.gguf --budget 0.5 --calib book.txt --calib-tokens 16384 -o model-half.gguf
      calibrated on a text of yours: better if it resembles what the model will read
  allocmoe-convert model-half.gguf --budget 0.35 -o model-third.gguf
      another budget, from the sensitivities stored in model-half.gguf: takes no new profile
  allocmoe-convert my-model/ --quantize Q4_K_M --budget 0.5 -o model-half.gguf
      from a Hugging Face folder, quantised on the way; a repository's id (org/name) does as well"""


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
    p.add_argument("-o", "--output", type=Path, required=True, help="the file to write; of a split model, its files, named after this")
    p.add_argument(
        "--budget",
        default="0.5",
        help="expert activations to spend: a share of the model's own (0.5, 50%%) or a total per token over all "
        "layers (96). Default: 0.5",
    )
    p.add_argument(
        "--token-rule",
        choices=TOKEN_RULES[::-1],
        help="how a layer's activations are shared among tokens. threshold: a token gets more where its routing scores "
        "are high and less where they are low, from thresholds calibrated on the same text; batch: the same by ranking "
        "each micro-batch, which does nothing for single tokens; off: the same number for all. Default: "
        "threshold or off, whichever does better on held-out text",
    )
    p.add_argument("--k-base", type=_positive, default=1, metavar="N", help="experts that every token keeps. Default: 1")
    p.add_argument("--calib", type=Path, metavar="FILE", help="calibration text, UTF-8. Default: the model writes its own")
    p.add_argument(
        "--calib-tokens",
        type=_positive,
        default=4096,
        metavar="N",
        help="tokens to profile on; a quarter as many again check the plan. More is slower and less noisy. Default: 4096",
    )
    p.add_argument("--ctx-size", type=_positive, default=512, metavar="N", help="tokens per window. Default: 512")
    p.add_argument("--seed", type=int, default=0, help="for the text that the model writes. Default: 0")
    p.add_argument("--reprofile", action="store_true", help="measure again although the input carries sensitivities")
    p.add_argument("--force", action="store_true", help="replace the output if it exists")
    p.add_argument("--threads", type=_positive, default=multiprocessing.cpu_count(), metavar="N", help="default: all cores")
    p.add_argument("--n-gpu-layers", type=int, default=0, metavar="N", help="layers to put on the GPU, -1 for all. Default: 0")
    source.add_arguments(p)
    p.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    return p


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: want a whole number of at least 1")
    return value


def main(argv: Optional[Sequence[str]] = None) -> int:
    args = parser().parse_args(argv)
    try:
        convert(args)
    except (ConvertError, GGUFError, PlanError) as error:
        print(f"allocmoe-convert: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nallocmoe-convert: interrupted, nothing was written", file=sys.stderr)
        return 130
    return 0


def convert(args: argparse.Namespace) -> None:
    with source.as_gguf(args) as gguf:
        model = metadata.read(gguf.path)
        if model.full is None or not any(model.full):
            raise ConvertError(f"{args.model}: a dense model: it has no experts to allocate")
        total = parse_budget(args.budget, sum(model.full), sum(k > 0 for k in model.full))

        # sensitivities are those of the weights that they were measured on
        if model.profile is not None and args.calib is None and not args.reprofile and args.quantize is None:
            _say(f"planning from the sensitivities in {args.model} (measured on {model.profile.calibration.source})")
            profile, plan = model.profile, model.profile.plan(total, model.full, args.token_rule)
        else:
            profile, plan = measure(args, gguf.path, model.full, total)

        written = output.write_planned(gguf.path, args.output, plan, profile, consume=gguf.temporary)
    print(f"wrote {written[0]}" + (f" and {len(written) - 1} more" if written[1:] else ""))
    print(f"  {plan}" + (" (uniform)" if profile.allocation == "uniform" else ""))
    print(f"  experts per layer: {' '.join(map(str, plan.expert_used_count))}")


def measure(args: argparse.Namespace, path: Path, full: tuple, total: int) -> tuple:
    """Profile and plan of a model that carries neither: (Profile, Plan)."""
    try:
        llm = Llama(
            str(path),
            n_ctx=args.ctx_size,
            n_batch=args.ctx_size,
            n_ubatch=min(args.ctx_size, 512),
            n_threads=args.threads,
            n_threads_batch=args.threads,
            n_gpu_layers=args.n_gpu_layers,
            seed=args.seed,
            verbose=False,
        )
    except ValueError as error:
        raise ConvertError(f"{args.model}: llama.cpp cannot load it: {error}") from None
    llm.set_plan(None)

    if args.calib is not None:
        text = calibration.from_file(llm, args.calib, args.calib_tokens, args.ctx_size)
    else:
        _say("the model writes its own calibration text (--calib FILE gives it one)")
        text = calibration.self_generated(llm, args.calib_tokens, args.ctx_size, args.seed)

    passes = sensitivity.n_passes(full)
    _say(f"profiling on {text.profile.size} tokens ({text.source.source}): {passes} passes")
    start = time.monotonic()
    rows = sensitivity.isolated(llm, full, text.profile)
    _say(f"profiled in {time.monotonic() - start:.0f} s")

    profile = metadata.Profile(rows, (1.0,) * len(full), text.source, k_base=args.k_base)
    return choose(llm, profile, total, full, text, args.token_rule)


def choose(
    llm: Llama, profile: metadata.Profile, total: int, full: tuple, text: calibration.CalibrationText, token_rule: Optional[str]
) -> tuple:
    """The best of Alloc-L's plan and uniform k, with and without thresholds, on text that the profile has not seen."""
    llm.set_plan(None)
    found = {"full budget": (perplexity(llm, text.held_out), None, None)}
    for allocation in ("alloc-l", "uniform"):
        candidate = replace(profile, allocation=allocation)
        plan = candidate.plan(total, full, "off")
        rules = [token_rule] if token_rule else ["off"]
        if token_rule in (None, "threshold"):
            table = thresholds.calibrate(llm, plan, text.profile)
            if table is not None:
                candidate = replace(candidate, threshold_table=table)
                rules = [token_rule] if token_rule else ["off", "threshold"]
        for rule in rules:
            candidate = replace(candidate, token_rule=rule)
            plan = candidate.with_token_rule(plan)
            llm.set_plan(plan)
            llm.expert_stats(reset=True)
            value = perplexity(llm, text.held_out)
            spent = llm.expert_stats()["prefill"]["mean"].sum()
            found[f"{allocation}, token rule {rule}: {spent:.0f} of {total} activations"] = (value, candidate, plan)
    _say("perplexity on held-out text:")
    for name, (value, *_) in found.items():
        _say(f"  {value:10.2f}  {name}")
    del found["full budget"]
    _, best, plan = min(found.values(), key=lambda entry: entry[0])
    if best.allocation == "uniform":
        _say(
            "Alloc-L's plan loses to uniform k on held-out text, so the uniform plan is written; more calibration text "
            "(--calib, --calib-tokens) gives a better profile"
        )
    return best, plan


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

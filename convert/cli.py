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
from allocmoe_edge.gguf_file import GGUFFile
from allocmoe_edge.perplexity import perplexity
from allocmoe_edge.plan import TOKEN_RULES

from . import ConvertError, calibration, output, sensitivity, thresholds

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
      another budget, from the sensitivities stored in model-half.gguf: takes no new profile"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="allocmoe-convert",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("model", type=Path, help="the model: a GGUF file, of any quantisation")
    p.add_argument("-o", "--output", type=Path, required=True, help="the file to write")
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
        print("\nallocmoe-convert: interrupted, no output was written", file=sys.stderr)
        kept = _checkpoint_path(args.output)
        if kept.exists():
            print(f"  what was measured is in {kept}: the same command goes on from there", file=sys.stderr)
        return 130
    return 0


def convert(args: argparse.Namespace) -> None:
    if args.model.is_dir():
        raise ConvertError(f"{args.model}: is a folder; this version converts GGUF files")
    model = metadata.read(args.model)
    if model.full is None or not any(model.full):
        raise ConvertError(f"{args.model}: a dense model: it has no experts to allocate")
    total = parse_budget(args.budget or "0.5", sum(model.full), sum(k > 0 for k in model.full))
    output.check_target(args.model, args.output, args.force)
    _refuse_split(args.model)

    targets = args.max_ppl_increase is not None or args.target_tps is not None
    stored = None if args.calib or args.reprofile else model.profile
    if stored is not None and not targets and args.cost in (None, stored.cost_unit):
        _say(f"planning from the sensitivities in {args.model} (measured on {stored.calibration.source})")
        profile = replace(stored, held_out=None)
        plan = profile.plan(total, model.full, args.token_rule)
    else:
        profile, plan = measure(args, model.full, total, stored)

    if args.plan_only:
        output.write_side_file(args.output, model, plan, profile)
    else:
        output.write_planned(args.model, args.output, plan, profile)
    _checkpoint_path(args.output).unlink(missing_ok=True)
    print(f"wrote {args.output}")
    print(f"  {plan}" + (" (uniform)" if profile.allocation == "uniform" else ""))
    print(f"  experts per layer: {' '.join(map(str, plan.expert_used_count))}")

"""The command allocmoe-convert."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
import sys
from typing import Optional, Sequence

from allocmoe_edge import __version__
from allocmoe_edge.arguments import add_gpu, add_threads, check_gpu, context_size, positive, seed, speed
from allocmoe_edge.command import printable, run_command
from allocmoe_edge.plan import TOKEN_RULES

from . import checkpoint, huggingface, pipeline, quantize, sensitivity
from .settings import CALIB_TOKENS, CALIB_TOKENS_ALONE, Settings, checkpoint_path

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

# of an increase of perplexity: more than any budget costs
_MOST_PERCENT = 1e6


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        # what is not given is not there: `Settings` has the defaults
        argument_default=argparse.SUPPRESS,
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
        type=speed,
        metavar="N",
        help="as much as still decodes N tokens/s on this machine, measured",
    )

    where = p.add_argument_group("where to spend it")
    where.add_argument(
        "--profile",
        choices=sensitivity.MODES,
        help="how the layers' sensitivities are measured. fast: one run a layer, at half its experts, and the rest from "
        "the layer's own output errors; single: a run for every layer and count; isolated: the same with one expert "
        "in all later layers, as Alloc-MoE's authors do it. Default: fast",
    )
    where.add_argument(
        "--metric",
        choices=sensitivity.METRICS,
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
        "estimated to be large, and a low-rank estimate stands in for the others (CPU, CUDA and Vulkan; to calibrate it "
        "takes memory beside the model, which is printed); threshold: a token gets more where its routing scores are high and less "
        "where they are low; batch: the same by ranking each micro-batch, which does nothing for single tokens; off: the "
        "same number for all. Default: estimate, threshold or off, whichever does best on held-out text",
    )
    where.add_argument(
        "--k-base",
        type=positive,
        metavar="N",
        help="experts that every token always keeps, in layers planned with at least that many. Plans give no layer fewer if "
        "the budget allows it (uniform k may). Default: 1",
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
        metavar="N",
        help="tokens to profile on; as many again check the plan, where there are as many. More is slower and less noisy. "
        f"Default: {CALIB_TOKENS}, and {CALIB_TOKENS_ALONE} where no estimates are tried",
    )
    text.add_argument(
        "--estimate-tokens",
        type=positive,
        metavar="N",
        help="tokens to calibrate token rule estimate on, of which --calib-tokens are profiled on too; what --calib has, if "
        "that is less. A quarter as many again are held out. Two or three passes over them; ten times as many pay where the "
        "model loses much. Default: 12288",
    )
    text.add_argument("--ctx-size", type=context_size, metavar="N", help="tokens per window. Default: 512")
    text.add_argument("--seed", type=seed, help="for the text that the model writes. Default: 0")

    group = p.add_argument_group("input from elsewhere, and quantisation")
    group.add_argument(
        "--outtype",
        choices=huggingface.OUTTYPES,
        help="number format for a Hugging Face model. Default: auto, the 16-bit one that it has",
    )
    group.add_argument(
        "--quantize",
        type=_ftype,
        metavar="TYPE",
        help="quantise the model first, to Q4_K_M or any other type of llama.cpp's, so that the plan is measured on "
        "what will run. A split input becomes one file",
    )
    group.add_argument(
        "--imatrix", type=Path, metavar="FILE", help="importance matrix for --quantize: a GGUF file from llama-imatrix"
    )
    group.add_argument(
        "--allow-requantize", action="store_true", help="let --quantize take tensors that are quantised already"
    )
    group.add_argument(
        "--pre-tokenizer",
        metavar="NAME",
        help="for a Hugging Face model whose pre-tokenizer llama.cpp's converter does not recognise: the one to use, "
        "for example gpt-2",
    )
    machine = p.add_argument_group("machine")
    add_threads(machine)
    add_gpu(machine)
    p.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    return p


def _share(text: str) -> float:
    percent = text.endswith("%")
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = float("nan")
    if not 0.0 <= value <= _MOST_PERCENT:
        raise argparse.ArgumentTypeError(f"{text[:40]}: want a share like 3% or 0.03, at most {_MOST_PERCENT:.0f}%")
    if value >= 1 and not percent:
        raise argparse.ArgumentTypeError(
            f"{text[:40]}: want a share below 1, or per cent with their sign: {value:g} per cent are written {value:g}%"
        )
    return value * 0.01 if percent else value


def _ftype(text: str) -> str:
    try:
        return quantize.ftype(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def settings(args: argparse.Namespace) -> Settings:
    """Of what `parser` has parsed."""
    options = {name: value for name, value in vars(args).items() if name != "debug"}
    given = frozenset(options) - {"threads", "n_gpu_layers", "n_cpu_moe"}  # which have their defaults here
    return Settings(**options, given=given)


def main(argv: Optional[Sequence[str]] = None) -> int:
    before: dict = {}
    return run_command(
        parser(), functools.partial(_convert, before), argv, interrupted=functools.partial(_left_behind, before)
    )


def _convert(before: dict, args: argparse.Namespace) -> None:
    before["output"] = _stamp(args.output)
    check_gpu(args)
    done = pipeline.convert(settings(args))
    paths, plan = done.paths, done.plan
    print(f"wrote {printable(str(paths[0]))}" + (f" and {len(paths) - 1} more" if paths[1:] else ""))
    uniform = done.profile.allocation == "uniform" and plan.token_rule != "estimate"
    print(f"  {plan}" + (" (uniform)" if uniform else ""))
    if not done.checked:
        print(
            "  planned from stored sensitivities, not checked on held-out text (--reprofile or --calib FILE checks it)"
        )
    print(f"  experts per layer: {' '.join(map(str, plan.expert_used_count))}")


def _stamp(path: Path) -> Optional[tuple]:
    """What tells that a file has been replaced; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def _left_behind(before: dict, args: argparse.Namespace) -> str:
    kept = checkpoint_path(args.output)
    now = _stamp(args.output)
    if now is not None and now != before.get("output", now):
        checkpoint.remove(kept)
        return f"{args.output} was written"
    if not kept.exists():
        return "no output was written"
    return f"no output was written; what was measured is in {kept}, and the same command goes on from there"


if __name__ == "__main__":
    sys.exit(main())

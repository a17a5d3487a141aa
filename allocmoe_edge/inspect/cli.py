"""The command allocmoe-inspect."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
import shutil
import sys
from typing import Optional, Sequence

from .. import __version__
from ..arguments import add_gpu, add_threads, check_gpu, context_size, positive
from ..command import run_command
from . import InspectError, report, text

_DESCRIPTION = """\
Shows what a GGUF file holds: the model, the plan for its expert activations, what the plan saves and what it was made
from. Reads the metadata and the tensor table only, so that a file of any size takes a moment; --measure-curve and
--routing run the model."""

_EPILOG = """\
examples:
  allocmoe-inspect model-half.gguf
  allocmoe-inspect model-half.gguf --json | jq .plan.bytes_per_token.share
  allocmoe-inspect model-half.gguf --plot plan.html --measure-curve book.txt
      sensitivities, experts per layer, and perplexity against budget as measured on a text
  allocmoe-inspect model.gguf --routing book.txt
      does the model suit expert offloading? how often neighbouring tokens use the same experts"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="allocmoe-inspect",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("file", type=Path, help="a GGUF file: a model (the first file of a split one), or a plan alone")
    p.add_argument("--json", action="store_true", help="everything known about the file, as JSON")
    p.add_argument(
        "--plot",
        type=Path,
        metavar="OUT",
        help="write figures to OUT.png, OUT.svg or OUT.html (one page without references to other files); needs the "
        "extra 'plot'. Replaces OUT if it exists",
    )
    run = p.add_argument_group("measurements that run the model")
    run.add_argument("--measure-curve", type=Path, metavar="TEXT", help="perplexity on a UTF-8 text at several budgets")
    run.add_argument(
        "--budgets",
        type=lambda value: value.split(","),
        metavar="LIST",
        help="for --measure-curve, each a share, a total, or fast, balanced or full. Default: 25%%,37.5%%,50%%,75%%,100%%",
    )
    run.add_argument(
        "--routing",
        type=Path,
        metavar="TEXT",
        help="local routing consistency (Liang et al., arXiv 2505.16056) at full budget on a UTF-8 text",
    )
    run.add_argument("--tokens", type=positive, default=4096, metavar="N", help="tokens of TEXT to use. Default: 4096")
    run.add_argument("--ctx-size", type=context_size, default=512, metavar="N", help="tokens per window. Default: 512")
    add_threads(run)
    add_gpu(run)
    p.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    return p


def main(argv: Optional[Sequence[str]] = None) -> int:
    return run_command(parser(), lambda args: print(inspect(args), end="", flush=True), argv)


def _check_measurements(args: argparse.Namespace) -> None:
    """Refuses options of measurements that are not made."""
    if args.budgets and not args.measure_curve:
        raise InspectError("--budgets: has no effect without --measure-curve")
    if not (args.measure_curve or args.routing):
        defaults = parser()
        for name in ("tokens", "ctx_size", "threads", "n_gpu_layers", "n_cpu_moe"):
            if getattr(args, name) != defaults.get_default(name):
                option = f"--{name.replace('_', '-')}"
                raise InspectError(f"{option}: has no effect without --measure-curve or --routing")
    check_gpu(args)


def inspect(args: argparse.Namespace) -> str:
    """Does what the arguments say; returns what is to be printed."""
    _check_measurements(args)
    if args.plot:
        from . import plot

        plot.check_target(args.plot, filter(None, (args.file, args.measure_curve, args.routing)))
    found = report.build(args.file, curve=args.json or bool(args.plot))
    if args.measure_curve or args.routing:
        from . import measure

        measure.add(found, args)
    if args.plot:
        plot.write(found, args.plot)
    if args.json:
        return json.dumps(found, indent=1, allow_nan=False) + "\n"
    encoding = (getattr(sys.stdout, "encoding", None) or "ascii").lower()
    return text.render(found, shutil.get_terminal_size().columns, encoding.replace("-", "") == "utf8")


if __name__ == "__main__":
    sys.exit(main())

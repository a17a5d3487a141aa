"""The input: whatever the user has (GGUF, split GGUF, Hugging Face folder or repository) as a GGUF file to plan for."""

from __future__ import annotations

import argparse
from contextlib import ExitStack, contextmanager
from pathlib import Path
import signal
import sys
import threading
from typing import Iterator, NamedTuple

from allocmoe_edge.gguf_file import GGUFFile, model_paths
from allocmoe_edge.plan import parse_budget

from . import ConvertError, huggingface, output, quantize


class Source(NamedTuple):
    """path: the GGUF file, or the first of a split one. temporary: it was made for this run, and may be used up."""

    path: Path
    temporary: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("input from elsewhere, and quantisation")
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


def _ftype(text: str) -> str:
    try:
        return quantize.ftype(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


@contextmanager
def as_gguf(args: argparse.Namespace) -> Iterator[Source]:
    """The model that `args` names, as GGUF; what had to be made for that is removed at the end, whatever happens.

    Everything that can be known is checked first: the options, the output, the disk, the model's kind.

    Args:
        args: model, output, force, budget, calib, threads and what `add_arguments` adds.

    Raises:
        ConvertError: the input cannot be used; says why and what would help.
        GGUFError: a GGUF input is damaged.
    """
    with ExitStack() as stack:
        stack.enter_context(_unwind_on_sigterm())
        if args.imatrix is not None and args.quantize is None:
            raise ConvertError("--imatrix is for --quantize")
        if args.model.is_dir() or not (args.model.is_file() or args.model.suffix == ".gguf"):
            yield _from_huggingface(args, stack)
        else:
            yield _from_gguf(args, stack)


def _from_gguf(args: argparse.Namespace, stack: ExitStack) -> Source:
    for option, value in (("--outtype", args.outtype), ("--pre-tokenizer", args.pre_tokenizer)):
        if value is not None:
            raise ConvertError(
                f"{option} is for Hugging Face models; {args.model} is a GGUF file (--quantize converts it)"
            )
    sources = model_paths(args.model)
    n_split = 1 if args.plan_only or args.quantize else len(sources)
    output.check_target(sources, args.output, args.force, _other_inputs(args), n_split)
    if args.quantize is None:
        needed = output.METADATA_SLACK if args.plan_only else output.copy_size(sources, args.output)
        output.check_space(args.output.parent, needed, args.output.name)
        return Source(args.model, temporary=False)
    n_elements = 0
    for path in sources:
        with GGUFFile(path) as file:
            n_elements += sum(tensor.n_elements for tensor in file.tensors)
    _check_options(args)
    expected = quantize.n_bytes(n_elements, args.quantize)
    output.check_space(args.output.parent, expected + output.METADATA_SLACK, args.output.name)
    return _quantized(args, stack, args.model, expected)


def _from_huggingface(args: argparse.Namespace, stack: ExitStack) -> Source:
    repository = None
    output.check_target([], args.output, args.force, [args.model, *_other_inputs(args)])
    _check_options(args)
    if not args.model.is_dir() and not huggingface.is_repository_id(args.model.as_posix()):
        raise ConvertError(f"{args.model}: no such file or folder, and no repository id (org/name)")
    huggingface.check_installed()
    if args.pre_tokenizer is not None and args.pre_tokenizer not in huggingface.pre_tokenizers():
        known = ", ".join(huggingface.pre_tokenizers())
        raise ConvertError(f"--pre-tokenizer {args.pre_tokenizer}: llama.cpp has none of that name; there are: {known}")
    folder = args.model
    if not folder.is_dir():
        repository = args.model.as_posix()
        _say(f"looking for {repository}")
        folder = huggingface.download(repository)
        output.check_target([], args.output, args.force, [folder])
    n_weights = huggingface.check_folder(folder)

    outtype = args.outtype or "auto"
    expected = huggingface.converted_size(n_weights, outtype)
    needed, purpose = expected, f"{args.output.name} in {outtype}"
    if args.quantize:
        quantized = quantize.n_bytes(n_weights, args.quantize)
        needed += quantized
        purpose = (
            f"{args.output.name} ({quantized / 1e9:.1f} GB in {args.quantize}) and, meanwhile, the same in {outtype}"
        )
    output.check_space(args.output.parent, needed + output.METADATA_SLACK, purpose)

    converted = _temporary(args, stack, "converted")
    _say(f"converting {repository or folder} with llama.cpp's converter, about {expected / 1e9:.2f} GB")
    name = repository and repository.rpartition("/")[2]
    huggingface.convert(folder, converted, outtype, expected, args.pre_tokenizer, name)
    if args.quantize is None:
        return Source(converted, temporary=True)
    source = _quantized(args, stack, converted, quantized)
    converted.unlink()
    return source


def _quantized(args: argparse.Namespace, stack: ExitStack, path: Path, expected: int) -> Source:
    target = _temporary(args, stack, "quantized")
    _say(f"quantising to {args.quantize}, about {expected / 1e9:.2f} GB")
    quantize.quantize(
        path,
        target,
        args.quantize,
        n_threads=args.threads,
        expected=expected,
        imatrix=args.imatrix,
        allow_requantize=args.allow_requantize,
    )
    return Source(target, temporary=True)


def _temporary(args: argparse.Namespace, stack: ExitStack, what: str) -> Path:
    path = output.hidden(args.output, what)
    stack.callback(path.unlink, missing_ok=True)
    return path


def _other_inputs(args: argparse.Namespace) -> list:
    return [path for path in (args.calib, args.imatrix) if path is not None]


def _check_options(args: argparse.Namespace) -> None:
    """What would be found wrong only after the conversion, found now."""
    if args.budget is not None:
        # how many activations the model has is not known yet: any number that a model can have
        parse_budget(args.budget, 512 * 1024, 1)
    if args.calib is not None and not args.calib.is_file():
        raise ConvertError(f"calibration text {args.calib}: No such file")
    if args.imatrix is not None:
        quantize.read_imatrix(args.imatrix)


@contextmanager
def _unwind_on_sigterm() -> Iterator[None]:
    """Makes the polite ways to end a process run its clean-up, as Ctrl-C does."""

    def stop(number, frame):
        raise SystemExit(128 + number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            # not where it is ignored, as under nohup
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

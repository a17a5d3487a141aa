"""What the commands' argument parsers share."""

from __future__ import annotations

import argparse
import sys
from typing import Container, Optional, Union

from . import expert_cache, speed_target
from .argument_error import ArgumentError
from .command import CommandError
from .measure.cores import physical_cores
from .whole_numbers import MOST_INT32, MOST_THREADS

# the native side's seeds are uint32, of which the last means a random one
_MAX_SEED = 2**32 - 2
# of a context: more than any model has, and a mistyped number more is refused before the memory for it is asked for
_MAX_TOKENS = 2**24
# above, a file of any size is on the GPU, and llama.cpp's sums stay within int32
_MAX_LAYERS = 10_000


def not_negative(text: str) -> int:
    """A whole number from 0 on, for argparse."""
    return _within(0, MOST_INT32, text)


def positive(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    return _within(1, MOST_INT32, text)


def seed(text: str) -> int:
    """A seed of random numbers, for argparse."""
    return _within(0, _MAX_SEED, text)


def context_size(text: str) -> int:
    """Tokens of a window that is evaluated by itself, for argparse: the first one is predicted from nothing."""
    return _within(2, _MAX_TOKENS, text)


def n_tokens(text: str) -> int:
    """Tokens of a context, for argparse."""
    return _within(0, _MAX_TOKENS, text)


def speed(text: str) -> float:
    """Tokens per second, for argparse."""
    try:
        return speed_target.speed(float(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:40]}: want tokens per second, a number above 0") from None


def _within(minimum: int, maximum: int, text: str) -> int:
    # int() takes more than digits, and refuses thousands of them with an error of its own
    if not text.strip().removeprefix("-").isdecimal() or len(text) > 20 or not minimum <= int(text) <= maximum:
        raise argparse.ArgumentTypeError(f"{text[:40]}: want a whole number from {minimum} to {maximum}")
    return int(text)


def _gpu_layers(text: str) -> Optional[int]:
    return None if text == "auto" else _within(-1, _MAX_LAYERS, text)


def _threads(text: str) -> int:
    return _within(1, MOST_THREADS, text)


def add_threads(parser) -> None:
    """--threads, to a parser or a group of one."""
    parser.add_argument(
        "--threads", type=_threads, default=physical_cores(), metavar="N",
        help="default: the physical cores that this process may use, %(default)s here",
    )  # fmt: skip


def add_gpu(parser) -> None:
    """--n-gpu-layers and --n-cpu-moe, to a parser or a group of one."""
    parser.add_argument(
        "--n-gpu-layers", type=_gpu_layers, default=0, metavar="N",
        help="layers on the GPU, -1 for all, auto for what fits into its free memory. Default: 0",
    )  # fmt: skip
    add_n_cpu_moe(parser)


def add_n_cpu_moe(parser) -> None:
    """--n-cpu-moe, to a parser or a group of one."""
    parser.add_argument(
        "--n-cpu-moe", type=not_negative, default=0, metavar="N",
        help="keep the experts of the first N layers on the CPU, with --n-gpu-layers. Default: 0",
    )  # fmt: skip


def check_gpu(args) -> None:
    """Raises CommandError for a --n-cpu-moe that changes nothing."""
    if args.n_cpu_moe and args.n_gpu_layers == 0:
        raise CommandError("--n-cpu-moe: has no effect without --n-gpu-layers: all experts are on the CPU")


def _cache_bytes(text: str) -> int:
    try:
        return expert_cache.parse(text)
    except ArgumentError as error:  # argparse names the option
        raise argparse.ArgumentTypeError(error.why) from None


def _miss_price(text: str) -> Union[float, str]:
    try:
        value = text if text == "auto" else float(text)
        expert_cache.price(value)
        return value
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:40]}: want a number from 1 to 1e6, or auto") from None


def add_expert_cache(parser) -> None:
    """--expert-cache and --miss-price, to a parser or a group of one."""
    parser.add_argument(
        "--expert-cache", type=_cache_bytes, metavar="SIZE",
        help="hold so much of the routed experts in memory (6GB) and read the others from the file when they are chosen; 0 "
        "for none. Default: what the memory leaves, if the file is larger than it",
    )  # fmt: skip
    parser.add_argument(
        "--miss-price", type=_miss_price, default=1.0, metavar="X",
        help="with an expert cache and estimates: what reading an expert may cost, in times of one at hand; auto for what it "
        "takes on this machine, measured as the model is loaded. Default: 1, any is read",
    )  # fmt: skip


def check_miss_price(args, cache_bytes: int, token_rules: Container[str] = ("estimate",)) -> None:
    """Raises CommandError for a --miss-price that changes nothing.

    Args:
        cache_bytes: of the expert cache that there is, 0 for none.
        token_rules: those of the plans that will run.
    """
    if args.miss_price != 1 and not cache_bytes and args.expert_cache is not None:
        raise CommandError("--miss-price: has no effect without an expert cache: want --expert-cache SIZE, too")
    if args.miss_price != 1 and not cache_bytes:
        print(
            "--miss-price has no effect here: there is no expert cache, which a file gets by itself that is larger than the memory",
            file=sys.stderr,
        )
    elif args.miss_price != 1 and "estimate" not in token_rules:
        raise CommandError("--miss-price: has no effect but under token rule 'estimate', which no plan here has")

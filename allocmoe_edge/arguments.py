"""What the commands' argument parsers share."""

from __future__ import annotations

import argparse


def not_negative(text: str) -> int:
    """A whole number from 0 on, for argparse."""
    return _at_least(0, text)


def positive(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    return _at_least(1, text)


def _at_least(minimum: int, text: str) -> int:
    if not text.strip().removeprefix("-").isdecimal() or int(text) < minimum:
        raise argparse.ArgumentTypeError(f"{text}: want a whole number of at least {minimum}")
    return int(text)


def add_n_cpu_moe(parser) -> None:
    """--n-cpu-moe, to a parser or a group of one."""
    parser.add_argument(
        "--n-cpu-moe", type=not_negative, default=0, metavar="N",
        help="keep the experts of the first N layers on the CPU, with --n-gpu-layers. Default: 0",
    )  # fmt: skip

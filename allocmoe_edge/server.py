"""llama-cpp-python's OpenAI-compatible server, running `allocmoe_edge.Llama`: python -m allocmoe_edge.server --model FILE

Takes every option of `python -m llama_cpp.server`, and `--n_cpu_moe N` and `--no_repack` (see `allocmoe_edge.Llama`); a
model's plan comes from its file. Needs the extra "server".
"""

import argparse
import sys

from ._native import llama_cpp
from .llama import Llama


def main() -> None:
    try:
        from llama_cpp.server.__main__ import main as serve
    except ImportError as error:
        raise SystemExit(
            f"the server needs more packages ({error.name}): pip install 'allocmoe-edge[server]'"
        ) from None
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--n_cpu_moe", type=int, default=0)
    parser.add_argument("--no_repack", action="store_true")
    ours, sys.argv[1:] = parser.parse_known_args()

    class ServedLlama(Llama):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, n_cpu_moe=ours.n_cpu_moe, repack=not ours.no_repack, **kwargs)

    # the server makes its models through this name
    llama_cpp.Llama = ServedLlama
    serve()


if __name__ == "__main__":
    main()

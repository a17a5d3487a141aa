"""The command allocmoe-server: llama.cpp's server, built from our patched source, with a budget for each request.

    allocmoe-server MODEL [--budget B] [options of llama-server]

The process becomes the server, so that signals and the exit code are its own; a process beside it waits until the model
is loaded, and prints the address.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
import subprocess
import sys
from typing import List, Optional, Sequence

from . import __version__, expert_cache, projector
from . import server_address as address
from ._native import BUILD_DIR
from .arguments import add_expert_cache
from .command import CommandError, run_command
from .gguf_file import GGUFFile, model_paths
from .measure import memory
from .plan import PlanError, metadata

_DESCRIPTION = """\
llama.cpp's server, with an activation budget for each request ("budget": 0.5). It takes llama-server's options, listed
below these, and listens on 127.0.0.1:8080 unless they say otherwise."""

# options become variables of the environment, where the servers that a router starts find them too
_VARIABLES = {
    "budget": "ALLOCMOE_SERVER_BUDGET",
    "adaptive_budget": "ALLOCMOE_SERVER_ADAPTIVE",
    "plan": "ALLOCMOE_SERVER_PLAN",
    "prefetch": "ALLOCMOE_SERVER_PREFETCH",
}


# by which llama-server is told of models
_MODEL_OPTIONS = {
    "-m", "--model", "-mu", "--model-url", "-dr", "--docker-repo", "-hf", "-hfr", "--hf-repo", "--models-dir", "--models-preset",
}  # fmt: skip
# slots where --parallel says nothing: the most that there are
_SLOTS = 4
# by which it prints something, and serves nothing
_PRINTING_OPTIONS = {"-cl", "--cache-list", "--list-devices", "--license", "--completion-bash"}
_MODEL_VARIABLES = {
    f"LLAMA_ARG_{name}" for name in ("MODEL", "MODEL_URL", "DOCKER_REPO", "HF_REPO", "MODELS_DIR", "MODELS_PRESET")
}


def binary(name: str = "llama-server", how: str = "ALLOCMOE_SERVER=1 pip install .") -> Path:
    """A program as this package built it. Raises CommandError, which says how to get it, where it was not built."""
    path = BUILD_DIR / "lib" / (f"{name}.exe" if os.name == "nt" else name)
    if not path.is_file():
        raise CommandError(f"the server is not built: install the package with it, from its source: {how}")
    return path


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="allocmoe-server",
        usage="allocmoe-server MODEL [--budget B] [--adaptive-budget B] [--plan FILE] [--prefetch on] [--expert-cache SIZE] "
        "[--miss-price X] [options of llama-server]",
        description=_DESCRIPTION,
        add_help=False,
        allow_abbrev=False,
    )
    p.add_argument("--help", action="store_true", help="these options, and llama-server's")
    p.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    p.add_argument(
        "--budget",
        metavar="B",
        help="of requests that do not say: a share (0.5, 50%%), a total of activations per token, or fast, balanced or "
        "full. Default: the plan in the file",
    )
    p.add_argument(
        "--adaptive-budget",
        metavar="B",
        help="requests that do not say get less while others wait, down to this budget",
    )
    add_expert_cache(p)
    p.add_argument("--plan", metavar="FILE", help="a side file with the plans, as allocmoe-convert --plan-only writes")
    p.add_argument(
        "--prefetch", choices=("auto", "on", "off"), default="auto",
        help="read the experts that a layer has chosen from the file ahead of their use, with --no-repack. Default: auto, "
        "if the file is larger than the memory",
    )  # fmt: skip
    return p


def main(argv: Optional[Sequence[str]] = None) -> int:
    given = _with_long_help(sys.argv[1:] if argv is None else argv)
    # llama-server's options take values, so that the model can only be told from them where it comes first
    model = given.pop(0) if given and not given[0].startswith("-") else None
    options = parser()

    def serve(args: argparse.Namespace) -> None:
        if args.help:
            print(options.format_help(), flush=True)
            _become([str(binary()), "--help"])
        if _PRINTING_OPTIONS & set(args.rest):
            _become([str(binary()), *args.rest])
        if model is None and not _names_models(args.rest):
            late = next((word for word in args.rest if word.endswith(".gguf")), None)
            if late is not None:
                raise CommandError(f"{late}: the model comes first: allocmoe-server {late} ...")
            raise CommandError("which model? allocmoe-server MODEL, or --models-dir FOLDER for several; see --help")
        if model is not None:
            _check_files(model, args.plan)
        _check_projector(args.rest)
        _check_batch(args.rest)
        cache = _cache_options(model, args)
        if args.prefetch == "auto":
            args.prefetch = "on" if model is not None and not cache and memory.is_beyond(model_paths(model)) else "off"
        for name, variable in _VARIABLES.items():
            value = getattr(args, name)
            if value is not None:
                if not value.strip():
                    raise CommandError(f"--{name.replace('_', '-')}: found nothing, want a value")
                os.environ[variable] = value
        command = [
            str(binary()),
            *(["-m", model] if model is not None else []),
            *cache,
            *args.rest,
            *_draft_options(args.rest),
        ]
        found = address.of(args.rest)
        if found is not None and hasattr(os, "fork"):
            address.announce(found)
        _become(command)

    return run_command(options, serve, given, known_only=True)


def _names_models(options: Sequence[str]) -> bool:
    """Whether llama-server is told of a model, or of several, in its own ways."""
    names = {word.partition("=")[0] for word in options}
    return bool(names & _MODEL_OPTIONS or _MODEL_VARIABLES & os.environ.keys()) or any(
        name.startswith("--") and name.endswith("-default") for name in names
    )


def _check_files(model: str, plan: Optional[str]) -> None:
    """Says at once what is wrong with them, and not in the middle of a log. Raises GGUFError or PlanError."""
    stored = metadata.read(model, estimator=False)
    if stored.side_file:
        raise PlanError(f"{model}: has a plan and no model: pass it as --plan, beside the model's own file")
    if plan is not None:
        metadata.read_for(plan, stored, estimator=False)


def _check_projector(options: Sequence[str]) -> None:
    """The same of one that is a file here. Raises GGUFError."""
    given = [value for name, value in zip(options, options[1:]) if name in ("-mm", "--mmproj")]
    path = given[-1] if given else os.environ.get("LLAMA_ARG_MMPROJ")
    if path:
        projector.check(path)


def _check_batch(options: Sequence[str]) -> None:
    """llama-server ends in an assert where a batch has no room for a token of each slot, or for two. Raises CommandError."""

    def given(*names: str) -> Optional[int]:
        values = [value for name, value in zip(options, options[1:]) if name in names and value.lstrip("-").isdecimal()]
        return int(values[-1]) if values else None

    n_batch, n_slots = given("-b", "--batch-size"), given("-np", "--parallel")
    least = max(2, n_slots if n_slots is not None and n_slots > 0 else _SLOTS)
    if n_batch is not None and n_batch < least:
        raise CommandError(f"--batch-size: found {n_batch}, want at least {least}, a token of each slot (--parallel)")


def _cache_options(model: Optional[str], args: argparse.Namespace) -> List[str]:
    """What llama-server is to be told of an expert cache. Raises CommandError for one that cannot be."""
    n_bytes = args.expert_cache
    if model is not None:
        on_gpu = {"-ngl", "--gpu-layers", "--n-gpu-layers"} & set(args.rest)
        try:
            n_bytes = expert_cache.choose(
                model, n_bytes, args.prefetch == "auto" and not on_gpu, _context_size(args.rest)
            )
        except ValueError as error:
            raise CommandError(str(error).replace("expert_cache:", "--expert-cache:", 1)) from None
        if n_bytes and args.expert_cache is None:
            print(
                f"allocmoe-server: {n_bytes / 1e9:.1f} GB of memory for the experts, since the file is larger than what is free",
                file=sys.stderr,
                flush=True,
            )
    if not n_bytes:
        return []
    price = expert_cache.price(args.miss_price)
    return [
        "--override-kv", f"{expert_cache.KEY}=int:{n_bytes}", "--override-kv", f"{expert_cache.PRICE_KEY}=float:{price}"
    ]  # fmt: skip


def _draft_options(options: Sequence[str]) -> List[str]:
    """What makes llama-server use a draft model: it loads one that is no head of the model, and leaves it unused.

    Raises CommandError or GGUFError for a file that is none.
    """
    names = ("--model-draft", "-md", "--spec-draft-model")
    given = [value for name, value in zip(options, options[1:]) if name in names]
    if not given or "--spec-type" in options or {"LLAMA_ARG_SPEC_TYPE"} & os.environ.keys():
        return []
    with GGUFFile(given[-1]) as file:
        arch = file.get("general.architecture")
        # these it knows by themselves
        is_head = arch in ("dflash", "eagle3") or file.get(f"{arch}.nextn_predict_layers", 0)
    return [] if is_head else ["--spec-type", "draft-simple"]


def rpc_binary() -> Path:
    """ggml's RPC server, in the same way."""
    return binary("ggml-rpc-server", "CMAKE_ARGS=-DGGML_RPC=ON ALLOCMOE_SERVER=1 pip install .")


def rpc_main(argv: Optional[Sequence[str]] = None) -> int:
    """The command allocmoe-rpc-server: ggml's, which lends this machine to an allocmoe-server on another one."""
    p = argparse.ArgumentParser(
        prog="allocmoe-rpc-server",
        usage="allocmoe-rpc-server [options of ggml-rpc-server]",
        description="Lends this machine to an allocmoe-server on another one, which is started with --rpc HOST:PORT. "
        "Whoever reaches the port can use it: only in a network that you trust.",
        add_help=False,
        allow_abbrev=False,
    )
    p.add_argument("--help", action="store_true", help="ggml-rpc-server's options")
    p.add_argument("--version", action="version", version=f"%(prog)s {__version__}")

    def serve(args: argparse.Namespace) -> None:
        if args.help:
            print(p.format_help(), flush=True)
        _become([str(rpc_binary()), *(["--help"] if args.help else args.rest)])

    return run_command(p, serve, _with_long_help(sys.argv[1:] if argv is None else argv), known_only=True)


def _with_long_help(arguments: Sequence[str]) -> List[str]:
    """With --help for -h, which argparse would find in -hf too."""
    return ["--help" if argument == "-h" else argument for argument in arguments]


def _context_size(options: Sequence[str]) -> int:
    """Of --ctx-size; 0 for the model's own."""
    given = [value for name, value in zip(options, options[1:]) if name in ("-c", "--ctx-size")]
    return int(given[-1]) if given and given[-1].isdecimal() and len(given[-1]) < 10 else 0


def _become(command: List[str]) -> None:
    for number in range(3):  # one that is closed would be the number of the first file that the program opens
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if os.name == "nt":  # exec there leaves the terminal to the caller
        raise SystemExit(subprocess.call(command))
    os.execv(command[0], command)


if __name__ == "__main__":
    sys.exit(main())

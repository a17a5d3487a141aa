"""The command allocmoe-server: llama.cpp's server, built from our patched source, with a budget for each request.

    allocmoe-server MODEL [--budget B] [options of llama-server]

The process becomes the server, so that signals and the exit code are its own; a process beside it waits until the model
is loaded, and prints the address.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
import re
import subprocess
import sys
from typing import List, Optional, Sequence

from . import __version__, expert_cache, projector
from . import server_address as address
from ._native import BUILD_DIR
from .argument_error import ArgumentError
from .arguments import add_expert_cache, check_miss_price
from .command import CommandError, load_errors, need_model, run_command
from .gguf_file import GGUFFile, model_paths, ranks
from .measure import memory
from .plan import metadata
from .whole_numbers import MOST_THREADS

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
# by which it loads what it fetches: --model says where to, if anything
_FETCHED_MODELS = (
    (("-mu", "--model-url"), "LLAMA_ARG_MODEL_URL"),
    (("-dr", "--docker-repo"), "LLAMA_ARG_DOCKER_REPO"),
    (("-hf", "-hfr", "--hf-repo"), "LLAMA_ARG_HF_REPO"),
)
# its option, and the variable
_CTX_SIZE = ("-c", "--ctx-size"), "LLAMA_ARG_CTX_SIZE"
# slots where --parallel says nothing: the most that there are; tokens where --batch-size does
_SLOTS, _BATCH = 4, 2048
# options, their variables, and the most threads of each: of HTTP's, which compute nothing, a half of what Linux has room for in a
# process by default
_THREAD_OPTIONS = (
    (("-t", "--threads"), "LLAMA_ARG_THREADS", MOST_THREADS),
    (("-tb", "--threads-batch"), "", MOST_THREADS),
    (("--spec-draft-threads", "-td", "--threads-draft"), "", MOST_THREADS),
    (("--spec-draft-threads-batch", "-tbd", "--threads-batch-draft"), "", MOST_THREADS),
    (("--threads-http",), "LLAMA_ARG_THREADS_HTTP", 16384),
)
# how many tokens each kind of drafts (--spec-type) may have: the option, and what it is otherwise
_DRAFTED_BY_MODELS = "--spec-draft-n-max", 3
_DRAFTED = {
    "ngram-simple": ("--spec-ngram-simple-size-m", 48),
    "ngram-map-k": ("--spec-ngram-map-k-size-m", 48),
    "ngram-map-k4v": ("--spec-ngram-map-k4v-size-m", 48),
    "ngram-mod": ("--spec-ngram-mod-n-max", 64),
    "ngram-cache": ("", 8),
}
# by which the draft is a file on the hub
_HUB_DRAFTS = {"--spec-draft-hf", "-hfd", "-hfrd", "--hf-repo-draft"}
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
            _check_ranking(model, args.rest)
        _check_projector(args.rest)
        _check_threads(args.rest)
        _check_context(args.rest)
        draft = _draft_options(model, args.rest)
        _check_batch(args.rest, _n_drafted([*args.rest, *draft]))
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
            *draft,
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
    stored = need_model(model, "pass it as --plan, beside the model's own file")
    if plan is not None:
        metadata.read_for(plan, stored, estimator=False)


def _given(options: Sequence[str], names: Sequence[str], variable: str = "") -> Optional[str]:
    """The value of an option as llama-server reads it: the last one, else that of its environment variable."""
    values = [value for name, value in zip(options, options[1:]) if name in names]
    return values[-1] if values else os.environ.get(variable)


def _number(options: Sequence[str], names: Sequence[str], variable: str = "") -> Optional[int]:
    """The same of a whole number; None where llama-server will refuse it."""
    value = (_given(options, names, variable) or "").strip()
    return int(value) if re.fullmatch(r"-?[0-9]{1,19}", value) else None


def _check_projector(options: Sequence[str]) -> None:
    """The same of one that is a file here. Raises GGUFError."""
    path = _given(options, ("-mm", "--mmproj"), "LLAMA_ARG_MMPROJ")
    if path:
        projector.check(path)


def _check_ranking(model: str, options: Sequence[str]) -> None:
    """Raises CommandError where the server shall rank texts, and the model cannot."""
    asked = {"--rerank", "--reranking"} & {*options} or _given(options, ("--pooling",), "LLAMA_ARG_POOLING") == "rank"
    asked = asked or (_given([], [], "LLAMA_ARG_RERANKING") or "").lower() in ("on", "enabled", "true", "1")
    if asked and not ranks(model):
        raise CommandError(f"--reranking: {model} is no reranker: it has no tensors cls.*")


def _check_context(options: Sequence[str]) -> None:
    """llama-server ends in an assert where it has no place for two tokens. Raises CommandError."""
    n_ctx = _number(options, *_CTX_SIZE)
    if n_ctx is not None and n_ctx != 0 and n_ctx < 2:
        raise CommandError(f"--ctx-size: found {n_ctx}, want at least 2, or 0 for what the model was trained for")


def _check_threads(options: Sequence[str]) -> None:
    """llama-server ends in a crash where it cannot make them. Raises CommandError."""
    for names, variable, most in _THREAD_OPTIONS:
        n_threads = _number(options, names, variable)
        if n_threads is not None and n_threads > most:
            raise CommandError(f"{names[-1]}: found {n_threads}, want at most {most}")


def _draft_kinds(options: Sequence[str]) -> List[str]:
    """Those that are asked for, which llama-server adds up: of all --spec-type, of the variable, and of --spec-default."""
    values = [value for name, value in zip(options, options[1:]) if name == "--spec-type"]
    values += [_given([], [], "LLAMA_ARG_SPEC_TYPE") or "", "ngram-mod" if "--spec-default" in options else ""]
    return [kind.strip() for kind in ",".join(values).split(",") if kind.strip()]


def _n_drafted(options: Sequence[str]) -> int:
    """Tokens that llama-server may draft at once. Raises CommandError for a number at which it ends in an assert."""
    found = 0
    for kind in _draft_kinds(options):
        name, otherwise = _DRAFTED.get(kind, (_DRAFTED_BY_MODELS if kind.startswith("draft-") else ("", 0)))
        n = _number(options, (name,), f"LLAMA_ARG_{name[2:].upper().replace('-', '_')}") if name else None
        n = otherwise if n is None else n
        if name == _DRAFTED_BY_MODELS[0] and n == 0:
            raise CommandError(f"{name}: found 0, want at least 1")
        found = max(found, n)
    return found


def _check_batch(options: Sequence[str], n_drafted: int) -> None:
    """llama-server ends in an assert where a batch has no room for the tokens of each slot, or for two. Raises CommandError."""
    n_batch = _number(options, ("-b", "--batch-size"), "LLAMA_ARG_BATCH")
    n_slots = _number(options, ("-np", "--parallel"), "LLAMA_ARG_N_PARALLEL")
    if n_batch is None:
        if not n_drafted:
            return
        n_batch = _BATCH
    n_slots = n_slots if n_slots is not None and n_slots > 0 else _SLOTS
    least = max(2, n_slots * (1 + n_drafted))
    if n_batch < least:
        more = f", and {n_drafted} that may be drafted after it" if n_drafted else ""
        raise CommandError(
            f"--batch-size: found {n_batch}, want at least {least}, a token of each slot (--parallel){more}"
        )


def _cache_options(model: Optional[str], args: argparse.Namespace) -> List[str]:
    """What llama-server is to be told of an expert cache. Raises CommandError for one that cannot be."""
    n_bytes = args.expert_cache
    if model is not None:
        on_gpu = _given(args.rest, ("-ngl", "--gpu-layers", "--n-gpu-layers"), "LLAMA_ARG_N_GPU_LAYERS") is not None
        try:
            n_bytes = expert_cache.choose(
                model, n_bytes, args.prefetch == "auto" and not on_gpu, _context_size(args.rest)
            )
        except ArgumentError as error:
            raise CommandError(error.of_command()) from None
        if n_bytes and args.expert_cache is None:
            print(
                f"allocmoe-server: {n_bytes / 1e9:.1f} GB of memory for the experts, since the file is larger than what is free",
                file=sys.stderr,
                flush=True,
            )
    check_miss_price(args, n_bytes or 0)
    if not n_bytes:
        return []
    price = expert_cache.price(args.miss_price)
    return [
        "--override-kv", f"{expert_cache.KEY}=int:{n_bytes}", "--override-kv", f"{expert_cache.PRICE_KEY}=float:{price}"
    ]  # fmt: skip


def _draft_options(model: Optional[str], options: Sequence[str]) -> List[str]:
    """What makes llama-server use a draft model: it loads one that is no head of the model, and leaves it unused.

    Raises CommandError or GGUFError for a file that is none.
    """
    path = _given(options, ("--model-draft", "-md", "--spec-draft-model"), "LLAMA_ARG_SPEC_DRAFT_MODEL")
    kinds = _draft_kinds(options)
    if not path or (kinds and "draft-simple" not in kinds) or _HUB_DRAFTS & {*options}:
        return []
    with GGUFFile(path) as file:
        arch = file.get("general.architecture")
        # these it knows by themselves
        if arch in ("dflash", "eagle3") or file.get(f"{arch}.nextn_predict_layers", 0):
            return []
        if not file.get(f"{arch}.attention.causal", True):
            raise CommandError(f"--model-draft: {path} cannot go on from a text: a model for embeddings")
    _check_draft(model or _model_file(options), path)
    return [] if kinds else ["--spec-type", "draft-simple"]


def _model_file(options: Sequence[str]) -> Optional[str]:
    """The one that llama-server's own option names; None where it names none, or one that is fetched."""
    if any(_given(options, names, variable) for names, variable in _FETCHED_MODELS):
        return None
    return _given(options, ("-m", "--model"), "LLAMA_ARG_MODEL") or None


def _check_draft(model: Optional[str], path: str) -> None:
    """llama-server goes on without a draft that does not fit, or ends at the first token. Raises CommandError or GGUFError.

    Args:
        model: None where it is not known which one will be asked for: what no model can draft with is refused then.
    """
    from . import draft
    from .llama import Llama

    llms = []
    try:
        with load_errors(path):
            llms.append(Llama(path, vocab_only=True, verbose=False))
        if model is not None:
            with load_errors(model):
                llms.append(Llama(model, vocab_only=True, verbose=False))
        try:
            draft.check(llms[0])
            if model is not None:
                draft.check_fits(llms[0], llms[1], ends=True)
        except ValueError as error:
            raise CommandError(str(error).replace("draft_model:", "--model-draft:", 1)) from None
    finally:
        for llm in llms:
            llm.close()


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
    n_ctx = _number(options, *_CTX_SIZE) or 0
    return n_ctx if 0 < n_ctx < 10**9 else 0


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

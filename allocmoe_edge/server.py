"""llama-cpp-python's OpenAI-compatible server, running `allocmoe_edge.Llama`: python -m allocmoe_edge.server --model FILE

Takes every option of `python -m llama_cpp.server`, and `--n_cpu_moe N` and `--no_repack` (see `allocmoe_edge.Llama`); a
model's plan comes from its file. Needs the extra "server".
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Optional, Sequence
import weakref

from ._native import llama_cpp
from .arguments import not_negative
from .command import CommandError, load_errors, run_command
from .llama import Llama
from .measure.cores import physical_cores


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m allocmoe_edge.server",
        description="llama-cpp-python's server, running models under the plan in their file. Its own options, below, and:",
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--n_cpu_moe", type=not_negative, default=0, metavar="N",
        help="with --n_gpu_layers: keep the experts of the first N layers on the CPU. Default: 0",
    )  # fmt: skip
    parser.add_argument("--no_repack", action="store_true", help="leave the weights as the file has them: less memory")

    def serve(args: argparse.Namespace) -> None:
        if {"-h", "--help"} & set(args.rest):
            print(parser.format_help())
        _serve(args)

    return run_command(parser, serve, argv, known_only=True)


def _serve(args: argparse.Namespace) -> None:
    try:
        from llama_cpp.server import errors
    except ImportError as error:
        raise CommandError(
            f"the server needs more packages ({error.name}): pip install 'allocmoe-edge[server]'"
        ) from None

    class ServedLlama(Llama):
        # the one that requests are for: llama-cpp-python's server has one in memory
        current: Optional[weakref.ref] = None

        def __init__(self, model_path, **kwargs):
            with load_errors(model_path):
                super().__init__(model_path, n_cpu_moe=args.n_cpu_moe, repack=not args.no_repack, **kwargs)
            ServedLlama.current = weakref.ref(self)

    # the routes are made with this class as the next module is imported
    errors.RouteErrorHandler = _route_class(errors, ServedLlama)
    from llama_cpp.server.__main__ import main as serve

    # the server makes its models through this name
    llama_cpp.Llama = ServedLlama
    _default_threads()
    sys.argv[1:] = args.rest
    serve()


def _default_threads() -> None:
    """Physical cores, as `Llama` has it: the server's settings take from the environment what no option gives."""
    given = {name.upper() for name in os.environ}
    for name in {"N_THREADS", "N_THREADS_BATCH"} - given:
        os.environ[name] = str(physical_cores())


def _route_class(errors, served: type) -> type:
    """llama-cpp-python's handler of requests, with answers of 400 where a request is at fault.

    A grammar is tried before anything is answered: a stream that has begun can only break off.
    """
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse

    def refusal(message: str) -> dict:
        return {"message": message, "type": "invalid_request_error", "param": None, "code": None}

    class Route(errors.RouteErrorHandler):
        def get_route_handler(self):
            upstream = super().get_route_handler()

            async def handler(request):
                try:
                    content = await request.json() if request.method == "POST" else None
                    grammar = content.get("grammar") if isinstance(content, dict) else None
                    llm = served.current and served.current()
                    if isinstance(grammar, str) and llm is not None:
                        llm.check_grammar(grammar)
                except ValueError as error:  # JSON's are among them
                    message = str(error) if str(error).startswith("grammar: ") else f"the request is no JSON: {error}"
                    return JSONResponse({"error": refusal(message)}, status_code=400)
                return await upstream(request)

            return handler

        def error_message_wrapper(self, error, body=None):
            known = any(pattern.search(str(error)) for pattern in self.pattern_and_formatters)
            if isinstance(error, RequestValidationError):
                found = (f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
                return 400, refusal("; ".join(found))
            if isinstance(error, ValueError) and not known:
                return 400, refusal(str(error))
            return super().error_message_wrapper(error, body)

    return Route


if __name__ == "__main__":
    sys.exit(main())

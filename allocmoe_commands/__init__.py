"""What the commands start with, apart from `allocmoe_edge`, whose import takes a third of a second: Ctrl-C in that time ends
the process as it ends any other, and not with a trace of half an import."""

import importlib
import signal
import sys


def bench():
    return _run("bench.cli")


def chat():
    return _run("chat")


def convert():
    return _run("convert.cli")


def inspect():
    return _run("inspect.cli")


def rpc_server():
    return _run("llama_server", "rpc_main")


def server():
    return _run("llama_server")


def _run(module: str, function: str = "main") -> int:
    """Calls a function of a module of `allocmoe_edge`, and returns its exit code."""
    # ignored, where a shell has started this in the background; then it stays so
    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    try:
        if interruptible:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        main = getattr(importlib.import_module(f"allocmoe_edge.{module}"), function)
        if interruptible:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        code = main()
        if interruptible:  # Python puts itself away, and what is loaded
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        return code
    except ImportError as error:
        if not str(error).startswith("allocmoe_edge: "):  # what it says itself of libraries that are missing
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before the command could say what it leaves behind
        print(file=sys.stderr)
        return 130

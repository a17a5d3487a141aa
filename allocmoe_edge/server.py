"""llama-cpp-python's OpenAI-compatible server, running `allocmoe_edge.Llama`: python -m allocmoe_edge.server --model FILE

Takes every option of `python -m llama_cpp.server`; a model's plan comes from its file. Needs the extra "server".
"""

from ._native import llama_cpp
from .llama import Llama


def main() -> None:
    try:
        from llama_cpp.server.__main__ import main as serve
    except ImportError as error:
        raise SystemExit(f"the server needs more packages ({error.name}): pip install 'allocmoe-edge[server]'") from None
    # the server makes its models through this name
    llama_cpp.Llama = Llama
    serve()


if __name__ == "__main__":
    main()

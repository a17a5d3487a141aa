"""What the README shows, in an environment that has the wheel and its base dependencies and nothing else.

    PYTHON_OF_THAT_ENVIRONMENT tests/install_check.py

`make test-install` makes the environment and runs this in an empty folder. It is no pytest module: pytest is no base
dependency.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
import re
import subprocess
import sys
import traceback

import odd_models

README = Path(__file__).resolve().parent.parent / "README.md"
BIN = Path(sys.executable).parent
COMMANDS = ("allocmoe-chat", "allocmoe-convert", "allocmoe-inspect", "allocmoe-bench")


def run(*command: object) -> subprocess.CompletedProcess:
    name, *options = map(str, command)
    program = [sys.executable, *options] if name == "python" else [str(BIN / name), *options]
    return subprocess.run(program, capture_output=True, text=True, timeout=600)


def ran(*command: object) -> str:
    done = run(*command)
    assert done.returncode == 0, f"{command}: exit {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def refused(*command: object) -> str:
    """The one line in which a command says what is missing."""
    done = run(*command)
    lines = done.stderr.strip().splitlines()
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr, f"{command}: {done.returncode}\n{done.stderr}"
    return lines[-1]


def check_no_extra_is_here() -> None:
    here = [name for name in ("torch", "transformers", "matplotlib", "httpx", "pytest") if find_spec(name)]
    assert not here, f"not an environment of the base dependencies alone: it has {', '.join(here)}"


def check_help() -> None:
    for command in COMMANDS:
        assert "usage:" in ran(command, "--help")
        assert ran(command, "--version").strip()


def check_conversion() -> None:
    odd_models.write_qwen3moe(Path("model.gguf"))
    small = ["--calib-tokens", "256", "--estimate-tokens", "256", "--ctx-size", "64"]
    printed = ran("allocmoe-convert", "model.gguf", "--budget", "0.5", *small, "-o", "model-half.gguf")
    assert "wrote model-half.gguf" in printed and "budget 0.50" in printed
    assert re.search(r"budget +0\.50", ran("allocmoe-inspect", "model-half.gguf"))
    ran("allocmoe-bench", "model-half.gguf", "--budgets", "0.5", "--prompt", "16", "--gen", "4", "--repeats", "1")
    ran("allocmoe-chat", "model-half.gguf", "--max-tokens", "4")  # with nothing to answer


def check_python_of_the_readme() -> None:
    """The README's first Python block, as it stands there."""
    code = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)[1]
    assert "from allocmoe_edge import Llama" in code
    ran("python", "-c", code)


def check_missing_extras_are_named() -> None:
    assert "ALLOCMOE_SERVER=1 pip install ." in refused("allocmoe-server", "model-half.gguf")
    assert 'pip install "allocmoe-edge[plot]"' in refused("allocmoe-inspect", "model-half.gguf", "--plot", "plan.html")
    folder = Path("folder")  # one that a converter would read: what is wrong with a folder is said before
    folder.mkdir()
    (folder / "config.json").write_text('{"num_experts": 8}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    assert 'pip install "allocmoe-edge[hf]"' in refused("allocmoe-convert", "folder", "--budget", "0.5", "-o", "x.gguf")


def main() -> int:
    checks = [function for name, function in globals().items() if name.startswith("check_")]
    failed = 0
    for check in checks:
        try:
            check()
            print(f"ok      {check.__name__}", flush=True)
        except Exception:
            failed += 1
            print(f"FAILED  {check.__name__}\n{traceback.format_exc()}", flush=True)
    print(f"install check: {len(checks) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

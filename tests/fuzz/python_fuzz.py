"""The same in Python, with Atheris, where it is installed: `python tests/fuzz/python_fuzz.py SEEDS -max_total_time=300`.

An input is a GGUF file that our reader is given; its last bytes, as text and as numbers, are a budget.
"""

import os
from pathlib import Path
import struct
import sys
import tempfile

import atheris

with atheris.instrument_imports(include=["allocmoe_edge"]):
    from allocmoe_edge import GGUFError, Plan, PlanError
    from allocmoe_edge.plan import metadata
    from allocmoe_edge.plan.plan import parse_budget

import llama_cpp

QUIET = llama_cpp.llama_log_callback(lambda *_: None)
llama_cpp.llama_log_set(QUIET, None)
PATH = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)) / "case.gguf"
MODEL = metadata.read(os.environ["ALLOCMOE_FUZZ_MODEL"])


def allowed_to_fail(function, *args, **kwargs):
    try:
        return function(*args, **kwargs)
    except (GGUFError, PlanError):
        return None


def one(data: bytes) -> None:
    PATH.write_bytes(data)
    for read in (metadata.read, lambda path: metadata.read_for(path, MODEL)):
        found = allowed_to_fail(read, PATH)
        if found is not None and found.profile is not None:
            for total in (None, 1, sum(found.full)):
                allowed_to_fail(found.profile.plan, total, found.full)
    text = data[-12:].decode("latin-1")
    total = int(sum(MODEL.full))
    for budget in (text, struct.unpack("<d", data[-8:].rjust(8))[0], len(data)):
        allowed_to_fail(parse_budget, budget, total, len(MODEL.full))
    allowed_to_fail(Plan.uniform, MODEL.full, len(data) % 70)


if __name__ == "__main__":
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()

import os
import sys
from pathlib import Path

# before anything imports llama_cpp: this decides which libllama the process runs
import allocmoe_edge  # noqa: F401
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))
sys.path.insert(0, str(ROOT / "tests"))


@pytest.fixture(scope="session")
def testbed_path() -> Path:
    """The small real MoE model (30 layers, 12 of 12 experts); built once, kept in build/ until its builder changes."""
    import hashlib

    import testbed

    source = Path(testbed.__file__).read_bytes()
    folder = Path(os.environ.get("ALLOCMOE_TEST_DIR", ROOT / "build"))
    folder.mkdir(exist_ok=True)
    path = folder / f"testbed-{hashlib.sha256(source).hexdigest()[:12]}.gguf"
    if not path.exists():
        testbed.build(path)
    return path


@pytest.fixture(scope="session")
def planned_path(testbed_path, tmp_path_factory) -> Path:
    """The testbed with a made-up but valid profile: deeper layers suffer more. Its plan is the one for half budget."""
    import numpy as np

    from allocmoe_edge import metadata
    from allocmoe_edge.convert import output

    full = metadata.read(testbed_path).full
    rows = tuple(np.linspace(2.0, 1.0, k) * (il + 1) if k else np.empty(0) for il, k in enumerate(full))
    calibration = metadata.Calibration("made up for a test", 1, "0" * 64)
    profile = metadata.Profile(rows, (1.0,) * len(full), calibration)
    path = tmp_path_factory.mktemp("planned") / "planned.gguf"
    output.write_planned(testbed_path, path, profile.plan(0.5, full), profile)
    return path


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """Tiny random models by name, as Hugging Face folders and as GGUF files (see tiny_models.py)."""
    for package in ("torch", "transformers", "tokenizers"):
        pytest.importorskip(package, reason="the tiny models are made and converted with it")
    import tiny_models

    return tiny_models.build(tmp_path_factory.mktemp("tiny_models"))

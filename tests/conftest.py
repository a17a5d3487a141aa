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

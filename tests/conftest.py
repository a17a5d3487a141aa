from dataclasses import replace
import os
from pathlib import Path
import sys

# of several processes (pytest -n) each has its share of the cores, see pytest_configure: before numpy counts them
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# before anything imports llama_cpp: this decides which libllama the process runs
import allocmoe_edge  # noqa: F401
from filelock import FileLock
import llama_cpp
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))
sys.path.insert(0, str(ROOT / "tests"))


def pytest_configure() -> None:
    """Of several processes that run tests each has its share of the cores: threads of two on one core wait for each other."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker and hasattr(os, "sched_setaffinity"):
        cores, n_workers = sorted(os.sched_getaffinity(0)), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        own = cores[int(worker[2:]) % len(cores) :: n_workers]
        os.sched_setaffinity(0, own)


def _kept(name: str, build) -> Path:
    """A file in build/, built by the first test that wants it, and by one process alone."""
    folder = Path(os.environ.get("ALLOCMOE_TEST_DIR", ROOT / "build"))
    folder.mkdir(exist_ok=True)
    path = folder / name
    with FileLock(folder / f".{name}.lock"):
        if not path.exists():
            build(path)
    return path


@pytest.fixture(scope="session")
def testbed_path() -> Path:
    """The small real MoE model (30 layers, 12 of 12 experts); built once, kept in build/ until its builder changes."""
    import hashlib

    import testbed

    source = Path(testbed.__file__).read_bytes()
    n_tokens = testbed.MIN_TOKENS  # a quarter of the default and of its time: worse routers, which no test minds
    name = f"testbed-{n_tokens}-{hashlib.sha256(source).hexdigest()[:12]}.gguf"
    return _kept(name, lambda path: testbed.build(path, n_tokens=n_tokens))


@pytest.fixture(scope="session")
def smolmoe_path(dense_path) -> Path:
    """The trained MoE model (30 layers, 8 of 16 experts and a shared one); kept in build/ until its weights change."""
    import hashlib

    sys.path.insert(0, str(ROOT / "bench" / "upcycle"))
    import build

    sources = [build.WEIGHTS, Path(build.__file__)]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    return _kept(f"smolmoe-{digest}.gguf", lambda path: build.build(path, dense=dense_path))


@pytest.fixture(scope="session")
def dense_path() -> Path:
    """The small real model without experts that the other was made from (SmolLM2-135M-Instruct, Q4_1); kept in build/."""
    import tempfile

    import testbed

    def download(path: Path) -> None:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            # a copy, which takes its name when it is complete: the source may be an installed package's
            copy = Path(folder) / "copy"
            copy.write_bytes(testbed.source_model(Path(folder)).read_bytes())
            os.replace(copy, path)

    return _kept(Path(testbed.MODEL).name, download)


@pytest.fixture(scope="module")
def cpu_backend():
    """ggml's CPU backend by itself, for tests of single operations."""
    from ggml_ffi import base, ffi, ggml

    cpu = ggml.ggml_backend_init_by_type(0, ffi.NULL)
    yield cpu
    base.ggml_backend_free(cpu)


def plan_from_made_up_profile(source: Path, target: Path) -> Path:
    """Writes `source` with a made-up but valid profile, in which deeper layers suffer more, and its plan for half budget."""
    from allocmoe_edge.convert import output
    from allocmoe_edge.plan import metadata
    import numpy as np

    full = metadata.read(source).full
    rows = tuple(np.linspace(2.0, 1.0, k) * (il + 1) if k else np.empty(0) for il, k in enumerate(full))
    calibration = metadata.Calibration("made up for a test", 1, "0" * 64)
    profile = metadata.Profile(rows, (1.0,) * len(full), calibration)
    output.write_planned(source, target, profile.plan(0.5, full), profile)
    return target


def plan_under_rule(source: Path, target: Path, rule: str) -> Path:
    """The same under a token rule, with thresholds and an estimator that are made up. The source has 12 experts."""
    from allocmoe_edge.convert import output
    from allocmoe_edge.plan import metadata
    from gguf_factory import random_estimator
    import numpy as np

    model = metadata.read(source)
    n_layer, rng = len(model.full), np.random.default_rng(0)
    rows = tuple(np.linspace(2.0, 1.0, k) * (il + 1) for il, k in enumerate(model.full))
    table = tuple(np.linspace(0.3, 0.0, k).astype(np.float32) for k in model.full)
    estimator = replace(
        random_estimator(n_layer, 12, 576, 24, 8, 1), quantiles=np.sort(rng.standard_normal((n_layer, 65)), axis=1)
    )
    profile = metadata.Profile(
        rows,
        (1.0,) * n_layer,
        metadata.Calibration("made up", 1, "0" * 64),
        threshold_table=table,
        estimator=estimator,
        token_rule=rule,
    )
    output.write_planned(source, target, profile.plan(0.5, model.full), profile)
    return target


@pytest.fixture(scope="session")
def planned_path(testbed_path, tmp_path_factory) -> Path:
    return plan_from_made_up_profile(testbed_path, tmp_path_factory.mktemp("planned") / "planned.gguf")


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """Tiny random models by name, as Hugging Face folders and as GGUF files (see tiny_models.py)."""
    for package in ("torch", "transformers", "tokenizers"):
        pytest.importorskip(package, reason="the tiny models are made and converted with it")
    import tiny_models

    return tiny_models.build(tmp_path_factory.mktemp("tiny_models"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A tiny random Qwen2-MoE (4 layers, 4 of 8 experts, a shared one) as folder and as upstream's f32 GGUF.

    Its widths are 256, the blocks of llama.cpp's K-quants.
    """
    pytest.importorskip("torch", reason="makes the model, and upstream's converter needs it")
    pytest.importorskip("transformers", reason="makes the model, and upstream's converter needs it")
    import tiny_models

    spec = tiny_models.TINY_MODELS["qwen2moe"]
    widths = dict(hidden_size=256, moe_intermediate_size=256, shared_expert_intermediate_size=256)
    spec = replace(spec, config={**spec.config, **widths})
    return tiny_models.build(tmp_path_factory.mktemp("tiny"), [spec])[spec.name]


@pytest.fixture(scope="session")
def tiny_planned(tiny, tmp_path_factory) -> Path:
    """The tiny model with sensitivities, so that converting it measures nothing."""
    return plan_from_made_up_profile(tiny.gguf_path, tmp_path_factory.mktemp("planned") / "tiny.gguf")


@pytest.fixture(scope="session")
def tiny_split(tiny_planned, tmp_path_factory) -> list:
    """The same in three files."""
    from gguf_factory import split_gguf

    paths = split_gguf(tiny_planned, tmp_path_factory.mktemp("split") / "tiny", 30)
    assert len(paths) == 3
    return paths


@pytest.fixture
def out(tmp_path) -> Path:
    """An empty folder for the output, so that it shows what else was left there."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def put_picture(llm, n_places=6, seed=0):
    """What llama-cpp-python's chat handlers do with a picture, when its encoder has run: embeddings in the places of tokens."""
    n_embd, begin = llm.n_embd(), llm.n_tokens
    batch = llama_cpp.llama_batch_init(n_places, n_embd, 1)
    try:
        values = np.random.default_rng(seed).standard_normal(n_places * n_embd).astype(np.float32)
        np.ctypeslib.as_array(batch.embd, (n_places * n_embd,))[:] = values
        batch.n_tokens = n_places
        for i in range(n_places):
            batch.pos[i], batch.n_seq_id[i], batch.logits[i] = begin + i, 1, i == n_places - 1
            batch.seq_id[i][0] = 0
        assert llama_cpp.llama_decode(llm.ctx, batch) == 0
    finally:
        llama_cpp.llama_batch_free(batch)
    llm.input_ids[begin : begin + n_places] = 2**30  # what was there before, which may be anything
    llm.n_tokens = begin + n_places

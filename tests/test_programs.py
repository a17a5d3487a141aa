"""llama.cpp's own programs, linked to our libraries, run a planned file as Python does. Builds llama-perplexity: pytest -m slow."""

import os
import subprocess
import sys

from allocmoe_edge import Llama
from allocmoe_edge._native import llama_cpp
from conftest import ROOT, plan_under_rule
import numpy as np
import pytest

N_CTX, N_CHUNKS = 128, 2
TEXT = ROOT / "docs" / "how-it-works.md"


@pytest.fixture(scope="module")
def perplexity():
    build = ROOT / "build" / "programs"
    configure = [
        "cmake",
        "-S",
        ROOT / "native",
        "-B",
        build,
        f"-DPython_EXECUTABLE={sys.executable}",
        "-DALLOCMOE_PROGRAMS=ON",
    ]
    subprocess.run(configure, check=True, capture_output=True)
    subprocess.run(
        ["cmake", "--build", build, "--target", "llama-perplexity", "-j", str(os.cpu_count())],
        check=True,
        capture_output=True,
    )
    return build / "programs" / "llama-perplexity"


def saved(program, path, target, *options) -> tuple:
    """(tokens, log probabilities as the program saves them) of the second half of each window: it rounds them to 16 bits between
    the largest and the least, and writes step, least, and the rounded. tokens: [N_CHUNKS, N_CTX]."""
    command = [program, "-m", path, "-f", TEXT, "-c", N_CTX, "-b", N_CTX, "-t", 2, "-fa", "off", "--chunks", N_CHUNKS]
    command += ["--save-all-logits", target, "--no-warmup", *options]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    data = target.read_bytes()
    assert data[:8] == b"_logits_"
    n_ctx, n_vocab, n_chunk = np.frombuffer(data, np.int32, 3, 8)
    assert (n_ctx, n_chunk) == (N_CTX, N_CHUNKS)
    tokens = np.frombuffer(data, np.int32, n_chunk * n_ctx, 20).reshape(n_chunk, n_ctx)
    width = 4 + 2 * ((n_vocab + 1) // 2)
    rows = np.frombuffer(data, np.uint16, -1, 20 + tokens.nbytes).reshape(n_chunk, -1, width)
    return tokens, np.ascontiguousarray(rows[..., :4]).view(np.float32), rows[..., 4 : 4 + n_vocab]


def logits(llm, window) -> np.ndarray:
    """float32, [tokens of the second half but the last, n_vocab]: in one batch, with output for that half alone, as the program."""
    llm.clear_cache()
    batch = llama_cpp.llama_batch_init(N_CTX, 0, 1)
    batch.n_tokens = N_CTX
    for i, token in enumerate(window.tolist()):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, i, 1, 0
        batch.logits[i] = i >= N_CTX // 2
    assert llama_cpp.llama_decode(llm.ctx, batch) == 0
    n = N_CTX - N_CTX // 2
    found = np.ctypeslib.as_array(llama_cpp.llama_get_logits(llm.ctx), (n, llm.n_vocab()))[: n - 1].copy()
    llama_cpp.llama_batch_free(batch)
    return found


@pytest.fixture(scope="module")
def planned(testbed_path, tmp_path_factory):
    """The small real model, with thresholds and an estimator that are made up, and half of its experts."""
    return lambda rule: plan_under_rule(testbed_path, tmp_path_factory.getbasetemp() / f"planned-{rule}.gguf", rule)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["off", "threshold", "estimate"])
def test_perplexity_and_python_have_equal_logits(perplexity, planned, tmp_path, rule):
    path = planned(rule)
    llm = Llama(str(path), n_ctx=N_CTX, n_batch=N_CTX, n_ubatch=N_CTX, n_threads=2, n_threads_batch=2, verbose=False)
    bits = {}
    for total in (None, 90):
        options = [] if total is None else ["--override-kv", f"allocmoe.budget_total=int:{total}"]
        tokens, steps, rounded = saved(perplexity, path, tmp_path / "logits", *options)
        assert llm.set_budget(total).token_rule == rule
        for window, step, row in zip(tokens, steps, rounded):
            found = logits(llm, window)
            least = np.maximum(found.min(1), found.max(1) - 16)
            want = (found.max(1) - least) / np.float32(65535)
            assert np.array_equal(step[:, 0], want)
            steps_up = np.rint((1 / want)[:, None] * (found - least[:, None]))
            assert np.array_equal(row, np.where(found > least[:, None], steps_up, 0).astype(np.uint16))
            bits[total] = row.copy()
    # a budget shows
    assert (bits[None] != bits[90]).mean() > 0.5
    llm.close()

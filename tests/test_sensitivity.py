"""Sensitivities: which cells are measured, that they hold what they should, and that reuse changes nothing."""

from pathlib import Path

from allocmoe_edge import Llama, Plan
from allocmoe_edge._native import context_pointer, ffi, libllama
from allocmoe_edge.convert import sensitivity
from allocmoe_edge.convert.checkpoint import Checkpoint
from allocmoe_edge.measure.perplexity import Reference, perplexity
from allocmoe_edge.plan import metadata
import numpy as np
import pytest

FULL = (12,) * 30


@pytest.fixture(scope="module")
def llm(testbed_path):
    return Llama(str(testbed_path), n_ctx=32, n_batch=32, n_ubatch=32, verbose=False)


@pytest.fixture(scope="module")
def text(llm):
    rng = np.random.default_rng(0)
    return rng.integers(100, 40000, (2, 32)).astype(np.int32)


def divergence(llm, text, counts) -> float:
    """Mean KL to the full model by the definition, from whole runs and in float64."""

    def log_p(plan, window):
        llm.set_plan(plan)
        llm.reset()
        llm.eval(window.tolist())
        logits = np.array(llm.eval_logits, np.float64)[:-1]
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))

    values = []
    for window in text:
        p, q = log_p(FULL, window), log_p(counts, window)
        values.append((np.exp(p) * (p - q)).sum(axis=1).mean())
    return float(np.mean(values))


def kept_output(llm: Llama, il: int) -> np.ndarray:
    """float32 [n_tokens, n_embd]: layer il's output in the last micro-batch that kept it, [0, n_embd] where none did."""
    context = context_pointer(llm)
    output = np.empty(libllama.allocmoe_get_kept_output(context, il, ffi.NULL, 0), np.float32)
    libllama.allocmoe_get_kept_output(context, il, ffi.from_buffer("float *", output), output.size)
    return output.reshape(-1, llm.n_embd())


@pytest.fixture(scope="module")
def full_logits_llm(testbed_path):
    return Llama(str(testbed_path), n_ctx=32, n_batch=32, logits_all=True, verbose=False)


def test_cells_of_each_mode():
    full = (0, 2, 4)
    assert sensitivity.cells(full, "isolated") == {
        (1, 1): (0, 1, 1), (1, 2): (0, 2, 1), (2, 1): (0, 2, 1), (2, 2): (0, 2, 2), (2, 3): (0, 2, 3), (2, 4): full,
    }  # fmt: skip
    assert sensitivity.cells(full, "single") == {
        (1, 1): (0, 1, 4), (1, 2): full, (2, 1): (0, 2, 1), (2, 2): (0, 2, 2), (2, 3): (0, 2, 3), (2, 4): full,
    }  # fmt: skip
    assert sensitivity.cells(full, "fast") == {(1, 1): (0, 1, 4), (1, 2): full, (2, 2): (0, 2, 2), (2, 4): full}
    assert [sensitivity.n_passes(full, mode) for mode in sensitivity.MODES] == [3, 5, 5]
    # as DeepSeek-V2-Lite: 26 layers of 6, after a dense one
    deepseek = (0,) + (6,) * 26
    assert [sensitivity.n_passes(deepseek, mode) for mode in sensitivity.MODES] == [27, 131, 131]


def test_reference_is_the_divergence(llm, full_logits_llm, text):
    """KL in float32 with a streamed reference, against the definition in float64: 1e-5 of a nat is rounding."""
    counts = (12,) * 14 + (3,) + (12,) * 15
    llm.set_plan(FULL)
    reference = Reference(llm, text[0])
    llm.set_plan(counts)
    nll, kl = reference.compare(llm)
    assert kl.mean() == pytest.approx(divergence(full_logits_llm, text[:1], counts), abs=1e-5)
    assert np.exp(nll.mean()) == pytest.approx(perplexity(llm, text[:1]), rel=1e-9)
    llm.set_plan(FULL)
    assert np.abs(reference.compare(llm)[1]).max() < 1e-5


def test_isolated_profile_measured_by_hand(llm, full_logits_llm, text, tmp_path):
    """Layer l at k, layers before it at 12, layers after it at 1, each from a whole run."""
    with Checkpoint(tmp_path / "c", Path(llm.model_path)) as checkpoint:
        few = text[:1, :16]
        rows, reused = sensitivity.measure(llm, FULL, few, "isolated", "perplexity", checkpoint)
        assert reused == 0
        for layer, k in ((0, 1), (0, 12), (1, 1), (14, 5), (29, 1), (29, 12)):
            llm.set_plan([12] * layer + [k] + [1] * (29 - layer))
            assert perplexity(llm, few) == pytest.approx(rows[layer][k - 1], rel=1e-9)
        assert rows[0][11] == rows[1][0]
        # the other metric needs no further run
        by_kl, reused = sensitivity.measure(llm, FULL, few, "isolated", "kl", checkpoint)
        assert reused == 330
        for layer, k in ((0, 1), (14, 5)):
            counts = (12,) * layer + (k,) + (1,) * (29 - layer)
            assert by_kl[layer][k - 1] == pytest.approx(divergence(full_logits_llm, few, counts), rel=1e-4)


def test_a_perplexity_that_is_better_at_half_by_chance():
    """It was taken for what fewer experts gain, and one was best of all."""
    damage, errors = {(0, 2): 9.99, (0, 4): 10.0}, np.array([4.0, 3.0, 1.0, 0.5, 0.0])
    assert np.array_equal(sensitivity._from_errors(damage, 0, errors), [10.0] * 4)


def test_fast_profile(llm, full_logits_llm, text, tmp_path):
    """Measured at half; in proportion to the layer's own output error elsewhere; nothing lost at full."""
    with Checkpoint(tmp_path / "c", Path(llm.model_path)) as checkpoint:
        rows, _ = sensitivity.measure(llm, FULL, text, "fast", "kl", checkpoint)
    for layer in (0, 13, 29):
        counts = (12,) * layer + (6,) + (12,) * (29 - layer)
        assert rows[layer][5] == pytest.approx(divergence(full_logits_llm, text, counts), rel=1e-3)
    for row in rows:
        assert row.shape == (12,) and row[-1] == 0 and (row[:-1] > 0).all()
        assert (np.diff(row) < 0).all()  # here every expert brings the output nearer


def test_equal_windows_are_not_cells_measured_before(built, tmp_path):
    """A text that repeats itself: its second window was said to have been measured by an earlier run."""
    path = built["olmoe"].gguf_path
    llm = Llama(str(path), n_ctx=16, n_batch=16, n_ubatch=16, verbose=False)
    windows = np.tile(np.random.default_rng(1).integers(3, 200, 16).astype(np.int32), (2, 1))
    with Checkpoint(tmp_path / "c", path) as checkpoint:
        reused = [sensitivity.measure(llm, (4,) * 4, windows, "fast", "kl", checkpoint)[1] for _ in range(2)]
    assert reused == [0, 2 * 4]


@pytest.mark.parametrize("name", ["olmoe", "qwen3moe", "gpt-oss"])
def test_errors_against_the_definition(name, built):
    """|y_K - y_k|^2 of the last layer's MoE output, by what its MoE block adds under plans of K and k experts.

    In the last layer the output of the block changes nothing else before the final norm, so that the difference of two
    runs' hidden states is the difference of their MoE outputs. 1e-3: two float32 runs against sums of one.
    """
    path = built[name].gguf_path
    full = metadata.read(path).full
    llm = Llama(str(path), n_ctx=32, n_batch=32, n_ubatch=32, verbose=False)
    window = np.random.default_rng(1).integers(3, 200, 24).astype(np.int32)
    _, errors = sensitivity._reference(llm, full, window)
    hidden = {k: last_hidden(llm, (*full[:-1], k), window) for k in range(1, full[-1] + 1)}
    for k, state in hidden.items():
        want = float(((state - hidden[full[-1]]) ** 2).sum())
        assert errors[-1][k] == pytest.approx(want, rel=1e-3, abs=1e-6 * errors[-1][0])


def last_hidden(llm, counts, window) -> np.ndarray:
    """The last layer's output before the final norm, float32 [n_tokens, n_embd]."""
    llm.apply_plan(Plan(counts, metadata.read(llm.model_path).full), keep_outputs=True)
    Reference(llm, window)
    return kept_output(llm, len(counts) - 1)


@pytest.mark.parametrize(
    "name", ["olmoe", "qwen2moe", "qwen3moe", "mixtral", "deepseek2", "deepseek3", "gpt-oss", "granitemoe"]
)
def test_late_start_is_the_whole_run(name, built):
    """Bit for bit, on every architecture, from every layer, with the layers before it as they were kept."""
    path = built[name].gguf_path
    full = metadata.read(path).full
    llm = Llama(str(path), n_ctx=32, n_batch=32, n_ubatch=32, logits_all=True, verbose=False)
    window = np.random.default_rng(2).integers(3, 200, 24).astype(np.int32)
    for il in range(1, len(full)):
        counts = list(full)
        counts[il] = min(1, full[il])
        plan = Plan(counts, full)
        logits = []
        for start in (0, il):
            sensitivity._reference(llm, full, window)
            llm.apply_plan(plan, start_layer=start)
            llm.clear_cache()
            llm.expert_stats(reset=True)
            llm.eval(window.tolist())
            logits.append(np.array(llm.eval_logits))
        np.testing.assert_array_equal(*logits)
        if any(full[:il]):
            assert llm.expert_stats()["prefill"]["activations"][:il].sum() == 0  # it did start late


def test_late_start_without_what_it_needs_is_a_whole_run(llm, text):
    llm.set_plan(FULL)
    reference = Reference(llm, text[0])
    sensitivity._reference(llm, FULL, text[1, :20])  # what is kept has another length
    llm.apply_plan(Plan.full(FULL), start_layer=15)
    assert np.abs(reference.compare(llm)[1]).max() < 1e-5

"""Token rule "estimate" in the native library, against transformers: what is kept, what is estimated, what is recorded.

Random models with random estimators: the rule is what is tested here, not whether an estimate is any good.
"""

from __future__ import annotations

from dataclasses import replace

import gguf
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the reference logits are computed by torch")
pytest.importorskip("transformers", minversion="5", reason="the reference models")
pytest.importorskip("tokenizers", reason="the tiny models need a tokenizer")

from allocmoe_edge import Llama, Plan, PlanError  # noqa: E402
from allocmoe_edge._native import context_pointer, ffi, libllama  # noqa: E402
from allocmoe_edge.plan import metadata  # noqa: E402
from allocmoe_edge.plan.estimator import N_QUANTILES, Estimator  # noqa: E402
from gguf_factory import random_estimator, reduced, rounded  # noqa: E402
import native_testing  # noqa: E402
from test_transformers_parity import (  # noqa: E402
    MAX_ERROR,
    MIN_DIFFERENCE,
    TOKENS,
    Reference,
    distance,
    one_torch_thread,  # noqa: F401  (a fixture, for this module too)
    runtime_logits,
)
from tiny_models import TINY_MODELS  # noqa: E402

N_LAYER, N_USED, N_EMBD = 4, 4, 64
N_DOWN, RANK, N_RELU = 10, 7, 2

# The other side of each product with an estimator's matrices is rounded to Q8_0, and may not tip a later decision.
# Measured: at most 5e-3 over all models; with a wrong estimate 0.14 and more.
MAX_ESTIMATE_ERROR = 2e-2

# weights that act on the experts' input leave no output to weight
MODELS = [name for name in TINY_MODELS if name != "llama4"]


def estimator(n_expert: int, seed: int = 5) -> Estimator:
    return random_estimator(N_LAYER, n_expert, N_EMBD, N_DOWN, RANK, seed, N_RELU)


def estimated_sizes(e: Estimator, il: int, x: np.ndarray, experts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """v_e of each token's experts, [n_tokens, K]."""
    u = reduced(x, e.down[il])
    u[:, -N_RELU:] = u[:, -N_RELU:].clip(0)
    log_norm = e.log_norm[il][experts]
    return np.log(weights) + (log_norm[..., :-1] * u[:, None]).sum(-1) + log_norm[..., -1]


def rounded_up(up: np.ndarray) -> np.ndarray:
    """As the runtime rounds it: by the output's rows, padded to whole blocks."""
    rows = np.pad(up.T, ((0, 0), (0, -len(up) % 32)))
    return rounded(rows, gguf.GGMLQuantizationType.Q4_0)[:, : len(up)].T


class ReferenceEstimate:
    """The rule in transformers, in place of a layer's experts; the threshold is taken in the widest gap near the middle."""

    def __init__(self, model: Reference, estimates: Estimator, k_base: int = 1) -> None:
        self.estimates, self.k_base = estimates, k_base
        self.threshold, self.kept, self.sizes, self.inputs, self.missing, self.norms, self.ids = (
            [None] * N_LAYER for _ in range(7)
        )
        self.restore = []
        for il, layer in enumerate(model.model.model.layers):
            for module in layer.modules():
                if hasattr(module, "down_proj") and hasattr(module, "gate_up_proj"):
                    self.restore.append((module, module.forward))
                    module.forward = lambda x, ids, w, il=il, run=module.forward: self(il, run, x, ids, w)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for module, forward in self.restore:
            module.forward = forward

    def __call__(self, il, run, x, ids, weights):
        e = self.estimates
        tensor = lambda array: torch.from_numpy(array[il].copy())  # noqa: E731
        shape, x = x.shape, x.reshape(-1, N_EMBD)
        weights = weights if weights.shape == ids.shape else weights.gather(-1, ids)
        u = torch.from_numpy(reduced(x.numpy(), e.down[il]))
        sizes = torch.from_numpy(estimated_sizes(e, il, *(t.numpy() for t in (x, ids, weights))))
        best = torch.zeros_like(sizes, dtype=bool).scatter(-1, sizes.topk(self.k_base)[1], True)
        others = sizes[~best].sort(descending=True)[0]
        n = max(range(len(others) // 4, 3 * len(others) // 4), key=lambda n: others[n - 1] - others[n])
        assert others[n - 1] - others[n] > 0.02  # 10 times the rounding of a size
        self.threshold[il] = float(others[n - 1] + others[n]) / 2
        kept = best | (sizes >= self.threshold[il])
        outputs = torch.stack(
            [run(x, ids[:, r : r + 1], torch.ones_like(weights[:, :1])) for r in range(ids.shape[1])], 1
        )
        estimate = (tensor(e.output)[ids] + u[:, None, :RANK]) @ torch.from_numpy(rounded_up(e.up[il]))
        keep = kept[..., None]
        self.kept[il], self.sizes[il], self.inputs[il] = kept.numpy(), sizes.numpy(), x.numpy()
        self.missing[il] = (weights[..., None] * outputs * ~keep).sum(1).numpy()
        self.norms[il], self.ids[il] = outputs.norm(dim=-1).numpy(), ids.numpy()
        return (weights[..., None] * torch.where(keep, outputs, estimate)).sum(1).reshape(shape)


@pytest.fixture(scope="module", params=MODELS)
def reference(request, built) -> Reference:
    return Reference(built[request.param].hf_path, built[request.param].spec)


@pytest.fixture(scope="module")
def llm(reference, built):
    path = built[reference.spec.name].gguf_path
    sizes = dict(n_ctx=64, n_threads=2, n_threads_batch=2, logits_all=True, type_k=0, type_v=0, verbose=False)
    llm = Llama(str(path), **sizes)
    yield llm
    llm.close()


def planned(llm, estimates, threshold, k_base=1, k=2) -> Plan:
    full = llm.plan.expert_used_count_full
    counts = [min(k, own) for own in full]
    return Plan(counts, full, "estimate", k_base, [t or 0.0 for t in threshold], estimator=estimates)


def n_expert(reference) -> int:
    config = reference.spec.config
    return next(config[key] for key in ("num_experts", "num_local_experts", "n_routed_experts") if key in config)


@pytest.mark.parametrize("k_base", [1, 2])
def test_logits_and_counts(k_base, reference, llm):
    estimates = estimator(n_expert(reference))
    with ReferenceEstimate(reference, estimates, k_base) as rule:
        wanted = reference.logits(reference.spec.plan(4, 4, 4, 4))
    plan = planned(llm, estimates, rule.threshold, k_base)
    kept = [0 if keep is None else int(keep.sum()) for keep in rule.kept]
    # ranks below the first are skipped too, and ranks above a skipped one kept
    assert any((~keep[:, 0]).any() and (keep[:, 1:] & ~keep[:, :-1]).any() for keep in rule.kept if keep is not None)
    for n_batch, phase in ((len(TOKENS), "prefill"), (1, "decode")):
        llm.expert_stats(reset=True)
        got = runtime_logits(llm, plan, n_batch)
        assert distance(got, wanted) < MAX_ESTIMATE_ERROR
        assert llm.expert_stats()[phase]["activations"].tolist() == kept
    # without the estimate, and with another one, it would show
    for other in (replace(estimates, up=0 * estimates.up), replace(estimates, output=-estimates.output)):
        assert distance(runtime_logits(llm, replace(plan, estimator=other), len(TOKENS)), wanted) > MIN_DIFFERENCE


def test_the_graph_of_a_device(reference, llm):
    """The nodes that a GPU gets, run by the CPU: there the estimate is the sum's first term and every slot is added, so a
    skipped expert's biases (GPT-OSS) may not reach its row."""
    estimates = estimator(n_expert(reference))
    with ReferenceEstimate(reference, estimates) as rule:
        wanted = reference.logits(reference.spec.plan(4, 4, 4, 4))
    native_testing.libllama.allocmoe_build_as_for_devices(context_pointer(llm), True)
    try:
        for n_batch in (len(TOKENS), 1):
            got = runtime_logits(llm, planned(llm, estimates, rule.threshold), n_batch)
            assert distance(got, wanted) < MAX_ESTIMATE_ERROR
    finally:
        native_testing.libllama.allocmoe_build_as_for_devices(context_pointer(llm), False)


def test_nothing_is_estimated_where_nothing_is_skipped(reference, llm):
    estimates = estimator(n_expert(reference))
    expected = runtime_logits(llm, None, len(TOKENS))
    for threshold in (-np.inf, -1e30):  # upstream's graph, and the rule at work
        plan = planned(llm, estimates, [threshold] * N_LAYER)
        assert distance(runtime_logits(llm, plan, len(TOKENS)), expected) < MAX_ERROR


def test_rank_0_estimates_nothing(reference, llm):
    """Only sizes: what is skipped is left out, as under the other rules, and the kept weights stay as they are."""
    estimates = estimator(n_expert(reference))
    none = replace(estimates, output=estimates.output[..., :0], up=estimates.up[:, :0])
    with ReferenceEstimate(reference, replace(estimates, up=0 * estimates.up)) as rule:
        wanted = reference.logits(reference.spec.plan(4, 4, 4, 4))
    assert distance(runtime_logits(llm, planned(llm, none, rule.threshold), len(TOKENS)), wanted) < MAX_ESTIMATE_ERROR


def take(llm, what, il, width):
    n = libllama.allocmoe_take_floats(context_pointer(llm), what, il, ffi.NULL, 0)
    values = np.empty(n, np.float32)
    libllama.allocmoe_take_floats(context_pointer(llm), what, il, ffi.from_buffer("float *", values), n)
    assert libllama.allocmoe_take_floats(context_pointer(llm), what, il, ffi.NULL, 0) == 0
    return values.reshape(-1, width)


def test_records(reference, llm):
    """Recording runs the full model; inputs, sizes, norms and what would be missing are those of the reference."""
    estimates = estimator(n_expert(reference))
    expected = runtime_logits(llm, None, len(TOKENS))
    with ReferenceEstimate(reference, estimates) as rule:
        reference.logits(reference.spec.plan(4, 4, 4, 4))
    first = next(il for il, kept in enumerate(rule.kept) if kept is not None)  # later ones have other inputs there
    plan = planned(llm, estimates, rule.threshold)
    llm.clear_cache()
    llm.apply_plan(plan, record=True, record_inputs=True)
    libllama.allocmoe_clear_records(context_pointer(llm))
    llm.eval(TOKENS)
    assert distance(llm.scores[: len(TOKENS)], expected) < MAX_ERROR

    experts = np.empty((len(TOKENS), N_USED), np.int32)
    n = libllama.allocmoe_take_experts(context_pointer(llm), first, ffi.from_buffer("int32_t *", experts), experts.size)
    assert n == experts.size
    sizes = np.empty(experts.shape, np.float32)
    n = libllama.allocmoe_take_scores(context_pointer(llm), first, ffi.from_buffer("float *", sizes), sizes.size)
    assert n == sizes.size
    # some models of transformers leave a token's experts in no order
    order = np.argsort(rule.ids[first], 1)[np.arange(len(TOKENS))[:, None], np.argsort(np.argsort(experts, 1), 1)]
    by_rank = lambda array: np.take_along_axis(array[first], order, 1)  # noqa: E731
    assert np.array_equal(by_rank(rule.ids), experts)

    close = dict(rtol=1e-3, atol=1e-3)
    inputs = take(llm, libllama.ALLOCMOE_FLOATS_INPUT, first, N_EMBD)
    np.testing.assert_allclose(inputs, rule.inputs[first], **close)
    np.testing.assert_allclose(take(llm, libllama.ALLOCMOE_FLOATS_NORM, first, N_USED), by_rank(rule.norms), **close)
    missing = take(llm, libllama.ALLOCMOE_FLOATS_MISSING, first, N_EMBD)
    np.testing.assert_allclose(missing, rule.missing[first], **close)
    assert np.abs(missing).max() > 0.01
    weights = take(llm, libllama.ALLOCMOE_FLOATS_WEIGHT, first, N_USED)
    np.testing.assert_allclose(sizes, by_rank(rule.sizes), atol=1e-2)
    np.testing.assert_allclose(sizes, estimated_sizes(estimates, first, inputs, experts, weights), atol=1e-3)
    libllama.allocmoe_clear_records(context_pointer(llm))
    llm.set_plan(None)


def test_records_without_logits(reference, llm):
    """What is recorded, and counted, is the same to the last bit where a run ends with the last layer."""
    plan = planned(llm, estimator(n_expert(reference)), [0.0] * N_LAYER)
    found = []
    for skip_logits in (False, True):
        llm.apply_plan(plan, record=True, record_inputs=True, skip_logits=skip_logits)
        libllama.allocmoe_clear_records(context_pointer(llm))
        llm.expert_stats(reset=True)
        logits = llm.decode(TOKENS, 0, logits_all=True)
        logits[:] = np.nan
        logits = llm.decode(TOKENS, 0, logits_all=True)
        assert np.isnan(logits).all() == skip_logits
        inputs = [take(llm, libllama.ALLOCMOE_FLOATS_INPUT, il, N_EMBD) for il in plan.moe_layers]
        found.append((np.concatenate(inputs), llm.expert_stats()["prefill"]["activations"]))
    assert len(found[0][0]) == 2 * len(TOKENS) * len(plan.moe_layers)
    assert all(np.array_equal(one, other) for one, other in zip(*found))
    llm.set_plan(None)  # ends it
    assert np.isfinite(llm.decode(TOKENS, 0, logits_all=True)).all()


# what does not depend on the architecture


@pytest.fixture(scope="module")
def olmoe(built):
    llm = Llama(str(built["olmoe"].gguf_path), n_ctx=64, n_threads=2, logits_all=True, verbose=False)
    yield llm
    llm.close()


def handed(olmoe, n_layer=N_LAYER, n_expert=8, n_embd=N_EMBD, **changes) -> int:
    """What the native side says to an estimator with `changes` in its struct."""
    e = estimator(8)
    arrays = {
        name: ffi.new("float[]", getattr(e, name).ravel().tolist()) for name in ("down", "log_norm", "output", "up")
    }
    for name, value in [(name, value) for name, value in changes.items() if name in arrays]:
        arrays[name][3] = value
        del changes[name]
    struct = ffi.new(
        "struct allocmoe_estimator *", {"n_down": N_DOWN, "rank": RANK, "n_relu": N_RELU, **arrays, **changes}
    )
    return libllama.allocmoe_set_estimator(context_pointer(olmoe), struct, n_layer, n_expert, n_embd)


def test_a_budget_ends_a_run_without_logits(olmoe):
    expected = olmoe.decode(TOKENS, 0).copy()
    full = olmoe.plan.expert_used_count_full
    olmoe.apply_plan(Plan.full(full), skip_logits=True)
    olmoe.decode(TOKENS, 0)[:] = np.nan
    olmoe.set_budget(1.0)
    assert np.array_equal(olmoe.decode(TOKENS, 0), expected)
    olmoe.set_plan(None)


def test_embeddings_come_after_the_last_layer(built):
    llm = Llama(str(built["olmoe"].gguf_path), n_ctx=64, n_threads=2, embedding=True, verbose=False)
    expected = llm.embed("one two")
    llm.apply_plan(Plan.full(llm.plan.expert_used_count_full), skip_logits=True)
    assert llm.embed("one two") == expected
    llm.close()


def test_the_native_side_refuses_what_does_not_fit(olmoe):
    assert handed(olmoe) == libllama.ALLOCMOE_OK
    assert handed(olmoe, n_layer=3) == libllama.ALLOCMOE_ERR_N_LAYER
    sizes = dict(n_expert=7), dict(n_embd=32), dict(n_down=0), dict(rank=-1), dict(rank=N_DOWN + 1)
    sizes += dict(n_relu=-1), dict(n_relu=N_DOWN - RANK + 1), dict(n_down=1 << 15)
    numbers = [{name: bad} for name in ("down", "log_norm", "output", "up") for bad in (np.nan, np.inf, 1e6)]
    numbers += [{name: np.nextafter(np.float32(65504), np.float32(1e6))} for name in ("down", "up", "output")]
    for changes in (*sizes, *numbers):
        assert handed(olmoe, **changes) == libllama.ALLOCMOE_ERR_ESTIMATOR, changes
    assert "beyond the range of float16" in ffi.string(libllama.allocmoe_last_error()).decode()
    for name in ("down", "log_norm", "output", "up"):  # float16's largest, as in Python
        assert handed(olmoe, **{name: 65504.0}) == libllama.ALLOCMOE_OK


def test_a_plan_needs_an_estimator(built):
    llm = Llama(str(built["olmoe"].gguf_path), n_ctx=64, n_threads=2, verbose=False)
    with pytest.raises(PlanError, match="estimator"):
        llm.set_plan(planned(llm, None, [0.0] * N_LAYER))
    rule = ffi.new("struct allocmoe_rule *", {"token_rule": libllama.ALLOCMOE_RULE_ESTIMATE, "k_base": 1})
    rule.threshold = threshold = ffi.new("float[]", [0.0] * N_LAYER)
    counts = [2] * N_LAYER
    assert libllama.allocmoe_set_plan(context_pointer(llm), counts, N_LAYER, rule) == libllama.ALLOCMOE_ERR_RULE
    assert threshold is not None and llm.plan.token_rule == "off"
    llm.close()


def test_an_input_beyond_float16_is_not_estimated(olmoe):
    """u becomes infinite there; the kept experts' part has to survive."""
    e = estimator(8)
    e = replace(e, down=np.where(np.arange(N_DOWN)[:, None] < RANK, 6e4, e.down))
    found = runtime_logits(olmoe, planned(olmoe, e, [0.0] * N_LAYER), len(TOKENS))
    assert np.isfinite(found).all()


def test_weights_on_the_input_leave_nothing_to_estimate(built):
    """Llama 4: the rule is off, with a warning."""
    llm = Llama(str(built["llama4"].gguf_path), n_ctx=64, n_threads=2, verbose=False)
    with pytest.warns(UserWarning, match="token rule 'estimate' is off"):
        llm.set_plan(planned(llm, estimator(16), [0.0] * N_LAYER))
    assert llm.plan.token_rule == "off"
    llm.close()


def test_thresholds_take_the_place_of_estimates(built, tmp_path):
    """Where only estimates cannot run and the file has thresholds too."""
    model = metadata.read(built["llama4"].gguf_path)
    rows = tuple(np.linspace(2.0, 1.0, k) if k else np.empty(0) for k in model.full)
    table = tuple(
        np.array([np.inf, 0.6, 0.4, -np.inf][-k:], np.float32) if k else np.empty(0, np.float32) for k in model.full
    )
    estimates = replace(estimator(16), quantiles=np.tile(np.linspace(-1, 1, N_QUANTILES), (N_LAYER, 1)))
    calibration = metadata.Calibration("made up for a test", 1, "0" * 64)
    profile = metadata.Profile(
        rows, (1.0,) * N_LAYER, calibration, threshold_table=table, token_rule="estimate", estimator=estimates
    )
    plan = profile.plan(0.5, model.full)
    assert plan.token_rule == "estimate"
    metadata.write_side_file(tmp_path / "plan.gguf", model, plan, profile)
    with pytest.warns(UserWarning, match="token rule 'threshold' takes its place") as warned:
        llm = Llama(str(built["llama4"].gguf_path), plan_path=str(tmp_path / "plan.gguf"), n_ctx=64, verbose=False)
    assert llm.plan == profile.plan(plan.budget_total, model.full, "threshold")
    with pytest.warns(UserWarning) as set_later:
        llm.set_budget(0.5)
    with pytest.warns(UserWarning) as set_at_once:
        Llama(llm.model_path, budget=0.5, plan_path=str(tmp_path / "plan.gguf"), n_ctx=64, verbose=False).close()
    # of the line that calls us, whatever is between
    assert {each[0].filename for each in (warned, set_later, set_at_once)} == {__file__}
    llm.close()

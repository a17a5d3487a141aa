"""Architectures whose routing is out of the ordinary: GroveMoE's derived experts, DeepSeek-V4's layers with given ones.

Selection bias, groups of experts and weights ahead of the experts are in test_transformers_parity.py.
"""

from __future__ import annotations

from allocmoe_edge import Llama, Plan
from allocmoe_edge.plan import metadata
from ggml_ffi import Poison, ffi
import numpy as np
import odd_models
from odd_models import N_EXPERT, N_EXPERT_USED, N_LAYER, VOCAB_SIZE
import pytest

TOKENS = np.random.default_rng(2).integers(1, VOCAB_SIZE, 20).tolist()
# n_ubatch: more than TOKENS, one graph an evaluation
SIZES = dict(n_ctx=64, n_threads=2, n_threads_batch=2, logits_all=True, verbose=False)


def logits(llm, n_batch=len(TOKENS)) -> np.ndarray:
    llm.clear_cache()
    for start in range(0, len(TOKENS), n_batch):
        llm.eval(TOKENS[start : start + n_batch])
    found = llm.scores[: len(TOKENS)].copy()
    assert np.isfinite(found).all()
    return found


# GroveMoE


@pytest.fixture(scope="module")
def grovemoe_path(tmp_path_factory):
    return odd_models.write_grovemoe(tmp_path_factory.mktemp("grovemoe") / "grovemoe.gguf")


@pytest.fixture(scope="module")
def grovemoe(grovemoe_path):
    return Llama(str(grovemoe_path), **SIZES)


@pytest.mark.parametrize("k", [1, 2, 3, N_EXPERT_USED])
def test_grovemoe_at_k_is_the_model_that_was_made_with_k(grovemoe, grovemoe_path, k):
    """Both of a layer's sets of experts follow the plan: as upstream's graph with its one number for all layers."""
    override = {"grovemoe.expert_used_count": k}
    made = Llama(str(grovemoe_path), kv_overrides=override, **SIZES)
    assert made.plan.expert_used_count_full == (k,) * N_LAYER
    for n_batch in (len(TOKENS), 1):
        made.set_plan(None)
        grovemoe.set_plan([k] * N_LAYER)
        assert np.array_equal(logits(grovemoe, n_batch), logits(made, n_batch))
    grovemoe.expert_stats(reset=True)
    logits(grovemoe)
    assert grovemoe.expert_stats()["prefill"]["mean"].tolist() == [k] * N_LAYER  # the derived ones are not counted


@pytest.mark.parametrize("rule", ["batch", "threshold"])
def test_grovemoe_has_no_token_rules(grovemoe, rule):
    """Degraded to plain top-k, with a warning that says so, and with the logits of plain top-k."""
    full, counts = [N_EXPERT_USED] * N_LAYER, [3, 1, 2, 4]
    grovemoe.set_plan(counts)
    expected = logits(grovemoe)
    grovemoe.set_plan(None)
    threshold = [0.2] * N_LAYER if rule == "threshold" else None
    with pytest.warns(UserWarning, match=f"token rule '{rule}' is off") as warned:
        grovemoe.set_plan(Plan(counts, full, token_rule=rule, threshold=threshold))
    assert warned[0].filename == __file__
    assert grovemoe.plan == Plan(counts, full)
    assert np.array_equal(logits(grovemoe), expected)


# DeepSeek-V4

N_HASH = 2  # layers 0 and 1 take their experts from a table by token id, 2 and 3 have routers


@pytest.fixture(scope="module")
def deepseek4_path(tmp_path_factory):
    return odd_models.write_deepseek4(tmp_path_factory.mktemp("deepseek4") / "deepseek4.gguf", N_HASH)


@pytest.fixture(scope="module")
def spy():
    """Records, by node name, the expert ids that MUL_MAT_ID is given."""
    poison, seen = Poison(), {}

    def after(tensor):
        name = ffi.string(tensor.name).decode()
        if name.startswith("ffn_moe_down-"):
            ids = tensor.src[2]
            rows = [
                ffi.buffer(ffi.cast("char *", ids.data) + t * ids.nb[1], 4 * ids.ne[0])[:] for t in range(ids.ne[1])
            ]
            seen[int(name.split("-")[1])] = np.array([np.frombuffer(row, np.int32) for row in rows])

    poison.after = after
    poison.when = "node"  # which also fills every result with NaN beforehand
    poison.seen = seen
    return poison


@pytest.fixture(scope="module")
def deepseek4(deepseek4_path, spy):
    return spy.load(deepseek4_path, **SIZES)


def test_hash_layers_are_no_part_of_the_budget(deepseek4, deepseek4_path):
    full = (0,) * N_HASH + (N_EXPERT_USED,) * (N_LAYER - N_HASH)
    assert metadata.read(deepseek4_path).full == full  # Python and the native side agree
    assert deepseek4.plan.expert_used_count_full == full
    logits(deepseek4)
    deepseek4.expert_stats(reset=True)
    logits(deepseek4)
    assert deepseek4.expert_stats()["prefill"]["mean"].tolist() == list(full)


@pytest.mark.parametrize("rule", ["off", "batch", "threshold", "only the base"])
@pytest.mark.parametrize("n_batch", [len(TOKENS), 1])
def test_hash_layers_keep_their_given_experts(deepseek4, spy, rule, n_batch):
    """Under every rule: all of the table's ids in the hash layers, planned numbers of ids in the others."""
    full = deepseek4.plan.expert_used_count_full
    table = np.random.default_rng(0)  # as odd_models draws it
    given = [np.array([table.permutation(N_EXPERT)[:N_EXPERT_USED] for _ in range(VOCAB_SIZE)]) for _ in range(N_HASH)]
    counts = [0] * N_HASH + [2] * (N_LAYER - N_HASH)
    threshold = {"threshold": [0.9] * N_LAYER, "only the base": [np.inf] * N_LAYER}.get(rule)
    name = rule if threshold is None else "threshold"
    deepseek4.set_plan(Plan(counts, full, token_rule=name, threshold=threshold))
    assert deepseek4.plan.token_rule == name
    deepseek4.expert_stats(reset=True)
    logits(deepseek4, n_batch)
    tokens = TOKENS[-n_batch:]  # of the last graph
    for il in range(N_HASH):
        assert np.array_equal(spy.seen[il], given[il][tokens])
    spent = deepseek4.expert_stats()["prefill" if n_batch > 1 else "decode"]
    assert not spent["activations"][:N_HASH].any()
    for il in range(N_HASH, N_LAYER):
        kept = (spy.seen[il] >= 0).sum(1)
        assert (kept >= 1).all()
        if rule == "off":
            assert spy.seen[il].shape[1] == 2 and (kept == 2).all()
        else:
            assert spy.seen[il].shape[1] == N_EXPERT_USED
        if rule == "batch":
            assert kept.sum() == 2 * len(tokens)
        if rule == "threshold":
            assert 1 < spent["mean"][il] < N_EXPERT_USED
        if rule == "only the base":
            assert (kept == 1).all()
            assert spent["mean"][il] == 1


def test_skipping_is_like_not_choosing_after_hash_layers(deepseek4):
    """As in test_transformers_parity.py: skipping all beyond rank k gives plain top-k, within float32 rounding."""
    full = deepseek4.plan.expert_used_count_full
    deepseek4.set_plan([0, 0, 1, 1])
    expected = logits(deepseek4)
    deepseek4.set_plan(Plan([0, 0, 2, 2], full, token_rule="threshold", threshold=[np.inf] * N_LAYER))
    assert np.abs(logits(deepseek4) - expected).max() < 1e-4 * expected.std()
    deepseek4.set_plan(None)
    assert np.abs(logits(deepseek4) - expected).max() > 0.1 * expected.std()

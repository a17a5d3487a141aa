"""A limit on the experts of a verification: which of them run, and what that changes in a model."""

from __future__ import annotations

from dataclasses import replace

from allocmoe_edge import DraftModel, Llama, PlanError
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding
from native_testing import ffi, libllama
import numpy as np
import pytest
from test_llama_estimate import FULL, planned, profile, random_estimator, source  # noqa: F401  fixtures

N_EXPERT = 12
TOKENS = list(range(3, 15))


def reference(sizes, routed, share) -> np.ndarray:
    """The ids that stay, from the definition in native/allocmoe-union.h."""
    kept = routed >= 0
    value = np.zeros(sizes.shape)
    finite = kept & ~np.isnan(sizes)
    value[finite] = np.exp(2.0 * (sizes[finite].astype(float) - sizes[finite].max(initial=-np.inf)))
    union = np.unique(routed[kept])
    total = {e: value[kept & (routed == e)].sum() for e in union}
    stay = {routed[t, np.where(kept[t], value[t], -1).argmax()] for t in range(len(routed)) if kept[t].any()}
    for e in sorted(set(union) - stay, key=lambda e: (-total[e], e)):
        if len(stay) < np.ceil(share * len(union)):
            stay.add(e)
    return np.where(np.isin(routed, list(stay)), routed, -1)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("n_tokens", [1, 2, 5, 17])
def test_which_experts_stay(n_tokens, share):
    rng = np.random.default_rng(n_tokens)
    for case in ("as they come", "all alike", "not numbers", "huge"):
        routed = np.array([rng.permutation(N_EXPERT)[:6] for _ in range(n_tokens)], np.int32)
        routed[rng.random(routed.shape) < 0.3] = -1
        routed[0] = -1  # a token that keeps none
        sizes = rng.standard_normal(routed.shape).astype(np.float32)
        if case == "all alike":
            sizes[:] = 0.5
        elif case == "not numbers":
            sizes[rng.random(routed.shape) < 0.3] = np.nan
        elif case == "huge":
            sizes *= 1e4
        found, n_dropped = routed.copy(), np.zeros(n_tokens, np.int32)
        pointers = ffi.from_buffer("float[]", sizes), ffi.from_buffer("int32_t[]", found, require_writable=True)
        dropped = ffi.from_buffer("int32_t[]", n_dropped, require_writable=True)
        libllama.allocmoe_select_union(pointers[0], 6, n_tokens, N_EXPERT, share, pointers[1], dropped)
        assert np.array_equal(found, reference(sizes, routed, share)), case
        assert n_dropped.tolist() == ((routed >= 0) & (found < 0)).sum(1).tolist()


@pytest.fixture(scope="module")
def llm(planned):  # noqa: F811
    llm = Llama(planned, n_ctx=256, flash_attn=True, verbose=False)
    # thresholds in the midst of the sizes, of 4 experts and of which about 3 run
    plan = random_estimator().plan(12, FULL)
    llm.set_plan(replace(plan, threshold=(-3.0,) * 4, strict=False))
    return llm


def logits(llm, share, n=len(TOKENS)):
    """(logits, activations by layer) of tokens that are evaluated together."""
    llm.decode(TOKENS[:2])
    llm.expert_stats(reset=True)
    with llm.limited_union(share):
        found = llm.decode(TOKENS[2:n], 2, logits_all=True).copy()
    return found, llm.expert_stats()["prefill"]["activations"]


def test_what_a_model_runs(llm):
    free, spent = logits(llm, None)
    for share in (0.99, 1 - 1e-9):  # of 8 experts that leaves all
        same, all_of_them = logits(llm, share)
        assert np.array_equal(same, free) and np.array_equal(all_of_them, spent)
    found = {share: logits(llm, share) for share in (0.7, 0.5, 0.1)}
    totals = [spent.sum(), *(activations.sum() for _, activations in found.values())]
    assert totals == sorted(totals, reverse=True) and len(set(totals)) > 2
    for values, activations in found.values():
        assert (activations >= len(TOKENS) - 2).all()  # each token keeps one
        assert not np.array_equal(values, free) and np.isfinite(values).all()
    # afterwards all is as before, and a single token is never limited
    assert np.array_equal(logits(llm, None)[0], free)
    assert np.array_equal(logits(llm, 0.1, 3)[0], logits(llm, None, 3)[0])


def test_what_a_position_has_spent(llm):
    """Is told without what was left out."""
    from allocmoe_edge._native import context_pointer

    _, activations = logits(llm, 0.5)
    spent, tokens = ffi.new("int64_t[]", 4), ffi.new("int64_t[]", 4)
    libllama.allocmoe_get_spent(context_pointer(llm), 0, 2, len(TOKENS), spent, tokens, 4)
    assert list(spent) == activations.tolist()


def test_drafts_with_a_limit(llm, planned):  # noqa: F811
    draft = DraftModel(LlamaPromptLookupDecoding(), n_draft=4, verification_budget=0.5)
    drafted = Llama(planned, n_ctx=256, flash_attn=True, verbose=False, draft_model=draft)
    text = [token for token, _ in zip(drafted.generate(TOKENS * 3, temp=0.0), range(40))]
    assert len(text) == 40 and drafted.draft_stats()["proposed"] > 0
    # a rule without estimates, set later: no limit
    drafted.set_budget(0.5, token_rule="off")
    unlimited = Llama(planned, n_ctx=256, verbose=False)
    unlimited.set_budget(0.5, token_rule="off")
    texts = [[token for token, _ in zip(one.generate(TOKENS * 3, temp=0.0), range(40))] for one in (drafted, unlimited)]
    assert texts[0] == texts[1] and len(texts[0]) == 40


def test_limits_that_there_are_not(llm, source):  # noqa: F811
    for share in (0.0, 1.0, -1, 2, "half", float("nan")):
        with pytest.raises(ValueError, match="verification_budget: found .* want a share"):
            DraftModel.same(verification_budget=share)
    with pytest.raises(PlanError, match="token rule .estimate. alone"):
        Llama(
            source,
            n_ctx=64,
            verbose=False,
            draft_model=DraftModel(LlamaPromptLookupDecoding(), verification_budget=0.5),
        )
    for share in (0.0, -1, 2, "half", float("nan"), 10**400, True):
        with (
            pytest.raises(ValueError, match="share of experts: found .* above 0 and up to 1"),
            llm.limited_union(share),
        ):
            pass

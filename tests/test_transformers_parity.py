"""Per-layer expert counts give the logits that Hugging Face transformers gives.

Tiny random models, float32 on both sides: every architecture runs in transformers with `top_k`
set layer by layer, and in allocmoe_edge with `set_plan`, on the same token ids. Under test: layer
l activates plan[l] experts; the weights are renormalised over the kept experts exactly where the
model renormalises; selection bias and expert groups act on selection only; shared experts and
dense layers are left alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Iterator, Sequence

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the reference logits are computed by torch")
transformers = pytest.importorskip(
    "transformers", minversion="5", reason="the reference models, with `top_k` in the router"
)
pytest.importorskip("tokenizers", reason="the tiny models need a tokenizer")

from allocmoe_edge import Llama, Plan  # noqa: E402
import tiny_models  # noqa: E402  (imports follow the skips)
from tiny_models import TINY_MODELS, TinyModel  # noqa: E402

# Errors and differences below are max |a - b| over all logits of all tokens, divided by the
# standard deviation of the reference logits (`distance`).

# Both sides compute in float32 and differ in the order of their sums, through 4 layers. Measured:
# 2e-6 to 1.2e-5 over all models and plans, at full k too.
MAX_ERROR = 1e-4

# What the comparison must be able to tell apart: another plan, or the wrong renormalisation.
# Measured: 0.3 and up for one expert less in the last layer alone, 0.87 and up for the plans here.
MIN_DIFFERENCE = 0.1

# Relative noise on every weight for `test_reference_is_stable`, 1,000 times float32 rounding.
# Without a flipped expert it moves the logits by 0.002 to 0.013.
WEIGHT_NOISE = 1e-4

GGML_TYPE_F32 = 0

# Longer than the attention window (16) of the tiny GPT-OSS. The seed is the best of 1,500: over all
# models, plans, layers and tokens the last expert kept and the first one dropped are 0.002 or more
# apart in router logits, 100 times the error, so no expert flips. Another seed, or other weights,
# need the search again; `test_reference_is_stable` tells.
TOKENS: list[int] = np.random.default_rng(377).integers(1, tiny_models.VOCAB_SIZE, 20).tolist()

# One count per layer; `TinyModel.plan` puts 0 where a layer is dense. The two mixed plans spend
# the same total, so the order of the layers counts too.
PLANS = {
    "full": (4, 4, 4, 4),
    "mixed": (4, 1, 2, 3),
    "reversed": (3, 2, 1, 4),
    "ones": (1, 1, 1, 1),
}


class Reference:
    """A tiny model in transformers, with per-layer expert counts."""

    def __init__(self, hf_path: Path, spec: TinyModel) -> None:
        self.spec = spec
        # The eager paths: the only attention with GPT-OSS's sinks, the plainest expert loop.
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            hf_path,
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",
        ).eval()
        # The count is `top_k` of the router, the innermost module that has one (Mixtral's block
        # keeps a copy; set all, outermost first).
        self.routers = [[m for m in layer.modules() if hasattr(m, "top_k")] for layer in self.model.model.layers]
        moe_layers = [bool(modules) for modules in self.routers]
        assert moe_layers == [k > 0 for k in spec.plan(4, 4, 4, 4)], (
            f"{spec.name}: MoE layers found by their `top_k`: {moe_layers}; has transformers "
            f"{transformers.__version__} renamed it?"
        )

    def logits(self, plan: Sequence[int]) -> np.ndarray:
        """Logits of TOKENS at `plan`, float32 [n_tokens, n_vocab]."""
        for modules, k in zip(self.routers, plan, strict=True):
            for module in modules:
                module.top_k = k
        with torch.inference_mode():
            return self.model(torch.tensor([TOKENS])).logits[0].numpy()


def runtime_logits(llm: Llama, plan: Plan | Sequence[int] | None, n_batch: int) -> np.ndarray:
    """Logits of TOKENS at `plan`, evaluated n_batch tokens at a time."""
    llm.set_plan(plan)
    llm.reset()
    for start in range(0, len(TOKENS), n_batch):
        llm.eval(TOKENS[start : start + n_batch])
    return llm.scores[: len(TOKENS)].copy()


def distance(logits: np.ndarray, reference: np.ndarray) -> float:
    """max |logits - reference| over the standard deviation of the reference."""
    assert logits.shape == reference.shape
    assert np.isfinite(logits).all()
    return float(np.abs(logits - reference).max() / reference.std())


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Tensors this small take longer with more: the threads only wait for each other."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="module", params=TINY_MODELS)
def reference(request, built) -> Reference:
    model = built[request.param]
    return Reference(model.hf_path, model.spec)


@pytest.fixture(scope="module")
def expected(reference: Reference) -> dict[str, np.ndarray]:
    """Reference logits of every plan, by the plan's name."""
    return {name: reference.logits(reference.spec.plan(*plan)) for name, plan in PLANS.items()}


@pytest.fixture(scope="module")
def llm(reference: Reference, built) -> Iterator[Llama]:
    # The default half-precision KV cache costs three digits: 2e-3 to 9e-3.
    llm = Llama(
        model_path=str(built[reference.spec.name].gguf_path),
        n_ctx=64,
        n_threads=2,
        n_threads_batch=2,
        logits_all=True,
        type_k=GGML_TYPE_F32,
        type_v=GGML_TYPE_F32,
        verbose=False,
    )
    yield llm
    llm.close()


@pytest.mark.parametrize("plan", PLANS)
def test_prefill_matches(plan, reference, expected, llm):
    got = runtime_logits(llm, reference.spec.plan(*PLANS[plan]), n_batch=len(TOKENS))
    assert distance(got, expected[plan]) < MAX_ERROR
    for other in PLANS.keys() - {plan}:
        assert distance(got, expected[other]) > MIN_DIFFERENCE, other


@pytest.mark.parametrize("plan", ["mixed", "ones"])
def test_decode_matches(plan, reference, expected, llm):
    got = runtime_logits(llm, reference.spec.plan(*PLANS[plan]), n_batch=1)
    assert distance(got, expected[plan]) < MAX_ERROR


def test_cleared_plan_is_full_budget(reference, expected, llm):
    runtime_logits(llm, reference.spec.plan(*PLANS["ones"]), n_batch=len(TOKENS))
    got = runtime_logits(llm, None, n_batch=len(TOKENS))
    assert distance(got, expected["full"]) < MAX_ERROR


@pytest.mark.parametrize("plan", PLANS)
def test_plan_in_force(plan, reference, llm):
    counts = reference.spec.plan(*PLANS[plan])
    llm.set_plan(counts)
    assert list(llm.plan.expert_used_count) == counts


def test_renormalisation_shows(reference, expected):
    """Had the runtime renormalised where the model does not, or the reverse, we would see it."""

    def flip(router, args, output):
        if len(output) == 2:  # Llama 4: weights of all experts, zero where not chosen
            return output[0] / output[0].sum(-1, keepdim=True), output[1]
        logits, weights, experts = output
        if reference.spec.renormalises:
            weights = logits.softmax(-1).gather(-1, experts)  # shares among all experts
        else:
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights, experts

    hooks = [layer[-1].register_forward_hook(flip) for layer in reference.routers if layer]
    flipped = reference.logits(reference.spec.plan(*PLANS["mixed"]))
    for hook in hooks:
        hook.remove()
    assert distance(flipped, expected["mixed"]) > MIN_DIFFERENCE


def test_reference_is_stable(reference, expected):
    """No routing decision is so close that rounding could flip it: the fixture is sound."""
    original = {name: tensor.clone() for name, tensor in reference.model.state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    reference.model.load_state_dict(
        {
            name: tensor * (1 + WEIGHT_NOISE * torch.randn(tensor.shape, generator=generator))
            for name, tensor in original.items()
        }
    )
    moved = {
        name: distance(reference.logits(reference.spec.plan(*plan)), expected[name]) for name, plan in PLANS.items()
    }
    reference.model.load_state_dict(original)
    assert max(moved.values()) < MIN_DIFFERENCE / 2, moved


@pytest.mark.parametrize("k", [1, 2])
def test_skipping_is_like_not_choosing(k, reference, llm):
    """A token rule that skips every candidate beyond rank k gives plain top-k: weights, bias and groups included.

    The skipping graph runs all 4 ranks with id -1 for the rest, so that this holds only if those slots add nothing and
    the weights are renormalised over the kept ones exactly where the model does so.
    """
    spec = reference.spec
    plain = runtime_logits(llm, spec.plan(k, k, k, k), n_batch=len(TOKENS))
    # the planned count lies between k_base and the model's own, so that the rule is at work; no score reaches infinity
    full = llm.plan.expert_used_count_full
    planned = spec.plan(*[k + 1] * len(full))
    rule = Plan(planned, full, token_rule="threshold", k_base=k, threshold=[np.inf] * len(full))
    for n_batch in (len(TOKENS), 1):
        assert distance(runtime_logits(llm, rule, n_batch), plain) < MAX_ERROR
    llm.expert_stats(reset=True)
    runtime_logits(llm, rule, n_batch=len(TOKENS))
    assert llm.expert_stats()["prefill"]["mean"].tolist() == spec.plan(k, k, k, k)


class ReferenceRule:
    """A token rule in transformers, as a hook on the routers: of each token's ranked experts, keep some.

    Kept are every token's best and the `n_kept` best-scored others of all tokens, which is "batch"; given a range of
    such numbers, the one with the widest gap between kept and skipped is taken, and the middle of the gap is the
    threshold of a "threshold" rule that keeps the same.
    """

    def __init__(self, spec: TinyModel, n_kept: range) -> None:
        self.spec, self.n_kept = spec, n_kept
        self.threshold: list[float] = []  # by MoE layer, as they were met
        self.activations: list[int] = []

    def _scores(self, router, logits):
        """What the experts were ranked by, from every expert's logit."""
        if self.spec.scores == "sigmoid":
            return logits.sigmoid() + router.e_score_correction_bias
        return logits.softmax(-1) if self.spec.scores == "softmax" else logits

    def __call__(self, router, args, output):
        if len(output) == 2:  # Llama 4: weights of all experts, zero where not chosen
            weights, logits = output
            experts = logits.topk(router.top_k)[1]
        else:
            logits, weights, experts = output
        scores = self._scores(router, logits).gather(-1, experts)
        best = scores == scores.max(-1, keepdim=True)[0]
        others = scores[~best].sort(descending=True)[0]
        gap, n = max((float(others[n - 1] - others[n]), n) for n in self.n_kept)
        assert gap > 1e-5  # 100 times the rounding of a score
        self.threshold.append(float(others[n - 1] + others[n]) / 2)
        keep = best | (scores > self.threshold[-1])
        self.activations.append(int(keep.sum()))
        if len(output) == 2:
            return weights * torch.zeros_like(weights).scatter(-1, experts, keep.float()), logits
        kept = weights * keep
        if self.spec.renormalises:  # to the sum that the model gives a token's weights, its scale included
            kept = kept * weights.sum(-1, keepdim=True) / kept.sum(-1, keepdim=True)
        return logits, kept, experts


@pytest.mark.parametrize("rule", ["batch", "threshold"])
def test_token_rule_matches(rule, reference, expected, llm):
    """Which experts a token keeps, their weights, and everything computed from them.

    Of the models here, DeepSeek-V3 has a selection bias and groups, Llama 4 weights the experts' input, GPT-OSS takes
    its softmax over the kept experts only.
    """
    spec, n_tokens = reference.spec, len(TOKENS)
    rule_there = ReferenceRule(
        spec, range(n_tokens, n_tokens + 1) if rule == "batch" else range(n_tokens, 2 * n_tokens)
    )
    hooks = [layer[-1].register_forward_hook(rule_there) for layer in reference.routers if layer]
    wanted = reference.logits(spec.plan(4, 4, 4, 4))
    for hook in hooks:
        hook.remove()

    full, two = llm.plan.expert_used_count_full, spec.plan(2, 2, 2, 2)
    threshold = [0.0] * spec.leading_dense + rule_there.threshold if rule == "threshold" else None
    plan = Plan(two, full, token_rule=rule, threshold=threshold)
    for n_batch in (n_tokens, 1) if rule == "threshold" else (n_tokens,):
        llm.expert_stats(reset=True)
        got = runtime_logits(llm, plan, n_batch)
        assert distance(got, wanted) < MAX_ERROR
        spent = llm.expert_stats()["prefill" if n_batch > 1 else "decode"]["activations"]
        assert spent[spec.leading_dense :].tolist() == rule_there.activations
        assert distance(got, runtime_logits(llm, two, n_batch)) > MIN_DIFFERENCE

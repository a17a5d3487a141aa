"""Long sampled text at half budget: every logit finite, and no collapse into one token or phrase.

What this guards against: rows of skipped experts left unwritten turn, after minutes, into NaN and text like "GGGG".
"""

from __future__ import annotations

from dataclasses import replace
import itertools

from allocmoe_edge import Llama, Plan
from allocmoe_edge.convert import thresholds
from allocmoe_edge.measure.perplexity import bos_token, windows
from allocmoe_edge.plan.profile import thresholds_at
import fuzz_gguf
import llama_cpp
import numpy as np
import pytest

N_CTX = 1024
TEMPERATURE = 0.8
PROMPT = b"The history of the world, told in one book.\n\nChapter 1\n\n"


def sampled(llm, seed: int = 1, n_ctx: int = N_CTX):
    """Tokens sampled at TEMPERATURE, end-of-text left out, without end; the older half of a full context is shifted out."""
    llm.clear_cache()
    rng = np.random.default_rng(seed)
    vocab, memory = llama_cpp.llama_model_get_vocab(llm.model), llama_cpp.llama_get_memory(llm.ctx)
    end = [t for t in range(llm.n_vocab()) if llama_cpp.llama_vocab_is_eog(vocab, t)]
    prompt = llm.tokenize(PROMPT)
    next_logits, n_past = llm.decode(prompt), len(prompt)
    while True:
        logits = next_logits[0].astype(np.float64)
        assert np.isfinite(logits).all(), f"at position {n_past}"
        logits[end] = -np.inf
        p = np.exp((logits - logits.max()) / TEMPERATURE)
        token = int(rng.choice(len(p), p=p / p.sum()))
        yield token
        if n_past == n_ctx:
            half = (n_ctx - len(prompt)) // 2
            llama_cpp.llama_memory_seq_rm(memory, 0, len(prompt), len(prompt) + half)
            llama_cpp.llama_memory_seq_add(memory, 0, len(prompt) + half, n_ctx, -half)
            n_past -= half
        next_logits, n_past = llm.decode([token], n_past), n_past + 1


def write(llm, n_tokens: int) -> list:
    return list(itertools.islice(sampled(llm), n_tokens))


def distinct(text: list, n: int = 4) -> float:
    """Share of the text's n-grams that are different: 1 if none repeats, near 0 for a loop."""
    grams = [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams)


def test_distinct_tells_a_loop():
    assert distinct([5] * 100) < 0.02
    assert distinct([1, 2, 3, 4, 5, 6, 7] * 50) < 0.03
    assert distinct(np.random.default_rng(0).integers(0, 1000, 400).tolist()) > 0.99


@pytest.mark.parametrize("n_tokens", [300, pytest.param(4096, marks=pytest.mark.slow)])
def test_no_collapse(testbed_path, n_tokens):
    from pydoc_data.topics import topics

    llm = Llama(str(testbed_path), n_ctx=N_CTX, verbose=False)
    data = "\n\n".join(topics[name] for name in sorted(topics)).encode()[:20_000]
    tokens = np.array(llm.tokenize(data, add_bos=False), np.int32)
    full = llm.plan.expert_used_count_full
    half = Plan.uniform(full, sum(full) // 2)
    table = thresholds.calibrate(llm, half, windows(tokens, 512, bos_token(llm))[:2])
    threshold = thresholds_at(table, half.expert_used_count)
    plans = {"full": None, "off": half, "threshold": replace(half, token_rule="threshold", threshold=threshold)}
    shares = {}
    for name, plan in plans.items():
        llm.set_plan(plan)
        llm.expert_stats(reset=True)
        text = write(llm, n_tokens)
        shares[name] = distinct(text)
        spent = llm.expert_stats()["decode"]["mean"].mean()
        print(f"{name}: {n_tokens} tokens, {shares[name]:.3f} of 4-grams distinct, {spent:.2f} experts a layer")
        if name == "threshold":
            sample = llm.detokenize(text[-40:]).decode(errors="replace")
            print(f"ends: {sample!r}")
    assert min(shares.values()) > 0.1  # a loop of one or two tokens from an early point on is below


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["off", "batch", "threshold", "estimate"])
def test_counts_do_not_drift(tmp_path, rule):
    """32,768 tokens at each of three budgets, with a shift of the context every hundred tokens: in every eighth of the text
    as many experts run as in the others, and no more than the budget where that is held."""
    llm = Llama(fuzz_gguf.write_bases(tmp_path)[0], n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False)
    n_layer, part = len(llm.plan.expert_used_count_full), 4096
    for budget in (0.4, 0.6, 0.8):
        plan = llm.set_budget(budget, token_rule=rule)
        tokens, spent, shares = sampled(llm, n_ctx=256), [], []
        next(tokens)
        for _ in range(8):
            llm.expert_stats(reset=True)
            text = list(itertools.islice(tokens, part))
            stats = llm.expert_stats()["decode"]
            assert (stats["tokens"] == part).all()
            spent.append(float(stats["mean"].sum()))
            shares.append(distinct(text))
        print(
            f"{rule} {budget}: {plan.budget_total} planned, {min(spent):.3f} to {max(spent):.3f} spent, {min(shares):.3f} distinct"
        )
        if rule in ("off", "batch"):
            assert spent == [plan.budget_total] * 8
        elif plan.strict:
            # what a layer has left over goes to its next tokens: at most one expert of each
            assert max(spent) <= plan.budget_total + n_layer / part
        # a random model, whose text is alike throughout; what holds the budget begins with nothing left over
        assert max(spent[1:]) - min(spent[1:]) < 0.03 * plan.budget_total
        assert min(shares) > 0.1
    llm.close()

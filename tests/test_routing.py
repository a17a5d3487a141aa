"""Local routing consistency against brute force: small routings, every possible answer tried."""

import itertools
import json
import os
import shutil
import subprocess
import sys

from allocmoe_edge.inspect import routing
import numpy as np
import pytest


def random_experts(rng, n_sequences, n_tokens, n_expert, k) -> np.ndarray:
    return rng.permuted(np.tile(np.arange(n_expert), (n_sequences, n_tokens, 1)), axis=2)[..., :k].astype(np.int32)


def segments(experts, m):
    """(sequence, first token) of every segment."""
    return [(s, p) for s in range(len(experts)) for p in range(experts.shape[1] - m + 1)]


@pytest.mark.parametrize("seed", range(4))
def test_srp_is_the_best_f1_of_any_segment_router(seed):
    """All 2^15 segment routers for 5 segments of 3 experts, scored sample by sample as in the paper's appendix C.2."""
    rng, n_expert, m = np.random.default_rng(seed), 3, 2
    experts = random_experts(rng, 1, 6, n_expert, 1)
    pairs = [(s, p, e) for s, p in segments(experts, m) for e in range(n_expert)]
    truth = np.array([[e in experts[s, p + i] for i in range(m)] for s, p, e in pairs])
    best = 0.0
    for router in itertools.product((False, True), repeat=len(pairs)):
        says = np.repeat(np.array(router)[:, None], m, axis=1)
        tp, fp, fn = (truth & says).sum(), (~truth & says).sum(), (truth & ~says).sum()
        best = max(best, 2 * tp / (2 * tp + fp + fn))
    histogram = routing.segment_histogram(routing.activations(experts, n_expert), m)
    srp, chosen = routing.segment_routing_best_performance(histogram)
    assert srp == pytest.approx(best, abs=1e-12)  # a ratio of small integers, rounded once
    # the router that chooses so many pairs, those of highest f first, has that F1
    f = np.sort(truth.sum(axis=1))[::-1]
    assert 2 * f[:chosen].sum() / (chosen * m + f.sum()) == pytest.approx(srp, abs=1e-12)


@pytest.mark.parametrize("m", [1, 2, 5, 7])
def test_histogram_counts_activations_in_segments(m):
    experts = random_experts(np.random.default_rng(1), 3, 7, 5, 2)
    counts = [sum(e in experts[s, p + i] for i in range(m)) for s, p in segments(experts, m) for e in range(5)]
    expected = np.bincount(counts, minlength=m + 1)
    np.testing.assert_array_equal(routing.segment_histogram(routing.activations(experts, 5), m), expected)


def cache_by_hand(experts, m, size):
    """The oracle cache of section 2.3, one token and one list of experts at a time."""
    hits = 0
    for sequence in experts.tolist():
        cache, used = [], {}
        for t, need in enumerate(sequence):
            for e in need:
                hits += e in cache or len(cache) + sum(x not in cache for x in need[: need.index(e)]) < size
            idle = [e for e in cache if e not in need]
            ahead = [e for later in sequence[t + 1 : t + m] for e in later]
            idle.sort(key=lambda e: (-ahead.count(e), -used[e], e))
            cache = need + idle[: size - len(need)]
            used.update((e, t) for e in need)
    return hits / experts.size


@pytest.mark.parametrize("m", [1, 3, 8, 50])
@pytest.mark.parametrize("size", [2, 3, 5, 9])
def test_sch_is_the_hit_rate_of_the_oracle_cache(m, size):
    experts = random_experts(np.random.default_rng(m), 4, 40, 9, 2)
    rate = routing.segment_cache_hit_rate(routing.activations(experts, 9), m, size)
    assert rate == cache_by_hand(experts, m, size)


def test_without_foresight_the_cache_is_lru():
    """m = 1 against an LRU cache as everyone writes it, one expert per token."""
    from collections import OrderedDict

    experts = random_experts(np.random.default_rng(5), 1, 300, 6, 1)
    cache, hits = OrderedDict(), 0
    for e in experts.ravel().tolist():
        hits += e in cache or len(cache) < 3
        cache[e] = cache.pop(e, None)
        if len(cache) > 3:
            cache.popitem(last=False)
    assert routing.segment_cache_hit_rate(routing.activations(experts, 6), 1, 3) == hits / 300


def test_hit_rates_are_those_of_caches_of_every_size():
    """Against one cache after the other, a list of the experts used last each."""
    experts = random_experts(np.random.default_rng(5), 2, 60, 8, 3)
    found = routing.hit_rates(experts, 8)
    for size in range(1, 9):
        recent, hits = [], 0
        for token in experts.reshape(-1, 3).tolist():
            hits += sum(e in recent for e in token)
            for e in reversed(token):  # the best one last
                recent = [x for x in recent if x != e] + [e]
            recent = recent[-size:]
        assert found[size] == hits / experts.size
    assert found[0] == 0 and np.all(np.diff(found) >= 0)
    assert found[8] == 1 - 8 / experts.size  # all but the first uses


def test_the_two_ends():
    same = np.tile(np.array([[[4, 1]]], np.int32), (2, 20, 1))  # every token the same two experts
    found = routing.consistency([same], 8, segment_lengths=(4, 16, 64))
    assert found["segment_lengths"] == [4, 16]  # 64 is longer than the text
    assert found["mean"]["srp"] == [1, 1] and found["mean"]["size_ratio"] == [1, 1]
    assert np.all(np.array(found["mean"]["sch"]) == 1)

    # a round robin over 8 experts: no two neighbours share one, and a cache for one expert never hits but once
    turn = (np.arange(64, dtype=np.int32) % 8).reshape(1, 64, 1)
    found = routing.consistency([turn], 8, segment_lengths=(8,), cache_ratios=(1, 8))
    # all experts once in each segment: choose all, F1 = 2*8/(8*8+8)
    assert found["mean"]["srp"][0] == pytest.approx(2 / 9, abs=1e-12)
    assert found["mean"]["size_ratio"] == [8]
    assert found["mean"]["sch"] == [[1 / 64, 1]]


def test_layers_are_kept_apart_and_averaged():
    rng = np.random.default_rng(7)
    layers = [random_experts(rng, 2, 32, 8, 2), None, np.sort(random_experts(rng, 2, 32, 4, 2), axis=2)]
    seen = []
    found = routing.consistency(layers, 8, (4, 16), (1, 2), progress=lambda: seen.append(1))
    assert [row["layer"] for row in found["layers"]] == [0, 2] and len(seen) == 2
    for key in ("srp", "size_ratio", "sch"):
        expected = np.mean([row[key] for row in found["layers"]], axis=0)
        np.testing.assert_allclose(found["mean"][key], expected, rtol=1e-12)
    alone = routing.consistency([layers[2]], 8, (4, 16), (1, 2))
    assert alone["layers"][0] == {**found["layers"][1], "layer": 0}
    assert alone["model_srp"] == alone["mean"]["srp"]  # one layer is the whole model
    assert min(found["layers"][i]["srp"][0] for i in (0, 1)) < found["model_srp"][0] < 1


@pytest.mark.parametrize("ids", [[[[0, 8]]], [[[-1, 2]]], [[[3, 3]]]])
def test_impossible_ids_are_refused(ids):
    with pytest.raises(ValueError, match="experts: found"):
        routing.activations(np.array(ids, np.int32), 8)


# --- what a model chooses


def test_recorded_experts_are_those_of_transformers(built):
    """A tiny OLMoE: per layer and token the top 4 of 8 router logits, in order, in another implementation."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers", minversion="5")
    from allocmoe_edge import Llama
    from test_transformers_parity import TOKENS
    import tiny_models

    model = transformers.AutoModelForCausalLM.from_pretrained(built["olmoe"].hf_path, dtype=torch.float32).eval()
    windows = np.array([TOKENS, TOKENS[::-1]], np.int32)
    with torch.inference_mode():
        logits = model(torch.tensor(windows.astype(np.int64)), output_router_logits=True).router_logits
    expected = [torch.topk(layer, 4).indices.numpy().reshape(2, len(TOKENS), 4) for layer in logits]

    # micro-batches shorter than a window: what each records is put together
    llm = Llama(
        str(built["olmoe"].gguf_path), n_ctx=len(TOKENS), n_batch=len(TOKENS), n_ubatch=7, n_threads=2, verbose=False
    )
    found = routing.record(llm, windows)
    assert len(found) == len(expected) == tiny_models.N_LAYERS
    for ids, reference in zip(found, expected):
        np.testing.assert_array_equal(ids, reference)


def test_routing_command(planned_path, tmp_path):
    """The testbed uses all of its experts for every token: perfectly consistent, whatever its plan is."""
    text = tmp_path / "text.txt"
    text.write_text("It was a bright cold day in April, and the clocks were striking thirteen. " * 20)
    command = shutil.which("allocmoe-inspect", path=os.path.dirname(sys.executable))
    options = ["--routing", text, "--tokens", "64", "--ctx-size", "32", "--threads", "2", "--plot", tmp_path / "p.html"]
    done = subprocess.run([command, planned_path, "--json", *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["routing"]
    assert (found["source"], found["n_tokens"], found["n_ctx"]) == ("text.txt", 64, 32)
    assert found["segment_lengths"] == [4, 16] and len(found["layers"]) == 30
    assert found["mean"]["srp"] == found["mean"]["size_ratio"] == found["model_srp"] == [1, 1]
    assert np.all(np.array(found["mean"]["sch"]) == 1)
    # twelve of twelve: nothing smaller has them all, and the first token has none
    assert found["mean"]["hit_rate"][11] < found["mean"]["hit_rate"][12] == 63 / 64
    assert "Local routing consistency" in (tmp_path / "p.html").read_text()

"""Local routing consistency: how far neighbouring tokens use the same experts, and so what an expert cache can save.

Liang et al., "Not All Models Suit Expert Offloading: On Local Routing Consistency of Mixture-of-Expert Models",
arXiv 2505.16056, whose notation is used here: m is the length of a segment of consecutive tokens, f(e,p) the number of
tokens in the segment from p on that activate expert e.
"""

from __future__ import annotations

from typing import Optional

import numpy as np

from ..measure.recording import recording
from ..plan import Plan

SEGMENT_LENGTHS = (4, 16, 64, 256)
CACHE_RATIOS = (1.0, 1.5, 2.0, 3.0)


def activations(experts: np.ndarray, n_expert: int) -> np.ndarray:
    """Which experts each token activates.

    Args:
        experts: int, shape [n_sequences, n_tokens, K]: distinct expert ids in [0, n_expert).

    Returns:
        bool, shape [n_sequences, n_tokens, n_expert], K of them true per token.

    Raises:
        ValueError: an id out of range, or twice in one token.
    """
    if experts.size and not (experts.min() >= 0 and experts.max() < n_expert):
        raise ValueError(f"experts: found ids from {experts.min()} to {experts.max()}, want 0 to {n_expert - 1}")
    active = np.zeros((*experts.shape[:2], n_expert), bool)
    np.put_along_axis(active, experts.astype(np.int64), True, axis=2)
    if active.sum() != experts.size:
        raise ValueError("experts: found an id twice in one token, want distinct experts")
    return active


def segment_histogram(active: np.ndarray, m: int) -> np.ndarray:
    """How often each f(e,p) occurs over all experts e and all segments of m tokens, which start at every position p.

    Args:
        active: from `activations`. m: 1 to n_tokens.

    Returns:
        int64, shape [m + 1]: entry f is the number of (expert, segment) pairs with that f.
    """
    total = np.cumsum(active, axis=1, dtype=np.int32)
    f = total[:, m - 1 :].copy()
    f[:, 1:] -= total[:, :-m]
    return np.bincount(f.ravel(), minlength=m + 1)


def segment_routing_best_performance(histogram: np.ndarray) -> tuple:
    """SRP: the best F1 with which a router that must choose once for a whole segment can imitate the real one.

    Such a router is best when it chooses every expert with f(e,p) >= alpha (equations 4 and 6, proof in appendix C.3):

        SRP(E,m) = max over alpha of  2 sum[f >= alpha] f / (sum[f >= alpha] m + sum f),

    sums over all experts e in E and positions p. Histograms of several layers may be added: E is then all of them.

    Args:
        histogram: from `segment_histogram`.

    Returns:
        (SRP, chosen): chosen is how many (expert, segment) pairs that router chooses. Divided by the number of
        segments and by K it is the paper's segment routing size ratio.
    """
    m = len(histogram) - 1
    chosen = np.cumsum(histogram[::-1])[::-1]
    hits = np.cumsum((histogram * np.arange(m + 1))[::-1])[::-1]
    f1 = 2 * hits / np.maximum(chosen * m + hits[0], 1)
    alpha = int(np.argmax(f1[1:])) + 1  # an expert that no token of the segment uses is never worth choosing
    return float(f1[alpha]), int(chosen[alpha])


def segment_cache_hit_rate(active: np.ndarray, m: int, cache_size: int) -> float:
    """SCH: the hit rate of a cache of experts that sees the segment of m tokens that begins with the current one.

    For each token the cache loads the experts it lacks, and evicts those that the segment activates least often
    (section 2.3); of equals, those used longest ago, so that m = 1 is a least-recently-used cache. As in the authors'
    published code the cache does not start cold: an expert that goes into an empty slot counts as a hit.

    Args:
        active: from `activations`, K experts per token; each sequence starts with an empty cache.
        m: at least 1. cache_size: experts, at least K.

    Returns:
        Hits / activations.
    """
    n_seq, n_tokens, n_expert = active.shape
    total = np.zeros((n_seq, n_tokens + 1, n_expert), np.int32)
    np.cumsum(active, axis=1, out=total[:, 1:])
    cached = np.zeros((n_seq, n_expert), bool)
    last_used = np.zeros((n_seq, n_expert), np.int64)
    hits = 0
    for t in range(n_tokens):
        need = active[:, t]
        found = (cached & need).sum(axis=1)
        empty = cache_size - cached.sum(axis=1)
        hits += int((found + np.minimum(need.sum(axis=1) - found, empty)).sum())
        future = total[:, min(t + m, n_tokens)] - total[:, t + 1]
        idle = cached & ~need
        value = np.where(idle, future.astype(np.int64) * (n_tokens + 1) + last_used, -1)
        keep = np.zeros_like(cached)
        room = cache_size - int(need[0].sum())
        np.put_along_axis(keep, np.argsort(-value, axis=1, kind="stable")[:, :room], True, axis=1)
        cached = need | (keep & idle)
        last_used[need] = t + 1
    return hits / max(int(active.sum()), 1)


def hit_rates(experts: np.ndarray, n_expert: int) -> np.ndarray:
    """What caches of every size would have at hand that keep the experts used last, as the runtime's expert cache does: of a
    token's the best counts as used last.

    Args:
        experts: int, [n_sequences, n_tokens, K], best first; the sequences one after the other, and nothing cached before.

    Returns:
        float64 [n_expert + 1], entry n: the share of the activations whose expert was among the n that were used last
        when its token came. It grows with n; the rest at n_expert are first uses.
    """
    recent: list = []
    found = np.zeros(n_expert + 1, np.int64)
    rows = experts.reshape(-1, experts.shape[2]).tolist()
    for ids in rows:
        for e in ids:
            if e in recent:
                found[recent.index(e) + 1] += 1
        recent = [*ids, *(e for e in recent if e not in ids)]
    return np.cumsum(found) / max(1, experts.size)


def record(llm, token_windows: np.ndarray, progress=None) -> Optional[list]:
    """The experts that a model chooses for each token of a text, at its own expert counts.

    Args:
        llm: an `allocmoe_edge.Llama`; its plan is replaced.
        token_windows: int32, shape [n_windows, n_ctx].
        progress: called after each window.

    Returns:
        Per layer int32, shape [n_windows, n_ctx, K_l], best first; None for layers without routed experts. None
        altogether where the model's backend cannot record.

    Raises:
        ValueError: a layer did not record every token.
    """
    full = llm.expert_used_count_full
    recorded: list = [[] for _ in full]
    with recording(llm, Plan(full, full, "batch")) as recorder:
        if not recorder.works:
            return None
        for il, layer in recorder.layers(token_windows, "experts", progress=progress):
            recorded[il].append(layer.experts)
    for il, (rows, k) in enumerate(zip(recorded, full)):
        for ids in rows:
            if ids.size != token_windows.shape[1] * k:
                raise ValueError(f"layer {il} recorded {ids.size} experts, want {token_windows.shape[1]} tokens x {k}")
    return [np.stack(rows).reshape(*token_windows.shape, k) if k else None for rows, k in zip(recorded, full)]


def consistency(
    experts: list, n_expert: int, segment_lengths=SEGMENT_LENGTHS, cache_ratios=CACHE_RATIOS, progress=None
) -> dict:
    """SRP and SCH of every layer, and their means.

    Args:
        experts: from `record`.
        segment_lengths: m; those longer than the windows are left out.
        cache_ratios: cache size / K; rounded to whole experts, and at most n_expert.
        progress: called after each layer.

    Returns:
        segment_lengths, cache_ratios; layers: one dict per layer with experts, of layer, srp and size_ratio (one per
        m), sch (per m, one per ratio) and hit_rate (of caches of 0, 1, ... experts, see `hit_rates`); mean: the same over the layers; model_srp: SRP of all layers' experts as
        one group (one per m), by which the paper ranks models.
    """
    n_tokens = next(ids for ids in experts if ids is not None).shape[1]
    lengths = [m for m in segment_lengths if m <= n_tokens]
    rows, sums = [], [np.zeros(m + 1, np.int64) for m in lengths]
    for il, ids in enumerate(experts):
        if ids is None:
            continue
        active, K = activations(ids, n_expert), ids.shape[2]
        row: dict = {"layer": il, "srp": [], "size_ratio": [], "sch": []}
        for i, m in enumerate(lengths):
            histogram = segment_histogram(active, m)
            sums[i] += histogram
            srp, chosen = segment_routing_best_performance(histogram)
            row["srp"].append(srp)
            row["size_ratio"].append(chosen / (len(ids) * (n_tokens - m + 1) * K))
            sizes = [min(max(round(ratio * K), K), n_expert) for ratio in cache_ratios]
            row["sch"].append([segment_cache_hit_rate(active, m, size) for size in sizes])
        row["hit_rate"] = hit_rates(ids, n_expert).tolist()
        rows.append(row)
        if progress is not None:
            progress()
    keys = ("srp", "size_ratio", "sch", "hit_rate")
    return {
        "segment_lengths": lengths,
        "cache_ratios": list(cache_ratios),
        "layers": rows,
        "mean": {key: np.mean([row[key] for row in rows], axis=0).tolist() for key in keys},
        "model_srp": [segment_routing_best_performance(histogram)[0] for histogram in sums],
    }

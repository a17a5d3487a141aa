#!/usr/bin/env python3
"""Replays a model's routing, token by token, under other rules than the runtime's expert cache has.

    python bench/expert_replay.py model.gguf --text prose.txt [--tokens 1024] [--skip 65536]

Two tables, mean over the layers, for caches of a share of each layer's experts:
- which experts stay: those used last (the runtime's rule), by decayed frequency, and what is best with the future known;
- the next layer's experts asked for ahead, from what a layer's own experts see (its router's input) or from its output: the
  next layer's router applied to that, and a matrix fitted on the first half of the text. "right" is the share of the misses
  that had been asked for, "wrong" how many experts were read for nothing, per miss; both on the second half.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Callable, NamedTuple

from allocmoe_edge import Plan
from allocmoe_edge.gguf_file import GGUFFile
from allocmoe_edge.plan import metadata
import llama_cpp
import numpy as np
import observed  # first, so that llama_cpp loads our libraries

HALF_LIVES = (2, 4, 16, 64)  # tokens


class Layer(NamedTuple):
    """F32: router logits [n, n_expert], its input [n, n_embd], the layer's output [n, n_embd]."""

    logits: np.ndarray
    input: np.ndarray
    output: np.ndarray


def record(path: Path, text: bytes, n_tokens: int, full: tuple) -> dict[int, Layer]:
    """Of the full model, whatever plan the file has."""
    rows: dict[tuple, list] = {}
    names = ("ffn_moe_logits", "ffn_norm", "l_out")

    def key(node: observed.Node) -> tuple:
        name, _, il = node.name.rpartition("-")
        return (name, int(il)) if name in names and il.isdecimal() else ()

    def seen(node: observed.Node) -> None:
        rows.setdefault(key(node), []).append(node.data())

    with observed.ObservedModel(path, n_tokens, lambda node: bool(key(node)), seen, n_threads=1) as model:
        model.set_plan(Plan.full(full))
        many = (llama_cpp.llama_token * (len(text) + 1))()
        found = llama_cpp.llama_tokenize(model.vocab, text, len(text), many, len(many), False, False)
        if found < n_tokens:
            raise SystemExit(f"the text has {found} tokens, want {n_tokens}")
        model.decode(many[:n_tokens], 0, all_logits=True)
    layers = sorted(il for name, il in rows if name == "ffn_moe_logits")
    return {il: Layer(*(np.concatenate(rows[name, il]).reshape(n_tokens, -1) for name in names)) for il in layers}


def chosen(logits: np.ndarray, n_used: int) -> np.ndarray:
    """int [n, n_used], best first."""
    return np.argsort(-logits, axis=1, kind="stable")[:, :n_used]


#
# which experts stay
#


def last_use(ids: np.ndarray, n_expert: int) -> np.ndarray:
    """What is worth most is kept: the value of every expert once a token has been, [n, n_expert]. Here when it was used."""
    value = np.full((len(ids), n_expert), -1.0)
    for t, row in enumerate(ids):
        value[t] = value[t - 1] if t else -1.0
        value[t, row] = t * ids.shape[1] + np.arange(ids.shape[1])
    return value


def best_last(ids: np.ndarray, n_expert: int) -> np.ndarray:
    """The same, where of a token's experts the best counts as used last."""
    return last_use(ids[:, ::-1], n_expert)


def frequency(half_life: float) -> Callable:
    """How often it was used, where a use counts half after half_life tokens."""

    def value_of(ids: np.ndarray, n_expert: int) -> np.ndarray:
        value = np.zeros((len(ids), n_expert))
        for t, row in enumerate(ids):
            value[t] = value[t - 1] * 0.5 ** (1 / half_life) if t else 0.0
            value[t, row] += 1.0
        return value

    return value_of


def probability(half_life: float, logits: np.ndarray) -> Callable:
    """The same of the probabilities that the router has given it, chosen or not."""
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)

    def value_of(ids: np.ndarray, n_expert: int) -> np.ndarray:
        value = np.zeros(p.shape)
        for t in range(len(p)):
            value[t] = (value[t - 1] * 0.5 ** (1 / half_life) if t else 0.0) + p[t]
        return value

    return value_of


def next_use(ids: np.ndarray, n_expert: int) -> np.ndarray:
    """When it is used next, the sooner the better: no rule without the future does better (Belady)."""
    value = np.zeros((len(ids), n_expert))
    ahead = np.full(n_expert, -np.inf)
    for t in range(len(ids) - 1, -1, -1):
        value[t] = ahead
        ahead[ids[t]] = -t
    return value


RULES: dict[str, Callable] = {
    "used last, a token's best last of all": best_last,
    "used last, a token's best first of its own": last_use,
    **{f"frequency, half-life {h}": frequency(h) for h in HALF_LIVES},
    "the future": next_use,
}


def kept_by(ids: np.ndarray, value: np.ndarray, n_slots: int) -> np.ndarray:
    """bool [n, n_expert]: which experts are at hand when a token comes. All of a token's are in memory while it runs; then the
    n_slots of the highest value stay."""
    out = np.zeros(value.shape, bool)
    for t in range(1, len(ids)):
        kept = out[t]
        kept[:] = out[t - 1]
        kept[ids[t - 1]] = True
        there = np.flatnonzero(kept)
        kept[there[np.argsort(-value[t - 1, there], kind="stable")[n_slots:]]] = False
    return out


def misses(ids: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """bool [n, K]: which of a token's experts were not at hand."""
    return ~np.take_along_axis(kept, ids, 1)


def evictions(layers: dict[int, Layer], used: dict[int, int], shares: list) -> None:
    names = [*RULES, *(f"probability, half-life {h}" for h in HALF_LIVES)]
    print("| kept | " + " | ".join(f"hit rate, {share:g} of the experts" for share in shares) + " |")
    print("| --- |" + " ---: |" * len(shares))
    rates = np.zeros((len(names), len(shares)))
    for il, layer in layers.items():
        ids, n_expert = chosen(layer.logits, used[il]), layer.logits.shape[1]
        rules = [*RULES.values(), *(probability(h, layer.logits) for h in HALF_LIVES)]
        for i, rule in enumerate(rules):
            value = rule(ids, n_expert)
            for j, share in enumerate(shares):
                kept = kept_by(ids, value, round(share * n_expert))
                rates[i, j] += (1 - misses(ids, kept).mean()) / len(layers)
    for name, row in zip(names, rates):
        print(f"| {name} | " + " | ".join(f"{rate:.3f}" for rate in row) + " |", flush=True)


#
# the next layer's experts
#


def gains(path: Path) -> tuple[dict, dict]:
    """Of every layer the gain of the norm ahead of its experts, [n_embd], and its router, [n_expert, n_embd]; F32 in the file."""
    found: tuple[dict, dict] = {}, {}
    with GGUFFile(path) as file, open(path, "rb") as data:
        for tensor in file.tensors:
            for kind, name in enumerate(("ffn_norm", "ffn_gate_inp")):
                if tensor.name.startswith("blk.") and tensor.name.endswith(f".{name}.weight"):
                    if tensor.type_name != "F32":
                        raise SystemExit(f"{tensor.name}: found {tensor.type_name}, want F32")
                    data.seek(file.data_offset + tensor.offset)
                    found[kind][int(tensor.name.split(".")[1])] = np.frombuffer(data.read(tensor.n_bytes), np.float32)
    return found


def ridge(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """[n, a], [n, b] -> [a, b]: y about x @ it."""
    x = x.astype(np.float64)
    square = x.T @ x
    square[np.diag_indices(len(square))] += 0.1 * np.trace(square) / len(square)
    return np.linalg.solve(square, x.T @ y)


def guesses(layers: dict[int, Layer], used: dict[int, int], path: Path, share: float) -> None:
    gain, router = gains(path)
    pairs = [(il, il + 1) for il in layers if il + 1 in layers]
    rows: dict[tuple, list] = {}
    for here, there in pairs:
        a, b = layers[here], layers[there]
        n_tokens, n_expert = b.logits.shape
        half, n_used = n_tokens // 2, used[there]
        ids = chosen(b.logits, n_used)
        kept = kept_by(ids, best_last(ids, n_expert), round(share * n_expert))
        matrix = router[there].reshape(n_expert, -1).T
        out = a.output / np.sqrt((a.output**2).mean(1, keepdims=True))
        fitted = lambda x: x @ ridge(x[:half], b.logits[:half] - b.logits[:half].mean(1, keepdims=True))  # noqa: E731
        methods = {
            "its router, on this layer's input": (a.input / gain[here] * gain[there]) @ matrix,
            "its router, on this layer's output": (out * gain[there]) @ matrix,
            "fitted, on this layer's input": fitted(a.input),
            "fitted, on this layer's output": fitted(out),
        }
        actual = np.zeros((n_tokens, n_expert), bool)
        np.put_along_axis(actual, ids, True, 1)
        lost = np.zeros((n_tokens, n_expert), bool)
        np.put_along_axis(lost, ids, misses(ids, kept), 1)
        for name, logits in methods.items():
            for n in sorted({max(1, n_used // 4), n_used // 2, n_used}):
                asked = np.zeros((n_tokens, n_expert), bool)
                np.put_along_axis(asked, chosen(logits, n), True, 1)
                asked &= ~kept
                second = slice(half, None)
                rows.setdefault((name, n), []).append(
                    ((asked & lost)[second].sum(), (asked & ~actual)[second].sum(), lost[second].sum())
                )
    print("| the next layer's best, by | asked for | right | wrong, per miss |")
    print("| --- | ---: | ---: | ---: |")
    for (name, n), counts in rows.items():
        right, wrong, total = np.sum(counts, axis=0)
        print(f"| {name} | {n} | {right / total:.2f} | {wrong / total:.2f} |")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", type=Path)
    p.add_argument("--text", type=Path, required=True)
    p.add_argument("--skip", type=int, default=0, help="bytes of the text before what is read")
    p.add_argument("--tokens", type=int, default=1024)
    p.add_argument("--shares", default="0.25,0.5,0.625,0.75", help="caches, as shares of a layer's experts")
    p.add_argument("--share", type=float, default=0.625, help="the one that experts are asked for beside")
    args = p.parse_args()
    with open(args.text, "rb") as file:
        file.seek(args.skip)
        text = file.read(8 * args.tokens)
    full = metadata.read(args.model, estimator=False).full
    if full is None or not any(full):
        raise SystemExit(f"{args.model}: a dense model: it has no routers")
    layers = record(args.model, text, args.tokens, full)
    used = {il: full[il] for il in layers}
    print(f"{args.tokens} tokens, {len(layers)} layers\n")
    evictions(layers, used, [float(share) for share in args.shares.split(",")])
    print()
    guesses(layers, used, args.model, args.share)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""How a model's routers spread tokens over experts: shows whether a random model behaves like a trained one.

    python bench/expert_usage.py model.gguf [--text FILE] [--tokens 512]

Evaluates tokens of a text (or, without one, random tokens) with llama.cpp, collects every router's scores, and prints,
mean over the layers:
- entropy of the experts' shares of all activations, over the entropy of equal shares (1: all alike);
- load of the busiest expert over the mean load, and share of experts that no token chose;
- how many of a token's K experts the token before it also had;
- standard deviation of a token's router logits, and the best expert's probability among all.
"""

from __future__ import annotations

import argparse
from pathlib import Path
import sys

from allocmoe_edge import GGUFError
from allocmoe_edge.gguf_file import GGUFFile
from allocmoe_edge.plan import metadata
import llama_cpp
import numpy as np
import observed  # first, so that llama_cpp loads our libraries


def router_logits(path: Path, text: bytes | None, n_tokens: int, seed: int = 0) -> tuple[list[np.ndarray], np.ndarray]:
    """Every MoE layer's router logits, [n_tokens, n_expert] F32 each, and the last token's logits [n_vocab] F32."""
    rows: dict[int, list] = {}

    def seen(node: observed.Node) -> None:
        rows.setdefault(int(node.name.rpartition("-")[2]), []).append(node.data())

    def wants(node: observed.Node) -> bool:
        return node.name.rpartition("-")[0] == "ffn_moe_logits"

    with observed.ObservedModel(path, n_tokens, wants, seen) as model:
        tokens = np.random.default_rng(seed).integers(model.n_vocab, size=n_tokens).tolist()
        if text is not None:
            text = text[: 8 * n_tokens]
            many = (llama_cpp.llama_token * (len(text) + 1))()
            found = llama_cpp.llama_tokenize(model.vocab, text, len(text), many, len(many), False, False)
            if found < n_tokens:
                raise RuntimeError(f"the text has {found} tokens in its first {len(text)} bytes, want {n_tokens}")
            tokens = many[:n_tokens]
        last = model.decode(tokens, 0, all_logits=True)
    return [np.concatenate(rows[il]).reshape(n_tokens, -1) for il in sorted(rows)], last


def usage(logits: np.ndarray, n_used: int) -> dict:
    """The figures that the module's docstring lists, of one layer's router logits [n_tokens, n_expert]."""
    n_tokens, n_expert = logits.shape
    chosen = np.argpartition(-logits, n_used - 1, axis=1)[:, :n_used]
    active = np.zeros(logits.shape, bool)
    np.put_along_axis(active, chosen, True, axis=1)
    share = active.mean(0) / n_used
    p = np.exp(logits - logits.max(1, keepdims=True))
    return {
        "entropy": float(-(share[share > 0] * np.log(share[share > 0])).sum() / np.log(n_expert)),
        "busiest": float(share.max() * n_expert),
        "idle": float((share == 0).mean()),
        "kept": float((active[1:] & active[:-1]).sum(1).mean() / n_used),
        "spread": float(logits.std(1).mean()),
        "best": float((p.max(1) / p.sum(1)).mean()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a GGUF file")
    parser.add_argument("--text", type=Path, help="UTF-8 text. Default: random tokens")
    parser.add_argument("--tokens", type=int, default=512, help="default: 512")
    args = parser.parse_args()
    try:
        full = metadata.read(args.model).full
        if full is None:
            raise GGUFError(f"{args.model}: a dense model: it has no routers")
        text = args.text.read_bytes() if args.text else None
        with GGUFFile(args.model) as file:
            n_used = file.need(f"{file.need('general.architecture')}.expert_used_count")
        layers, last = router_logits(args.model, text, args.tokens)
    except (GGUFError, OSError, RuntimeError) as error:
        print(f"expert_usage.py: error: {error}", file=sys.stderr)
        return 1
    found = [usage(logits, n_used) for logits in layers]
    mean = {name: np.mean([layer[name] for layer in found]) for name in found[0]}
    n_expert = layers[0].shape[1]
    first, deepest = found[0]["entropy"], found[-1]["entropy"]
    print(
        f"{args.model.name}: {len(layers)} layers of {n_expert} experts, {n_used} per token; {args.tokens} tokens\n"
        f"entropy {mean['entropy']:.3f} (first layer {first:.3f}, last {deepest:.3f}); busiest expert "
        f"{mean['busiest']:.1f} times the mean; idle {mean['idle']:.1%}; kept from the token before {mean['kept']:.0%} "
        f"(chance {n_used / n_expert:.0%}); logits' spread {mean['spread']:.2f}, best expert {mean['best']:.0%}\n"
        f"output logits {'finite' if np.isfinite(last).all() else 'NOT FINITE'}, spread {last.std():.2f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

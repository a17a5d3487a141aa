"""LExI's layer sensitivities: how far a layer's MoE output moves with fewer experts, on Gaussian noise as its input.

Chitty-Venkata et al., "LExI: Layer-Adaptive Active Experts for Efficient MoE Model Inference", arXiv 2509.02753. No
data and no model run: X is drawn from N(0, 1) and put straight into the MoE block, whose weights are read from the GGUF
file. The published second stage is an evolutionary search for the counts of least total perturbation within the budget;
that sum is what our knapsack minimises exactly, so its plan is the one that the search looks for.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

# Architectures with a plain softmax gate and SwiGLU experts, and whether the chosen experts' weights are scaled to sum
# to 1. Shared experts add nothing to a difference between counts, a constant on the weights the same factor everywhere.
RENORMALISES = {"olmoe": False, "deepseek": False, "qwen2moe": False, "qwen3moe": True, "llama": True}


def sensitivities(path: Path, full: tuple, n_tokens: int = 256, n_draws: int = 4, seed: int = 0) -> tuple:
    """Mean over draws of the Frobenius norm |Y_K - Y_k| for k = 1..K_l.

    Args:
        path: GGUF file in one piece.
        full: K_l per layer, 0 where a layer routes no experts.

    Returns:
        One float64 array of shape [K_l] per layer, empty where K_l is 0.

    Raises:
        ValueError: the architecture's gate is not one that is computed here.
    """
    reader = gguf.GGUFReader(path)
    architecture = reader.get_field("general.architecture").contents()
    if architecture not in RENORMALISES:
        raise ValueError(f"{path}: LExI is computed here for {', '.join(RENORMALISES)}, not for {architecture}")
    field = reader.get_field(f"{architecture}.expert_weights_norm")
    renormalise = bool(field.contents()) if field else RENORMALISES[architecture]
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def weights(il: int, name: str) -> np.ndarray:
        tensor = tensors[f"blk.{il}.ffn_{name}.weight"]
        return gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)

    rng = np.random.default_rng(seed)
    rows = []
    for il, n_used in enumerate(full):
        row = np.zeros(n_used)
        if n_used:
            layer = [weights(il, name) for name in ("gate_inp", "gate_exps", "up_exps", "down_exps")]
            for _ in range(n_draws):
                x = rng.standard_normal((n_tokens, layer[0].shape[1]), np.float32)
                row += perturbations(x, *layer, n_used, renormalise) / n_draws
        rows.append(row)
    return tuple(rows)


def perturbations(
    x: np.ndarray,
    router: np.ndarray,
    gate: np.ndarray,
    up: np.ndarray,
    down: np.ndarray,
    n_used: int,
    renormalise: bool,
) -> np.ndarray:
    """|Y_K - Y_k| over all tokens for k = 1..K = n_used, float64 [K].

    x: float32 [n_tokens, n_embd]. router: [n_expert, n_embd]. gate, up: [n_expert, n_ff, n_embd]. down: [n_expert,
    n_embd, n_ff].
    """
    logits = x @ router.T
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    ranked = np.argsort(-p, axis=1, kind="stable")[:, :n_used]
    outputs = np.zeros((n_used, *x.shape), np.float32)  # weighted, by rank
    for expert in range(len(router)):
        token, rank = np.nonzero(ranked == expert)
        h = x[token] @ gate[expert].T
        h = h / (1 + np.exp(-h)) * (x[token] @ up[expert].T)
        outputs[rank, token] = (h @ down[expert].T) * p[token, expert, None]
    sums = np.cumsum(outputs, axis=0)
    if renormalise:
        sums /= np.cumsum(np.take_along_axis(p, ranked, axis=1), axis=1).T[:, :, None]
    return np.array([np.linalg.norm((sums[-1] - sums[k]).astype(np.float64)) for k in range(n_used)])

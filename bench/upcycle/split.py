"""Where training starts: the neurons' order, routers, and a first change of the down matrices, without gradients.

Layer by layer, on the streams of the dense model and of the experts so far: `testbed.split_ffn` chooses the shared
neurons, the clusters and the router; then reduced-rank ridge regression finds the change of `ffn_down` of the given
rank that brings the stream back to the dense model's, from the neurons that are left.
"""

from __future__ import annotations

import base  # noqa: F401  finds testbed
from model import Student, attention, dense_ffn, expert_weights, merged, norm
import numpy as np
import testbed
import torch
import torch.nn.functional as F
from tqdm import tqdm

SPREAD = 0.1  # standard deviation of a router's logits: weights near 1, as in the dense model
RIDGE = 0.3  # of a neuron's mean square
N_CLUSTER = 6144  # tokens that neurons are clustered on


def reduced_rank(x: torch.Tensor, y: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(a [rank, n_in], b [n_out, rank]) with x @ (b @ a).T closest to y, for x [n, n_in], y [n, n_out] F32."""
    gram = x.T @ x
    gram_ridge = gram + torch.diag(RIDGE * gram.diagonal() + 1e-4 * gram.diagonal().mean())
    full = torch.linalg.solve(gram_ridge, x.T @ y)  # [n_in, n_out]
    directions = torch.linalg.eigh(full.T @ gram @ full)[1][:, -rank:]  # those of most output
    a, b = (full @ directions).T, directions
    size = a.norm(dim=1).clamp_min(1e-6).sqrt()  # the same for both factors
    return a / size.unsqueeze(1), b * size


@torch.no_grad()
def start(student: Student, tokens: torch.Tensor, seed: int) -> None:
    """Sets routers, order and ffn_down's change of every layer, from tokens [batch, time]."""
    teacher, d, sizes = student.teacher_[0], student.dense, student.sizes
    x = teacher.embedding[tokens].float()
    ours = x.clone()
    with tqdm(range(d.n_layer), desc="splitting layers", disable=None) as bar:
        for il in bar:
            layer = teacher.layers[il]
            x = x + attention(norm(x, layer["attn_norm"], d.eps, teacher.dtype), layer, d)
            ours = ours + attention(norm(ours, layer["attn_norm"], d.eps, teacher.dtype), layer, d)
            target = dense_ffn(norm(x, layer["ffn_norm"], d.eps, teacher.dtype), layer)
            x = x + target
            seen = norm(ours, layer["ffn_norm"], d.eps, teacher.dtype)
            rows = seen[:, 1:].reshape(-1, d.n_embd).float()  # a text's first token is like no other
            rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(il))[:N_CLUSTER]]
            ffn = [layer[name].float().numpy() for name in ("ffn_gate", "ffn_up", "ffn_down")]
            rng = np.random.default_rng([seed, il])
            order, router = testbed.split_ffn(rows.numpy(), *ffn, sizes.n_expert, sizes.n_shared, rng)
            router = torch.from_numpy(router)
            router *= SPREAD / (rows @ router.T).std(1).mean()
            student.reorder(il, torch.from_numpy(order), router)

            ours_ffn = merged(student.base[il], student.own(il), ("ffn_gate", "ffn_up"))
            weights = expert_weights(F.linear(seen, router.to(seen.dtype)).float(), sizes.n_used)
            inner = (F.silu(F.linear(seen, ours_ffn["ffn_gate"])) * F.linear(seen, ours_ffn["ffn_up"])).float()
            inner[..., sizes.n_shared :] *= weights.repeat_interleave(sizes.width(d.n_ff), -1)
            inner, want = inner.flatten(0, 1), (x - ours).flatten(0, 1)
            down = student.base[il]["ffn_down"].float()
            rest = want - inner @ down.T
            size = want.square().sum(1)
            weight = (size + size.median()).rsqrt().unsqueeze(1)
            cut = len(inner) * 7 // 8
            a, b = reduced_rank((weight * inner)[:cut], (weight * rest)[:cut], sizes.rank_ffn)
            student.params[f"{il}_ffn_down_a"].copy_(a)
            student.params[f"{il}_ffn_down_b"].copy_(b)
            out = inner @ (down + b @ a).T
            before, after = ((weight * r)[cut:].square().sum() for r in (rest, want - out))
            left = [float(r / (weight * want)[cut:].square().sum()) for r in (before, after)]
            bar.write(f"layer {il}: held-out share of the stream's change missed {left[0]:.3f}, then {left[1]:.3f}")
            ours = ours + out.view_as(ours)

"""A dense llama-type transformer (the teacher) and the same one with its FFNs as experts (the student), for training.

Every matrix of the student is the teacher's plus a low-rank change, added once per step (`Student.merged`): a rank costs
nothing per token then. In each FFN the neurons are ordered shared first, then expert by expert; all run for every token,
those of experts that were not chosen with weight 0. That is the same result as running the chosen ones alone, and on
CPUs with AMX faster: few large products.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
import math

import torch
import torch.nn.functional as F

FFN, ATTENTION = (("ffn_gate", "ffn_up", "ffn_down"), ("attn_q", "attn_k", "attn_v", "attn_output"))
NORMS = ("attn_norm", "ffn_norm")


@dataclass(frozen=True)
class Dense:
    """Sizes of the dense model."""

    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    n_ff: int
    rope_base: float
    eps: float


@dataclass(frozen=True)
class Sizes:
    """What the student adds. n_shared + n_expert * width = n_ff; ranks of the changes of FFN and attention matrices."""

    n_shared: int
    n_expert: int
    n_used: int
    rank_ffn: int
    rank_attn: int

    def width(self, n_ff: int) -> int:
        """Neurons of a routed expert. Raises ValueError where the sizes do not fit n_ff."""
        width, rest = divmod(n_ff - self.n_shared, self.n_expert)
        if rest or width < 1 or not 1 <= self.n_used <= self.n_expert:
            raise ValueError(f"{asdict(self)}: do not fit an FFN of {n_ff} neurons")
        return width


def rotations(time: int, dim: int, base: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(cosines, sines), each [time, 1, dim / 2] F32."""
    angle = torch.arange(time).unsqueeze(1) * base ** (-torch.arange(0, dim, 2) / dim)
    return angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)


def rope(x: torch.Tensor, base: float) -> torch.Tensor:
    """Rotates neighbouring pairs of x [batch, time, heads, head_dim] by their position, as llama.cpp's NORM type."""
    cos, sin = rotations(x.shape[1], x.shape[-1], base)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)


def attention(x: torch.Tensor, layer: dict, dense: Dense) -> torch.Tensor:
    """Causal attention over x [batch, time, n_embd], the normed input, in the dtype of the layer's matrices."""
    batch, time, _ = x.shape
    counts = (("q", dense.n_head), ("k", dense.n_head_kv), ("v", dense.n_head_kv))
    q, k, v = (F.linear(x, layer[f"attn_{name}"]).view(batch, time, n, -1) for name, n in counts)
    q, k, v = rope(q, dense.rope_base).transpose(1, 2), rope(k, dense.rope_base).transpose(1, 2), v.transpose(1, 2)
    groups = dense.n_head // dense.n_head_kv
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return F.linear(out.transpose(1, 2).reshape(batch, time, -1), layer["attn_output"])


def dense_ffn(x: torch.Tensor, layer: dict) -> torch.Tensor:
    return F.linear(F.silu(F.linear(x, layer["ffn_gate"])) * F.linear(x, layer["ffn_up"]), layer["ffn_down"])


def expert_weights(logits: torch.Tensor, n_used: int) -> torch.Tensor:
    """Weights [n, n_expert]: of the chosen n_expert times the softmax over all experts, 0 elsewhere.

    Backwards none is 0, so that a router also learns from experts that it did not choose (DenseMixer, Yao et al. 2025):
    their outputs are at hand.
    """
    every = logits.softmax(-1) * logits.shape[-1]
    chosen = torch.zeros_like(logits).scatter(-1, logits.topk(n_used, -1).indices, 1.0)
    return (chosen * every).detach() + (every - every.detach())


def balance_loss(logits: torch.Tensor, weights: torch.Tensor, n_used: int) -> torch.Tensor:
    """1 where all experts of a layer are chosen alike (Switch's loss: shares chosen times mean probability)."""
    n_expert = logits.shape[-1]
    share = (weights > 0).float().flatten(0, -2).mean(0) / n_used
    return n_expert * (share * logits.softmax(-1).flatten(0, -2).mean(0)).sum()


def moe_ffn(x: torch.Tensor, layer: dict, sizes: Sizes) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, load-balancing loss) for x, the normed input."""
    logits = F.linear(x, layer["router"].to(x.dtype)).float()
    weights = expert_weights(logits, sizes.n_used)
    inner = F.silu(F.linear(x, layer["ffn_gate"])) * F.linear(x, layer["ffn_up"])
    routed = inner[..., sizes.n_shared :].unflatten(-1, (sizes.n_expert, -1)) * weights.to(x.dtype).unsqueeze(-1)
    inner = torch.cat([inner[..., : sizes.n_shared], routed.flatten(-2)], -1)
    return F.linear(inner, layer["ffn_down"]), balance_loss(logits, weights, sizes.n_used)


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float, dtype) -> torch.Tensor:
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight).to(dtype)


def merged(base: dict, own: dict, names=FFN + ATTENTION) -> dict:
    """The matrices of a layer with their changes b @ a added."""
    changes = {name: [own[f"{name}_{side}"].to(base[name].dtype) for side in "ba"] for name in names}
    return {name: torch.addmm(base[name], *change) for name, change in changes.items()}


def dense_layer(x: torch.Tensor, layer: dict, dense: Dense) -> torch.Tensor:
    """The residual stream x [batch, time, n_embd] F32 after a layer of the teacher."""
    dtype = layer["ffn_up"].dtype
    x = x + attention(norm(x, layer["attn_norm"], dense.eps, dtype), layer, dense)
    return x + dense_ffn(norm(x, layer["ffn_norm"], dense.eps, dtype), layer)


def moe_layer(x: torch.Tensor, base: dict, own: dict, dense: Dense, sizes: Sizes) -> tuple[torch.Tensor, torch.Tensor]:
    """(x after a layer of the student, load-balancing loss). base: the teacher's matrices; own: what is trained."""
    layer, dtype = own | merged(base, own), base["ffn_up"].dtype
    x = x + attention(norm(x, layer["attn_norm"], dense.eps, dtype), layer, dense)
    out, uneven = moe_ffn(norm(x, layer["ffn_norm"], dense.eps, dtype), layer, sizes)
    return x + out, uneven


class Teacher:
    """The dense model. tensors: float32, by GGUF name without '.weight'; matrices are kept in `dtype`."""

    def __init__(self, tensors: dict, dense: Dense, dtype=torch.bfloat16):
        self.dense, self.dtype, self.run_layer = dense, dtype, dense_layer
        self.embedding, self.output_norm = (tensors["token_embd"].to(dtype), tensors["output_norm"])
        self.layers = [
            {name: tensors[f"blk.{il}.{name}"].to(dtype) for name in FFN + ATTENTION}
            | {name: tensors[f"blk.{il}.{name}"] for name in NORMS}
            for il in range(dense.n_layer)
        ]

    def final(self, x: torch.Tensor) -> torch.Tensor:
        """What the output matrix reads, from the residual stream."""
        return norm(x, self.output_norm, self.dense.eps, self.dtype)

    @torch.no_grad()
    def forward(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """Residual stream after each layer, [batch, time, n_embd] F32."""
        x, streams = self.embedding[tokens].float(), []
        for layer in self.layers:
            x = self.run_layer(x, layer, self.dense)
            streams.append(x)
        return streams


class Student(torch.nn.Module):
    """Trained: routers, norms, and the changes b @ a of every matrix. `split.start` or `storage.load` sets the start."""

    def __init__(self, teacher: Teacher, sizes: Sizes, seed: int = 0):
        super().__init__()
        self.dense, self.sizes, self.teacher_ = (teacher.dense, sizes, [teacher])  # in a list: no module of ours
        self.run_layer = moe_layer
        sizes.width(self.dense.n_ff)
        self.base: list[dict] = [{name: layer[name] for name in FFN + ATTENTION} for layer in teacher.layers]
        self.register_buffer("orders", torch.arange(self.dense.n_ff).repeat(self.dense.n_layer, 1))
        generator, params = torch.Generator().manual_seed(seed), {}
        for il, layer in enumerate(teacher.layers):
            for name in FFN + ATTENTION:
                rank = sizes.rank_ffn if name in FFN else sizes.rank_attn
                rows, columns = layer[name].shape
                params[f"{il}_{name}_a"] = torch.randn(rank, columns, generator=generator) / math.sqrt(columns)
                params[f"{il}_{name}_b"] = torch.zeros(rows, rank)
            params |= {f"{il}_{name}": layer[name].clone() for name in NORMS}
            params[f"{il}_router"] = torch.zeros(sizes.n_expert, self.dense.n_embd)
        params["output_norm"] = teacher.output_norm.clone()
        self.params = torch.nn.ParameterDict(params)

    @torch.no_grad()
    def reorder(self, il: int, order: torch.Tensor, router: torch.Tensor | None = None) -> None:
        """Puts the teacher's neurons in this order [n_ff] int64; changes of matrices stay where they are."""
        layer, own = self.teacher_[0].layers[il], self.base[il]
        own["ffn_gate"], own["ffn_up"] = (layer["ffn_gate"][order], layer["ffn_up"][order])
        own["ffn_down"] = layer["ffn_down"][:, order].contiguous()
        self.orders[il] = order
        if router is not None:
            self.params[f"{il}_router"].copy_(router)

    def compile(self) -> None:
        """Layers of both models by torch.compile: a third less time, but for the first step. Needs a C++ compiler."""
        self.run_layer = torch.compile(moe_layer, dynamic=False)
        self.teacher_[0].run_layer = torch.compile(dense_layer, dynamic=False)

    def own(self, il: int) -> dict:
        """What is trained of a layer, by its name in moe_layer."""
        changes = [f"{name}_{side}" for name in FFN + ATTENTION for side in "ab"]
        return {name: self.params[f"{il}_{name}"] for name in (*changes, *NORMS, "router")}

    def forward(self, tokens: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
        """(residual stream after each layer, what the output matrix reads, mean load-balancing loss)"""
        teacher = self.teacher_[0]
        x, streams, balance = teacher.embedding[tokens].float(), [], 0.0
        for il, base in enumerate(self.base):
            x, uneven = self.run_layer(x, base, self.own(il), self.dense, self.sizes)
            balance = balance + uneven / self.dense.n_layer
            streams.append(x)
        return (streams, norm(x, self.params["output_norm"], self.dense.eps, teacher.dtype), balance)


@torch.no_grad()
def nll(hidden: torch.Tensor, embedding: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each target [n] int64 in nats, F32, given what the output matrix reads [n, n_embd]."""
    chunks = zip(hidden.split(512), targets.split(512))
    return torch.cat([F.cross_entropy(F.linear(h, embedding).float(), t, reduction="none") for h, t in chunks])

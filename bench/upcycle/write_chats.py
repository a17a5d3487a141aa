#!/usr/bin/env python3
"""Text that the dense model writes itself as a chat assistant, as token ids (.npy, uint16) for `train.py`.

    python bench/upcycle/write_chats.py -o tokens/chats.npy --tokens 200000

Two thirds of the chats begin with a question from `questions.py`; in the others the model writes the user's turn too. Sampled at temperature 1 from the tokens with at least `MIN_P` of the likeliest one's probability.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
import itertools
from pathlib import Path
import sys
import tempfile

import base
from model import Dense, Teacher, dense_ffn, norm
import numpy as np
from questions import beginnings
from text_tokens import Tokenizer
import torch
import torch.nn.functional as F
from tqdm import tqdm

BATCH, LONGEST, MIN_P = 64, 320, 0.05


class Writer:
    """The dense model token by token, BATCH sequences side by side, each with its own position."""

    def __init__(self, teacher: Teacher):
        self.t, d = teacher, teacher.dense
        shape = (d.n_layer, BATCH, d.n_head_kv, LONGEST, d.n_embd // d.n_head)
        self.k, self.v = (torch.zeros(shape, dtype=teacher.dtype) for _ in range(2))
        dim = shape[-1]
        angle = torch.arange(LONGEST).unsqueeze(1) * d.rope_base ** (-torch.arange(0, dim, 2) / dim)
        self.cos, self.sin = angle.cos(), angle.sin()

    def turn(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        even, odd = x[..., ::2].float(), x[..., 1::2].float()
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)

    @torch.no_grad()
    def step(self, tokens: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """Logits [BATCH, n_vocab] F32 after tokens [BATCH] at positions `at` [BATCH]."""
        t, d, rows = self.t, self.t.dense, torch.arange(BATCH)
        longest = int(at.max()) + 1
        x = t.embedding[tokens].float()
        cos, sin = self.cos[at].unsqueeze(1), self.sin[at].unsqueeze(1)
        mask = (torch.arange(longest) <= at.unsqueeze(1))[:, None, None]
        for il, layer in enumerate(t.layers):
            inner = norm(x, layer["attn_norm"], d.eps, t.dtype)
            q, k, v = (F.linear(inner, layer[f"attn_{n}"]).unflatten(-1, (-1, d.n_embd // d.n_head)) for n in "qkv")
            self.k[il, rows, :, at], self.v[il, rows, :, at] = self.turn(k, cos, sin), v
            q = self.turn(q, cos, sin).unflatten(1, (d.n_head_kv, -1))  # [BATCH, n_head_kv, heads of a group, dim]
            keys, values = self.k[il, :, :, :longest], self.v[il, :, :, :longest]
            out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask).flatten(1)
            x = x + F.linear(out, layer["attn_output"])
            x = x + dense_ffn(norm(x, layer["ffn_norm"], d.eps, t.dtype), layer)
        return F.linear(t.final(x), t.embedding).float()


def sample(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    p = logits.softmax(-1)
    p[p < MIN_P * p.max(-1, keepdim=True).values] = 0
    return torch.multinomial(p, 1, generator=generator).squeeze(1)


def write(teacher: Teacher, prompts: list, end: int, n_tokens: int, seed: int) -> np.ndarray:
    """Whole chats, one after the other, at least n_tokens in all. end: the token after which a chat may stop."""
    writer, generator = Writer(teacher), torch.Generator().manual_seed(seed)
    order = np.random.default_rng(seed).permutation(len(prompts))
    following = itertools.cycle(prompts[i] for i in order)
    chats, done = [[] for _ in range(BATCH)], []
    due: list = [list(next(following)) for _ in range(BATCH)]
    with tqdm(total=n_tokens, unit="tokens", disable=None) as bar:
        written, sampled = 0, [0] * BATCH
        while written < n_tokens:
            for s in range(BATCH):
                chats[s].append(due[s].pop(0) if due[s] else sampled[s])
            at = torch.tensor([len(chat) - 1 for chat in chats])
            sampled = sample(writer.step(torch.tensor([chat[-1] for chat in chats]), at), generator).tolist()
            for s, chat in enumerate(chats):
                ended = chat[-1] == end and not due[s] and chat.count(end) >= 2  # after the user's turn and the answer
                if ended or len(chat) == LONGEST:
                    done += chat
                    written += len(chat)
                    bar.update(len(chat))
                    chats[s], due[s] = [], list(next(following))
    return np.array(done, np.uint16)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", dest="output", type=Path, required=True, metavar="FILE")
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        path = base.source(Path(folder))
        sizes, tensors = base.read(path)
        tokenizer = Tokenizer(path, stack)
        prompts, end = ([tokenizer(text).tolist() for text in beginnings()], tokenizer.eos)
    teacher = Teacher({name: torch.from_numpy(data) for name, data in tensors.items()}, Dense(**sizes))
    np.save(args.output, write(teacher, prompts, end, args.tokens, args.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())

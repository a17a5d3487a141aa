#!/usr/bin/env python3
"""Train a small Mixture-of-Experts language model from text files, so that no bench has to rest on one model.

    python bench/train_moe.py books.txt encyclopaedia.txt -o my-moe --arch qwen3moe --tokens 20M
    allocmoe-convert my-moe --pre-tokenizer gpt-2 --budget 0.5 -o my-moe-half.gguf

Two kinds, by transformers' own model classes: olmoe (a softmax over all experts, its weights used as they are) and
qwen3moe (the chosen experts' weights scaled to sum to 1). With load-balancing loss, AdamW, a learning rate that
rises for 2% of the tokens and falls to a tenth along a cosine. The last 1% of every text is held out.

FOLDER becomes a Hugging Face folder (config, safetensors, tokenizer) when the tokens are done. Until then it holds
FOLDER/training, with a checkpoint every few minutes and when the program is interrupted: the same command goes on from
there with the very batches and optimiser state that were next, to the same weights. --export writes the folder from the
last checkpoint and trains no further, to look at an unfinished model.

sizes, at a vocabulary of 4,096 (parameters; layers x width, experts, of which are used, x width):
{sizes}

On a CPU --compile is two to three times as fast; it needs a C++ compiler and a minute or two at the start. Matrices are
bfloat16 where the hardware multiplies them (AMX, GPUs; --dtype). Experts run all at once with the weights of those not
chosen at zero where a quarter of them is used or more: few large products beat many small ones. Otherwise they run by
transformers' grouped_mm. A resumed run is exactly the same with the same --threads on the same kind of machine.
"""

from __future__ import annotations

import argparse
from dataclasses import astuple, dataclass
import hashlib
import json
import math
import os
from pathlib import Path
import shutil
import signal
import sys
import time

import numpy as np

try:
    import torch
    import torch.nn.functional as F
    from training_text import batch_at, new_tokenizer, tokenized
    import transformers
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
except ImportError as error:
    sys.exit(f"train_moe.py: {error}; it needs torch and transformers: pip install '.[hf]' in this clone")
from tqdm import tqdm

AUX_LOSS = 0.01  # weight of the load-balancing loss, as OLMoE was trained
WARM_UP, LAST_RATE = 0.02, 0.1


@dataclass(frozen=True)
class Size:
    """Widths in neurons; `lr` is the highest learning rate, `batch` is in windows of `ctx` tokens."""

    layers: int
    hidden: int
    heads: int
    experts: int
    used: int
    width: int
    ctx: int
    batch: int
    lr: float


SIZES = {
    "tiny": Size(2, 64, 2, 8, 4, 32, 64, 4, 3e-3),
    "5m": Size(8, 128, 2, 32, 8, 32, 256, 16, 2e-3),
    "17m": Size(8, 256, 4, 32, 8, 64, 256, 16, 1.5e-3),
    "250m": Size(12, 512, 8, 64, 8, 192, 1024, 64, 6e-4),
}
ARCHITECTURES = {"olmoe": ("Olmoe", False), "qwen3moe": ("Qwen3Moe", True)}  # class, whether weights are renormalised


def all_at_once(self, hidden_states, top_k_index, top_k_weights):
    """Experts' forward for `ALL_EXPERTS_FUNCTIONS`: every expert for every token, those not chosen with weight 0.

    hidden_states [n, hidden], top_k_index and top_k_weights [n, used]; returns [n, hidden]. The result and the
    gradients are those of the chosen experts alone.
    """
    n, n_expert = len(hidden_states), self.num_experts
    weights = top_k_weights.new_zeros(n, n_expert).scatter(1, top_k_index, top_k_weights)
    gate_up = F.linear(hidden_states, self.gate_up_proj.flatten(0, 1)).view(n, n_expert, 2, -1)
    inner = self.act_fn(gate_up[:, :, 0]) * gate_up[:, :, 1] * weights.to(gate_up.dtype).unsqueeze(-1)
    return F.linear(inner.flatten(1), self.down_proj.transpose(0, 1).flatten(1))


def new_model(arch: str, size: Size, vocab: int, seed: int) -> transformers.PreTrainedModel:
    """An untrained model in float32, the same for the same seed."""
    name, renormalise = ARCHITECTURES[arch]
    config = getattr(transformers, f"{name}Config")(
        vocab_size=vocab,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        head_dim=size.hidden // size.heads,
        intermediate_size=size.width,
        moe_intermediate_size=size.width,
        num_experts=size.experts,
        num_experts_per_tok=size.used,
        norm_topk_prob=renormalise,
        output_router_logits=True,  # without it transformers adds no load-balancing loss
        router_aux_loss_coef=AUX_LOSS,
        max_position_embeddings=size.ctx,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    ALL_EXPERTS_FUNCTIONS.register("all_at_once", all_at_once)
    model.set_experts_implementation("all_at_once" if 4 * size.used >= size.experts else "grouped_mm")
    return model


def rate(step: int, n_steps: int) -> float:
    """Share of the highest learning rate."""
    warm_up = max(1, round(WARM_UP * n_steps))
    if step < warm_up:
        return (step + 1) / warm_up
    done = (step - warm_up) / max(1, n_steps - warm_up)
    return LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * done)) / 2


class Run:
    """One training run in a folder: model, optimiser, the next step, and where they are kept."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.size = args, SIZES[args.size]
        self.kept = args.output / "training"
        self.kept.mkdir(parents=True, exist_ok=True)
        self.n_steps = max(1, -(-args.tokens // (self.size.batch * self.size.ctx)))
        self.tokenizer = self._tokenizer()
        self.tokens, self.held_out = tokenized(args.texts, self.tokenizer, self.size.ctx)
        self.model = new_model(args.arch, self.size, len(self.tokenizer), args.seed).to(args.device)
        self.loss = torch.compile(self._loss) if args.compile else self._loss
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        gains = [p for p in self.model.parameters() if p.ndim == 1]
        groups = [dict(params=matrices, weight_decay=0.1), dict(params=gains, weight_decay=0.0)]
        self.optimizer = torch.optim.AdamW(groups, lr=self.size.lr, betas=(0.9, 0.95))
        self.step = 0
        # what must be the same for a checkpoint to be continued
        digest = hashlib.sha256(self.tokens.tobytes()).hexdigest()
        self.identity = [args.arch, list(astuple(self.size)), args.seed, self.n_steps, len(self.tokenizer), digest]
        self._resume()

    def _tokenizer(self):
        """The run's own, from before; else that of --tokenizer, or one trained on the texts."""
        folder = self.kept / "tokenizer"
        known = folder if folder.is_dir() else self.args.tokenizer
        if known:
            tokenizer = transformers.AutoTokenizer.from_pretrained(known, local_files_only=True)
        else:
            tokenizer = new_tokenizer(self.args.texts, self.args.vocab)
        if known == folder:
            return tokenizer
        new = self.kept / "tokenizer.tmp"
        tokenizer.save_pretrained(new)
        os.replace(new, folder)
        return tokenizer

    def _loss(self, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(cross-entropy in nats per token, load-balancing loss)"""
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=self.args.dtype == "bf16"):
            out = self.model(input_ids=batch, labels=batch, use_cache=False)
        return out.loss - AUX_LOSS * out.aux_loss, out.aux_loss

    def train_step(self) -> tuple[float, float]:
        """One step; returns the losses of its batch, as `_loss` does."""
        batch = batch_at(self.tokens, self.step, self.size.batch, self.size.ctx, self.args.seed)
        for group in self.optimizer.param_groups:
            group["lr"] = self.size.lr * rate(self.step, self.n_steps)
        loss, aux = self.loss(torch.from_numpy(batch).long().to(self.args.device))
        (loss + AUX_LOSS * aux).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if not math.isfinite(loss.item()):
            raise ValueError(f"step {self.step}: the loss is {loss.item()}; the last checkpoint is from before")
        return loss.item(), aux.item()

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Cross-entropy in nats per token on what was held out."""
        rows = [self.held_out[i : i + self.size.batch] for i in range(0, len(self.held_out), self.size.batch)]
        losses = [self._loss(torch.from_numpy(row).long().to(self.args.device))[0].item() for row in rows]
        return float(np.average(losses, weights=[len(row) for row in rows]))

    def save(self) -> None:
        state = dict(step=self.step, identity=self.identity, model=self.model.state_dict())
        new = self.kept / "checkpoint.tmp"
        torch.save({**state, "optimizer": self.optimizer.state_dict()}, new)
        os.replace(new, self.kept / "checkpoint.pt")

    def _resume(self) -> None:
        path = self.kept / "checkpoint.pt"
        if not path.is_file():
            if self.args.export:
                raise ValueError(f"{path}: not there yet, so --export has nothing to write")
            return
        state = torch.load(path, map_location=self.args.device, weights_only=True)
        if state["identity"] != self.identity:
            raise ValueError(
                f"{path}: of another run (architecture, size, seed, tokens or texts differ): use another -o"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]

    def export(self) -> float:
        """Writes the Hugging Face folder, whole or not at all file by file, and returns the held-out loss."""
        loss = self.held_out_loss()
        new = self.kept / "export.tmp"
        shutil.rmtree(new, ignore_errors=True)
        self.model.save_pretrained(new)
        self.tokenizer.save_pretrained(new)
        tokens = self.step * self.size.batch * self.size.ctx
        record = dict(texts=[p.name for p in self.args.texts], tokens=tokens, of=self.args.tokens, held_out_loss=loss)
        (new / "training.json").write_text(json.dumps({**record, "seed": self.args.seed}, indent=1) + "\n")
        for path in sorted(new.iterdir()):
            os.replace(path, self.args.output / path.name)
        new.rmdir()
        return loss


def train(run: Run) -> bool:
    """Trains to the end, or until a signal asks to stop; saves in both cases. Returns whether it is at the end."""
    asked: list[int] = []
    before = {s: signal.signal(s, lambda number, _frame: asked.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    per_step = run.size.batch * run.size.ctx
    total = dict(total=run.n_steps * per_step, initial=run.step * per_step, unit="tokens", unit_scale=True)
    saved, began, first, mean = time.monotonic(), time.monotonic(), run.step, None
    try:
        with tqdm(**total, desc=run.args.arch, disable=None, smoothing=0.02) as bar:
            while run.step < run.n_steps and not asked:
                loss, aux = run.train_step()
                mean = loss if mean is None else 0.98 * mean + 0.02 * loss
                bar.update(per_step)
                bar.set_postfix(loss=f"{mean:.3f}", balance=f"{aux:.2f}", refresh=False)
                if time.monotonic() - saved >= 60 * run.args.save_minutes:
                    run.save()
                    saved = time.monotonic()
                    speed = (run.step - first) * per_step / (saved - began)
                    line = f"{run.step * per_step:,} tokens, loss {mean:.3f}, {speed:,.0f} tokens/s"
                    bar.write(line, file=sys.stderr)
        run.save()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return run.step >= run.n_steps


def has_bf16(device: str) -> bool:
    if device == "cuda":
        return torch.cuda.is_bf16_supported()
    return device == "cpu" and torch.cpu._is_amx_tile_supported()


def count(text: str) -> int:
    """20000000, 500k, 20M or 1.5G"""
    factor = {"k": 1e3, "m": 1e6, "g": 1e9}.get(text[-1:].lower())
    value = int(float(text[:-1]) * factor) if factor else int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: want 1 or more")
    return value


def parser() -> argparse.ArgumentParser:
    rows = [
        f"  {name:5} {s.layers} x {s.hidden}, {s.experts} experts, {s.used} used, x {s.width}; "
        f"windows of {s.ctx}, {s.batch} a step, learning rate {s.lr:g}"
        for name, s in SIZES.items()
    ]
    text = (__doc__ or "").format(sizes="\n".join(rows))
    p = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("texts", type=Path, nargs="+", metavar="TEXT", help="UTF-8 files; not what you will measure on")
    p.add_argument("-o", dest="output", type=Path, required=True, metavar="FOLDER", help="for the model")
    p.add_argument("--arch", choices=ARCHITECTURES, default="qwen3moe", help="Default: qwen3moe")
    p.add_argument("--size", choices=SIZES, default="5m", help="Default: 5m")
    p.add_argument(
        "--tokens", type=count, default=20_000_000, help="in as many passes over the text as it takes. Default: 20M"
    )
    p.add_argument("--vocab", type=count, default=4096, help="tokens of the new tokenizer. Default: 4096")
    p.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="use this Hugging Face tokenizer instead")
    p.add_argument("--seed", type=int, default=0, help="of the first weights and the order of the text. Default: 0")
    p.add_argument("--save-minutes", type=float, default=5, metavar="M", help="between checkpoints. Default: 5")
    p.add_argument("--export", action="store_true", help="write FOLDER from the last checkpoint and end")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps. Default: auto, the best there is")
    p.add_argument(
        "--dtype", choices=("auto", "bf16", "f32"), default="auto", help="of products. Default: what is fast"
    )
    p.add_argument("--compile", action="store_true", help="by torch.compile; see above")
    p.add_argument("--threads", type=count, help="of a CPU. Default: all cores")
    return p


def main(argv=None) -> int:
    args = parser().parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        args.device = found.type if found else "cpu"
    if args.dtype == "auto":
        args.dtype = "bf16" if has_bf16(args.device.partition(":")[0]) else "f32"
    transformers.utils.logging.disable_progress_bar()
    try:
        run = Run(args)
        done = args.export or train(run)
    except (ValueError, OSError) as error:
        print(f"train_moe.py: error: {error}", file=sys.stderr)
        return 1
    n = run.step * run.size.batch * run.size.ctx
    if not done:
        print(f"interrupted after {n:,} tokens; the same command goes on from there", file=sys.stderr)
        return 130
    loss = run.export()
    print(f"{args.output}: {sum(p.numel() for p in run.model.parameters()):,} parameters, {n:,} tokens, "
          f"held-out loss {loss:.3f} nats per token (perplexity {math.exp(loss):.1f})")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())

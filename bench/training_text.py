"""Text files as a tokenizer, as tokens, and as the batches of a training run (`train_moe.py`)."""

from __future__ import annotations

from pathlib import Path
import sys
from typing import Iterator, Sequence

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
import transformers

END = "<|endoftext|>"
HELD_OUT = 0.01  # of each text, its end
_PIECE = 1 << 16  # characters; a word is cut where one ends


def pieces(paths: Sequence[Path], what: str) -> Iterator[tuple[Path, str]]:
    """(path, piece of its text) in order. Raises ValueError for a file that cannot be read, or is no UTF-8."""
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"text {path}: {getattr(error, 'strerror', None) or error}") from None
        for at in tqdm(range(0, len(text), _PIECE), desc=f"{what} {path.name}", disable=None, leave=False):
            yield path, text[at : at + _PIECE]


def new_tokenizer(paths: Sequence[Path], vocab: int) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab` tokens with GPT-2's pre-tokenizer; token 0 ends a text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab <= len(alphabet):
        raise ValueError(
            f"--vocab {vocab}: want more than {len(alphabet)}, one token for every byte and one for the end"
        )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[END], initial_alphabet=alphabet, show_progress=sys.stderr.isatty()
    )
    bpe.train_from_iterator((text for _, text in pieces(paths, "reading")), trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END)


def tokenized(paths: Sequence[Path], tokenizer, ctx: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens to train on [n] int32, held-out windows [m, ctx] int32).

    The end of each text is held out; what is trained on has the tokenizer's end token after each text, if it has one.
    Raises ValueError for a text that is too short for both.
    """
    ids: dict[Path, list] = {path: [] for path in paths}
    for path, text in pieces(paths, "tokenizing"):
        ids[path] += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    train, held_out = [], []
    for path, found in ids.items():
        cut = len(found) - max(1, round(HELD_OUT * len(found) / ctx)) * ctx
        if cut < ctx:
            raise ValueError(f"text {path}: {len(found)} tokens, want {2 * ctx} or more")
        train.append(np.array(found[:cut] + end, np.int32))
        held_out.append(np.array(found[cut:], np.int32).reshape(-1, ctx))
    return np.concatenate(train), np.concatenate(held_out)


def batch_at(tokens: np.ndarray, step: int, batch: int, ctx: int, seed: int) -> np.ndarray:
    """The windows of a step, [batch, ctx] int32: a function of the step alone, so that resuming needs no state.

    Every pass over the tokens cuts them into windows from another place, and shuffles the windows.
    Raises ValueError where the tokens are too few for one step.
    """
    per_pass = (len(tokens) - ctx) // ctx // batch
    if per_pass < 1:
        raise ValueError(f"{len(tokens)} tokens of text, want {(batch + 1) * ctx} or more")
    n_pass, place = divmod(step, per_pass)
    rng = np.random.default_rng([seed, n_pass])
    offset = int(rng.integers(ctx))
    chosen = rng.permutation(per_pass * batch)[place * batch : (place + 1) * batch]
    return np.stack([tokens[offset + i * ctx : offset + (i + 1) * ctx] for i in chosen])

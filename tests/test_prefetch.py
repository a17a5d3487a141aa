"""Llama(prefetch=True): chosen experts are asked for before they are read, and nothing else changes."""

from __future__ import annotations

import ctypes
import mmap
import os
import pickle
import re
import sys

from allocmoe_edge import Llama, Plan
from allocmoe_edge._native import context_pointer, ffi, libllama
from allocmoe_edge.gguf_file import GGUFFile
from allocmoe_edge.measure import memory
import llama_cpp
import numpy as np
import pytest
import random_gguf
import shapes

PAGE = mmap.PAGESIZE
N_LAYER, N_EXPERT, N_USED = 4, 16, 4
SIZES = dict(n_ctx=64, logits_all=True, verbose=False, repack=False)

only_posix = pytest.mark.skipif(os.name != "posix", reason="no advice on mappings")
only_linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc and the page cache")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """4 layers of 16 experts, 4 per token; an expert's matrix has 36 pages of 4 KiB."""
    shape = shapes.Shape(dict(
        model_type="qwen3_moe", hidden_size=512, num_hidden_layers=N_LAYER, num_attention_heads=8, vocab_size=300,
        num_key_value_heads=4, head_dim=64, moe_intermediate_size=512, num_experts=N_EXPERT, num_experts_per_tok=N_USED,
    ))  # fmt: skip
    path = tmp_path_factory.mktemp("prefetch") / "model.gguf"
    random_gguf.write(path, "prefetch", shape, "Q4_0", 0)
    with open(path, "rb+") as file:
        os.fsync(file.fileno())  # pages that are still to be written cannot be dropped
    return path


class Watched(Llama):
    """Notes the name of every node that is computed."""

    @property
    def context_params(self):
        return self._context_params

    @context_params.setter
    def context_params(self, params) -> None:
        base = ctypes.CDLL(str(llama_cpp.llama_cpp._base_path / "libggml-base.so"))
        base.ggml_get_name.restype, base.ggml_get_name.argtypes = ctypes.c_char_p, [ctypes.c_void_p]

        @llama_cpp.ggml_backend_sched_eval_callback
        def watch(tensor, ask, _user_data):
            if ask:
                self.nodes.append(base.ggml_get_name(tensor).decode())
            return False

        self.nodes, self._watch = [], watch
        params.cb_eval = watch
        self._context_params = params


def logits(llm) -> np.ndarray:
    """Of a prompt and of three tokens after it."""
    llm.clear_cache()
    llm.eval(list(range(20, 40)))
    for token in (5, 6, 7):
        llm.eval([token])
    return llm.scores[:23].copy()


def experts(path) -> list:
    """(first byte, bytes) in the file of every tensor of experts."""
    with GGUFFile(path) as file:
        return [(file.data_offset + t.offset, t.n_bytes) for t in file.tensors if "_exps." in t.name]


def mapped_at(path) -> int:
    """Where the file's first byte is mapped."""
    lines = [line.split() for line in open("/proc/self/maps") if line.rstrip().endswith(str(path))]
    address, _, offset = lines[0][:3]
    return int(address.split("-")[0], 16) - int(offset, 16)


def drop(path) -> None:
    """Takes the experts' pages out of memory."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(path, "rb") as file:
        for first, n_bytes in experts(path):
            begin, end = first // PAGE * PAGE, -(-(first + n_bytes) // PAGE) * PAGE
            assert (
                libc.madvise(ctypes.c_void_p(mapped_at(path) + begin), ctypes.c_size_t(end - begin), 4) == 0
            )  # DONTNEED
            os.posix_fadvise(file.fileno(), begin, end - begin, os.POSIX_FADV_DONTNEED)
    if resident(path)[expert_pages(path)].mean() > 0.01:
        pytest.skip("this file system keeps its files in memory")


def resident(path) -> np.ndarray:
    """bool, one a page of the file: whether it is in memory."""
    size = path.stat().st_size
    found = np.zeros(-(-size // PAGE), np.uint8)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
        address = np.frombuffer(view, np.uint8).ctypes.data
        assert (
            ctypes.CDLL(None).mincore(
                ctypes.c_void_p(address), ctypes.c_size_t(size), found.ctypes.data_as(ctypes.c_void_p)
            )
            == 0
        )
    return found % 2 == 1


def expert_pages(path, chosen=None) -> np.ndarray:
    """bool, one a page of the file: whether it holds experts; with `chosen`, a list of sets one a layer, of those."""
    out = np.zeros(-(-path.stat().st_size // PAGE), bool)
    with GGUFFile(path) as file:
        for tensor in file.tensors:
            if "_exps." not in tensor.name:
                continue
            size = tensor.n_bytes // N_EXPERT
            layer = int(tensor.name.split(".")[1])
            for expert in range(N_EXPERT) if chosen is None else chosen[layer]:
                first = file.data_offset + tensor.offset + expert * size
                out[first // PAGE : -(-(first + size) // PAGE)] = True
    return out


def major_faults() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


@only_posix
@pytest.mark.parametrize("token_rule", ["off", "batch"])
def test_same_bits(path, token_rule):
    found = []
    for prefetch in (False, True):
        llm = Llama(str(path), prefetch=prefetch, **SIZES)
        assert llm.prefetch == prefetch
        full = logits(llm)
        llm.set_plan(Plan([2] * N_LAYER, [N_USED] * N_LAYER, token_rule=token_rule))
        found.append((full, logits(llm)))
        llm.close()
    assert np.array_equal(found[0][0], found[1][0]) and np.array_equal(found[0][1], found[1][1])
    assert not np.allclose(*found[0], atol=0.01)


@only_linux
def test_reads_the_chosen_experts_and_nothing_else(path):
    """One token on a file whose experts are not in memory: what it chose is then, in one go and not page by page."""
    llm = Llama(str(path), prefetch=True, **SIZES)
    plan = Plan([N_USED] * N_LAYER, [N_USED] * N_LAYER)
    llm.apply_plan(plan, record=True)
    llm.eval([1, 2, 3])
    libllama.allocmoe_clear_records(context_pointer(llm))
    drop(path)
    before = major_faults()
    llm.eval([4])
    faults = major_faults() - before
    found = resident(path)
    chosen = []
    for il in range(N_LAYER):
        ids = ffi.new("int32_t[]", N_USED)
        assert libllama.allocmoe_take_experts(context_pointer(llm), il, ids, N_USED) == N_USED
        chosen.append(set(ids))
    wanted, all_pages = expert_pages(path, chosen), expert_pages(path)
    llm.close()
    assert wanted.sum() > 1000  # 4 layers, 3 matrices, 4 experts, 36 pages
    assert found[wanted].all()
    assert found[all_pages & ~wanted].mean() < 0.01
    # without the request every one of these pages would be a fault of its own that waits for the disk
    assert faults < 0.1 * wanted.sum()


@only_posix
@pytest.mark.parametrize(
    "arguments, per_graph",
    [
        (dict(prefetch=True), N_LAYER),
        (dict(prefetch=False), 0),
        (dict(), 0),
        (dict(prefetch=True, use_mmap=False), 0),
        (dict(prefetch=True, repack=True), None),
    ],
    ids=str,
)
def test_nodes(path, arguments, per_graph):
    """One a layer, ahead of its experts; none where nobody asked, or where no experts are in a mapped file."""
    llm = Watched(str(path), **{**SIZES, **arguments})
    if per_graph is None:  # not every CPU has a layout for these weights
        place = ffi.string(libllama.allocmoe_expert_placement(context_pointer(llm), 1, ffi.new("int64_t *")))
        per_graph = N_LAYER if place == b"CPU_Mapped" else 0
    assert llm.prefetch == (per_graph > 0)
    llm.nodes.clear()
    llm.eval([1, 2, 3])
    names = [name for name in llm.nodes if re.match(r"allocmoe_prefetch|ffn_moe_(up|down)-", name)]
    assert names.count("allocmoe_prefetch") == per_graph
    if per_graph:
        assert [name.split("-")[0] for name in names] == ["allocmoe_prefetch", "ffn_moe_up", "ffn_moe_down"] * N_LAYER
    llm.close()


@only_posix
def test_with_layers_left_out(path):
    """Calibration's start at a later layer edits the graph too: the same bits, and a node for each layer that is left."""
    found = []
    for prefetch in (False, True):
        llm = Watched(str(path), prefetch=prefetch, **SIZES)
        full = Plan([N_USED] * N_LAYER, [N_USED] * N_LAYER)
        for arguments in (dict(keep_outputs=True), dict(start_layer=2)):
            llm.apply_plan(full, **arguments)
            llm.clear_cache()
            llm.nodes.clear()
            llm.eval(list(range(20, 40)))
            found.append(llm.scores[:20].copy())
        assert llm.nodes.count("allocmoe_prefetch") == 2 * prefetch
        assert "ffn_moe_down-2" in llm.nodes and "ffn_moe_down-1" not in llm.nodes
        llm.close()
    assert all(np.array_equal(found[0], other) for other in found[1:])


@only_posix
def test_native_api_turns_it_on_and_off(path):
    llm = Watched(str(path), **SIZES)
    first = logits(llm)
    n_bytes = sum(n_bytes for _, n_bytes in experts(path))
    for prefetch in (True, False, True):
        assert libllama.allocmoe_set_prefetch(context_pointer(llm), prefetch) == n_bytes
        llm.nodes.clear()
        assert np.array_equal(logits(llm), first)
        # the graph of the prompt, and that of three tokens
        assert llm.nodes.count("allocmoe_prefetch") == 4 * N_LAYER * prefetch
    llm.close()


@only_posix
def test_by_default_where_the_file_is_larger_than_the_memory(path, monkeypatch):
    size = path.stat().st_size
    for available, wanted in ((size - 1, True), (size, False), (None, False)):
        monkeypatch.setattr(memory, "available", lambda: available)
        llm = Llama(str(path), expert_cache=0, **SIZES)
        assert llm.prefetch == wanted
        llm.close()


@only_posix
def test_it_survives_pickling(path):
    llm = Llama(str(path), prefetch=True, **SIZES)
    copy = pickle.loads(pickle.dumps(llm))
    assert copy.prefetch
    copy.close()
    llm.close()


@pytest.mark.parametrize("prefetch", [1, "yes", 0.5])
def test_what_is_no_bool_is_refused(path, prefetch):
    with pytest.raises(ValueError, match="prefetch: found"):
        Llama(str(path), prefetch=prefetch, **SIZES)

"""Llama(expert_cache=...): experts that stay in the file give the same bits, and what goes wrong with the file is an error."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
import io
import os
from pathlib import Path
import pickle
import shutil
import subprocess
import sys

from allocmoe_edge import Llama, Plan, PlanError, chat, llama_server, speed_target
from allocmoe_edge import expert_cache as cache_size
from allocmoe_edge._native import context_pointer, ffi, libllama
from allocmoe_edge.checked_llama import GenerationError
from allocmoe_edge.command import CommandError
from allocmoe_edge.convert import cli, costs, output
from allocmoe_edge.gguf_file import GGUFFile
from allocmoe_edge.inspect.routing import hit_rates
from allocmoe_edge.measure import memory
from allocmoe_edge.plan import metadata
from allocmoe_edge.plan.estimator import N_QUANTILES
from conftest import put_picture
import expert_cache as expert_cache_bench
import expert_replay
import expert_rules
from gguf_factory import random_estimator
import llama_cpp
import numpy as np
import pytest
import random_gguf
import shapes

pytestmark = pytest.mark.skipif(os.name != "posix", reason="there is none on Windows")

N_LAYER, N_EXPERT, N_USED = 4, 16, 4
SIZES = dict(n_ctx=64, logits_all=True, verbose=False, repack=False)


def write(path: Path, file_type: str) -> Path:
    """4 layers of 16 experts, 4 per token; an expert's matrices begin and end inside pages."""
    shape = shapes.Shape(dict(
        model_type="qwen3_moe", hidden_size=256, num_hidden_layers=N_LAYER, num_attention_heads=4, vocab_size=300,
        num_key_value_heads=2, head_dim=64, moe_intermediate_size=288, num_experts=N_EXPERT, num_experts_per_tok=N_USED,
    ))  # fmt: skip
    random_gguf.write(path, "cache", shape, file_type, 0)
    return path


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    return {name: write(folder / f"{name}.gguf", name) for name in ("Q4_0", "Q4_K_M")}


@pytest.fixture(scope="module")
def path(paths):
    return paths["Q4_0"]


def size_for(path, n_slots: float) -> int:
    """Bytes for about so many experts of every layer, beside room for the rest of one."""
    return int(cache_size.least(path) * (1 + n_slots / N_EXPERT * (N_LAYER - 1)) * 1.05)


def load(path, n_slots: float = 5, **kwargs) -> Llama:
    return Llama(str(path), **{**SIZES, "expert_cache": size_for(path, n_slots), "miss_price": 1, **kwargs})


def slots(llm) -> list:
    found = ffi.new("int32_t[]", N_LAYER)
    libllama.allocmoe_get_expert_cache(context_pointer(llm), found, N_LAYER)
    return list(found)


def logits(llm) -> np.ndarray:
    """Of a prompt and of four tokens after it."""
    llm.clear_cache()
    llm.eval(list(range(20, 40)))
    for token in (5, 6, 7, 5):
        llm.eval([token])
    return llm.scores[:24].copy()


@pytest.fixture(scope="module")
def expected(path):
    llm = Llama(str(path), **SIZES)
    yield logits(llm)
    llm.close()


@pytest.mark.parametrize("how", ["in memory", "expert cache", "prefetch"])
def test_embeddings_in_place_of_tokens(path, how):
    """As of a picture. A graph has nodes for tokens, too, that are not computed then, and were where we add nodes: of tokens that
    nobody had set, which ended the process."""
    kwargs = {"expert cache": dict(expert_cache=size_for(path, 5), miss_price=1), "prefetch": dict(prefetch=True)}.get(
        how, {}
    )
    llm = Llama(str(path), **{**SIZES, "n_ctx": 256, "n_ubatch": 128}, **kwargs)
    for n_places in (40, 1, 64):
        llm.eval([5, 6, 7])
        put_picture(llm, n_places)
    llm.eval([8])
    found = llm.scores[llm.n_tokens - 1].copy()
    assert np.isfinite(found).all()
    if how != "in memory":
        other = Llama(str(path), **{**SIZES, "n_ctx": 256, "n_ubatch": 128})
        for n_places in (40, 1, 64):
            other.eval([5, 6, 7])
            put_picture(other, n_places)
        other.eval([8])
        assert np.array_equal(found, other.scores[other.n_tokens - 1])
        other.close()
    llm.close()


@pytest.mark.parametrize("file_type", ["Q4_0", "Q4_K_M"])
@pytest.mark.parametrize("ours", [True, False])
def test_same_bits(paths, file_type, ours):
    """As a model in memory, under several plans, with few experts of a layer in memory, and with our kernels or llama.cpp's."""
    path = paths[file_type]
    libllama.allocmoe_set_cpu_kernels(ours)
    try:
        found = []
        for cache in (0, size_for(path, 5)):
            llm = Llama(str(path), **SIZES, expert_cache=cache)
            assert llm.expert_cache == cache and not llm.prefetch
            assert all(4 <= n <= 7 for n in slots(llm)) if cache else not any(slots(llm))
            runs = [logits(llm)]
            for rule in ("off", "batch"):
                llm.set_plan(Plan([2] * N_LAYER, [N_USED] * N_LAYER, token_rule=rule))
                runs.append(logits(llm))
            found.append(runs)
            llm.close()
    finally:
        libllama.allocmoe_set_cpu_kernels(True)
    assert all(np.array_equal(*pair) for pair in zip(*found))
    assert not np.allclose(found[0][0], found[0][1], atol=0.01)


def test_split_files_and_weights_without_kernels_of_ours(tiny_split):
    found = []
    for cache in (0, cache_size.least(tiny_split[0]) * 2 + 2**20):
        llm = Llama(str(tiny_split[0]), n_ctx=64, logits_all=True, verbose=False, repack=False, expert_cache=cache)
        llm.eval(list(range(1, 21)))
        llm.eval([5])
        found.append(llm.scores[:21].copy())
        assert llm.expert_cache == cache
        llm.close()
    assert np.array_equal(*found)


@pytest.mark.parametrize("arguments", [dict(use_mmap=False), dict(repack=True), dict(n_ubatch=7)], ids=str)
def test_however_it_is_loaded(path, expected, arguments):
    """Dense weights repacked or not; with micro-batches of its own, the last of which has a single token."""
    llm = load(path, **arguments)
    found = logits(llm)
    llm.close()
    want = Llama(str(path), **{**SIZES, **arguments, "repack": False})
    assert np.array_equal(found, logits(want)) if "repack" not in arguments else np.allclose(found, expected, atol=0.05)
    want.close()


def test_the_experts_used_last_are_kept(path):
    """Single tokens: hits, misses and bytes are those of a list of recently used experts for each layer, and the same again."""
    llm = load(path)
    kept = slots(llm)
    llm.apply_plan(Plan([N_USED] * N_LAYER, [N_USED] * N_LAYER), record=True)
    recent = [OrderedDict() for _ in range(N_LAYER)]
    hits, misses = np.zeros(N_LAYER, int), np.zeros(N_LAYER, int)
    for token in np.random.default_rng(0).integers(1, 300, 40):
        llm.eval([int(token)])
        for il in range(N_LAYER):
            ids = ffi.new("int32_t[]", N_USED)
            assert libllama.allocmoe_take_experts(context_pointer(llm), il, ids, N_USED) == N_USED
            hits[il] += sum(e in recent[il] for e in ids)
            misses[il] += sum(e not in recent[il] for e in ids)
            for e in reversed(list(ids)):
                recent[il][e] = True
                recent[il].move_to_end(e)
            while len(recent[il]) > kept[il]:
                recent[il].popitem(last=False)
    found = llm.expert_stats(reset=True)["decode"]
    assert np.array_equal(found["hits"], hits) and np.array_equal(found["misses"], misses)
    assert 0 < hits.sum() < misses.sum()
    with GGUFFile(path) as file:
        expert = sum(t.n_bytes for t in file.tensors if "blk.0.ffn" in t.name and "_exps" in t.name) / N_EXPERT
    assert expert <= found["bytes_read"][0] / misses[0] <= expert + 3 * 2 * 4096
    assert llm.expert_stats()["decode"]["hits"].sum() == 0
    llm.close()


def test_of_fewer_than_a_token_uses_the_best_are_kept(path):
    """Fewer slots than experts per token: a token that comes again finds its best ones."""
    llm = load(path, 2)
    kept = slots(llm)
    assert max(kept) < N_USED
    for _ in range(2):
        llm.expert_stats(reset=True)
        llm.clear_cache()
        llm.apply_plan(Plan([N_USED] * N_LAYER, [N_USED] * N_LAYER))
        llm.eval([5])
    assert list(llm.expert_stats()["decode"]["hits"]) == kept
    # and those are the best: with so many per token alone nothing is to be read
    llm.expert_stats(reset=True)
    llm.clear_cache()
    llm.apply_plan(Plan([kept[0], *[N_USED] * (N_LAYER - 1)], [N_USED] * N_LAYER))
    llm.eval([5])
    assert llm.expert_stats()["decode"]["hits"][0] == kept[0] and llm.expert_stats()["decode"]["misses"][0] == 0
    llm.close()


def test_replayed_rules_of_what_stays():
    """bench/expert_replay.py: the runtime's rule has what allocmoe-inspect says, and none does better than the future known."""
    ids = np.array([np.random.default_rng(t // 4).permutation(N_EXPERT)[:N_USED] for t in range(200)])
    ids = np.where(np.random.default_rng(1).random((200, 1)) < 0.7, ids, np.roll(ids, 7, axis=0))
    expected = hit_rates(ids[None], N_EXPERT)
    for n in (2, 5, 9, N_EXPERT):
        found = {
            rule: 1 - expert_replay.misses(ids, expert_replay.kept_by(ids, rule(ids, N_EXPERT), n)).mean()
            for rule in expert_replay.RULES.values()
        }
        assert found[expert_replay.best_last] == pytest.approx(expected[n])
        best = found.pop(expert_replay.next_use)
        assert all(rate <= best for rate in found.values()) and best > expected[n] or n == N_EXPERT


def test_quality_is_measured_on_a_text(path, tmp_path, monkeypatch, capsys):
    """bench/expert_cache.py says so where there is none, or one that is too short."""
    short = tmp_path / "short.txt"
    short.write_text("<t17><t18>")
    monkeypatch.setattr(sys, "argv", ["expert_cache.py", "quality", str(path)])
    with pytest.raises(SystemExit, match="2"):
        expert_cache_bench.main()
    assert "wanted --text" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--text", str(short), "--prompt", "16"])
    with pytest.raises(SystemExit, match="short.txt: found .* tokens, want more than the 16 of the prompt"):
        expert_cache_bench.main()


def test_rules_without_estimates_read_what_the_runtime_would(path):
    """bench/expert_rules.py replays the cache: as many reads as the runtime has, but for rounding, and fewer under a rule."""
    llm = load(path)
    ids = [int(t) for t in TEXT]
    _, stats = expert_cache_bench.one_by_one(llm, ids, 8)
    full = llm.expert_used_count_full
    replayed = expert_rules.Replayed(path, 64, 8, expert_cache_bench.slots(llm), full)
    llm.close()
    found = {}
    with replayed.model:
        for name in ("nothing", "read at most 1", "substitute from 0"):
            logits = replayed.run(ids, 8, full, full, expert_rules.RULES[name], N_EXPERT)
            found[name] = replayed.n_read, replayed.n_run, logits
    n_full = N_USED * N_LAYER * (len(ids) - 8)
    assert found["nothing"][:2] == (pytest.approx(stats["misses"].sum(), rel=0.03), n_full)
    assert found["read at most 1"][0] <= N_LAYER * (len(ids) - 8) < found["nothing"][0]
    assert found["read at most 1"][1] < n_full == found["substitute from 0"][1]
    assert found["substitute from 0"][0] == 0
    assert not any(
        np.array_equal(found["nothing"][2], found[name][2]) for name in ("read at most 1", "substitute from 0")
    )


def test_a_batch_reads_an_expert_once(path):
    llm = load(path)
    llm.eval(list(range(20, 60)))
    found = llm.expert_stats()["prefill"]
    assert found["misses"].max() <= N_EXPERT and found["misses"][0] > N_EXPERT // 2
    llm.close()


def test_all_of_them_stay_where_there_is_room(path, expected):
    llm = load(path, N_EXPERT)
    assert slots(llm) == [N_EXPERT] * N_LAYER
    for _ in range(2):
        assert np.array_equal(logits(llm), expected)
    before = llm.expert_stats(reset=True)
    assert before["prefill"]["misses"].sum() > 0
    logits(llm)
    assert all(stats["misses"].sum() == 0 for stats in llm.expert_stats().values())
    llm.close()


def test_two_of_one_file_in_turns(path, expected):
    both = [load(path), load(path, 8)]
    for llm in both:
        llm.eval(list(range(20, 40)))
    for token in (5, 6, 7, 5):
        for llm in both:
            llm.eval([token])
    assert all(np.array_equal(llm.scores[:24], expected) for llm in both)
    for llm in both:
        llm.close()


def test_another_process_on_the_file(path, expected, tmp_path):
    """Killed while it reads: nothing of it is left, and this process goes on."""
    script = (
        "import sys; from allocmoe_edge import Llama; import numpy as np\n"
        f"llm = Llama({str(path)!r}, n_ctx=64, verbose=False, repack=False, expert_cache={size_for(path, 5)})\n"
        "print('ready', flush=True)\n"
        "while True:\n    llm.clear_cache(); llm.eval(list(range(20, 60)))\n"
    )
    other = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline().strip() == b"ready"
        llm = load(path)
        assert np.array_equal(logits(llm), expected)
        other.kill()
        other.wait()
        assert np.array_equal(logits(llm), expected)
        llm.close()
    finally:
        other.kill()
        other.wait()
        other.stdout.close()


def test_child_of_a_fork(path, expected):
    """Its threads that read are its own; also where it has none, and frees the model."""
    llm = load(path)
    logits(llm)
    for used in (True, False):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = 0 if not used or np.array_equal(logits(llm), expected) else 2
                llm.close()
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
    assert np.array_equal(logits(llm), expected)
    llm.close()


#
# what a miss may cost
#


def by_estimates(strict: bool = True, seed: int = 0) -> Plan:
    """Half of the activations, more or less."""
    estimator = random_estimator(N_LAYER, N_EXPERT, 256, n_down=32, rank=32, seed=seed)
    return Plan(
        [2] * N_LAYER, [N_USED] * N_LAYER, token_rule="estimate", threshold=(-1.5,) * N_LAYER, strict=strict, estimator=estimator
    )  # fmt: skip


def one_by_one(llm, tokens) -> np.ndarray:
    llm.clear_cache()
    for token in tokens:
        llm.eval([int(token)])
    return llm.scores[: len(tokens)].copy()


TEXT = np.random.default_rng(3).integers(1, 300, 30)


def test_price_of_one_changes_nothing(path):
    found = []
    for cache in (0, size_for(path, 5)):
        llm = Llama(str(path), **SIZES, expert_cache=cache, miss_price=1)
        llm.apply_plan(by_estimates())
        found.append((logits(llm), one_by_one(llm, TEXT)))
        llm.close()
    assert np.array_equal(found[0][0], found[1][0]) and np.array_equal(found[0][1], found[1][1])


def test_a_price_saves_reads_and_spends_the_budget_all_the_same(path):
    llm = load(path)
    llm.apply_plan(by_estimates())
    misses, means, absent = [], [], []
    for price in (1, 4, 1e6):
        llm.miss_price = price
        assert llm.miss_price == price
        one_by_one(llm, TEXT)
        stats = llm.expert_stats(reset=True)["decode"]
        misses.append(stats["misses"].sum())
        means.append(stats["mean"].mean())
        absent.append(stats["absent"].sum())
    assert misses[0] > 1.2 * misses[1] > 1.2 * misses[2] > 0
    assert absent[0] == 0 < absent[1] < absent[2]
    # those at hand take the places of those left out, as far as the threshold has moved by then
    assert 0.5 * means[0] < means[2] <= means[0]
    # at any price a token runs one expert
    assert misses[2] <= N_LAYER * len(TEXT)
    llm.close()


@pytest.fixture(scope="module")
def planned(path, tmp_path_factory):
    """With estimates and a plan for half of the activations."""
    target = tmp_path_factory.mktemp("planned") / "planned.gguf"
    estimator = random_estimator(N_LAYER, N_EXPERT, 256, n_down=32, rank=32, seed=0)
    quantiles = np.sort(np.random.default_rng(0).normal(-1.5, 0.5, (N_LAYER, N_QUANTILES)), axis=1)
    profile = metadata.Profile(
        tuple(np.linspace(2.0, 1.0, N_USED) for _ in range(N_LAYER)), (1.0,) * N_LAYER, metadata.Calibration("made up", 1, "0" * 64),
        token_rule="estimate", estimator=replace(estimator, quantiles=quantiles),
    )  # fmt: skip
    output.write_planned(path, target, profile.plan(0.5, (N_USED,) * N_LAYER), profile)
    return target


def test_at_full_budget_a_price_leaves_out_what_has_to_be_read_alone(path, planned):
    """Of experts at hand all run, of the others those that are worth it; the prompt, and a price of 1, are exact."""
    in_memory = Llama(str(planned), **SIZES, expert_cache=0)
    in_memory.set_budget(1.0)
    exact, prompt = one_by_one(in_memory, TEXT), logits(in_memory)[:20]
    llm = load(planned)
    llm.set_budget(1.0)
    assert llm.plan.token_rule == "estimate"
    found: dict = {}
    for price in (1, 2, 16, 1e6, 1):
        llm.miss_price = price
        llm.expert_stats(reset=True)
        rows = one_by_one(llm, TEXT)
        stats = llm.expert_stats(reset=True)["decode"]
        assert np.array_equal(rows, exact) == (price == 1)
        assert np.array_equal(stats["activations"] + stats["absent"], [N_USED * len(TEXT)] * N_LAYER)
        found[price] = stats["misses"].sum(), stats["absent"].sum()
        assert np.array_equal(one_by_one(llm, TEXT), rows) and np.array_equal(logits(llm)[:20], prompt)
    assert found[1][0] > found[2][0] > found[16][0] > found[1e6][0] > 0
    assert found[1][1] == 0 < found[2][1] < found[16][1] < found[1e6][1]
    # what has to be read is to be worth as much at half budget, where experts at hand have a threshold too
    llm.miss_price = 2
    llm.set_budget(strict=False)
    llm.expert_stats(reset=True)
    one_by_one(llm, TEXT)
    half = llm.expert_stats(reset=True)["decode"]
    assert half["absent"].sum() > 0 and half["activations"].sum() < 0.8 * N_USED * N_LAYER * len(TEXT)
    # estimates that are not the file's have no plan in it
    llm.miss_price = 16
    own = replace(by_estimates(), expert_used_count=(N_USED,) * N_LAYER, threshold=(-np.inf,) * N_LAYER)
    llm.apply_plan(own)
    assert np.array_equal(one_by_one(llm, TEXT), exact)
    for each in (llm, in_memory):
        each.close()


def test_at_hand_is_what_the_own_text_has_run(path):
    """Equal text gives equal output: whatever the cache holds, after another text, in another context, and taken back to a
    place in the middle."""
    llm = load(path, miss_price=50)
    llm.apply_plan(by_estimates())
    first = one_by_one(llm, TEXT)
    one_by_one(llm, TEXT[::-1])
    assert np.array_equal(one_by_one(llm, TEXT), first)
    llm.n_tokens = 20
    for token in TEXT[20:]:
        llm.eval([int(token)])
    assert np.array_equal(llm.scores[:30], first)
    other = load(path, miss_price=50)
    other.apply_plan(by_estimates())
    assert np.array_equal(one_by_one(other, TEXT), first)
    other.miss_price = 1
    assert not np.array_equal(one_by_one(other, TEXT), first)
    copy = pickle.loads(pickle.dumps(llm))
    assert copy.miss_price == 50
    for each in (llm, other, copy):
        each.close()


def test_at_hand_is_nothing_of_long_ago(path):
    """16 tokens a slot are looked at: where a price left few to be run, the whole text was, for every token."""
    llm = load(path, 8, miss_price=1e6, n_ctx=512)
    llm.apply_plan(by_estimates())
    found = []
    for n in (10, 16 * max(slots(llm)) + 1):
        llm.clear_cache()
        llm.eval([5, 5])  # a prompt, which runs all
        for _ in range(n):
            llm.eval([9])
        llm.expert_stats(reset=True)
        llm.eval([5])
        found.append(llm.expert_stats()["decode"]["activations"].sum())
    assert found[0] > found[1]
    llm.close()


def test_a_state_that_is_loaded_has_at_hand_what_its_text_has_run(path):
    """What follows is what follows the same text just evaluated, in this context and in another; from the prompts' cache, too."""
    llm, other = load(path, miss_price=50), load(path, miss_price=50)
    for each in (llm, other):
        each.apply_plan(by_estimates())
    wanted = one_by_one(llm, TEXT)[20:]

    def goes_on(each) -> np.ndarray:
        for token in TEXT[20:]:
            each.eval([int(token)])
        return each.scores[20:30].copy()

    one_by_one(llm, TEXT[:20])
    state, prompt = llm.save_state(), tuple(map(int, TEXT[:20]))
    llm.set_cache(llama_cpp.LlamaRAMCache())
    llm.cache[prompt] = state
    for each, loaded in ((llm, state), (llm, llm.cache[prompt]), (other, pickle.loads(pickle.dumps(state)))):
        one_by_one(each, TEXT[::-1])
        each.load_state(loaded)
        assert np.array_equal(goes_on(each), wanted)
    # of one from elsewhere nothing is at hand, whatever was there before
    for wrong in (None, "no array", state.ran[:, 1:], state.ran + np.int16(1000)):
        state.ran, found = wrong, []
        for before in (TEXT[:20], TEXT[::-1]):
            one_by_one(llm, before)
            llm.load_state(state)
            found.append(goes_on(llm))
        assert np.array_equal(*found) and not np.array_equal(found[0], wanted)
    for each in (llm, other):
        each.close()


def test_at_hand_is_nothing_of_a_text_before_where_none_has_run(path):
    """A prompt's tokens without logits pass the last layer over, and other rules note nothing."""
    llm = load(path, miss_price=50, logits_all=False)
    estimates, found = by_estimates(), []

    def last_rows() -> list:
        rows = []
        for token in TEXT[20:]:
            llm.eval([int(token)])
            rows.append(np.array(llm._ctx.get_logits()[0 : llm.n_vocab()]))
        return rows

    for before in (TEXT, TEXT[::-1]):
        llm.apply_plan(estimates)
        one_by_one(llm, before)
        llm.clear_cache()
        llm.eval([int(token) for token in TEXT[:20]])
        rows = last_rows()
        one_by_one(llm, before)
        llm.clear_cache()
        llm.apply_plan(Plan([2] * N_LAYER, [N_USED] * N_LAYER, token_rule="batch"))
        for token in TEXT[:20]:
            llm.eval([int(token)])
        llm.apply_plan(estimates)
        found.append(rows + last_rows())
    assert np.array_equal(*found)
    llm.close()


def test_cached_prompts_are_of_the_same_price(path):
    llm = load(path, miss_price=50, logits_all=False)
    llm.set_cache(llama_cpp.LlamaRAMCache())
    llm.create_completion([50, 51, 52], max_tokens=8, temperature=0)
    assert [50, 51, 52] in llm.cache
    llm.miss_price = 1
    assert [50, 51, 52] not in llm.cache
    llm.miss_price = 50
    assert [50, 51, 52] in llm.cache
    llm.close()


def test_where_nothing_is_at_hand_the_largest_runs(path):
    """At a price that no expert is worth: what runs is what a threshold leaves that none reaches."""
    llm, found = load(path), []
    for price, threshold in ((1, np.inf), (1e6, -1.5)):
        llm.miss_price = price
        llm.apply_plan(replace(by_estimates(strict=False), threshold=(threshold,) * N_LAYER))
        found.append([one_by_one(llm, [token])[0] for token in TEXT])
        assert llm.expert_stats(reset=True)["decode"]["activations"].sum() == N_LAYER * len(TEXT)
    assert np.array_equal(*found)
    llm.close()


def test_a_prompt_is_computed_without_the_price(path):
    llm = load(path, miss_price=1e6)
    llm.apply_plan(by_estimates())
    llm.eval(TEXT)
    dear = llm.scores[: len(TEXT)].copy()
    llm.miss_price = 1
    llm.eval(TEXT)
    assert np.array_equal(dear, llm.scores[: len(TEXT)])
    llm.close()


def test_the_price_is_measured(path):
    """A power of two from what reading and running took, and then the same text as at that price given; the cache is empty."""
    llm = load(path, miss_price="auto")
    llm.apply_plan(by_estimates())
    stats = llm.expert_stats()
    assert all(s["hits"].sum() == s["misses"].sum() == s["bytes_read"].sum() == 0 for s in stats.values())
    found, price = stats["decode"], llm.miss_price
    assert found["miss_price"] == price and 0 < found["hit_ms"] < found["miss_ms"]
    assert 2**-0.51 < found["miss_ms"] / found["hit_ms"] / price < 2**0.51 and np.log2(price) % 1 == 0
    measured = one_by_one(llm, TEXT)
    first = llm.expert_stats()["decode"]
    assert first["misses"].sum() > 0
    with pytest.raises(ValueError, match="measured as the model is loaded"):
        llm.miss_price = "auto"
    copy = pickle.loads(pickle.dumps(llm))
    given = load(path, miss_price=price)
    given.apply_plan(by_estimates())
    for each in (copy, given):
        assert each.miss_price == price and each.expert_stats()["decode"]["miss_ms"] == 0
        assert np.array_equal(one_by_one(each, TEXT), measured)
        assert np.array_equal(each.expert_stats()["decode"]["misses"], first["misses"])
    for each in (llm, copy, given):
        each.close()


@pytest.mark.parametrize("value", [0.5, "6", True, float("nan"), 1e7], ids=str)
def test_what_is_no_price_is_refused(path, value):
    with pytest.raises(ValueError, match="miss_price: found"):
        Llama(str(path), **SIZES, miss_price=value)


def test_a_speed_that_is_asked_for(tiny_planned):
    """What the budget found generates is what was asked for, and what cannot be leaves the plan as it was."""
    size = int(cache_size.least(tiny_planned) * 1.5) + 2**20
    llm = Llama(str(tiny_planned), n_ctx=64, verbose=False, repack=False, expert_cache=size)
    before = llm.set_budget(0.75)
    with pytest.raises(PlanError, match=r"1e\+09 tokens/s are out of reach: with the fewest experts, \d+ activations"):
        llm.set_speed(1e9)
    assert llm.plan == before and llm.expert_stats()["decode"]["tokens"].sum() == 0
    assert llm._by_hand is None  # it is still a budget's plan: requests take their rule from it
    copy = pickle.loads(pickle.dumps(llm))
    assert copy.plan == before
    copy.close()
    assert llm.set_speed(1e-3).expert_used_count == llm.expert_used_count_full == llm.plan.expert_used_count
    for wrong in (0, -1, True, "12", float("nan"), float("inf"), 10**400):
        with pytest.raises(ValueError, match="tokens_per_second: found"):
            llm.set_speed(wrong)
    llm.close()


@pytest.mark.parametrize("parser", [chat.parser, cli.parser])
def test_speeds_that_the_commands_take(parser, capsys):
    given = ["m.gguf", *(["-o", "n.gguf"] if parser is cli.parser else [])]
    assert parser().parse_args([*given, "--target-tps", "1e-12"]).target_tps == 1e-12
    for wrong in ("0", "-1", "nan", "inf", "fast"):
        with pytest.raises(SystemExit):
            parser().parse_args([*given, f"--target-tps={wrong}"])
        assert "want tokens per second, a number above 0" in capsys.readouterr().err


@pytest.mark.parametrize(("limit", "probes"), [(120, 1), (63, 8), (8, 8), (4, 2)])
def test_the_largest_total_that_is_fast_enough(limit, probes):
    asked: list = []

    def speed_at(total: int) -> float:
        asked.append(total)
        return 1000 / total

    total, found = speed_target.largest_total(8, 120, 1000 / limit, speed_at)
    assert found == 1000 / total and len(asked) <= probes
    assert limit - 120 // 32 <= total <= limit if limit >= 8 else total == 8 and found < 1000 / limit


def test_costs_of_activations_with_what_is_read(path):
    """allocmoe-convert --target-tps times other text each time: the same one again would have its experts at hand."""
    llm = load(path, 5)
    costs.measure(llm, (N_USED,) * N_LAYER, np.random.default_rng(0).integers(1, 300, 400).astype(np.int32))
    stats = llm.expert_stats()["decode"]
    assert stats["hits"].sum() < stats["misses"].sum()
    llm.close()


#
# what goes wrong
#


def opened(path) -> list:
    """File descriptors of this process on the file."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}") == str(path):
                found.append(int(name))
        except OSError:
            pass
    return found


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="looks into /proc")
def test_read_errors(path, expected):
    """An evaluation that cannot read is an error that says so, and the next one that can is as if nothing had been."""
    llm = load(path)
    before = logits(llm)
    (number,) = opened(path)
    kept, unreadable = os.dup(number), os.open(path, os.O_WRONLY)
    llm.clear_cache()
    os.dup2(unreadable, number)
    with pytest.raises(GenerationError, match=f"{path}: the model's file cannot be read: Bad file descriptor"):
        llm.eval(list(range(100, 140)))
    with pytest.raises(GenerationError, match="cannot be read"):
        llm.create_completion([50, 51, 52], max_tokens=20, temperature=0)
    os.dup2(kept, number)
    os.close(kept)
    os.close(unreadable)
    assert np.array_equal(logits(llm), expected) and np.array_equal(before, expected)
    llm.close()


def test_file_cut_off_while_running(path, tmp_path):
    copy = tmp_path / "model.gguf"
    shutil.copyfile(path, copy)
    llm = load(copy)
    stream = llm.create_completion([50, 51, 52], max_tokens=40, temperature=0, stream=True)
    next(stream)
    os.truncate(copy, copy.stat().st_size * 2 // 3)
    with pytest.raises(GenerationError, match="the model's file is shorter than when it was loaded"):
        for _ in stream:
            pass
    with pytest.raises(GenerationError, match="shorter"):
        logits(llm)
    llm.close()


def test_file_written_to_while_running(path, tmp_path):
    copy = tmp_path / "model.gguf"
    shutil.copyfile(path, copy)
    llm = load(copy)
    logits(llm)
    with open(copy, "r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(bytes(64))
    os.utime(copy, (1, 1))
    with pytest.raises(GenerationError, match="has been written to since it was loaded"):
        llm.eval(list(range(100, 140)))
    llm.close()


@pytest.mark.parametrize("value", [True, -1, 1.5, "6 apples", "GB", "", "1e9", 2**63], ids=str)
def test_what_is_no_size_is_refused(path, value):
    with pytest.raises(ValueError, match="expert_cache: found .*want a size"):
        Llama(str(path), **SIZES, expert_cache=value)


@pytest.mark.parametrize(
    "text, wanted",
    [("6GB", 6 * 10**9), ("1.5 GiB", 3 * 2**29), ("500mb", 5 * 10**8), ("7", 7), (12, 12), ("0", 0), ("2K", 2000)],
)
def test_sizes(text, wanted):
    assert cache_size.parse(text) == wanted


def test_too_small_and_too_large(path, monkeypatch):
    with pytest.raises(ValueError, match="expert_cache: found .* want at least .*, one layer's experts"):
        Llama(str(path), **SIZES, expert_cache=cache_size.least(path) - 1)
    monkeypatch.setattr(memory, "available", lambda: size_for(path, 5) - 1)
    with pytest.raises(ValueError, match="expert_cache: found .* and there are .* of memory free"):
        load(path)


def test_dense_model(dense_path):
    with pytest.raises(ValueError, match="has no routed experts"):
        Llama(str(dense_path), verbose=False, expert_cache="1GB")


def test_by_default_where_the_file_is_larger_than_the_memory(path, expected, monkeypatch, capfd):
    size = path.stat().st_size
    others = cache_size.context_bytes(path, 256, 512)
    assert others > 4 * N_LAYER * 256 * 128  # keys and values alone
    # what the context takes is no place for experts
    monkeypatch.setattr(cache_size, "context_bytes", lambda *_: 0)
    for free, wanted, prefetch in ((int(size * 0.9), True, False), (size // 4, False, True), (size, False, False)):
        monkeypatch.setattr(memory, "available", lambda free=free: free)
        llm = Llama(str(path), **SIZES)
        assert (llm.expert_cache > 0) == wanted and llm.prefetch == prefetch
        assert llm.expert_cache < free
        llm.close()
    monkeypatch.setattr(memory, "available", lambda: int(size * 0.9))
    llm = Llama(str(path), **{**SIZES, "verbose": True})
    assert "of memory for the experts, since the file is larger than what is free" in capfd.readouterr().err
    assert np.array_equal(logits(llm), expected)
    llm.close()
    monkeypatch.setattr(cache_size, "context_bytes", lambda *_: size)
    assert cache_size.choose(path, None, True) == 0
    for arguments in (dict(prefetch=True), dict(prefetch=False), dict(expert_cache=0)):
        llm = Llama(str(path), **SIZES, **arguments)
        assert llm.expert_cache == 0
        llm.close()


@pytest.mark.parametrize("budget", [[], ["--budget", "full"], ["--budget", "0.3"]], ids=str)
def test_price_of_a_chat(planned, monkeypatch, capsys, budget):
    """Taken at any budget of a file with estimates, also the full one."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    options = ["--no-repack", "--expert-cache", str(size_for(planned, 5)), "--miss-price", "4", *budget]
    assert chat.main([str(planned), *options]) == 0, capsys.readouterr().err


def test_options_of_the_server(path, monkeypatch, capsys):
    """They become overrides that llama-server takes, and the library reads."""

    def options(*given):
        args, args.rest = llama_server.parser().parse_known_args(given)
        return llama_server._cache_options(str(path), args)

    key, price = cache_size.KEY, cache_size.PRICE_KEY
    wanted = ["--override-kv", f"{key}=int:6000000", "--override-kv", f"{price}=float:4.0"]
    assert options("--expert-cache", "6MB", "--miss-price", "4") == wanted
    assert options("--expert-cache", "6MB", "--miss-price", "auto")[2:] == ["--override-kv", f"{price}=float:0.0"]
    assert options("--expert-cache", "6MB")[2:] == ["--override-kv", f"{price}=float:1.0"]
    assert options() == options("--expert-cache", "0") == []
    with pytest.raises(CommandError, match="^--miss-price: has no effect without an expert cache"):
        options("--miss-price", "4", "--expert-cache", "0")
    assert options("--miss-price", "4") == []  # where the memory decides
    assert "--miss-price has no effect here" in capsys.readouterr().err
    with pytest.raises(CommandError, match="^--expert-cache: found .* want at least"):
        options("--expert-cache", "1kB")
    monkeypatch.setattr(memory, "available", lambda: int(path.stat().st_size * 0.9))
    monkeypatch.setattr(cache_size, "context_bytes", lambda _, n_ctx, n_ubatch: n_ctx)
    assert options("-c", "99999999") == []
    (_, found, _, _) = options()
    assert found.startswith(f"{key}=int:") and "GB of memory for the experts" in capsys.readouterr().err
    for variable, value in (("LLAMA_ARG_CTX_SIZE", "99999999"), ("LLAMA_ARG_N_GPU_LAYERS", "99")):
        with monkeypatch.context() as patch:
            patch.setenv(variable, value)
            assert options() == []
    assert options("--prefetch", "on") == options("--expert-cache", "0") == []
    for wrong in (["--expert-cache", "much"], ["--miss-price", "0.5"]):
        with pytest.raises(SystemExit):
            options(*wrong)


def test_it_survives_pickling(path, expected):
    llm = load(path)
    copy = pickle.loads(pickle.dumps(llm))
    assert copy.expert_cache == llm.expert_cache > 0
    assert np.array_equal(logits(copy), expected)
    copy.close()
    llm.close()


def test_without_a_cache_nothing_is_said_of_it(path):
    llm = Llama(str(path), **SIZES)
    assert set(llm.expert_stats()["decode"]) == {"activations", "tokens", "mean"} and llm.expert_cache == 0
    llm.close()

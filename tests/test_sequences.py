"""Sequences of one context with budgets of their own: each computes what it computes alone, and graphs are used again."""

from __future__ import annotations

from dataclasses import replace

from allocmoe_edge import Llama, Plan, expert_cache
from allocmoe_edge.convert import output
from allocmoe_edge.plan import metadata
from allocmoe_edge.plan.estimator import N_QUANTILES
from conftest import plan_from_made_up_profile
from gguf_factory import random_estimator
import llama_cpp.llama_cpp as raw
from native_testing import ffi, libllama
import numpy as np
import pytest

pytest.importorskip("torch", reason="the tiny models are made with transformers")
pytest.importorskip("transformers", minversion="5", reason="the tiny models are made with transformers")

N_LAYER, N_USED, N_EXPERT, N_EMBD = 4, 4, 8, 64
N_TOKENS = 48
TOKENS = np.random.default_rng(7).integers(1, 300, (2, N_TOKENS)).tolist()

# Of the logits' standard deviation, for the median token's worst logit, where other kernels run: for one token and for two,
# and attention over the cells of both sequences. Rounding may put an expert on the other side of a threshold, hence the
# median. With the other sequence's budget it is off by 0.1 and more.
MAX_ERROR = 0.03


@pytest.fixture(scope="module")
def model(built):
    llm = Llama(str(built["olmoe"].gguf_path), n_ctx=64, n_threads=1, verbose=False)
    yield llm
    llm.close()


class Context:
    """A context of the model for several sequences."""

    def __init__(self, model: Llama, n_seq_max: int = 2, unified: bool = False) -> None:
        params = raw.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = 256 * n_seq_max, 128, 128
        params.n_seq_max, params.kv_unified, params.n_threads, params.n_threads_batch = n_seq_max, unified, 2, 2
        params.type_k = params.type_v = 0  # F32
        params.no_perf = False
        self.pointer = raw.llama_init_from_model(model._model.model, params)
        self.ctx = ffi.cast("struct llama_context *", int(self.pointer))
        self.memory = raw.llama_get_memory(self.pointer)
        self.n_vocab = model.n_vocab()

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *_) -> None:
        raw.llama_free(self.pointer)

    def set_plan(self, plan: Plan, estimates=None) -> int:
        rule = ffi.new("struct allocmoe_rule *")
        names = ("off", "batch", "threshold", "estimate")
        rule.token_rule, rule.k_base, rule.strict = names.index(plan.token_rule), plan.k_base, plan.strict
        threshold = ffi.new("float[]", list(plan.threshold)) if plan.threshold else ffi.NULL
        rule.threshold = threshold
        if estimates:
            arrays = {
                name: ffi.new("float[]", getattr(estimates, name).ravel().tolist())
                for name in ("down", "log_norm", "output", "up")
            }
            sizes = dict(n_down=estimates.n_down, rank=estimates.rank, n_relu=estimates.n_relu)
            struct = ffi.new("struct allocmoe_estimator *", {**sizes, **arrays})
            assert libllama.allocmoe_set_estimator(self.ctx, struct, N_LAYER, N_EXPERT, N_EMBD) == 0
        done = libllama.allocmoe_set_plan(self.ctx, list(plan.expert_used_count), N_LAYER, rule)
        assert done >= 0
        return done

    def set_plan_seq(self, seq: int, plan: Plan | None) -> None:
        threshold = ffi.new("float[]", list(plan.threshold)) if plan and plan.threshold else ffi.NULL
        counts = list(plan.expert_used_count) if plan else ffi.NULL
        libllama.allocmoe_set_plan_seq(self.ctx, seq, counts, threshold)

    def decode(self, tokens: list, outputs=None) -> np.ndarray:
        """Logits of [(token, position, sequence or several), ...] in one batch, of those at the indices `outputs`."""
        outputs = range(len(tokens)) if outputs is None else outputs
        batch = raw.llama_batch_init(len(tokens), 0, 4)
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence) in enumerate(tokens):
            sequences = np.atleast_1d(sequence)
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = (
                token,
                position,
                len(sequences),
                i in outputs,
            )
            for j, seq in enumerate(sequences.tolist()):
                batch.seq_id[i][j] = seq
        assert raw.llama_decode(self.pointer, batch) == 0
        logits = [raw.llama_get_logits_ith(self.pointer, i) for i in outputs]
        rows = np.array([np.ctypeslib.as_array(row, (self.n_vocab,)) for row in logits])
        raw.llama_batch_free(batch)
        return rows

    def run(self, sequences, n_batch: int) -> dict:
        """{sequence: logits}: each sequence's tokens from position 0 on, n_batch of each at a time, in one batch."""
        raw.llama_memory_clear(self.memory, True)
        found = {seq: [] for seq in sequences}
        for start in range(0, N_TOKENS, n_batch):
            batch = [(TOKENS[seq][i], i, seq) for seq in sequences for i in range(start, start + n_batch)]
            rows = self.decode(batch)
            for n, seq in enumerate(sequences):
                found[seq].append(rows[n * n_batch : (n + 1) * n_batch])
        return {seq: np.concatenate(rows) for seq, rows in found.items()}

    def run_as(self, seq: int, n_batch: int = 4) -> np.ndarray:
        """The tokens of `seq`, as the context's sequence 0."""
        raw.llama_memory_clear(self.memory, True)
        starts = range(0, N_TOKENS, n_batch)
        return np.concatenate(
            [self.decode([(TOKENS[seq][i], i, 0) for i in range(start, start + n_batch)]) for start in starts]
        )

    def spent(self) -> int:
        """Activations since the last call."""
        total = 0
        for phase in (0, 1):
            counts, tokens = ffi.new("int64_t[]", N_LAYER), ffi.new("int64_t[]", N_LAYER)
            assert libllama.allocmoe_get_counts(self.ctx, phase, counts, tokens, N_LAYER) == 0
            total += sum(counts)
        libllama.allocmoe_reset_counts(self.ctx)
        return total

    def n_reused(self) -> int:
        return raw.llama_perf_context(self.pointer).n_reused


FULL = [N_USED] * N_LAYER


def plans(rule: str) -> tuple:
    """Two budgets under a rule; counts of 1 and of all experts too, where a rule has nothing to share."""
    few, many = [1, 2, 3, 1], [3, 3, 4, 2]
    if rule == "off":
        return Plan(few, FULL), Plan(many, FULL)
    if rule == "batch":
        return Plan(few, FULL, token_rule="batch"), Plan(many, FULL, token_rule="batch")
    # thresholds on scores of 8 experts, and on log sizes
    low, high = ([0.08] * N_LAYER, [0.16] * N_LAYER) if rule == "threshold" else ([-2.0] * N_LAYER, [-0.5] * N_LAYER)
    return Plan(few, FULL, token_rule=rule, threshold=high), Plan(many, FULL, token_rule=rule, threshold=low)


def distance(found, wanted) -> float:
    assert np.isfinite(found).all()
    return np.median(np.abs(found - wanted).max(1)) / wanted.std()


@pytest.mark.parametrize("unified", [False, True], ids=["own cells", "shared cells"])
@pytest.mark.parametrize("rule", ["off", "batch", "threshold", "strict threshold", "estimate", "strict estimate"])
def test_each_sequence_as_it_is_alone(model, rule, unified):
    strict, rule = "strict" in rule, rule.split()[-1]
    estimates = random_estimator(N_LAYER, N_EXPERT, N_EMBD, 10, 7, 5, 2) if rule == "estimate" else None
    own = [replace(plan, strict=strict) for plan in plans(rule)]
    with Context(model, unified=unified) as both, Context(model, n_seq_max=1) as alone:
        for n_batch in (N_TOKENS, 4, 1):
            wanted, spent = {}, 0
            for seq, plan in enumerate(own):
                alone.set_plan(plan, estimates)
                wanted[seq] = alone.run_as(seq, n_batch)
                spent += alone.spent()
            both.set_plan(own[0], estimates)
            both.set_plan_seq(1, own[1])
            found = both.run((0, 1), n_batch)
            for seq in (0, 1):
                if n_batch > 1 and not unified:  # the same kernels
                    assert np.array_equal(found[seq], wanted[seq]), (n_batch, seq)
                assert distance(found[seq], wanted[seq]) < MAX_ERROR, (n_batch, seq)
            # rounding may put a size on the other side of a threshold
            assert abs(both.spent() - spent) <= (4 if rule == "estimate" and (unified or n_batch == 1) else 0)
            # with the other one's budget it shows
            assert distance(both_of(both, own[0], estimates), wanted[1]) > 0.1


def test_a_token_of_several_sequences_counts_for_the_least_id(model):
    few, many = plans("threshold")
    with Context(model, n_seq_max=4, unified=True) as context:
        found = {}
        for sequences in ((0,), (3,), (0, 1, 2, 3), (3, 2, 1, 0)):
            raw.llama_memory_clear(context.memory, True)
            context.set_plan(few)
            for seq in (1, 2, 3):
                context.set_plan_seq(seq, many)
            context.spent()
            context.decode([(TOKENS[0][i], i, sequences) for i in range(N_TOKENS)])
            found[sequences] = context.spent()
    assert found[0, 1, 2, 3] == found[3, 2, 1, 0] == found[0,] < found[3,]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30, -1e30])
def test_what_is_left_over_is_a_number(model, bad):
    """From a damaged file: without, it would stay for the rest of a text."""
    with Context(model) as context:
        assert libllama.allocmoe_set_left_seq(context.ctx, 1, [bad, 2.0] * N_LAYER, 2) == 0
        left = ffi.new("float[]", 2 * N_LAYER)
        assert libllama.allocmoe_get_left_seq(context.ctx, 1, left, 2) == 0
    assert list(left) == [0.0, 2.0] * N_LAYER


def both_of(context: Context, plan: Plan, estimates) -> np.ndarray:
    """The second sequence's logits under the context's plan alone."""
    context.set_plan_seq(1, None)
    context.set_plan(plan, estimates)
    found = context.run((0, 1), N_TOKENS)[1]
    context.spent()
    return found


@pytest.mark.parametrize("rule", ["off", "threshold"])
def test_the_last_layer_sees_only_tokens_with_output(model, rule):
    """Its values are those of the tokens whose logits are wanted: here the last of one sequence, and two of the other."""
    few, many = plans(rule)
    prompts = [(TOKENS[seq][i], i, seq) for seq in (0, 1) for i in range(N_TOKENS)]
    outputs = [5, N_TOKENS - 1, 2 * N_TOKENS - 1]
    with Context(model) as context:
        context.set_plan(few)
        context.set_plan_seq(1, many)
        wanted = context.decode(prompts)[outputs]
        raw.llama_memory_clear(context.memory, True)
        assert np.array_equal(context.decode(prompts, outputs), wanted)


@pytest.mark.parametrize("rule", ["threshold", "estimate"])
def test_strict_does_not_depend_on_who_else_is_in_the_batch(model, rule):
    """What is left over is a sequence's own: the other one's tokens, at the same positions, change nothing; nor does a
    rollback of either."""
    estimates = random_estimator(N_LAYER, N_EXPERT, N_EMBD, 10, 7, 5, 2) if rule == "estimate" else None
    plan = replace(plans(rule)[1], strict=True)
    with Context(model) as context:
        context.set_plan(plan, estimates)
        wanted = {seq: context.run((seq,), 4)[seq] for seq in (0, 1)}
        found = context.run((0, 1), 4)
        for seq in (0, 1):
            assert np.array_equal(found[seq], wanted[seq])
        # back to position 20 in one sequence, on in it alone, then the same in the other
        for seq in (1, 0):
            raw.llama_memory_seq_rm(context.memory, seq, 20, -1)
            for start in range(20, N_TOKENS, 4):
                again = context.decode([(TOKENS[seq][i], i, seq) for i in range(start, start + 4)])
                assert np.array_equal(again, wanted[seq][start : start + 4])


def priced(built, tmp_path) -> Llama:
    """Half budget by estimates, with an expert cache and a price of misses."""
    source, path = built["olmoe"].gguf_path, tmp_path / "planned.gguf"
    made = random_estimator(N_LAYER, N_EXPERT, N_EMBD, 10, 7, 5, 2)
    quantiles = np.sort(np.random.default_rng(0).normal(-1.0, 1.0, (N_LAYER, N_QUANTILES)), axis=1)
    profile = metadata.Profile(
        (np.linspace(2.0, 1.0, N_USED),) * N_LAYER, (1.0,) * N_LAYER, metadata.Calibration("made up", 1, "0" * 64),
        token_rule="estimate", estimator=replace(made, quantiles=quantiles),
    )  # fmt: skip
    output.write_planned(source, path, profile.plan(0.5, FULL), profile)
    size = int(expert_cache.least(path) * 2.6)
    return Llama(str(path), n_ctx=64, n_threads=1, verbose=False, repack=False, expert_cache=size, miss_price=8)


def test_what_a_sequence_has_at_hand_is_its_own(built, tmp_path):
    """With an expert cache and a price of misses: at the file's budget, and at the full one of the other sequence."""
    budgets = (N_USED * N_LAYER // 2, N_USED * N_LAYER)
    llm = priced(built, tmp_path)
    with Context(llm) as both, Context(llm, n_seq_max=1) as alone:
        assert libllama.allocmoe_set_budget_seq(both.ctx, 1, budgets[1]) == 1
        found, spent = both.run((0, 1), 1), both.spent()
        for seq, budget in enumerate(budgets):
            assert libllama.allocmoe_set_budget(alone.ctx, budget, -1, -1) >= 0
            wanted = alone.run_as(seq, 1)
            spent -= alone.spent()
            assert distance(found[seq], wanted) < MAX_ERROR
            libllama.allocmoe_set_miss_price(alone.ctx, 1)
            assert distance(alone.run_as(seq, 1), wanted) > 2 * MAX_ERROR
            alone.spent()
            libllama.allocmoe_set_miss_price(alone.ctx, 8)
        assert abs(spent) <= 4  # rounding may put a size on the other side of a threshold
    llm.close()


def test_what_has_run_goes_with_a_sequences_memory(built, tmp_path):
    """Copied to another sequence and shifted there, as a server does: what follows is what follows in the first one."""
    half, cut = N_TOKENS // 2, 6
    llm = priced(built, tmp_path)
    with Context(llm) as context:
        n = libllama.allocmoe_ran_size(context.ctx)
        assert n == 1 + N_USED

        def ran(seq: int, n_tokens: int) -> np.ndarray:
            found = np.zeros((N_LAYER, n_tokens, n), np.int16)
            assert libllama.allocmoe_get_ran_seq(context.ctx, seq, ffi.from_buffer("int16_t[]", found), n_tokens) == 0
            return found

        def goes_on(seq: int, first: int) -> np.ndarray:
            return np.concatenate([context.decode([(TOKENS[0][half + i], first + i, seq)]) for i in range(half)])

        for shifted in (False, True):
            context.run((0, 1), 1)
            raw.llama_memory_seq_rm(context.memory, 0, half, -1)
            raw.llama_memory_seq_rm(context.memory, 1, -1, -1)
            raw.llama_memory_seq_cp(context.memory, 0, 1, -1, -1)
            moved, first = ran(0, half), half
            if shifted:
                for seq in (0, 1):
                    raw.llama_memory_seq_rm(context.memory, seq, cut, 2 * cut)
                    raw.llama_memory_seq_add(context.memory, seq, 2 * cut, -1, -cut)
                moved, first = np.delete(moved, range(cut, 2 * cut), axis=1), half - cut
                pointer = ffi.from_buffer("int16_t[]", np.ascontiguousarray(moved))
                assert libllama.allocmoe_set_ran_seq(context.ctx, 0, pointer, first) == 0
            other = goes_on(1, first)
            raw.llama_memory_seq_rm(context.memory, 1, first, -1)
            pointer = ffi.from_buffer("int16_t[]", np.ascontiguousarray(moved))
            assert libllama.allocmoe_set_ran_seq(context.ctx, 1, pointer, first) == 0
            assert np.array_equal(ran(1, first)[..., 0], moved[..., 0])
            found, wanted = goes_on(1, first), goes_on(0, first)
            assert np.array_equal(found, wanted) and not np.array_equal(other, wanted)
        assert libllama.allocmoe_set_ran_seq(context.ctx, 1, ffi.NULL, half) == 0
        assert not ran(1, half)[..., 0].any() and ran(0, half)[..., 0].all()
        assert libllama.allocmoe_set_ran_seq(context.ctx, 2, ffi.NULL, half) < 0
    llm.close()


def decode_one(context: Context, i: int) -> None:
    context.decode([(TOKENS[0][i], i, 0)])


@pytest.mark.parametrize("rule", ["threshold", "estimate", "batch"])
def test_another_threshold_keeps_the_graph(model, rule):
    """Where only counts and thresholds change, the graph is used again, and computes by the new ones."""
    estimates = random_estimator(N_LAYER, N_EXPERT, N_EMBD, 10, 7, 5, 2) if rule == "estimate" else None
    one = plans(rule)[0]
    one = replace(one, expert_used_count=(2, 2, 3, 2))
    other = replace(one, expert_used_count=(3, 3, 2, 3))
    if rule != "batch":
        other = replace(other, threshold=plans(rule)[1].threshold)
    with Context(model) as context:
        context.set_plan(one, estimates)
        for i in range(3):
            decode_one(context, i)
        for i in range(3, 9):
            before = context.n_reused()
            assert context.set_plan((one, other)[i % 2]) == libllama.ALLOCMOE_CHANGED
            decode_one(context, i)
            assert context.n_reused() == before + 1
        # the same numbers as in a context that has never had another plan
        found = context.decode([(TOKENS[0][9], 9, 0)])
    with Context(model) as context:
        context.set_plan(one, estimates)
        for i in range(3):
            decode_one(context, i)
        for i in range(3, 9):
            context.set_plan((one, other)[i % 2])
            libllama.allocmoe_build_as_for_devices(context.ctx, i % 2 == 1)  # another graph each time
            before = context.n_reused()
            decode_one(context, i)
            assert context.n_reused() == before
        libllama.allocmoe_build_as_for_devices(context.ctx, False)
        assert distance(context.decode([(TOKENS[0][9], 9, 0)]), found) < MAX_ERROR


def test_a_plan_of_another_shape_builds_another_graph(model):
    one = replace(plans("threshold")[0], expert_used_count=(2, 2, 3, 2))
    with Context(model) as context:
        for other in (
            replace(one, expert_used_count=(2, 2, 3, N_USED)),
            replace(one, token_rule="batch", threshold=None),
        ):
            context.set_plan(one)
            for i in range(3):
                decode_one(context, i)
            before = context.n_reused()
            context.set_plan(other)
            decode_one(context, 3)
            assert context.n_reused() == before
            raw.llama_memory_clear(context.memory, True)


def test_budgets_by_sequence_from_the_file(built, tmp_path):
    """The C function that a server calls: the plans are those that the file has for each budget."""
    path = plan_from_made_up_profile(built["olmoe"].gguf_path, tmp_path / "planned.gguf")
    llm = Llama(str(path), n_ctx=64, n_threads=1, verbose=False)
    with Context(llm) as both, Context(llm, n_seq_max=1) as alone:
        wanted = []
        for seq, total in enumerate((7, 11)):
            assert libllama.allocmoe_set_budget(alone.ctx, total, -1, -1) >= 0
            wanted.append(alone.run_as(seq))
        assert libllama.allocmoe_set_budget(both.ctx, 7, -1, -1) >= 0
        assert libllama.allocmoe_set_budget_seq(both.ctx, 1, 11) == libllama.ALLOCMOE_CHANGED
        found = both.run((0, 1), 4)
        assert np.array_equal(found[0], wanted[0]) and np.array_equal(found[1], wanted[1])
        assert both.spent() == alone.spent() == (7 + 11) * N_TOKENS
        # ended, it has the context's again
        assert (
            libllama.allocmoe_set_budget_seq(both.ctx, 1, libllama.ALLOCMOE_TOTAL_OF_FILE) == libllama.ALLOCMOE_CHANGED
        )
        assert not np.array_equal(both.run((0, 1), 4)[1], wanted[1])
        assert both.spent() == 14 * N_TOKENS
        for seq in (-1, 2):
            assert libllama.allocmoe_set_budget_seq(both.ctx, seq, 7) < 0
    llm.close()

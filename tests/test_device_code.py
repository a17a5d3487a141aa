"""What the CUDA backend runs of ours, compiled for CPU threads (device_code.cpp), where no GPU is needed.

The token rules, which are written for a block of threads, keep what their definitions say in blocks of any size and
without a data race; and the hooks in mm_ids_helper, in the fallback that sorts on the host, and in the matrix-vector
kernels do with ids of -1 what their names say. The kernels around them need a GPU: test_cuda.py.
"""

from __future__ import annotations

import struct
import subprocess

from allocmoe_edge._native import BUILD_DIR
from allocmoe_edge.plan import VALUES
from conftest import ROOT
import numpy as np
import pytest
from test_token_rule import RULES, reference_batch, reference_threshold, reference_values, score_sets

N_EXPERT = 20
ROUTE, MARK, SKIP, ESTIMATE = range(4)


@pytest.fixture(scope="module", params=["plain", "thread sanitizer"])
def program(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("device") / "device_code"
    flags = ["-O1", "-fsanitize=thread"] if request.param == "thread sanitizer" else ["-O2"]
    command = ["c++", "-std=c++17", "-Wall", "-Wextra", "-Werror", *flags, "-pthread"]
    command += ["-I", str(ROOT / "native"), "-I", str(BUILD_DIR / "include"), str(ROOT / "tests" / "device_code.cpp")]
    done = subprocess.run([*command, "-o", str(path)], capture_output=True, text=True)
    if done.returncode and "fsanitize" in " ".join(flags) and "tsan" in done.stderr:
        pytest.skip("no thread sanitizer here")
    assert done.returncode == 0, done.stderr
    probe = subprocess.run([str(path)], input=b"", capture_output=True)
    if b"ThreadSanitizer" in probe.stderr:
        pytest.skip(f"the thread sanitizer does not run here: {probe.stderr[:200]!r}")
    return path


def run(program, data: bytes) -> bytes:
    done = subprocess.run([str(program)], input=data, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return done.stdout


def header(*numbers) -> bytes:
    return struct.pack("11i", *numbers, *[0] * (11 - len(numbers)))


def reference(case):
    """(n_kept, activations left over) by the rules' definitions in numpy."""
    with np.errstate(invalid="ignore"):  # -inf and NaN among the scores
        values = reference_values(VALUES[case["value"]], np.ascontiguousarray(case["ranked"], np.float32))
    if case["rule"] == RULES["batch"]:
        return reference_batch(case["k_base"], case["k"], values), case["left"]
    return reference_threshold(case["k_base"], case["k"], values, case["threshold"], case["strict"], case["left"])


def cases(rng, n_tokens):
    for n_used in (1, 3, 8, 13):
        for name, ranked in score_sets(rng, n_tokens, n_used):
            for value in range(3):
                k = int(rng.integers(1, n_used + 1))
                k_base = int(rng.integers(1, k + 1))
                common = dict(name=name, n_used=n_used, ranked=ranked, value=value, k_base=k_base, k=k, left=0.0)
                yield dict(common, rule=RULES["batch"], strict=False, threshold=0.0)
                for threshold in (-np.inf, 0.125, float(rng.random()), np.inf):
                    strict = bool(rng.integers(2))
                    left = float(rng.integers(0, 6)) if strict else 0.0
                    case = dict(common, rule=RULES["threshold"], strict=strict, threshold=threshold)
                    yield dict(case, left=left)


def scatter(rng, ranked):
    """All experts' scores and their argsort, of which `ranked` is the beginning."""
    n_tokens, n_used = ranked.shape
    ids = np.array([rng.permutation(N_EXPERT) for _ in range(n_tokens)], np.int32)
    scores = np.full((n_tokens, N_EXPERT), -np.inf, np.float32)
    np.put_along_axis(scores, ids[:, :n_used], ranked.astype(np.float32), 1)
    return ids, scores


# one thread is how the CPU runs them
@pytest.mark.parametrize(
    "n_tokens, n_threads", [(1, 1), (1, 32), (2, 3), (31, 32), (33, 32), (33, 1), (100, 7), (129, 64)]
)
def test_rules_in_a_block_of_any_size(program, n_tokens, n_threads, request):
    rng = np.random.default_rng(n_tokens)
    todo, data = [], b""
    # under the sanitizer threads are slow, and every case starts its own
    every = 7 if "sanitizer" in request.node.name else 1
    for case in list(cases(rng, n_tokens))[::every]:
        ids, scores = scatter(rng, case["ranked"])
        numbers = (case["rule"], case["value"], case["k_base"], 0, case["strict"], case["n_used"])
        data += header(ROUTE, n_threads, *numbers, N_EXPERT, n_tokens)
        limits = np.tile(np.float32([case["k"], case["threshold"]]), (n_tokens, 1))
        data += np.float32(case["left"]).tobytes() + limits.tobytes() + ids.tobytes() + scores.tobytes()
        todo.append((case, ids))
    found, at = run(program, data), 0
    for case, ids in todo:
        n_used = case["n_used"]
        routed = np.frombuffer(found, np.int32, n_tokens * n_used, at).reshape(n_tokens, n_used)
        prefill, decode, left = np.frombuffer(found[at + routed.nbytes : at + routed.nbytes + 24], np.float64)
        noted = np.frombuffer(found, np.int32, n_tokens, at + routed.nbytes + 24)
        at += routed.nbytes + 24 + noted.nbytes
        n_kept, left_after = reference(case)
        expected = np.where(np.arange(n_used) < n_kept[:, None], ids[:, :n_used], -1)
        shown = {key: value for key, value in case.items() if key != "ranked"}
        assert np.array_equal(routed, expected), shown
        assert (prefill, decode, left) == (0, n_kept.sum(), left_after), shown
        assert np.array_equal(noted, n_kept), shown
    assert at == len(found) and len(todo) == 4 * 7 * 3 * 5 // every


@pytest.mark.parametrize("n_threads", [1, 3, 32])
@pytest.mark.parametrize("rule", ["off", "batch", "threshold"])
def test_every_token_by_its_own_limits(program, rule, n_threads):
    """Tokens of two sequences in one micro-batch: each keeps what it keeps where its sequence's are alone."""
    rng = np.random.default_rng(n_threads)
    n_tokens, n_used = 40, 8
    for name, ranked in score_sets(rng, n_tokens, n_used):
        ids, scores = scatter(rng, ranked)
        mine = rng.random(n_tokens) < 0.4
        for (k, threshold), (other_k, other_threshold) in (
            ((5, 0.3), (3, 0.6)),
            ((8, -np.inf), (2, 0.1)),  # all experts, and some
            ((1, np.inf), (4, 0.5)),  # fewer than the other sequence keeps in any case
        ):
            # `off` keeps a token's count: the rule with every candidate in the base and a threshold that none reaches
            k_base = n_used if rule == "off" else 2
            limits = np.where(mine[:, None], np.float32([k, threshold]), np.float32([other_k, other_threshold]))
            if rule == "off":
                limits[:, 1] = np.inf
            number = RULES["batch"] if rule == "batch" else RULES["threshold"]
            data = header(ROUTE, n_threads, number, 0, k_base, 0, 0, n_used, N_EXPERT, n_tokens)
            data += np.float32(0).tobytes() + limits.astype(np.float32).tobytes() + ids.tobytes() + scores.tobytes()
            found = run(program, data)
            kept = (np.frombuffer(found, np.int32, n_tokens * n_used).reshape(n_tokens, n_used) >= 0).sum(1)
            for tokens, count, least in ((mine, k, threshold), (~mine, other_k, other_threshold)):
                values = np.ascontiguousarray(ranked[tokens], np.float32)
                base = min(k_base, count)
                if rule == "off":
                    want = np.full(len(values), count)
                elif rule == "batch":
                    want = reference_batch(base, count, values)
                else:
                    want = reference_threshold(base, count, values, least, False, 0.0)[0]
                assert kept[tokens].tolist() == want.tolist(), (name, count)
            assert np.frombuffer(found, np.float64, 3, n_tokens * n_used * 4)[1] == kept.sum()


@pytest.mark.parametrize("n_tokens, n_threads", [(1, 1), (1, 32), (1, 256), (3, 96), (9, 40), (9, 1)])
@pytest.mark.parametrize("n_used, k_base", [(1, 1), (6, 1), (8, 3)])
def test_estimates_keep_and_add_up_what_they_should(program, n_tokens, n_threads, n_used, k_base):
    """Against numpy in float64: ids where no size is within rounding of the threshold, sums to 1e-5 of the largest term."""
    rng = np.random.default_rng(n_tokens * 10 + n_used)
    n_down, rank, n_columns, n_relu = 12, 5, 32, 3
    ids = np.array([rng.permutation(N_EXPERT) for _ in range(n_tokens)], np.int32)
    used = ids[:, :n_used]
    weights = rng.random((n_tokens, n_used), np.float32)
    weights[rng.random(weights.shape) < 0.1] = 0.0  # a router may give nothing
    reduced = rng.standard_normal((n_tokens, n_down), np.float32)
    log_norm = rng.standard_normal((N_EXPERT, n_down + 1), np.float32)
    output = rng.standard_normal((N_EXPERT, rank), np.float32)
    if n_tokens > 1:
        reduced[-1] = np.nan  # a token whose sizes are not numbers keeps its first
        output[used[0, -1]] = 7e4  # what float16 cannot hold is no estimate
        weights[0] = 1.0

    sizes = np.log(np.maximum(weights.astype(np.float64), 1e-20)) + log_norm.astype(np.float64)[used, -1]
    rectified = reduced.astype(np.float64)
    rectified[:, -n_relu:] = np.maximum(rectified[:, -n_relu:], 0.0)  # NaN stays
    sizes += np.einsum("tri,ti->tr", log_norm.astype(np.float64)[used, :-1], rectified)
    numbers = np.sort(sizes[np.isfinite(sizes)])
    numbers = np.array([numbers[0] - 1, *numbers])
    widest = np.diff(numbers).argmax()
    for threshold in (np.inf, numbers[-1] + 1, numbers[widest : widest + 2].mean(), -1e30):
        assert np.isinf(threshold) or np.nanmin(np.abs(sizes - threshold)) > 1e-5
        head = header(ESTIMATE, n_threads, n_used, N_EXPERT, n_tokens, n_down, rank, n_columns, k_base, 0, n_relu)
        arrays = (np.float32([threshold]), ids, weights, reduced, log_norm, output)
        found = run(program, head + b"".join(array.tobytes() for array in arrays))
        routed = np.frombuffer(found, np.int32, used.size).reshape(used.shape)
        skipped = np.frombuffer(found, np.float32, n_tokens * n_columns, routed.nbytes).reshape(n_tokens, n_columns)
        spent = np.frombuffer(found, np.int64, 2, routed.nbytes + skipped.nbytes)

        order = np.argsort(-np.where(np.isnan(sizes), -np.inf, sizes), axis=1, kind="stable")
        keep = sizes >= threshold
        np.put_along_axis(keep, order[:, :k_base], True, 1)
        assert np.array_equal(routed, np.where(keep, used, -1))
        assert spent.tolist() == [0, keep.sum()]
        noted = np.frombuffer(found, np.uint16, n_tokens, routed.nbytes + skipped.nbytes + spent.nbytes)
        assert np.array_equal(noted - 1, keep.sum(1))
        terms = weights[..., None].astype(np.float64) * (output.astype(np.float64)[used] + reduced[:, None, :rank])
        wanted = np.where(keep[..., None], 0.0, terms).sum(1)
        wanted[~(np.abs(wanted) < 65504).all(1)] = 0.0
        np.testing.assert_allclose(skipped[:, :rank], wanted, rtol=1e-5, atol=1e-5)
        assert not skipped[:, rank:].any()


@pytest.mark.parametrize("k", [1, 5])
def test_strict_estimates_move_the_threshold(program, k):
    """Token by token, by what the tokens before have left over; half way the text goes back to its fourth token."""
    rng = np.random.default_rng(k)
    n_tokens, n_used, n_down, rank, n_columns = 60, 6, 2, 1, 32
    ids = np.array([rng.permutation(N_EXPERT) for _ in range(n_tokens)], np.int32)
    weights = np.exp(rng.uniform(-3, 0, (n_tokens, n_used))).astype(np.float32)
    log_norm = np.zeros((N_EXPERT, n_down + 1), np.float32)
    sizes, threshold, left = np.log(weights.astype(np.float64)), np.float32(-1.5), 0.0
    keep, after = np.zeros(weights.shape, bool), []
    for t in range(n_tokens):
        left = after[2] if t == n_tokens // 2 else left
        assert np.abs(sizes[t] - (threshold - 0.01 * left)).min() > 1e-5
        keep[t] = sizes[t] >= threshold - 0.01 * left
        keep[t, sizes[t].argmax()] = True
        left += k - keep[t].sum()
        after.append(left)
    assert max(map(abs, after)) > 15  # the threshold has moved
    head = header(ESTIMATE, 32, n_used, N_EXPERT, n_tokens, n_down, rank, n_columns, 1, k)
    rest = (
        threshold,
        ids,
        weights,
        np.zeros((n_tokens, n_down), np.float32),
        log_norm,
        np.zeros((N_EXPERT, rank), np.float32),
    )
    found = run(program, head + b"".join(array.tobytes() for array in rest))
    routed = np.frombuffer(found, np.int32, weights.size).reshape(weights.shape)
    assert np.array_equal(routed, np.where(keep, ids[:, :n_used], -1))


@pytest.mark.parametrize("n_tokens", [1, 2, 31, 32, 33, 100])
def test_hooks_see_skipped_slots(program, n_tokens):
    """mm_ids_helper's maps and the host's sorted order, with every slot that is left to no expert marked."""
    rng = np.random.default_rng(n_tokens)
    for n_used in (1, 3, 8):
        for share in (0.0, 0.5, 1.0):
            ids = rng.integers(0, N_EXPERT, (n_tokens, n_used + 2)).astype(np.int32)
            ids[rng.random(ids.shape) < share] = -1
            skipped = ids[:, :n_used].ravel() < 0
            n_slots, n_valid = len(skipped), int((~skipped).sum())
            for inverse in (0, 1):
                before = rng.integers(0, 1000, n_slots).astype(np.int32)
                head = header(MARK, n_used, n_tokens, ids.shape[1], n_valid, inverse)
                found = np.frombuffer(run(program, head + ids.tobytes() + before.tobytes()), np.int32)
                marked, to_sorted, from_sorted = np.split(found, 3)
                unclaimed = skipped if inverse else np.arange(n_slots) >= n_valid
                assert np.array_equal(marked, np.where(unclaimed, -1, before))
                assert np.array_equal(to_sorted, np.where(np.arange(n_slots) < n_valid, 7, 0))
                assert np.array_equal(from_sorted, np.where(skipped, n_valid, 9))


@pytest.mark.parametrize("n_rows_block", [1, 2, 4])
def test_skipped_slots_are_zeroed_and_no_other(program, n_rows_block):
    ids = np.array([3, -1, 0, -1, -1, 7], np.int32)
    for n_rows in (1, 2, 3, 64, 65, 67):
        before = np.full((len(ids), n_rows), np.nan, np.float32)
        found = run(program, header(SKIP, n_rows, n_rows_block, len(ids)) + ids.tobytes() + before.tobytes())
        after = np.frombuffer(found, np.float32).reshape(before.shape)
        assert np.array_equal(np.isnan(after), np.repeat(ids[:, None] >= 0, n_rows, 1))
        assert not after[ids < 0].any()

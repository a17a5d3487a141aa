"""Flash attention by itself on the CPU, against softmax in float64: any heads, tokens, sequences, masks and cache types."""

from __future__ import annotations

from ggml_ffi import OUR_FLOATS, base, compute, ffi, threads
import gguf
import numpy as np
import pytest

pytestmark = pytest.mark.skipif(not OUR_FLOATS, reason="no kernel of ours for this CPU")

F32, F16, Q4_0, Q8_0 = 0, 1, 2, 8  # ggml.h
N_KEY, N_VALUE = 96, 64


def attention(backend, q, k, v, mask, kind=F16, scale=0.2, max_bias=0.0, softcap=0.0, sinks=None):
    """What the operation gives, and what it should: float [n_stream, n_token, n_head, N_VALUE].

    q: float32 [n_stream, n_token, n_head, n_key]. k, v: float32 [n_stream, n_kv, n_group, n_key or n_value]. mask: float32
    [n_stream, n_token, n_kv] or None. kind: type of the cache.
    """
    (n_stream, n_token, n_head, n_key), (_, n_kv, n_group, n_value) = q.shape, v.shape
    context = base.ggml_init({"mem_size": 1 << 20, "mem_buffer": ffi.NULL, "no_alloc": True})
    stored, seen = zip(*(as_stored(x, kind) for x in (k, v)))
    queries = base.ggml_new_tensor_4d(context, F32, n_key, n_head, n_token, n_stream)
    keys, values = (base.ggml_new_tensor_4d(context, kind, n, n_group, n_kv, n_stream) for n in (n_key, n_value))
    inputs = [(queries, q), (keys, stored[0]), (values, stored[1])]
    of_mask = ffi.NULL
    if mask is not None:
        of_mask = base.ggml_new_tensor_4d(context, F16, n_kv, n_token, 1, n_stream)
        inputs.append((of_mask, mask.astype(np.float16)))
    by_head = [base.ggml_permute(context, x, 0, 2, 1, 3) for x in (queries, keys, values)]
    out = base.ggml_flash_attn_ext(context, *by_head, of_mask, scale, max_bias, softcap)
    if sinks is not None:
        of_sinks = base.ggml_new_tensor_2d(context, F32, n_head, 1)
        base.ggml_flash_attn_ext_add_sinks(out, of_sinks)
        inputs.append((of_sinks, sinks))
    got = np.full((n_stream, n_token, n_head, n_value), np.nan, np.float32)
    compute(backend, context, out, inputs, got)

    k64, v64 = (x.astype(np.float64).repeat(n_head // n_group, axis=2) for x in seen)
    scores = np.einsum("sthe,skhe->shtk", q, k64) * scale
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    if mask is not None:
        n = 2 ** int(np.log2(n_head))
        slope = [
            2 ** (-max_bias / n * (h + 1)) if h < n else 2 ** (-max_bias / 2 / n * (2 * (h - n) + 1))
            for h in range(n_head)
        ]
        scores = (
            scores
            + mask.astype(np.float16)[:, None] * (np.array(slope) if max_bias else np.ones(n_head))[:, None, None]
        )
    top = scores.max(axis=-1, keepdims=True)
    if sinks is not None:
        top = np.maximum(top, sinks[:, None, None])
    top = np.where(np.isfinite(top), top, 0.0)
    weights = np.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sinks[:, None, None] - top)
    weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    return got, np.einsum("shtk,skhe->sthe", weights, v64)


def as_stored(x, kind):
    """(what is in the cache, what it stands for)"""
    if kind == F32:
        return x, x
    if kind == F16:
        return x.astype(np.float16), x.astype(np.float16).astype(np.float32)
    kind = gguf.GGMLQuantizationType(kind)
    codes = gguf.quantize(x, kind)
    return codes, gguf.dequantize(codes, kind)


def random(n_stream, n_token, n_head, n_group, n_kv, n_key=N_KEY, n_value=N_VALUE):
    rng = np.random.default_rng(n_token + n_head + n_kv)
    shapes = (n_stream, n_token, n_head, n_key), (n_stream, n_kv, n_group, n_key), (n_stream, n_kv, n_group, n_value)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def causal(n_stream, n_token, n_kv):
    """The last token sees all of the cache but for its last cell, which is none of its sequence's."""
    visible = np.arange(n_kv) <= np.arange(n_token)[:, None] + n_kv - n_token - 1
    return np.broadcast_to(np.where(visible, 0.0, -np.inf).astype(np.float32), (n_stream, n_token, n_kv)).copy()


def check(found, tolerance=3e-6):
    got, wanted = found
    assert np.isfinite(got).all()
    assert np.abs(got - wanted).max() <= tolerance * np.abs(wanted).max()


@pytest.fixture(params=[1, 4])
def backend(request, cpu_backend):
    """With one thread, which takes all heads together, and with several, where short prompts leave each a head by itself."""
    with threads(cpu_backend, request.param):
        yield cpu_backend


@pytest.mark.parametrize("n_head, n_group", [(1, 1), (4, 4), (6, 2), (8, 1), (9, 3), (20, 4), (130, 2)])
@pytest.mark.parametrize("n_token, n_kv", [(1, 1), (1, 63), (1, 700), (4, 65), (7, 128), (33, 100), (130, 192)])
def test_heads_and_tokens(cpu_backend, n_head, n_group, n_token, n_kv):
    q, k, v = random(1, n_token, n_head, n_group, n_kv)
    mask = causal(1, n_token, n_kv)
    mask[:, :, 0] = 0.0  # nothing else is left of a cache of one cell
    check(attention(cpu_backend, q, k, v, mask))


@pytest.mark.parametrize("n_key, n_value", [(16, 16), (40, 80), (128, 128), (192, 128), (256, 256), (576, 512)])
@pytest.mark.parametrize("n_token", [1, 20])
def test_sizes_of_keys_and_values(cpu_backend, n_key, n_value, n_token):
    q, k, v = random(1, n_token, 16, 1 if n_key == 576 else 4, 150, n_key, n_value)
    check(attention(cpu_backend, q, k, v, causal(1, n_token, 150), scale=n_key**-0.5))


@pytest.mark.parametrize("kind", [F32, F16, Q4_0, Q8_0])
@pytest.mark.parametrize("n_token", [1, 30, 150])
@pytest.mark.parametrize("n_group", [2, 8])
def test_types_of_the_cache(backend, kind, n_token, n_group):
    q, k, v = random(1, n_token, 8, n_group, 260)
    check(attention(backend, q, k, v, causal(1, n_token, 260), kind))


@pytest.mark.parametrize("n_token", [1, 5, 40])
@pytest.mark.parametrize("n_group", [3, 9])
def test_sequences_side_by_side(backend, n_token, n_group):
    q, k, v = random(3, n_token, 9, n_group, 90)
    mask = causal(3, n_token, 90)
    mask[1, :, 20:] = -np.inf  # a shorter one
    check(attention(backend, q, k, v, mask))


@pytest.mark.parametrize("which", ["key", "value"])
@pytest.mark.parametrize("n_token", [4, 40])
@pytest.mark.parametrize("n_group", [2, 6])
def test_infinity_stays_with_those_who_see_it(backend, which, n_token, n_group):
    """Zero times infinity is no number, and half precision ends at 65504."""
    q, k, v = random(1, n_token, 6, n_group, 300)
    mask = causal(1, n_token, 300)
    mask[0, ::2, 70] = -np.inf
    wanted = attention(backend, q, k, v, mask)[0]
    (k if which == "key" else v)[0, 70] = np.inf
    with np.errstate(invalid="ignore"):
        got = attention(backend, q, k, v, mask)[0]
    assert np.array_equal(got[0, ::2], wanted[0, ::2])
    assert not np.isfinite(got[0, 1::2]).any(axis=-1).any()


@pytest.mark.parametrize("n_token", [1, 130])
@pytest.mark.parametrize("n_group", [2, 6])
def test_what_models_add(backend, n_token, n_group):
    """Sinks (gpt-oss), bounded scores (Gemma 2, Grok), ALiBi with a number of heads that is no power of two, no mask."""
    q, k, v = random(1, n_token, 6, n_group, 140)
    mask = causal(1, n_token, 140)
    sinks = np.linspace(-2, 6, 6, dtype=np.float32)
    check(attention(backend, q, k, v, mask, sinks=sinks))
    check(attention(backend, q, k, v, mask, softcap=3.0))
    distances = np.where(np.isfinite(mask), -np.abs(np.arange(140) - 100.0), mask)
    check(attention(backend, q, k, v, distances.astype(np.float32), max_bias=8.0))
    check(attention(backend, q, k, v, None))


@pytest.mark.parametrize("n_token", [1, 16])
def test_tokens_that_see_nothing(cpu_backend, n_token):
    q, k, v = random(1, n_token, 4, 2, 70)
    mask = causal(1, n_token, 70)
    mask[:, -1] = -np.inf
    got, wanted = attention(cpu_backend, q, k, v, mask)
    assert not got[:, -1].any() and np.abs(got - wanted).max() <= 1e-5


def test_scores_of_any_size(cpu_backend):
    q, k, v = random(1, 16, 4, 2, 200)
    check(attention(cpu_backend, 1000 * q, k, v, causal(1, 16, 200)), tolerance=1e-4)
    check(attention(cpu_backend, 0 * q, k, v, causal(1, 16, 200)))


@pytest.mark.parametrize("n_head, n_group", [(4, 4), (6, 2), (16, 2), (40, 1)])
@pytest.mark.parametrize("kind", [F16, Q8_0])
def test_tokens_together_have_the_numbers_of_one_alone(cpu_backend, n_head, n_group, kind):
    """Bit for bit, whatever room the cache has: a draft is verified by the numbers of plain decoding, and a prompt whose
    first part was read before ends as one that is read at once."""
    n_kv, n_token = 640, 100
    q, k, v = random(1, n_token, n_head, n_group, n_kv)
    mask = causal(1, n_token, n_kv)
    together, _ = attention(cpu_backend, q, k, v, mask, kind)
    for start, stop, end in (
        (0, 1, 540),
        (0, 1, 640),
        (7, 8, 600),
        (99, 100, 640),
        (3, 8, 560),
        (50, 82, 640),
        (10, 60, 610),
    ):
        part = slice(start, stop)
        found, _ = attention(cpu_backend, q[:, part], k[:, :end], v[:, :end], mask[:, part, :end], kind)
        assert np.array_equal(found, together[:, part])


@pytest.mark.parametrize("n_head, n_group", [(16, 16), (9, 3), (32, 4), (130, 2)])
@pytest.mark.parametrize("n_token, n_kv", [(1, 100), (1, 3300), (5, 3300), (33, 200), (130, 300)])
def test_any_number_of_threads_gives_the_same_numbers(cpu_backend, n_head, n_group, n_token, n_kv):
    """Threads divide what there is by heads and by parts of the cache, of which 3,300 lines have all and some twice."""
    q, k, v = random(1, n_token, n_head, n_group, n_kv)
    mask = causal(1, n_token, n_kv)
    mask[:, :, 700:900] = -np.inf  # none sees these
    results = []
    for n_threads in (1, 2, 3, 5):
        with threads(cpu_backend, n_threads):
            results.append(attention(cpu_backend, q, k, v, mask))
    check(results[0], tolerance=1e-5)  # of thousands of values, most cancel
    assert all(np.array_equal(got, results[0][0]) for got, _ in results[1:])


@pytest.mark.parametrize("kind", [F16, Q8_0])
@pytest.mark.parametrize("n_head, n_group", [(4, 4), (6, 2), (16, 2)])
def test_many_sequences_in_one_cache(cpu_backend, n_head, n_group, kind):
    """Each token sees lines of its own here and there, all of which it sees alike alone and with the others."""
    n = 64
    q, k, v = random(1, n, n_head, n_group, 700)
    mask = np.full((1, n, 700), -np.inf, np.float32)
    for t in range(n):
        mask[0, t, t * 3 % 61 :: 61] = 0.0
    mask[0, 40:45, 300:500] = 0.0  # a prompt beside them
    mask[0, 20:35] = mask[0, 20]  # and one whose lines are scattered, each token with a line of its own
    for t in range(20, 35):
        mask[0, 20 + (t - 20) : 35, 600 + 5 * (t - 20)] = 0.0
    together = attention(cpu_backend, q, k, v, mask, kind)
    check(together)
    for t in (0, 17, 20, 28, 34, 42, n - 1):
        alone, _ = attention(cpu_backend, q[:, t : t + 1], k, v, mask[:, t : t + 1], kind)
        assert np.array_equal(alone[0, 0], together[0][0, t])

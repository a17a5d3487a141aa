"""bench/upcycle: the model that is trained is the one that is built and runs here; training resumes exactly."""

from __future__ import annotations

import functools
import os
from pathlib import Path
import signal
import sys

import gguf
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="models are trained with it")

UPCYCLE = Path(__file__).parents[1] / "bench" / "upcycle"
sys.path.insert(0, str(UPCYCLE))

import base  # noqa: E402  (imports follow the path)
import model  # noqa: E402
import observed  # noqa: E402
import split  # noqa: E402
import storage  # noqa: E402
import train  # noqa: E402

import build  # noqa: E402

N_VOCAB, N_LAYER, N_EMBD, N_HEAD, N_HEAD_KV, N_FF = 300, 2, 64, 2, 1, 192
SIZES = model.Sizes(n_shared=64, n_expert=4, n_used=2, rank_ffn=6, rank_attn=3)
OPTIONS = train.Options(windows=2, ctx=32, lr=1e-2)


@pytest.fixture(scope="module")
def dense_path(tmp_path_factory) -> Path:
    """A random llama-type model in float32, with a tokenizer of made-up words."""
    path, rng = (tmp_path_factory.mktemp("dense") / "dense.gguf", np.random.default_rng(0))
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(N_LAYER)
    writer.add_context_length(256)
    writer.add_embedding_length(N_EMBD)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(N_HEAD_KV)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(N_EMBD // N_HEAD)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([f"word{i}" for i in range(N_VOCAB)])
    writer.add_token_types([1] * N_VOCAB)
    writer.add_token_merges(["w o"])
    rows_kv = N_EMBD * N_HEAD_KV // N_HEAD
    shapes = {"attn_q": (N_EMBD, N_EMBD), "attn_k": (rows_kv, N_EMBD), "attn_v": (rows_kv, N_EMBD)}
    shapes |= {"attn_output": (N_EMBD, N_EMBD), "ffn_gate": (N_FF, N_EMBD), "ffn_up": (N_FF, N_EMBD)}
    shapes |= {"ffn_down": (N_EMBD, N_FF), "attn_norm": (N_EMBD,), "ffn_norm": (N_EMBD,)}
    writer.add_tensor("token_embd.weight", rng.standard_normal((N_VOCAB, N_EMBD), np.float32))
    writer.add_tensor("output_norm.weight", 1 + 0.1 * rng.standard_normal(N_EMBD, np.float32))
    for il in range(N_LAYER):
        for name, shape in shapes.items():
            data = rng.standard_normal(shape, np.float32)
            data = 1 + 0.1 * data if len(shape) == 1 else data / np.sqrt(shape[1])
            writer.add_tensor(f"blk.{il}.{name}.weight", data.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def new_student(dense_path: Path, dtype=torch.float32) -> model.Student:
    sizes, tensors = base.read(dense_path)
    tensors = {name: torch.from_numpy(data) for name, data in tensors.items()}
    return model.Student(model.Teacher(tensors, model.Dense(**sizes), dtype), SIZES)


@pytest.fixture
def student(dense_path) -> model.Student:
    """With every trained parameter away from where it starts, and neurons in another order."""
    student, generator = new_student(dense_path), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for il in range(N_LAYER):
            student.reorder(il, torch.randperm(N_FF, generator=generator))
        for name, p in student.named_parameters():
            p += 0.3 * torch.randn(p.shape, generator=generator) * (1.0 if "router" in name else 0.3)
    return student


TEXTS = [np.random.default_rng(i).integers(N_VOCAB, size=400).astype(np.uint16) for i in range(2)]


def test_the_dense_model_is_what_llama_cpp_computes(dense_path):
    teacher = new_student(dense_path).teacher_[0]
    tokens = TEXTS[0][:24].astype(np.int64)
    hidden = teacher.final(teacher.forward(torch.from_numpy(tokens)[None])[-1])[0, -1]
    with observed.ObservedModel(dense_path, 24, lambda node: False, lambda node: None) as dense:
        want = dense.decode(tokens.tolist(), 0)
    # F32 on both sides; llama.cpp keeps keys and values in F16: 5e-4 of the values, in logits of spread 8
    np.testing.assert_allclose((teacher.embedding @ hidden).numpy(), want, atol=2e-2)


def test_built_model_computes_what_was_trained(dense_path, student, tmp_path):
    storage.write(tmp_path / "w.npz", storage.from_student(student, {}))
    loaded = new_student(dense_path)
    storage.load(tmp_path / "w.npz", loaded)  # rounded, as in the file
    path = build.build(tmp_path / "moe.gguf", tmp_path / "w.npz", dense_path, gguf.GGMLQuantizationType.F32)
    tokens = TEXTS[0][:24].astype(np.int64)
    with torch.no_grad():
        hidden = loaded(torch.from_numpy(tokens)[None])[1][0, -1]
        rounded = hidden - student(torch.from_numpy(tokens)[None])[1][0, -1]
    with observed.ObservedModel(path, 24, lambda node: False, lambda node: None) as moe:
        got = moe.decode(tokens.tolist(), 0)
    want = (loaded.teacher_[0].embedding @ hidden).numpy()
    np.testing.assert_allclose(got, want, atol=2e-2)  # as above
    assert 0 < float(rounded.norm() / hidden.norm()) < 0.05  # 8 bits: 0.4% of a factor's largest value


def whole_layer(student: model.Student, il: int) -> dict:
    return student.own(il) | model.merged(student.base[il], student.own(il))


def test_experts_computed_at_once_are_those_chosen(student):
    layer, x = (whole_layer(student, 0), torch.randn(5, N_EMBD, generator=torch.Generator().manual_seed(2)))
    out, _ = model.moe_ffn(x, layer, SIZES)
    width = SIZES.width(N_FF)
    inner = torch.nn.functional.silu(x @ layer["ffn_gate"].T) * (x @ layer["ffn_up"].T)
    want = inner[:, : SIZES.n_shared] @ layer["ffn_down"][:, : SIZES.n_shared].T
    logits = x @ layer["router"].T
    for token in range(len(x)):
        chosen = logits[token].argsort(descending=True)[: SIZES.n_used]
        weights = logits[token].softmax(0)[chosen] * SIZES.n_expert
        for expert, weight in zip(chosen.tolist(), weights):
            at = slice(SIZES.n_shared + expert * width, SIZES.n_shared + (expert + 1) * width)
            want[token] += weight * (layer["ffn_down"][:, at] @ inner[token, at])
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)  # F32 sums in another order


def test_all_experts_with_equal_weights_are_the_dense_ffn(dense_path):
    student = new_student(dense_path)
    x = torch.randn(5, N_EMBD, generator=torch.Generator().manual_seed(3))
    student.reorder(0, torch.arange(N_FF).flip(0))  # the router is 0
    everything = model.Sizes(SIZES.n_shared, SIZES.n_expert, SIZES.n_expert, 6, 3)
    out, balance = model.moe_ffn(x, whole_layer(student, 0), everything)
    torch.testing.assert_close(out, model.dense_ffn(x, student.teacher_[0].layers[0]), rtol=1e-4, atol=1e-5)
    assert float(balance) == pytest.approx(1.0)


def test_reduced_rank_finds_a_planted_change():
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(500, 40, generator=generator)
    planted = torch.randn(30, 3, generator=generator) @ torch.randn(3, 40, generator=generator)
    a, b = split.reduced_rank(x, x @ planted.T, 3)
    shrunk = 1 / (1 + split.RIDGE)  # by the ridge
    assert float((b @ a - shrunk * planted).norm() / planted.norm()) < 0.1


def test_output_gradient_is_autograd_of_the_mixture():
    generator = torch.Generator().manual_seed(5)
    ours, theirs, embedding = (torch.randn(n, 16, generator=generator) for n in (300, 300, 50))
    targets, own = (torch.randint(50, (300,), generator=generator), torch.arange(300) % 2 == 0)
    divergence, text, gradient = train.output_gradient(ours, theirs, embedding, targets, own)
    ours.requires_grad_()
    log_q = (ours @ embedding.T).log_softmax(-1)
    p = (theirs @ embedding.T).softmax(-1)
    each = -log_q.gather(1, targets[:, None])[:, 0]
    soft = -(p * log_q).sum(-1)
    share = torch.where(own, 0.0, train.TEXT)
    (share * each + (1 - share) * soft).mean().backward()
    torch.testing.assert_close(gradient, ours.grad, rtol=1e-4, atol=1e-6)
    assert text == pytest.approx(float(each.mean()), rel=1e-4)
    assert divergence == pytest.approx(float((soft + (p * p.log()).sum(-1)).mean()), rel=1e-4)


def trained(dense_path: Path, steps: int, state: Path | None = None, total: int = 12) -> train.Run:
    student = new_student(dense_path, torch.bfloat16)
    run = train.Run(student, TEXTS, [False, True], OPTIONS)
    if state is not None and state.exists():
        run.load(state)
    else:
        first = torch.from_numpy(train.windows(TEXTS, 2**31, OPTIONS)[0][:, :-1])
        split.start(student, first, 0)
    while run.step < steps:
        run.train_step(total)
    return run


def test_training_resumes_exactly_and_learns(dense_path, tmp_path):
    whole, path = trained(dense_path, 12), tmp_path / "state.pt"
    trained(dense_path, 5).save(path)
    trained(dense_path, 8, path).save(path)
    resumed = trained(dense_path, 12, path)
    for (name, want), got in zip(whole.student.named_parameters(), resumed.student.parameters()):
        assert torch.equal(got, want), name  # one thread an operation: one order of sums
    start = trained(dense_path, 0)
    losses = [
        sum(train.gradients(run.student, torch.from_numpy(train.windows(TEXTS, step, OPTIONS)[0]), torch.ones(2) > 0)[1][0]
            for step in range(6))
        for run in (start, whole)
    ]  # fmt: skip
    assert losses[1] < 0.9 * losses[0]


def test_a_state_of_other_options_is_refused(dense_path, tmp_path):
    trained(dense_path, 1).save(tmp_path / "state.pt")
    other = train.Run(new_student(dense_path, torch.bfloat16), TEXTS, [False, True], train.Options(windows=4, ctx=32))
    with pytest.raises(ValueError, match="use another -o"):
        other.load(tmp_path / "state.pt")


def test_router_learns_from_experts_that_it_did_not_choose():
    logits = torch.tensor([[3.0, 1.0, 2.0, 0.0]], requires_grad=True)
    weights = model.expert_weights(logits, 2)
    torch.testing.assert_close(weights, torch.tensor([[4 * 0.643914, 0, 4 * 0.236883, 0]]))
    worth = torch.tensor([[0.0, 0.0, 0.0, 1.0]])  # the last expert is not chosen
    got = torch.autograd.grad((weights * worth).sum(), logits)[0]
    torch.testing.assert_close(got, torch.autograd.grad((4 * logits.softmax(-1) * worth).sum(), logits)[0])


@pytest.mark.slow
def test_compiled_gradients_are_those_of_eager_layers(dense_path):
    runs = [train.Run(new_student(dense_path), TEXTS, [False, True], OPTIONS, compiled=x) for x in (False, True)]
    losses = [run.train_step(12) for run in runs]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    for (name, a), b in zip(runs[0].student.named_parameters(), runs[1].student.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=name)  # F32 sums in another order
    np.testing.assert_allclose(*(run.perplexity(TEXTS[0].repeat(4)) for run in runs), rtol=1e-4)


def test_the_command_stops_at_a_signal_goes_on_and_exports(dense_path, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SIZES", SIZES)
    monkeypatch.setattr(train, "Options", functools.partial(train.Options, ctx=32))
    for name, text in zip(("books", "chats"), TEXTS):
        np.save(tmp_path / f"{name}.npy", text)
    step = train.Run.train_step

    def stopping_step(run, n_steps):
        losses = step(run, n_steps)
        if run.step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return losses

    monkeypatch.setattr(train.Run, "train_step", stopping_step)
    texts = ["--tokens", str(tmp_path / "books.npy"), str(tmp_path / "chats.npy"), "--base", str(dense_path)]
    exported = []
    for name, stop_at in (("whole", None), ("stopped", 3)):
        command = [*texts, "-o", str(tmp_path / name), "--steps", "6", "--eager"]
        if stop_at:
            assert train.main(command) == 130
            assert torch.load(tmp_path / name / "state.pt", weights_only=True)["step"] == 3
        assert train.main(command) == 0
        exported.append(tmp_path / f"{name}.npz")
        assert train.main([*command, "--export", str(exported[-1])]) == 0
    assert exported[0].read_bytes() == exported[1].read_bytes()
    path = build.build(tmp_path / "moe.gguf", exported[0], dense_path, gguf.GGMLQuantizationType.F32)
    with observed.ObservedModel(path, 24, lambda node: False, lambda node: None) as moe:
        assert np.isfinite(moe.decode(TEXTS[0][:24].tolist(), 0)).all()


def test_files_that_do_not_fit_are_refused(dense_path, student, tmp_path):
    (tmp_path / "no.npz").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="no stored weights"):
        build.build(tmp_path / "moe.gguf", tmp_path / "no.npz", dense_path)
    storage.write(tmp_path / "w.npz", storage.from_student(student, {}))
    (tmp_path / "moe.gguf").write_bytes(b"")
    with pytest.raises(FileExistsError, match="--force"):
        build.build(tmp_path / "moe.gguf", tmp_path / "w.npz", dense_path)
    assert {p.name for p in tmp_path.iterdir()} == {"no.npz", "w.npz", "moe.gguf"}


def test_chats_that_the_model_writes(dense_path, tmp_path, monkeypatch):
    import write_chats

    class Tokenizer:
        eos = 1

        def __init__(self, *_):
            pass

        def __call__(self, text):
            return np.array([2, 1, 5])

    monkeypatch.setattr(base, "source", lambda folder: dense_path)
    monkeypatch.setattr(write_chats, "Tokenizer", Tokenizer)
    monkeypatch.setattr(write_chats, "LONGEST", 12)
    monkeypatch.setattr(sys, "argv", ["write_chats.py", "-o", str(tmp_path / "chats.npy"), "--tokens", "100"])
    n_threads = torch.get_num_threads()
    try:
        assert write_chats.main() == 0
    finally:
        torch.set_num_threads(n_threads)
    found = np.load(tmp_path / "chats.npy")
    assert found.dtype == np.uint16 and len(found) >= 100 and found[:3].tolist() == [2, 1, 5] and found.max() < N_VOCAB

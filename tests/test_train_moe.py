"""bench/train_moe.py: what it trains resumes exactly, is what transformers computes, and runs here after conversion."""

from __future__ import annotations

import json
import os
import signal

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="models are trained with it")
transformers = pytest.importorskip("transformers", minversion="5", reason="models are trained with it")
pytest.importorskip("tokenizers", reason="tokenizers are trained with it")

from allocmoe_edge import Llama, Plan  # noqa: E402
from allocmoe_edge.convert import cli  # noqa: E402
from allocmoe_edge.plan import metadata  # noqa: E402
import train_moe  # noqa: E402  (imports follow the skips)
import training_text  # noqa: E402

TOKENS = 24 * 4 * 64  # 24 steps


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Sentences of 60 made-up words, some of which follow each other far more often than others."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), rng.integers(2, 7))) for _ in range(60)]
    following = rng.dirichlet(np.full(60, 0.05), 60)
    chosen = [0]
    for _ in range(6000):
        chosen.append(int(rng.choice(60, p=following[chosen[-1]])))
    lines = [" ".join(words[i] for i in chosen[at : at + 12]) + ".\n" for at in range(0, len(chosen), 12)]
    path = tmp_path_factory.mktemp("text") / "made-up.txt"
    path.write_text("".join(lines))
    return path


def command(text, folder, *more):
    options = ["--size", "tiny", "--vocab", "400", "--tokens", str(TOKENS), "--threads", "1", "--dtype", "f32"]
    return [str(text), "-o", str(folder), *options, *more]


def weights(folder):
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module", params=train_moe.ARCHITECTURES)
def trained(request, text, tmp_path_factory):
    """(folder, architecture) of a model that was trained without interruption."""
    folder = tmp_path_factory.mktemp(request.param) / "model"
    assert train_moe.main(command(text, folder, "--arch", request.param)) == 0
    return folder, request.param


def test_resumed_run_is_the_uninterrupted_one(trained, text, tmp_path, monkeypatch, capsys):
    """Bit for bit: one machine, one thread, one order of sums. Killed at a signal twice, and once without any."""
    folder, arch = trained
    arguments = command(text, tmp_path / "b", "--arch", arch, "--save-minutes", "0")
    save = train_moe.Run.save

    def stop_at(step, how):
        def stopping_save(run):
            save(run)
            if run.step == step:
                how()

        monkeypatch.setattr(train_moe.Run, "save", stopping_save)

    def power_cut():
        raise RuntimeError("power cut")

    stop_at(5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert train_moe.main(arguments) == 130
    assert "interrupted after 1,280 tokens" in capsys.readouterr().err
    assert not (tmp_path / "b" / "config.json").exists()
    stop_at(11, power_cut)
    with pytest.raises(RuntimeError):
        train_moe.main(arguments)
    stop_at(17, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert train_moe.main(arguments) == 130
    monkeypatch.setattr(train_moe.Run, "save", save)
    assert train_moe.main(arguments) == 0
    want, found = weights(folder), weights(tmp_path / "b")
    assert want.keys() == found.keys()
    assert [name for name in want if not np.array_equal(want[name], found[name])] == []
    assert not list((tmp_path / "b").rglob("*.tmp"))


def test_it_learns(trained):
    """The text's next word, once known, leaves far fewer choices than the words' frequencies do."""
    folder, _ = trained
    record = json.loads((folder / "training.json").read_text())
    assert record["tokens"] == TOKENS and record["texts"] == ["made-up.txt"]
    assert record["held_out_loss"] < np.log(400) - 1


def test_load_balancing_is_trained(text, tmp_path, monkeypatch):
    """The reported loss is without it, the gradient is with it. transformers' loss of equal shares is the experts used;
    routers of random weights come close."""
    args = train_moe.parser().parse_args([*command(text, tmp_path / "m"), "--device", "cpu"])
    found = {}
    for weight in (train_moe.AUX_LOSS, 0.0):
        monkeypatch.setattr(train_moe, "AUX_LOSS", weight)
        run = train_moe.Run(args)
        loss, balance = run.train_step()
        assert balance == pytest.approx(run.size.used, rel=0.05)
        found[weight] = loss, run.model.model.layers[0].mlp.gate.weight.detach()
    (loss, with_it), (same, without) = found.values()
    assert loss == pytest.approx(same, rel=1e-6)
    assert not torch.equal(with_it, without)


@pytest.fixture(scope="module")
def converted(trained, text, tmp_path_factory):
    """What allocmoe-convert makes of it, as float32 GGUF."""
    folder, _ = trained
    path = tmp_path_factory.mktemp("converted") / "model.gguf"
    arguments = [str(folder), "--pre-tokenizer", "gpt-2", "--outtype", "f32", "--budget", "0.5", "--calib", str(text)]
    arguments += ["--calib-tokens", "256", "--ctx-size", "64", "--threads", "1", "-o", str(path)]
    assert cli.main(arguments) == 0
    return path


def test_converted_model_gives_the_same_logits(trained, converted, text):
    """Renormalised weights and others, at full budget and below, from training to our runtime. F32 on both sides; 1e-3
    of the logits' spread: sums in another order, and our CPU kernels'."""
    folder, _ = trained
    assert metadata.read(converted).full == (4, 4)
    llm = Llama(str(converted), n_ctx=64, n_batch=64, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    sentence = text.read_text()[:200]
    tokens = tokenizer(sentence)["input_ids"][:60]
    assert llm.tokenize(sentence.encode(), add_bos=False)[:60] == tokens
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for counts in (4, 4), (2, 3), (1, 1):
        for layer, k in zip(model.model.layers, counts):
            layer.mlp.gate.top_k = k
        with torch.no_grad():
            want = model(torch.tensor([tokens])).logits[0].numpy()
        llm.set_plan(Plan(counts, (4, 4)))
        llm.reset()
        llm.eval(tokens)
        found = np.array(llm.eval_logits)
        assert np.abs(found - want).max() < 1e-3 * want.std(), counts


@pytest.mark.parametrize("arch", train_moe.ARCHITECTURES)
def test_all_experts_at_once_are_the_chosen_ones(arch):
    """Values and gradients of transformers' own loop over experts, but for the order of sums in float32."""
    model = train_moe.new_model(arch, train_moe.SIZES["tiny"], 400, seed=1)
    batch = torch.from_numpy(np.random.default_rng(0).integers(0, 400, (2, 64)))
    found = {}
    for name in ("all_at_once", "eager"):
        model.set_experts_implementation(name)
        model.zero_grad()
        out = model(input_ids=batch, labels=batch)
        out.loss.backward()
        found[name] = out.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}
    (logits, gradients), (want, want_gradients) = found["all_at_once"], found["eager"]
    assert (logits - want).abs().max() < 1e-5 * want.abs().max()
    for name, gradient in want_gradients.items():
        assert (gradients[name] - gradient).abs().max() < 1e-4 * gradient.abs().max() + 1e-9, name


def test_each_pass_reads_every_window_once():
    tokens = np.arange(64 * 4 * 5 + 64 + 7, dtype=np.int32)  # 5 steps a pass, and some to spare

    def one_pass(n, seed=0):
        return np.concatenate([training_text.batch_at(tokens, 5 * n + i, 4, 64, seed) for i in range(5)])

    for windows in one_pass(0), one_pass(1):
        flat = np.sort(windows.ravel())
        assert np.array_equal(flat, np.arange(flat[0], flat[0] + 64 * 4 * 5))
        assert (np.diff(windows, axis=1) == 1).all()
    assert not np.array_equal(one_pass(0), one_pass(1))
    assert not np.array_equal(one_pass(0), one_pass(0, seed=1))
    with pytest.raises(ValueError, match="tokens of text, want 5760"):
        training_text.batch_at(tokens, 0, 89, 64, 0)


def test_held_out_is_each_texts_end(trained, text, tmp_path):
    """And nothing is lost between the two."""
    folder, _ = trained
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    other = tmp_path / "other.txt"
    other.write_text(text.read_text()[:20_000])
    tokens, held_out = training_text.tokenized([text, other], tokenizer, 64)
    for path in (text, other):
        want = tokenizer(path.read_text())["input_ids"]
        n = max(1, round(0.01 * len(want) / 64)) * 64
        mine, rest = tokens[: len(want) - n], tokens[len(want) - n :]
        assert mine.tolist() == want[:-n] and rest[0] == tokenizer.eos_token_id
        assert held_out[: n // 64].ravel().tolist() == want[-n:]
        tokens, held_out = rest[1:], held_out[n // 64 :]
    assert not len(tokens) and not len(held_out)


def test_learning_rate():
    rates = [train_moe.rate(step, 1000) for step in range(1000)]
    assert rates[0] == pytest.approx(1 / 20) and max(rates) == rates[20] == 1
    assert rates[19] == 1 and rates[-1] == pytest.approx(train_moe.LAST_RATE, abs=1e-4)
    assert all(a >= b for a, b in zip(rates[20:], rates[21:]))


def test_export_of_an_unfinished_model(trained, text, tmp_path, monkeypatch):
    folder, arch = trained
    save = train_moe.Run.save

    def stopping_save(run):
        save(run)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train_moe.Run, "save", stopping_save)
    arguments = command(text, tmp_path / "m", "--arch", arch, "--save-minutes", "0")
    assert train_moe.main(arguments) == 130
    assert train_moe.main([*arguments, "--export"]) == 0
    assert json.loads((tmp_path / "m" / "training.json").read_text())["tokens"] == 256
    assert not np.array_equal(weights(tmp_path / "m")["lm_head.weight"], weights(folder)["lm_head.weight"])


def test_tokenizer_of_another_model(trained, text, tmp_path):
    folder, _ = trained
    assert train_moe.main(command(text, tmp_path / "m", "--tokenizer", str(folder), "--tokens", "256")) == 0
    assert (tmp_path / "m" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_errors(trained, text, tmp_path, capsys):
    folder, arch = trained
    assert train_moe.main(command(text, folder, "--arch", arch, "--seed", "1")) == 1
    assert "checkpoint.pt: of another run" in capsys.readouterr().err
    short = tmp_path / "short.txt"
    short.write_text("too short")
    assert train_moe.main(command(short, tmp_path / "a")) == 1
    assert "short.txt: " in capsys.readouterr().err
    assert train_moe.main(command(tmp_path / "no.txt", tmp_path / "b")) == 1
    assert "no.txt: No such file" in capsys.readouterr().err
    short.write_bytes(b"\xff\xfe\xff")
    assert train_moe.main(command(short, tmp_path / "c")) == 1
    assert "short.txt: " in capsys.readouterr().err
    assert train_moe.main([*command(text, tmp_path / "e"), "--vocab", "256"]) == 1
    assert "--vocab 256: want more than 256" in capsys.readouterr().err
    assert train_moe.main(command(text, tmp_path / "f", "--export")) == 1
    assert "--export has nothing to write" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train_moe.main(command(text, tmp_path / "d", "--tokens", "0"))
    assert "want 1 or more" in capsys.readouterr().err


def test_counts():
    assert [train_moe.count(text) for text in ("512", "20M", "1.5k", "1G")] == [512, 20_000_000, 1500, 10**9]

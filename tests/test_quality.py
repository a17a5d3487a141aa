"""bench/quality: metrics against their definitions, methods against references, texts that never overlap, resuming."""

from __future__ import annotations

from dataclasses import replace
import importlib.util
import itertools
import json
from pathlib import Path
import sys

from allocmoe_edge import Llama, Plan, PlanError
from allocmoe_edge.convert import cli, thresholds
from allocmoe_edge.convert.checkpoint import Checkpoint
from allocmoe_edge.plan import metadata
from gguf_factory import random_estimator
import numpy as np
import pytest

pytest.importorskip("gguf", reason="LExI reads weights with it")
FOLDER = Path(__file__).resolve().parent.parent / "bench" / "quality"
sys.path.insert(0, str(FOLDER))

import across  # noqa: E402
import lexi  # noqa: E402
import methods  # noqa: E402
import metrics  # noqa: E402
import report  # noqa: E402
import tasks  # noqa: E402
import texts  # noqa: E402

FULL = (4, 4, 4, 4)
METHODS_WITHOUT_THRESHOLD = {"uniform", "alloc-l-paper", "alloc-l-fast", "alloc-t-batch", "paper", "fast-batch", "lexi"}


def load_main():
    spec = importlib.util.spec_from_file_location("quality_main", FOLDER / "__main__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def path(built) -> Path:
    return built["olmoe"].gguf_path


@pytest.fixture(scope="module")
def llm(path):
    return Llama(str(path), n_ctx=64, n_batch=64, n_ubatch=64, n_threads=1, logits_all=True, verbose=False)


@pytest.fixture(scope="module")
def single(path):
    return Llama(str(path), n_ctx=64, n_batch=1, n_ubatch=1, n_threads=1, verbose=False)


@pytest.fixture(scope="module")
def text() -> np.ndarray:
    return np.random.default_rng(0).integers(3, 300, (4, 64)).astype(np.int32)


@pytest.fixture
def checkpoint(path, tmp_path):
    with Checkpoint(tmp_path / "cells", path) as checkpoint:
        yield checkpoint


def book(seed: int, n: int = 30_000) -> str:
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice(list("abcdefghijklmnop"), 6)) for _ in range(400)]
    return " ".join(rng.choice(words, n // 7))


# metrics


def test_recovery_of_known_numbers():
    """The figures of a prototype: full 30.36, uniform k 63.1, a token rule's 49.9, a third of the way back."""
    assert metrics.recovery_by_perplexity(49.9, 63.1, 30.36) == pytest.approx(0.321, abs=5e-4)
    assert metrics.recovery_by_perplexity(30.36, 63.1, 30.36) == 1
    assert metrics.recovery(0.3, 0.2) == pytest.approx(-0.5)
    assert np.isnan(metrics.recovery(0.0, 0.0))


def test_loss_at_the_budget_exactly():
    spent, losses = [100.0, 52.0, 31.0], [0.0, 0.48, 1.11]
    assert metrics.at_equal_budget(spent, losses, 52.0) == pytest.approx(0.48)
    assert metrics.at_equal_budget(spent, losses, 50.0) == pytest.approx(0.48 + 2 * 0.03)
    assert metrics.at_equal_budget(spent, losses, 30.0) == pytest.approx(1.11 + 0.03)  # beyond the last point
    assert metrics.at_equal_budget(spent, losses, 100.0) == 0


def test_text_noise_of_a_mean_is_the_standard_error():
    values = np.random.default_rng(0).random(12)
    want = values.std(ddof=1) / np.sqrt(12)
    assert metrics.text_noise(lambda i: values[i].mean(), 12) == pytest.approx(want, rel=1e-12)


def definition(llm, plan, text) -> dict:
    """Everything by its definition, in float64, from the logits of whole windows."""
    out: dict = {"nll": [], "kl": [], "same": []}

    def log_p(plan, window):
        llm.set_plan(plan)
        llm.clear_cache()
        llm.eval(window.tolist())
        logits = np.array(llm.eval_logits, np.float64)[:-1]
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))

    for window in text:
        p, q = log_p(None, window), log_p(plan, window)
        out["nll"].append(-q[np.arange(len(q)), window[1:]])
        out["kl"].append((np.exp(p) * (p - q)).sum(axis=1))
        out["same"].append(p.argmax(axis=1) == q.argmax(axis=1))
    return {name: np.concatenate(values) for name, values in out.items()}


def test_measures_are_their_definitions(llm, single, text, checkpoint):
    """1e-5: sums in float32 of the reference's probabilities."""
    plan = Plan((1, 2, 3, 2), FULL)
    cells = metrics.measure({False: llm, True: single}, FULL, [(plan, False), (plan, True)], text, checkpoint)
    want = definition(llm, plan, text)
    for decode in (False, True):
        found = metrics.summary(cells[metrics.candidate_name((plan, decode))])
        assert found["perplexity"] == pytest.approx(np.exp(want["nll"].mean()), rel=1e-5)
        assert found["kl"] == pytest.approx(want["kl"].mean(), rel=1e-3, abs=1e-5)
        assert found["kl_median"] == pytest.approx(np.median(want["kl"]), rel=1e-2, abs=1e-5)
        assert found["top1"] == pytest.approx(want["same"].mean(), abs=1 / want["same"].size)
        assert found["spent"] == 8
    assert want["kl"].mean() > 0.01 and want["same"].mean() < 1  # the plan does change something


def test_batch_rule_is_top_k_token_by_token(llm, single, text, checkpoint):
    batch = replace(Plan.uniform(FULL, 8), token_rule="batch")
    off = Plan.uniform(FULL, 8)
    candidates = [(batch, False), (batch, True), (off, True)]
    cells = metrics.measure({False: llm, True: single}, FULL, candidates, text, checkpoint)
    kl = {c: metrics.summary(cells[metrics.candidate_name(c)])["kl"] for c in candidates}
    assert kl[batch, True] == kl[off, True]
    assert abs(kl[batch, False] / kl[batch, True] - 1) > 0.01


def test_names_of_plans_with_estimators():
    """They were those of the plan alone: another estimator's cells were taken for its own."""
    one, same, other = (random_estimator(4, 8, 64, 6, 4, seed) for seed in (1, 1, 2))
    plan = Plan((2,) * 4, FULL, "estimate", threshold=(0.0,) * 4)
    plans = [plan, *(replace(plan, estimator=each) for each in (one, same, other, replace(one, n_relu=2)))]
    names = [metrics.candidate_name((each, False)) for each in plans]
    assert names[1] == names[2] and len({*names}) == 4


def test_measured_cells_are_not_measured_again(llm, single, text, checkpoint, monkeypatch):
    models = {False: llm, True: single}
    plans = [(Plan((k, 2, 2, 2), FULL), False) for k in (1, 2, 3)]
    first = metrics.measure(models, FULL, plans[:2], text[:2], checkpoint)
    calls = []
    real = metrics._cell
    monkeypatch.setattr(metrics, "_cell", lambda *a: calls.append(a[1]) or real(*a))
    again = metrics.measure(models, FULL, plans, text[:3], checkpoint)
    # the third plan on all windows, the others on the new one
    assert calls.count(plans[2][0]) == 3 and calls.count(plans[0][0]) == calls.count(plans[1][0]) == 1
    for name, cells in first.items():
        assert {what: values[:2] for what, values in again[name].items()} == cells


# methods: layers


def test_knapsack_spends_the_budget_exactly():
    """Against every allocation there is, on sensitivities that are not monotone."""
    rng = np.random.default_rng(3)
    full = (3, 4, 3)
    rows = [rng.standard_normal(k) for k in full]
    for total in range(3, 11):
        plans = [c for c in itertools.product(*(range(1, k + 1) for k in full)) if sum(c) == total]
        best = min(plans, key=lambda c: sum(row[k - 1] for row, k in zip(rows, c)))
        assert methods.spend_exactly(rows, total, full).expert_used_count == best


@pytest.mark.parametrize("name", ["olmoe", "qwen2moe", "qwen3moe"])
def test_lexi_perturbation_is_the_blocks(name, built):
    """|Y_K - Y_k| of the MoE block of transformers on the same noise. 1e-4: float32 products in another order."""
    torch = pytest.importorskip("torch")
    import transformers

    model = built[name]
    hf = getattr(transformers, model.spec.model_class).from_pretrained(model.hf_path, dtype=torch.float32)
    rows = lexi.sensitivities(model.gguf_path, FULL, n_tokens=32, n_draws=1, seed=5)
    rng = np.random.default_rng(5)
    for il, layer in enumerate(hf.model.layers):
        x = torch.from_numpy(rng.standard_normal((32, 64), np.float32))[None]
        outputs = []
        for k in range(1, 5):
            layer.mlp.gate.top_k = k
            with torch.no_grad():
                y = layer.mlp(x)
            outputs.append(y[0] if isinstance(y, tuple) else y)
        want = [float(torch.linalg.norm(outputs[-1] - y)) for y in outputs]
        np.testing.assert_allclose(rows[il], want, rtol=1e-4, atol=1e-5)
        assert want[0] > 1e-3


def test_lexi_says_what_it_cannot_compute(built):
    with pytest.raises(ValueError, match="gpt-oss"):
        lexi.sensitivities(built["gpt-oss"].gguf_path, FULL)


# methods: tokens


@pytest.mark.parametrize("value, scope", [("relative", "layer"), ("relative", "model"), ("remaining", "model")])
def test_thresholds_meet_the_budget_in_the_mean(llm, text, value, scope):
    """2%: the last of three rounds of calibration is for activations that its own thresholds change again."""
    for total in (7, 8, 12):
        plan = methods.calibrated_on_value(llm, FULL, total, value, scope, text)
        assert plan.value == value and plan.token_rule == "threshold" and plan.k_base == 1
        llm.set_plan(plan)
        llm.expert_stats(reset=True)
        from allocmoe_edge.measure.perplexity import negative_log_likelihood

        negative_log_likelihood(llm, text)
        mean = llm.expert_stats()["prefill"]["mean"]
        assert mean.sum() == pytest.approx(total, rel=0.02)
        if scope == "model":
            assert len(set(plan.threshold)) == 1
            assert np.ptp(mean) > 0.05  # so that layers differ
        else:
            np.testing.assert_allclose(mean, total / 4, rtol=0.03)


def test_thresholds_are_the_published_ones(llm, text):
    """By sorting the values of the first layer, whose inputs no threshold changes."""
    score_plan = replace(Plan.uniform(FULL, 8), token_rule="batch")
    p = thresholds.recorded_values(llm, score_plan, text)[0].astype(float)
    naee = methods.calibrated_on_value(llm, FULL, 8, "relative", "layer", text)
    ratios = np.sort((p[:, 1:] / p[:, :1]).ravel())[::-1]
    assert naee.threshold[0] == pytest.approx(ratios[len(p) - 1], rel=1e-6)
    # of two experts, NAEE's own case: half of the tokens keep the second where the bound is the median ratio
    two = p[:, :2].astype(np.float32) / p[:, :1].astype(np.float32)
    assert methods._limit([two], 1.5) == pytest.approx(np.median(two[:, 1]), rel=0.02)


def test_scores_that_are_no_probabilities_are_refused(built, text):
    llm = Llama(str(built["gpt-oss"].gguf_path), n_ctx=64, n_batch=64, n_ubatch=64, verbose=False)
    with pytest.raises(PlanError, match="want probabilities"):
        methods.calibrated_on_value(llm, llm.plan.expert_used_count_full, 8, "relative", "model", text)


# texts


def test_samples_share_nothing(tmp_path):
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for i, file in enumerate(files):
        file.write_text(book(i))
    evaluation = tmp_path / "e.txt"
    evaluation.write_text(book(7) + book(0)[:120])  # a part of the first file
    written = texts.samples(files, evaluation, 1500, 3, tmp_path)
    contents = [file.read_text() for file in written]
    assert len(set(contents)) == 3 and all(len(text) > 1500 * 5 for text in contents)
    for one, other in itertools.combinations([*contents, evaluation.read_text()], 2):
        # any stretch of two spans would show
        assert not texts.shares_text(one, texts.spans(other))
    # the parts that were left out lie at the start of the first file: without the evaluation text they would be used
    evaluation.write_text(book(7))
    first = texts.samples(files, evaluation, 1500, 3, tmp_path)[0].read_text()
    assert texts.shares_text(first, texts.spans(book(0)[:120]))


def test_overlap_is_refused(tmp_path):
    file, copy = tmp_path / "a.txt", tmp_path / "copy.txt"
    file.write_text(book(0))
    copy.write_text(book(0))
    with pytest.raises(ValueError, match="is the evaluation text"):
        texts.samples([file], file, 1500, 1, tmp_path)
    with pytest.raises(ValueError, match="a.txt.*in the evaluation text"):
        texts.samples([file], copy, 1500, 1, tmp_path)


# tasks


def test_choice_scores_are_those_of_whole_sequences(llm, tmp_path):
    entry = {"query": "abc def", "choices": ["gh", "a longer choice of words", "x"], "gold": 1}
    file = tmp_path / "t.jsonl"
    file.write_text(json.dumps(entry) + "\n")
    (item,) = tasks.read(file, 5, 64, llm)
    llm.set_plan([1, 2, 1, 2])
    sums = []
    for tokens in item["continuations"]:
        llm.clear_cache()
        llm.eval(item["context"] + tokens)
        logits = np.array(llm.eval_logits, np.float64)
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        first = len(item["context"]) - 1
        sums.append(sum(log_p[first + i, token] for i, token in enumerate(tokens)))
    for gold in range(3):
        found = tasks.score(llm, {**item, "gold": gold})
        assert found["acc"] == (np.argmax(sums) == gold)
        assert found["acc_norm"] == (np.argmax(np.array(sums) / [2, 24, 1]) == gold)
    assert np.argmax(sums) != np.argmax(np.array(sums) / [2, 24, 1])  # the two measures do differ here
    assert tasks.chance([item]) == pytest.approx(1 / 3) and tasks.main_metric(item) == "acc_norm"


def test_last_word_is_right_when_greedy_decoding_writes_it(llm, tmp_path):
    file = tmp_path / "lambada.jsonl"
    file.write_text(json.dumps({"context": "abc def", "continuation": "gh"}) + "\n")
    (item,) = tasks.read(file, 1, 64, llm)
    llm.set_plan(None)
    written = []
    for _ in range(3):
        llm.clear_cache()
        llm.eval(item["context"] + written)
        written.append(int(np.argmax(llm.eval_logits[-1])))
    assert tasks.score(llm, {**item, "continuations": [written]}) == {"acc": True}
    assert tasks.score(llm, {**item, "continuations": [written[:-1] + [written[-1] ^ 1]]}) == {"acc": False}
    assert tasks.main_metric(item) == "acc" and tasks.chance([item]) == 0


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"query": "a"}',
        '{"query": "a", "choices": ["b"], "gold": 1}',
        '{"query": 1, "choices": [], "gold": 0}',
    ],
)
def test_malformed_item_is_named(llm, tmp_path, line):
    file = tmp_path / "t.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(ValueError, match="t.jsonl, line 1"):
        tasks.read(file, 1, 64, llm)


def test_long_context_loses_its_beginning(llm, tmp_path):
    file = tmp_path / "t.jsonl"
    file.write_text(json.dumps({"query": "abc " * 200 + "the end", "choices": ["x", "yy"], "gold": 0}) + "\n")
    (item,) = tasks.read(file, 1, 64, llm)
    assert len(item["context"]) + max(map(len, item["continuations"])) == 64
    assert llm.detokenize(item["context"][1:]).endswith(b"the end")


# the command


@pytest.fixture(scope="module")
def command(path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quality")
    (folder / "calib.txt").write_text(book(1))
    (folder / "text.txt").write_text(book(2))
    (folder / "task.jsonl").write_text(json.dumps({"query": "Question: a?", "choices": ["b", "cd"], "gold": 0}) + "\n")
    args = [path, "--text", folder / "text.txt", "--calib", folder / "calib.txt", "-o", folder / "out", "--threads", 1]
    args += [
        "--budgets",
        0.75,
        0.5,
        "--repeats",
        2,
        "--tokens",
        128,
        "--ctx-size",
        64,
        "--calib-tokens",
        256,
        "--estimate-tokens",
        512,
    ]
    return [str(a) for a in args + ["--tasks", folder / "task.jsonl"]], folder / "out"


def test_command_measures_every_method_and_resumes(command, monkeypatch, capsys):
    args, out = command
    main = load_main()
    # stopped in the middle of the evaluation
    calls = []
    real = metrics._cell

    def stop(*a):
        calls.append(a)
        if len(calls) == 40:
            raise KeyboardInterrupt
        return real(*a)

    monkeypatch.setattr(metrics, "_cell", stop)
    assert main.main(args) == 130
    assert "goes on from" in capsys.readouterr().err and not (out / "result.json").exists()
    stopped = len(calls)
    assert main.main(args) == 0
    again = len(calls)
    first = (out / "result.json").read_text()
    # all that was measured is used: a third run measures nothing and writes the same
    assert main.main(args) == 0
    result = json.loads(first)
    second = json.loads((out / "result.json").read_text())
    assert {**second, "machine": 0} == {**result, "machine": 0}
    assert len(calls) == again and again > stopped
    assert {row["method"] for row in result["rows"]} == set(methods.METHODS)
    table = (out / "table.md").read_text()
    for method in methods.METHODS.values():
        assert f"| {method.title}" in table
    by_method = {(r["budget"], r["method"], r["phase"]): r for r in result["rows"]}
    assert len(by_method[0.5, "ours", "prefill"]["samples"]) == 2 and len(by_method[0.5, "lexi", ""]["samples"]) == 1
    for (budget, method, _), row in by_method.items():
        for sample in row["samples"]:
            # thresholds meet the budget on the text that they are calibrated on, here 256 tokens of other random words
            exact = METHODS_WITHOUT_THRESHOLD >= {method}
            assert sample["spent"] == pytest.approx(row["total"], rel=1e-9 if exact else 0.2), (budget, method)
    assert by_method[0.5, "uniform", ""]["samples"][0]["recovered"] == {"perplexity": 0, "kl": 0}
    assert [entry["plan"] for entry in result["tasks"]] == ["full", "uniform k, 0.5", "ours (allocmoe-convert), 0.5"]
    assert abs(result["floor"]["kl"]) < 1e-5


@pytest.mark.parametrize("self_generated", [False, True])
def test_ours_is_what_convert_writes(command, path, tmp_path, self_generated):
    args, out = command
    calib = ["--calib", out / "calibration-0.txt"]
    if self_generated:
        out = tmp_path / "out"
        i = args.index("--calib")
        args = [*args[:i], *args[i + 2 :], "--methods", "ours", "-o", str(out), "--repeats", "1", "--budgets", "0.5"]
        calib = []
    assert load_main().main(args) == 0
    result = json.loads((out / "result.json").read_text())
    wanted = ("ours", 0.5, 0, False)
    (mine,) = [e for e in result["plans"] if (e["method"], e["budget"], e["sample"], e["decode"]) == wanted]
    assert result["calibration"]["texts"] == (["self-generated"] if self_generated else ["calib.txt"])
    convert = [path, "--budget", 0.5, *calib, "--calib-tokens", 256, "--ctx-size", 64]
    convert += ["--estimate-tokens", 512, "--threads", 1, "--plan-only", "-o", tmp_path / "plan.gguf"]
    assert cli.main([str(a) for a in convert]) == 0
    assert metadata.read(tmp_path / "plan.gguf").plan == Plan(**{**mine["plan"]})


def test_plan_with_an_estimator_is_read_back(command, path, llm, text, tmp_path, monkeypatch):
    """It is too large for the checkpoint, which keeps the rest: the second time no method is asked."""
    main = load_main()
    (tmp_path / "calib.txt").write_text(book(1))
    args = main.parser().parse_args([*command[0], "--methods", "ours", "-o", str(tmp_path)])
    setting = methods.Setting(llm, FULL, path, text, tmp_path / "calib.txt", 0, args)
    monkeypatch.setitem(
        methods.METHODS,
        "ours",
        replace(methods.METHODS["ours"], plan=methods._ours("ours", "estimate")),
    )
    with Checkpoint(tmp_path / "cells", path) as checkpoint:
        ((_, _, first),) = main.planned(setting, {0.5: 8}, 0, checkpoint)
        monkeypatch.setitem(methods.METHODS, "ours", replace(methods.METHODS["ours"], plan=None))
        ((_, _, again),) = main.planned(setting, {0.5: 8}, 0, checkpoint)
    assert first == again and again.token_rule == "estimate"
    assert np.array_equal(first.estimator.up, again.estimator.up) and again.estimator.up.any()


def test_errors_are_lines(path, tmp_path, capsys):
    (tmp_path / "t.txt").write_text(book(1))
    args = [path, "--text", tmp_path / "t.txt", "--calib", tmp_path / "t.txt", "-o", tmp_path / "o", "--ctx-size", 64]
    main = load_main()
    assert main.main([str(a) for a in args]) == 1
    assert "is the evaluation text" in capsys.readouterr().err
    args[4] = tmp_path / "missing.txt"
    args += ["--tokens", 64]
    assert main.main([str(a) for a in args]) == 1
    assert "missing.txt: No such file" in capsys.readouterr().err
    args[0] = tmp_path / "no.gguf"
    assert main.main([str(a) for a in args]) == 1
    assert "no.gguf" in capsys.readouterr().err


def test_across_compares_plans_on_texts(path, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(book(3))
    model = metadata.read(path)
    counts = {"uneven": [1, 3, 1, 3], "even": [2, 2, 2, 2], "more": [3, 3, 2, 2]}
    for name, planned in counts.items():
        profile = metadata.Profile(
            [[0.1 * (4 - k) for k in range(1, 5)]] * 4, (1.0,) * 4, metadata.Calibration("words", 1, "")
        )
        metadata.write_side_file(tmp_path / f"{name}.plan.gguf", model, Plan(planned, FULL), profile)
    args = ["--texts", tmp_path / "text.txt", "--tokens", 128, "--ctx-size", 64, "--threads", 1, "-o", tmp_path / "out"]
    files = [tmp_path / f"{name}.plan.gguf" for name in counts]
    assert across.main([str(a) for a in (path, *args, "--decode", "--plans", *files[:2])]) == 0
    row = json.loads((tmp_path / "out" / "result.json").read_text())["text"]
    assert row["even"] == row["uniform k"] != row["uneven"] and row["full"]["kl"] == pytest.approx(0, abs=1e-6)
    assert row["uneven"]["spent"] == 8
    line = (tmp_path / "out" / "table.md").read_text().splitlines()[-1]
    assert line.startswith("| text |") and line.endswith("(0%, 0%) |")
    capsys.readouterr()
    assert across.main([str(a) for a in (path, *args, "--plans", *files)]) == 1
    assert "want one budget" in capsys.readouterr().err


def test_plot_is_small(command):
    pytest.importorskip("matplotlib")
    args, out = command
    load_main().main(args)
    report.plot(json.loads((out / "result.json").read_text()), out / "p.svg")
    assert (out / "p.svg").stat().st_size < 100_000 and "Dynamic-MoE" in (out / "p.svg").read_text()

"""allocmoe-bench: what it prints agrees with what it measured. Nothing here asserts a speed."""

import csv
import json
import os
from pathlib import Path

from allocmoe_edge import Llama, Plan
from allocmoe_edge._native import libllama, llama_cpp
from allocmoe_edge.bench import cli, machine, measure, report
from allocmoe_edge.inspect import report as inspect_report
from allocmoe_edge.measure.traffic import WeightTraffic
from conftest import plan_from_made_up_profile
import gguf
from gguf_factory import write_gguf
import numpy as np
import odd_models
import pytest

TINY = ["--prompt", "24", "--depth", "0,16", "--gen", "4", "--repeats", "2"]


@pytest.fixture(scope="module")
def run(testbed_path, tmp_path_factory):
    """(stdout, report, CSV rows) of one run over two budgets."""
    import contextlib
    import io

    folder = tmp_path_factory.mktemp("bench")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = cli.main([str(testbed_path), "--budgets", "0.5,1.0,33%", *TINY, "--json", str(folder / "a.json"),
                         "--csv", str(folder / "a.csv")])  # fmt: skip
    assert code == 0
    assert sorted(path.name for path in folder.iterdir()) == ["a.csv", "a.json"]
    with open(folder / "a.csv", newline="") as file:
        return out.getvalue(), json.loads((folder / "a.json").read_text()), list(csv.DictReader(file))


def test_every_item_has_every_plan_once(run):
    _, found, _ = run
    keys = [(row["phase"], row.get("n_prompt", row.get("depth")), row["plan"]) for row in found["results"]]
    plans = ["full", "0.5", "33%"]  # 1.0 is full
    assert keys == [(*item, plan) for item in (("prefill", 24), ("decode", 0), ("decode", 16)) for plan in plans]


def test_plans_take_turns(run):
    order = run[1]["order"]["decode, depth 16"]
    assert order == [["full", "0.5", "33%", "full"], ["full", "33%", "0.5", "full"]]
    for row in run[1]["results"]:
        assert len(row["seconds"]) == (4 if row["plan"] == "full" else 2)


def test_table_and_csv_say_what_json_says(run):
    out, found, lines = run
    assert len(lines) == len(found["results"])
    for row, line in zip(found["results"], lines):
        assert line["plan"] == row["plan"]
        assert (
            float(line["tokens_per_second"]) == row["tokens_per_second"] == row["n_tokens"] / np.median(row["seconds"])
        )
        assert [float(line["ratio_q1"]), float(line["ratio_q3"])] == row["ratio_quartiles"]
        assert f" {row['tokens_per_second']:.2f} |" in out
    assert f"{found['bandwidth_bytes_per_second'] / 1e9:.1f} GB/s" in out
    assert found["machine"]["cpu"] in out


def test_budgets_were_in_force(run):
    for row in run[1]["results"]:
        planned = sum(run[1]["plans"][row["plan"]])
        assert row["activations_per_token"] == planned == round(360 * row["budget"])


def test_bytes_per_token_by_hand(run, testbed_path):
    tensors = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(testbed_path).tensors}
    assert "output.weight" not in tensors  # tied, so every token reads all of the embeddings
    experts = sum(n for name, n in tensors.items() if "_exps.weight" in name)
    for row in run[1]["results"]:
        if row["phase"] == "decode":
            expected = sum(tensors.values()) - experts + experts * row["budget"]
            assert row["gb_per_token"] * 1e9 == pytest.approx(expected, rel=1e-9)
            assert row["gb_per_second"] == pytest.approx(row["gb_per_token"] * row["tokens_per_second"])


def test_bytes_per_token_of_untied_embeddings(tmp_path):
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(str(path), "deepseek")
    writer.add_block_count(2)
    writer.add_expert_count(4)
    writer.add_expert_used_count(2)
    writer.add_vocab_size(10)
    for name, shape in {"token_embd.weight": (10, 32), "output.weight": (10, 32), "blk.0.ffn_up.weight": (8, 32),
                        "blk.1.ffn_gate_inp.weight": (4, 32), "blk.1.ffn_norm_exps.weight": (32,),
                        "blk.1.ffn_down_exps.weight": (4, 6, 32)}.items():  # fmt: skip
        writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    traffic = WeightTraffic(path)
    # output, the dense layer, the router, the experts' norm, which is none of theirs; then 3 of 4 experts of 6 rows
    assert traffic.per_token([0, 3]) == 4 * 32 * (10 + 8 + 4 + 1 + 3 * 6)
    assert traffic.total == 4 * 32 * (10 + 10 + 8 + 4 + 1 + 24)


@pytest.mark.parametrize("write", [odd_models.write_qwen3moe, lambda path: odd_models.write_deepseek4(path, 2), odd_models.write_grovemoe],
                         ids=["qwen3moe", "deepseek4", "grovemoe"])  # fmt: skip
def test_bytes_per_token_are_those_of_inspect(tmp_path, capsys, write):
    """Of layers whose experts are given by the token id they were none, for each page counted by itself."""
    path = plan_from_made_up_profile(write(tmp_path / "source.gguf"), tmp_path / "model.gguf")
    assert (
        cli.main([str(path), "--prompt", "0", "--gen", "2", "--repeats", "1", "--json", str(tmp_path / "b.json")]) == 0
    )
    read = inspect_report.build(path)["plan"]["bytes_per_token"]
    full, half = json.loads((tmp_path / "b.json").read_text())["results"]
    assert full["gb_per_token"] * 1e9 == pytest.approx(read["experts_full"] + read["other"], rel=1e-12)
    assert half["gb_per_token"] * 1e9 == pytest.approx(read["experts"] + read["other"], rel=1e-12)
    assert half["ratio_of_bytes"] == pytest.approx(1 / read["share"], rel=1e-12)


def test_the_file_s_own_plan_is_the_default(planned_path, capsys):
    assert cli.main([str(planned_path), "--prompt", "0", "--gen", "2", "--repeats", "1"]) == 0
    out = capsys.readouterr().out
    assert "0.50 (file) |         180.0 |" in out
    assert "prefill" not in out.split("workload")[1]


def test_text_and_token_rule(testbed_path, tmp_path, capsys):
    text, output = tmp_path / "text.txt", tmp_path / "out.json"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    args = [
        "--budgets",
        "0.5",
        "--token-rule",
        "batch",
        "--prompt",
        "32",
        "--gen",
        "0",
        "--repeats",
        "1",
        "--text",
        str(text),
    ]
    assert cli.main([str(testbed_path), *args, "--json", str(output)]) == 0
    rows = json.loads(output.read_text())["results"]
    assert [row["token_rule"] for row in rows] == ["off", "batch"]
    # the rule spends k times the micro-batch's tokens; the last layer sees one token, so plain top-k
    assert rows[1]["activations_per_token"] == 180


@pytest.mark.skipif(os.name != "posix", reason="no advice on mappings")
@pytest.mark.parametrize("prefetch, found", [("on", True), ("off", False), ("auto", False)])
def test_prefetch(planned_path, tmp_path, capsys, prefetch, found):
    output = tmp_path / "out.json"
    args = [
        "--no-repack",
        "--prefetch",
        prefetch,
        "--prompt",
        "0",
        "--gen",
        "2",
        "--repeats",
        "1",
        "--json",
        str(output),
    ]
    assert cli.main([str(planned_path), *args]) == 0
    assert json.loads(output.read_text())["workload"]["prefetch"] is found
    assert ("experts prefetched" in capsys.readouterr().out) == found


def test_leaves_the_model_as_it_was(testbed_path):
    llm = Llama(str(testbed_path), n_ctx=64, n_batch=32, verbose=False)
    full = llm.plan.expert_used_count_full
    before = Plan.uniform(full, 300)
    llm.set_plan(before)
    plans = {"full": Plan.full(full), "third": Plan.uniform(full, 120)}
    result = measure.run(llm, plans, [measure.Item("decode", 8, 2)], 2, list(range(64)))
    assert llm.plan == before
    samples = result.samples[measure.Item("decode", 8, 2)]
    assert [len(steps) for steps in samples["third"].step_seconds] == [2, 2]
    assert sum(samples["third"].activations[0]) == 120
    llm.eval([1, 2, 3])  # from an empty cache


@pytest.mark.parametrize("suffix, begin", [("png", b"\x89PNG"), ("SVG", b"<?xml"), ("pdf", b"%PDF")])
def test_plot(testbed_path, tmp_path, suffix, begin):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"plot.{suffix}"
    args = ["--budgets", "0.5", "--prompt", "8", "--gen", "2", "--repeats", "1", "--plot", str(path)]
    assert cli.main([str(testbed_path), *args]) == 0
    assert path.read_bytes().startswith(begin)


def _rows(reference, other):
    """Rows of one prefill of 10 tokens, from seconds per run: reference [first, last, first, ...], other [...]."""
    item = measure.Item("prefill", 10)
    full = Plan.full((4, 4))
    plans = {"full": full, "half": Plan.uniform(full.expert_used_count_full, 4)}
    samples = {
        "full": measure.Samples(seconds=reference, activations=[np.array([4.0, 4.0])]),
        "half": measure.Samples(seconds=other, activations=[np.array([2.0, 2.0])]),
    }
    result = measure.Result({item: samples}, {item: []})
    return report.rows(result, plans, None, 1e9)


def test_ratios_by_hand():
    full, half = _rows([2.0, 2.0, 3.0, 5.0, 1.0, 1.0], [1.0, 4.0, 0.25])
    assert full["ratio"] == 1.0 and full["ratio_quartiles"] == [0.8, 1.0]  # of 1, 3/5, 1
    assert half["ratio"] == 2.0 and half["ratio_quartiles"] == [1.5, 3.0]  # of 2, 4/4, 4
    assert half["tokens_per_second"] == 10 / 1.0
    assert half["time_to_first_token"] == 1.0


def test_warnings():
    quiet = _rows([2.0] * 6, [1.0, 1.0, 1.0])
    assert report.warnings(quiet, 0.03) == []
    noisy = report.warnings(_rows([2.0, 1.0, 2.0, 1.0, 2.0, 1.0], [0.5, 0.5, 0.5]), 0.03)
    assert len(noisy) == 1 and "a noisy machine" in noisy[0] and "100%" in noisy[0]
    same = report.warnings(_rows([2.0] * 6, [2.0, 2.1, 1.9]), 0.03)
    assert len(same) == 1 and "no difference between half and full budget" in same[0]


def test_turns():
    assert list(measure.turns(["a", "b", "c"], 3)) == [["a", "b", "c", "a"], ["a", "c", "b", "a"], ["a", "b", "c", "a"]]


def test_energy_counter(tmp_path):
    assert not machine.EnergyCounter(str(tmp_path)).available
    for zone, uj in (("intel-rapl:0", 900), ("intel-rapl:0:0", 5), ("intel-rapl:1", 100)):
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "energy_uj").write_text(f"{uj}\n")
        (tmp_path / zone / "max_energy_range_uj").write_text("1000\n")
    counter = machine.EnergyCounter(str(tmp_path))
    before = counter.read()
    assert counter.available and before == [900, 100]
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("50")  # it wrapped: 100 up to its range, and 50
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("300")
    assert counter.joules(before, counter.read()) == pytest.approx(350e-6)


def test_machine_facts():
    assert machine.read_bandwidth(2) > 0
    assert machine.describe()["cpu"]


@pytest.mark.parametrize(
    "args, message",
    [
        (["--budgets", "1.5"], "budget: found '1.5'"),
        (["--budgets", "0.5", "--token-rule", "threshold"], "needs a threshold table: allocmoe-convert"),
        (["--prompt", "0", "--gen", "0"], "nothing to measure"),
        (["--json", "/no/such/folder/x.json"], "/no/such/folder/x.json: no such folder"),
        (["--text", "/no/such/file"], "No such file"),
        # the one failed after the measurement, as a fault of ours, the other replaced the first file by the second
        (["--plot", "x.txt"], "x.txt: want a name that ends in .png, .svg or .pdf"),
        (["--plot", "x"], "x: want a name that ends in .png, .svg or .pdf"),
        (["--json", "same", "--csv", "./same"], "--json, --csv, --plot: want different files"),
    ],
)
def test_errors(testbed_path, tmp_path, monkeypatch, capsys, args, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main([str(testbed_path), *args]) == 1
    error = capsys.readouterr().err
    assert error.startswith("allocmoe-bench: error: ") and message in error


def test_errors_about_the_model(tmp_path, capsys):
    assert cli.main([str(tmp_path / "none.gguf")]) == 1
    assert "no such file" in capsys.readouterr().err
    broken = write_gguf(tmp_path / "broken.gguf")  # metadata of a model, and nothing else
    assert cli.main([str(broken)]) == 1
    assert "llama.cpp cannot load it" in capsys.readouterr().err


def test_text_too_short(testbed_path, tmp_path, capsys):
    Path(tmp_path / "t").write_text("Hello")
    assert cli.main([str(testbed_path), *TINY, "--text", str(tmp_path / "t")]) == 1
    assert "tokens, want 24" in capsys.readouterr().err


@pytest.mark.parametrize("args", [["--repeats", "0"], ["--depth", "-1"], ["--prompt", "x"], ["--token-rule", "x"]])
def test_arguments_are_checked(args):
    assert cli.main(["model.gguf", *args]) == 2


def test_stock_runs_without_our_kernels(testbed_path, tmp_path, capsys):
    assert cli.main([str(testbed_path), "--budgets", "0.5", "--stock", *TINY, "--json", str(tmp_path / "a.json")]) == 0
    found = json.loads((tmp_path / "a.json").read_text())
    assert [row["plan"] for row in found["results"]] == ["stock", "full", "0.5"] * 3
    assert found["order"]["prefill 24"][0] == ["stock", "full", "0.5", "stock"]
    out, err = capsys.readouterr()
    assert "x stock (quartiles)" in out and "full budget" not in err


def test_both_sets_of_kernels_compute_the_same(testbed_path):
    llm = Llama(str(testbed_path), n_ctx=64, n_batch=64, n_threads=2, logits_all=True, verbose=False)
    tokens = llm.tokenize(b"The Seine flows through Paris, the capital of France, on its way to the sea at Le Havre.")

    def logits() -> np.ndarray:
        llm.reset()
        llm.eval(tokens)
        return np.array(llm.scores[: len(tokens)])

    ours = logits()
    try:
        libllama.allocmoe_set_cpu_kernels(False)
        stock = logits()
    finally:
        libllama.allocmoe_set_cpu_kernels(True)
    assert np.array_equal(logits(), ours)
    # sums in another order, and activations that round to other 8-bit numbers, 30 layers long
    assert np.median(np.abs(stock - ours).max(1) / ours.std(1)) < 0.5
    if any(name in llama_cpp.llama_print_system_info().decode() for name in ("AVX2 = 1", "DOTPROD = 1")):
        assert not np.array_equal(stock, ours)

"""allocmoe-inspect: its numbers against the file's own, its figures, and one test per way it refuses."""

import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree

from allocmoe_edge import Llama, Plan
from allocmoe_edge.gguf_file import GGUFFile
from allocmoe_edge.inspect import cli, measure, plot, report, text
from allocmoe_edge.measure.perplexity import perplexity
from allocmoe_edge.plan import metadata
import gguf
from gguf_factory import plan_keys, write_gguf
import numpy as np
import pytest

COMMAND = shutil.which("allocmoe-inspect", path=os.path.dirname(sys.executable))
PNG = b"\x89PNG\r\n\x1a\n"


def run(*args, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([COMMAND, *map(str, args)], capture_output=True, text=True, encoding="utf-8", **kwargs)


def inspect(capfd, *args) -> tuple:
    """Exit code, stdout and stderr of the command, in this process."""
    code = cli.main([*map(str, args)])
    return (code, *capfd.readouterr())


def strict_json(printed: str) -> dict:
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(printed, parse_constant=refuse)


# --- what it says


def test_json_says_what_the_metadata_says(planned_path):
    done = run(planned_path, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found, model = strict_json(done.stdout), metadata.read(planned_path)
    size = planned_path.stat().st_size
    assert found["file"] == {"path": str(planned_path), "bytes": size, "n_files": 1, "kind": "model"}
    plan, profile = found["plan"], found["profile"]
    assert tuple(plan["experts_per_token"]) == model.plan.expert_used_count
    assert (plan["budget"], plan["budget_total"], plan["budget_full"]) == (0.5, 180, 360)
    assert tuple(plan["experts_per_token_full"]) == model.full
    assert (plan["token_rule"], plan["k_base"], plan["threshold"], plan["cost"]) == ("off", 1, None, None)
    for row, stored in zip(profile["sensitivity"], model.profile.sensitivity):
        np.testing.assert_array_equal(row, stored)
    assert profile["calibration"] == {"source": "made up for a test", "n_tokens": 1, "sha256": "0" * 64}
    for key in ("allocation", "metric", "mode", "cost_unit"):
        assert profile[key] == getattr(model.profile, key)
    assert profile["cost"] == [1.0] * 30 and profile["threshold_table"] is None
    assert found["held_out"] is None
    assert found["measured_curve"] is None and found["routing"] is None


def test_model_part_agrees_with_an_independent_reader(testbed_path):
    model = report.build(testbed_path)["model"]
    reader = gguf.GGUFReader(testbed_path)
    assert model["parameters"] == sum(int(t.n_elements) for t in reader.tensors)
    for part, is_expert in (("experts", True), ("other", False)):
        expected = {}
        for tensor in reader.tensors:
            if ("_exps" in tensor.name) == is_expert:
                entry = expected.setdefault(tensor.tensor_type.name, {"tensors": 0, "parameters": 0, "bytes": 0})
                entry["tensors"] += 1
                entry["parameters"] += int(tensor.n_elements)
                entry["bytes"] += int(tensor.n_bytes)
        assert model["types"][part] == expected
    assert (model["architecture"], model["layers"], model["moe_layers"]) == ("deepseek", 30, 30)
    assert (model["experts"], model["shared_experts"], model["experts_per_token"]) == (12, 4, [12] * 30)
    assert model["context_length"] == 8192


def test_bytes_per_token_by_hand(planned_path):
    """Of the testbed every token reads all but the experts left out; its embedding is its output matrix too."""
    read = report.build(planned_path)["plan"]["bytes_per_token"]
    planned = metadata.read(planned_path).plan.expert_used_count
    experts, other, spent = 0, 0, 0
    for tensor in gguf.GGUFReader(planned_path).tensors:
        if "_exps" in tensor.name:
            experts += int(tensor.n_bytes)
            spent += int(tensor.n_bytes) // 12 * planned[int(tensor.name.split(".")[1])]
        else:
            other += int(tensor.n_bytes)
    assert (read["experts"], read["experts_full"], read["other"]) == (spent, experts, other)
    assert read["expert_share"] == spent / experts and read["share"] == (spent + other) / (experts + other)


# a layer of the factory's: 8 experts of 4 x 32 floats, and a router of 8 x 32
EXPERT, ROUTER, DENSE, EMBEDDING = 4 * 32 * 4, 8 * 32 * 4, 4 * 32 * 4, 2 * 32 * 4


def test_a_dense_layer_is_read_whole(tmp_path):
    read = report.build(write_gguf(tmp_path / "m.gguf", keys=plan_keys()))["plan"]["bytes_per_token"]
    assert read["experts_full"] == (4 + 4) * EXPERT and read["experts"] == (2 + 3) * EXPERT
    assert read["other"] == DENSE + 2 * ROUTER + EMBEDDING


def test_layers_for_multi_token_prediction_are_not_read(tmp_path):
    full = np.array([0, 4, 0], np.int32)
    keys = plan_keys((0, 2, 0), expert_used_count_full=full, sensitivity=np.array([9.0, 8, 7, 6]))
    keys += [("deepseek.nextn_predict_layers", 1)]
    read = report.build(write_gguf(tmp_path / "m.gguf", keys=keys))["plan"]["bytes_per_token"]
    assert (read["experts"], read["experts_full"]) == (2 * EXPERT, 4 * EXPERT)
    assert read["other"] == DENSE + ROUTER + EMBEDDING


def add_tensors(path, names):
    """The file again with more tensors, [8, 4, 32] floats each."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(path.with_suffix(".more"), "deepseek")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            value, kind = field.contents(), field.types[0]
            sub_type = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, value, kind, sub_type=sub_type)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    for name in names:
        writer.add_tensor(name, np.ones((8, 4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(path.with_suffix(".more"), path)
    return path


def test_an_embedding_that_is_not_the_output_is_a_row_lookup(tmp_path):
    path = add_tensors(write_gguf(tmp_path / "m.gguf", keys=plan_keys()), ["output.weight"])
    read = report.build(path)["plan"]["bytes_per_token"]
    assert read["other"] == DENSE + 2 * ROUTER + 8 * EXPERT  # the output matrix is as large as 8 experts


def test_experts_given_by_the_token_id_are_read_whatever_the_plan(tmp_path):
    full = np.array([0, 0, 4], np.int32)
    keys = plan_keys((0, 0, 3), expert_used_count_full=full, sensitivity=np.array([5.0, 4, 3, 2]))
    path = add_tensors(write_gguf(tmp_path / "m.gguf", keys=keys), ["blk.1.ffn_gate_tid2eid.weight"])
    read = report.build(path)["plan"]["bytes_per_token"]
    assert (read["experts"], read["experts_full"]) == (3 * EXPERT, 4 * EXPERT)
    assert read["other"] == DENSE + 2 * ROUTER + EMBEDDING + 4 * EXPERT


def test_share_of_the_cost_where_layers_cost_differently(tmp_path):
    keys = [*plan_keys(cost=np.array([7.0, 1.0, 3.0])), ("allocmoe.cost.unit", "ms")]
    path = write_gguf(tmp_path / "m.gguf", keys=keys)
    spent, full = 2 * 1 + 3 * 3, 4 * 1 + 4 * 3
    assert report.build(path)["plan"]["cost"] == {"unit": "ms", "spent": spent, "full": full, "share": spent / full}
    assert "11 of 16 ms per token for experts (68.8%)" in run(path).stdout


HELD_OUT = {
    "held_out.n_tokens": 512,
    "held_out.perplexity": np.array([10.5, 14.25, 12.0]),
    "held_out.kl": np.array([0.5, 0.25]),
}


def test_held_out_figures(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", keys=plan_keys(**HELD_OUT))
    assert report.build(path)["held_out"] == {
        "n_tokens": 512, "full": 10.5, "uniform": 14.25, "plan": 12.0, "kl_uniform": 0.5, "kl_plan": 0.25
    }  # fmt: skip
    shown = " ".join(run(path).stdout.split())
    assert "perplexity on 512 tokens: full 10.50, uniform 14.25, plan 12.00" in shown
    assert "uniform 0.5000, plan 0.2500" in shown


def test_plan_alone(planned_path, tmp_path, capfd, book):
    """A side file says of the plan what the model's file says, of the model its name, and runs nothing."""
    model = metadata.read(planned_path)
    side = tmp_path / "plan.gguf"
    metadata.write_side_file(side, model, model.plan, model.profile)
    found, whole = strict_json(run(side, "--json").stdout), strict_json(run(planned_path, "--json").stdout)
    assert found["file"]["kind"] == "plan"
    assert found["model"] == {key: whole["model"][key] for key in ("name", "architecture")}
    assert found["plan"] == {**whole["plan"], "bytes_per_token": None}
    for part in ("profile", "held_out", "predicted_curve"):
        assert found[part] == whole[part]
    shown = run(side).stdout
    assert "180 of 360" in shown and shown.count(" of 12  ") == 30 and "plan alone" in shown
    assert inspect(capfd, side, "--plot", tmp_path / "p.html")[0] == 0
    code, _, err = inspect(capfd, side, "--measure-curve", book)
    assert code == 1 and "a plan alone" in err


def test_predicted_curve(planned_path):
    """Its ends are known; between them the plan is the one that the profile makes, and uniform k is never better."""
    found, model = report.build(planned_path), metadata.read(planned_path)
    curve, S = found["predicted_curve"], found["profile"]["sensitivity"]
    assert curve[0]["budget_total"] == 30 and curve[-1]["budget_total"] == 360
    assert curve[0]["damage"] == pytest.approx(sum(row[0] - row[-1] for row in S), rel=1e-12)
    assert curve[-1]["damage"] == curve[-1]["damage_uniform"] == 0
    middle = curve[len(curve) // 2]
    counts = model.profile.plan(middle["budget_total"], model.full).expert_used_count
    assert middle["damage"] == pytest.approx(sum(row[k - 1] - row[-1] for row, k in zip(S, counts)), rel=1e-12)
    assert all(point["damage"] <= point["damage_uniform"] + 1e-9 for point in curve)


def test_thresholds_are_null_where_none_decides(tmp_path):
    table = np.array([np.inf, 0.3, 0.2, -np.inf] * 2, np.float32)
    keys = plan_keys(token_rule="threshold", threshold=np.array([0, 0.3, 0.2], np.float32), threshold_table=table)
    found = strict_json(run(write_gguf(tmp_path / "m.gguf", keys=keys), "--json").stdout)
    assert found["plan"]["threshold"] == pytest.approx([0, 0.3, 0.2])  # float32
    assert found["profile"]["threshold_table"][1] == [None, pytest.approx(0.3), pytest.approx(0.2), None]
    assert found["plan"]["token_rule"] == "threshold"


def test_text_has_a_bar_per_layer(planned_path):
    done = run(planned_path, env={**os.environ, "COLUMNS": "80", "PYTHONIOENCODING": "utf-8"})
    assert done.returncode == 0 and done.stderr == ""
    planned = metadata.read(planned_path).plan.expert_used_count
    lines = [line for line in done.stdout.splitlines() if " of 12  " in line]
    assert len(lines) == 30
    for il, (line, k) in enumerate(zip(lines, planned)):
        assert line.split()[:4] == [str(il), str(k), "of", "12"]
        assert line.count("█") / (line.count("█") + line.count("░")) == k / 12
    # what its profile says: S[l,1] - S[l,12] = l + 1
    assert lines[4].split()[-1] == "+5"
    for expected in ("180 of 360", "77.9%", "of the experts 50.0%", "made up for a test", "deepseek, 134.7 M"):
        assert expected in done.stdout, expected


def test_ascii_terminal_gets_ascii(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", keys=[*plan_keys(), ("general.name", "Modèle")])
    done = run(path, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and done.stdout.isascii()
    assert "Mod?le" in done.stdout and "    1  2 of 4  " + 6 * "#" + 6 * "." in done.stdout


@pytest.mark.parametrize("width", [40, 57, 80, 200])
def test_text_fits_the_terminal(planned_path, tmp_path, width):
    many = write_gguf(tmp_path / "m.gguf", n_layer=2, expert_count=300, expert_used_count=256, dense_layers=())
    for path in (planned_path, many):
        found = report.build(path)
        found["plan"] = found["plan"] or {
            **report.build(planned_path)["plan"], "experts_per_token": [1, 200], "experts_per_token_full": [256, 256]
        }  # fmt: skip
        lines = text.render(found, width, unicode=True).splitlines()
        shown = [line for line in lines if not line.startswith(("file", "     "))]  # a path cannot be broken
        assert max(map(len, shown)) <= width


def test_control_characters_in_a_name_do_not_reach_the_terminal(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", keys=[("general.name", "evil \x1b[2J\x07 name")])
    shown = run(path).stdout
    assert "evil ?[2J? name" in shown and "\x1b" not in shown


def test_unplanned_model(testbed_path):
    done = run(testbed_path)
    assert done.returncode == 0 and "allocmoe-convert" in done.stdout
    assert "12 of 12 per token, and 4 shared" in done.stdout
    found = strict_json(run(testbed_path, "--json").stdout)
    assert found["plan"] is None and found["profile"] is None and found["predicted_curve"] is None


def test_dense_model(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", expert_count=0)
    done = run(path)
    assert done.returncode == 0 and "dense model" in done.stdout and "F32 100%" in done.stdout
    found = strict_json(run(path, "--json").stdout)
    assert (found["model"]["experts"], found["model"]["moe_layers"], found["plan"]) == (0, 0, None)


def test_plan_without_a_profile(tmp_path):
    keys = plan_keys(sensitivity=None, cost=None, allocation=None)
    done = run(write_gguf(tmp_path / "m.gguf", keys=keys))
    assert done.returncode == 0 and "5 of 8 expert activations" in done.stdout and "sensitivity" not in done.stdout


def test_split_model(tmp_path):
    paths = [tmp_path / f"m-0000{i}-of-00002.gguf" for i in (1, 2)]
    for i, path in enumerate(paths):
        writer = gguf.GGUFWriter(str(path), "deepseek")
        writer.add_uint16("split.no", i)
        writer.add_uint16("split.count", 2)
        if i == 0:
            writer.add_block_count(2)
            writer.add_expert_count(8)
            writer.add_expert_used_count(4)
            writer.add_tensor("token_embd.weight", np.ones((2, 32), np.float32))
        writer.add_tensor(f"blk.{i}.ffn_gate_inp.weight", np.ones((8, 32), np.float32))
        writer.add_tensor(f"blk.{i}.ffn_down_exps.weight", np.ones((8, 4, 32), np.float16))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    found = strict_json(run(paths[0], "--json").stdout)
    assert found["file"]["n_files"] == 2 and found["file"]["bytes"] == sum(path.stat().st_size for path in paths)
    assert found["model"]["experts_per_token"] == [4, 4]
    assert found["model"]["types"]["experts"] == {"F16": {"tensors": 2, "parameters": 2048, "bytes": 4096}}
    assert "in 2 files" in run(paths[0]).stdout
    second = run(paths[1])
    assert second.returncode == 1 and len(second.stderr.splitlines()) == 1


def test_reader_that_stops_reading(planned_path):
    pipe = f"{COMMAND} {planned_path} --json | head -c 1"
    done = subprocess.run(pipe, shell=True, capture_output=True, text=True)
    assert done.stdout == "{" and done.stderr == ""


# --- figures


@pytest.mark.parametrize("suffix", [".png", ".svg", ".html"])
def test_plot(planned_path, tmp_path, capfd, suffix):
    target = tmp_path / f"plan{suffix}"
    target.write_text("old")
    code, out, err = inspect(capfd, planned_path, "--plot", target)
    assert (code, err) == (0, "") and "180 of 360" in out
    assert os.listdir(tmp_path) == [target.name]
    data = target.read_bytes()
    if suffix == ".png":
        assert data.startswith(PNG) and len(data) > 20_000
        return
    page = data.decode()
    if suffix == ".svg":
        assert xml.etree.ElementTree.fromstring(page).tag.endswith("svg")
    else:
        assert page.startswith("<!DOCTYPE html>") and page.count("<svg") == 1
        assert "<th>budget</th><td>0.50: 180 of 360 expert activations" in page
    # it stands alone: every reference is to a part of itself
    assert not re.search(r"<(script|link|iframe)\b|@import|url\((?!#)", page)
    references = re.findall(r"\b(?:href|src)\s*=\s*\"([^\"]*)", page)
    assert references and all(reference.startswith(("#", "data:image/png;base64,")) for reference in references)


def test_figure_shows_the_numbers(planned_path):
    found = report.build(planned_path)
    found["measured_curve"] = {
        "source": "a.txt",
        "n_tokens": 8,
        "points": [{"budget": b, "budget_total": 1, "plan": 30 - b, "uniform": 31 - b} for b in (0.5, 1.0)],
    }
    axes = plot.draw(found).axes
    heat, bars, curve = axes[:3]
    S = found["profile"]["sensitivity"]
    cells = heat.collections[0].get_array().reshape(12, 30)
    assert cells[0, 29] == pytest.approx(S[29][0] - S[29][-1], rel=1e-12)
    assert cells[5, 10] == pytest.approx(S[10][5] - S[10][-1], rel=1e-12)
    np.testing.assert_array_equal(heat.get_lines()[0].get_ydata(), found["plan"]["experts_per_token"])
    heights = [patch.get_height() for patch in bars.patches]
    assert heights == [12] * 30 + found["plan"]["experts_per_token"]
    uniform, plan = curve.get_lines()[:2]
    assert uniform.get_xydata().tolist() == [[50, 30.5], [100, 30]]
    assert plan.get_xydata().tolist() == [[50, 29.5], [100, 29]]


def test_one_huge_cell_does_not_hide_the_others(planned_path):
    found = report.build(planned_path)
    found["profile"]["sensitivity"][0][0] = 1e6
    mesh = plot.draw(found).axes[0].collections[0]
    cells, norm = mesh.get_array().reshape(12, 30), mesh.norm
    assert cells[0, 0] > norm.vmax  # off the scale, in a colour of its own
    assert mesh.cmap(norm(cells[0, 0])) == (0, 0, 0, 1)
    middle = norm(cells[3, 1:29])
    assert middle.max() - middle.min() > 0.2


def test_profile_in_which_nothing_costs_anything(tmp_path, capfd):
    path = write_gguf(tmp_path / "m.gguf", keys=plan_keys(sensitivity=np.ones(8)))
    assert inspect(capfd, path, "--plot", tmp_path / "m.png")[0] == 0
    assert (tmp_path / "m.png").read_bytes().startswith(PNG)


def test_names_are_text_in_figures_and_pages(tmp_path, capfd):
    """Neither mathematics (an odd $ is an error there) nor markup."""
    name = "50$ <script>alert(1)</script> \\frac 日本 \x1b[2J"
    path = write_gguf(tmp_path / "m.gguf", keys=[*plan_keys(), ("general.name", name)])
    for suffix in ("png", "svg", "html"):
        code, _, err = inspect(capfd, path, "--plot", tmp_path / f"m.{suffix}")
        assert (code, err) == (0, ""), suffix
    xml.etree.ElementTree.parse(tmp_path / "m.svg")
    assert "<script" not in (tmp_path / "m.html").read_text()


def test_matplotlib_is_missing(planned_path, tmp_path, capfd, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, err = inspect(capfd, planned_path, "--plot", tmp_path / "p.png")
    assert (code, out) == (1, "") and 'pip install "allocmoe-edge[plot]"' in err
    assert not os.listdir(tmp_path)
    assert inspect(capfd, planned_path)[0] == 0  # all the rest works without


@pytest.mark.parametrize("name, message", [("p.pdf", "ends in .png, .svg or .html"), ("none/p.png", "no such folder")])
def test_plot_that_cannot_be_written(planned_path, tmp_path, capfd, name, message):
    code, out, err = inspect(capfd, planned_path, "--plot", tmp_path / name)
    assert (code, out) == (1, "") and message in err and len(err.splitlines()) == 1


def test_disk_full_while_plotting(planned_path, tmp_path):
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); import signal;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); sys.dont_write_bytecode = True;"
        "from allocmoe_edge.inspect.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    (tmp_path / "p.png").write_text("old")
    command = [sys.executable, "-c", script, planned_path, "--plot", tmp_path / "p.png"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "could not be written" in done.stderr
    assert os.listdir(tmp_path) == ["p.png"] and (tmp_path / "p.png").read_text() == "old"


def test_nothing_to_draw(testbed_path, tmp_path, capfd):
    code, _, err = inspect(capfd, testbed_path, "--plot", tmp_path / "p.png")
    assert code == 1 and "nothing to draw" in err


# --- measurements


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text("The quick brown fox jumps over the lazy dog, and then it rests for a while. " * 40)
    return path


def test_measured_curve(planned_path, book, tmp_path):
    options = ["--budgets", "100%,180", "--ctx-size", "32", "--tokens", "64", "--threads", "2"]
    done = run(planned_path, "--json", "--measure-curve", book, "--plot", tmp_path / "p.png", *options)
    assert done.returncode == 0, done.stderr
    curve = strict_json(done.stdout)["measured_curve"]
    assert (curve["source"], curve["n_tokens"], curve["n_ctx"]) == ("book.txt", 64, 32)
    half, whole = curve["points"]
    assert (half["budget_total"], half["budget"], whole["budget_total"]) == (180, 0.5, 360)
    assert whole["plan"] == whole["uniform"] < half["plan"]

    llm = Llama(str(planned_path), n_ctx=32, n_batch=32, n_threads=2, verbose=False)
    windows = measure.read_windows(llm, book, 64, 32)
    # the file's plan is in force; the same computation in another process, so equal up to threads' summation order
    assert half["plan"] == pytest.approx(perplexity(llm, windows), rel=1e-5)
    llm.set_plan(Plan.uniform((12,) * 30, 180))
    assert half["uniform"] == pytest.approx(perplexity(llm, windows), rel=1e-5)
    assert (tmp_path / "p.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    "content, message",
    [(None, "No such file"), (b"\xff\xfe\x00text", "not UTF-8"), (b"too short", "want at least 32")],
    ids=["missing", "binary", "short"],
)
def test_text_that_cannot_be_measured_on(planned_path, tmp_path, capfd, content, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    code, out, err = inspect(capfd, planned_path, "--measure-curve", path, "--ctx-size", "32", "--threads", "2")
    assert (code, out) == (1, "") and message in err and len(err.splitlines()) == 1


def test_budget_that_the_model_cannot_have(planned_path, book, capfd):
    code, _, err = inspect(capfd, planned_path, "--measure-curve", book, "--budgets", "50%,3")
    assert code == 1 and "budget: found '3'" in err


def test_budgets_by_name(planned_path, testbed_path, book, capfd):
    options = ["--measure-curve", book, "--ctx-size", "32", "--tokens", "32", "--threads", "1", "--budgets"]
    code, out, err = inspect(capfd, planned_path, "--json", *options, "fast, 180,balanced")
    assert code == 0, err
    assert [point["budget_total"] for point in strict_json(out)["measured_curve"]["points"]] == [120, 180]
    code, _, err = inspect(capfd, testbed_path, *options, "fast")
    assert code == 1 and "convert it first" in err and len(err.splitlines()) == 1


def test_dense_model_cannot_be_measured(tmp_path, book, capfd):
    code, _, err = inspect(capfd, write_gguf(tmp_path / "m.gguf", expert_count=0), "--measure-curve", book)
    assert code == 1 and "dense model" in err


def test_model_that_llama_cpp_cannot_load(tmp_path, book):
    done = run(write_gguf(tmp_path / "m.gguf"), "--measure-curve", book)
    assert done.returncode == 1 and "llama.cpp cannot load it" in done.stderr and "Traceback" not in done.stderr


# --- hostile files


def test_every_truncation_is_one_line(tmp_path, capfd):
    whole = write_gguf(tmp_path / "m.gguf", keys=plan_keys()).read_bytes()
    for length in [*range(0, 2048, 97), *range(2048, len(whole), 701), len(whole) - 1]:
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        code, out, err = inspect(capfd, tmp_path / "cut.gguf")
        assert (code, out) == (1, ""), length
        assert err.splitlines()[-1].startswith("allocmoe-inspect: error: "), length


@pytest.mark.parametrize(
    "keys",
    [
        [("general.name", 5)],
        [("general.name", np.array([1, 2], np.int32))],
        [("deepseek.context_length", "long")],
        [("deepseek.expert_shared_count", np.array([1], np.int32))],
        [("deepseek.nextn_predict_layers", "1")],
        [("split.count", "two")],
        [("split.count", 2)],
        plan_keys(version="1"),
        plan_keys(token_rule=3),
        plan_keys(k_base="one"),
        plan_keys(sensitivity="high"),
        plan_keys(cost=np.array([1.0, np.nan, 1.0])),
        plan_keys(version=np.array([1, 2], np.int32)),
        plan_keys(token_rule=np.array([1, 2], np.int32)),
        plan_keys(allocation=np.array([1, 2], np.int32)),
        [("general.type", "allocmoe-plan")],
        [("general.type", "allocmoe-plan"), *plan_keys(expert_used_count_full=np.array([-1], np.int32))],
        plan_keys(**{"held_out.n_tokens": 5}),
        plan_keys(**{**HELD_OUT, "held_out.n_tokens": "many"}),
        plan_keys(**{**HELD_OUT, "held_out.perplexity": np.array([1.0, 2.0, np.nan])}),
        [*plan_keys(), ("allocmoe.calibration.n_tokens", "many")],
        [*plan_keys(), ("allocmoe.calibration.n_tokens", np.array([1, 2], np.int32))],
    ],
)
def test_wrong_types_are_one_line(tmp_path, capfd, keys):
    code, out, err = inspect(capfd, write_gguf(tmp_path / "m.gguf", keys=keys))
    assert (code, out) == (1, "") and len(err.splitlines()) == 1
    assert err.startswith("allocmoe-inspect: error: ") and "m.gguf" in err


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip", b"GGUF\x03\x00\x00\x00" + b"\xff" * 100])
def test_not_a_gguf(tmp_path, content):
    (tmp_path / "m.gguf").write_bytes(content)
    done = run(tmp_path / "m.gguf")
    assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr


def test_missing_file(tmp_path):
    done = run(tmp_path / "none.gguf")
    assert done.returncode == 1 and "no such file" in done.stderr


def test_tensor_types_are_ggmls(tmp_path):
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    writer.add_block_count(1)
    writer.add_tensor("blk.0.ffn_down.weight", np.zeros((4, 144), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q4_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GGUFFile(tmp_path / "m.gguf") as file:
        assert file.tensors == [("blk.0.ffn_down.weight", 0, 4 * 144, 4 * 256, "Q4_K")]

"""The allocmoe.* keys: what is written is read back, and one test per malformed file."""

from dataclasses import replace
from pathlib import Path

from allocmoe_edge import GGUFError, Plan, PlanError
from allocmoe_edge.gguf_file import GGUFFile
from allocmoe_edge.plan import metadata
from gguf_factory import plan_keys, write_gguf
import numpy as np
import pytest


def test_reads_experts_per_layer(tmp_path):
    model = metadata.read(write_gguf(tmp_path / "m.gguf"))
    assert model.full == (0, 4, 4)
    assert model.plan is None and model.profile is None


def test_reads_per_layer_expert_used_count(tmp_path):
    keys = [("deepseek.expert_used_count", np.array([4, 3, 2], np.int32))]
    assert metadata.read(write_gguf(tmp_path / "m.gguf", expert_used_count=None, keys=keys)).full == (0, 3, 2)


def test_dense_model_has_no_experts(tmp_path):
    assert metadata.read(write_gguf(tmp_path / "m.gguf", expert_count=0)).full is None


def test_what_is_written_is_read_back(tmp_path):
    source = write_gguf(tmp_path / "m.gguf", keys=plan_keys())
    before = metadata.read(source)
    with GGUFFile(source) as file:
        metadata.write(file, Plan((0, 1, 4), (0, 4, 4)), before.profile)
        file.write_metadata(tmp_path / "meta.gguf")
    # a file with metadata alone is read through the same door as soon as its tensors are there
    with open(source, "rb") as data, open(tmp_path / "meta.gguf", "ab") as copy:
        with GGUFFile(source) as file:
            data.seek(file.data_offset)
        copy.write(data.read())
    after = metadata.read(tmp_path / "meta.gguf")
    assert after.plan == Plan((0, 1, 4), (0, 4, 4))
    assert [row.tolist() for row in after.profile.sensitivity] == [[], [9, 8, 7, 6], [5, 4, 3, 2]]
    assert after.profile.plan(1.0, after.full).budget_total == 8


def test_plan_that_goes_by_other_values_is_not_written(tmp_path):
    """They serve comparison with other methods: no file has them."""
    model = metadata.read(write_gguf(tmp_path / "m.gguf", keys=plan_keys()))
    plan = replace(model.profile.plan(6, model.full, "batch"), value="relative")
    with pytest.raises(PlanError, match="value: found 'relative'"):
        metadata.write_side_file(tmp_path / "plan.gguf", model, plan, model.profile)
    assert not (tmp_path / "plan.gguf").exists()


HELD_OUT = {"held_out.n_tokens": 9, "held_out.perplexity": np.array([9.0, 12.0, 10.0])}


@pytest.mark.parametrize(
    "keys, message",
    [
        (plan_keys(version=1), "allocmoe.version is 1, this allocmoe-edge reads version 2: convert it again"),
        (plan_keys(version="2"), "allocmoe.version is '2'"),
        (plan_keys(expert_used_count_full=None), "expert_used_count_full: found nothing"),
        (plan_keys(expert_used_count_full=np.array([0, 4, 3], np.int32)), "found [0, 4, 3], want the model's own"),
        (
            plan_keys(**{"table.expert_used_count": np.zeros(21, np.int32)}),
            "table.expert_used_count: found int32 array",
        ),
        (plan_keys(expert_used_count=None), "expert_used_count: found nothing"),
        (plan_keys(expert_used_count="0 2 3"), "expert_used_count: found '0 2 3'"),
        (plan_keys(expert_used_count=np.array([0, 2, 3], np.float32)), "found float32 array, want an array of int32"),
        (plan_keys((0, 2)), "found 2 entries, want 3"),
        (plan_keys((0, 2, 3, 3)), "found 4 entries, want 3"),
        (plan_keys((0, 2, 0)), "layer 2: found 0, want 1 to 4"),
        (plan_keys((0, 2, 5)), "layer 2: found 5, want 1 to 4"),
        (plan_keys((0, -1, 3)), "layer 1: found -1, want 1 to 4"),
        (plan_keys((1, 2, 3)), "layer 0: found 1, want 0"),
        (plan_keys(token_rule="best"), "token_rule: found 'best'"),
        (plan_keys(sensitivity=np.array([1.0, 2.0])), "sensitivity: found 2 entries, want 8"),
        (plan_keys(sensitivity=np.array([9.0, 8, 7, np.nan, 5, 4, 3, 2])), "sensitivity: found NaN"),
        (plan_keys(sensitivity=np.array([9.0, 8, 7, np.inf, 5, 4, 3, 2])), "sensitivity: found NaN or infinity"),
        (plan_keys(cost=np.array([1.0, 1.0])), "cost: found 2 entries, want 3"),
        (plan_keys(cost=np.array([1.0, 0.0, 1.0])), "cost: found an entry that is not a positive number"),
        (plan_keys(cost=None), "cost: found nothing"),
        (plan_keys(allocation="magic"), "allocation: found 'magic'"),
        (plan_keys(**{"held_out.n_tokens": 9}), "held_out.perplexity: found nothing"),
        (plan_keys(**HELD_OUT, **{"held_out.kl": np.ones(3)}), "held_out.kl: found 3 entries, want 2"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_malformed_plan_is_refused(tmp_path, keys, message):
    path = write_gguf(tmp_path / "m.gguf", keys=keys)
    with pytest.raises(PlanError, match="m.gguf") as error:
        metadata.read(path)
    assert message in str(error.value)


def test_plan_in_a_dense_model_is_refused(tmp_path):
    with pytest.raises(PlanError, match="no experts"):
        metadata.read(write_gguf(tmp_path / "m.gguf", expert_count=0, keys=plan_keys()))


def test_missing_file(tmp_path):
    with pytest.raises(GGUFError, match="no such file"):
        metadata.read(tmp_path / "none.gguf")


def test_folder_instead_of_file(tmp_path):
    with pytest.raises(GGUFError, match="a folder; of a model"):
        metadata.read(tmp_path)


def test_not_gguf(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"PK\x03\x04 a zip by its looks")
    with pytest.raises(GGUFError, match="not a GGUF file"):
        metadata.read(tmp_path / "m.gguf")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no file here that opens and cannot be read")
def test_file_that_cannot_be_read():
    with pytest.raises(GGUFError, match="/proc/self/mem: cannot be read: Input/output error"):
        GGUFFile("/proc/self/mem")


def test_empty_file(tmp_path):
    (tmp_path / "m.gguf").touch()
    with pytest.raises(GGUFError, match="not a GGUF file"):
        metadata.read(tmp_path / "m.gguf")


def test_more_experts_used_than_there_are(tmp_path):
    with pytest.raises(GGUFError, match="expert_used_count is 9 in layer 0, wanted 0 to 8"):
        metadata.read(write_gguf(tmp_path / "m.gguf", expert_used_count=9))


def test_missing_expert_used_count(tmp_path):
    with pytest.raises(GGUFError, match="deepseek.expert_used_count is missing"):
        metadata.read(write_gguf(tmp_path / "m.gguf", expert_used_count=None))


def test_every_truncation_is_an_error(tmp_path):
    """Cut anywhere, in the header, a key, the tensor table or the data: a clear error, never a crash."""
    whole = write_gguf(tmp_path / "m.gguf", keys=plan_keys()).read_bytes()
    for length in [*range(0, 2048, 37), *range(2048, len(whole), 509), len(whole) - 1]:
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(GGUFError):
            metadata.read(tmp_path / "cut.gguf")


def test_flipped_bytes_never_crash(tmp_path):
    """Any byte of the metadata changed: read or refused with one of our errors."""
    whole = bytearray(write_gguf(tmp_path / "m.gguf", keys=plan_keys()).read_bytes())
    rng = np.random.default_rng(0)
    refused = 0
    for position in rng.integers(4, 2000, 400):
        hurt = whole.copy()
        hurt[position] ^= 1 << rng.integers(8)
        (tmp_path / "hurt.gguf").write_bytes(hurt)
        try:
            metadata.read(tmp_path / "hurt.gguf")
        except (GGUFError, PlanError):
            refused += 1
    assert refused > 20


def test_split_model_finds_experts_in_every_shard(tmp_path):
    """Layer 2's experts lie in the second file; the plan's keys are read from the first."""
    import gguf

    for number, layer in ((1, 1), (2, 2)):
        writer = gguf.GGUFWriter(str(tmp_path / f"m-0000{number}-of-00002.gguf"), "deepseek")
        writer.add_block_count(3)
        writer.add_expert_count(8)
        writer.add_expert_used_count(4)
        writer.add_uint16("split.count", 2)
        writer.add_tensor(f"blk.{layer}.ffn_gate_inp.weight", np.ones((8, 32), np.float32))
        writer.add_tensor(f"blk.{layer}.ffn_down_exps.weight", np.ones((8, 4, 32), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    assert metadata.read(tmp_path / "m-00001-of-00002.gguf").full == (0, 4, 4)
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(GGUFError, match="m-00002-of-00002.gguf: no such file"):
        metadata.read(tmp_path / "m-00001-of-00002.gguf")


def test_layers_that_predict_further_tokens_have_no_budget(tmp_path):
    """As in GLM-4.5 and DeepSeek-V3: their experts are in the file, and llama.cpp does not load them."""
    path = write_gguf(tmp_path / "m.gguf", keys=[("deepseek.nextn_predict_layers", 1)])
    assert metadata.read(path).full == (0, 4, 0)


def test_held_out_figures(tmp_path):
    keys = plan_keys(**HELD_OUT, **{"held_out.kl": np.array([0.2, 0.1])})
    found = metadata.read(write_gguf(tmp_path / "m.gguf", keys=keys)).profile.held_out
    assert found == metadata.HeldOut(9, full=9.0, uniform=12.0, plan=10.0, kl_uniform=0.2, kl_plan=0.1)


def test_cost_of_a_layer_without_experts_does_not_matter(tmp_path):
    keys = plan_keys(cost=np.array([0.0, 0.5, 1.5]), **{"cost.unit": "ms"})
    profile = metadata.read(write_gguf(tmp_path / "m.gguf", keys=keys)).profile
    assert profile.cost == (0.0, 0.5, 1.5) and profile.cost_unit == "ms"
    # half of 4 x 0.5 + 4 x 1.5 ms; S falls by 1 an expert in both layers, and the first one's cost less
    assert profile.plan(0.5, (0, 4, 4)).expert_used_count == (0, 4, 1)


@pytest.mark.parametrize(
    "keys, message",
    [
        ([], "allocmoe.version is None"),
        ([("allocmoe.expert_used_count_full", np.array([0, 4, 4], np.int32))], "allocmoe.version is None"),
        (plan_keys(expert_used_count_full=None), "allocmoe.expert_used_count_full is missing"),
        (
            plan_keys(expert_used_count_full=np.array([0, 0, 0], np.int32)),
            "no routed experts|at least one layer",
        ),
        (plan_keys(expert_used_count_full=np.array([0, 1, 4], np.int32)), "layer 1: found 2"),
    ],
)
def test_malformed_side_file_is_refused(tmp_path, keys, message):
    path = write_gguf(tmp_path / "p.gguf", keys=[("general.type", "allocmoe-plan"), *keys])
    with pytest.raises(PlanError, match=message):
        metadata.read(path)


def test_layers_that_predict_further_tokens_have_no_say(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", keys=[("deepseek.nextn_predict_layers", 1)])
    assert metadata.read(path).full == (0, 4, 0)

"""The checkpoint of a conversion: what it keeps, what it takes for its own, and what it does when a disk is full."""

import resource

from allocmoe_edge.convert import ConvertError
from allocmoe_edge.convert.checkpoint import Checkpoint
from allocmoe_edge.gguf_file import fingerprint
from gguf_factory import write_gguf
import numpy as np
import pytest


@pytest.fixture
def model(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("model") / "m.gguf")


@pytest.fixture
def other(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("other") / "m.gguf", expert_count=4)


def test_checkpoint_keeps_what_was_put(model, tmp_path):
    path = tmp_path / "c"
    with Checkpoint(path, model) as checkpoint:
        checkpoint.put("a", [1.5, 2.0])
        checkpoint.put("b", {"x": [1]})
    with open(path, "a") as file:
        file.write('{"name": "half')
    with Checkpoint(path, model) as checkpoint:
        assert (
            checkpoint.get("a") == [1.5, 2.0] and checkpoint.get("b") == {"x": [1]} and checkpoint.get("half") is None
        )
        checkpoint.put("c", [3])
    with Checkpoint(path, model) as checkpoint:
        assert checkpoint.get("c") == [3] and not checkpoint.restarted


def test_checkpoint_of_another_model_is_started_anew(model, other, tmp_path):
    assert fingerprint(model) != fingerprint(other)
    with Checkpoint(tmp_path / "c", model) as checkpoint:
        checkpoint.put("a", [1])
    with Checkpoint(tmp_path / "c", other) as checkpoint:
        assert checkpoint.restarted and checkpoint.get("a") is None


def test_checkpoint_does_not_take_a_file_of_something_else(model, tmp_path):
    (tmp_path / "c").write_text("my diary")
    with pytest.raises(ConvertError, match="move it away"):
        Checkpoint(tmp_path / "c", model)
    assert (tmp_path / "c").read_text() == "my diary"


def test_checkpoint_whose_first_line_was_cut_short(model, tmp_path):
    """By a kill, or a full disk: there was nothing in it, and the same command begins."""
    with Checkpoint(tmp_path / "c", model) as checkpoint:
        checkpoint.put("a", [1])
        header = (tmp_path / "c").read_text().splitlines()[0]
    for n in range(len(header) + 1):
        (tmp_path / "c").write_text(header[:n])
        with Checkpoint(tmp_path / "c", model) as checkpoint:
            assert checkpoint.get("a") is None and not checkpoint.restarted
            checkpoint.put("a", [2])
        with Checkpoint(tmp_path / "c", model) as checkpoint:
            assert checkpoint.get("a") == [2]


def test_empty_checkpoint_is_removed(model, tmp_path):
    with Checkpoint(tmp_path / "c", model):
        assert (tmp_path / "c").exists()
    assert not (tmp_path / "c").exists()


def test_checkpoint_keeps_arrays_in_files(model, tmp_path, capsys):
    """Bit for bit, whatever their type and shape; written once and read, not computed, ever after."""
    arrays = {"a": np.array([[np.pi, -0.0], [np.nan, 1e-300]]), "b": np.arange(3, dtype=np.float16), "c": np.array(7)}
    with Checkpoint(tmp_path / "c", model) as checkpoint:
        assert checkpoint.arrays("stage", lambda: None) is None
        assert checkpoint.arrays("stage", lambda: arrays) is arrays
    assert (tmp_path / "c").stat().st_size < 500
    (file,) = (tmp_path / "c.arrays").iterdir()
    with Checkpoint(tmp_path / "c", model) as checkpoint:
        found = checkpoint.arrays("stage", lambda: 1 / 0)
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            assert found[name].dtype == array.dtype and found[name].tobytes() == array.tobytes()
        with pytest.raises(ZeroDivisionError):
            checkpoint.arrays("another stage", lambda: 1 / 0)
    # damaged, anywhere: computed again, and kept again
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[: len(whole) // 2], b"", whole.replace(arrays["a"].tobytes(), b"x" * 32), None):
        file.unlink() if damaged is None else file.write_bytes(damaged)
        with Checkpoint(tmp_path / "c", model) as checkpoint:
            assert checkpoint.arrays("stage", lambda: arrays) is arrays
        assert file.name + ": damaged" in capsys.readouterr().err
        assert file.read_bytes() == whole
    checkpoint.remove()
    assert list(tmp_path.iterdir()) == []


def test_checkpoint_of_another_model_loses_its_arrays(model, other, tmp_path):
    with Checkpoint(tmp_path / "c", model) as checkpoint:
        checkpoint.arrays("stage", lambda: {"a": np.ones(3)})
    with Checkpoint(tmp_path / "c", other) as checkpoint:
        assert checkpoint.restarted and not (tmp_path / "c.arrays").exists()


def test_checkpoint_on_a_full_disk(model, tmp_path, monkeypatch):
    """An error, no rest of the array; what was there before is read again."""
    with Checkpoint(tmp_path / "c", model) as checkpoint:
        checkpoint.put("a", [1])
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
        try:
            with pytest.raises(ConvertError, match="c.arrays.*File too large"):
                checkpoint.arrays("stage", lambda: {"a": np.ones(1000)})
            with pytest.raises(ConvertError, match="c: File too large"):
                checkpoint.put("b", list(range(1000)))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "c.arrays").iterdir()) == []
    with Checkpoint(tmp_path / "c", model) as checkpoint:
        assert checkpoint.get("a") == [1] and checkpoint.get("b") is None
        checkpoint.put("b", [2])
    with Checkpoint(tmp_path / "c", model) as checkpoint:
        assert checkpoint.get("b") == [2]

"""Quantisation through libllama, against gguf's own Python implementation of the types."""

from pathlib import Path
import re

from allocmoe_edge.convert import ConvertError, quantize
from allocmoe_edge.plan import metadata
import gguf
from gguf_factory import write_imatrix
import numpy as np
import pytest
from test_convert import refused, run

QUICK = ["--ctx-size", "32", "--calib-tokens", "64", "--token-rule", "off"]


def check_q8_0(path: Path, original: Path) -> None:
    """Every tensor is what gguf's own Python quantiser makes of the original, except those that upstream leaves alone."""
    before = {tensor.name: tensor for tensor in gguf.GGUFReader(original).tensors}
    after = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert before.keys() == after.keys()
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    for name, tensor in after.items():
        kept = len(tensor.shape) == 1 or "ffn_gate_inp.weight" in name
        assert (tensor.tensor_type != q8_0) == kept, name
        if not kept:
            np.testing.assert_array_equal(tensor.data, gguf.quants.quantize(before[name].data, q8_0), err_msg=name)


def test_gguf_is_quantised(tiny_planned, tiny, out):
    """And its sensitivities, which are those of other weights, are measured again."""
    done = run(tiny_planned, "--quantize", "Q8_0", *QUICK, "-o", out / "m.gguf")
    assert done.returncode == 0, done.stderr
    assert "passes" in done.stderr
    check_q8_0(out / "m.gguf", tiny.gguf_path)
    assert metadata.read(out / "m.gguf").profile.calibration.source == "self-generated, seed 0"


def test_split_is_quantised(tiny_split, tiny, out):
    quantize.quantize(tiny_split[0], out / "m.gguf", "Q8_0", n_threads=2, expected=1)
    check_q8_0(out / "m.gguf", tiny.gguf_path)


def tensor_types(path: Path) -> dict:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


def test_mixture_is_upstreams(tiny, out):
    quantize.quantize(tiny.gguf_path, out / "m.gguf", "Q4_K_M", n_threads=2, expected=1)
    types = tensor_types(out / "m.gguf")
    assert types["blk.1.ffn_gate_exps.weight"] == types["blk.1.attn_q.weight"] == "Q4_K"
    # upstream's rule for models of eight experts
    assert types["blk.1.attn_k.weight"] == types["blk.1.attn_v.weight"] == "Q8_0"
    assert types["blk.3.ffn_down_exps.weight"] == types["output.weight"] == "Q6_K"
    assert types["blk.1.ffn_gate_inp.weight"] == types["blk.1.attn_norm.weight"] == "F32"


@pytest.mark.parametrize(
    "name", ["IQ4_XS", "IQ2_XXS", *(pytest.param(n, marks=pytest.mark.slow) for n in quantize.FTYPES)]
)
def test_every_type(name, tiny, out):
    """Each name makes a file that says it is of that type, or asks for the importance matrix that it needs."""
    if re.fullmatch("IQ1_.*|IQ2_.*|IQ3_XX?S|Q2_K_S", name):
        with pytest.raises(ConvertError, match="--imatrix FILE"):
            quantize.quantize(tiny.gguf_path, out / "m.gguf", name, n_threads=2, expected=1)
    else:
        quantize.quantize(tiny.gguf_path, out / "m.gguf", name, n_threads=2, expected=1)
        assert gguf.GGUFReader(out / "m.gguf").get_field("general.file_type").contents() == quantize.FTYPES[name]


def test_type_names():
    assert quantize.ftype("q4_k_m") == quantize.ftype("Q4_K") == "Q4_K_M"
    with pytest.raises(ValueError, match="Q4_K_M"):
        quantize.ftype("Q4_KM")
    # against the sizes of Llama-3-8B (8.03e9 weights) in upstream's table, in GiB
    for name, size in (("Q4_K_M", 4.58), ("Q2_K", 2.96), ("Q6_K", 6.14), ("Q8_0", 7.96), ("Q3_K_L", 4.03)):
        assert size * 2**30 < quantize.n_bytes(8.03e9, name) < 1.4 * size * 2**30, name


def test_quantised_twice_only_on_request(tiny, out):
    quantize.quantize(tiny.gguf_path, out / "q8.gguf", "Q8_0", n_threads=2, expected=1)
    refused(out / "q8.gguf", "--quantize", "Q4_0", "-o", out / "m.gguf", expect="--allow-requantize")
    assert [path.name for path in out.iterdir()] == ["q8.gguf"]
    quantize.quantize(out / "q8.gguf", out / "q4.gguf", "Q4_0", n_threads=2, expected=1, allow_requantize=True)
    assert (out / "q4.gguf").stat().st_size < (out / "q8.gguf").stat().st_size


def test_importance_matrix_steers_the_rounding(tiny, out, tmp_path):
    """The columns that matter come out closer, in the expert that says so; an expert without counts has no say."""
    name = "blk.1.ffn_gate_exps.weight"
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tiny.gguf_path).tensors}
    n_expert, _, width = tensors[name].data.shape
    sums = np.ones((n_expert, width))
    sums[3, : width // 2] = 1000
    counts = np.full(n_expert, 10.0)
    counts[5] = 0
    imatrix = write_imatrix(tmp_path / "imatrix.gguf", {name: (sums * 10, counts)})
    read = quantize.read_imatrix(imatrix)[name].reshape(n_expert, width)
    assert read[3, 0] == 1000 and read[2, 0] == 1 and (read[5] == 1).all()

    errors = {}
    for matrix in (None, imatrix):
        quantize.quantize(tiny.gguf_path, out / "m.gguf", "Q4_0", n_threads=2, expected=1, imatrix=matrix)
        after = {tensor.name: tensor for tensor in gguf.GGUFReader(out / "m.gguf").tensors}
        found = gguf.quants.dequantize(after[name].data, after[name].tensor_type).reshape(n_expert, -1, width)
        errors[matrix] = ((found - tensors[name].data) ** 2).sum(1)
    assert errors[imatrix][3, : width // 2].sum() < 0.98 * errors[None][3, : width // 2].sum()
    assert gguf.GGUFReader(out / "m.gguf").get_field("quantize.imatrix.file").contents() == "imatrix.gguf"


def test_importance_matrix_of_another_model(tiny, out, tmp_path):
    imatrix = write_imatrix(tmp_path / "imatrix.gguf", {"blk.1.ffn_gate_exps.weight": (np.ones((8, 32)), np.ones(8))})
    refused(tiny.gguf_path, "--quantize", "Q4_0", "--imatrix", imatrix, "-o", out / "m.gguf", expect="imatrix size")
    assert list(out.iterdir()) == []


def test_damaged_importance_matrices(tmp_path):
    (tmp_path / "old.dat").write_bytes(b"\1\0\0\0")
    nan = write_imatrix(tmp_path / "nan.gguf", {"w": (np.full((1, 4), np.nan), np.ones(1))})
    odd = write_imatrix(tmp_path / "odd.gguf", {"w": (np.ones((1, 4)), np.ones(3))})
    for path, expect in ((tmp_path / "old.dat", "not a GGUF"), (nan, "not finite"), (odd, "do not fit")):
        with pytest.raises(ConvertError, match=expect):
            quantize.read_imatrix(path)

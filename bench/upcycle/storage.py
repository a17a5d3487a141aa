"""What training changed, in a small file: an .npz of routers, norms, the neurons' order, and low-rank factors in 8 bits.

| array | type, shape | meaning |
| --- | --- | --- |
| settings | string | JSON: sizes, as `model.Sizes` names them, and what the trainer says about the run |
| orders | int16 [n_layer, n_ff] | neuron i of the file is the dense model's neuron orders[i] |
| router | float16 [n_layer, n_expert, n_embd] | |
| attn_norm, ffn_norm, output_norm | float32 [n_layer, n_embd] (output_norm [n_embd]) | in place of the dense model's |
| M_a, M_b, for each matrix M | int8 [n_layer, rank, n_in], [n_layer, n_out, rank] | the factors: M becomes M + b @ a |
| M_a_scale, M_b_scale | float32 [n_layer, rank] | of a's rows, of b's columns |
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
import json
import os
from pathlib import Path

import numpy as np

MATRICES = ("ffn_gate", "ffn_up", "ffn_down", "attn_q", "attn_k", "attn_v", "attn_output")
NORMS = ("attn_norm", "ffn_norm")


@dataclass(frozen=True)
class Stored:
    """A file's content. sizes: keyword arguments of `model.Sizes`; factors: (a, b) by matrix, all layers, F32."""

    sizes: dict
    about: dict
    orders: np.ndarray
    router: np.ndarray
    norms: dict[str, np.ndarray]
    factors: dict[str, tuple[np.ndarray, np.ndarray]]


def read(path: Path) -> Stored:
    """Raises ValueError for a file that is not of this kind."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        settings = json.loads(str(arrays["settings"]))
        factors = {}
        for name in MATRICES:
            a = arrays[f"{name}_a"].astype(np.float32) * arrays[f"{name}_a_scale"][:, :, None]
            factors[name] = (a, arrays[f"{name}_b"].astype(np.float32) * arrays[f"{name}_b_scale"][:, None])
        norms = {name: arrays[name] for name in (*NORMS, "output_norm")}
        orders, router = (arrays["orders"].astype(np.int64), arrays["router"].astype(np.float32))
        return Stored(settings["sizes"], settings["about"], orders, router, norms, factors)
    except (KeyError, ValueError, OSError) as error:
        raise ValueError(f"{path}: no stored weights: {error}") from None


def write(path: Path, stored: Stored) -> None:
    """Factors are rounded to 8 bits, routers to half precision; written whole or not at all."""
    arrays = dict(orders=stored.orders.astype(np.int16), router=stored.router.astype(np.float16), **stored.norms)
    arrays["settings"] = np.array(json.dumps(dict(sizes=stored.sizes, about=stored.about)))
    for name, factors in stored.factors.items():
        for side, values, axis in zip("ab", factors, (2, 1)):
            scale = np.abs(values).max(axis, keepdims=True) / 127
            arrays[f"{name}_{side}"] = np.rint(values / np.where(scale, scale, 1)).astype(np.int8)
            arrays[f"{name}_{side}_scale"] = scale.squeeze(axis).astype(np.float32)
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        np.savez(file, **arrays)
    os.replace(temporary, path)


def from_student(student, about: dict) -> Stored:
    """What to store of a `model.Student`."""
    p, layers = ({name: value.detach().numpy() for name, value in student.params.items()}, range(student.dense.n_layer))

    def stacked(name: str) -> np.ndarray:
        return np.stack([p[f"{il}_{name}"] for il in layers])

    factors = {name: (stacked(f"{name}_a"), stacked(f"{name}_b")) for name in MATRICES}
    norms = {name: stacked(name) for name in NORMS} | {"output_norm": p["output_norm"]}
    return Stored(asdict(student.sizes), about, student.orders.numpy(), stacked("router"), norms, factors)


def load(path: Path, student) -> None:
    """Sets a `model.Student` to stored weights. Raises ValueError where its sizes are others."""
    import torch  # not at the top: building a model goes without it

    stored = read(path)
    if stored.sizes != asdict(student.sizes):
        raise ValueError(f"{path}: sizes are {stored.sizes}, want {asdict(student.sizes)}")
    with torch.no_grad():
        for il, order in enumerate(stored.orders):
            student.reorder(il, torch.from_numpy(order), torch.from_numpy(stored.router[il]))
            for name in NORMS:
                student.params[f"{il}_{name}"].copy_(torch.from_numpy(stored.norms[name][il]))
            for name, factors in stored.factors.items():
                for side, values in zip("ab", factors):
                    student.params[f"{il}_{name}_{side}"].copy_(torch.from_numpy(values[il]))
        student.params["output_norm"].copy_(torch.from_numpy(stored.norms["output_norm"]))

"""Small GGUF files made to order, for tests of what reads them. No weights that compute anything."""

from pathlib import Path

import gguf
import numpy as np


def write_gguf(path: Path, *, n_layer=3, expert_count=8, expert_used_count=4, dense_layers=(0,), keys=()) -> Path:
    """A GGUF with the metadata and tensor names of a deepseek-like MoE model.

    keys: (name, value) pairs: int -> uint32, str, numpy array of int32 / float64 / float32.
    """
    writer = gguf.GGUFWriter(str(path), "deepseek")
    writer.add_block_count(n_layer)
    if expert_count:
        writer.add_expert_count(expert_count)
        if expert_used_count is not None:
            writer.add_expert_used_count(expert_used_count)
    types = {np.dtype(np.int32): gguf.GGUFValueType.INT32, np.dtype(np.float32): gguf.GGUFValueType.FLOAT32,
             np.dtype(np.float64): gguf.GGUFValueType.FLOAT64}  # fmt: skip
    for name, value in keys:
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        else:
            writer.add_key_value(name, value.tolist(), gguf.GGUFValueType.ARRAY, sub_type=types[value.dtype])
    writer.add_tensor("token_embd.weight", np.arange(64, dtype=np.float32).reshape(2, 32))
    for il in range(n_layer):
        if expert_count and il not in dense_layers:
            writer.add_tensor(f"blk.{il}.ffn_gate_inp.weight", np.ones((expert_count, 32), np.float32))
            writer.add_tensor(f"blk.{il}.ffn_down_exps.weight", np.ones((expert_count, 4, 32), np.float32))
        else:
            writer.add_tensor(f"blk.{il}.ffn_down.weight", np.ones((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def plan_keys(counts=(0, 2, 3), **changes) -> list:
    """The allocmoe.* keys of a valid plan for `write_gguf`'s model, with changes; None drops a key."""
    keys = {
        "version": 2,
        "expert_used_count": np.array(counts, np.int32),
        "expert_used_count_full": np.array((0, 4, 4), np.int32),
        "token_rule": "off",
        "allocation": "alloc-l",
        "sensitivity": np.array([9.0, 8, 7, 6, 5, 4, 3, 2]),
        "cost": np.ones(3),
        **changes,
    }
    return [(f"allocmoe.{name}", value) for name, value in keys.items() if value is not None]


def _copy(reader, writer, values=None) -> None:
    """All of a file but its architecture, which the writer has; values: those of keys that are to be others."""
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value_type, *sub_type = field.types
        value = (values or {}).get(name, field.contents())
        # one for each layer, in place of one for all
        if isinstance(value, list) and value_type != gguf.GGUFValueType.ARRAY:
            value_type, sub_type = gguf.GGUFValueType.ARRAY, [value_type]
        writer.add_key_value(name, value, value_type, sub_type=sub_type[-1] if sub_type else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def split_gguf(path: Path, prefix: Path, n_tensors: int) -> list:
    """Writes the model again as prefix-00001-of-0000N.gguf ..., n_tensors in each; returns the paths."""
    reader = gguf.GGUFReader(path)
    arch = reader.get_field("general.architecture").contents()
    writer = gguf.GGUFWriter(str(prefix) + ".gguf", arch, split_max_tensors=n_tensors)
    _copy(reader, writer)
    return sorted(prefix.parent.glob(f"{prefix.name}-*.gguf"))


def write_imatrix(path: Path, sums: dict) -> Path:
    """An importance matrix as llama-imatrix writes it. sums: (sums of squares, counts) by tensor name."""
    writer = gguf.GGUFWriter(str(path), "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["made up"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, (in_sum2, counts) in sums.items():
        writer.add_tensor(f"{name}.in_sum2", np.asarray(in_sum2, np.float32))
        writer.add_tensor(f"{name}.counts", np.asarray(counts, np.float32).reshape(-1, 1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def rounded(values: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """As the runtime rounds one side of a product with an estimator's `down` or `up`: those to Q4_0, the other to Q8_0."""
    return gguf.dequantize(gguf.quantize(np.ascontiguousarray(values), kind), kind)


def reduced(x: np.ndarray, down: np.ndarray) -> np.ndarray:
    """down x of an estimator as the runtime rounds it. x: [n, n_embd]. down: [n_down, n_embd]."""
    return rounded(x, gguf.GGMLQuantizationType.Q8_0) @ rounded(down, gguf.GGMLQuantizationType.Q4_0).T


def random_estimator(n_layer: int, n_expert: int, n_embd: int, n_down: int, rank: int, seed: int, n_relu: int = 0):
    """Of a size like the outputs of a tiny model's experts, and different in every entry."""
    from allocmoe_edge.plan.estimator import N_QUANTILES, Estimator

    rng = np.random.default_rng(seed)
    draw = lambda *shape, scale: (rng.standard_normal(shape) * scale).astype(np.float32)  # noqa: E731
    return Estimator(
        down=draw(n_layer, n_down, n_embd, scale=n_embd**-0.5),
        log_norm=draw(n_layer, n_expert, n_down + 1, scale=0.3),
        output=draw(n_layer, n_expert, rank, scale=0.5),
        up=draw(n_layer, rank, n_embd, scale=0.1),
        quantiles=np.zeros((n_layer, N_QUANTILES)),
        n_relu=n_relu,
    )


def changed_keys(source: Path, target: Path, values: dict) -> Path:
    """Writes a model again with other values for keys that it has."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(str(target), reader.get_field("general.architecture").contents())
    _copy(reader, writer, values)
    return target


def changed_token(source: Path, target: Path, token: int, text: str) -> Path:
    """Writes a model again with another text for one token of its vocabulary."""
    tokens = gguf.GGUFReader(source).get_field("tokenizer.ggml.tokens").contents()
    tokens[token] = text
    return changed_keys(source, target, {"tokenizer.ggml.tokens": tokens})

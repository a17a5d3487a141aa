"""How the plan travels: the allocmoe.* keys of a GGUF file.

| key | type | meaning |
| --- | --- | --- |
| allocmoe.version | uint32 | version of these keys, 2 |
| allocmoe.expert_used_count | int32[block_count] | planned experts per token, 0 where a layer routes none |
| allocmoe.expert_used_count_full | int32[block_count] | the model's own, K_l, which plans were made for, 0 where a layer routes none |
| allocmoe.budget_total | uint32 | sum of the planned ones; a key override of it at load time is another budget |
| allocmoe.token_rule | string | how a layer's activations are shared among tokens: off (top-k), batch, threshold, estimate |
| allocmoe.k_base | uint32 | experts that every token keeps under any rule but off |
| allocmoe.threshold | float32[block_count] | for threshold and estimate: the value, or size, from which a candidate is activated |
| allocmoe.table.expert_used_count | uint8 or uint16[n_rows * block_count] | the plan for every total: row r for n_moe_layers + r, up to sum(K_l), under the rules other than estimate |
| allocmoe.table.estimate.expert_used_count | the same | the same under estimate |
| allocmoe.table.estimate.threshold | float32[n_rows * block_count] | its thresholds; rows of NaN where the rule cannot spend so little |
| allocmoe.threshold_table | float32[sum of K_l] | t[l,k], the threshold at which the mean is k, k = 1..K_l, rows of the layers with experts in order |
| allocmoe.estimator.n_down, .rank, .n_embd, .n_expert | uint32 | sizes of what estimate goes by, see `estimator.py` |
| allocmoe.estimator.n_relu | uint32 | directions that count where positive |
| allocmoe.estimator.down | uint64[] | its array of layers with experts, [layer, n_down, n_embd]: Q4_0 blocks, float16 where n_embd is no multiple of 32 |
| allocmoe.estimator.up | uint64[] | [layer, n_embd, rank]: Q4_0 blocks, rows padded with zeros to whole ones |
| allocmoe.estimator.log_norm, .output | uint64[] | [layer, n_expert, n_down + 1] and [layer, n_expert, rank]: float16 |
| allocmoe.estimator.quantiles | float32[65 a layer with routed experts] | distribution of the estimated sizes, ascending |
| allocmoe.allocation | string | how the plan was made: alloc-l, or uniform where Alloc-L lost on held-out text |
| allocmoe.sensitivity | float64[sum of K_l] | S[l,k], k = 1..K_l; rows as in threshold_table |
| allocmoe.sensitivity.metric, .mode | string | what S holds (kl, perplexity), how it was measured (fast, single, isolated) |
| allocmoe.cost | float64[block_count] | cost of one activation in each layer |
| allocmoe.cost.unit | string | of those costs: activations (all 1), or ms of decoding on the machine that converted |
| allocmoe.calibration.source, .sha256 | string | the calibration text, by name and by hash of its token ids |
| allocmoe.calibration.n_tokens | uint32 | its length in tokens |
| allocmoe.held_out.n_tokens | uint32 | tokens of the text that the plan was checked on, none of them in the calibration text |
| allocmoe.held_out.perplexity | float64[3] | on that text: of the full model, of uniform k at this budget, of the plan |
| allocmoe.held_out.kl | float64[2] | divergence from the full model in nats per token: of uniform k, of the plan |

The library (native/allocmoe-file.cpp) reads all up to the estimator's quantiles, and serves any budget from the tables; the
rest is for allocmoe-convert, which plans anew from it, and allocmoe-inspect. The first three are needed to run a plan, the
tables for any budget but that of the file. Numbers in uint64[] are little-endian, packed without gaps, zeros at the end.
The model's own expert_used_count stays as it is, so that stock llama.cpp loads the file at full budget.

A side file is a GGUF file of these keys and no tensors, for models that nobody wants to copy. It also has:

| key | type | meaning |
| --- | --- | --- |
| general.type | string | allocmoe-plan |
| allocmoe.model.name, .architecture | string | the model that it was made for |
| allocmoe.model.routers | string | that model's `routers_hash`: quantisations of one model have the same, other models another |
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
import hashlib
import itertools
from pathlib import Path
import re
from typing import Optional

import numpy as np

from ..gguf_file import GGUFFile, expert_used_count_full, model_paths
from .estimator import Estimator, from_stored, n_words, stored
from .plan import Plan, PlanError
from .profile import Calibration, HeldOut, Profile

VERSION = 2
SIDE_FILE = "allocmoe-plan"
ALLOCATIONS = ("alloc-l", "uniform")
_SIZES = ("n_down", "rank", "n_embd", "n_expert")
_STORED = ("down", "log_norm", "output", "up")
# of each router
_SAMPLE_BYTES = 16 << 10


@dataclass(frozen=True)
class ModelPlan:
    """What a GGUF file says about experts.

    full: the model's own K_l per layer; None for a dense model.
    plan, profile: from the allocmoe.* keys; None where the file has none.
    name, architecture: of the model.
    side_file: the file has a plan for a model, and no model.
    path: of the file.
    routers: of a side file, the hash of the model's routers; "" where it does not say.
    """

    full: Optional[tuple]
    plan: Optional[Plan] = None
    profile: Optional[Profile] = field(default=None, repr=False)
    name: str = ""
    architecture: str = ""
    side_file: bool = False
    path: Optional[Path] = field(default=None, compare=False)
    routers: str = field(default="", compare=False, repr=False)


def routers_hash(path) -> str:
    """Hash (sha256) of samples from the routers of a model, a GGUF file or the first one of a split model, "" if it has none.

    Routers are what a plan is about, and llama.cpp never quantises them: so this tells models of one shape apart, and not the
    quantisations of one model, for which a plan is as good.
    """
    samples = {}
    for part in model_paths(path):
        with GGUFFile(part) as file, open(part, "rb") as data:
            for tensor in file.tensors:
                if re.fullmatch(r"blk\.\d+\.ffn_gate_inp\.weight", tensor.name):
                    data.seek(file.data_offset + tensor.offset)
                    sample = data.read(min(tensor.n_bytes, _SAMPLE_BYTES))
                    samples[tensor.name] = f"{tensor.name} {tensor.type_name} {tensor.n_bytes} ".encode() + sample
    return hashlib.sha256(b"".join(samples[name] for name in sorted(samples))).hexdigest() if samples else ""


def read(path, *, estimator: bool = True) -> ModelPlan:
    """Reads and checks everything about experts in a GGUF file.

    Args:
        estimator: False leaves it out of plan and profile, for callers that leave it to the library: it is megabytes.

    Raises:
        GGUFError: no such file, not a GGUF file, damaged, or expert keys that contradict each other.
        PlanError: allocmoe.* keys that this version does not know or that do not fit the model.
    """
    with GGUFFile(path) as file:
        kind = file.get("general.type")
        side_file = isinstance(kind, str) and kind == SIDE_FILE
        if side_file:
            own = file.get("allocmoe.expert_used_count_full")
            if not isinstance(own, np.ndarray) or own.dtype != np.int32:
                _check_version(file)
                raise PlanError(f"{path}: allocmoe.expert_used_count_full is missing or not an array of int32")
            try:
                full = Plan.full(own).expert_used_count
                keys = ("name", "architecture", "routers")
                identity = {key: _value(file, f"allocmoe.model.{key}", str, "") for key in keys}
            except PlanError as error:
                raise PlanError(f"{path}: allocmoe.{error}") from None
        else:
            full = expert_used_count_full(file)
            identity = {key: str(file.get(f"general.{key}", "")) for key in ("name", "architecture")}
        identity["path"] = file.path
        if file.get("allocmoe.version") is None and not side_file:
            return ModelPlan(full, **identity)
        _check_version(file)
        if full is None:
            raise PlanError(f"{path}: has a plan (allocmoe.*) but the model has no experts")
        try:
            planned = _array(file, "allocmoe.expert_used_count", np.int32, len(full))
            own = _array(file, "allocmoe.expert_used_count_full", np.int32, len(full))
            if own.tolist() != list(full):
                raise PlanError(f"expert_used_count_full: found {own.tolist()}, want the model's own, {list(full)}")
            total = file.get("allocmoe.budget_total")
            if total is not None and (type(total) is not int or total != planned.sum()):
                raise PlanError(f"budget_total: found {total!r}, want {planned.sum()}, the sum of expert_used_count")
            _check_tables(file, full)
            rule = _value(file, "allocmoe.token_rule", str, "off")
            threshold = None
            if rule in ("threshold", "estimate"):
                threshold = _array(file, "allocmoe.threshold", np.float32, len(full)).tolist()
            if rule == "estimate" and file.get("allocmoe.estimator.n_down") is None:
                raise PlanError("estimator: found nothing, want one for token_rule 'estimate'")
            found = _read_estimator(file, full) if estimator else None
            own = found if rule == "estimate" else None
            strict = rule == "estimate"  # its default, see `Profile.plan`
            plan = Plan(planned, full, rule, file.get("allocmoe.k_base", 1), threshold, strict, estimator=own)
        except PlanError as error:
            raise PlanError(f"{path}: allocmoe.{error}") from None
        return ModelPlan(full, plan, _read_profile(file, full, found), **identity, side_file=side_file)


def _check_version(file: GGUFFile) -> None:
    version = file.get("allocmoe.version")
    if type(version) is not int or version != VERSION:
        raise PlanError(
            f"{file.path}: allocmoe.version is {version!r}, this allocmoe-edge reads version {VERSION}: convert it again"
        )


def _check_tables(file: GGUFFile, full: tuple) -> None:
    """What read_rows of native/allocmoe-file.cpp checks: sizes, entries, and that rows spend what they are for."""
    shape = sum(full) - sum(k > 0 for k in full) + 1, len(full)
    for key in ("table.expert_used_count", "table.estimate.expert_used_count"):
        value = file.get(f"allocmoe.{key}")
        if value is None:
            continue
        dtype = np.uint8 if getattr(value, "dtype", None) == np.uint8 else np.uint16
        counts = _array(file, f"allocmoe.{key}", dtype, shape[0] * shape[1]).reshape(shape).astype(np.int64)
        threshold = None
        if key == "table.estimate.expert_used_count":
            threshold = _array(file, "allocmoe.table.estimate.threshold", np.float32, counts.size).reshape(shape)
        _check_rows(key, counts, np.array(full), _cost(file, len(full)), threshold)


def _cost(file: GGUFFile, n_layer: int) -> np.ndarray:
    """Of one activation in each layer; 1 where the file says nothing that could be meant."""
    cost = file.get("allocmoe.cost")
    if isinstance(cost, np.ndarray) and cost.dtype == np.float64 and cost.size == n_layer and np.isfinite(cost).all():
        return cost
    return np.ones(n_layer)


def _check_rows(
    key: str, counts: np.ndarray, full: np.ndarray, cost: np.ndarray, threshold: Optional[np.ndarray]
) -> None:
    one = np.minimum(full, 1)
    for row, il in np.argwhere((counts < one) | (counts > full))[:1]:
        raise PlanError(f"{key}: found {counts[row, il]} in row {row} for layer {il}, want {one[il]} to {full[il]}")
    cost = cost if (cost[full > 0] > 0).all() else np.ones(len(full))
    totals = np.arange(one.sum(), full.sum() + 1)
    n, spent = counts.sum(axis=1), counts @ cost
    least = (cost * one).sum()
    limit = np.maximum((cost * full).sum() * totals / full.sum(), least) * (1 + 1e-9)
    wrong = spent > limit
    if threshold is not None:
        equal = (cost[full > 0] == 1).all()
        wrong = ~np.isnan(threshold).any(axis=1) & (equal | (spent > limit + least))
    for row in np.flatnonzero(wrong & (n != totals))[:1]:
        raise PlanError(f"{key}: found {n[row]} activations in row {row}, which is for {totals[row]}")


def read_for(path, model: ModelPlan, *, estimator: bool = True) -> ModelPlan:
    """`model` with the plan in the side file `path` (or in another copy of the model) instead of its own.

    estimator: as in `read`.

    Raises:
        GGUFError, PlanError: as `read`, and where the plan was made for another model.
    """
    found = read(path, estimator=estimator)
    if found.plan is None:
        raise PlanError(f"{path}: has no plan; allocmoe-convert --plan-only writes one")
    if found.architecture != model.architecture or found.full != model.full:
        made_for = f"{found.architecture}, experts per token {_in_runs(found.full)}"
        raise PlanError(
            f"{path}: was made for another model ({made_for}) than this ({model.architecture}, {_in_runs(model.full)})"
        )
    own = found.routers if found.side_file else routers_hash(path)
    if own and model.path is not None and own != routers_hash(model.path):
        named = f" ({found.name})" if found.name else ""
        raise PlanError(
            f"{path}: was made for another model{named} than {model.path}: of the same shape, with other weights in its "
            "routers; convert this one"
        )
    return replace(model, plan=found.plan, profile=found.profile)


def _in_runs(counts) -> str:
    """Layers' counts in short: 0, 8 x29."""
    runs = ((k, len(list(same))) for k, same in itertools.groupby(counts or ()))
    return ", ".join(f"{k} x{n}" if n > 1 else str(k) for k, n in runs) or "none"


def write_side_file(path, model: ModelPlan, plan: Plan, profile: Optional[Profile]) -> None:
    """Writes the plan without the model.

    Raises:
        OSError: the file could not be written in full.
    """
    with GGUFFile.empty(path) as file:
        file.set("general.type", SIDE_FILE)
        write(file, plan, profile)
        file.set("allocmoe.model.name", model.name)
        file.set("allocmoe.model.architecture", model.architecture)
        routers = model.routers if model.side_file or model.path is None else routers_hash(model.path)
        if routers:
            file.set("allocmoe.model.routers", routers)
        file.write_metadata(path)


def write(file: GGUFFile, plan: Plan, profile: Optional[Profile]) -> None:
    """Sets the allocmoe.* keys in an open file's metadata, replacing all that were there."""
    if plan.value != "score":
        raise PlanError(f"value: found {plan.value!r}: such a plan can be set by hand (set_plan) and not be written")
    for key in [key for key in file.keys() if key.startswith("allocmoe.")]:
        file.set(key, None)
    file.set("allocmoe.version", VERSION)
    file.set("allocmoe.expert_used_count", np.array(plan.expert_used_count, np.int32))
    file.set("allocmoe.expert_used_count_full", np.array(plan.expert_used_count_full, np.int32))
    file.set("allocmoe.budget_total", plan.budget_total)
    file.set("allocmoe.token_rule", plan.token_rule)
    file.set("allocmoe.k_base", plan.k_base)
    estimator = plan.estimator if profile is None else profile.estimator
    if estimator is not None:
        _write_estimator(file, estimator, plan.moe_layers)
    if plan.threshold is not None:
        file.set("allocmoe.threshold", np.array(plan.threshold, np.float32))
    if profile is None:
        return
    _write_tables(file, profile, plan.expert_used_count_full)
    file.set("allocmoe.allocation", profile.allocation)
    file.set("allocmoe.sensitivity", np.concatenate([np.asarray(row, np.float64) for row in profile.sensitivity]))
    if profile.threshold_table is not None:
        rows = [np.asarray(row, np.float32) for row in profile.threshold_table]
        file.set("allocmoe.threshold_table", np.concatenate(rows))
    file.set("allocmoe.sensitivity.metric", profile.metric)
    file.set("allocmoe.sensitivity.mode", profile.mode)
    file.set("allocmoe.cost", np.array(profile.cost, np.float64))
    file.set("allocmoe.cost.unit", profile.cost_unit)
    file.set("allocmoe.calibration.source", profile.calibration.source)
    file.set("allocmoe.calibration.n_tokens", profile.calibration.n_tokens)
    file.set("allocmoe.calibration.sha256", profile.calibration.sha256)
    if profile.held_out is not None:
        held_out = profile.held_out
        file.set("allocmoe.held_out.n_tokens", held_out.n_tokens)
        file.set("allocmoe.held_out.perplexity", np.array([held_out.full, held_out.uniform, held_out.plan]))
        file.set("allocmoe.held_out.kl", np.array([held_out.kl_uniform, held_out.kl_plan]))


def _array(file: GGUFFile, key: str, dtype, n: int) -> np.ndarray:
    value = file.get(key)
    if not isinstance(value, np.ndarray) or value.dtype != dtype:
        found = "nothing" if value is None else f"{value.dtype} array" if isinstance(value, np.ndarray) else repr(value)
        raise PlanError(f"{key[9:]}: found {found}, want an array of {np.dtype(dtype).name}")
    if len(value) != n:
        raise PlanError(f"{key[9:]}: found {len(value)} entries, want {n}")
    return value


def _value(file: GGUFFile, key: str, kind: type, default):
    value = file.get(key, default)
    if type(value) is not kind:
        found = f"an array of {len(value)}" if isinstance(value, (list, np.ndarray)) else repr(value)
        raise PlanError(f"{key[9:]}: found {found}, want {'a string' if kind is str else 'an integer'}")
    return value


def _write_tables(file: GGUFFile, profile: Profile, full: tuple) -> None:
    smallest = np.uint8 if max(full) <= 255 else np.uint16
    file.set("allocmoe.table.expert_used_count", profile.plan_table(full).astype(smallest).ravel())
    if profile.estimator is not None:
        counts, threshold = profile.estimate_table(full)
        file.set("allocmoe.table.estimate.expert_used_count", counts.astype(smallest).ravel())
        file.set("allocmoe.table.estimate.threshold", threshold.ravel())


def _write_estimator(file: GGUFFile, estimator: Estimator, layers: tuple) -> None:
    for name in (*_SIZES, "n_relu"):
        file.set(f"allocmoe.estimator.{name}", int(getattr(estimator, name)))
    for name in _STORED:
        file.set(f"allocmoe.estimator.{name}", stored(name, getattr(estimator, name)[list(layers)]))
    file.set("allocmoe.estimator.quantiles", estimator.quantiles[list(layers)].ravel())


def _read_estimator(file: GGUFFile, full: tuple) -> Optional[Estimator]:
    if file.get("allocmoe.estimator.n_down") is None:
        return None
    sizes = {name: _value(file, f"allocmoe.estimator.{name}", int, None) for name in _SIZES}
    arch = file.get("general.architecture")
    for name, key in (("n_embd", "embedding_length"), ("n_expert", "expert_count")):
        own = file.get(f"{arch}.{key}", sizes[name])  # a side file has neither
        if sizes[name] != own or sizes[name] < 1:
            raise PlanError(f"estimator.{name}: found {sizes[name]}, want the model's {key}, {own}")
    layers = [il for il, k in enumerate(full) if k]
    arrays = {}
    for name, (_, *shape) in Estimator.shapes(len(full), **sizes).items():
        shape = (len(layers), *shape)
        key = f"allocmoe.estimator.{name}"
        if name in _STORED:
            values = from_stored(name, _array(file, key, np.uint64, n_words(name, shape)), shape)
        else:
            values = _array(file, key, np.float32, shape[0] * shape[1]).reshape(shape)
        arrays[name] = np.zeros((len(full), *shape[1:]), np.float32)
        arrays[name][layers] = values
    return Estimator(**arrays, n_relu=_value(file, "allocmoe.estimator.n_relu", int, None))


def _read_profile(file: GGUFFile, full: tuple, estimator: Optional[Estimator]) -> Optional[Profile]:
    if file.get("allocmoe.sensitivity") is None:
        return None
    try:
        flat = _array(file, "allocmoe.sensitivity", np.float64, sum(full))
        cost = _array(file, "allocmoe.cost", np.float64, len(full))
        if not np.isfinite(flat).all():
            raise PlanError("sensitivity: found NaN or infinity, want finite numbers")
        if not (np.isfinite(cost).all() and (cost[np.array(full) > 0] > 0).all()):
            raise PlanError("cost: found an entry that is not a positive number")
        table = None
        if file.get("allocmoe.threshold_table") is not None:
            table = _array(file, "allocmoe.threshold_table", np.float32, sum(full))
            if np.isnan(table).any():
                raise PlanError("threshold_table: found NaN, want numbers")
            table = tuple(np.split(table, np.cumsum(full)[:-1]))
        allocation = _value(file, "allocmoe.allocation", str, "alloc-l")
        if allocation not in ALLOCATIONS:
            raise PlanError(f"allocation: found {allocation!r}, want one of: {', '.join(ALLOCATIONS)}")
        held_out = None
        if file.get("allocmoe.held_out.n_tokens") is not None:
            values = np.append(
                _array(file, "allocmoe.held_out.perplexity", np.float64, 3),
                _array(file, "allocmoe.held_out.kl", np.float64, 2),
            )
            if not np.isfinite(values).all():
                raise PlanError("held_out: found NaN or infinity, want finite numbers")
            held_out = HeldOut(_value(file, "allocmoe.held_out.n_tokens", int, 0), *values.tolist())
        return Profile(
            sensitivity=tuple(np.split(flat, np.cumsum(full)[:-1])),
            cost=tuple(cost.tolist()),
            calibration=Calibration(
                _value(file, "allocmoe.calibration.source", str, "unknown"),
                _value(file, "allocmoe.calibration.n_tokens", int, 0),
                _value(file, "allocmoe.calibration.sha256", str, ""),
            ),
            allocation=allocation,
            metric=_value(file, "allocmoe.sensitivity.metric", str, "perplexity"),
            mode=_value(file, "allocmoe.sensitivity.mode", str, "isolated"),
            threshold_table=table,
            k_base=_value(file, "allocmoe.k_base", int, 1),
            token_rule=_value(file, "allocmoe.token_rule", str, "off"),
            cost_unit=_value(file, "allocmoe.cost.unit", str, "activations"),
            held_out=held_out,
            estimator=estimator,
        )
    except PlanError as error:
        raise PlanError(f"{file.path}: allocmoe.{error}") from None

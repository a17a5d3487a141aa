"""What a GGUF file holds, as one JSON-ready dict: the source of the text, the plots and --json."""

from __future__ import annotations

from collections import defaultdict
import dataclasses
import os
import re
from typing import Any, Optional

import numpy as np

from ..gguf_file import EXPERTS, GGUFError, GGUFFile, model_paths
from ..measure.traffic import WeightTraffic
from ..plan import Plan, metadata

# version of the dict's keys: raised when one changes its meaning or goes
FORMAT = 1
_CURVE_POINTS = 25

_EXPERTS = re.compile(EXPERTS)


def build(path, curve: bool = True) -> dict:
    """Everything known about a GGUF file: its metadata and tensor table are read, its tensors are not.

    Args:
        path: a model (the first file of a split one) or a plan alone (general.type is allocmoe-plan).
        curve: work out predicted_curve too, which takes longer than all the rest.

    Returns:
        A dict of dicts, lists, str, int, float, bool and None. Parts that the file lacks are None:

        - format: version of these keys.
        - file: path, bytes (of all files of a split model), n_files, kind ("model", or "plan" for a plan alone).
        - model: name, architecture, context_length, parameters, layers, moe_layers, experts, experts_per_token (one
          per layer, 0 where none are routed), shared_experts; types: {"experts", "other"}, each a dict from the
          tensor type to its tensors, parameters and bytes. Of a plan alone, the first two.
        - plan: budget, budget_total, budget_full, experts_per_token and experts_per_token_full (one per layer),
          token_rule, k_base, threshold (one per layer, None where none decides), bytes_per_token (see
          `bytes_per_token`; None for a plan alone), cost (unit, spent, full and share = spent / full of the stored
          costs of all activations of a token; None where each costs 1).
        - profile: allocation, metric, mode, calibration (source, n_tokens, sha256), cost and cost_unit, sensitivity
          and threshold_table (one list of K_l numbers per layer, entry k-1 for k experts; None where no threshold
          decides: a layer at its base takes none of the further experts, one at K_l all of them).
        - held_out: what the converter measured on text that the profile had not seen.
        - predicted_curve: see `predicted_curve`; None without `curve`.
        - measured_curve, routing: None, until something is measured.

    Raises:
        GGUFError, PlanError: as `metadata.read`; and for descriptive keys of another type than they must have.
    """
    stored = metadata.read(path)
    files = model_paths(path)
    with GGUFFile(path) as file:
        if stored.side_file:
            model, read = {"name": stored.name, "architecture": stored.architecture}, None
        else:
            tensors = list(file.tensors)
            for shard in files[1:]:
                with GGUFFile(shard) as other:
                    tensors += other.tensors
            model = _model(file, tensors, stored.full)
            read = WeightTraffic(path)
    plan, profile = stored.plan, stored.profile
    held_out = profile and profile.held_out
    return {
        "format": FORMAT,
        "file": {
            "path": str(path),
            "bytes": sum(os.path.getsize(shard) for shard in files),
            "n_files": len(files),
            "kind": "plan" if stored.side_file else "model",
        },
        "model": model,
        "plan": plan and _plan(plan, profile, read),
        "profile": profile and _profile(profile),
        "held_out": held_out and dataclasses.asdict(held_out),
        "predicted_curve": predicted_curve(profile, stored.full) if profile and stored.full and curve else None,
        "measured_curve": None,
        "routing": None,
    }


def _model(file: GGUFFile, tensors: list, full: Optional[tuple]) -> dict:
    arch = file.need("general.architecture")
    types: dict = {"experts": defaultdict(lambda: [0, 0, 0]), "other": defaultdict(lambda: [0, 0, 0])}
    for tensor in tensors:
        entry = types["experts" if _EXPERTS.match(tensor.name) else "other"][tensor.type_name]
        entry[0] += 1
        entry[1] += tensor.n_elements
        entry[2] += tensor.n_bytes
    return {
        "name": _checked(file, "general.name", str),
        "architecture": arch,
        "context_length": _checked(file, f"{arch}.context_length", int),
        "parameters": sum(tensor.n_elements for tensor in tensors),
        "layers": _checked(file, f"{arch}.block_count", int),
        "moe_layers": sum(k > 0 for k in full or ()),
        "experts": _checked(file, f"{arch}.expert_count", int) or 0,
        "experts_per_token": list(full or ()),
        "shared_experts": _checked(file, f"{arch}.expert_shared_count", int) or 0,
        "types": {
            part: {
                name: dict(zip(("tensors", "parameters", "bytes"), entry))
                for name, entry in sorted(entries.items(), key=lambda item: -item[1][2])
            }
            for part, entries in types.items()
        },
    }


def bytes_per_token(read: WeightTraffic, planned, full) -> dict:
    """Bytes of weights that one decoded token reads, under a plan and at full budget.

    Args:
        planned, full: k_l and K_l, length block_count.

    Returns:
        experts, experts_full, other: bytes; expert_share: experts / experts_full; share: the same with `other` on
        both sides: where memory bandwidth is the limit, no plan makes a token faster than this share of its time at
        full budget. The KV cache is not counted. Shares are None where nothing is read at full budget.
    """
    spent, whole, other = read.of_experts(planned), read.of_experts(full), read.fixed
    return {
        "experts": spent,
        "experts_full": whole,
        "other": other,
        "expert_share": spent / whole if whole else None,
        "share": (spent + other) / (whole + other) if whole + other else None,
    }


def _plan(plan: Plan, profile: Optional[metadata.Profile], read: Optional[WeightTraffic]) -> dict:
    counts, full = plan.expert_used_count, plan.expert_used_count_full
    cost = None
    if profile is not None and any(c != 1 for c in profile.cost):
        spent, whole = (sum(c * k for c, k in zip(profile.cost, experts)) for experts in (counts, full))
        cost = {"unit": profile.cost_unit, "spent": spent, "full": whole, "share": spent / whole}
    return {
        "budget": plan.budget,
        "budget_total": plan.budget_total,
        "budget_full": plan.budget_full,
        "experts_per_token": list(counts),
        "experts_per_token_full": list(full),
        "token_rule": plan.token_rule,
        "k_base": plan.k_base,
        "threshold": plan.threshold and _finite(plan.threshold),
        "bytes_per_token": read and bytes_per_token(read, counts, full),
        "cost": cost,
    }


def _profile(profile: metadata.Profile) -> dict:
    table = profile.threshold_table
    return {
        "allocation": profile.allocation,
        "metric": profile.metric,
        "mode": profile.mode,
        "calibration": dataclasses.asdict(profile.calibration),
        "cost": list(profile.cost),
        "cost_unit": profile.cost_unit,
        "sensitivity": [np.asarray(row).tolist() for row in profile.sensitivity],
        "threshold_table": table and [_finite(row) for row in table],
    }


def predicted_curve(profile: metadata.Profile, full: tuple) -> list:
    """What the profile predicts for budgets from one expert a layer to all of them.

    Returns:
        Dicts of budget_total, budget, and damage: the sum over layers of S[l,k_l] - S[l,K_l], in the profile's
        metric, of the plan for that budget (damage) and of uniform k (damage_uniform).
    """

    def damage(plan: Plan) -> float:
        rows = zip(profile.sensitivity, plan.expert_used_count)
        return float(sum(row[k - 1] - row[-1] for row, k in rows if k))

    totals = np.unique(np.linspace(sum(k > 0 for k in full), sum(full), _CURVE_POINTS).round().astype(int)).tolist()
    return [
        {
            "budget_total": total,
            "budget": total / sum(full),
            "damage": damage(profile.plan(total, full, "off")),
            "damage_uniform": damage(Plan.uniform(full, total)),
        }
        for total in totals
    ]


def _finite(values) -> list:
    return [float(v) if np.isfinite(v) else None for v in values]


def _checked(file: GGUFFile, key: str, kind: type) -> Any:
    """The value of an optional key, None if it is missing."""
    value = file.get(key)
    if value is not None and type(value) is not kind:
        found = f"an array of {len(value)}" if isinstance(value, (list, np.ndarray)) else repr(value)
        raise GGUFError(f"{file.path}: {key} is {found}, wanted {'a string' if kind is str else 'an integer'}")
    return value

"""Calibrates what the token rule "estimate" goes by (see `allocmoe_edge/plan/estimator.py`), in three runs of the full model
over a text, and short ones of the reduced model. What each of the first three has found is kept in the checkpoint.

1. On a part of a long text, inputs and the sizes of the experts' outputs: the directions of the input on which sizes depend
   linearly.
2. The same of all of it, on the main directions of the input alone: among them, directions whose positive parts tell more;
   every expert's size as a function of both, and how sizes are distributed.
3. With the rule deciding, and all experts computed: what is missing, and a low-rank estimate of it.
4. With the rule in force, on a part of the text: what layers spend where those before them skip experts.
"""

from __future__ import annotations

import hashlib
from typing import Callable, Iterator, NamedTuple, Optional

from allocmoe_edge import Llama, Plan
from allocmoe_edge._native import context_pointer, ffi, libllama
from allocmoe_edge.measure.perplexity import evaluate
from allocmoe_edge.plan.estimator import ARRAYS, N_QUANTILES, Estimator
from allocmoe_edge.plan.metadata import Profile
import numpy as np
from tqdm import tqdm

from .calibration import spread
from .checkpoint import Checkpoint, window_name
from .regression import MissingSums, SizeSums, as_it_runs, fit_sizes, positive_directions

# directions for sizes, and rank of the estimate of outputs
N_SIZE, RANK = 8, 96
# further directions for sizes, of which what is positive counts: one for so many tokens, no fewer and no more than so many
_TOKENS_A_RELU, _LEAST_RELU, MOST_RELU = 1024, 40, 128
# main directions of the input among which those are sought
_N_INPUT = 768
# one window in so many, and no more tokens than so many, are not fitted on, and say how sizes are distributed: on the others the
# fit is too good
_APART, _APART_TOKENS = 4, 4096
# the first run needs no more tokens: its regressions are linear
_DIRECTION_TOKENS = 12288
# an output smaller than this share of its layer's mean counts as being of this share
_LEAST = np.exp(-4.0)
# runs with the rule in force, each from thresholds that the one before has corrected
_CORRECTIONS = 2
# a layer whose sensitivity was found smaller than this share of the largest has that: so little is noise
_LEAST_SENSITIVITY = 0.01


class Recorded(NamedTuple):
    """Of one layer and some tokens, columns by rank: inputs [n, n_embd]; experts, weights, norms of outputs, estimated log
    sizes [n, K]; missing [n, n_embd] where the rule decides; errors [K + 1] with the k best experts, summed."""

    inputs: np.ndarray
    experts: np.ndarray
    weights: np.ndarray
    norms: np.ndarray
    sizes: np.ndarray
    missing: np.ndarray
    errors: np.ndarray


def calibrate(
    llm: Llama,
    profile: Profile,
    total: int,
    full: tuple,
    token_windows: np.ndarray,
    spend_windows: Optional[np.ndarray] = None,
    n_size: int = N_SIZE,
    n_relu: Optional[int] = None,
    rank: int = RANK,
    checkpoint: Optional[Checkpoint] = None,
) -> Optional[Estimator]:
    """What the rule is to go by on a model, from text.

    The estimate of outputs is fitted to what is skipped at `total` activations; the rest does not depend on it.
    What it needs beside the model is `memory`.

    Args:
        profile: the layers' sensitivities, and k_base.
        token_windows: int32, shape [n_windows, n_ctx]; n_ctx is at most the micro-batch of `llm`.
        spend_windows: further windows; nothing is fitted to them, but what they spend under the rule counts when thresholds
            are corrected, as many of them as are kept apart of the others. A few windows alone can be some 10% off.
        n_relu: by default `n_relu_for` the tokens.
        checkpoint: has what earlier runs found, and takes what this one finds.

    Returns:
        None where the model, or the backend that it runs on, has no use for it.
    """
    n_ctx = token_windows.shape[1]
    n_relu = n_relu_for(token_windows.size) if n_relu is None else n_relu
    apart = _apart(len(token_windows), n_ctx)
    held = token_windows[apart] if apart.any() else token_windows
    if spend_windows is not None:
        held = np.concatenate([held, spread(spend_windows, len(held))])
    stage = (lambda _name, compute: compute()) if checkpoint is None else checkpoint.arrays
    first = spread(token_windows[~apart], max(_DIRECTION_TOKENS // n_ctx, 1))
    text = f"{window_name(token_windows)} {token_windows.shape}"

    found = stage(
        f"estimates, {n_size} directions on {window_name(first)} {first.shape}",
        lambda: _directions(llm, full, first, n_size),
    )
    if found is None:
        return None
    sensitivity = _log_sensitivities(profile, found["errors"], full)
    found = stage(
        f"estimates, {n_size} and {n_relu} sizes, k_base {profile.k_base}, sensitivities {_name(sensitivity)}, on {text}",
        lambda: _sizes(
            llm, full, token_windows, apart, found["down"], found["inputs"], n_relu, sensitivity, profile.k_base
        ),
    )
    plan = Estimator(**found).plan(total, full, profile.k_base)
    found = stage(
        f"estimates, outputs of rank {rank} at {total}, sizes {_name(plan.estimator.log_norm)}, on {text}",
        lambda: _outputs(llm, plan, token_windows, rank),
    )
    estimator = Estimator(**found)
    with _progress(_CORRECTIONS * len(held), "spend") as bar:
        for _ in range(_CORRECTIONS):
            estimator = _corrected(llm, estimator, estimator.plan(total, full, profile.k_base), held, bar.update)
    return estimator


def n_relu_for(n_tokens: int) -> int:
    """How many directions of which what is positive counts that many tokens can tell."""
    # rows are repacked by eights
    return int(np.clip(n_tokens // (8 * _TOKENS_A_RELU) * 8, _LEAST_RELU, MOST_RELU))


def _apart(n: int, n_ctx: int) -> np.ndarray:
    """bool [n]: which of n windows are kept apart; of more than one, one at least."""
    apart = np.arange(n) % max(_APART, -(-n * n_ctx // _APART_TOKENS)) == _APART - 1
    if not apart.any():
        apart[-1] = n > 1
    return apart


def _name(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array, np.float64).tobytes()).hexdigest()[:16]


def _progress(n: int, what: str) -> tqdm:
    return tqdm(total=n, desc=f"estimates, {what}", unit="pass", disable=None, leave=False)


def _whole(llm: Llama, full: tuple) -> Plan:
    """Skips nothing, but runs only where the rule does."""
    shapes = Estimator.shapes(len(full), n_expert_of(llm), 1, 0, llm.n_embd())
    return Estimator(**{name: np.zeros(shape, np.float32) for name, shape in shapes.items()}).plan(sum(full), full)


def _directions(llm: Llama, full: tuple, token_windows: np.ndarray, n_size: int) -> Optional[dict]:
    """down: float32 [n_layer, n_size, n_embd]. inputs: float16 [n_layer, at most _N_INPUT, n_embd], the main ones.
    errors: float64 [n_layer], with half of a layer's experts, squared."""
    n_embd, sums = llm.n_embd(), {}
    down, errors = np.zeros((len(full), n_size, n_embd), np.float32), np.zeros(len(full))
    inputs = np.zeros((len(full), min(_N_INPUT, n_embd), n_embd), np.float16)
    with _progress(len(token_windows), "directions") as bar:
        for il, found in _record(llm, _whole(llm, full), token_windows, bar.update):
            if il not in sums:
                sums[il] = SizeSums(n_expert_of(llm), n_embd)
            sums[il].add(found.inputs, found.experts, _log_sizes(found))
            errors[il] += found.errors[_half(full[il])]
    if not sums:
        return None
    for il in list(sums):
        of_layer = sums.pop(il)
        down[il] = as_it_runs(of_layer.directions(n_size))
        inputs[il] = of_layer.main_inputs(inputs.shape[1])
    return {"down": down, "inputs": inputs, "errors": errors}


def _sizes(
    llm: Llama,
    full: tuple,
    token_windows,
    apart,
    down: np.ndarray,
    inputs: np.ndarray,
    n_relu: int,
    sensitivity: np.ndarray,
    k_base: int,
) -> dict:
    """Of an Estimator of sizes alone."""
    kept = {il: [] for il, k in enumerate(full) if k}
    main = {il: [] for il in kept}
    with _progress(len(token_windows), "sizes") as bar:
        for il, found in _record(llm, _whole(llm, full), token_windows, bar.update):
            kept[il].append((found.inputs @ down[il].T, found.experts, _log_sizes(found), _log_weights(found.weights)))
            main[il].append((found.inputs @ inputs[il].astype(np.float32).T).astype(np.float16))
    positive = np.zeros((len(full), n_relu, down.shape[2]), np.float32)
    for il in tqdm(list(kept), desc="estimates, positive directions", unit="layer", disable=None, leave=False):
        x, windows = main.pop(il), kept[il]
        fit = [np.concatenate(rows) for rows in zip(*((x_, *w[:3]) for x_, w, a in zip(x, windows, apart) if not a))]
        found = positive_directions(*fit, n_expert_of(llm), n_relu)
        basis = inputs[il].astype(np.float32)
        positive[il] = as_it_runs(found @ basis)
        found = positive[il] @ basis.T / (basis**2).sum(axis=1)  # the rounded ones; the basis is orthogonal
        kept[il] = [
            (np.concatenate([w[0], np.maximum(x_.astype(np.float32) @ found.T, 0.0)], axis=1), *w[1:])
            for x_, w in zip(x, windows)
        ]
    down = np.concatenate([down, positive], axis=1)
    return _arrays(_with_sizes(down, n_relu, kept, sensitivity, apart, k_base, full, n_expert_of(llm)))


def _outputs(llm: Llama, plan: Plan, token_windows: np.ndarray, rank: int) -> dict:
    """Of plan.estimator with an estimate of the outputs that the plan skips."""
    n_expert = n_expert_of(llm)
    missing = {il: MissingSums(n_expert, llm.n_embd()) for il, k in enumerate(plan.expert_used_count_full) if k}
    with _progress(len(token_windows), "outputs") as bar:
        for il, found in _record(llm, plan, token_windows, bar.update):
            keep = keeps(found.sizes, plan.threshold[il], plan.k_base)
            skipped = np.zeros((len(found.inputs), n_expert), np.float32)
            np.put_along_axis(skipped, found.experts, np.where(keep, 0.0, found.weights), axis=1)
            missing[il].add(found.inputs, skipped, found.missing)
    return _arrays(_with_outputs(plan.estimator, {il: missing.pop(il).fit(rank) for il in list(missing)}))


def _arrays(estimator: Estimator) -> dict:
    return {name: np.asarray(getattr(estimator, name)) for name in (*ARRAYS, "n_relu")}


def memory(full: tuple, llm: Llama, shape: tuple) -> int:
    """Bytes that `calibrate` needs beside the model for windows of a shape [n, n_ctx]: in each layer two matrices of about
    n_embd by n_embd floats, what one window has recorded, in vectors that have room for twice as much, the main inputs in
    float16, and a few floats for each of a token's experts."""
    size, n_layer, n_tokens = n_expert_of(llm) + llm.n_embd(), sum(k > 0 for k in full), shape[0] * shape[1]
    matrices = n_layer * (size * (size + llm.n_embd()) + 2 * 2 * shape[1] * llm.n_embd())
    of_token = (N_SIZE + n_relu_for(n_tokens) + min(_N_INPUT, llm.n_embd()) // 2) * n_layer + 3 * sum(full)
    return 4 * (matrices + n_tokens * of_token)


def keeps(sizes: np.ndarray, threshold: float, k_base: int) -> np.ndarray:
    """bool [n, K]: which experts the rule keeps, given their estimated log sizes [n, K]."""
    best = np.argsort(-sizes, axis=1, kind="stable")[:, :k_base]
    keep = sizes >= np.float32(threshold)
    np.put_along_axis(keep, best, True, axis=1)
    return keep


def _with_sizes(
    down: np.ndarray,
    n_relu: int,
    kept: dict,
    sensitivity: np.ndarray,
    apart: np.ndarray,
    k_base: int,
    full: tuple,
    n_expert: int,
):
    """An Estimator of sizes alone; kept: for each layer the arrays of every window."""
    log_norm = np.zeros((len(full), n_expert, down.shape[1] + 1))
    for il, windows in kept.items():
        u, experts, sizes, _ = (np.concatenate(rows) for rows in zip(*(w for w, a in zip(windows, apart) if not a)))
        log_norm[il] = fit_sizes(u, experts, sizes, n_expert)
        log_norm[il, :, -1] += sensitivity[il]
    layers = list(kept)
    # only differences matter, and small numbers are the more exact in float16
    log_norm[layers, :, -1] -= log_norm[layers, :, -1].mean()
    log_norm = log_norm.astype(np.float16).astype(np.float32)
    quantiles = np.zeros((len(full), N_QUANTILES), np.float32)
    for il, windows in kept.items():
        if full[il] <= k_base:
            continue
        u, experts, _, weights = (
            np.concatenate(rows) for rows in zip(*(w for w, a in zip(windows, apart) if a or not apart.any()))
        )
        v = weights + np.einsum("tri,ti->tr", log_norm[il, experts, :-1], u) + log_norm[il, experts, -1]
        rest = np.sort(v, axis=1)[:, : full[il] - k_base]
        quantiles[il] = np.quantile(rest, np.linspace(0, 1, N_QUANTILES))
    return Estimator(down, log_norm, np.zeros((len(full), n_expert, 0)), down[:, :0], quantiles, n_relu)


def _with_outputs(estimator: Estimator, fitted: dict) -> Estimator:
    """With an estimate of outputs; what decides stays as it is, its coefficients of the new directions being zero."""
    n_layer, n_expert = estimator.n_layer, estimator.n_expert
    rank = next(iter(fitted.values()))[0].shape[1]
    output = np.zeros((n_layer, n_expert, rank), np.float32)
    down, up = (np.zeros((n_layer, rank, estimator.n_embd), np.float32) for _ in range(2))
    for il, arrays in fitted.items():
        output[il], down[il], up[il] = arrays
    return Estimator(
        np.concatenate([down, estimator.down], axis=1),
        np.concatenate([np.zeros((n_layer, n_expert, rank), np.float32), estimator.log_norm], axis=2),
        output,
        up,
        estimator.quantiles,
        estimator.n_relu,
    )


def _corrected(llm: Llama, estimator: Estimator, plan: Plan, token_windows: np.ndarray, progress: Callable[[], object]):
    """With distributions of sizes that give what the layers spend under the plan: less reaches a layer where others skip."""
    spent = _spent(llm, plan, token_windows, progress)
    full, base = np.array(plan.expert_used_count_full), np.minimum(plan.expert_used_count_full, plan.k_base)
    free = full > base
    if not np.isfinite(np.array(plan.threshold)[free]).all():
        return estimator
    shares = np.where(free, (spent - base) / np.maximum(full - base, 1), 0.0)
    # layers with nothing to choose keep their zeros
    return estimator.shifted(np.where(free, plan.threshold, 0.0), np.clip(shares, 0.0, 1.0))


def _spent(llm: Llama, plan: Plan, token_windows: np.ndarray, progress: Callable[[], object]) -> np.ndarray:
    """float64 [n_layer], activations per token."""
    llm._set_native_plan(plan)
    llm.expert_stats(reset=True)
    evaluate(llm, token_windows, progress)
    return llm.expert_stats(reset=True)["prefill"]["mean"]


def _half(k: int) -> int:
    return max(1, k // 2)


def _log_sensitivities(profile: Profile, errors: np.ndarray, full: tuple) -> np.ndarray:
    """float64 [n_layer]: half the log of what a squared error in a layer's output costs, from the cell at half of its experts.

    errors: [n_layer], squared, of that cell.
    """
    rise, found = np.zeros(len(full)), np.zeros(len(full))
    for il, row in enumerate(profile.sensitivity):
        if full[il]:
            half = row[_half(full[il]) - 1]
            rise[il] = half - row[-1] if profile.metric == "kl" else np.log(half / row[-1])
    some = (errors > 0) & (rise.max() > 0)
    found[some] = 0.5 * np.log(np.maximum(rise, _LEAST_SENSITIVITY * rise.max())[some] / errors[some])
    return found


def _log_sizes(found: Recorded) -> np.ndarray:
    return np.log(np.maximum(found.norms, max(_LEAST * found.norms.mean(), 1e-20)))


def _log_weights(weights: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(weights, 1e-20))


def n_expert_of(llm: Llama) -> int:
    """Experts in a layer of a model that has some."""
    return int(llm.metadata[f"{llm.metadata['general.architecture']}.expert_count"])


def _record(llm: Llama, plan: Plan, token_windows: np.ndarray, progress: Callable[[], object]) -> Iterator[tuple]:
    """(layer, Recorded) for every window and layer with experts; nothing where the plan's rule cannot run.

    Every expert runs, and later layers see what they see in the full model, whatever the rule would skip.
    """
    llm._set_native_plan(plan, record=True, record_inputs=True)
    context = context_pointer(llm)
    if libllama.allocmoe_get_token_rule(context) == libllama.ALLOCMOE_RULE_OFF:
        return
    for window in token_windows:
        libllama.allocmoe_clear_records(context)
        evaluate(llm, window[None])
        for il, n_used in enumerate(plan.expert_used_count_full):
            if n_used:
                yield il, _taken(context, il, n_used)
        progress()
    libllama.allocmoe_clear_records(context)


def _taken(context, il: int, n_used: int) -> Recorded:
    def take(getter, ctype: str, dtype, *which) -> np.ndarray:
        values = np.empty(getter(context, *which, il, ffi.NULL, 0), dtype)
        getter(context, *which, il, ffi.from_buffer(ctype, values), values.size)
        return values

    experts = take(libllama.allocmoe_take_experts, "int32_t *", np.int32).reshape(-1, n_used)
    inputs, weights, norms, missing = (
        take(libllama.allocmoe_take_floats, "float *", np.float32, getattr(libllama, f"ALLOCMOE_FLOATS_{what}"))
        for what in ("INPUT", "WEIGHT", "NORM", "MISSING")
    )
    sizes = take(libllama.allocmoe_take_scores, "float *", np.float32)
    errors = take(libllama.allocmoe_take_errors, "double *", np.float64)
    n = len(experts)
    by_rank = (values.reshape(n, n_used) for values in (weights, norms, sizes))
    inputs = inputs.reshape(n, -1)
    return Recorded(inputs, experts, *by_rank, missing.reshape(-1, inputs.shape[1]), errors)

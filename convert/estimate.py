"""Calibrates what the token rule "estimate" goes by (see `allocmoe_edge/plan/estimator.py`), in two runs of the full model
over a text, and short ones of the reduced model. What each of the first two has found is kept in the checkpoint.

1. Inputs and the sizes of the experts' outputs: the directions of the input on which sizes depend linearly; among the main
   directions of the input, those whose positive parts tell more; every expert's size as a function of both, and how sizes are
   distributed.
2. With the rule deciding, and all experts computed: what is missing, and a low-rank estimate of it.
3. With the rule in force, on a part of the text: what layers spend where those before them skip experts.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
import hashlib
from pathlib import Path
from typing import Callable, Dict, List, Optional

from allocmoe_edge import Llama, Plan, PlanError
from allocmoe_edge.measure.perplexity import evaluate
from allocmoe_edge.measure.recording import recording
from allocmoe_edge.plan.estimator import ARRAYS, Estimator, as_it_runs
from allocmoe_edge.plan.profile import Profile
import numpy as np
from threadpoolctl import threadpool_limits

from . import CalibrationError
from .calibration import spread
from .checkpoint import Checkpoint, window_name
from .estimator_fit import (
    N_INPUT,
    N_RELU,
    N_SIZE,
    RANK,
    SizeRows,
    damages,
    fit_layer,
    keeps,
    log_sizes,
    log_weights,
    windows_apart,
    with_outputs,
    with_sizes,
)
from .input_file import InputFile
from .progress import progress_bar
from .regression import PENALTY, MissingSums, SizeSums, positive_directions

# of a matrix whose products are too small for several threads, and take little memory
_FEW_ROWS = 1024
# runs with the rule in force, each from thresholds that the one before has corrected
_CORRECTIONS = 2

Arrays = Dict[str, np.ndarray]


def calibrate(
    llm: Llama,
    profile: Profile,
    total: int,
    full: tuple,
    token_windows: np.ndarray,
    spend_windows: Optional[np.ndarray] = None,
    n_size: int = N_SIZE,
    n_relu: int = N_RELU,
    rank: int = RANK,
    checkpoint: Optional[Checkpoint] = None,
) -> Optional[Estimator]:
    """What the rule is to go by on a model, from text.

    The estimate of outputs is fitted to what is skipped at `total` activations; the rest does not depend on it.
    What it needs beside the model is `estimator_fit.memory`.

    Args:
        profile: the layers' sensitivities, and k_base.
        token_windows: int32, shape [n_windows, n_ctx]; n_ctx is at most the micro-batch of `llm`.
        spend_windows: further windows; nothing is fitted to them, but what they spend under the rule counts when thresholds
            are corrected, as many of them as are kept apart of the others. A few windows alone can be some 10% off.
        checkpoint: has what earlier runs found, and takes what this one finds.

    Returns:
        None where the model, or the backend that it runs on, has no use for it.

    Raises:
        CalibrationError: what was recorded cannot be fitted, as of a text that repeats one token.
    """
    try:
        with np.errstate(all="ignore"):  # what comes of it is looked at
            return _calibrate(llm, profile, total, full, token_windows, spend_windows, n_size, n_relu, rank, checkpoint)
    except (PlanError, np.linalg.LinAlgError) as error:
        raise CalibrationError(str(error)) from error


def _calibrate(
    llm: Llama,
    profile: Profile,
    total: int,
    full: tuple,
    token_windows: np.ndarray,
    spend_windows: Optional[np.ndarray],
    n_size: int,
    n_relu: int,
    rank: int,
    checkpoint: Optional[Checkpoint],
) -> Optional[Estimator]:
    n_ctx = token_windows.shape[1]
    apart = windows_apart(len(token_windows), n_ctx)
    held = token_windows[apart] if apart.any() else token_windows
    if spend_windows is not None:
        held = np.concatenate([held, spread(spend_windows, len(held))])
    text = f"{window_name(token_windows)} {token_windows.shape}"

    def stage(name: str, compute: Callable[[], Optional[Arrays]]) -> Optional[Arrays]:
        return compute() if checkpoint is None else checkpoint.arrays(f"estimates, {name}", compute)

    damage, folder = damages(profile, full), checkpoint.path.parent if checkpoint else None
    sizes = stage(
        f"{n_size} and {n_relu} sizes, penalty {PENALTY:g}, k_base {profile.k_base}, damages {_name(damage)}, on {text}",
        lambda: _sizes(llm, full, token_windows, apart, n_size, n_relu, damage, profile.k_base, folder),
    )
    if sizes is None:
        return None
    plan = _estimator(sizes).plan(total, full, profile.k_base)
    outputs = stage(
        f"outputs of rank {rank} at {total}, sizes {_name(sizes['log_norm'])}, on {text}",
        lambda: _outputs(llm, plan, token_windows, rank),
    )
    assert outputs is not None
    estimator = _estimator(outputs)
    with progress_bar("estimates, spend", _CORRECTIONS * len(held), "pass") as bar:
        for _ in range(_CORRECTIONS):
            estimator = _corrected(llm, estimator, estimator.plan(total, full, profile.k_base), held, bar.update)
    return estimator


def _estimator(arrays: Arrays) -> Estimator:
    return Estimator(n_relu=int(arrays["n_relu"]), **{name: arrays[name] for name in ARRAYS})


def _arrays(estimator: Estimator) -> Arrays:
    return {name: np.asarray(getattr(estimator, name)) for name in (*ARRAYS, "n_relu")}


def _name(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array, np.float64).tobytes()).hexdigest()[:16]


def possible(llm: Llama, full: tuple) -> bool:
    """Whether the model, and the backend that it runs on, can leave out single experts and estimate what they would give."""
    with recording(llm, _whole(llm, full)) as recorder:
        return recorder.works


def _whole(llm: Llama, full: tuple) -> Plan:
    """Skips nothing, but runs only where the rule does."""
    shapes = Estimator.shapes(len(full), n_expert_of(llm), 1, 0, llm.n_embd())
    return Estimator(**{name: np.zeros(shape, np.float32) for name, shape in shapes.items()}).plan(sum(full), full)


def _sizes(
    llm: Llama,
    full: tuple,
    token_windows: np.ndarray,
    apart: np.ndarray,
    n_size: int,
    n_relu: int,
    damage: np.ndarray,
    k_base: int,
    folder: Optional[Path],
) -> Optional[Arrays]:
    """Of an Estimator of sizes alone, fitted to the windows that are not kept apart. folder: for a temporary file."""
    n_expert, n_embd = n_expert_of(llm), llm.n_embd()
    layers = [il for il, k in enumerate(full) if k]
    sums = {il: SizeSums(n_expert, n_embd) for il in layers}
    taken: Dict[int, list] = {il: [] for il in layers}  # of each window experts, log sizes, log weights
    down = np.zeros((len(full), n_size, n_embd), np.float32)
    main = np.zeros((len(full), min(N_INPUT, n_embd), n_embd), np.float16)
    positive = np.zeros((len(full), n_relu, n_embd), np.float32)
    kept: Dict[int, List[SizeRows]] = {}
    fitted: Dict[int, np.ndarray] = {}
    with InputFile(folder, layers, token_windows.shape[1], n_embd) as inputs:
        with recording(llm, _whole(llm, full), inputs=True) as recorder:
            if not recorder.works:
                return None
            with progress_bar("estimates, sizes", len(token_windows), "pass") as bar:
                records = recorder.layers(token_windows, "inputs", "experts", "norms", "weights", progress=bar.update)
                for il, layer in records:
                    if not (np.isfinite(layer.norms).all() and np.isfinite(layer.inputs).all()):
                        raise CalibrationError(
                            f"layer {il}: an input or an expert's output is not finite", finite=False
                        )
                    sizes = log_sizes(layer)
                    if not apart[len(taken[il])]:
                        sums[il].add(layer.inputs, layer.experts, sizes)
                    taken[il].append((layer.experts, sizes, log_weights(layer.weights)))
                    inputs.append(layer.inputs)

        def find(il: int) -> None:
            of_layer = sums.pop(il)
            down[il] = as_it_runs(of_layer.directions(n_size))
            main[il] = of_layer.main_inputs(main.shape[1])
            if not (np.isfinite(down[il]).all() and np.isfinite(main[il]).all()):
                raise CalibrationError(f"layer {il}: its inputs are all alike")

        def train(il: int) -> None:
            basis, rows = main[il].astype(np.float32), []
            for x in inputs.windows(il):
                rows.append(((x @ basis.T).astype(np.float16), x @ down[il].T))
            of_fit = [(*w, *of_experts[:2]) for w, of_experts, a in zip(rows, taken[il], apart) if not a]
            x_fit, linear_fit, experts, sizes = map(np.concatenate, zip(*of_fit))
            directions = positive_directions(x_fit, linear_fit, experts, sizes, n_expert, n_relu)
            positive[il] = as_it_runs(directions @ basis)
            kept[il] = [
                (np.concatenate([linear, np.maximum(x @ positive[il].T, 0.0)], axis=1), *of_experts)
                for x, (_, linear), of_experts in zip(inputs.windows(il), rows, taken.pop(il))
            ]
            fitted[il] = fit_layer(kept[il], apart, n_expert)

        _by_layers("estimates, directions", layers, find, llm.n_threads, n_embd)
        _by_layers("estimates, positive directions", layers, train, llm.n_threads, main.shape[1])
    directions = np.concatenate([down, positive], axis=1)
    return _arrays(with_sizes(directions, n_relu, kept, fitted, damage, apart, k_base, full, n_expert))


def _outputs(llm: Llama, plan: Plan, token_windows: np.ndarray, rank: int) -> Arrays:
    """Of plan.estimator with an estimate of the outputs that the plan skips."""
    assert plan.estimator is not None and plan.threshold is not None
    n_expert = n_expert_of(llm)
    missing = {il: MissingSums(n_expert, llm.n_embd()) for il in plan.moe_layers}
    bar = progress_bar("estimates, outputs", len(token_windows), "pass")
    with bar, recording(llm, plan, inputs=True) as recorder:
        what = ("inputs", "experts", "weights", "values", "missing")
        for il, layer in recorder.layers(token_windows, *what, progress=bar.update):
            keep = keeps(layer.values, plan.threshold[il], plan.k_base)
            skipped = np.zeros((len(layer.inputs), n_expert), np.float32)
            np.put_along_axis(skipped, layer.experts, np.where(keep, 0.0, layer.weights), axis=1)
            missing[il].add(layer.inputs, skipped, layer.missing)
    fitted: Dict[int, tuple] = {}

    def fit(il: int) -> None:
        fitted[il] = missing.pop(il).fit(rank)

    _by_layers("estimates, ranks", list(missing), fit, llm.n_threads, llm.n_embd())
    return _arrays(with_outputs(plan.estimator, fitted))


def _by_layers(name: str, layers: List[int], function: Callable[[int], None], n_threads: int, n_rows: int) -> None:
    """The function of every layer. Of matrices of few rows several layers at a time, each on one thread: threads of one product
    would spend their time waiting for one another, on a machine with other work twenty times that of the product. Of larger ones
    one after the other, for the memory that each takes."""
    n_at_once = n_threads if n_rows <= _FEW_ROWS else 1

    def of(il: int) -> None:
        with np.errstate(all="ignore"):  # each thread has its own
            function(il)

    with progress_bar(name, len(layers), "layer") as bar, threadpool_limits(n_threads // n_at_once):
        with ThreadPoolExecutor(n_at_once) as pool:
            try:
                for _ in pool.map(of, layers):
                    bar.update()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def _corrected(
    llm: Llama, estimator: Estimator, plan: Plan, token_windows: np.ndarray, progress: Callable[[], object]
) -> Estimator:
    """With distributions of sizes that give what the layers spend under the plan: less reaches a layer where others skip."""
    llm.apply_plan(plan, skip_logits=True)
    llm.expert_stats(reset=True)
    evaluate(llm, token_windows, progress)
    spent = llm.expert_stats(reset=True)["prefill"]["mean"]
    full, base = np.array(plan.expert_used_count_full), np.minimum(plan.expert_used_count_full, plan.k_base)
    free = full > base
    if not np.isfinite(np.array(plan.threshold)[free]).all():
        return estimator
    shares = np.where(free, (spent - base) / np.maximum(full - base, 1), 0.0)
    # layers with nothing to choose keep their zeros
    return estimator.shifted(np.where(free, plan.threshold, 0.0), np.clip(shares, 0.0, 1.0))


def n_expert_of(llm: Llama) -> int:
    """Experts in a layer of a model that has some."""
    return int(llm.metadata[f"{llm.metadata['general.architecture']}.expert_count"])

"""The stages of a conversion in order: source, text, profile, estimates, choice, file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Optional

from allocmoe_edge import Llama, Plan
from allocmoe_edge.command import load_errors
from allocmoe_edge.gguf_file import fingerprint
from allocmoe_edge.measure import memory
from allocmoe_edge.plan.estimator import Estimator
from allocmoe_edge.plan.profile import Profile
import numpy as np

from . import (
    CalibrationError,
    ConvertError,
    calibration,
    checkpoint,
    choose,
    costs,
    estimate,
    estimator_fit,
    output,
    sensitivity,
    source,
    stages,
    thresholds,
)
from .calibration import CalibrationText
from .checkpoint import Checkpoint
from .finite import weights_not_finite
from .progress import Conversion, conversion, say, waiting
from .settings import Settings
from .task import Task, plan_task

_NO_ESTIMATES = "this model, or the backend that it runs on, has no estimates of experts that a token leaves out"


@dataclass(frozen=True)
class Written:
    """paths: of the files. checked: whether the plan was compared with others on held-out text."""

    paths: list
    plan: Plan
    profile: Profile
    checked: bool


def convert(settings: Settings) -> Written:
    """Everything that allocmoe-convert does.

    Raises:
        ConvertError, GGUFError, PlanError: see the stages; nothing has been written.
    """
    with conversion() as progress, source.as_gguf(settings) as gguf:
        task = plan_task(settings, gguf)
        if task.runs_the_model:
            if settings.calib is None:  # how much a text has is known when it has been read
                task = _with_room(task)
            progress.expect(stages.expected(task))
            choice = measure(task, progress)
            profile, plan = choice.profile, choice.plan
        else:
            profile, plan = replan(task)
        if settings.plan_only:
            written = [output.write_side_file(settings.output, task.model, plan, profile)]
        else:
            written = output.write_planned(gguf.path, settings.output, plan, profile, consume=gguf.temporary)
    checkpoint.remove_ours(settings.checkpoint)  # also what a killed run has left
    if task.runs_the_model:
        peak = memory.peak()
        say(progress.summary() + (f"; at most {peak / 1e9:.1f} GB of memory" if peak else ""))
    return Written(written, plan, profile, checked=task.runs_the_model)


def replan(task: Task) -> tuple:
    """(Profile, Plan) from the file's own sensitivities, at once: not checked on any text."""
    assert task.stored is not None
    profile = replace(task.stored, held_out=None)
    return profile, profile.plan(task.total, task.full, task.settings.token_rule)


def measure(task: Task, progress: Optional[Conversion] = None) -> choose.Choice:
    """The plan by running the model; its sensitivities are measured unless the task has some. progress: is told where less is to be
    done than the task says."""
    settings = task.settings
    with Checkpoint(settings.checkpoint, task.source.path) as results:
        if results.restarted:
            say(f"{results.path} was of another model: measuring anew")
        llm = load(task)
        try:
            tokens = None
            if settings.calib is not None:
                with waiting("reading the calibration text"):
                    tokens = calibration.read(llm, settings.calib)
                task = replace(task, text_tokens=calibration.most(llm, tokens, settings.ctx_size))
            # what the model itself has taken is known now, and what it can do
            task = _that_runs(_with_room(task), llm)
            llm.set_plan(None)
            if progress is not None:
                progress.expect(stages.expected(task))
            choice = _measured(task, llm, tokens, results)
            if fingerprint(task.source.path) != results.model:
                raise ConvertError(
                    f"{settings.model}: has been replaced or written to since the conversion began; nothing was written"
                )
            return choice
        except CalibrationError as error:
            raise ConvertError(_why_not_finite(task, error)) from error
        finally:
            llm.close()


def _measured(task: Task, llm: Llama, tokens: Optional[np.ndarray], results: Checkpoint) -> choose.Choice:
    settings, full = task.settings, task.full
    n_fit = task.estimate_tokens if task.tries_estimates and not task.calibrated else 0
    text = calibration_text(task, llm, tokens, results, n_fit)
    decoded = text.held_out.ravel()
    cost = None
    if settings.cost == "ms" or settings.target_tps is not None:
        cost = costs.measure(llm, full, decoded)
        say(
            f"decoding takes {cost.decode_ms(full):.1f} ms a token at full budget, {cost.fixed_ms:.1f} ms of it not experts"
        )
    if cost is not None and settings.target_tps is not None:
        task = replace(task, total=costs.largest_total(cost, full, settings.target_tps))
        if settings.token_rule == "estimate" and task.total < task.least:
            raise ConvertError(
                f"--target-tps {settings.target_tps:g}: leaves {task.total} activations, fewer than the {task.least} of "
                f"--k-base {task.k_base} in every layer"
            )
    profile = task.stored or profiled(task, llm, text, results)
    if cost is not None:
        profile = replace(profile, cost=cost.activation_ms, cost_unit="ms")
    elif settings.cost == "activations":
        profile = replace(profile, cost=(1.0,) * len(full), cost_unit="activations")
    estimator = _estimator(task, llm, profile, text, results) if task.tries_estimates else None
    profile = replace(profile, estimator=estimator)
    if settings.max_ppl_increase is not None:
        say(
            f"looking for the smallest budget within {100 * settings.max_ppl_increase:g}% of the full model's perplexity"
        )
        total = choose.smallest_total(llm, profile, full, text, settings.max_ppl_increase, settings.token_rule)
        task = replace(task, total=total)
    limit = np.inf if settings.max_ppl_increase is None else settings.max_ppl_increase
    choice = choose.choose(llm, profile, task.total, full, text, settings.token_rule, limit)
    choose.report(choice, limit)
    if settings.target_tps is not None:
        with waiting("decoding"):
            speed = 1000 / costs.decode_ms(llm, choice.plan, decoded)
        missed = f", less than the {settings.target_tps:g} of --target-tps" if speed < settings.target_tps else ""
        say(f"measured with this plan: {speed:.1f} tokens/s{missed}")
    return choice


def calibration_text(
    task: Task, llm: Llama, tokens: Optional[np.ndarray], results: Checkpoint, n_fit: int
) -> CalibrationText:
    """Of the tokens of the file that the settings name, or written by the model. n_fit: tokens to calibrate estimates on."""
    settings = task.settings
    if tokens is not None:
        assert settings.calib is not None
        return calibration.from_tokens(llm, tokens, settings.calib, task.calib_tokens, settings.ctx_size, n_fit)
    say("the model writes its own calibration text (--calib FILE gives it one)")
    return calibration.self_generated(llm, task.calib_tokens, settings.ctx_size, settings.seed, results, n_fit)


def profiled(task: Task, llm: Llama, text: CalibrationText, results: Checkpoint) -> Profile:
    """The layers' sensitivities, measured."""
    settings, full = task.settings, task.full
    passes = sensitivity.n_passes(full, settings.profile)
    windows = f"{len(text.profile)} windows of {settings.ctx_size} tokens"
    say(f"profiling ({settings.profile}, {settings.metric}) on {text.source.source}: {passes} passes over {windows}")
    rows, reused = sensitivity.measure(llm, full, text.profile, settings.profile, settings.metric, results)
    if reused:
        say(f"{reused} cells of the profile had been measured before")
    return Profile(
        rows, (1.0,) * len(full), text.source, metric=settings.metric, mode=settings.profile, k_base=settings.k_base
    )


def load(task: Task) -> Llama:
    """The model at full budget, a window of the text in one piece, so that a run can start at a later layer."""
    settings = task.settings
    with load_errors(settings.model), waiting("loading the model"):
        llm = Llama(
            str(task.source.path),
            n_ctx=settings.ctx_size,
            n_batch=settings.ctx_size,
            n_ubatch=settings.ctx_size,
            n_threads=settings.threads,
            n_threads_batch=settings.threads,
            n_gpu_layers=settings.n_gpu_layers,
            n_cpu_moe=settings.n_cpu_moe,
            seed=settings.seed,
            verbose=False,
        )
    llm.set_plan(None)
    return llm


def _with_room(task: Task) -> Task:
    """Without estimates, and a line that says so, where they may be left out and there is no room to calibrate them."""
    settings = task.settings
    if not task.tries_estimates or task.calibrated or settings.token_rule == "estimate":
        return task
    tokens = max(task.estimate_tokens, task.calib_tokens)
    shape = max(tokens // settings.ctx_size, 1), settings.ctx_size
    room = {
        "memory": (_memory_needed(task, shape), memory.available()),
        "disk space": (
            estimator_fit.disk_space(task.full, task.n_embd, shape),
            output.free_space(settings.output.parent),
        ),
    }
    for what, (needed, free) in room.items():
        if free is not None and needed > free:
            has, wants = output.sizes(free, needed)
            say(
                f"estimates of experts are not tried: to calibrate them takes {wants} of {what}, and "
                f"{has} are free (--token-rule estimate tries them all the same)"
            )
            return replace(task, can_estimate=False)
    return task


def _that_runs(task: Task, llm: Llama) -> Task:
    """Without estimates, and a line that says so, where this model cannot have them; not after text and profile, which take long.

    Raises:
        ConvertError: it cannot run the token rule that is asked for.
    """
    rule = task.settings.token_rule
    if rule in ("threshold", "batch") and not thresholds.possible(llm, task.full):
        raise ConvertError(
            f"token rule {rule}: this model, or the backend that it runs on, cannot leave out single experts of a token"
        )
    if not task.tries_estimates or estimate.possible(llm, task.full):
        return task
    _left_out(task, _NO_ESTIMATES)
    return replace(task, can_estimate=False)


def _memory_needed(task: Task, shape: tuple) -> int:
    return estimator_fit.memory(task.full, task.n_expert, task.n_embd, shape, task.settings.threads)


def _estimator(
    task: Task, llm: Llama, profile: Profile, text: CalibrationText, results: Checkpoint
) -> Optional[Estimator]:
    """The profile's Estimator or a new one; None, with a line that says why, where there can be none."""
    if profile.estimator is not None:
        return profile.estimator
    needed = _memory_needed(task, text.fit.shape)
    say(f"calibrating estimates of experts on {text.fit.size} tokens, {needed / 1e9:.1f} GB beside the model")
    # at full budget nothing is skipped to learn from
    at = max(task.total if task.total < sum(task.full) else -(-sum(task.full) // 2), task.least)
    try:
        found = estimate.calibrate(llm, profile, at, task.full, text.fit, text.spend, checkpoint=results)
        reason = _NO_ESTIMATES
    except CalibrationError as error:
        if not error.finite:
            raise
        found, reason = None, f"cannot be calibrated on this text ({error}); --calib FILE gives it another"
    if found is None:
        _left_out(task, reason)
    return found


def _left_out(task: Task, reason: str) -> None:
    """A line, or the error where estimates are asked for."""
    if task.settings.token_rule == "estimate":
        raise ConvertError(f"token rule estimate: {reason}")
    say(f"token rule estimate is left out: {reason}")


def _why_not_finite(task: Task, error: CalibrationError) -> str:
    if error.finite:
        return str(error)
    tensor = weights_not_finite(task.source.path)
    if tensor is not None:
        return f"{task.settings.model}: {tensor} holds weights that are NaN or infinite: {error}"
    return f"{task.settings.model}: {error}, though all of its weights are: it cannot be measured on this machine"

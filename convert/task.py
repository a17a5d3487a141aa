"""What is to be done with a model: the settings met with what its file says, before hours are spent on it."""

from __future__ import annotations

from dataclasses import dataclass, replace
import math
from typing import Optional

from allocmoe_edge import parse_budget
from allocmoe_edge.gguf_file import GGUFFile
from allocmoe_edge.plan import looks_like_percent, metadata
from allocmoe_edge.plan.profile import Profile

from . import ConvertError
from .progress import say
from .settings import CALIB_TOKENS, CALIB_TOKENS_ALONE, Settings
from .source import Source


@dataclass(frozen=True)
class Task:
    """A model as GGUF, and what is to be done with it.

    model: what its file says of experts; it has some.
    total: the budget in activations per token, unless the settings have it found.
    stored: the file's profile, if its sensitivities are to be used.
    n_expert, n_embd: of the model, 0 where the file is a plan alone.
    can_estimate: whether the model can have estimates, and there is memory and disk space to calibrate them, as far as is known.
    text_tokens: that a calibration text from a file has to measure on, once it has been read.
    """

    settings: Settings
    source: Source
    model: metadata.ModelPlan
    total: int
    stored: Optional[Profile] = None
    n_expert: int = 0
    n_embd: int = 0
    can_estimate: bool = True
    text_tokens: float = math.inf

    @property
    def full(self) -> tuple:
        """K_l per layer, 0 where a layer routes no experts."""
        assert self.model.full is not None
        return self.model.full

    @property
    def calibrated(self) -> bool:
        """Whether the stored profile has estimates."""
        return self.stored is not None and self.stored.estimator is not None

    @property
    def tries_estimates(self) -> bool:
        """Whether token rule "estimate" is asked for, or among those to be tried and possible at this budget."""
        rule = self.settings.token_rule
        return self.can_estimate and (
            rule == "estimate" or (rule is None and self.least <= self.total < sum(self.full))
        )

    @property
    def calib_tokens(self) -> int:
        """Tokens for the profile."""
        asked = self.settings.calib_tokens or (CALIB_TOKENS if self.tries_estimates else CALIB_TOKENS_ALONE)
        return int(min(asked, self.text_tokens))

    @property
    def estimate_tokens(self) -> int:
        """Tokens for the estimates."""
        return int(min(self.settings.estimate_tokens, self.text_tokens))

    @property
    def k_base(self) -> int:
        return self.settings.k_base if self.stored is None else self.stored.k_base

    @property
    def least(self) -> int:
        """Activations with k_base experts in every layer."""
        return sum(min(k, self.k_base) for k in self.full)

    @property
    def runs_the_model(self) -> bool:
        """Whether sensitivities in the file do not suffice."""
        settings, stored = self.settings, self.stored
        if stored is None or not settings.fixed_budget or settings.cost not in (None, stored.cost_unit):
            return True
        needed = {"estimate": stored.estimator, "threshold": stored.threshold_table}
        return settings.token_rule in needed and needed[settings.token_rule] is None


def plan_task(settings: Settings, gguf: Source) -> Task:
    """Looks at the model, and refuses what it cannot give before hours are spent on it."""
    model = metadata.read(gguf.path)
    if model.full is None or not any(model.full):
        raise ConvertError(f"{settings.model}: a dense model: it has no experts to allocate")
    if model.side_file and not settings.plan_only:
        raise ConvertError(f"{settings.model}: has a plan and no model: only --plan-only can write from it")
    if max(model.full) == 1 and "budget" not in settings.given:
        raise ConvertError(
            f"{settings.model}: its tokens use one expert in each layer: there is none to leave out; --budget 1.0 writes the file all the same"
        )
    total = parse_budget(settings.budget, sum(model.full), sum(k > 0 for k in model.full))
    if settings.fixed_budget and looks_like_percent(settings.budget, sum(model.full)):
        say(
            f"--budget {settings.budget}: {total} of the model's {sum(model.full)} expert activations per token; "
            f"{total} per cent of them are written {total}%"
        )
    # sensitivities are those of the weights that they were measured on
    anew = settings.calib is not None or settings.reprofile or settings.quantize is not None
    task = Task(settings, gguf, model, total, None if anew else model.profile)
    if task.stored is not None:
        say(f"using the sensitivities in {settings.model} (measured on {task.stored.calibration.source})")
        settings.check_stored(task.stored, task.runs_the_model)
    if task.runs_the_model:
        if model.side_file:
            raise ConvertError(
                f"{settings.model}: has sensitivities and no model, and this needs the model; give the model's file"
            )
        task = _with_sizes(task)
        if settings.fixed_budget and settings.token_rule is None and total == sum(model.full) and max(model.full) > 1:
            say(
                f"--budget {settings.budget} is the full budget, for which there is nothing to estimate: this file will serve lower ones "
                "by numbers of experts alone; --budget 0.5, or --token-rule estimate, calibrates estimates, which serve them better"
            )
    _check_k_base(task)
    return task


def _with_sizes(task: Task) -> Task:
    """With the model's sizes, and windows no longer than it reads."""
    settings = task.settings
    with GGUFFile(task.source.path) as file:
        arch = file.need("general.architecture")
        n_ctx, n_expert, n_embd = (
            file.get(f"{arch}.{key}") for key in ("context_length", "expert_count", "embedding_length")
        )
    if isinstance(n_ctx, int) and 2 <= n_ctx < settings.ctx_size:
        if "ctx_size" in settings.given:
            raise ConvertError(f"--ctx-size {settings.ctx_size}: the model reads {n_ctx} tokens at most")
        settings = replace(settings, ctx_size=n_ctx)
    return replace(task, settings=settings, n_expert=n_expert or 0, n_embd=n_embd or 0)


def _check_k_base(task: Task) -> None:
    settings, most = task.settings, max(task.full)
    if task.k_base > most:
        raise ConvertError(f"--k-base {task.k_base}: the model's tokens use {most} experts a layer, no more")
    asked = settings.token_rule == "estimate" or "k_base" in settings.given
    if asked and settings.token_rule != "off" and settings.fixed_budget and task.total < task.least:
        raise ConvertError(
            f"--budget {settings.budget}: {task.total} activations, fewer than the {task.least} of --k-base {task.k_base} in "
            "every layer: raise the one or lower the other"
        )

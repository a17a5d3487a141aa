"""What a conversion is asked for: the options, checked against each other before anything is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import FrozenSet, Optional

from allocmoe_edge.measure.cores import physical_cores
from allocmoe_edge.output_file import followed
from allocmoe_edge.plan import TOKEN_RULES, PlanError, parse_budget
from allocmoe_edge.plan.profile import Profile

from . import ConvertError, quantize, sensitivity

# how many activations a model has is not known before it is read: any number that one can have (llama.cpp's limits)
_MOST_ACTIVATIONS = 512 * 1024
_COSTS = ("activations", "ms")
# Tokens for the profile, where estimates are tried and elsewhere: what they take from it is no better known for twice as many.
CALIB_TOKENS, CALIB_TOKENS_ALONE = 1024, 2048


@dataclass(frozen=True)
class Settings:
    """The options of allocmoe-convert by their names, with their defaults; `allocmoe-convert --help` explains them.

    given: names of those that the user has set, but for those of the machine.

    Raises:
        ConvertError: an option without one that it needs, or beside one that it contradicts.
        PlanError: a budget that no model can have.
    """

    model: Path
    output: Path
    plan_only: bool = False
    force: bool = False
    budget: str = "0.5"
    max_ppl_increase: Optional[float] = None
    target_tps: Optional[float] = None
    profile: str = "fast"
    metric: str = "kl"
    cost: Optional[str] = None
    token_rule: Optional[str] = None
    k_base: int = 1
    reprofile: bool = False
    calib: Optional[Path] = None
    calib_tokens: Optional[int] = None  # None: see `Task.calib_tokens`
    estimate_tokens: int = 12288
    ctx_size: int = 512
    seed: int = 0
    outtype: Optional[str] = None
    quantize: Optional[str] = None
    imatrix: Optional[Path] = None
    allow_requantize: bool = False
    pre_tokenizer: Optional[str] = None
    threads: int = field(default_factory=physical_cores)
    n_gpu_layers: Optional[int] = 0  # None: what fits
    n_cpu_moe: int = 0
    given: FrozenSet[str] = frozenset()

    def __post_init__(self) -> None:
        # what is made on the way is made beside it; frozen: this is the one place that may set it
        object.__setattr__(self, "output", followed(self.output))
        choices = {"profile": sensitivity.MODES, "metric": sensitivity.METRICS, "quantize": quantize.FTYPES}
        for name, allowed in {**choices, "cost": _COSTS, "token_rule": TOKEN_RULES}.items():
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise ConvertError(f"{option(name)} {value}: want one of: {', '.join(allowed)}")
        least = {"k_base": 1, "calib_tokens": 1, "estimate_tokens": 1, "ctx_size": 2, "seed": 0, "threads": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConvertError(f"{option(name)} {value}: want at least {low}")
        try:
            parse_budget(self.budget, _MOST_ACTIVATIONS, 1)
        except PlanError:
            named = "; names are of budgets of a plan, which is yet to be made" if self.budget.strip().isalpha() else ""
            raise ConvertError(
                f"--budget {self.budget}: want a share of the model's own activations up to 1.0 (0.5, 50%), or a whole "
                f"number of activations per token over all layers (96){named}"
            ) from None
        for name in ("imatrix", "allow_requantize"):
            if getattr(self, name) and self.quantize is None:
                raise ConvertError(f"{option(name)} is for --quantize")
        if self.calib is not None and "seed" in self.given:
            raise ConvertError("--seed is for the text that the model writes, and --calib gives it one: leave one out")
        if self.token_rule not in (None, "estimate") and "estimate_tokens" in self.given:
            raise ConvertError(
                f"--estimate-tokens is for token rule estimate: leave out --token-rule {self.token_rule}"
            )
        if self.target_tps is not None and self.cost == "activations":
            raise ConvertError("--target-tps spends milliseconds: leave out --cost activations")

    @property
    def checkpoint(self) -> Path:
        """Where what has been measured is kept until the output is complete."""
        return checkpoint_path(self.output)

    @property
    def fixed_budget(self) -> bool:
        """Whether the budget is what the user says, and not found by running the model."""
        return self.max_ppl_increase is None and self.target_tps is None

    def check_stored(self, stored: Profile, runs_the_model: bool) -> None:
        """Refuses options that have no say where sensitivities are taken from the file.

        Args:
            stored: the file's profile.
            runs_the_model: whether it is run on text all the same.

        Raises:
            ConvertError: names the option, and what would make it usable.
        """
        measured = {"profile": stored.mode, "metric": stored.metric, "k_base": stored.k_base}
        unused = {name for name, value in measured.items() if getattr(self, name) != value}
        if not runs_the_model:
            unused |= {"calib_tokens", "estimate_tokens", "ctx_size", "seed"}
        elif stored.estimator is not None:
            unused.add("estimate_tokens")
        for name in sorted(unused & self.given):
            was = f" were measured with {option(name)} {measured[name]}" if name in measured else " need no text"
            raise ConvertError(
                f"{option(name)}: has no effect, for the sensitivities stored in {self.model} are used, which{was}; "
                "--reprofile measures anew, --calib FILE on a text of yours"
            )


def checkpoint_path(output: Path) -> Path:
    """The checkpoint of a conversion to `output`."""
    output = followed(output)
    return output.with_name(output.name + ".profile")


def option(name: str) -> str:
    """How the option for a field of `Settings` is written."""
    return "--" + name.replace("_", "-")

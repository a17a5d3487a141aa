"""`Llama`: llama-cpp-python's class of that name, spending an expert activation budget."""

from __future__ import annotations

import contextlib
from dataclasses import replace
import difflib
import inspect
import os
import sys
import time
from typing import Any, ContextManager, Dict, Generator, Iterator, NamedTuple, Optional, Sequence, Union
import warnings

from llama_cpp.llama_speculative import LlamaDraftModel
import numpy as np

from . import expert_cache as cache_size
from . import gpu_fit, hub, overrides, speed_target
from ._native import context_pointer, ffi, libggml_base, libllama, llama_cpp, set_verbose
from .argument_error import ArgumentError
from .checked_llama import (
    CheckedLlama,
    GenerationError,
    check_arguments,
    check_cache_types,
    check_pooling,
    check_tokens,
)
from .draft import DraftModel
from .gguf_file import EXPERTS, GGUFError, GGUFFile, fingerprint, model_paths
from .measure import memory
from .measure.cores import physical_cores
from .plan import TOKEN_RULES, VALUES, Plan, PlanError, integer_tuple, metadata, parse_budget, shown
from .plan.estimator import Estimator
from .prompt_cache import CacheOfOnePlan
from .second_context import SecondContext
from .threads_and_forks import in_turn, turns
from .whole_numbers import whole

Budget = Union[float, int, str]

_DENSE = "a dense model: it has no experts to budget"

# around a budget that is written as text, as the library has it
_BLANKS = " \t\n\r\f\v"

_PHASES = {"prefill": libllama.ALLOCMOE_PHASE_PREFILL, "decode": libllama.ALLOCMOE_PHASE_DECODE}


# what _plan_of_tokens and _plan_in_force may be beside a plan
_MIXED, _UNKNOWN = "mixed", "unknown"


def _warn(message: str) -> None:
    """Warns of the line that called this package: Python shows equal warnings of one line of ours once."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == __package__:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


class _Before(NamedTuple):
    """What was in force before a request that has a budget of its own."""

    plan: Optional[Plan]
    by_hand: Optional[Plan]


class Llama(CheckedLlama):
    """A language model from a GGUF file: everything that `llama_cpp.Llama` takes and does, and a budget.

    Any model will do. One without experts, or loaded with vocab_only, has no budget to set, and all the rest.

    What may be called while a completion is being read (a stream, or `generate`):

    - `set_budget` and `set_plan` take effect with the next token, and the text goes on: what is cached stays as it was
      computed. The next completion computes its prompt anew.
    - `save_state`, `expert_stats`, `tokenize` and the like change nothing.
    - `reset`, `load_state`, `eval`, `embed`, `close` and another completion end it: they do what they do, and reading on
      raises a `GenerationError`.

    A callback of the completion (a logits processor, a stopping criterion) may not call the last ones: there they raise a
    `GenerationError`. Any error of a callback ends the completion, which raises it. A signal handler must not call them
    either. It may run in the middle of a step, where nothing refuses the call, and the text then goes on as another one
    without an error.

    Several threads may share one `Llama`. A call waits until the call of another thread has ended, and a completion that
    is not streamed is one call. A stream is a call for each of its parts: between them other threads may call what they
    like, with the effects above. Only `tokenize` and `detokenize` do not wait. Two `Llama` objects, even of one file, have
    separate plans and run at the same time. Two whose logits processors call each other, each in a thread of its own, may
    wait for each other for ever.

    The child of a fork may use it, as a copy of its own. It may not if there is a GPU, or if another thread than the one
    that forked was at work with it: then it raises a `RuntimeError`, and the child has to load its own.

    Args:
        model_path: GGUF file, a str or a Path; the first one if the model is split.
        budget: None for the plan in the file (the model's own expert counts if it has none). A float in
            (0, 1] or a string like "50%" is a share of the model's own activations, an int is a total of
            expert activations per token. "full" is the model as it was trained, "balanced" the budget of the plan in the
            file, "fast" two thirds of that. All but the full budget need a file that allocmoe-convert made.
        token_rule: how a layer's activations are shared among the tokens: "estimate", "threshold", "batch" or "off"
            (see `Plan`). None for the rule in the file. Any but "off" needs a file that allocmoe-convert made.
        plan_path: a file written by `allocmoe-convert --plan-only`, whose plan and sensitivities are used instead of
            the model file's.
        n_gpu_layers: layers on the GPU, counted from the last; -1 for all. None or "auto" for as much as fits into
            what is free on the GPUs, less 1 GiB. Experts then go to the CPU's memory before whole layers do, as
            llama.cpp's programs choose it (--fit), and one line on stderr says what was chosen. Without a GPU it is 0:
            a number says so in one line, None says nothing.
        n_cpu_moe: with n_gpu_layers: the routed experts of the first so many layers stay in the CPU's memory, as with
            llama.cpp's --n-cpu-moe. A number above the model's layers means all. The rest of those layers goes where
            n_gpu_layers says.
        repack: let llama.cpp rearrange weights for the CPU, in memory of its own beside the file's pages. Prefill is
            faster so. With False a model needs no more memory than its file, and runs even if that is larger than the
            memory.
        expert_cache: for a model larger than memory: memory for its routed experts ("6GB", or bytes). The others are
            read from the file when a layer's router has chosen them, and those used last are kept. The output is the
            same, bit for bit, as that of a model in memory with repack=False, but for what miss_price leaves out. An
            expert that cannot be read ends the evaluation with a `GenerationError`. 0 for no cache. None for one only
            if the file is larger than the free memory and neither n_gpu_layers nor prefetch is given: it takes what
            the other weights and the context leave. Not on Windows.
        miss_price: with an expert cache and token rule "estimate": how many times the time of an expert in the cache
            it may cost to read one, 1 to 1e6. A generated token reads an expert only if its estimated output is at
            least sqrt(miss_price) times the threshold: that of the budget in force, or of the plan in the file if that
            is higher. Otherwise the estimate is used. At 1 the output is that without a cache. "auto" is what reading
            takes on this machine, measured as the model is loaded and rounded to a power of two. The attribute
            `miss_price` then has the number; give it for the same output on another machine, or under another load. If
            it is above 1 and the rule is "estimate", what a draft model proposes is passed over. Why the same call
            twice may then give two texts: `docs/speed.md`, "A price for reading".
        prefetch: for a model that stays in the file's pages (no expert_cache, repack=False): ask the system for all
            experts that a layer has chosen before the first of them is used, and for nothing around them. None for
            True only if there is no expert_cache and the file is larger than the available memory (or the limit of a
            control group, if that is less), for with a model that fits it only costs time. Without effect where no
            experts are in a mapped file, and on Windows.
        **kwargs: see `llama_cpp.Llama`. flash_attn is on by default if no layer is on a GPU and the cache is not of
            float32. n_threads and n_threads_batch are by default the physical cores that this process may use. An
            override of the experts per token (kv_overrides) lowers a plan to it. If it is above what the plan in the
            file was made for, only the full budget works, and plans by hand.

    Raises:
        GGUFError: the file is missing, not GGUF, damaged or truncated.
        PlanError: its plan does not fit the model, the budget cannot be met, an override does not fit the model, or a
            budget, a rule or a plan is given for a model without experts.
        ValueError: n_gpu_layers is none of these. n_cpu_moe is no number of layers, or is given beside
            n_gpu_layers=None. repack is no bool, prefetch neither that nor None. expert_cache is no size, more than
            the memory, or less than one layer's experts. miss_price is no number from 1 on. And all that
            `llama_cpp.Llama` refuses.
        TypeError: an argument that does not exist. (`llama_cpp.Llama` takes any name and says nothing.)
    """

    # the plan that the cached tokens were computed under, and what a strict one had left over when it went out of force
    _plan_of_tokens: Union[Plan, str, None] = None
    _left: Optional[np.ndarray] = None
    # the plan in force, as it is compared with that one; looked up when it is needed
    _plan_in_force: Union[Plan, str, None] = _UNKNOWN
    # budget of the request that is being made, and what was in force before a request with one, while that runs
    _asked: Optional[Budget] = None
    _before: Optional[_Before] = None
    # arguments of the last set_budget(), by which a copy comes to what is in force, unless that is by hand; None as it was loaded
    _set_to: Optional[Dict[str, Any]] = None
    # n_gpu_layers=None: whether that is still to be chosen, and then the layers with experts elsewhere
    _to_fit, _n_partial = False, 0
    # draft_model, which is opened when there is a context with a plan
    _draft_model: Any = None
    _is_loaded = False
    # whether an evaluation may go on after it has returned, as on a GPU
    _is_asynchronous = False
    # why only the full budget works, if an override goes beyond what the file's plan was made for
    _beyond_plan: Optional[str] = None

    def __init__(
        self,
        model_path: Union[str, os.PathLike],
        *,
        budget: Optional[Budget] = None,
        token_rule: Optional[str] = None,
        plan_path: Union[str, os.PathLike, None] = None,
        n_gpu_layers: Union[int, str, None] = 0,
        n_cpu_moe: int = 0,
        repack: bool = True,
        prefetch: Optional[bool] = None,
        expert_cache: Union[int, str, None] = None,
        miss_price: Union[float, str] = 1.0,
        **kwargs,
    ):
        _check_names(kwargs)
        if isinstance(n_gpu_layers, str) and n_gpu_layers == "auto":
            n_gpu_layers = None
        if n_gpu_layers is not None:
            n_gpu_layers = whole("n_gpu_layers", n_gpu_layers, -1, want="a number of layers, -1 for all, or 'auto'")
        n_cpu_moe = whole("n_cpu_moe", n_cpu_moe, 0, want="a number of layers, 0 or more")
        if n_gpu_layers is None and n_cpu_moe:
            raise ArgumentError("n_cpu_moe", f"found {n_cpu_moe}, want 0 where 'auto' chooses what goes on the GPU")
        if not isinstance(repack, bool):
            raise ValueError(f"repack: found {repack!r}, wanted True or False")
        if not (prefetch is None or isinstance(prefetch, bool)):
            raise ValueError(f"prefetch: found {prefetch!r}, wanted True, False or None")
        self._n_cpu_moe, self._repack, self._asked_prefetch = n_cpu_moe, repack, prefetch
        # as they are named now, whatever the working directory is later
        self._file, plan_path = (
            os.path.abspath(os.fsdecode(model_path)),
            plan_path and os.path.abspath(os.fsdecode(plan_path)),
        )
        self._plan_path, self._prefetch = plan_path, False
        self._asked_cache, self._miss_price = expert_cache, cache_size.price(miss_price)
        self._cache_bytes = 0
        self._stored_whole: Optional[metadata.ModelPlan] = None
        self._by_hand: Optional[Plan] = None
        self._handed_over: Optional[Estimator] = None
        self._drafted = np.zeros((2, 0), np.int64)
        for name in ("n_threads", "n_threads_batch"):
            kwargs[name] = kwargs.get(name) or physical_cores()
        self._asked_layers = n_gpu_layers
        self._to_fit = n_gpu_layers is None and not kwargs.get("vocab_only") and gpu_fit.is_possible()
        if n_gpu_layers is None:
            n_gpu_layers = -1 if self._to_fit else 0
        self._is_asynchronous = llama_cpp.llama_supports_gpu_offload()
        no_gpu = n_gpu_layers and not self._is_asynchronous
        if no_gpu:
            n_gpu_layers = 0
        kwargs["n_gpu_layers"] = n_gpu_layers
        if kwargs.get("flash_attn") is None:
            # with it llama.cpp rounds a cache of floats to half precision
            floats = llama_cpp.GGML_TYPE_F32 in (kwargs.get("type_k"), kwargs.get("type_v"))
            kwargs["flash_attn"] = not n_gpu_layers and not floats
        check_arguments(kwargs)
        set_verbose(kwargs.get("verbose", True))
        beside = not (budget is None and token_rule is None and plan_path is None)
        self._vocab_only = bool(kwargs.get("vocab_only"))
        asked = beside or "allocmoe.budget_total" in (kwargs.get("kv_overrides") or {})
        if self._vocab_only:
            if asked:
                raise PlanError(f"{model_path}: loaded with vocab_only: there are no experts to budget")
            GGUFFile(model_path).close()
            self._stored = metadata.ModelPlan(None)
            super().__init__(model_path, **kwargs)
            return
        # before native code sees the file: it would abort the process, or say no more than "failed"
        self._stored = metadata.read(model_path, estimator=False)  # the library has it
        if self._stored.side_file:
            raise PlanError(f"{model_path}: has a plan and no model: pass it as plan_path, beside the model's own file")
        if asked and not any(self._stored.full or ()):
            raise PlanError(f"{model_path}: {_DENSE}")
        overrides.check_ours(model_path, kwargs.get("kv_overrides"), beside=beside)
        check_cache_types(model_path, kwargs)
        check_pooling(model_path, kwargs)
        if plan_path is not None:
            self._stored = metadata.read_for(plan_path, self._stored, estimator=False)
        self._check_overrides(model_path, kwargs.get("kv_overrides"), budget)
        n_ubatch = min(kwargs.get("n_batch", 512), kwargs.get("n_ubatch", 512))
        n_bytes = cache_size.choose(
            model_path, expert_cache, prefetch is None and n_gpu_layers == 0, kwargs.get("n_ctx", 512), n_ubatch
        )
        if n_bytes:
            ours = {cache_size.KEY: n_bytes, cache_size.PRICE_KEY: self._miss_price}
            kwargs["kv_overrides"] = {**(kwargs.get("kv_overrides") or {}), **ours}
        if prefetch is None:
            prefetch = not n_bytes and memory.is_beyond(model_paths(model_path))
        fits = self._to_fit
        super().__init__(model_path, **kwargs)
        if fits:
            chosen = gpu_fit.sentence(
                self.model_params.n_gpu_layers, self._n_partial, llama_cpp.llama_model_n_layer(self.model)
            )
            print(f"allocmoe: {self.model_path}: {chosen}", file=sys.stderr)
        if no_gpu:
            print(f"allocmoe: {self.model_path}: {gpu_fit.reason_for_none()}: all on the CPU", file=sys.stderr)
        self._prefetch = prefetch and libllama.allocmoe_set_prefetch(context_pointer(self), True) > 0
        self._cache_bytes = n_bytes
        # of the files that were loaded, and not of what is there later
        self._computes_as = self._identity(kwargs.get("kv_overrides"))
        if n_bytes:
            self._miss_price = self._measured_price()[0]
        if self._beyond_plan is not None:
            self.set_plan(None)
        elif plan_path is not None:
            self._check(libllama.allocmoe_load_plan_file(context_pointer(self), os.fsencode(plan_path)), plan_path)
        if budget is None and token_rule is None and self._stored.plan is not None:
            self._warn_if_degraded(self._stored.plan.token_rule)
        if budget is not None or token_rule is not None:
            self.set_budget(budget, token_rule=token_rule)
        try:
            self._open_draft(self._draft_model)
        except Exception:
            self.close()
            raise
        self._is_loaded = True
        if self.verbose and asked:
            # the plan in the model's file has been logged by the native side
            print(f"allocmoe: {self.plan}", file=sys.stderr)
        if self.verbose and self._prefetch:
            print("allocmoe: experts are prefetched from the model's file", file=sys.stderr)
        if self.verbose and n_bytes:
            why = "" if expert_cache is not None else ", since the file is larger than what is free"
            print(f"allocmoe: {n_bytes / 1e9:.1f} GB of memory for the experts{why}", file=sys.stderr)

    def _check_overrides(self, model_path, kv_overrides: Optional[dict], budget: Optional[Budget]) -> None:
        """Refuses overrides that do not fit the model, and those that no plan of the file can serve."""
        stored = self._stored
        used = overrides.check(model_path, kv_overrides, stored.plan is not None)
        if used is None or stored.plan is None or stored.full is None or used <= max(stored.full):
            return
        self._beyond_plan = (
            f"kv_overrides: {stored.architecture}.expert_used_count is {used}, above the {max(stored.full)} experts per token "
            "that the plan in the file was made for: only the full budget (1.0) works, or plans set by hand (set_plan)"
        )
        full = [used if k else 0 for k in stored.full]
        is_full = isinstance(budget, str) and budget.strip(_BLANKS) == "full"
        if not is_full and (
            budget is None or _is_name(budget) or parse_budget(budget, sum(full), sum(k > 0 for k in full)) != sum(full)
        ):
            raise PlanError(f"{model_path}: {self._beyond_plan}")

    @property
    def prefetch(self) -> bool:
        """Whether chosen experts are asked for ahead of their use (see the argument of that name)."""
        return self._prefetch

    @property
    def expert_cache(self) -> int:
        """Bytes of memory for experts whose others stay in the file (see the argument of that name); 0 for none."""
        return self._cache_bytes

    @property
    def miss_price(self) -> float:
        """What it may cost to read an expert (see the argument of that name); 1 if there is no expert cache. Setting it takes
        effect as `set_budget` does."""
        return self._miss_price if self._cache_bytes else 1.0

    @miss_price.setter
    def miss_price(self, price: float) -> None:
        with self._turn:
            found = cache_size.price(price)
            if not found:
                raise ValueError("miss_price: it is measured as the model is loaded; want a number from 1 to 1e6")
            self._miss_price = found
            if not self._cache_bytes or not self._check(
                libllama.allocmoe_set_miss_price(context_pointer(self), self._miss_price)
            ):
                return
            self._forget_others()
            if self._generation is not None:
                self._plan_of_tokens = _MIXED

    @property
    def model_params(self):
        """`llama_model_params` that the model was loaded with."""
        # llama_cpp.Llama sets the context's between setting these and loading the model with them
        if self._to_fit and "context_params" in self.__dict__:
            self._to_fit = False
            self._n_partial, self._overrides = gpu_fit.choose(self.model_path, self._model_params, self.context_params)
        return self._model_params

    @model_params.setter
    def model_params(self, params) -> None:
        # llama_cpp.Llama sets this before it loads the model, and has no arguments for these
        params.use_extra_bufts = self._repack
        n_layer = min(self._n_cpu_moe, len(self._stored.full or ()))
        if n_layer:
            patterns = [ffi.new("char[]", EXPERTS.replace(r"(\d+)", str(il)).encode()) for il in range(n_layer)]
            overrides = ffi.new("struct llama_model_tensor_buft_override[]", n_layer + 1)  # a NULL pattern ends it
            for override, pattern in zip(overrides, patterns):
                override.pattern, override.buft = pattern, libggml_base.ggml_backend_cpu_buffer_type()
            params.tensor_buft_overrides = int(ffi.cast("uintptr_t", overrides))
            self._overrides = overrides, patterns  # they have to outlive the loading
        self._model_params = params

    @property
    def stored(self) -> metadata.ModelPlan:
        """What the model's file, or the one in plan_path, says of experts: the plan, and the profile if it has one."""
        if self._vocab_only:
            return self._stored
        if self._stored_whole is None:
            found = metadata.read(self._file)
            self._stored_whole = found if self._plan_path is None else metadata.read_for(self._plan_path, found)
        return self._stored_whole

    @property
    @in_turn
    def expert_used_count_full(self) -> tuple:
        """The model's own experts per token in each layer, 0 where a layer routes none."""
        return self._expert_used_count(libllama.allocmoe_get_full)

    @property
    @in_turn
    def plan(self) -> Optional[Plan]:
        """The plan in force, as the library has it; None for a model without experts."""
        full = self.expert_used_count_full
        if not any(full):
            return None
        counts = self._expert_used_count(libllama.allocmoe_get_plan)
        rule, threshold = ffi.new("struct allocmoe_rule *"), ffi.new("float[]", len(full))
        libllama.allocmoe_get_rule(context_pointer(self), rule, threshold, len(full))
        token_rule = TOKEN_RULES[rule.token_rule]
        if token_rule == "off":
            return Plan(counts, full)
        if self._by_hand is not None and self._by_hand.token_rule == token_rule:
            return replace(self._by_hand, expert_used_count=counts, expert_used_count_full=full)
        limits = None if rule.threshold == ffi.NULL else tuple(threshold)
        return Plan(counts, full, token_rule, rule.k_base, limits, rule.strict, VALUES[rule.value])

    @in_turn
    def set_budget(
        self, budget: Optional[Budget] = None, *, token_rule: Optional[str] = None, strict: Optional[bool] = None
    ) -> Plan:
        """Changes the budget of the loaded model, from the next token on.

        If the plan changes, the cached prompt is forgotten, so that what follows depends on the new plan only. While a
        completion is being read it is kept until that ends.

        Args:
            budget, token_rule: as in the constructor; None goes back to what the file says.
            strict: hold every layer's running mean at its plan, see `Plan`. None for True under "estimate" and False under
                other rules.

        Returns:
            The plan now in force.

        Raises:
            PlanError: a model without experts, a budget out of range, an unknown rule, `strict` under another rule than
                "threshold" or "estimate", or a file that lacks what this needs. Any budget but the full one, any rule but
                "off", and `strict` need a file that allocmoe-convert made. "threshold" also needs thresholds in it, and
                "estimate" estimates.
        """
        total = self._total(budget, token_rule)
        if self._beyond_plan is not None and (
            total != sum(self._full_of_experts()) or strict or token_rule not in (None, "off")
        ):
            raise PlanError(f"{self.model_path}: {self._beyond_plan}")
        if not (strict is None or isinstance(strict, (bool, np.bool_))):
            raise PlanError(f"strict: found {shown(strict)}, want True, False or None")
        self._plan_set(self._put_budget(total, token_rule, strict))
        self._set_to = {"budget": budget, "token_rule": token_rule, "strict": strict}
        own = self._stored.plan.token_rule if self._stored.plan else "off"
        self._warn_if_degraded(own if token_rule is None else token_rule)
        found = self.plan
        assert found is not None  # a model without experts has been refused above
        return found

    @in_turn
    def set_speed(self, tokens_per_second: float, *, token_rule: Optional[str] = None) -> Plan:
        """Sets the largest budget, to a 32nd of the full one, at which this machine generates so many tokens per second.

        It measures for some seconds: the model writes short texts at up to eight budgets. With an expert cache the time for
        reading experts counts, at the `miss_price` in force. If the machine does other work the result is another budget. Keep
        the plan that is returned, and `set_plan` sets it again. What is cached is forgotten, `expert_stats` starts anew, and a
        completion that is being read ends.

        Args:
            token_rule: as in `set_budget`.

        Returns:
            The plan now in force.

        Raises:
            ValueError: tokens_per_second is no number above 0.
            PlanError: as `set_budget`, or not even the smallest budget is fast enough; the plan is as it was.
            GenerationError: an expert cannot be read (see expert_cache).
        """
        wanted = speed_target.speed(tokens_per_second)
        self._tokens_change("set_speed()")
        before, by_hand, set_to = self._plan_or_none(), self._by_hand, self._set_to
        probe, done = speed_target.Probe(self), False

        def at(total: int) -> float:
            self.set_budget(total, token_rule=token_rule)
            return probe.tokens_per_second()

        try:
            most = sum(self._full_of_experts())
            self.set_budget(most, token_rule=token_rule)
            least, of_file, largest = (ffi.new("int64_t *") for _ in range(3))
            self._check(libllama.allocmoe_budget_range(context_pointer(self), least, of_file, largest))
            probe.warm_up()
            total, found = speed_target.largest_total(least[0], most, wanted, at)
            if found < wanted:
                raise PlanError(
                    f"{self.model_path}: {wanted:g} tokens/s are out of reach: with the fewest experts, {total} activations "
                    f"per token, this machine generates {found:.3g}"
                )
            plan, done = self.set_budget(total, token_rule=token_rule), True
        finally:
            if not done:
                self._plan_set(self._put_plan(before if by_hand is None else by_hand))
                self._by_hand, self._set_to = by_hand, set_to
            self.clear_cache()
            self.expert_stats(reset=True)
        if self.verbose:
            print(f"allocmoe: {found:.3g} tokens/s at {plan}", file=sys.stderr)
        return plan

    @in_turn
    def budget_total(self, budget: Optional[Budget]) -> int:
        """How many expert activations per token a budget is, over all layers. Nothing changes.

        Args:
            budget: as in the constructor.

        Raises:
            PlanError: as `set_budget`: the model, or its file under the token rule in force, cannot serve it.
        """
        full = sum(self._full_of_experts())
        if budget is None:
            return self._total_of_file(full)
        total = self._total(budget, None)
        if total == full:
            return total
        if self._beyond_plan is not None:
            raise PlanError(f"{self.model_path}: {self._beyond_plan}")
        least, of_file, most = (ffi.new("int64_t *") for _ in range(3))
        self._check(libllama.allocmoe_budget_range(context_pointer(self), least, of_file, most))
        if total < least[0]:
            rule = TOKEN_RULES[libllama.allocmoe_get_token_rule(context_pointer(self))]
            raise PlanError(
                f"{self.model_path}: budget: found {shown(budget)} (= {total} activations), want {least[0]} to {full} under "
                f"token rule {rule}"
            )
        return total

    def _total_of_file(self, full: int) -> int:
        own = self._stored.plan
        if own is None or self._beyond_plan is not None:
            return full
        try:
            return self._total("balanced", None)
        except PlanError:  # a plan alone
            return own.budget_total

    def _total(self, budget: Optional[Budget], token_rule: Optional[str]) -> int:
        """Expert activations per token that a budget is. Raises PlanError."""
        full = self._full_of_experts()
        if token_rule is not None and not (isinstance(token_rule, str) and token_rule in TOKEN_RULES):
            raise PlanError(f"token_rule: found {shown(token_rule)}, want one of: {', '.join(TOKEN_RULES)}")
        if budget is None:
            return libllama.ALLOCMOE_TOTAL_OF_FILE
        if not _is_name(budget):
            return parse_budget(budget, sum(full), sum(k > 0 for k in full))
        total = ffi.new("int64_t *")
        name = str(budget).strip(_BLANKS).encode()
        self._check(libllama.allocmoe_preset(context_pointer(self), name, _number_of(token_rule), total))
        return total[0]

    def _put_budget(self, total: int, token_rule: Optional[str], strict: Optional[bool]) -> bool:
        """Whether that changed the plan in force. Raises PlanError."""
        changed = self._check(
            libllama.allocmoe_set_budget(
                context_pointer(self), total, _number_of(token_rule), -1 if strict is None else bool(strict)
            )
        )
        self._put_instrument()
        self._by_hand = self._handed_over = None
        self._plan_in_force = _UNKNOWN
        return changed

    @in_turn
    def set_plan(self, plan: Union[Plan, Sequence[int], None]) -> None:
        """Sets the experts per token of each layer directly.

        Args:
            plan: a `Plan`, or a number for each layer, 0 for layers without routed experts. None for the model's own
                counts.

        Raises:
            PlanError: the plan does not fit the model.
        """
        if plan is None:
            self._plan_set(self._put_plan(None))
            return
        full = self._full_of_experts()
        if not isinstance(plan, Plan):
            plan = Plan(integer_tuple("expert_used_count", plan), full)
        # a plan made for the file's counts, on a model whose counts were overridden: no layer above its own
        if len(plan.expert_used_count) == len(full):
            counts = tuple(map(min, plan.expert_used_count, full))
            plan = replace(plan, expert_used_count=counts, expert_used_count_full=full)
        else:
            raise PlanError(f"the plan has {len(plan.expert_used_count)} layers, the model has {len(full)}")
        self._plan_set(self.apply_plan(plan))
        self._warn_if_degraded(plan.token_rule)

    def _full_of_experts(self) -> tuple:
        full = self.expert_used_count_full
        if not any(full):
            raise PlanError(f"{self.model_path}: " + ("loaded with vocab_only" if self._vocab_only else _DENSE))
        return full

    def _plan_set(self, changed: bool) -> None:
        """What is in force now stays. Tokens of the plan before are forgotten, or left to the generation that needs them."""
        self._before = None
        if changed:
            self._forget_others()

    def _forget_others(self) -> None:
        """What was computed under another plan than the one in force, as far as no generation needs it."""
        if self._generation is None:
            self.clear_cache()
        else:
            self._forget_drafted()

    def _before_generation(self, reset: bool) -> None:
        if isinstance(self.draft_model, DraftModel):
            self.draft_model.begin()
        if reset and self.n_tokens and self._plan_of_tokens != self._named_plan():
            self.clear_cache()

    def _plan_or_none(self) -> Optional[Plan]:
        """The plan in force; None for the model's own counts."""
        return self.plan if libllama.allocmoe_has_plan(context_pointer(self)) else None

    # one request at its own budget

    @in_turn
    def __call__(self, *args, budget: Optional[Budget] = None, **kwargs):
        """As in `llama_cpp.Llama`; `budget` as in `create_completion`."""
        return self.create_completion(*args, budget=budget, **kwargs)

    @in_turn
    def create_completion(self, *args, budget: Optional[Budget] = None, **kwargs):
        """As in `llama_cpp.Llama`, and `budget` is a budget for this completion alone.

        Prompt and answer are computed at that budget, under the token rule in force. Then the budget from before is in force
        again, also after an error, and after a stream that is closed, dropped, or ended by another call. A budget that is set
        while the stream is being read takes its place, and stays. A prompt that begins like the cached text goes on from it if
        that was computed at the same budget.

        Args:
            budget: as in the constructor; None for what is in force.

        Raises:
            PlanError: as `set_budget`, at the latest when the first part of a stream is read.
        """
        with self._asking(budget):
            return super().create_completion(*args, **kwargs)

    @in_turn
    def create_chat_completion(self, *args, budget: Optional[Budget] = None, **kwargs):
        """As in `llama_cpp.Llama`; `budget` as in `create_completion`.

        Raises:
            GGUFError: the chat handler's projector (mmproj) is no such file, damaged, or one that llama.cpp crashes on.
        """
        with self._asking(budget):
            found = super().create_chat_completion(*args, **kwargs)
        if budget is None or not isinstance(found, Iterator):
            return found
        return turns(self._turn, self._asking_for_parts(budget, found))

    def _asking_for_parts(self, budget: Budget, parts: Iterator) -> Generator:
        """Formats of chats that call functions begin further completions while their answer is being read."""
        with contextlib.closing(parts):  # type: ignore[type-var]
            while True:
                with self._asking(budget):
                    part = next(parts, None)
                if part is None:
                    return
                yield part

    @contextlib.contextmanager
    def _asking(self, budget: Optional[Budget]) -> Iterator[None]:
        """Completions that are begun inside have this budget; None: what those outside have."""
        if budget is not None:
            self._total(budget, None)  # refused before anything is done
        before, self._asked = self._asked, self._asked if budget is None else budget
        try:
            yield
        finally:
            self._asked = before

    def _request(self) -> ContextManager:
        return contextlib.nullcontext() if self._asked is None else self._at_budget(self._asked)

    @contextlib.contextmanager
    def _at_budget(self, budget: Budget) -> Iterator[None]:
        before = _Before(self._plan_or_none(), self._by_hand)
        rule, strict = None, None  # the file's, where a plan by hand has no say about budgets
        if before.plan is not None and before.by_hand is None:
            rule = before.plan.token_rule
            strict = before.plan.strict if rule in ("threshold", "estimate") else None
        total = self._total(budget, rule)
        if self._beyond_plan is not None and total != sum(self._full_of_experts()):
            raise PlanError(f"{self.model_path}: {self._beyond_plan}")
        changed, self._before = self._put_budget(total, rule, strict), before
        if changed:
            self._put_left_over(self._left)
        try:
            yield
        finally:
            if self._before is before:
                self._end_request()

    def _end_request(self) -> None:
        """Puts in force again what was so before a request with a budget of its own, if that is still there."""
        before, self._before = self._before, None
        if before is not None:
            self._left = self._left_over()
            self._put_plan(before.plan)
            self._by_hand = before.by_hand

    def _tokens_change(self, by: str) -> None:
        super()._tokens_change(by)
        if self._inside is None:
            self._end_request()

    def _named_plan(self) -> Union[Plan, str, None]:
        """The plan in force without what it goes by, which is some megabytes: enough to tell it from others."""
        if self._plan_in_force is _UNKNOWN:
            plan = self.plan
            self._plan_in_force = plan if plan is None or plan.estimator is None else replace(plan, estimator=None)
        return self._plan_in_force

    @in_turn
    def second_context(self, budget: Budget, n_threads: Optional[int] = None) -> SecondContext:
        """For draft models: another context of this model, at a budget of its own and under the token rule of the file.

        Another thread may compute with it while one computes with this `Llama`, unless there is an expert cache.

        Args:
            budget: as in the constructor.
            n_threads: None for as many as this one has.

        Raises:
            PlanError: as `set_budget`.
            ValueError: llama.cpp cannot make it.
        """
        total = self._total(budget, None)
        if self._beyond_plan is not None and total != sum(self._full_of_experts()):
            raise PlanError(f"{self.model_path}: {self._beyond_plan}")
        second = SecondContext(self, n_threads)
        try:
            if self._plan_path is not None:
                path = os.fsencode(self._plan_path)
                self._check(libllama.allocmoe_load_plan_file(context_pointer(second), path), self._plan_path)
            self._check(libllama.allocmoe_set_budget(context_pointer(second), total, -1, -1))
        except PlanError:
            second.close()
            raise
        return second

    @property
    def draft_model(self) -> Optional[LlamaDraftModel]:
        """What proposes tokens, see `DraftModel`; None for nothing. Setting it opens the new one and closes the one before.

        Raises:
            TypeError: it is neither a LlamaDraftModel nor another callable, or it is a class.
            ValueError, PlanError: see `DraftModel`; the one before stays.
            GenerationError: in a callback of a generation. Another generation in progress ends.
        """
        return self._draft_model

    @draft_model.setter
    def draft_model(self, draft: Optional[LlamaDraftModel]) -> None:
        if draft is not None and (isinstance(draft, type) or not callable(draft)):
            raise TypeError(f"draft_model: found {draft!r}, want a LlamaDraftModel or another callable, or None")
        if not self._is_loaded:
            self._draft_model = draft  # opened when there is a context
            return
        with self._turn:
            before = self._draft_model
            if draft is before:
                return
            self._tokens_change("another draft_model")
            self._check_forgets(draft)
            self._open_draft(draft)
            self._draft_model = draft
            if isinstance(before, DraftModel):
                before.close(self)

    def _open_draft(self, draft: Optional[LlamaDraftModel]) -> None:
        if isinstance(draft, DraftModel):
            draft.open(self)

    @in_turn
    def draft_stats(self, reset: bool = False) -> Dict[str, Any]:
        """What the draft model has proposed, what became of it, and how long that took: see `DraftModel.stats`.

        Raises:
            ValueError: draft_model is no `DraftModel`.
        """
        if not isinstance(self.draft_model, DraftModel):
            raise ValueError(f"draft_stats: found a draft_model {self.draft_model!r}, want a DraftModel")
        return self.draft_model.stats(reset)

    @in_turn
    def apply_plan(
        self,
        plan: Plan,
        *,
        record: bool = False,
        record_inputs: bool = False,
        keep_outputs: bool = False,
        start_layer: int = 0,
        skip_logits: bool = False,
    ) -> bool:
        """For measurements: sets a plan that fits the model, and leaves what is cached as it was computed.

        Args:
            record, record_inputs, keep_outputs, start_layer, skip_logits: what the runtime keeps of the next evaluations,
                and where it begins and ends, see `struct allocmoe_instrument` in allocmoe-calibration.h.

        Returns:
            Whether the plan is another one than before.

        Raises:
            PlanError: the plan does not fit the model.
            ValueError: there is no such start_layer, or one of the others is no bool.

        After an error nothing has changed.
        """
        if not isinstance(plan, Plan):
            raise PlanError(f"plan: found {type(plan).__name__}, want a Plan (set_plan takes a list of counts, too)")
        flags = record, record_inputs, keep_outputs, skip_logits
        if not all(isinstance(flag, (bool, np.bool_)) for flag in flags):
            raise ValueError(f"record, record_inputs, keep_outputs, skip_logits: found {flags}, want True or False")
        n_layer = libllama.allocmoe_n_layer(context_pointer(self))
        start_layer = whole("start_layer", start_layer, 0, max(0, n_layer - 1))
        instrument = [*map(bool, flags[:3]), start_layer, bool(skip_logits)]
        changed, self._before = self._put_plan(plan, instrument), None
        return changed

    def _put_plan(self, plan: Optional[Plan], instrument: Sequence[int] = ()) -> bool:
        """Whether that changed the plan in force; None for the model's own counts. Raises PlanError."""
        self._plan_in_force = _UNKNOWN
        if plan is None:
            self._put_instrument(instrument)
            self._by_hand = None
            had = libllama.allocmoe_has_plan(context_pointer(self))
            libllama.allocmoe_clear_plan(context_pointer(self))
            return had
        handed_over = self._handed_over
        if plan.token_rule == "estimate":
            self._hand_over(plan.estimator)
        threshold = ffi.NULL if plan.threshold is None else ffi.new("float[]", plan.threshold)
        rule = ffi.new("struct allocmoe_rule *")
        rule.token_rule = TOKEN_RULES.index(plan.token_rule)
        rule.value = VALUES.index(plan.value)
        rule.k_base, rule.strict, rule.threshold = plan.k_base, plan.strict, threshold
        counts = list(plan.expert_used_count)
        try:
            changed = self._check(libllama.allocmoe_set_plan(context_pointer(self), counts, len(counts), rule))
        except PlanError:
            self._hand_over(handed_over)
            raise
        self._put_instrument(instrument)
        self._by_hand = plan
        return changed

    def _put_instrument(self, instrument: Sequence[int] = ()) -> None:
        struct = ffi.new("struct allocmoe_instrument *", instrument)
        self._check(libllama.allocmoe_set_instrument(context_pointer(self), struct))

    def _hand_over(self, estimator: Optional[Estimator]) -> None:
        """What token rule "estimate" goes by from now on; None for what the file has."""
        if estimator is self._handed_over:
            return
        if estimator is None:
            self._check(libllama.allocmoe_set_estimator(context_pointer(self), ffi.NULL, 0, 0, 0))
            self._handed_over = None
            return
        arrays = {
            name: ffi.from_buffer("float[]", getattr(estimator, name)) for name in ("down", "log_norm", "output", "up")
        }
        numbers = {name: getattr(estimator, name) for name in ("n_down", "rank", "n_relu")}
        handed = ffi.new("struct allocmoe_estimator *", {**numbers, **arrays})
        sizes = estimator.n_layer, estimator.n_expert, estimator.n_embd
        self._check(libllama.allocmoe_set_estimator(context_pointer(self), handed, *sizes))
        self._handed_over = estimator

    def _check(self, status: int, path: Union[str, os.PathLike, None] = None) -> bool:
        """What a call of the library has returned: whether it changed anything. Raises PlanError with what is wrong."""
        if status >= 0:
            return status == libllama.ALLOCMOE_CHANGED
        raise PlanError(f"{path or self.model_path}: {ffi.string(libllama.allocmoe_last_error()).decode()}")

    @in_turn
    def clear_cache(self) -> None:
        """Forgets every token evaluated so far: the next ones are computed from nothing."""
        self.reset()
        self._ctx.kv_cache_clear()

    @in_turn
    def rewind(self, n_past: int) -> bool:
        """Forgets the tokens from position n_past on; False where the model's memory cannot forget a part (recurrent ones).

        Raises:
            ValueError: n_past is no number from 0 on.
        """
        n_past = whole("n_past", n_past, 0)
        self._tokens_change("rewind()")
        self.n_tokens = min(self.n_tokens, n_past)
        self._requires_eval = True
        return self._ctx.kv_cache_seq_rm(0, n_past, -1)

    @in_turn
    def decode(self, tokens: Sequence[int], n_past: int = 0, logits_all: bool = False) -> np.ndarray:
        """For measurements: evaluates tokens after the n_past ones that are cached, in one batch.

        Unlike `eval` it keeps neither tokens nor logits: what is generated next computes its prompt anew.

        Args:
            tokens: at most n_batch token ids.
            n_past: the position of the first of them; what is cached from there on is forgotten.
            logits_all: the logits of every token, not of the last one alone.

        Returns:
            float32, [len(tokens), n_vocab], or [1, n_vocab] without logits_all: the runtime's own memory, which the next
            evaluation overwrites.

        Raises:
            GenerationError: an expert cannot be read (see expert_cache).
            RuntimeError: llama.cpp cannot evaluate them, for instance beyond the context's size.
            ValueError: a token that the vocabulary does not have, none or more than n_batch of them, or an n_past beyond
                the context.
        """
        self._need_weights("decode")
        n_past = whole("n_past", n_past, 0, self.n_ctx() - 1)
        if not 0 < len(tokens) <= self.n_batch:
            raise ValueError(f"tokens: found {len(tokens)}, want 1 to {self.n_batch} (n_batch)")
        check_tokens(tokens, self._n_vocab)
        self.rewind(n_past)
        self.n_tokens = 0
        self._batch.set_batch(batch=tokens, n_past=n_past, logits_all=logits_all)
        try:
            self._ctx.decode(self._batch)
        except RuntimeError as error:
            self._say_what_failed(error)
            raise
        return np.ctypeslib.as_array(self._ctx.get_logits(), (len(tokens) if logits_all else 1, self.n_vocab()))

    def _warn_if_degraded(self, asked: str) -> None:
        found = TOKEN_RULES[libllama.allocmoe_get_token_rule(context_pointer(self))]
        if found == asked or not libllama.allocmoe_has_plan(context_pointer(self)):
            return
        if found != "off":
            _warn(
                f"token rule {asked!r} is off: this model, or the backend that it runs on, has no estimates of skipped "
                f"experts; token rule {found!r} takes its place"
            )
            return
        _warn(
            f"token rule {asked!r} is off: this model, or the backend that it runs on, cannot leave out single experts "
            "of a token; every token gets its layer's planned number of experts"
        )

    @in_turn
    def expert_stats(self, reset: bool = False) -> Dict[str, Dict[str, Any]]:
        """Expert activations so far, for prompt ("prefill") and generated ("decode") tokens apart.

        `llm.expert_stats()["decode"]["mean"].sum()` is what a generated token has spent, over all layers.

        Args:
            reset: start counting anew afterwards.

        Returns:
            {"prefill": stats, "decode": stats}. Each stats has arrays with a number for each layer: `activations` (int64),
            `tokens` that reached the layer's router (int64; the last layer sees only tokens whose logits are needed), and
            `mean`, activations per token (float64, 0 if no token came by).

        With an expert cache each stats also has:

        - `hits`, experts that were in memory when they were chosen, `misses`, those that were not, and `bytes_read` for them:
          int64 arrays. Of tokens that are evaluated together each expert counts once.
        - `absent`, activations that miss_price has left out, an int64 array.
        - `miss_price`, and the times that were measured as the model was loaded: `miss_ms` for an expert that has to be read,
          `hit_ms` for one in memory, in milliseconds. Both are 0 if the price was given as a number.
        """
        stats = {}
        for phase, number in _PHASES.items():
            counts = self._counts(number)
            # llama.cpp evaluates a draft like a prompt, several tokens at once
            if self._drafted.any():
                counts += self._drafted if phase == "decode" else -self._drafted
            activations, tokens = counts
            mean = activations / np.maximum(tokens, 1)
            stats[phase] = {"activations": activations, "tokens": tokens, "mean": mean}
            if self.expert_cache:
                stats[phase].update(self._cache_counts(number))
                price = dict(zip(("miss_ms", "hit_ms"), self._measured_price()[1:]))
                stats[phase].update(miss_price=self._miss_price, **price)
        if reset:
            libllama.allocmoe_reset_counts(context_pointer(self))
            self._drafted = np.zeros((2, 0), np.int64)
        return stats

    def _counts(self, phase: int) -> np.ndarray:
        """int64 [2, block_count]: activations and tokens of a phase as the runtime counts them."""
        n_layer = libllama.allocmoe_n_layer(context_pointer(self))
        counts = np.zeros((2, n_layer), np.int64)
        pointers = [ffi.from_buffer("int64_t *", row) for row in counts]
        libllama.allocmoe_get_counts(context_pointer(self), phase, *pointers, n_layer)
        return counts

    def _cache_counts(self, phase: int) -> Dict[str, np.ndarray]:
        n_layer = libllama.allocmoe_n_layer(context_pointer(self))
        counts = {name: np.zeros(n_layer, np.int64) for name in ("hits", "misses", "bytes_read")}
        pointers = [ffi.from_buffer("int64_t *", row) for row in counts.values()]
        libllama.allocmoe_get_cache_counts(context_pointer(self), phase, *pointers, n_layer, ffi.new("int64_t *"))
        counts["absent"] = np.zeros(n_layer, np.int64)
        if phase == _PHASES["decode"]:
            libllama.allocmoe_get_absent(context_pointer(self), ffi.from_buffer("int64_t *", counts["absent"]), n_layer)
        return counts

    def _measured_price(self) -> tuple:
        """What the runtime began with, and (0 where it was given) milliseconds of an expert to read and of one at hand."""
        times = ffi.new("double[2]")
        return libllama.allocmoe_get_miss_price(context_pointer(self), times, times + 1), times[0], times[1]

    def _say_what_failed(self, error: RuntimeError) -> None:
        """Raises GenerationError for an evaluation that has failed since an expert in the file cannot be read."""
        if self._cache_bytes and str(error).endswith("returned -3"):
            why = ffi.string(libllama.allocmoe_expert_cache_error(context_pointer(self))).decode(errors="replace")
            if why:
                raise GenerationError(f"{self.model_path}: {why}") from error

    def _evaluate(self, tokens: Sequence[int], drafted: bool) -> None:
        now = self._named_plan()
        if not self.n_tokens:
            self._plan_of_tokens = now
        elif self._plan_of_tokens is not now and self._plan_of_tokens != now:
            self._plan_of_tokens = _MIXED
        draft = self._draft_model
        started = time.perf_counter()
        try:
            if drafted:
                self._evaluate_drafted(tokens)
            else:
                super()._evaluate(tokens, drafted)
        except RuntimeError as error:
            self._say_what_failed(error)
            raise
        if isinstance(draft, DraftModel) and self._generation is not None:
            if self._is_asynchronous:
                llama_cpp.llama_synchronize(self.ctx)
            draft.evaluated(len(tokens), time.perf_counter() - started, prompt=not self._generation.n_tokens)

    def _evaluate_drafted(self, tokens: Sequence[int]) -> None:
        """Counted as generated tokens, which they become, and with their experts limited where that is asked for."""
        before = self._counts(_PHASES["prefill"])
        limit = self._draft_model.verification_budget if isinstance(self._draft_model, DraftModel) else None
        rule = libllama.allocmoe_get_token_rule(context_pointer(self))
        if rule != libllama.ALLOCMOE_RULE_ESTIMATE:
            limit = None  # the other token rules have no estimates to go by
        with self.limited_union(limit):
            super()._evaluate(tokens, True)
        self._drafted = self._counts(_PHASES["prefill"]) - before + (self._drafted if self._drafted.size else 0)

    @contextlib.contextmanager
    def limited_union(self, share: Optional[float]) -> Iterator[None]:
        """A context manager, for measurements: `with llm.limited_union(0.5):` limits the experts of what is evaluated inside.

        Of the experts that any of the tokens of one evaluation would run in a layer, this share runs. It is what `DraftModel`
        does with its verification_budget.

        Args:
            share: above 0 and up to 1; None for no limit.

        Raises:
            ValueError: share is none, above 0 and up to 1.
            PlanError: the token rule is not "estimate", or does not run on the CPU.
        """
        if share is None:
            yield
            return
        if isinstance(share, bool) or not isinstance(share, (int, float, np.number)) or not 0 < share <= 1:
            raise ValueError(f"share of experts: found {shown(share)}, want a number above 0 and up to 1")
        self._check(libllama.allocmoe_set_union_share(context_pointer(self), share))
        try:
            yield
        finally:
            libllama.allocmoe_set_union_share(context_pointer(self), 1.0)

    @property
    def verifies(self) -> bool:
        """Whether several tokens at once are computed as one after the other, but for rounding, so that a draft can be verified.

        Not under token rule "batch", where they share their experts. Nor under "estimate" with a miss_price, which only single
        tokens have: what a draft model proposes is passed over there.
        """
        rule = libllama.allocmoe_get_token_rule(context_pointer(self))
        priced = rule == libllama.ALLOCMOE_RULE_ESTIMATE and self.miss_price > 1
        return rule != libllama.ALLOCMOE_RULE_BATCH and not priced

    @in_turn
    def save_state(self):
        """As in `llama_cpp.Llama`. The state also holds the plan that it was made with, what a strict plan has left over, and,
        with an expert cache, which experts have run."""
        n_tokens, self.n_tokens = self.n_tokens, self._n_read()
        try:
            state = super().save_state()
            if not self._logits_all:
                state.scores = np.zeros(
                    (1, 1), np.single
                )  # none were kept; load_state takes any shape that spreads over them
            state.plan = self._plan_of_tokens if self.n_tokens else self._named_plan()
            state.mixed = state.plan is _MIXED
            state.computed_as = self._computes_as
            state.left, state.ran = self._left_over(), self._ran()
            return state
        finally:
            self.n_tokens = n_tokens

    def _identity(self, kv_overrides: Optional[dict]) -> str:
        """Of models for which it is the same, what one has computed of a text is what the other would compute, under the same plan."""
        params = self.context_params
        options = [
            getattr(params, name)
            for name, *_ in params._fields_
            if name.startswith(("rope_", "yarn_"))
            or name in ("n_ctx", "type_k", "type_v", "flash_attn_type", "swa_full")
        ]
        given = sorted(
            (key, repr(value)) for key, value in (kv_overrides or {}).items() if not key.startswith("allocmoe.")
        )
        adapter = self.lora_path and (_weights(self.lora_path), self.lora_scale)
        return repr((_weights(self._file), options, given, adapter))

    def _ran(self) -> Optional[np.ndarray]:
        """int16 [n_layer, n_tokens, ...]: which experts the cached tokens have run, as the runtime has it; None without a cache."""
        size = libllama.allocmoe_ran_size(context_pointer(self))
        if not (size and self.n_tokens):
            return None
        ran = np.zeros((libllama.allocmoe_n_layer(context_pointer(self)), self.n_tokens, size), np.int16)
        pointer = ffi.from_buffer("int16_t[]", ran)
        self._check(libllama.allocmoe_get_ran_seq(context_pointer(self), 0, pointer, self.n_tokens))
        return ran

    def _put_ran(self, ran: Optional[np.ndarray]) -> None:
        """None, or of another shape, as a state from elsewhere has it: the next token finds nothing at hand."""
        shape = (
            libllama.allocmoe_n_layer(context_pointer(self)),
            self.n_tokens,
            libllama.allocmoe_ran_size(context_pointer(self)),
        )
        fits = isinstance(ran, np.ndarray) and ran.shape == shape and ran.dtype == np.int16
        pointer = ffi.from_buffer("int16_t[]", np.ascontiguousarray(ran)) if fits else ffi.NULL
        self._check(libllama.allocmoe_set_ran_seq(context_pointer(self), 0, pointer, self.n_tokens))

    def _left_over(self) -> Optional[np.ndarray]:
        """float32 [n_layer, n_tokens]: what a strict plan has left over after each cached token; None for any other plan."""
        plan = self._plan_of_tokens
        if not (isinstance(plan, Plan) and plan.strict and self.n_tokens):
            return None
        if plan != self._named_plan():
            return None if self._left is None else self._left[:, : self.n_tokens].copy()
        left = np.zeros((plan.n_layer, self.n_tokens), np.float32)
        pointer = ffi.from_buffer("float[]", left)
        self._check(libllama.allocmoe_get_left_seq(context_pointer(self), 0, pointer, self.n_tokens))
        return left

    def _put_left_over(self, left: Optional[np.ndarray]) -> None:
        if left is not None and self._plan_of_tokens == self._named_plan():
            n_tokens = min(self.n_tokens, left.shape[1])
            left = np.ascontiguousarray(left[:, :n_tokens])
            pointer = ffi.from_buffer("float[]", left)
            self._check(libllama.allocmoe_set_left_seq(context_pointer(self), 0, pointer, n_tokens))

    @in_turn
    def load_state(self, state) -> None:
        """As in `llama_cpp.Llama`; warns if the state was made with another plan than the one in force.

        Raises:
            ValueError: it is none that `save_state` gave, or damaged.
            RuntimeError: it is of another model, or of a cache that differs.

        After an error nothing has changed, or nothing is cached.
        """
        self._check_state(state)
        if getattr(state, "computed_as", self._computes_as) != self._computes_as:
            raise RuntimeError(
                "load_state: the state is of another model, or of a cache that differs (flash_attn, type_k, type_v, n_ctx, rope)"
            )
        self._tokens_change("load_state()")  # what is in force now is what will be
        then, mixed = getattr(state, "plan", self._named_plan()), getattr(state, "mixed", False)
        if mixed or then != self._named_plan():
            made = "while the plan changed" if mixed else f"under another plan ({then})"
            _warn(
                f"this state was saved {made}, in force is {self.plan}: its cached tokens are kept as they were computed"
            )
        try:
            super().load_state(state)
        except RuntimeError as error:
            self.clear_cache()  # llama.cpp has emptied it
            raise RuntimeError(
                f"{error}: it is of another model, or of a cache that differs (flash_attn, type_k, type_v, n_ctx)"
            ) from None
        if self.n_tokens and llama_cpp.llama_memory_seq_pos_min(self._ctx.memory, 0) < 0:
            self.clear_cache()  # else tokens of such places stay for all that follows
            raise ValueError("load_state: the state is damaged: it has tokens at places below 0, or none")
        if self._cache_bytes:
            self._put_ran(getattr(state, "ran", None))
        self._plan_of_tokens, self._left = then, getattr(state, "left", None)
        self._put_left_over(self._left)

    def _check_state(self, state) -> None:
        """llama-cpp-python's parts of it have to fit each other: it takes any. Raises ValueError."""
        try:
            n, ids = state.n_tokens, np.asarray(state.input_ids)
            fits = (
                ids.shape == self.input_ids.shape
                and 0 <= n <= len(ids)
                and state.llama_state_size == len(state.llama_state)
            )
            np.broadcast_to(state.scores, self.scores[:n].shape)
            fits &= isinstance(state.scores, np.ndarray) and state.scores.dtype == np.single
            left, n_layer = getattr(state, "left", None), libllama.allocmoe_n_layer(context_pointer(self))
            fits &= left is None or (
                isinstance(left, np.ndarray) and left.dtype == np.float32 and left.ndim == 2 and len(left) == n_layer
            )
        except (AttributeError, TypeError, ValueError):
            fits = False
        if not fits:
            raise ValueError(
                f"load_state: found a {type(state).__name__}, want what save_state() of a Llama like this one gave"
            )
        # each token leaves, or takes, a layer's experts at most; written so that no number is refused, too
        if left is not None and not (np.abs(left) <= left.shape[1] * max(self.expert_used_count_full)).all():
            raise ValueError("load_state: the state is damaged: more is left over than its tokens can leave")

    @property
    def cache(self):
        """The cache of prompts, see `set_cache` of `llama_cpp.Llama`. Entries of another plan than the one in force are not used."""
        return self._prompt_cache

    @cache.setter
    def cache(self, cache) -> None:
        if isinstance(cache, CacheOfOnePlan):
            cache = cache.inner
        self._prompt_cache = None if cache is None else CacheOfOnePlan(cache, self)

    @classmethod
    def from_pretrained(
        cls,
        repo_id: str,
        filename: str,
        additional_files: Optional[Sequence[str]] = None,
        local_dir: Union[str, os.PathLike, None] = None,
        cache_dir: Union[str, os.PathLike, None] = None,
        local_dir_use_symlinks: Union[bool, str] = "auto",
        **kwargs,
    ) -> Llama:
        """A model from a repository of the Hugging Face hub. What is not on this machine yet is downloaded. Needs the package
        huggingface_hub.

        Args:
            repo_id: "org/name".
            filename: the GGUF file in it, or a pattern that only one model fits ("*Q4_K_M.gguf"). Of a split model the
                first file, or a pattern for all: the other files are downloaded too.
            additional_files: names or patterns of more files to download.
            local_dir: where the files go, in place of the hub's cache.
            cache_dir: another cache than the default.
            local_dir_use_symlinks: llama-cpp-python has it; huggingface_hub no longer looks at it.
            **kwargs: as in the constructor.

        Raises:
            ImportError: huggingface_hub is not installed.
            ValueError: no file fits, or files of several models do; the message lists them.
            TypeError: an argument that does not exist; nothing is downloaded.
            OSError: the repository is missing, private, or cannot be reached. It may be an error of the HTTP library
                instead.
        """
        if cls.__init__ is Llama.__init__:
            _check_names(kwargs)
        return cls(model_path=hub.download(repo_id, filename, additional_files, local_dir, cache_dir), **kwargs)

    @in_turn
    def close(self) -> None:
        draft = self.__dict__.get("_draft_model")
        if isinstance(draft, DraftModel):
            self._tokens_change("close()")
            draft.close(self)  # before the model, which it may share
        super().close()

    def __getstate__(self):
        theirs = super().__getstate__()
        ours = (cache_size.KEY, cache_size.PRICE_KEY)
        given = {key: value for key, value in (theirs["kv_overrides"] or {}).items() if key not in ours}
        lasts = self._before or _Before(self._plan_or_none(), self._by_hand)
        by_hand = lasts.plan is None or lasts.by_hand is not None
        return {
            **theirs,
            "kv_overrides": given or None,
            "plan_path": self._plan_path,
            "n_gpu_layers": self._asked_layers,
            "n_cpu_moe": self._n_cpu_moe,
            "repack": self._repack,
            "prefetch": self._asked_prefetch,
            "expert_cache": self._asked_cache,
            "miss_price": self._miss_price or "auto",
            "budget": None if self._beyond_plan is None else 1.0,
            "set_to": {"plan": lasts.plan} if by_hand else self._set_to,
        }

    def __setstate__(self, state):
        state = dict(state)
        set_to = state.pop("set_to")
        self.__init__(**state)
        if set_to is not None:
            (self.set_plan if "plan" in set_to else self.set_budget)(**set_to)

    def _expert_used_count(self, getter) -> tuple:
        n_layer = libllama.allocmoe_n_layer(context_pointer(self))
        counts = ffi.new("int32_t[]", max(n_layer, 1))
        getter(context_pointer(self), counts, n_layer)
        return tuple(counts)[:n_layer]


def _is_name(budget: Optional[Budget]) -> bool:
    """Whether a budget is written as a word, which the library knows or refuses."""
    return isinstance(budget, str) and budget.strip(_BLANKS).isalpha()


def _weights(path: str) -> str:
    """What tells the model, or adapter, in a file from others: its data, and what its architecture computes with."""
    try:
        return fingerprint(path, metadata=False)
    except (OSError, GGUFError):  # no longer there
        return os.path.abspath(path)


def _number_of(token_rule: Optional[str]) -> int:
    """As the library has it; -1 for the file's."""
    return -1 if token_rule is None else TOKEN_RULES.index(token_rule)


def _check_names(kwargs: dict) -> None:
    parameters = inspect.signature(Llama.__init__).parameters.values()
    known = [each.name for each in parameters if each.kind is not each.VAR_KEYWORD]
    for name in kwargs:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise TypeError(f"Llama: found an argument {name!r}, which there is not{hint}")


def _signature() -> inspect.Signature:
    """llama_cpp.Llama's own signature and our arguments, for help() and tools that read it."""
    parameters = dict(inspect.signature(llama_cpp.Llama.__init__).parameters)
    extra = parameters.pop("kwargs")
    ours = inspect.signature(Llama.__init__).parameters
    names = ("budget", "token_rule", "plan_path", "n_cpu_moe", "repack", "prefetch", "expert_cache", "miss_price")
    return inspect.Signature([*parameters.values(), *(ours[name] for name in names), extra])


Llama.__init__.__signature__ = _signature()  # type: ignore[attr-defined]
for _name in ("__call__", "create_completion", "create_chat_completion"):
    _theirs = inspect.signature(getattr(llama_cpp.Llama, _name))
    _ours = inspect.signature(getattr(Llama, _name)).parameters["budget"]
    getattr(Llama, _name).__signature__ = _theirs.replace(parameters=[*_theirs.parameters.values(), _ours])

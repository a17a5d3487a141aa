"""A model of the Language Model Evaluation Harness: tasks on a planned file, at any budget.

    python -m allocmoe_edge.lm_eval --model allocmoe --model_args model=model-half.gguf,budget=0.5 --tasks hellaswag --limit 200

Everything but the model's arguments is the harness's own. They are `model`, `budget`, `token_rule`, `plan_path`, `n_ctx`, `n_threads`
and whatever else `Llama` takes. Needs the package lm_eval.
"""

from __future__ import annotations

import sys
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np

from .command import CommandError, reason
from .llama import Llama
from .plan import shown

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    lacking = f"allocmoe_edge.lm_eval needs the package lm_eval ({error}): pip install lm_eval"
    if __name__ == "__main__":
        raise SystemExit(f"python -m allocmoe_edge.lm_eval: error: {lacking}") from None
    raise ImportError(lacking) from error


# by the harness's names for it, the first that a task gives (its normalize_gen_kwargs)
_MAX_TOKENS = "max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"


@register_model("allocmoe")
class AllocmoeLM(TemplateLM):
    """`allocmoe_edge.Llama` as the harness asks for a model.

    Args:
        model: the GGUF file.
        n_ctx: tokens of context, more than a task's answers may have; what is longer with its answer loses its beginning.
        max_gen_toks: of an answer, where a task does not say.
        batch_size, device: the harness's; one request is computed at a time, where the libraries were built for.
        **kwargs: of `Llama`.
    """

    def __init__(
        self, model: str, n_ctx: int = 2048, max_gen_toks: int = 256, batch_size: Any = 1, device: Any = None, **kwargs: Any
    ):  # fmt: skip
        super().__init__()
        self._max_gen_toks = max_gen_toks
        # the harness reads "0.5" as a number, and "true" as text
        self.llm = Llama(model, n_ctx=n_ctx, logits_all=False, verbose=False, **kwargs)

    @property
    def eot_token_id(self) -> int:
        return self.llm.token_eos()

    @property
    def prefix_token_id(self) -> int:
        bos = self.llm.token_bos()
        return bos if bos >= 0 else self.llm.token_eos()

    @property
    def max_length(self) -> int:
        return self.llm.n_ctx()

    @property
    def tokenizer_name(self) -> str:
        return self.llm.model_path

    def tok_encode(self, string: str, add_special_tokens: Optional[bool] = None, **kwargs: Any) -> List[int]:
        return self.llm.tokenize(string.encode(), add_bos=bool(add_special_tokens), special=False)

    def _scores(self, tokens: Sequence[int], n_last: int) -> np.ndarray:
        """float32 [n_last, n_vocab]: logits of the tokens that follow each of the last n_last tokens."""
        rows = []
        for begin in range(0, len(tokens), self.llm.n_batch):
            part = tokens[begin : begin + self.llm.n_batch]
            wanted = begin + len(part) > len(tokens) - n_last
            logits = self.llm.decode(part, begin, logits_all=wanted)
            if wanted:
                rows.append(logits[max(0, len(tokens) - n_last - begin) :].copy())
        return np.concatenate(rows)

    def _loglikelihood_tokens(
        self, requests: Sequence[Tuple[Any, List[int], List[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> List[Tuple[float, bool]]:
        """For (texts, context, continuation) each: the continuation's log probability, and whether it is the likeliest.

        Raises ValueError for a continuation of no tokens, or of more than the context: the harness's own models take neither.
        """
        for texts, _, continuation in requests:  # refused before hours have been spent on others
            if not continuation:
                raise ValueError(
                    f"a continuation of no tokens, after {shown(texts and texts[0])}: there is nothing to score"
                )
            if len(continuation) > self.max_length:
                raise ValueError(
                    f"n_ctx: found {self.max_length}, want at least {len(continuation)}, the tokens of a continuation"
                )
        found = []
        for texts, context, continuation in requests:
            # the last token predicts nothing that is asked for
            tokens = ([*context, *continuation])[-(self.max_length + 1) :][:-1]
            logits = self._scores(tokens, len(continuation)).astype(np.float64)
            logits -= logits.max(axis=1, keepdims=True)
            chosen = logits[np.arange(len(continuation)), continuation]
            total = float((chosen - np.log(np.exp(logits).sum(axis=1))).sum())
            found.append((total, bool((logits.argmax(axis=1) == continuation).all())))
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, found[-1])
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> List[float]:
        totals = []
        for request in requests:
            tokens = self.tok_encode(request.args[0])
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            scored = self._loglikelihood_tokens([(None, *make_disjoint_window(window)) for window in windows])
            totals.append(sum(value for value, _ in scored))
        return totals

    def _max_tokens(self, options: Dict[str, Any]) -> int:
        """Of an answer. Raises ValueError where no token of the prompt would be left: it is the harness's rule for its own models."""
        given = (options[name] for name in _MAX_TOKENS if options.get(name) is not None)
        n = int(next(given, self._max_gen_toks))
        if n >= self.max_length:
            raise ValueError(
                f"n_ctx: found {self.max_length}, want more than the {n} tokens (max_gen_toks) that an answer may have"
            )
        return n

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> List[str]:
        texts = []
        for request in requests:
            self._max_tokens(request.args[1])  # refused before hours have been spent on others
        for request in requests:
            prompt, options = request.args
            until = options.get("until") or []
            n = self._max_tokens(options)
            tokens = self.tok_encode(prompt)[-(self.max_length - n) :]
            sampled = bool(options.get("do_sample"))
            answer = self.llm.create_completion(
                tokens,
                max_tokens=n,
                stop=[until] if isinstance(until, str) else list(until),
                temperature=float(options.get("temperature", 1.0)) if sampled else 0.0,
                top_p=float(options.get("top_p", 1.0)),
            )
            texts.append(answer["choices"][0]["text"])
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts


def main() -> int:
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except (CommandError, ValueError, OSError) as error:
        print(f"python -m allocmoe_edge.lm_eval: error: {reason(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

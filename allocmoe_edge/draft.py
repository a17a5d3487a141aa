"""`DraftModel`: a cheaper model that proposes tokens, which the model then verifies several at a time."""

from __future__ import annotations

from collections import Counter
import os
import time
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Tuple, Union
import weakref

from llama_cpp.llama_speculative import LlamaDraftModel
import numpy as np

from ._native import llama_cpp
from .checked_llama import check_tokens
from .draft_length import DraftLength
from .plan import shown
from .whole_numbers import whole

if TYPE_CHECKING:
    from .llama import Llama
    from .second_context import SecondContext

# tokens of the text that a draft begins after where reading all of it would not pay
_LATE = 32
# tokens that a draft reads when it is loaded, to see what that costs
_MEASURED = 8
# what vocabularies of one family differ by: places at their end that no token has
_PADDING = 128
# llama-server compares from this token on
_FIRST_OF_SERVER = 5
_NONE = np.zeros(0, np.intc)


class DraftModel(LlamaDraftModel):
    """Proposes the tokens that come next (speculative decoding), for `Llama(draft_model=...)`. It is a smaller model, the same
    one at a lower budget, or a proposer like `llama_cpp.llama_speculative.LlamaPromptLookupDecoding`.

    The model evaluates the proposed tokens in one batch. At each place it samples as it would without them, and the first
    token that it samples differently ends the step. So the text is that of plain decoding at the same plan, up to the
    rounding of a batch: equal under greedy decoding and at equal seeds.

    How many tokens are proposed follows from what drafting and verifying cost, and from how many are accepted. If it does
    not pay none are proposed. Now and then one is then only compared with the token that is written anyway.

    Of a chat with pictures the draft sees the text alone.

    It belongs to one `Llama`, from which it gets its context size. That `Llama` closes it, when it is closed itself or
    gets another one: `llm.draft_model = DraftModel(...)`, None for none.

    Args:
        model: the draft's GGUF file, with the vocabulary of the model; or any LlamaDraftModel.
        n_draft: tokens to propose each time; None to let that follow from what is measured.
        most: with n_draft=None, tokens to propose at most.
        verification_budget: run fewer experts when several tokens are verified together. Of the experts that any of
            them would run in a layer, this share runs, above 0 and below 1: those of the largest estimated value for
            all of the tokens. Estimates stand in for the others, so the text is no longer that of plain decoding. None
            for all. Needs a plan under token rule "estimate", on the CPU, when the model is loaded; under another
            rule, set later, there is no limit. Layers that run all experts of a token have no estimates, and no limit.
        **kwargs: for a file: as in `Llama`, for instance n_gpu_layers, n_threads, budget.

    Raises:
        ValueError: n_draft or most is no number from 1 on, verification_budget no share.
        TypeError: model is neither a file nor a LlamaDraftModel, or is a `DraftModel`; arguments of a `Llama` for a
            draft that has none.

    `Llama(draft_model=...)` raises a ValueError if the vocabularies differ, if model or draft cannot forget tokens
    (recurrent ones), or if it belongs to another `Llama`; a PlanError if a verification_budget cannot be had; and what
    `Llama` raises for the file. A completion raises a ValueError if a LlamaDraftModel proposes what is no token.
    """

    def __init__(
        self,
        model: Union[str, os.PathLike, LlamaDraftModel],
        *,
        n_draft: Optional[int] = None,
        most: int = 16,
        verification_budget: Optional[float] = None,
        **kwargs: Any,
    ):
        self._arguments = dict(kwargs, n_draft=n_draft, most=most, verification_budget=verification_budget)
        for name, value in (("n_draft", n_draft), ("most", most)):
            if value is None and name == "n_draft":
                continue
            whole(name, value, 1, want="a number of tokens from 1 on")
        if verification_budget is not None and not (
            isinstance(verification_budget, (int, float, np.number)) and 0 < verification_budget < 1
        ):
            raise ValueError(f"verification_budget: found {verification_budget!r}, want a share above 0 and below 1")
        self.verification_budget = verification_budget
        if isinstance(model, DraftModel) or not isinstance(model, (str, os.PathLike, LlamaDraftModel, _Same)):
            raise TypeError(
                f"model: found {type(model).__name__}, want a GGUF file, or a LlamaDraftModel of another kind"
            )
        if isinstance(model, LlamaDraftModel) and kwargs:
            raise TypeError(f"DraftModel: {', '.join(kwargs)}: for a draft from a file, not for {type(model).__name__}")
        self._model, self._n_draft, self._kwargs = model, n_draft, kwargs
        self._most = int(n_draft or most)
        self._owner: Optional[weakref.ref] = None
        self._proposer: Optional[_Proposer] = None
        self._length = DraftLength(self._most)
        # (length of the text, what was proposed after it), the seconds that this took, and those of the evaluations since, by their
        # number of tokens
        self._proposed: Optional[Tuple[int, List[int]]] = None
        self._drafting = 0.0
        self._evaluated: Dict[int, List[float]] = {}
        # plain steps until there may be another proposal
        self._pause = 0
        # where a proposed token would be that is only compared, and that token
        self._compared: Optional[Tuple[int, int]] = None
        # tokens of the text
        self._n_written = 0
        self._reset_counts()

    @classmethod
    def same(
        cls,
        budget: Union[float, int, str] = 0.25,
        *,
        n_threads: Optional[int] = None,
        n_draft: Optional[int] = None,
        most: int = 16,
        verification_budget: Optional[float] = None,
    ) -> DraftModel:
        """The model itself at a lower budget: its weights are shared, only the draft's cache is memory of its own.

        Args:
            budget: as in `Llama`.
            n_threads: of the draft; None for as many as the model has.
            n_draft, most, verification_budget: as above.
        """
        same = _Same(budget, n_threads)
        return cls(same, n_draft=n_draft, most=most, verification_budget=verification_budget)

    # what Llama calls; none of these is for anybody else

    def open(self, llm: Llama) -> None:
        # loads the draft of this model
        if self.verification_budget is not None:
            with llm.limited_union(self.verification_budget):
                pass  # or an error
        if self._owner is not None and self._owner() is not None:
            raise ValueError("draft_model: belongs to another Llama, which is open; every Llama needs its own")
        if isinstance(self._model, _Same):
            follower: Any = llm.second_context(self._model.budget, self._model.n_threads)
        elif isinstance(self._model, LlamaDraftModel):
            follower = None
        else:
            follower = _load(self._model, self._kwargs, llm)
        self._proposer = None if follower is None else _Proposer(follower, llm.n_vocab())
        self._owner = weakref.ref(llm)
        self._length = DraftLength(self._most)
        if self._proposer is not None and self._n_draft is None:
            try:
                self._proposer.measure(self._length)
            except BaseException:
                self.close(llm)
                raise
        self._n_written = 0
        self.begin()
        self._reset_counts()

    def close(self, llm: Llama) -> None:
        # frees the draft, if it is that of this model
        if self._owner is None or self._owner() is not llm:
            return
        if self._proposer is not None:
            self._proposer.close()
        self._owner = self._proposer = None

    def forked(self) -> None:
        # in the child of a fork that cannot use its parent's memory
        if self._proposer is not None:
            self._proposer.forked()

    def begin(self) -> None:
        # a text begins
        self._settle_plain()
        if self._n_written:
            self._length.wrote(self._n_written)
        self._n_written, self._proposed, self._compared = 0, None, None
        self._evaluated, self._drafting, self._pause = {}, 0.0, 0

    def evaluated(self, n_tokens: int, seconds: float, prompt: bool) -> None:
        # so many tokens at once, of a prompt or the last one and what was proposed after it
        if prompt:
            self._length.prompt(n_tokens, seconds)
        else:
            self._evaluated.setdefault(n_tokens, []).append(seconds)

    def __call__(self, input_ids: np.ndarray, /, **kwargs: Any) -> np.ndarray:
        """The tokens that may come after input_ids, int [at most n_draft or most]; none where that does not pay."""
        if self._pause:
            self._pause -= 1
            return _NONE
        self._judge(input_ids)
        owner = self._owner() if self._owner is not None else None
        if owner is None:
            raise RuntimeError("this DraftModel belongs to no Llama: pass it as draft_model")
        # the model needs a place for each, and for the token before them
        room = min(owner.n_ctx() - len(input_ids), owner.n_batch - 1)
        text = owner.without_pictures(input_ids)
        if self._proposer is not None:
            text = self._proposer.known(text)
        n, whole, verified = self._choose(text, room)
        proposed = self._propose(text, n, whole) if n > 0 and owner.verifies else []
        check_tokens(proposed, owner.n_vocab())
        if proposed and not verified:
            self._compared, proposed = (len(input_ids), proposed[0]), []
        elif n > 0 and not verified:
            self._pause = self._length.asked_in_vain()
        self._proposed = (len(input_ids), proposed)
        return np.asarray(proposed, np.intc) if proposed else _NONE

    # steps

    def _judge(self, text: np.ndarray) -> None:
        """What has become of the last proposal."""
        if self._compared is not None:
            place, token = self._compared
            agreed = int(text[place] == token)
            self._length.judged(1, agreed)
            self._counts["compared"] += 1
            self._counts["agreed"] += agreed
            self._compared = None
        if self._proposed is None:
            self._n_written += 1
            return
        begin, proposed = self._proposed
        n_new = len(text) - begin
        if proposed:
            self._length.judged(len(proposed), n_new - 1)
            self._counts["accepted"] += n_new - 1
            self._counts["proposed"] += len(proposed)
        self._settle(n_new)

    def _settle(self, n_new: int) -> None:
        """The evaluations since the last proposal have yielded so many tokens."""
        assert self._proposed is not None
        begin, proposed = self._proposed
        seconds = self._drafting
        for n_tokens, times in self._evaluated.items():
            self._length.verified(n_tokens, *times)
            self._seconds["plain" if n_tokens == 1 else "verification"] += sum(times)
            seconds += sum(times)
            self._lengths[len(proposed)] += len(times)
            self._counts["steps"] += len(times)
        self._counts["tokens"] += n_new
        self._n_written += n_new
        self._length.stepped(len(proposed), n_new, seconds, self._drafting)
        self._proposed, self._evaluated, self._drafting = (begin + n_new, []), {}, 0.0

    def _settle_plain(self) -> None:
        """The same where nothing was proposed: each has yielded one."""
        if self._proposed is not None and not self._proposed[1]:
            self._settle(sum(map(len, self._evaluated.values())))

    def _choose(self, text: np.ndarray, room: int) -> Tuple[int, bool, bool]:
        whole, late = (0, 0) if self._proposer is None else self._proposer.behind(text)
        if self._proposer is not None:
            room = min(room, self._proposer.n_ctx - len(text))
        if self._n_draft is not None:
            return min(self._n_draft, room), True, True
        chosen = self._length.choose(whole, late, room)
        self._pause = self._length.pause
        return chosen

    def _propose(self, text: np.ndarray, n: int, whole: bool) -> List[int]:
        started = time.perf_counter()
        if self._proposer is None:
            proposed, read = _proposed_by(self._model, text)[:n], 0.0
        else:
            n_read, read = self._proposer.read(text, whole)
            if n_read > 2:
                self._length.read(n_read, read)
            else:  # the last tokens, which every step has: as much a part of it as the others
                read = 0.0
            proposed = self._proposer.go_on(n)
        seconds = time.perf_counter() - started
        self._seconds["reading"] += read
        self._seconds["drafting"] += seconds - read
        self._drafting += seconds
        if proposed:
            self._length.drafted(len(proposed), seconds - read)
        return proposed

    # what it has done

    def stats(self, reset: bool = False) -> Dict[str, Any]:
        """What was proposed, what became of it, and how long that took.

        Args:
            reset: start counting anew afterwards; what is known of costs and acceptance stays.

        Returns:
            a dict:

            - `steps`, evaluations of the model after its prompts, the `tokens` that they have yielded, and `tokens_per_step`.
            - `proposed` and `accepted` tokens, and `acceptance`, accepted over proposed.
            - `lengths`: by number of tokens, how often so many were proposed.
            - `compared`, tokens that were only compared, and `agreed`, those of them that were right.
            - `seconds` by part: "reading" (the draft reads text), "drafting", "verification", and "plain" for evaluations
              without a draft.
            - medians of the last ones: `seconds_of_draft` for one token, and `seconds_of_verification` by the number of
              tokens evaluated at once, 1 being plain decoding.
        """
        self._settle_plain()
        counts = self._counts
        found = {
            **{name: counts[name] for name in ("steps", "tokens", "proposed", "accepted", "compared", "agreed")},
            "tokens_per_step": counts["tokens"] / max(1, counts["steps"]),
            "acceptance": counts["accepted"] / max(1, counts["proposed"]),
            "lengths": dict(sorted(self._lengths.items())),
            "seconds": dict(self._seconds),
            "seconds_of_draft": self._length.draft_seconds if self._length.measured() else 0.0,
            "seconds_of_verification": self._length.measured(),
        }
        if reset:
            self._reset_counts()
        return found

    def _reset_counts(self) -> None:
        self._counts: Counter = Counter()
        self._lengths: Counter = Counter()
        self._seconds = dict.fromkeys(("reading", "drafting", "verification", "plain"), 0.0)

    def __reduce__(self):
        return _make, (self._model, self._arguments)


def _make(model, arguments) -> DraftModel:
    return DraftModel(model, **arguments)


class _Same:
    """In place of a file: the model itself."""

    def __init__(self, budget: Union[float, int, str], n_threads: Optional[int]):
        self.budget, self.n_threads = budget, n_threads


class _Proposer:
    """Goes on from a text by the likeliest tokens. Its cache follows the text by what both begin with.

    Args:
        follower: a `Llama` or a `SecondContext`.
        n_vocab: the model's tokens.
    """

    def __init__(self, follower: Union[Llama, SecondContext], n_vocab: int):
        self._follower = follower
        self._n_vocab = min(n_vocab, follower.n_vocab())
        self._knows_all = follower.n_vocab() >= n_vocab
        self.n_ctx, self._n_batch = follower.n_ctx(), follower.n_batch
        self._begin = 0  # of the part of the text that is cached
        self._cached: List[int] = []
        self._likeliest = 0

    def known(self, text: np.ndarray) -> np.ndarray:
        """The text without tokens that the follower does not have, as where the model's vocabulary is a little larger."""
        return text if self._knows_all else text[text < self._n_vocab]

    def behind(self, text: np.ndarray) -> Tuple[int, int]:
        """Tokens to be read before it can go on from all of the text, and from its last part."""
        begin, common = self._common(text)
        return len(text) - (common if begin == 0 else 0), min(len(text) - begin - common, _LATE)

    def _common(self, text: np.ndarray) -> Tuple[int, int]:
        """(begin of the cached part, its tokens that are the text's); the last token is always read anew, for its logits."""
        if self._begin >= len(text):
            return 0, 0
        part = text[self._begin : -1][: len(self._cached)]
        differ = np.flatnonzero(part != self._cached[: len(part)])
        return self._begin, int(differ[0]) if len(differ) else len(part)

    def read(self, text: np.ndarray, whole: bool) -> Tuple[int, float]:
        """Reads what it has not seen of the text, or of its last part; returns how many tokens, and the seconds."""
        started = time.perf_counter()
        begin, common = self._common(text)
        if whole and begin > 0:
            begin, common = 0, 0
        elif not whole and len(text) - begin - common > _LATE:
            begin, common = max(0, len(text) - _LATE), 0
        self._begin = begin
        del self._cached[common:]
        new = text[begin + common :].tolist()
        for i in range(0, len(new), self._n_batch):
            self._evaluate(new[i : i + self._n_batch])
        return len(new), time.perf_counter() - started

    def go_on(self, n: int) -> List[int]:
        """The n likeliest tokens, one after the other."""
        proposed = [self._likeliest]
        while len(proposed) < n:
            self._evaluate(proposed[-1:])
            proposed.append(self._likeliest)
        return proposed

    def _evaluate(self, tokens: List[int]) -> None:
        logits = self._follower.decode(tokens, len(self._cached))
        self._cached += tokens
        self._likeliest = int(logits[-1, : self._n_vocab].argmax())

    def measure(self, length: DraftLength) -> None:
        """What it costs to read a token, and to make one."""
        text = list(range(min(_MEASURED, self._n_vocab, self._n_batch)))
        self._evaluate(text[:1])  # its weights may be on the disk yet
        started = time.perf_counter()
        self._evaluate(text)
        length.read(len(text), time.perf_counter() - started)
        for token in text[:3]:
            started = time.perf_counter()
            self._evaluate([token])
            length.drafted(1, time.perf_counter() - started)
        self._cached = []

    def close(self) -> None:
        self._follower.close()

    def forked(self) -> None:
        self._follower.forked()


def _proposed_by(model: Any, text: np.ndarray) -> List[int]:
    """What a proposer says comes after a text. Raises ValueError where that is no list of whole numbers."""
    found = model(text)
    proposed = np.asarray(found)
    if proposed.ndim != 1 or (proposed.size and proposed.dtype.kind not in "iu"):
        raise ValueError(f"draft_model: {type(model).__name__} proposes {shown(found)}, want token ids")
    return proposed.tolist()


def _load(path: Union[str, os.PathLike], kwargs: Dict[str, Any], llm: Llama) -> Llama:
    from .llama import Llama

    draft = Llama(path, **{"n_ctx": llm.n_ctx(), "verbose": llm.verbose, **kwargs})
    try:
        if not draft.goes_on:
            raise ValueError(
                f"draft_model: {draft.model_path} cannot go on from a text: a model for embeddings, or loaded with vocab_only"
            )
        check(draft)
        check_fits(draft, llm)
    except ValueError:
        draft.close()
        raise
    return draft


def check(draft: Llama) -> None:
    """Whether it can draft for any model; its vocabulary is enough. Raises ValueError: it cannot forget tokens."""
    if not draft.forgets:
        raise ValueError(f"draft_model: {draft.model_path} cannot forget tokens, as a recurrent model cannot")


def check_fits(draft: Llama, llm: Llama, ends: bool = False) -> None:
    """Whether it can draft for this model; of both the vocabulary is enough.

    Args:
        ends: what stands at the begin and the end of a text has to be the same, too, as llama-server wants it.

    Raises:
        ValueError: a token of one is not the same text in the other.
    """
    vocabs = [llama_cpp.llama_model_get_vocab(each.model) for each in (draft, llm)]
    where = f"draft_model: {draft.model_path}: its vocabulary is not that of {llm.model_path}"
    types = [llama_cpp.llama_vocab_type(vocab) for vocab in vocabs]
    if types[0] != types[1]:
        raise ValueError(f"{where}: its type is {types[0]}, want {types[1]}")
    sizes = draft.n_vocab(), llm.n_vocab()
    if abs(sizes[0] - sizes[1]) > _PADDING:
        raise ValueError(f"{where}: it has {sizes[0]} tokens, want {sizes[1]}")
    for token in range(_FIRST_OF_SERVER if ends else 0, min(sizes)):
        found, wanted = (llama_cpp.llama_vocab_get_text(vocab, token) for vocab in vocabs)
        if found != wanted:
            raise ValueError(f"{where}: token {token} is {_shown(found)}, want {_shown(wanted)}")
    for name in ("bos", "eos") if ends else ():
        added = [getattr(llama_cpp, f"llama_vocab_get_add_{name}")(vocab) for vocab in vocabs]
        marks = [getattr(llama_cpp, f"llama_vocab_{name}")(vocab) if add else None for vocab, add in zip(vocabs, added)]
        if marks[0] != marks[1]:
            raise ValueError(f"{where}: its {name.upper()} token at a text is {marks[0]}, want {marks[1]}")


def _shown(text: Optional[bytes]) -> str:
    return repr((text or b"").decode(errors="replace")[:40])

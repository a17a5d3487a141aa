"""llama-cpp-python's caches of prompts (`LlamaRAMCache`, `LlamaDiskCache`) on a model whose budget changes, and which other models use."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Optional, Sequence, Tuple
import weakref
import zlib

from llama_cpp.llama_cache import BaseLlamaCache

from .plan import Plan
from .threads_and_forks import keep_over_forks

if TYPE_CHECKING:
    from .llama import Llama


# of all caches: llama-cpp-python's change while they look for an entry
class _Turn:
    def __init__(self) -> None:
        self.lock = threading.RLock()

    def forked(self) -> None:
        self.lock = threading.RLock()  # the other one may be held by a thread that the child does not have


_turn = _Turn()
keep_over_forks(_turn)


class CacheOfOnePlan(BaseLlamaCache):
    """A cache that has no entry but those of this model, under the plan in force and the price of a miss: text depends on these alone.

    Args:
        cache: what stores them, which several models may share.
        llm: the model; not kept alive by it.
    """

    def __init__(self, cache: Any, llm: Llama):
        self.__dict__.update(_cache=cache, _llm=weakref.ref(llm))

    def __getitem__(self, tokens: Sequence[int]):
        llm = self._model()
        try:
            with _turn.lock:
                state = self._cache[_key(tokens, llm.plan, llm)]
            llm._check_state(state)
        except KeyError:
            raise
        except Exception as error:  # a damaged file, or an entry of another context: computed anew
            raise KeyError(f"the entry cannot be used: {error}") from None
        if getattr(state, "plan", None) != llm.plan:
            raise KeyError("the entry is of another plan")
        return state

    def __setitem__(self, tokens: Sequence[int], state) -> None:
        if not getattr(state, "mixed", False):  # no plan's text
            with _turn.lock:
                self._cache[_key(tokens, getattr(state, "plan", None), self._model())] = state

    def __contains__(self, tokens: Sequence[int]) -> bool:
        llm = self._model()
        with _turn.lock:
            return _key(tokens, llm.plan, llm) in self._cache

    @property
    def inner(self) -> Any:
        """What stores them."""
        return self._cache

    @property
    def cache_size(self) -> int:
        return self._cache.cache_size

    def _find_longest_prefix_key(self, key: Tuple[int, ...]):
        return self._cache._find_longest_prefix_key(key)

    # all else is the cache's own
    def __getattr__(self, name: str):
        if name == "_cache":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self._cache, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._cache, name, value)

    def _model(self) -> Llama:
        llm = self._llm()
        if llm is None:
            raise KeyError("the model is gone")
        return llm


def _key(tokens: Sequence[int], plan: Optional[Plan], llm: Llama) -> Tuple[int, ...]:
    """What the cache looks for the longest beginning of: tokens, the first of which tells models, plans and prices apart. An int of its own in
    front would be a beginning that all entries of a plan have in common, and `LlamaDiskCache` removes what it finds."""
    # the same in every process, for caches on disk
    number = zlib.crc32(repr((llm._computes_as, plan, llm.miss_price)).encode()) + 1
    return tuple(int(token) + (0 if i else number << 32) for i, token in enumerate(tokens))

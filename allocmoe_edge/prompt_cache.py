"""llama-cpp-python's caches of prompts (`LlamaRAMCache`, `LlamaDiskCache`) on a model whose budget changes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Sequence
import weakref

if TYPE_CHECKING:
    from .llama import Llama


class CacheOfOnePlan:
    """A cache that has no entry but those computed under the plan in force: text depends on that plan alone.

    Args:
        cache: what stores them, which several models may share.
        llm: the model; not kept alive by it.
    """

    def __init__(self, cache: Any, llm: Llama):
        self._cache, self._llm = cache, weakref.ref(llm)

    def __getitem__(self, tokens: Sequence[int]):
        state, llm = self._cache[tokens], self._llm()
        if llm is None or getattr(state, "mixed", False) or getattr(state, "plan", None) != llm.plan:
            raise KeyError("the entry is of another plan")
        return state

    def __setitem__(self, tokens: Sequence[int], state) -> None:
        self._cache[tokens] = state

    def __contains__(self, tokens: Sequence[int]) -> bool:
        return tokens in self._cache

    def __getattr__(self, name: str):
        return getattr(self._cache, name)

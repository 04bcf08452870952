"""A cache and its captured decode step, kept from one run of the engine to the next: capturing costs as much as reading
many a document. Imports nothing heavy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from auvsum.cache.cache import BudgetedCache
    from auvsum.engine.graph import DecodeGraph


class Kept:
    """At most one cache with its step, at rest: whoever takes it has it alone, and one of another kind is let go.

    What the next run needs is either this or made after it is gone, so its memory counts as free: `bytes`.
    """

    def __init__(self) -> None:
        self._kind: object = None
        self._pair: tuple[BudgetedCache, DecodeGraph] | None = None

    @property
    def bytes(self) -> int:
        """Bytes of the cache that is kept."""
        return self._pair[0].bytes() if self._pair else 0

    def take(self, kind: object) -> tuple[BudgetedCache, DecodeGraph] | None:
        """What is kept, if it is of that kind. Nothing is kept afterwards."""
        pair = self._pair if kind == self._kind else None
        self.clear()
        return pair

    def put(self, kind: object, cache: BudgetedCache, graph: DecodeGraph) -> None:
        """Keeps a cache whose rows all rest.

        Args:
            kind: everything that the two depend on; compared, not hashed.
        """
        self._kind, self._pair = kind, (cache, graph)

    def clear(self) -> None:
        """Lets go of what is kept."""
        self._kind = self._pair = None


__all__ = ["Kept"]

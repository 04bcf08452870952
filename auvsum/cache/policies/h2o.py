"""H2O (Zhang et al., NeurIPS 2023): the recent tokens and the heavy hitters by accumulated attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from auvsum.cache.policy import SlotPolicy, keep_recent_and_best, place_or_replace, token_columns
from auvsum.cache.store import Held, SlotStore
from auvsum.kernels.column_scores import ChunkAttention


@dataclass(frozen=True)
class H2O(SlotPolicy):
    """`S_j += a[t, j]` from the prompt on; the newest half is protected, the least `S` of the rest goes first."""

    name: ClassVar[str] = "h2o"
    paper: ClassVar[str] = "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of LLMs, NeurIPS 2023"
    evicts: ClassVar[str] = "end of prompt, then one token a step"
    state: ClassVar[tuple[str, ...]] = ("score",)

    def observe_chunk(self, attention: ChunkAttention, held: Held, store: SlotStore, row: int) -> None:
        held.state["score"] += token_columns(attention.column_sums(), held)

    def choose(self, held: Held, capacity: int) -> Tensor | None:
        if held.size <= capacity:
            return None
        recent = capacity // 2
        return keep_recent_and_best(held.state["score"], recent, capacity - recent)

    def place(self, store: SlotStore) -> Tensor:
        """The arriving token is one of the newest half, so `B // 2 - 1` of the live ones are protected."""
        return place_or_replace(store, store.state["score"], store.capacity // 2 - 1)

    def observe(self, store: SlotStore, probabilities: Tensor) -> None:
        store.state["score"] += probabilities
        store.pointer += store.active & (store.pointer < store.capacity)


POLICY = H2O

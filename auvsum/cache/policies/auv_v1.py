"""AUV's V1 (§4.3): H2O's flow with AUV's aggregation rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from auvsum.cache.aggregation import aggregate_chunk, aggregate_step
from auvsum.cache.policy import SlotPolicy, keep_recent_and_best, place_or_replace
from auvsum.cache.store import Held, SlotStore
from auvsum.kernels.column_scores import ChunkAttention


@dataclass(frozen=True)
class AuvV1(SlotPolicy):
    """The newest `B // 2` are protected; when a token arrives and `B` are live, the least AAS of the rest goes."""

    name: ClassVar[str] = "auv-v1"
    paper: ClassVar[str] = "AUV, ablation V1: H2O's flow, aggregation of eqs. 2 to 4"
    evicts: ClassVar[str] = "end of prompt, then one token a step"
    state: ClassVar[tuple[str, ...]] = ("aas", "cnt")

    def observe_chunk(self, attention: ChunkAttention, held: Held, store: SlotStore, row: int) -> None:
        aggregate_chunk(attention, held, store, row)

    def choose(self, held: Held, capacity: int) -> Tensor | None:
        if held.size <= capacity:
            return None
        recent = capacity // 2
        return keep_recent_and_best(held.state["aas"], recent, capacity - recent)

    def place(self, store: SlotStore) -> Tensor:
        return place_or_replace(store, store.state["aas"], store.capacity // 2 - 1)

    def observe(self, store: SlotStore, probabilities: Tensor) -> None:
        aggregate_step(store, probabilities)
        store.pointer += store.active & (store.pointer < store.capacity)


POLICY = AuvV1

"""The full cache: nothing is ever evicted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from auvsum.cache.policy import SlotPolicy
from auvsum.cache.store import Held, SlotStore
from auvsum.kernels.column_scores import ChunkAttention


@dataclass(frozen=True)
class Full(SlotPolicy):
    """Keeps every token; what all policies are compared with."""

    name: ClassVar[str] = "full"
    paper: ClassVar[str] = "-"
    evicts: ClassVar[str] = "never"
    looks: ClassVar[bool] = False

    def observe_chunk(self, attention: ChunkAttention, held: Held, store: SlotStore, row: int) -> None:
        """There is nothing to learn."""

    def choose(self, held: Held, capacity: int) -> Tensor | None:
        return None

    def place(self, store: SlotStore) -> Tensor:
        return store.pointer[:, None].expand(store.positions.shape[:2])

    def observe(self, store: SlotStore, probabilities: Tensor) -> None:
        store.pointer += store.active


POLICY = Full

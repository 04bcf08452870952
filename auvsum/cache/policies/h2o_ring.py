"""H2O as FlexGen runs it: single-step memory, the token that leaves the ring of recent ones is always admitted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from auvsum.cache.policy import least, token_columns
from auvsum.cache.rings import SingleStep
from auvsum.cache.store import Held, SlotStore
from auvsum.kernels.column_scores import ChunkAttention


@dataclass(frozen=True)
class H2ORing(SingleStep):
    """`S_j += a[t, j]`; the least `S` of the heavy half gives its slot to the oldest of the recent half."""

    name: ClassVar[str] = "h2o-ring"
    paper: ClassVar[str] = "H2O (NeurIPS 2023), its FlexGen implementation"
    evicts: ClassVar[str] = "end of prompt, then one token a step"
    state: ClassVar[tuple[str, ...]] = ("score",)

    def observe_chunk(self, attention: ChunkAttention, held: Held, store: SlotStore, row: int) -> None:
        held.state["score"] += token_columns(attention.column_sums(), held)

    def scores(self, held: Held) -> Tensor:
        return held.state["score"]

    def victim(self, store: SlotStore, rows: Tensor, first: Tensor) -> Tensor:
        return least(store.state["score"][rows].masked_fill(~first, torch.inf), store.positions[rows])

    def observe(self, store: SlotStore, probabilities: Tensor) -> None:
        store.state["score"] += probabilities
        super().observe(store, probabilities)


POLICY = H2ORing

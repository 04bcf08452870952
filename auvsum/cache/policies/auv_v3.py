"""AUV's V3 (§3.3, fig. 3): optimized single-step eviction, least usage count, then least AAS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from auvsum.cache.aggregation import aggregate_chunk, aggregate_step, count_usage
from auvsum.cache.policy import least
from auvsum.cache.rings import SingleStep
from auvsum.cache.store import Held, SlotStore
from auvsum.errors import PolicyError
from auvsum.kernels.column_scores import ChunkAttention


@dataclass(frozen=True)
class AuvV3(SingleStep):
    """Single-step memory of `2L` slots. Usage counts are never decayed here: eq. 6 belongs to multi-step eviction.

    Args:
        top_k: how many of a step's most attended keys count as used; None for L.
    """

    top_k: int | None = None

    name: ClassVar[str] = "auv-v3"
    paper: ClassVar[str] = "AUV, ablation V3: optimized single-step eviction"
    evicts: ClassVar[str] = "end of prompt, then one token a step"
    state: ClassVar[tuple[str, ...]] = ("aas", "cnt", "usage")

    def __post_init__(self) -> None:
        if self.top_k is not None and self.top_k < 1:
            raise PolicyError(f"top_k is {self.top_k}", "it must be at least 1")

    def observe_chunk(self, attention: ChunkAttention, held: Held, store: SlotStore, row: int) -> None:
        aggregate_chunk(attention, held, store, row)

    def scores(self, held: Held) -> Tensor:
        return held.state["aas"]

    def victim(self, store: SlotStore, rows: Tensor, first: Tensor) -> Tensor:
        usage = store.state["usage"][rows].masked_fill(~first, torch.inf)
        rest = usage > usage.amin(-1, keepdim=True)
        return least(store.state["aas"][rows].masked_fill(rest, torch.inf), store.positions[rows])

    def observe(self, store: SlotStore, probabilities: Tensor) -> None:
        aggregate_step(store, probabilities)
        count_usage(store, probabilities, store.capacity // 2, self.top_k)
        super().observe(store, probabilities)


POLICY = AuvV3

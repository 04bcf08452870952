"""SnapKV (Li et al., NeurIPS 2024): what the prompt's last queries attended to, pooled over neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from auvsum.cache.policy import keep_recent_and_best, token_columns
from auvsum.cache.rings import Ring
from auvsum.cache.store import Held, SlotStore
from auvsum.errors import PolicyError
from auvsum.kernels.column_scores import ChunkAttention


@dataclass(frozen=True)
class SnapKV(Ring):
    """`s_j` sums `a` over the last `w = min(window, B // 2)` queries and is average-pooled over the earlier tokens.

    The top `B - w` and the last `w` stay; at the ends of the text the pool counts what is missing as zeros.

    Args:
        window: the most queries that look. kernel: the width of the pool, odd.
    """

    window: int = 32
    kernel: int = 5

    name: ClassVar[str] = "snapkv"
    paper: ClassVar[str] = "SnapKV: LLM Knows What You are Looking for Before Generation, arXiv 2404.14469"
    evicts: ClassVar[str] = "end of prompt; a ring of the last tokens in decode"
    streams: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.window < 1:
            raise PolicyError(f"window is {self.window}", "it must be at least 1")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise PolicyError(f"kernel is {self.kernel}", "it must be odd")

    def observe_chunk(self, attention: ChunkAttention, held: Held, store: SlotStore, row: int) -> None:
        """Scores for `choose` alone: nothing of them is kept. The window itself has an infinite one."""
        window = min(int(self.ring(store)[row]), held.size)
        earlier = held.size - window
        scores = held.key.new_full((held.key.shape[0], held.size), torch.inf, dtype=torch.float32)
        if earlier:
            sums = token_columns(attention.last_sums(window), held)[:, :earlier]
            scores[:, :earlier] = functional.avg_pool1d(sums, self.kernel, stride=1, padding=self.kernel // 2)
        held.state["score"] = scores

    def choose(self, held: Held, capacity: int) -> Tensor | None:
        if held.size <= capacity:
            return None
        return keep_recent_and_best(held.state["score"], 0, capacity)

    def ring(self, store: SlotStore) -> Tensor:
        return (store.granted // 2).clamp(max=self.window)


POLICY = SnapKV

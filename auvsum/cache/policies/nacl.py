"""NACL (Chen et al., ACL 2024): proxy tokens score the prompt once, and part of what stays is drawn at random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from auvsum.cache.policy import ascending, token_columns
from auvsum.cache.rings import Ring
from auvsum.cache.store import Held, SlotStore
from auvsum.kernels.column_scores import ChunkAttention

#: Tokens a ring holds at least, where a quarter of the slots allows it.
_LEAST_RING = 16


@dataclass(frozen=True)
class NACL(Ring):
    """Of B slots 2.5% are the first tokens, 2.5% the last ones, 35% are drawn, the rest are the best by score.

    `s_j` sums `a` over the last `max(8, n // 100)` queries. Drawn without replacement with probability softmax(s):
    the largest `s + Gumbel noise`. Shares round down, at least 1. The official code never evicts in decode; here the
    last tokens are a ring, of at least 16 slots or B // 4: in a ring of one slot a policy does not see what it wrote.

    Args:
        seed: of the draws; they differ from layer to layer and head to head.
    """

    seed: int = 0

    name: ClassVar[str] = "nacl"
    paper: ClassVar[str] = "NACL: A General and Effective KV Cache Eviction Framework for LLMs, arXiv 2408.03675"
    evicts: ClassVar[str] = "end of prompt; a ring of the last tokens in decode"
    streams: ClassVar[bool] = False

    @property
    def least_slots(self) -> int:
        return 4

    def observe_chunk(self, attention: ChunkAttention, held: Held, store: SlotStore, row: int) -> None:
        """Scores and noise for `choose` alone: nothing of them is kept."""
        proxies = min(max(8, held.size // 100), held.chunk)
        held.state["score"] = token_columns(attention.last_sums(proxies), held)
        held.state["noise"] = gumbel(self.seed, store.layer, *held.positions.shape).to(held.key.device)

    def choose(self, held: Held, capacity: int) -> Tensor | None:
        if held.size <= capacity:
            return None
        first, drawn = max(1, capacity // 40), max(1, capacity * 35 // 100)
        last = max(capacity // 40, min(capacity // 4, _LEAST_RING))
        scores = held.state["score"].double()
        taken = torch.zeros_like(scores, dtype=torch.bool)
        taken[:, :first] = True
        taken[:, held.size - last :] = True
        for count, by in ((capacity - first - last - drawn, scores), (drawn, scores + held.state["noise"])):
            best = ascending(by.masked_fill(taken, -torch.inf))[:, held.size - count :]
            taken.scatter_(1, best, True)
        return taken.nonzero()[:, 1].view(taken.shape[0], capacity)

    def ring(self, store: SlotStore) -> Tensor:
        return torch.maximum(store.capacity // 40, (store.capacity // 4).clamp(max=_LEAST_RING))


def gumbel(seed: int, layer: int, heads: int, tokens: int) -> Tensor:
    """Gumbel noise `[heads, tokens]`, fp64: the same on every device and for every batch."""
    generator = torch.Generator().manual_seed(seed * 100_003 + layer)
    return -(-torch.rand((heads, tokens), generator=generator, dtype=torch.float64).log()).log()


POLICY = NACL

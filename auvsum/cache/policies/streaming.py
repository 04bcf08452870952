"""StreamingLLM (Xiao et al., ICLR 2024): the first tokens and the last ones. LM-Infinite names the same keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from auvsum.cache.rings import Ring
from auvsum.cache.store import Held, SlotStore
from auvsum.errors import PolicyError
from auvsum.kernels.column_scores import ChunkAttention


@dataclass(frozen=True)
class Streaming(Ring):
    """The first `sinks` tokens and the last `B - sinks`, the arriving one included.

    Args:
        sinks: how many of the first tokens stay.
    """

    sinks: int = 4

    name: ClassVar[str] = "streaming"
    paper: ClassVar[str] = "Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453"
    evicts: ClassVar[str] = "end of prompt, then one token a step"
    one_set: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.sinks < 0:
            raise PolicyError(f"sinks is {self.sinks}", "it must be 0 or more")

    @property
    def least_slots(self) -> int:
        return self.sinks + 1

    def observe_chunk(self, attention: ChunkAttention, held: Held, store: SlotStore, row: int) -> None:
        """Attention plays no part."""

    def choose(self, held: Held, capacity: int) -> Tensor | None:
        if held.size <= capacity:
            return None
        columns = torch.arange(held.size, device=held.key.device)
        keep = torch.cat([columns[: self.sinks], columns[held.size - capacity + self.sinks :]])
        return keep.expand(held.key.shape[0], -1)

    def ring(self, store: SlotStore) -> Tensor:
        return store.capacity - self.sinks


POLICY = Streaming

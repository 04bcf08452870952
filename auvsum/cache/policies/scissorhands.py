"""Scissorhands (Liu et al., NeurIPS 2023): tokens that were seldom important lately go, half a cache at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from auvsum.cache.policy import SlotPolicy, ascending, keep_recent_and_best, token_columns
from auvsum.cache.store import Held, SlotStore
from auvsum.errors import PolicyError
from auvsum.kernels.column_scores import ChunkAttention

#: An fp32 value holds this many bits exactly: a slot's history is so many of them.
_BITS = 24


@dataclass(frozen=True)
class Scissorhands(SlotPolicy):
    """Counts how often a key got `a >= 1 / live` from the last `window` queries; the least counted `B // 2` go at once.

    Args:
        window: how many queries back the count goes. recent: newest tokens that never go, the arriving one included.
    """

    window: int = 400
    recent: int = 10

    name: ClassVar[str] = "scissorhands"
    paper: ClassVar[str] = "Scissorhands: Exploiting the Persistence of Importance Hypothesis, arXiv 2305.17118"
    evicts: ClassVar[str] = "end of prompt, then B // 2 tokens whenever B are live"

    def __post_init__(self) -> None:
        if self.window < 1 or self.recent < 1:
            raise PolicyError(f"window is {self.window} and recent {self.recent}", "both must be at least 1")

    @property
    def state(self) -> tuple[str, ...]:  # type: ignore[override]
        """Which of the last queries hit the slot, newest in the lowest bit of the first."""
        return tuple(f"hits{word}" for word in range(-(-self.window // _BITS)))

    @property
    def least_slots(self) -> int:
        """Beside the recent live tokens there must be `B // 2` that may go."""
        return max(2, 2 * self.recent - 3)

    def observe_chunk(self, attention: ChunkAttention, held: Held, store: SlotStore, row: int) -> None:
        rows = min(self.window, held.chunk)
        hits = attention.last_hits(1 / attention.keys_seen[:, held.chunk - rows :], _BITS)
        self._push(held.state, token_columns(hits, held), held.chunk)

    def choose(self, held: Held, capacity: int) -> Tensor | None:
        if held.size <= capacity:
            return None
        recent = min(self.recent, capacity)
        return keep_recent_and_best(self._counts(held.state), recent, capacity - recent)

    def place(self, store: SlotStore) -> Tensor:
        """A free slot; where there is none, the least counted `B // 2` outside the recent ones go first."""
        slots, capacity = store.slots, store.capacity[:, None, None]
        valid, positions = store.valid[..., :slots], store.positions[..., :slots]
        full = valid.sum(-1, keepdim=True) == capacity
        if bool(full.any()):
            stays = ~valid | (positions > store.seen[:, None, None] - self.recent)
            counts = self._counts(store.state)[..., :slots].masked_fill(stays, torch.inf)
            rank = ascending(counts, positions).argsort(-1)
            store.drop(full & (rank < capacity // 2))
        free = ~store.valid[..., :slots] & (torch.arange(slots, device=valid.device) < capacity)
        return free.to(torch.int8).argmax(-1)

    def observe(self, store: SlotStore, probabilities: Tensor) -> None:
        hits = store.valid & (probabilities >= 1 / store.valid.sum(-1, keepdim=True))
        self._push(store.state, hits[..., None, :].to(torch.int32), 1)

    def _push(self, state: dict[str, Tensor], hits: Tensor, queries: int) -> None:
        """Shifts all histories by `queries` and adds the last of them: words `[.., W, C]` of at most `window` bits."""
        old = [state[name].to(torch.int32) for name in self.state]
        words, bits = divmod(queries, _BITS)
        for word, name in enumerate(self.state):
            value = torch.zeros_like(old[0])
            if word >= words:
                value |= (old[word - words] << bits) & ((1 << _BITS) - 1)
            if word > words:
                value |= old[word - words - 1] >> (_BITS - bits)
            if word < hits.shape[-2]:
                value |= hits[..., word, :]
            state[name].copy_(value)

    def _counts(self, state: dict[str, Tensor]) -> Tensor:
        """How many of the last `window` queries hit each slot, fp32."""
        counts = torch.zeros_like(state["hits0"])
        for word, name in enumerate(self.state):
            value = state[name].to(torch.int32)
            for bit in range(min(_BITS, self.window - word * _BITS)):
                counts += (value >> bit) & 1
        return counts


POLICY = Scissorhands

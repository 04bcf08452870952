"""Rings: the recent tokens of a row live in its last slots, and a pointer goes round in them.

`Ring` is for policies that choose once, at the end of the prompt: in decode a new token takes the place of the oldest
of the ring. `SingleStep` is §3.4's memory for single-step eviction: the oldest of the ring moves into the slot of a
victim of the first half (scatter filling), and the new token takes its place.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from auvsum.cache.policy import SlotPolicy, keep_recent_and_best
from auvsum.cache.store import Held, SlotStore


def next_slot(store: SlotStore, ring: Tensor) -> Tensor:
    """Where each row's next token goes, `[B]`: free slots in their order, then round in the last `ring` slots."""
    return torch.where(store.pointer < store.capacity, store.pointer, store.capacity - ring)


def advance(store: SlotStore, ring: Tensor) -> None:
    """Moves the pointers of the active rows behind the slot that was written."""
    store.pointer.copy_(torch.where(store.active, next_slot(store, ring) + 1, store.pointer))


@dataclass(frozen=True)
class Ring(SlotPolicy):
    """Nothing that the prompt left is evicted later; the newest tokens share a ring, so that the cap holds."""

    looks: ClassVar[bool] = False

    @abc.abstractmethod
    def ring(self, store: SlotStore) -> Tensor:
        """Slots of each row's ring, int64 `[B]`, at least 1."""

    def place(self, store: SlotStore) -> Tensor:
        return next_slot(store, self.ring(store))[:, None].expand(store.positions.shape[:2])

    def observe(self, store: SlotStore, probabilities: Tensor) -> None:
        advance(store, self.ring(store))


@dataclass(frozen=True)
class SingleStep(SlotPolicy):
    """`2L` slots, the latter half a ring: each step one victim of the first half goes, the ring's oldest takes over."""

    @abc.abstractmethod
    def scores(self, held: Held) -> Tensor:
        """By which the prompt's tokens are chosen, `[G, C]`."""

    @abc.abstractmethod
    def victim(self, store: SlotStore, rows: Tensor, first: Tensor) -> Tensor:
        """The slot that each head of some rows gives up, int64 `[N, G]`.

        Args:
            rows: int64 `[N]`. first: bool `[N, 1, S]`, the slots of each row's first half.
        """

    def capacity(self, slots: int) -> int:
        return slots // 2 * 2

    def slots_to_hold(self, tokens: int) -> int:
        return -(-max(tokens, 2) // 2) * 2

    def choose(self, held: Held, capacity: int) -> Tensor | None:
        """The last L and the L best among the rest, once more than 2L tokens are there."""
        if held.size <= capacity:
            return None
        return keep_recent_and_best(self.scores(held), capacity // 2, capacity // 2)

    def place(self, store: SlotStore) -> Tensor:
        local = store.capacity // 2
        at = next_slot(store, local)
        taken = store.valid[:, 0].gather(1, at[:, None])[:, 0] & store.active
        rows = taken.nonzero()[:, 0]
        if len(rows):
            first = torch.arange(store.slots, device=rows.device) < local[rows, None, None]
            victims = self.victim(store, rows, first)[..., None]
            store.move(rows, at[rows, None, None].expand_as(victims), victims)
        return at[:, None].expand(store.positions.shape[:2])

    def observe(self, store: SlotStore, probabilities: Tensor) -> None:
        advance(store, store.capacity // 2)

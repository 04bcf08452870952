"""TOVA (Oren et al., EMNLP 2024): the token that the last query attended to least goes; one set a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from auvsum.cache.policy import SlotPolicy, keep_recent_and_best, place_or_replace, token_columns
from auvsum.cache.store import Held, SlotStore
from auvsum.kernels.column_scores import ChunkAttention


@dataclass(frozen=True)
class TOVA(SlotPolicy):
    """`w_j` is the mean over all heads of the last query's `a[j]`; nothing is protected."""

    name: ClassVar[str] = "tova"
    paper: ClassVar[str] = "Transformers are Multi-State RNNs, arXiv 2401.06104"
    evicts: ClassVar[str] = "end of prompt, then one token a step"
    state: ClassVar[tuple[str, ...]] = ("weight",)
    one_set: ClassVar[bool] = True

    def observe_chunk(self, attention: ChunkAttention, held: Held, store: SlotStore, row: int) -> None:
        last = token_columns(attention.last_sums(1), held)
        held.state["weight"].copy_(last.mean(0, keepdim=True).expand_as(last))

    def choose(self, held: Held, capacity: int) -> Tensor | None:
        if held.size <= capacity:
            return None
        return keep_recent_and_best(held.state["weight"], 0, capacity)

    def place(self, store: SlotStore) -> Tensor:
        return place_or_replace(store, store.state["weight"], torch.zeros_like(store.capacity))

    def observe(self, store: SlotStore, probabilities: Tensor) -> None:
        store.state["weight"].copy_(probabilities.mean(1, keepdim=True).expand_as(probabilities))
        store.pointer += store.active & (store.pointer < store.capacity)


POLICY = TOVA

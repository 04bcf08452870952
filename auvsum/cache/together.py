"""Layers that keep their books together: what a policy does in a decode step, done once for all of them.

On a CPU the forty small operations of AUV's bookkeeping cost more to call than to compute, and they were called for
every layer. Nothing of them is needed before the next token: a layer's attention needs only which slot its token takes.
So the stores of like layers share one memory in which row `layer * B + b` is row `b` of a layer; `place` is asked once
before the first layer, and behind the last one the probabilities of all layers are computed again, in one product, and
observed once. Policies see a store with more rows and notice nothing. The attention itself is the library's fused one.

After a pass over the weights nothing of this is in the processor's cache, neither the books nor the code that keeps
them. A policy that needs its books at an eviction alone gets them for up to eight steps at once: their queries wait,
and the keys they saw are still where they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from auvsum.cache.codec import Codec
from auvsum.cache.policy import Deferring, SlotPolicy
from auvsum.cache.store import SlotStore

_NOTHING = torch.empty(0)
#: Steps whose queries wait: each takes about as much memory as a token.
_MOST_STEPS = 8


class Books:
    """The books of one layer, or of several like layers.

    A layer's store keeps its books alive, and they the memory of all layers; nothing points back, so that counting
    references frees it all.

    Args:
        whole: the store over the rows of all layers. layers: how many they are.
    """

    def __init__(self, whole: SlotStore, layers: int) -> None:
        self.whole = whole
        self.layers = layers
        self._at: tuple[Tensor, ...] = ()
        self._slot: int | None = None
        self._mask: tuple[Tensor | None, ...] = ()
        self._queries: list[Tensor] = []
        self._seen: list[Tensor] = []
        #: Position of the token that arrived. The steps that wait: their queries, positions, and what else they need.
        self._position = _NOTHING
        self._waiting: list[tuple[Tensor, Tensor]] = []
        #: Whose they are, and the scale of their logits.
        self._due: tuple[Deferring, float] | None = None

    @classmethod
    def shared(cls, layers: list[int], *, batch: int, **like: Any) -> tuple[Books, list[SlotStore]]:
        """The books of layers with these numbers, and their stores, in one memory.

        Args:
            like: what each store is made of.
        """
        whole = SlotStore(batch=len(layers) * batch, layer=layers[0], **like)
        books = cls(whole, len(layers))
        stores = [whole.part(number * batch, batch, layer) for number, layer in enumerate(layers)]
        whole._heads = stores[0]._heads  # else a few bytes that no layer counts
        for store in stores:
            store.catch_up = books.catch_up
        return books, stores

    @property
    def recalls(self) -> bool:
        """Whether `attend` may be used: keys can be read again without being decoded again."""
        return self.whole.valid.device.type == "cpu" and type(self.whole.codec) is Codec

    def admit(self, policy: SlotPolicy, store: SlotStore, number: int, key: Tensor, value: Tensor) -> None:
        """Writes a layer's new tokens `[B, G, D]` to the slots the policy gives them, before the first layer for all.

        Args:
            store: the layer's. number: of the layer, in the order in which a step visits them.
        """
        if number == 0:
            self._queries, self._seen = [], []
            self._position = self.whole.seen.to(torch.int32) if isinstance(policy, Deferring) else _NOTHING
            at = policy.place(self.whole)
            self.whole.enter(at)
            self._at = torch.split(at, at.shape[0] // self.layers)
            one = at[:1, :1]
            # Where all heads write to the same slot a slice will do, in a sixth of the time of an indexed write.
            self._slot = int(one) if self.recalls and bool((at == one).all()) else None
            self._mask = self._hide(key.dtype) if self.recalls else ()
        store.decoded()
        store.write(self._at[number] if self._slot is None else self._slot, key, value)

    def _hide(self, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
        """What is added to each layer's logits, `[B, G, 1, S (+ 1)]`; None where all slots are live."""
        valid = self.whole.valid
        if bool(valid.all()):
            return (None,) * self.layers
        mask = torch.zeros(valid.shape, dtype=dtype).masked_fill_(~valid, -torch.inf)[:, :, None]
        return torch.split(mask, mask.shape[0] // self.layers)

    def attend(self, policy: SlotPolicy, store: SlotStore, number: int, query: Tensor, scale: float) -> Tensor:
        """A layer's attention `[B, G, R, D]` over its slots; behind the last layer the policy observes all of them.

        Args:
            store, number: as for `admit`. query: `[B, G, R, D]`, R query heads a KV head.
        """
        keys, values = store.read()
        # The heads of a group are rows of one attention, so that keys and values are not repeated.
        out = functional.scaled_dot_product_attention(query, keys, values, self._mask[number], scale=scale)
        if policy.looks:
            self._queries.append(query)
        if number == self.layers - 1:
            self._end_step(policy, scale)
            self._queries, self._at, self._mask = [], (), ()
        return out

    def _end_step(self, policy: SlotPolicy, scale: float) -> None:
        """Behind the last layer: the policy observes, now or later."""
        whole = self.whole
        if not policy.looks:
            policy.observe(whole, whole.longest.new_empty(0))
            return
        queries = torch.cat(self._queries) if len(self._queries) > 1 else self._queries[0]
        if not isinstance(policy, Deferring):
            policy.observe(whole, self._recall([queries], whole.valid[:, :, None], scale)[:, :, 0])
            return
        self._waiting.append((queries, self._position))
        self._position = _NOTHING
        self._due = policy, scale
        full = policy.advance(whole)
        if len(full) or len(self._waiting) == _MOST_STEPS:
            self.catch_up()
        if len(full):
            policy.evict(whole, full)

    def catch_up(self) -> None:
        """The policy observes the steps that wait."""
        if not self._waiting or self._due is None:
            return
        policy, scale = self._due
        queries, positions = zip(*self._waiting, strict=True)
        self._waiting = []
        # What came later than a step's own token it has not seen; the reconstructed slot has no position.
        seen = self.whole.positions[:, :, None] <= torch.stack(positions, -1)[:, None, :, None]
        live = seen.logical_and_(self.whole.valid[:, :, None])
        policy.observe_steps(self.whole, self._recall(queries, live, scale), live)

    def _recall(self, queries: Sequence[Tensor], live: Tensor, scale: float) -> Tensor:
        """The probabilities of all layers in T steps: fp32 `[L * B, G, T, S (+ 1)]`.

        Args:
            queries: `[L * B, G, R, D]` for each step. live: bool `[L * B, G, T, S (+ 1)]`, what they saw.
        """
        keys, _ = self.whole.read()
        rows, groups, heads, _ = queries[0].shape
        logits = (torch.cat(list(queries), 2) @ keys.mT).float().mul_(scale).view(rows, groups, len(queries), heads, -1)
        probabilities = logits.masked_fill_(~live[:, :, :, None], -torch.inf).softmax(-1)
        return probabilities.mean(3) if heads > 1 else probabilities[:, :, :, 0]

    def observe(self, policy: SlotPolicy, probabilities: Tensor) -> None:
        """Takes a layer's probabilities `[B, G, S (+ 1)]`; with the last layer's the policy observes all of them."""
        self._seen.append(probabilities)
        if len(self._seen) == self.layers:
            policy.observe(self.whole, torch.cat(self._seen) if len(self._seen) > 1 else probabilities)
            self._seen, self._at = [], ()

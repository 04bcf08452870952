"""AUV (Li et al.): aggregated attention scores, usage counts, multi-step eviction, reconstructed K(V). Literal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from auvsum.cache.policy import Policy, ascending, keep_recent_and_best, token_columns
from auvsum.cache.store import Held, SlotStore
from auvsum.errors import PolicyError
from auvsum.kernels.column_scores import ChunkAttention


@dataclass(frozen=True)
class AUV(Policy):
    """Slots `[0, 2L)` are the candidate region, `[2L, 3L)` the write region, which is also the local area (§3.4).

    Args:
        top_k: how many of a step's most attended keys count as used (§3.3); None for L.
        decay: α of eq. 6, in (0, 1].
        reconstruct: keep evicted tokens' average as one more slot (eqs. 7, 8).
    """

    top_k: int | None = None
    decay: float = 0.5
    reconstruct: bool = True

    name: ClassVar[str] = "auv"
    paper: ClassVar[str] = "AUV: Efficient KV Cache Eviction via Attention Score Aggregation and Usage Count"
    evicts: ClassVar[str] = "end of prompt, then L tokens every L steps"
    state: ClassVar[tuple[str, ...]] = ("aas", "cnt", "usage")
    folds_by: ClassVar[str] = "aas"

    def __post_init__(self) -> None:
        if self.top_k is not None and self.top_k < 1:
            raise PolicyError(f"top_k is {self.top_k}", "it must be at least 1")
        if not 0 < self.decay <= 1:
            raise PolicyError(f"decay is {self.decay}", "it must be above 0 and at most 1")

    @property
    def keeps_reconstructed(self) -> bool:
        return self.reconstruct

    @property
    def least_slots(self) -> int:
        return 3 + self.reconstruct

    def capacity(self, slots: int) -> int:
        """3L, with L = (slots - 1) // 3, or slots // 3 without the reconstructed slot."""
        return (slots - self.reconstruct) // 3 * 3

    def slots_to_hold(self, tokens: int) -> int:
        return -(-max(tokens, 1) // 3) * 3 + self.reconstruct

    def paper_slots(self, tokens: int) -> int:
        """2L = the tokens granted; the write region and the reconstructed slot come on top."""
        return tokens // 2 * 3 + self.reconstruct

    # -- prompt -------------------------------------------------------------------------------------------------------

    def observe_chunk(self, attention: ChunkAttention, held: Held, store: SlotStore, row: int) -> None:
        """Eq. 2 over the chunk's rows: the running mean of `a[i, j] · N_i / N_max` over the rows that see j."""
        weights = attention.keys_seen / store.counts[row].longest
        sums = token_columns(attention.column_sums(weights), held)
        rows = token_columns(attention.queries_seen, held)
        aas, cnt = held.state["aas"], held.state["cnt"]
        aas.mul_(cnt).add_(sums)
        cnt.add_(rows)
        aas.div_(cnt)

    def choose(self, held: Held, capacity: int) -> Tensor | None:
        """The last L and the L highest AAS among the rest, once 3L tokens are there."""
        if held.size < capacity:
            return None
        local = capacity // 3
        return keep_recent_and_best(held.state["aas"], local, local)

    # -- decode -------------------------------------------------------------------------------------------------------

    def place(self, store: SlotStore) -> Tensor:
        return store.pointer[:, None].expand(store.positions.shape[:2])

    def observe(self, store: SlotStore, probabilities: Tensor) -> None:
        """Eqs. 3 and 4, the usage count, and at 3L the multi-step eviction."""
        aas, cnt, usage = (store.state[name] for name in self.state)
        keys_seen = store.valid.sum(-1, keepdim=True)
        aas.mul_(cnt).addcmul_(probabilities, keys_seen / store.longest[:, None, None])
        cnt.add_(1)
        aas.div_(cnt)
        local = store.capacity // 3
        live = keys_seen[..., 0] - store.valid[..., store.slots :].sum(-1)
        count = torch.minimum(local if self.top_k is None else local.new_tensor(self.top_k), live.amin(-1))
        usage[..., : store.slots] += self._used(store, probabilities[..., : store.slots], count)
        store.pointer += store.active
        for row in (store.pointer == store.capacity).nonzero()[:, 0].tolist():
            self._evict(store, row)

    def _used(self, store: SlotStore, probabilities: Tensor, count: Tensor) -> Tensor:
        """True at each row's `count` most attended live slots, `[B, G, S]`; on a tie the newer token wins."""
        live = probabilities.masked_fill(~store.valid[..., : store.slots], -1.0)
        order = live.sort(-1, descending=True).values
        least = order.gather(-1, (count - 1)[:, None, None].expand(*order.shape[:2], 1))
        above = live > least
        at = live == least
        wanted = count[:, None] - above.sum(-1)
        if bool((at.sum(-1) == wanted).all()):
            return above | at
        # A tie across the border: rank the tied by age, newest first.
        age = store.positions[..., : store.slots].masked_fill(~at, -1).argsort(-1, descending=True).argsort(-1)
        return above | (at & (age < wanted[..., None]))

    def _evict(self, store: SlotStore, row: int) -> None:
        """Eqs. 5 to 8: the L least of the candidate region go, the write region takes their slots."""
        local = int(store.capacity[row]) // 3
        candidates = slice(0, 2 * local)
        aas, _, usage = (store.state[name][row] for name in self.state)
        scores = aas[:, candidates]
        composite = usage[:, candidates] * scores.amax(-1, keepdim=True) + scores
        victims = ascending(composite, store.positions[row, :, candidates])[:, :local]
        if self.reconstruct:
            heads = torch.arange(victims.shape[0], device=victims.device)[:, None]
            key, value = (store.codec.decode(memory, row)[heads, victims] for memory in (store.keys, store.values))
            store.fold(row, key, value, aas.gather(-1, victims))
        written = torch.arange(2 * local, 3 * local, device=victims.device).expand_as(victims)
        store.move(row, written, victims)
        held = usage[:, candidates]
        held.sub_(held.amin(-1, keepdim=True)).mul_(self.decay)
        store.pointer[row] = 2 * local


POLICY = AUV

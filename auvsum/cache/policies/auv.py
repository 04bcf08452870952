"""AUV (Li et al.): aggregated attention scores, usage counts, multi-step eviction, reconstructed K(V). Literal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from auvsum.cache.aggregation import aggregate_chunk, aggregate_steps, count_usages
from auvsum.cache.policy import Deferring, Policy, ascending, keep_recent_and_best, make_policy
from auvsum.cache.store import Held, SlotStore
from auvsum.errors import PolicyError
from auvsum.kernels.column_scores import ChunkAttention


@dataclass(frozen=True)
class AUV(Deferring):
    """Slots `[0, 2L)` are the candidate region, `[2L, 3L)` the write region, which is also the local area (§3.4).

    Args:
        top_k: how many of a step's most attended keys count as used (§3.3); None for L.
        decay: α of eq. 6, in (0, 1].
        reconstruct: keep evicted tokens' average as one more slot (eqs. 7, 8).
        eviction: `multi-step`; `single-step` is `auv-v3` and `naive` is `auv-v2`, which have only the option `top_k`.
    """

    top_k: int | None = None
    decay: float = 0.5
    reconstruct: bool = True
    eviction: str = "multi-step"

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
        if self.eviction != "multi-step":
            hint = "use make_policy, or one of multi-step, single-step, naive"
            raise PolicyError(f"this class evicts in multi-step, not {self.eviction!r}", hint)

    @classmethod
    def build(cls, **options: Any) -> Policy:
        """`eviction` chooses the step of the ladder; the other steps have neither decay nor a reconstructed slot."""
        eviction = options.get("eviction", "multi-step")
        step = {"single-step": "auv-v3", "naive": "auv-v2"}.get(str(eviction))
        if step is None:
            return super().build(**options)
        rest = {name: value for name, value in options.items() if name != "eviction"}
        if rest.pop("reconstruct", False) or rest.pop("decay", 1.0) != 1.0:
            raise PolicyError(
                f"eviction {eviction!r} has neither a reconstructed slot nor a decay", "leave reconstruct and decay out"
            )
        return make_policy(step, **rest)

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
        aggregate_chunk(attention, held, store, row)

    def choose(self, held: Held, capacity: int) -> Tensor | None:
        """The last L and the L highest AAS among the rest, once 3L tokens are there."""
        if held.size < capacity:
            return None
        local = capacity // 3
        return keep_recent_and_best(held.state["aas"], local, local)

    # -- decode -------------------------------------------------------------------------------------------------------

    def place(self, store: SlotStore) -> Tensor:
        return store.pointer[:, None].expand(store.positions.shape[:2])

    def observe_steps(self, store: SlotStore, probabilities: Tensor, live: Tensor) -> None:
        """Eqs. 3 and 4, and the usage count."""
        aggregate_steps(store, probabilities, live)
        count_usages(store, probabilities, live, store.capacity // 3, self.top_k)

    def advance(self, store: SlotStore) -> Tensor:
        store.pointer += store.active
        return (store.pointer == store.capacity).nonzero()[:, 0]

    def evict(self, store: SlotStore, full: Tensor) -> None:
        capacities = store.capacity[full]
        for capacity in sorted(set(capacities.tolist())):
            self._evict(store, full[capacities == capacity], capacity // 3)

    def _evict(self, store: SlotStore, rows: Tensor, local: int) -> None:
        """Eqs. 5 to 8 in rows `[N]`: the L least of the candidate region go, the write region takes their slots."""
        candidates = slice(0, 2 * local)
        scores, usage = (store.state[name][rows, :, candidates] for name in ("aas", "usage"))
        composite = usage * scores.amax(-1, keepdim=True) + scores
        victims = ascending(composite, store.positions[rows, :, candidates])[..., :local]
        if self.reconstruct:
            where = (rows[:, None, None], torch.arange(victims.shape[1], device=rows.device)[:, None], victims)
            key, value = (store.codec.decode(memory, where) for memory in (store.keys, store.values))
            store.fold(rows, key, value, scores.gather(-1, victims))
        written = torch.arange(2 * local, 3 * local, device=rows.device).expand_as(victims)
        store.move(rows, written, victims)
        held = store.state["usage"][rows, :, candidates]
        store.state["usage"][rows, :, candidates] = held.sub_(held.amin(-1, keepdim=True)).mul_(self.decay)
        store.pointer[rows] = 2 * local


POLICY = AUV

"""KVCrush (2025): beside a base policy's best tokens, representatives of the others by how the heads agree on them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from auvsum.cache.policy import SlotPolicy, make_policy
from auvsum.cache.store import Held, SlotStore
from auvsum.errors import PolicyError
from auvsum.kernels.column_scores import ChunkAttention

_ANCHORS = ("mean", "random", "alternate")
#: Nothing to choose by, or a state that has no mean over the heads.
_NO_BASE = ("full", "kvcrush", "scissorhands")


@dataclass(frozen=True)
class KVCrush(SlotPolicy):
    """Bit `h` of a token: would head `h` keep it? The tokens outside the base's share are sorted by the Hamming
    distance of their bits to an anchor, and evenly spaced ones stay. One set a layer: in the share and in decode the
    base policy runs on the mean of its state over the heads.

    Args:
        base: the policy underneath, with its defaults. hh: the base's share of the slots.
        anchor: `mean` (the majority's bit), `random` or `alternate`. seed: of the random anchor.
    """

    base: str = "h2o"
    anchor: str = "mean"
    hh: float = 0.25
    seed: int = 0

    name: ClassVar[str] = "kvcrush"
    paper: ClassVar[str] = "KVCrush: Key Value Cache Size-Reduction Using Similarity in Head-Behaviour, 2025"
    evicts: ClassVar[str] = "end of prompt, then as its base"
    streams: ClassVar[bool] = False
    one_set: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.base in _NO_BASE:
            raise PolicyError(f"policy 'kvcrush' cannot use {self.base!r} underneath", "try base=h2o")
        if self.anchor not in _ANCHORS:
            raise PolicyError(f"anchor is {self.anchor!r}", f"anchors are {', '.join(_ANCHORS)}")
        if not 0 < self.hh < 1:
            raise PolicyError(f"hh is {self.hh}", "it is a share between 0 and 1")
        _ = self.under  # an unknown base is an error now

    @cached_property
    def under(self) -> SlotPolicy:
        """The base policy."""
        base = make_policy(self.base)
        if not isinstance(base, SlotPolicy):
            raise PolicyError(f"policy 'kvcrush' cannot use {self.base!r} underneath", "try base=h2o")
        return base

    @property
    def state(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.under.state

    @property
    def folds_by(self) -> str:  # type: ignore[override]
        return self.under.folds_by

    @property
    def keeps_reconstructed(self) -> bool:
        return self.under.keeps_reconstructed

    @property
    def least_slots(self) -> int:
        return self.under.least_slots + 1

    def capacity(self, slots: int) -> int:
        return self.under.capacity(slots)

    def slots_to_hold(self, tokens: int) -> int:
        return max(self.least_slots, self.under.slots_to_hold(tokens))

    def layer_slots(self, slots: int, layers: int, prompt_tokens: int) -> list[int]:
        return self.under.layer_slots(slots, layers, prompt_tokens)

    def paper_slots(self, tokens: int) -> int:
        return self.under.paper_slots(tokens)

    def observe_chunk(self, attention: ChunkAttention, held: Held, store: SlotStore, row: int) -> None:
        self.under.observe_chunk(attention, held, store, row)

    def choose(self, held: Held, capacity: int) -> Tensor | None:
        own = self.under.choose(held, capacity)
        for name, values in held.state.items():
            held.state[name] = values.mean(0, keepdim=True).expand_as(values).clone()
        if own is None:
            return None
        bits = torch.zeros(held.positions.shape, dtype=torch.bool, device=own.device).scatter_(1, own, True)
        share = self.under.capacity(max(self.under.least_slots, int(capacity * self.hh)))
        heavy = self.under.choose(held, share)
        assert heavy is not None  # the share is smaller than what did not fit
        rest = torch.ones(held.size, dtype=torch.bool, device=own.device).scatter_(0, heavy[0], False).nonzero()[:, 0]
        distance = (bits[:, rest] != self._anchor(bits)[:, None]).sum(0)
        order = distance.argsort(stable=True)
        count = own.shape[1] - heavy.shape[1]
        picked = rest[order[torch.arange(count, device=own.device) * len(rest) // max(1, count)]]
        return torch.cat([heavy[0], picked]).sort().values.expand(own.shape[0], -1)

    def _anchor(self, bits: Tensor) -> Tensor:
        """One bit a head."""
        heads = bits.shape[0]
        if self.anchor == "mean":
            return bits.float().mean(1) >= 0.5
        if self.anchor == "alternate":
            return torch.arange(heads, device=bits.device) % 2 == 1
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(0, 2, (heads,), generator=generator).bool().to(bits.device)

    def place(self, store: SlotStore) -> Tensor:
        return self.under.place(store)

    def observe(self, store: SlotStore, probabilities: Tensor) -> None:
        self.under.observe(store, probabilities.mean(1, keepdim=True).expand_as(probabilities))


POLICY = KVCrush

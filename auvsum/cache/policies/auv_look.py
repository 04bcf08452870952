"""AUV with a second look: aggregation over queries that know what is asked, one ranking over all layers and heads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from auvsum.budget import SlotCost
from auvsum.cache.codec import vector_bytes
from auvsum.cache.policy import Policy
from auvsum.errors import PolicyError

#: Tokens of the document between two pieces that are read again.
_STRIDE = 128
#: The bounds of the write region, and the slots that a token of it stands for.
_LEAST_WRITE, _MOST_WRITE, _SLOTS_PER_WRITE = 4, 32, 32
#: Bits of a channel in the write region, at least.
_WRITE_BITS = 8
#: fp16 sum of attention of a slot, int32 of its position and its tier, per KV head; of a token of the write region
#: the fp32 sum.
_SLOT_BYTES, _TOKEN_BYTES = 2 + 4, 4
#: Bits of a slot that may be kept in fewer, too.
_TIERED = 4


@dataclass(frozen=True)
class AUVLook(Policy):
    """Before anything is dropped, the model looks at the prompt again; what its queries attend to is kept.

    The scores are AUV's (eqs. 3 and 4: attention summed and divided by the number of queries that could pay it), of
    squares and with the root taken at the end: errors of an output add up by their squares. The queries are not all of
    the prompt's own: they are pieces of the document read once more behind the prompt (KVzip, Kim et al. 2025, reads
    all of it), the first tokens of a summary that is drafted with the full cache and thrown away, and the prompt's last
    tokens, behind the document, which say what is asked. One ranking over the tokens of all layers and KV heads shares
    the budget out, so that every head has its own number of slots. While it writes, new tokens gather in a write
    region; when that is full, the least of all the layer's tokens go (multi-step eviction, §3.4), and those that stay
    are quantized as they are scattered into slots.

    Slots of 4 bits have two precisions: a quarter of them is kept in 4 bits, and tokens ranked behind these in 3, of
    which there are the more. Codes of the prompt's keys are chosen by what the second look's own queries make of their
    errors (`codec.Metric`), those of written keys by the directions of queries that the model's profile tells.

    Args:
        look: share of the document that is read again, in pieces spread over it; 0 for none.
        lead: tokens of the document's beginning that are read again in any case.
        draft: tokens of the summary that are drafted; 0 for none.
        weight: of the draft's queries, against the second reading's, in [0, 1].
        ask: weight of the queries of what stands behind the document, against all others, in [0, 1].
        power: of attention, of which the mean's root is the score: 1 is AUV's mean, 2 the root mean square.
        value_norm: whether a score is multiplied by the length of its value.
        fine: of slots of 4 bits, the share that is really kept in 4; the rest, tokens that were ranked behind them, is
            kept in `coarse` bits, and there are the more of them.
        coarse: 3 or 2.
        prior: how many written tokens the prompt's score counts for, once writing has begun.
        profile: whether scores are multiplied with the model's factors a head, where it has a profile.
    """

    look: float = 0.25
    lead: int = 128
    draft: int = 32
    weight: float = 0.4
    ask: float = 0.1
    power: float = 2.0
    value_norm: bool = False
    fine: float = 0.25
    coarse: int = 3
    prior: int = 64
    profile: bool = True

    name: ClassVar[str] = "auv-look"
    paper: ClassVar[str] = "AUV's scores over a second look at the prompt; after KVzip (Kim et al., NeurIPS 2025)"
    evicts: ClassVar[str] = "end of prompt over all layers and heads, then tokens of a layer every few steps"
    state: ClassVar[tuple[str, ...]] = ("aas",)
    state_element: ClassVar[int] = 2
    streams: ClassVar[bool] = False
    by_head: ClassVar[bool] = True

    def __post_init__(self) -> None:
        shares, counts = ("look", "weight", "ask", "fine"), ("lead", "draft")
        for name, most in (*((name, 1) for name in shares), *((name, math.inf) for name in counts)):
            if not 0 <= getattr(self, name) <= most:
                allowed = "between 0 and 1" if most == 1 else "at least 0"
                raise PolicyError(f"{name} is {getattr(self, name)}", f"it must be {allowed}")
        if self.power <= 0 or self.prior < 1:
            raise PolicyError(f"power is {self.power}, prior {self.prior}", "they must be more than 0 and at least 1")
        if self.coarse not in (2, 3):
            raise PolicyError(f"coarse is {self.coarse}", "it must be 2 or 3")
        if not (self.look or self.lead or self.draft):
            raise PolicyError("there is nothing to look with", "give it look, lead or draft")

    @property
    def queries(self) -> tuple[object, ...]:
        """What the second look asks with: policies that agree in it can share one."""
        return self.power, self.look, self.lead, self.draft, self.ask > 0

    @property
    def least_slots(self) -> int:
        """The write region, and a slot for each head."""
        return 7 * _LEAST_WRITE + 2

    def slots_to_hold(self, tokens: int) -> int:
        return max(self.least_slots, tokens + 8 * _MOST_WRITE)

    def slot_cost(self, *, kv_heads: int, head_dim: int, element_bytes: int, bits: int = 16) -> SlotCost:
        per_slot = kv_heads * self.slot_bytes(head_dim, element_bytes, bits)[0]
        return SlotCost(per_slot=per_slot, fixed=8 * (kv_heads + 1))  # where each head's slots begin, in one layer

    def coarse_bits(self, head_dim: int, bits: int) -> int | None:
        """Of slots that just made it, when the others are kept in `bits`; None where all are kept alike."""
        return self.coarse if bits == _TIERED and self.fine < 1 and head_dim % 8 == 0 else None

    def slot_bytes(self, head_dim: int, element_bytes: int, bits: int) -> tuple[int, int]:
        """Of a head's slot, and of one that just made it."""
        rest = self.coarse_bits(head_dim, bits) or bits
        both = (2 * vector_bytes(head_dim, element_bytes, kept) + _SLOT_BYTES for kept in (bits, rest))
        return next(both), next(both)

    def tiers(self, room: int, tokens: int, *, head_dim: int, element_bytes: int, bits: int) -> tuple[int, int]:
        """How many tokens, over all heads, the bytes of `room` whole slots hold, and how many of these in `bits`."""
        dear, cheap = self.slot_bytes(head_dim, element_bytes, bits)
        share = self.fine if cheap < dear else 1.0
        count = min(tokens, int(room * dear / (share * dear + (1 - share) * cheap)))
        fine = count if cheap == dear else min(count, (room * dear - count * cheap) // (dear - cheap))
        return count, fine

    def regions(self, slots: int, *, head_dim: int, element_bytes: int, bits: int) -> tuple[int, int]:
        """Of `slots` a head on average: the candidates', and the write region's tokens, each of which costs several."""
        slot, _ = self.slot_bytes(head_dim, element_bytes, bits)
        token = 2 * vector_bytes(head_dim, element_bytes, bits_of_the_newest(bits)) + _TOKEN_BYTES
        write = max(_LEAST_WRITE, min(_MOST_WRITE, slots // _SLOTS_PER_WRITE))
        return slots - -(-write * token // slot), write

    def tokens_to_look_with(self, document: Sequence[int]) -> list[int]:
        """What is read again: the document's lead, then a piece of every 128 tokens."""
        found = list(document[: self.lead])
        piece = round(_STRIDE * self.look)
        for start in range(self.lead, len(document), _STRIDE):
            found += document[start : start + piece]
        return found

    def blend(self, looked: Tensor | None, drafted: Tensor | None, asked: Tensor | None) -> Tensor:
        """One score of the powers of attention `[layers, G, n]` that these queries paid, mean a query; not all missing.
        The draft's scale is kept, where there is one: written tokens will be compared with it."""
        rest = 1 - self.ask
        shares = ((drafted, self.weight * rest), (looked, (1 - self.weight) * rest), (asked, self.ask))
        found = [(x.pow(1 / self.power), share) for x, share in shares if x is not None]
        whole = sum(share for _, share in found)
        scale = found[0][0].sum()
        parts = [x * (share / whole if whole else 1.0) * (scale / x.sum().clamp_min(1e-20)) for x, share in found]
        return torch.stack(parts).sum(0)


def bits_of_the_newest(bits: int) -> int:
    """Of a channel in the write region: what the newest tokens lose in 4 bits costs more than the slots that 8 take."""
    return max(bits, _WRITE_BITS)


POLICY = AUVLook

"""What slots of two precisions cost, and how many tokens the bytes of a budget hold in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from auvsum.budget import SlotCost
from auvsum.cache.codec import vector_bytes
from auvsum.cache.policy import Policy
from auvsum.cache.ragged import NARROW
from auvsum.errors import PolicyError

#: The bounds of the write region, and the slots that a token of it stands for.
_LEAST_WRITE, _MOST_WRITE, _SLOTS_PER_WRITE = 4, 32, 32
#: Bits of a channel in the write region, at least.
_WRITE_BITS = 8
#: fp16 sum of attention of a slot, and 16 bits of its position and tier, per KV head; of a token of the write region
#: the fp32 sum.
_SLOT_BYTES, _TOKEN_BYTES = 2 + 2, 4
#: Slots that a text of more than half of `NARROW` tokens may need beside one for each: one for so many.
_WIDE_SHARE = 16
#: Bits of a slot that may be kept in fewer, too.
_TIERED = 4


@dataclass(frozen=True)
class TieredPolicy(Policy):
    """A policy that gives every head its own number of slots, of 4 bits some in fewer, beside a write region.

    Args:
        fine: of slots of 4 bits, the share that is really kept in 4, in [0, 1]; the rest, tokens that were ranked
            behind them, is kept in `coarse` bits, and there are the more of them.
        coarse: 3 or 2.
        write: tokens of the write region; 0 for a share of the slots. With one for all that is written, the prompt's
            tokens are chosen once, and written ones stay beside them.
    """

    fine: float = 0.25
    coarse: int = 3
    write: int = 0

    state_element: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if not 0 <= self.fine <= 1:
            raise PolicyError(f"fine is {self.fine}", "it must be between 0 and 1")
        if self.coarse not in (2, 3):
            raise PolicyError(f"coarse is {self.coarse}", "it must be 2 or 3")
        if self.write and self.write < _LEAST_WRITE:
            raise PolicyError(f"write is {self.write}", f"it must be 0, or at least {_LEAST_WRITE}")

    @property
    def least_slots(self) -> int:
        """The write region, and a slot for each head."""
        return max(7 * _LEAST_WRITE, self.write) + 2

    def paper_slots(self, tokens: int) -> int:
        return tokens + self.write

    def slots_to_hold(self, tokens: int) -> int:
        wide = max(0, tokens - NARROW // 2) // _WIDE_SHARE
        return max(self.least_slots, tokens + wide + 8 * _MOST_WRITE)

    def slot_cost(self, *, kv_heads: int, head_dim: int, element_bytes: int, bits: int = 16) -> SlotCost:
        per_slot = kv_heads * self.slot_bytes(head_dim, element_bytes, bits)[0]
        return SlotCost(per_slot=per_slot, fixed=8 * (kv_heads + 1))  # where each head's slots begin, in one layer

    def coarse_bits(self, head_dim: int, bits: int) -> int | None:
        """Of slots that just made it, when the others are kept in `bits`; None where all are kept alike."""
        return self.coarse if bits == _TIERED and self.fine < 1 and head_dim % 8 == 0 else None

    def slot_bytes(self, head_dim: int, element_bytes: int, bits: int) -> tuple[int, int]:
        """Of a head's slot, and of one that just made it, in a text of at most `NARROW` tokens."""
        rest = self.coarse_bits(head_dim, bits) or bits
        dear, cheap = (2 * vector_bytes(head_dim, element_bytes, kept) + _SLOT_BYTES for kept in (bits, rest))
        return dear, cheap

    def tiers(self, room: int, tokens: int, dear: int, cheap: int) -> tuple[int, int]:
        """How many tokens, over all heads, `room` bytes hold, and how many of these in the finer codec.

        Args:
            dear, cheap: bytes of a slot in either.
        """
        share = self.fine if cheap < dear else 1.0
        count = min(tokens, int(room / (share * dear + (1 - share) * cheap)))
        fine = count if cheap == dear else min(count, (room - count * cheap) // (dear - cheap))
        return count, fine

    def regions(self, slots: int, *, head_dim: int, element_bytes: int, bits: int) -> tuple[int, int]:
        """Of `slots` a head on average: the candidates', and the write region's tokens, each of which costs several.

        Raises:
            PolicyError: a write region that leaves none.
        """
        slot, _ = self.slot_bytes(head_dim, element_bytes, bits)
        token = 2 * vector_bytes(head_dim, element_bytes, bits_of_the_newest(bits)) + _TOKEN_BYTES
        write = self.write or max(_LEAST_WRITE, min(_MOST_WRITE, slots // _SLOTS_PER_WRITE))
        candidates = slots - -(-write * token // slot)
        if candidates < 1:
            raise PolicyError(f"{write} written tokens take all of {slots} slots", "give it more, or leave write at 0")
        return candidates, write


def bits_of_the_newest(bits: int) -> int:
    """Of a channel in the write region: what the newest tokens lose in 4 bits costs more than the slots that 8 take."""
    return max(bits, _WRITE_BITS)

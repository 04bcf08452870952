"""Exact selection by (score, position) inside a Triton program: a rank for few slots, a bisection of bits for many."""

from __future__ import annotations

import triton
import triton.language as tl

#: Slots up to which ranks are counted.
_RANKED = tl.constexpr(128)


@triton.jit
def order_key(score, position):
    """One int64 that sorts like (score, position): scores are not negative, so their bits sort like they do."""
    return (score.to(tl.int32, bitcast=True).to(tl.int64) << 32) | position.to(tl.int64)


@triton.jit
def largest(key, count, PADDED: tl.constexpr):
    """True at the `count` largest of the keys, which are unique where not -1; a -1 is never chosen."""
    if PADDED <= _RANKED:
        above = (key[None, :] > key[:, None]).to(tl.int32)
        return (tl.sum(above, 1) < count) & (key >= 0)
    threshold = tl.full((), 0, tl.int64)
    bit = tl.full((), 62, tl.int32)
    found = tl.sum((key >= 0).to(tl.int32), 0)
    while (bit >= 0) & (found != count):
        higher = threshold | (tl.full((), 1, tl.int64) << bit.to(tl.int64))
        reached = tl.sum((key >= higher).to(tl.int32), 0)
        threshold = tl.where(reached >= count, higher, threshold)
        found = tl.where(reached >= count, reached, found)
        bit -= 1
    return key >= threshold


@triton.jit
def _threshold(bits, count, threshold, found, PADDED: tl.constexpr):
    """The largest number that at least `count` of the bits reach, and how many do: two bits a round from bit 29 down.

    `found` reach `threshold`, where the search begins; it ends as soon as it is `count`.
    """
    # Three counts in one number: 30 bits hold those of 512 slots.
    FIELD: tl.constexpr = 10 if PADDED <= 512 else 20
    count_type: tl.constexpr = tl.int32 if PADDED <= 512 else tl.int64
    shift = tl.full((), 28, tl.int32)
    while (shift >= 0) & (found != count):
        step = tl.full((), 1, tl.int32) << shift
        reached = (bits >= threshold + step).to(count_type)
        reached += (bits >= threshold + 2 * step).to(count_type) << FIELD
        reached += (bits >= threshold + 3 * step).to(count_type) << (2 * FIELD)
        reached = tl.sum(reached)
        one = (reached & ((1 << FIELD) - 1)).to(tl.int32)
        two = ((reached >> FIELD) & ((1 << FIELD) - 1)).to(tl.int32)
        three = (reached >> (2 * FIELD)).to(tl.int32)
        found = tl.where(three >= count, three, tl.where(two >= count, two, tl.where(one >= count, one, found)))
        threshold += step * ((one >= count).to(tl.int32) + (two >= count).to(tl.int32) + (three >= count).to(tl.int32))
        shift -= 2
    return threshold, found


@triton.jit
def _newer(bits, threshold, position, count):
    """Those above the threshold, and of those at it the newest, `count` in all: their positions are bits too."""
    tied = tl.where(bits == threshold, position, -1)
    wanted = count - tl.sum((bits > threshold).to(tl.int32))
    newest = tl.full((), 0, tl.int32)
    bit = tl.full((), 30, tl.int32)
    while bit >= 0:
        higher = newest | (tl.full((), 1, tl.int32) << bit)
        newest = tl.where(tl.sum((tied >= higher).to(tl.int32)) >= wanted, higher, newest)
        bit -= 1
    return (bits > threshold) | (tied >= newest)


@triton.jit
def most_attended(a, live, positions, seen, at, slot, count, PADDED: tl.constexpr):
    """True at the `count` live slots with the largest probabilities `a`; of equal ones the newer. Any shape.

    Positions are loaded only when equal probabilities lie across the border.

    Args:
        positions: addresses of the slots' positions. at: the slot of the newest token, whose position is `seen`.
    """
    bits = tl.where(live, a.to(tl.int32, bitcast=True), -1)
    none = tl.full((), 0, tl.int32)  # probabilities are at most 1, or little above: bit 30 is never set
    threshold, found = _threshold(bits, count, none, tl.sum(live.to(tl.int32)), PADDED)
    chosen = bits >= threshold
    if found != count:
        position = tl.where(slot == at, seen, tl.load(positions, mask=live & (slot != at), other=-1))
        chosen = _newer(bits, threshold, position, count)
    return chosen


@triton.jit
def most_scored(score, live, position, count, PADDED: tl.constexpr):
    """True at the `count` live slots with the largest scores, which are not negative; of equal ones the newer."""
    bits = tl.where(live, score.to(tl.int32, bitcast=True), -1)
    large = tl.full((), 1 << 30, tl.int32)  # 2.0
    reached = tl.sum((bits >= large).to(tl.int32))
    threshold = tl.where(reached >= count, large, 0)
    found = tl.where(reached >= count, reached, tl.sum(live.to(tl.int32)))
    threshold, found = _threshold(bits, count, threshold, found, PADDED)
    chosen = bits >= threshold
    if found != count:
        chosen = _newer(bits, threshold, position, count)
    return chosen

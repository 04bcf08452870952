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

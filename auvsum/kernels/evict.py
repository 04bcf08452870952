"""AUV's multi-step eviction (eqs. 5 to 8) of one KV head of one full row, inside the program of the decode step."""

from __future__ import annotations

import triton
import triton.language as tl

from auvsum.kernels.select import largest, order_key


@triton.jit
def evict(
    aas, usage, position, keys, values, positions, valid, first, second, third,
    folded_key, folded_value, folded_mass, weight_scratch, target_scratch, base, slots, local, decay,
    RECONSTRUCT: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """The `local` least of the candidate region `[0, 2L)` go; the write region `[2L, 3L)` takes their slots.

    `aas`, `usage` and `position` are the head's `[PADDED]` vectors as just stored to `first`, `third`, `positions`.
    """
    slot = tl.arange(0, PADDED)
    d = tl.arange(0, DIM_PAD)
    candidate = slot < 2 * local
    composite = usage * tl.max(tl.where(candidate, aas, 0.0), 0) + aas
    # The least first, and of those with equal scores the older: the largest of the complements.
    key = tl.where(candidate, 0x7FFFFFFFFFFFFFFF - order_key(composite, position), -1)
    victim = largest(key, local, PADDED)
    tl.store(weight_scratch + slot, tl.where(victim, aas, 0.0))
    tl.store(target_scratch + tl.cumsum(victim.to(tl.int32), 0) - 1, slot, mask=victim)
    tl.debug_barrier()
    if RECONSTRUCT:
        mass = tl.load(folded_mass)
        total_key = tl.load(folded_key + d, mask=d < DIM, other=0.0) * mass
        total_value = tl.load(folded_value + d, mask=d < DIM, other=0.0) * mass
        for start in range(0, 2 * local, BLOCK):
            n = start + tl.arange(0, BLOCK)
            weight = tl.load(weight_scratch + n, mask=n < 2 * local, other=0.0)
            tile = (base + n)[:, None] * DIM + d[None, :]
            held = (weight > 0)[:, None] & (d[None, :] < DIM)
            total_key += tl.sum(tl.load(keys + tile, mask=held, other=0.0).to(tl.float32) * weight[:, None], 0)
            total_value += tl.sum(tl.load(values + tile, mask=held, other=0.0).to(tl.float32) * weight[:, None], 0)
        mass += tl.sum(tl.where(victim, aas, 0.0), 0)
        divisor = tl.where(mass > 0, mass, 1.0)
        total_key /= divisor
        total_value /= divisor
        tl.debug_barrier()
        tl.store(folded_key + d, total_key, mask=d < DIM)
        tl.store(folded_value + d, total_value, mask=d < DIM)
        tl.store(folded_mass, mass)
        tl.store(keys + (base + slots) * DIM + d, total_key, mask=d < DIM)
        tl.store(values + (base + slots) * DIM + d, total_value, mask=d < DIM)
        tl.store(valid + base + slots, (mass > 0).to(tl.uint8))
        tl.debug_barrier()
    for start in range(0, local, BLOCK):
        n = start + tl.arange(0, BLOCK)
        inside = n < local
        source = base + 2 * local + n
        target = base + tl.load(target_scratch + n, mask=inside, other=0)
        tile = inside[:, None] & (d[None, :] < DIM)
        for memory in tl.static_range(2):
            held = keys if memory == 0 else values
            moved = tl.load(held + source[:, None] * DIM + d[None, :], mask=tile)
            tl.store(held + target[:, None] * DIM + d[None, :], moved, mask=tile)
        tl.store(positions + target, tl.load(positions + source, mask=inside), mask=inside)
        tl.store(first + target, tl.load(first + source, mask=inside), mask=inside)
        tl.store(second + target, tl.load(second + source, mask=inside), mask=inside)
        tl.store(third + target, tl.load(third + source, mask=inside), mask=inside)
    tl.debug_barrier()
    emptied = (slot >= 2 * local) & (slot < 3 * local)
    tl.store(positions + base + slot, -1, mask=emptied)
    tl.store(valid + base + slot, tl.zeros((PADDED,), tl.uint8), mask=emptied)
    tl.store(first + base + slot, 0.0, mask=emptied)
    tl.store(second + base + slot, 0.0, mask=emptied)
    tl.store(third + base + slot, 0.0, mask=emptied)
    used = tl.load(third + base + slot, mask=candidate, other=float("inf"))
    tl.store(third + base + slot, (used - tl.min(used, 0)) * decay, mask=candidate)

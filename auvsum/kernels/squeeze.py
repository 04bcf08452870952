"""What a policy chose of a prompt goes into the slots, the rest is folded, in two launches (Triton).

In plain torch these are some eighty small operations a layer (`SlotStore.fill` and `SlotStore.fold`, which this file is
tested against), and launching them takes longer than reading a prompt of 1,900 tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from auvsum.cache.store import Counts, Held, SlotStore


@triton.jit(do_not_specialize=["row", "columns", "kept", "slots", "capacity", "seen"])
def _fill_kernel(
    key, value, positions_in, in1, in2, in3, keep,
    keys, values, positions, valid, out1, out2, out3, capacity_, pointer_, seen_, longest_, active_,
    key_head, key_token, value_head, value_token, row, columns, kept, slots, capacity, seen, longest,
    KEEP: tl.constexpr, STATES: tl.constexpr, GROUPS: tl.constexpr, RECONSTRUCT: tl.constexpr, FRESH: tl.constexpr,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(0)
    slot = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, DIM_PAD)
    width = slots + RECONSTRUCT
    base = (row.to(tl.int64) * GROUPS + g) * width
    inside = slot < kept
    column = slot
    if KEEP:
        column = tl.load(keep + g * kept + slot, mask=inside, other=0)
    tile = inside[:, None] & (d < DIM)[None, :]
    source = column[:, None].to(tl.int64)
    to = (base + slot)[:, None] * DIM + d[None, :]
    tl.store(keys + to, tl.load(key + g * key_head + source * key_token + d[None, :], mask=tile, other=0.0), mask=tile)
    moved = tl.load(value + g * value_head + source * value_token + d[None, :], mask=tile, other=0.0)
    tl.store(values + to, moved, mask=tile)
    here = slot < slots
    at = g * columns + column
    tl.store(positions + base + slot, tl.load(positions_in + at, mask=inside, other=-1), mask=here)
    tl.store(valid + base + slot, inside.to(tl.uint8), mask=here)
    if STATES > 0:
        tl.store(out1 + base + slot, tl.load(in1 + at, mask=inside, other=0.0), mask=here)
    if STATES > 1:
        tl.store(out2 + base + slot, tl.load(in2 + at, mask=inside, other=0.0), mask=here)
    if STATES > 2:
        tl.store(out3 + base + slot, tl.load(in3 + at, mask=inside, other=0.0), mask=here)
    if RECONSTRUCT & FRESH:
        tl.store(valid + base + slot, tl.zeros((BLOCK,), tl.uint8), mask=slot == slots)
    if (g == 0) & (tl.program_id(1) == 0):
        tl.store(capacity_ + row, capacity.to(tl.int64))
        tl.store(pointer_ + row, kept.to(tl.int64))
        tl.store(seen_ + row, seen.to(tl.int64))
        tl.store(longest_ + row, longest)
        tl.store(active_ + row, tl.full((), 1, tl.uint8))


@triton.jit(do_not_specialize=["row", "columns", "slots"])
def _fold_kernel(
    key, value, weights, keys, values, valid, folded_key, folded_value, folded_mass,
    key_head, key_token, value_head, value_token, row, columns, slots,
    GROUPS: tl.constexpr, FRESH: tl.constexpr, DIM: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Eqs. 7 and 8 for `PART` of the head dimension."""
    g = tl.program_id(0)
    part = tl.program_id(1)
    d = part * PART + tl.arange(0, PART)
    head = row.to(tl.int64) * GROUPS + g
    total_key = tl.zeros((BLOCK, PART), tl.float32)
    total_value = tl.zeros((BLOCK, PART), tl.float32)
    added = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        n = start + tl.arange(0, BLOCK)
        w = tl.load(weights + g * columns + n, mask=n < columns, other=0.0)
        tile = (w > 0)[:, None] & (d < DIM)[None, :]
        at = n[:, None].to(tl.int64)
        k = tl.load(key + g * key_head + at * key_token + d[None, :], mask=tile, other=0.0).to(tl.float32)
        v = tl.load(value + g * value_head + at * value_token + d[None, :], mask=tile, other=0.0).to(tl.float32)
        total_key += k * w[:, None]
        total_value += v * w[:, None]
        added += w
    mass = tl.sum(added, 0)
    sum_key = tl.sum(total_key, 0)
    sum_value = tl.sum(total_value, 0)
    ok = d < DIM
    if not FRESH:
        old = tl.load(folded_mass + head)
        sum_key += tl.load(folded_key + head * DIM + d, mask=ok, other=0.0) * old
        sum_value += tl.load(folded_value + head * DIM + d, mask=ok, other=0.0) * old
        mass += old
    divisor = tl.where(mass > 0, mass, 1.0)
    last = (head * (slots + 1) + slots) * DIM
    tl.store(folded_key + head * DIM + d, sum_key / divisor, mask=ok)
    tl.store(folded_value + head * DIM + d, sum_value / divisor, mask=ok)
    tl.store(keys + last + d, sum_key / divisor, mask=ok)
    tl.store(values + last + d, sum_value / divisor, mask=ok)
    if part == 0:
        tl.store(valid + head * (slots + 1) + slots, (mass > 0).to(tl.uint8))


def squeeze(store: SlotStore, row: int, held: Held, keep: Tensor | None, folds_by: str) -> None:
    """`SlotStore.fold` of what is not kept, then `SlotStore.fill`.

    Args:
        keep: int64 `[G, kept]`, columns of `held`; None keeps all. folds_by: the state that weights what is folded.

    Raises:
        ValueError: when more is kept than the row has slots.
    """
    known: Counts = store.counts[row]
    groups, columns = held.positions.shape
    kept = columns if keep is None else keep.shape[1]
    if kept > known.capacity:
        raise ValueError(f"{kept} tokens do not fit {known.capacity} slots")
    size = held.key.shape[-1]
    dim_pad = max(16, triton.next_power_of_2(size))
    valid = store.valid.view(torch.uint8)
    fresh = not known.folded
    strides = (held.key.stride(0), held.key.stride(1), held.value.stride(0), held.value.stride(1))
    folding = keep is not None and store.reconstruct
    states = [held.state[name].contiguous() for name in store.state]
    targets = list(store.state.values())
    unused = [store.longest] * (3 - len(states))
    _fill_kernel[(groups, triton.cdiv(store.slots + store.reconstruct, 32))](
        held.key, held.value, held.positions.contiguous(), *states, *unused, keep if keep is not None else store.seen,
        store.keys[0], store.values[0], store.positions, valid, *targets, *unused,
        store.capacity, store.pointer, store.seen, store.longest, store.active.view(torch.uint8),
        *strides, row, columns, kept, store.slots, known.capacity, known.seen + held.chunk, float(known.longest),
        KEEP=keep is not None, STATES=len(states), GROUPS=groups, RECONSTRUCT=int(store.reconstruct), FRESH=fresh,
        DIM=size, DIM_PAD=dim_pad, BLOCK=32, num_warps=4,
    )  # fmt: skip
    if folding and keep is not None:
        weights = held.state[folds_by].scatter(-1, keep, 0.0)
        part = min(32, dim_pad)
        _fold_kernel[(groups, triton.cdiv(size, part))](
            held.key, held.value, weights, store.keys[0], store.values[0], valid,
            store.folded_key, store.folded_value, store.folded_mass, *strides, row, columns, store.slots,
            GROUPS=groups, FRESH=fresh, DIM=size, PART=part, BLOCK=128, num_warps=4,
        )  # fmt: skip
        mass = weights.sum(-1)
        store.folded_mass[row] = mass if fresh else mass + store.folded_mass[row]
        known.folded = True
    known.live, known.seen = kept, known.seen + held.chunk

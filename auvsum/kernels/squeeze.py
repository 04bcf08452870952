"""What a policy chose of a prompt goes into the slots, the rest is folded, in two launches (Triton).

In plain torch these are some eighty small operations a layer (`SlotStore.fill` and `SlotStore.fold`, which this file is
tested against), and launching them takes longer than reading a prompt of 1,900 tokens.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from auvsum.cache.store import Counts, Held, SlotStore

#: Columns that a program folds at a time, and the most programs a head.
_COLUMNS, _SPLITS = 32, 64


@triton.jit(do_not_specialize=["row", "live", "columns", "slots", "seen"])
def _hold_kernel(
    keys, values, positions, in1, in2, in3, new_key, new_value,
    key, value, positions_out, out1, out2, out3,
    key_head, key_token, value_head, value_token, row, live, columns, slots, seen,
    STATES: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, DIM_PAD)
    base = (row.to(tl.int64) * GROUPS + g) * slots
    here = column < columns
    held = column < live
    old = held[:, None] & (d < DIM)[None, :]
    new = (here & (column >= live))[:, None] & (d < DIM)[None, :]
    tile = here[:, None] & (d < DIM)[None, :]
    source = (base + column)[:, None] * DIM + d[None, :]
    fresh = (column - live)[:, None].to(tl.int64)
    to = (g.to(tl.int64) * columns + column)[:, None] * DIM + d[None, :]
    k = tl.load(new_key + g * key_head + fresh * key_token + d[None, :], mask=new, other=0.0)
    tl.store(key + to, tl.where(old, tl.load(keys + source, mask=old, other=0.0), k), mask=tile)
    v = tl.load(new_value + g * value_head + fresh * value_token + d[None, :], mask=new, other=0.0)
    tl.store(value + to, tl.where(old, tl.load(values + source, mask=old, other=0.0), v), mask=tile)
    at = g * columns + column
    position = tl.load(positions + base + column, mask=held, other=0)
    tl.store(positions_out + at, tl.where(held, position, seen + column - live), mask=here)
    if STATES > 0:
        tl.store(out1 + at, tl.load(in1 + base + column, mask=held, other=0.0), mask=here)
    if STATES > 1:
        tl.store(out2 + at, tl.load(in2 + base + column, mask=held, other=0.0), mask=here)
    if STATES > 2:
        tl.store(out3 + at, tl.load(in3 + base + column, mask=held, other=0.0), mask=here)


def hold(store: SlotStore, row: int, key: Tensor, value: Tensor) -> Held:
    """`SlotStore.hold` for a row that lies in order of position, as `squeeze` leaves it, and is not empty."""
    known = store.counts[row]
    groups, chunk, size = key.shape
    live = known.live
    columns = live + chunk
    keys, values = (torch.empty((groups, columns, size), dtype=x.dtype, device=x.device) for x in (key, value))
    positions = torch.empty((groups, columns), dtype=torch.int32, device=key.device)
    sources = list(store.state.values())
    states = [torch.empty((groups, columns), dtype=torch.float32, device=key.device) for _ in sources]
    unused = [store.longest] * (3 - len(states))
    _hold_kernel[(groups, triton.cdiv(columns, 32))](
        store.keys[0], store.values[0], store.positions, *sources, *unused, key, value,
        keys, values, positions, *states, *unused,
        key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        row, live, columns, store.positions.shape[-1], known.seen, STATES=len(states), GROUPS=groups,
        DIM=size, DIM_PAD=max(16, triton.next_power_of_2(size)), BLOCK=32, num_warps=4,
    )  # fmt: skip
    return Held(keys, values, positions, dict(zip(store.state, states, strict=True)), chunk)


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
    key, value, weights, keys, values, valid, folded_key, folded_value, folded_mass, parts, tickets,
    key_head, key_token, value_head, value_token, row, columns, slots,
    GROUPS: tl.constexpr, FRESH: tl.constexpr, SPLITS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Eqs. 7 and 8: `SPLITS` programs a head add up their columns, the last of them adds up what they found."""
    g = tl.program_id(0)
    split = tl.program_id(1)
    d = tl.arange(0, DIM_PAD)
    ok = d < DIM
    head = row.to(tl.int64) * GROUPS + g
    total_key = tl.zeros((BLOCK, DIM_PAD), tl.float32)
    total_value = tl.zeros((BLOCK, DIM_PAD), tl.float32)
    added = tl.zeros((BLOCK,), tl.float32)
    for start in range(split * BLOCK, columns, SPLITS * BLOCK):
        n = start + tl.arange(0, BLOCK)
        w = tl.load(weights + g * columns + n, mask=n < columns, other=0.0)
        tile = (n < columns)[:, None] & ok[None, :]
        at = n[:, None].to(tl.int64)
        k = tl.load(key + g * key_head + at * key_token + d[None, :], mask=tile, other=0.0).to(tl.float32)
        v = tl.load(value + g * value_head + at * value_token + d[None, :], mask=tile, other=0.0).to(tl.float32)
        # Whatever is kept has no weight; it is loaded all the same, so that no load waits for the weights.
        total_key += tl.where((w > 0)[:, None], k * w[:, None], 0.0)
        total_value += tl.where((w > 0)[:, None], v * w[:, None], 0.0)
        added += w
    part = parts + (g * SPLITS + split) * (2 * DIM_PAD + 1)
    tl.store(part + d, tl.sum(total_key, 0))
    tl.store(part + DIM_PAD + d, tl.sum(total_value, 0))
    tl.store(part + 2 * DIM_PAD, tl.sum(added, 0))
    tl.debug_barrier()
    if tl.atomic_add(tickets + g, 1) == SPLITS - 1:
        tl.store(tickets + g, 0)
        s = tl.arange(0, SPLITS)
        all_parts = parts + (g * SPLITS + s[:, None]) * (2 * DIM_PAD + 1) + d[None, :]
        sum_key = tl.sum(tl.load(all_parts, cache_modifier=".cg"), 0)
        sum_value = tl.sum(tl.load(all_parts + DIM_PAD, cache_modifier=".cg"), 0)
        mass = tl.sum(tl.load(parts + (g * SPLITS + s) * (2 * DIM_PAD + 1) + 2 * DIM_PAD, cache_modifier=".cg"), 0)
        if not FRESH:
            old = tl.load(folded_mass + head)
            sum_key += tl.load(folded_key + head * DIM + d, mask=ok, other=0.0) * old
            sum_value += tl.load(folded_value + head * DIM + d, mask=ok, other=0.0) * old
            mass += old
        divisor = tl.where(mass > 0, mass, 1.0)
        last = (head * (slots + 1) + slots) * DIM
        tl.store(folded_key + head * DIM + d, sum_key / divisor, mask=ok)
        tl.store(folded_value + head * DIM + d, sum_value / divisor, mask=ok)
        tl.store(folded_mass + head, mass)
        tl.store(keys + last + d, sum_key / divisor, mask=ok)
        tl.store(values + last + d, sum_value / divisor, mask=ok)
        tl.store(valid + head * (slots + 1) + slots, (mass > 0).to(tl.uint8))


@functools.cache
def _tickets(device: torch.device, groups: int) -> Tensor:
    """How many programs of each head are done; every launch leaves zeros."""
    return torch.zeros(groups, dtype=torch.int32, device=device)


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
        weights = states[list(store.state).index(folds_by)].scatter_(-1, keep, 0.0)  # nobody reads the state after this
        splits = min(_SPLITS, triton.next_power_of_2(triton.cdiv(columns, 2 * _COLUMNS)))
        parts = torch.empty(groups * splits * (2 * dim_pad + 1), dtype=torch.float32, device=valid.device)
        _fold_kernel[(groups, splits)](
            held.key, held.value, weights, store.keys[0], store.values[0], valid,
            store.folded_key, store.folded_value, store.folded_mass, parts, _tickets(valid.device, groups),
            *strides, row, columns, store.slots,
            GROUPS=groups, FRESH=fresh, SPLITS=splits, DIM=size, DIM_PAD=dim_pad, BLOCK=_COLUMNS, num_warps=4,
        )  # fmt: skip
        known.folded = True
    known.live, known.seen = kept, known.seen + held.chunk

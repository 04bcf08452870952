"""AUV's multi-step eviction (eqs. 5 to 8), one launch for all layers (Triton).

Nothing of an eviction is needed before the next token, so it runs once a step behind the last layer, and a step in
which no row is full waits for one launch and not for one a layer. A program takes one head of some rows of one layer;
it ends at once where none of them is full. The layers' stores lie anywhere: their addresses come from a table.

Up to 256 slots a program is one warp: a head's state is a few registers a thread, moved by shuffles, and a
multiprocessor holds enough programs to hide each other's waits (docs/LOG.md).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl
from torch import Tensor

from auvsum.cache.policies.auv import AUV
from auvsum.cache.store import SlotStore
from auvsum.kernels.select import most_scored

#: Elements of a tile of victims a warp.
_TILE = 1024
#: Programs that a launch should have, most of which find nothing to do, and the most rows that one looks after.
_PROGRAMS, _MOST_ROWS = 12800, 32
#: Entries of the table a layer.
_ENTRIES = tl.constexpr(14)


@triton.jit
def _address(entry, like: tl.constexpr):
    return tl.multiple_of(tl.load(entry).to(tl.pointer_type(like)), 16)


@triton.jit
def _evict_head(
    keys, values, positions, valid, first, second, third, folded_key, folded_value, folded_mass, slots, local, decay,
    RECONSTRUCT: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK: tl.constexpr, PADDED: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """The `local` least of the candidate region `[0, 2L)` go; the write region `[2L, 3L)` takes their slots."""
    slot = tl.arange(0, PADDED)
    d = tl.arange(0, DIM_PAD)
    candidate = slot < 2 * local
    inside = slot < 3 * local
    aas = tl.load(first + slot, mask=inside, other=0.0)
    cnt = tl.load(second + slot, mask=inside, other=0.0)
    usage = tl.load(third + slot, mask=inside, other=0.0)
    position = tl.load(positions + slot, mask=inside, other=-1)
    composite = usage * tl.max(tl.where(candidate, aas, 0.0), 0) + aas
    victim = candidate & (most_scored(composite, candidate, position, local, PADDED) == 0)

    # -- what slot s holds afterwards was in slot source[s]: state first, in registers
    counted = tl.cumsum(victim.to(tl.int32), 0)
    source = tl.where(victim, 2 * local + counted - 1, slot)
    least = tl.min(tl.where(inside & (victim == 0), usage, float("inf")), 0)
    tl.store(positions + slot, tl.where(candidate, tl.gather(position, source, 0), -1), mask=inside)
    tl.store(valid + slot, candidate.to(tl.uint8), mask=inside)
    tl.store(first + slot, tl.where(candidate, tl.gather(aas, source, 0), 0.0), mask=inside)
    tl.store(second + slot, tl.where(candidate, tl.gather(cnt, source, 0), 0.0), mask=inside)
    tl.store(third + slot, tl.where(candidate, (tl.gather(usage, source, 0) - least) * decay, 0.0), mask=inside)

    # -- the slot of the victim of each number: the first up to which that many are counted
    target = tl.zeros((PADDED,), tl.int32)
    for halving in tl.static_range(STEPS):
        half = PADDED >> (halving + 1)
        target += tl.where(tl.gather(counted, target + half - 1, 0) <= slot, half, 0)

    # -- fold the victims' vectors, and put the new ones in their places
    weight = tl.where(victim, aas, 0.0)
    mass = tl.zeros((), tl.float32)
    total_key = tl.zeros((DIM_PAD,), tl.float32)
    total_value = tl.zeros((DIM_PAD,), tl.float32)
    if RECONSTRUCT:
        mass = tl.load(folded_mass)
        total_key = tl.load(folded_key + d, mask=d < DIM, other=0.0) * mass
        total_value = tl.load(folded_value + d, mask=d < DIM, other=0.0) * mass
    for start in range(0, local, BLOCK):
        n = start + tl.arange(0, BLOCK)
        moved = (n < local)[:, None] & (d < DIM)[None, :]
        place = tl.gather(target, tl.minimum(n, PADDED - 1), 0)
        share = tl.where(n < local, tl.gather(weight, place, 0), 0.0)[:, None]
        to = place[:, None] * DIM + d[None, :]
        at = (2 * local + n)[:, None] * DIM + d[None, :]
        new_key = tl.load(keys + at, mask=moved, other=0.0)
        new_value = tl.load(values + at, mask=moved, other=0.0)
        if RECONSTRUCT:
            old_key = tl.load(keys + to, mask=moved, other=0.0)
            old_value = tl.load(values + to, mask=moved, other=0.0)
            total_key += tl.sum(old_key.to(tl.float32) * share, 0)
            total_value += tl.sum(old_value.to(tl.float32) * share, 0)
        tl.store(keys + to, new_key, mask=moved)
        tl.store(values + to, new_value, mask=moved)
    if RECONSTRUCT:
        mass += tl.sum(weight, 0)
        divisor = tl.where(mass > 0, mass, 1.0)
        total_key /= divisor
        total_value /= divisor
        tl.store(folded_key + d, total_key, mask=d < DIM)
        tl.store(folded_value + d, total_value, mask=d < DIM)
        tl.store(folded_mass, mass)
        tl.store(keys + slots * DIM + d, total_key, mask=d < DIM)
        tl.store(values + slots * DIM + d, total_value, mask=d < DIM)
        tl.store(valid + slots, (mass > 0).to(tl.uint8))


@triton.jit(do_not_specialize=["rows"])
def _evict_kernel(
    table, tickets, decay, rows,
    KIND: tl.constexpr, RECONSTRUCT: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    BLOCK: tl.constexpr, PADDED: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(0)
    b = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    layer = tl.program_id(2)
    table += layer * _ENTRIES
    pointers = _address(table, tl.int64)
    pointer = tl.load(pointers + b, mask=b < rows, other=0)
    capacity = tl.load(_address(table + 1, tl.int64) + b, mask=b < rows, other=1)
    active = tl.load(_address(table + 2, tl.uint8) + b, mask=b < rows, other=0)
    full = (pointer == capacity) & (active != 0)
    left = tl.sum(full.to(tl.int32), 0)
    if left == 0:
        return
    slots = tl.load(table + 3).to(tl.int32)
    while left > 0:
        row = tl.min(tl.where(full, b, rows), 0)
        local = (tl.sum(tl.where(b == row, capacity, 0), 0) // 3).to(tl.int32)
        head = row.to(tl.int64) * GROUPS + g
        base = head * (slots + RECONSTRUCT)
        _evict_head(
            _address(table + 4, KIND) + base * DIM, _address(table + 5, KIND) + base * DIM,
            _address(table + 6, tl.int32) + base, _address(table + 7, tl.uint8) + base,
            _address(table + 8, tl.float32) + base, _address(table + 9, tl.float32) + base,
            _address(table + 10, tl.float32) + base,
            _address(table + 11, tl.float32) + head * DIM, _address(table + 12, tl.float32) + head * DIM,
            _address(table + 13, tl.float32) + head, slots, local, decay,
            RECONSTRUCT, DIM, DIM_PAD, BLOCK, PADDED, STEPS,
        )  # fmt: skip
        # The last of the row's programs has outlived every other's look at the pointer.
        tl.debug_barrier()
        if tl.atomic_add(tickets + layer * rows + row, 1, sem="relaxed") == GROUPS - 1:
            tl.store(tickets + layer * rows + row, 0)
            tl.store(pointers + row, 2 * local.to(tl.int64))
        full = full & (b != row)
        left -= 1


@functools.cache  # for good: captured steps hold its address
def _tickets(device: torch.device, rows: int) -> Tensor:
    """How many programs of each row of each layer are done; every launch leaves zeros."""
    return torch.zeros(rows, dtype=torch.int32, device=device)


_tables: WeakKeyDictionary[SlotStore, dict[tuple[int, ...], Tensor]] = WeakKeyDictionary()


def _table(policy: AUV, stores: Sequence[SlotStore]) -> Tensor:
    """Where the stores lie, int64 `[layers, _ENTRIES]`; made once, and kept as long as the first of them."""
    known = _tables.setdefault(stores[0], {})
    which = tuple(number for store in stores for number in (id(store), store.active.data_ptr()))
    if which not in known:
        rows = []
        for store in stores:
            state = [store.state[name] for name in policy.state]
            folded = [store.folded_key, store.folded_value, store.folded_mass] if store.reconstruct else []
            memory = [store.keys[0], store.values[0], store.positions, store.valid, *state, *folded]
            row = [store.pointer.data_ptr(), store.capacity.data_ptr(), store.active.data_ptr(), store.slots]
            row += [tensor.data_ptr() for tensor in memory]
            rows.append(row + [0] * (_ENTRIES.value - len(row)))
        known[which] = torch.tensor(rows, device=stores[0].valid.device)
    return known[which]


def rows_together(batch: int, layers: int, groups: int) -> int:
    """Rows that one program looks after: few programs where rows are many, since in most steps most rows go on."""
    return int(min(_MOST_ROWS, triton.next_power_of_2(triton.cdiv(batch * layers * groups, _PROGRAMS))))


def evict(policy: AUV, stores: Sequence[SlotStore]) -> None:
    """Evicts where a row is full, in all layers of one device and shape; their numbers of slots may differ."""
    first = stores[0]
    batch, groups, _ = first.positions.shape
    size, device, layers = first.head_dim, first.valid.device, len(stores)
    padded = max(16, triton.next_power_of_2(max(store.slots for store in stores)))
    dim_pad = max(16, triton.next_power_of_2(size))
    warps = 1 if padded <= 256 else 4 if padded <= 1024 else 8
    together = rows_together(batch, layers, groups)
    _evict_kernel[(groups, triton.cdiv(batch, together), layers)](
        _table(policy, stores), _tickets(device, layers * batch), policy.decay, batch,
        KIND=_KINDS[first.keys[0].dtype], RECONSTRUCT=int(first.reconstruct), GROUPS=groups, DIM=size, DIM_PAD=dim_pad,
        BLOCK=max(1, warps * _TILE // dim_pad), PADDED=padded, STEPS=padded.bit_length() - 1,
        ROWS=together, num_warps=warps,
    )  # fmt: skip


_KINDS = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}

"""One decode step of one layer (Triton): one launch appends, attends and updates the state; `evict.py` has AUV's other.

A program is one KV head of one row. It writes the new token where the policy places it, attends over the live slots and
the reconstructed slot, and updates the state of AUV (eqs. 3 and 4, usage counts) or H2O; where heads are many the
program is that of `warp_step.py`. Where a row of AUV's is full then, `evict` has to be called before its next step.

Pointer, tokens seen, capacity and activity are read from device tensors: rows differ in phase, the host is never asked,
and all launches can be captured in a CUDA graph. The last program of a row advances its pointer.

`auvsum.cache.attention` has the same step in plain torch, which is the truth that this file is tested against.
Selection is exact: (score, position) is one 63-bit key, unique within a head.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from auvsum.cache.policies.auv import AUV
from auvsum.cache.policies.full import Full
from auvsum.cache.policies.h2o import H2O
from auvsum.cache.policy import Policy
from auvsum.cache.store import SlotStore
from auvsum.kernels.evict import evict as evict_rows
from auvsum.kernels.select import largest, order_key
from auvsum.kernels.warp_step import warp_step_kernel

#: Elements of a tile of keys; a program holds one such tile of keys and one of values at a time.
_TILE = 16384
#: The same of `warp_step.py`, the most slots it takes, and programs a multiprocessor up to which it is the slower way.
_WARP_TILE, _WARP_SLOTS, _FEW = 2048, 256, 4
#: Registers a thread of theirs at most, by slots: so told, the compiler takes 88 for AUV in place of 109 and spills
#: none, and a multiprocessor holds 23 programs.
_WARP_REGISTERS = {128: 88, 256: 112}
_POLICIES = {Full: 0, AUV: 1, H2O: 2}
_MAX_SLOTS = 8192


@triton.jit
def _h2o_place(score, positions, valid, base, slots, pointer, capacity, seen, PADDED: tl.constexpr):
    """The next free slot, or that of the least score outside the newest tokens, the older one on a tie."""
    slot = tl.arange(0, PADDED)
    position = tl.load(positions + base + slot, mask=slot < slots, other=-1)
    live = tl.load(valid + base + slot, mask=slot < slots, other=0) != 0
    protected = capacity // 2 - 1
    open_ = live & (position <= seen - 1 - protected)
    key = order_key(tl.load(score + base + slot, mask=open_, other=0.0), position)
    key = tl.where(open_, key, 0x7FFFFFFFFFFFFFFF)
    victim = tl.sum(tl.where(open_ & (key == tl.min(key, 0)), slot, 0), 0)
    return tl.where(pointer < capacity, pointer.to(tl.int32), victim.to(tl.int32))


@triton.jit(do_not_specialize=["top_k", "slots"])
def _step_kernel(
    query, new_key, new_value, out,
    keys, values, positions, valid, first, second, third,
    capacity_, pointer_, seen_, longest_, active_,
    tickets, logits_scratch,
    scale, top_k,
    query_row, query_head, key_row, key_head, value_row, value_head, slots,
    POLICY: tl.constexpr, RECONSTRUCT: tl.constexpr, GROUPS: tl.constexpr, REPEAT: tl.constexpr,
    REPEAT_PAD: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK: tl.constexpr, PADDED: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """`first`, `second`, `third` are aas, cnt and usage of AUV; the score of H2O is `first`."""
    program = tl.program_id(0)
    b = (program // GROUPS).to(tl.int64)
    g = program % GROUPS
    r = tl.arange(0, REPEAT_PAD)
    d = tl.arange(0, DIM_PAD)
    heads = (r[:, None] < REPEAT) & (d[None, :] < DIM)
    out_at = out + (b * GROUPS * REPEAT + g * REPEAT + r[:, None]) * DIM + d[None, :]
    if tl.load(active_ + b) == 0:
        tl.store(out_at, tl.zeros((REPEAT_PAD, DIM_PAD), tl.float32), mask=heads)
        return
    width = slots + RECONSTRUCT
    base = (b * GROUPS + g) * width
    capacity = tl.load(capacity_ + b)
    pointer = tl.load(pointer_ + b)
    seen = tl.load(seen_ + b)
    at = pointer.to(tl.int32)
    if POLICY == 2:
        at = _h2o_place(first, positions, valid, base, slots, pointer, capacity, seen, PADDED)

    # -- append, and attend to the new token from registers
    q = tl.load(query + b * query_row + (g * REPEAT + r[:, None]) * query_head + d[None, :], mask=heads, other=0.0)
    k_new = tl.load(new_key + b * key_row + g * key_head + d, mask=d < DIM, other=0.0)
    v_new = tl.load(new_value + b * value_row + g * value_head + d, mask=d < DIM, other=0.0)
    tl.store(keys + (base + at) * DIM + d, k_new, mask=d < DIM)
    tl.store(values + (base + at) * DIM + d, v_new, mask=d < DIM)
    tl.store(positions + base + at, seen.to(tl.int32))
    if UPCAST:
        q = q.to(tl.float32)
    new_logit = tl.sum(q.to(tl.float32) * k_new.to(tl.float32)[None, :], 1) * scale
    most = new_logit
    total = tl.full((REPEAT_PAD,), 1.0, tl.float32)
    sums = tl.zeros((REPEAT_PAD, DIM_PAD), tl.float32) + v_new.to(tl.float32)[None, :]

    # -- attend to what is held
    logits = tl.zeros((REPEAT_PAD, BLOCK), tl.float32)
    logits_at = logits_scratch + (b * GROUPS + g) * REPEAT * PADDED
    for start in range(0, BLOCK if PADDED == BLOCK else width, BLOCK):
        n = start + tl.arange(0, BLOCK)
        live = (tl.load(valid + base + n, mask=n < width, other=0) != 0) & (n != at)
        tile = (base + n)[:, None] * DIM + d[None, :]
        held = live[:, None] & (d[None, :] < DIM)
        k = tl.load(keys + tile, mask=held, other=0.0)
        v = tl.load(values + tile, mask=held, other=0.0)
        if UPCAST:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        logits = tl.where(live[None, :], logits, float("-inf"))
        new_most = tl.maximum(most, tl.max(logits, 1))
        p = tl.exp(logits - new_most[:, None])
        shrink = tl.exp(most - new_most)
        total = total * shrink + tl.sum(p, 1)
        sums = sums * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        most = new_most
        if (POLICY != 0) & (PADDED != BLOCK):
            tl.store(logits_at + r[:, None] * PADDED + n[None, :], logits, mask=(r < REPEAT)[:, None])
    tl.store(out_at, sums / total[:, None], mask=heads)

    if POLICY != 0:
        # -- mean probabilities of the group's heads, a [PADDED]
        slot = tl.arange(0, PADDED)
        share = tl.where(r < REPEAT, 1.0 / (total * REPEAT), 0.0)
        new_a = tl.sum(tl.exp(new_logit - most) * share, 0)
        if PADDED == BLOCK:
            a = tl.sum(tl.exp(logits - most[:, None]) * share[:, None], 0)
        else:
            a = tl.zeros((PADDED,), tl.float32)
            tl.debug_barrier()
            for head in range(REPEAT):
                chosen = r == head
                row = tl.load(logits_at + head * PADDED + slot, mask=slot < width, other=float("-inf"))
                a += tl.exp(row - tl.sum(tl.where(chosen, most, 0.0), 0)) * tl.sum(tl.where(chosen, share, 0.0), 0)
        a = tl.where(slot == at, new_a, a)
        present = (tl.load(valid + base + slot, mask=slot < width, other=0) != 0) | (slot == at)
        live = present & (slot < slots)
        old = live & (slot != at)
        if POLICY == 2:
            score = tl.load(first + base + slot, mask=old, other=0.0) + a
            tl.store(first + base + slot, score, mask=live)
        else:
            keys_seen = tl.sum(present.to(tl.int32), 0).to(tl.float32)
            cnt = tl.load(second + base + slot, mask=old, other=0.0)
            aas = tl.load(first + base + slot, mask=old, other=0.0)
            usage = tl.load(third + base + slot, mask=old, other=0.0)
            aas = (a * (keys_seen / tl.load(longest_ + b)) + aas * cnt) / (cnt + 1.0)
            position = tl.load(positions + base + slot, mask=old, other=-1)
            position = tl.where(slot == at, seen.to(tl.int32), position)
            count = tl.sum(live.to(tl.int32), 0)
            count = tl.minimum(count, tl.where(top_k > 0, top_k, (capacity // 3).to(tl.int32)))
            key = tl.where(live, order_key(a, position), -1)
            usage += largest(key, count, PADDED).to(tl.float32)
            tl.store(first + base + slot, aas, mask=live)
            tl.store(second + base + slot, cnt + 1.0, mask=live)
            tl.store(third + base + slot, usage, mask=live)
    tl.debug_barrier()
    tl.store(valid + base + at, tl.full((), 1, tl.uint8))

    next_pointer = pointer + 1
    if POLICY == 2:
        next_pointer = tl.minimum(next_pointer, capacity)
    # -- every program has read the row's pointer by the time its ticket is drawn; the last one moves it on
    tl.debug_barrier()
    if tl.atomic_add(tickets + b, 1) == GROUPS - 1:
        tl.store(tickets + b, 0)
        tl.store(pointer_ + b, next_pointer)
        tl.store(seen_ + b, seen + 1)


@functools.cache  # for good: captured steps hold its address
def _tickets(device: torch.device, batch: int) -> Tensor:
    """How many heads of each row are done; every launch leaves zeros, so all layers share it."""
    return torch.zeros(batch, dtype=torch.int32, device=device)


@functools.lru_cache(maxsize=16)
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _warps(padded: int) -> int:
    """Warps a program: few, so that several programs share a multiprocessor."""
    return 8 if padded > 1024 else 4


def supports(policy: Policy, store: SlotStore) -> bool:
    """Whether `step` does what the policy and the store would do in plain torch."""
    size, dtype = store.keys[0].shape[-1], store.keys[0].dtype
    return (
        type(policy) in _POLICIES
        and len(store.keys) == 1
        and dtype in (torch.float16, torch.bfloat16, torch.float32)
        and size <= 256
        and store.slots < _MAX_SLOTS
    )


def evict(policy: Policy, stores: Sequence[SlotStore]) -> None:
    """Ends a step: rows that it has filled evict, in all layers of a device at once. AUV alone needs it."""
    if isinstance(policy, AUV):
        evict_rows(policy, stores)


def step(policy: Policy, store: SlotStore, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """One decode step of every active row of a layer; the store is updated in place. `evict` follows.

    Args:
        query: `[B, H, 1, D]`. key, value: the new token's `[B, G, 1, D]`; the last dimension is contiguous.

    Returns:
        the output `[B, 1, H, D]`; zeros for rows that are not active.
    """
    batch, heads, _, size = query.shape
    groups = key.shape[1]
    repeat, device = heads // groups, query.device
    width = store.slots + store.reconstruct
    padded = max(16, triton.next_power_of_2(width))
    dim_pad = max(16, triton.next_power_of_2(size))
    out = torch.empty((batch, 1, heads, size), dtype=query.dtype, device=device)
    scratch = functools.partial(torch.empty, device=device)
    auv = policy if isinstance(policy, AUV) else None
    unused = store.longest
    state = ([store.state[name] for name in policy.state] + [unused] * 3)[:3]
    tickets, active = _tickets(device, batch), store.active.view(torch.uint8)
    memory = (store.keys[0], store.values[0], store.positions, store.valid.view(torch.uint8), *state)
    rows = (store.capacity, store.pointer, store.seen, store.longest, active, tickets)
    numbers = (
        scale, (auv.top_k or 0) if auv else 0,
        query.stride(0), query.stride(1), key.stride(0), key.stride(1), value.stride(0), value.stride(1), store.slots,
    )  # fmt: skip
    what = {"POLICY": _POLICIES[type(policy)], "RECONSTRUCT": int(store.reconstruct), "GROUPS": groups}
    sizes = {"DIM": size, "DIM_PAD": dim_pad}
    if repeat == 1 and padded <= _WARP_SLOTS and batch * groups > _FEW * _processors(device):
        block = max(16, _WARP_TILE // dim_pad)
        warp_step_kernel[(batch * groups,)](
            query, key, value, out, *memory, *rows, *numbers,
            **what, **sizes, BLOCK=block, BLOCKS=triton.cdiv(padded, block), num_warps=1,
            maxnreg=_WARP_REGISTERS[max(padded, 128)] if dim_pad <= 128 else None,
        )  # fmt: skip
    else:
        block = min(padded, max(16, _TILE // dim_pad))
        _step_kernel[(batch * groups,)](
            query, key, value, out, *memory, *rows,
            scratch(batch * heads * padded if padded != block else 1, dtype=torch.float32), *numbers,
            **what, REPEAT=repeat, REPEAT_PAD=max(16, triton.next_power_of_2(repeat)),
            **sizes, BLOCK=block, PADDED=padded, UPCAST=query.dtype == torch.bfloat16 and device.type == "cpu",
            num_warps=_warps(padded), num_stages=2,
        )  # fmt: skip
    store.decoded()
    return out

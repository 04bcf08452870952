"""The decode step's launch where heads are many (Triton): one warp a head, so that no sum needs a barrier.

What `decode_step.py` does with tensor cores and four warps a head, for models without grouped queries and up to 256
slots. A multiprocessor holds twenty such programs instead of three, and they hide each other's waits: at 256 rows of
OPT-13B's shape the plain step runs at 94% of the memory's speed. Products are sums in registers; slots fill in order,
so the first `pointer` are the live ones and no mask is loaded; the new token and the reconstructed one come from
registers. For few programs it is the slower way (docs/LOG.md).
"""

from __future__ import annotations

import triton
import triton.language as tl

from auvsum.kernels.select import most_attended, order_key


@triton.jit
def _place(score, positions, pointer, capacity, seen, PADDED: tl.constexpr):
    """H2O: the next free slot, or that of the least score outside the newest tokens, the older one on a tie."""
    slot = tl.arange(0, PADDED)
    position = tl.load(positions + slot, mask=slot < pointer, other=0)
    open_ = (slot < pointer) & (position <= seen - capacity // 2)
    key = tl.where(open_, order_key(tl.load(score + slot, mask=open_, other=0.0), position), 0x7FFFFFFFFFFFFFFF)
    victim = tl.sum(tl.where(open_ & (key == tl.min(key, 0)), slot, 0), 0)
    return tl.where(pointer < capacity, pointer, victim)


@triton.jit
def _attend(
    q, k_new, v_new, k_mean, v_mean, mean, keys, values, held, at, scale,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The output `[DIM_PAD]`, the probabilities of the slots `[BLOCKS * BLOCK]` and that of the new token."""
    d = tl.arange(0, DIM_PAD)
    slot = tl.arange(0, BLOCKS * BLOCK)
    q = q * scale
    new_logit = tl.sum(q * k_new, 0)
    mean_logit = tl.where(mean, tl.sum(q * k_mean, 0), float("-inf"))
    most = tl.maximum(new_logit, mean_logit)
    total = tl.exp(new_logit - most) + tl.exp(mean_logit - most)
    sums = tl.exp(new_logit - most) * v_new + tl.exp(mean_logit - most) * v_mean
    logits = tl.full((BLOCKS * BLOCK,), float("-inf"), tl.float32)
    for block in range(tl.cdiv(held, BLOCK)):
        n = block * BLOCK + tl.arange(0, BLOCK)
        there = (n < held) & (n != at)
        tile = n[:, None] * DIM + d[None, :]
        mask = there[:, None] & (d[None, :] < DIM)
        k = tl.load(keys + tile, mask=mask, other=0.0)
        v = tl.load(values + tile, mask=mask, other=0.0)
        logit = tl.where(there, tl.sum(k.to(tl.float32) * q[None, :], 1), float("-inf"))
        new_most = tl.maximum(most, tl.max(logit, 0))
        p = tl.exp(logit - new_most)
        shrink = tl.exp(most - new_most)
        total = total * shrink + tl.sum(p, 0)
        sums = sums * shrink + tl.sum(p[:, None] * v.to(tl.float32), 0)
        most = new_most
        # A gather, so that each slot's logit is held once and not by every thread of its row.
        logits = tl.where(slot // BLOCK == block, tl.gather(logit, slot % BLOCK, 0), logits)
    return sums / total, tl.exp(logits - most) / total, tl.exp(new_logit - most) / total


@triton.jit(do_not_specialize=["top_k", "slots"])
def warp_step_kernel(
    query, new_key, new_value, out,
    keys, values, positions, valid, first, second, third,
    capacity_, pointer_, seen_, longest_, active_,
    tickets,
    scale, top_k,
    query_row, query_head, key_row, key_head, value_row, value_head, slots,
    POLICY: tl.constexpr, RECONSTRUCT: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """`first`, `second`, `third` are aas, cnt and usage of AUV; the score of H2O is `first`."""
    program = tl.program_id(0)
    b = (program // GROUPS).to(tl.int64)
    g = program % GROUPS
    d = tl.arange(0, DIM_PAD)
    ok = d < DIM
    base = (b * GROUPS + g) * (slots + RECONSTRUCT)
    keys += base * DIM
    values += base * DIM
    positions += base
    valid += base
    # -- all that needs no other load first, so that the loads wait for memory together
    active = tl.load(active_ + b)
    capacity = tl.load(capacity_ + b).to(tl.int32)
    pointer = tl.load(pointer_ + b).to(tl.int32)
    seen = tl.load(seen_ + b).to(tl.int32)
    q = tl.load(query + b * query_row + g * query_head + d, mask=ok, other=0.0).to(tl.float32)
    k_new = tl.load(new_key + b * key_row + g * key_head + d, mask=ok, other=0.0)
    v_new = tl.load(new_value + b * value_row + g * value_head + d, mask=ok, other=0.0)
    k_mean = tl.zeros((DIM_PAD,), tl.float32)
    v_mean = tl.zeros((DIM_PAD,), tl.float32)
    mean = active < 0
    if RECONSTRUCT:
        mean = tl.load(valid + slots) != 0
        k_mean = tl.where(mean, tl.load(keys + slots * DIM + d, mask=ok, other=0.0).to(tl.float32), 0.0)
        v_mean = tl.where(mean, tl.load(values + slots * DIM + d, mask=ok, other=0.0).to(tl.float32), 0.0)
    out_at = out + (b * GROUPS + g) * DIM + d
    if active == 0:
        tl.store(out_at, tl.zeros((DIM_PAD,), tl.float32), mask=ok)
        return

    # -- append; slots fill in order, so the first `pointer` are those that hold a token
    at = pointer
    if POLICY == 2:
        at = _place(first + base, positions, pointer, capacity, seen, BLOCK * BLOCKS)
    slot = tl.arange(0, BLOCK * BLOCKS)
    live = (slot < pointer) | (slot == at)
    old = live & (slot != at)
    tl.store(keys + at * DIM + d, k_new, mask=ok)
    tl.store(values + at * DIM + d, v_new, mask=ok)
    tl.store(positions + at, seen)
    tl.store(valid + at, tl.full((), 1, tl.uint8))

    # -- attend, to the new token and the reconstructed one from registers
    attended, a, new_a = _attend(
        q, k_new.to(tl.float32), v_new.to(tl.float32), k_mean, v_mean, mean, keys, values, pointer, at, scale,
        DIM, DIM_PAD, BLOCK, BLOCKS,
    )  # fmt: skip
    tl.store(out_at, attended, mask=ok)

    # -- the state only now: held through the attention it would take the registers of five more programs
    if POLICY != 0:
        score = tl.load(first + base + slot, mask=old, other=0.0)
    if POLICY == 1:
        cnt = tl.load(second + base + slot, mask=old, other=0.0)
        usage = tl.load(third + base + slot, mask=old, other=0.0)
        longest = tl.load(longest_ + b)
    a = tl.where(slot == at, new_a, a)
    if POLICY == 2:
        tl.store(first + base + slot, score + a, mask=live)
    if POLICY == 1:
        keys_seen = (pointer + 1 + mean.to(tl.int32)).to(tl.float32)
        tl.store(first + base + slot, (a * (keys_seen / longest) + score * cnt) / (cnt + 1.0), mask=live)
        tl.store(second + base + slot, cnt + 1.0, mask=live)
        count = tl.minimum(pointer + 1, tl.where(top_k > 0, top_k, capacity // 3))
        used = most_attended(a, live, positions + slot, seen, at, slot, count, BLOCK * BLOCKS)
        tl.store(third + base + slot, usage + used.to(tl.float32), mask=live)

    next_pointer = pointer + 1
    if POLICY == 2:
        next_pointer = tl.minimum(next_pointer, capacity)
    # -- every warp has read the row's pointer by the time its ticket is drawn; the last program moves it on
    tl.debug_barrier()
    if tl.atomic_add(tickets + b, 1, sem="relaxed") == GROUPS - 1:
        tl.store(tickets + b, 0)
        tl.store(pointer_ + b, next_pointer.to(tl.int64))
        tl.store(seen_ + b, (seen + 1).to(tl.int64))

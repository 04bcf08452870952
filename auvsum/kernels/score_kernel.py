"""Column sums of attention probabilities in one pass over Q·Kᵀ (Triton): `Σ_i w_i · a[i, j]`, O(T) memory.

A program owns a block of keys of one KV head and walks over the queries that see it, for every query head of the
group; `a[i, j] = exp(q_i·k_j·s - lse_i)` needs the log-sum-exp of each query, which the attention itself has left.
`hits` walks over a chunk's last queries alone and leaves one bit for each: whether the key got enough of it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["chunk", "past"])
def _sums_kernel(
    query, key, lse, weights, out,
    query_head, query_token, key_head, key_token, scale, chunk, past,
    REPEAT: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, WEIGHTED: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_Q: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # The first programs to start are those with the most queries: the first keys, of every head.
    g = tl.program_id(0)
    block = tl.program_id(1)
    columns = past + chunk
    j = block * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.arange(0, DIM_PAD)
    k = tl.load(
        key + g * key_head + j[:, None].to(tl.int64) * key_token + d[None, :],
        mask=(j < columns)[:, None] & (d < DIM)[None, :], other=0.0,
    )  # fmt: skip
    if UPCAST:
        k = k.to(tl.float32)
    first = tl.maximum(block * BLOCK_K - past, 0) // BLOCK_Q * BLOCK_Q
    # Queries from here on see the whole block of keys.
    clear = tl.maximum(block * BLOCK_K + BLOCK_K - 1 - past, 0)
    clear = tl.minimum((clear + BLOCK_Q - 1) // BLOCK_Q * BLOCK_Q, (chunk + BLOCK_Q - 1) // BLOCK_Q * BLOCK_Q)
    total = tl.zeros((BLOCK_K,), tl.float32)
    for r in range(REPEAT):
        head = g * REPEAT + r
        for start in range(first, clear, BLOCK_Q):
            i = start + tl.arange(0, BLOCK_Q)
            q = tl.load(
                query + head * query_head + i[None, :].to(tl.int64) * query_token + d[:, None],
                mask=(i < chunk)[None, :] & (d < DIM)[:, None], other=0.0,
            )  # fmt: skip
            if UPCAST:
                q = q.to(tl.float32)
            norm = tl.load(lse + head * chunk + i, mask=i < chunk, other=float("inf")) * 1.4426950408889634
            a = tl.exp2(tl.dot(k, q, input_precision="ieee") * (scale * 1.4426950408889634) - norm[None, :])
            a = tl.where(j[:, None] <= i[None, :] + past, a, 0.0)
            if WEIGHTED:
                a = a * tl.load(weights + g * chunk + i, mask=i < chunk, other=0.0)[None, :]
            total += tl.sum(a, 1)
        for start in range(clear, chunk, BLOCK_Q):
            i = start + tl.arange(0, BLOCK_Q)
            q = tl.load(
                query + head * query_head + i[None, :].to(tl.int64) * query_token + d[:, None],
                mask=(i < chunk)[None, :] & (d < DIM)[:, None], other=0.0,
            )  # fmt: skip
            if UPCAST:
                q = q.to(tl.float32)
            norm = tl.load(lse + head * chunk + i, mask=i < chunk, other=float("inf")) * 1.4426950408889634
            a = tl.exp2(tl.dot(k, q, input_precision="ieee") * (scale * 1.4426950408889634) - norm[None, :])
            if WEIGHTED:
                a = a * tl.load(weights + g * chunk + i, mask=i < chunk, other=0.0)[None, :]
            total += tl.sum(a, 1)
    tl.store(out + g * columns + j, total / REPEAT, mask=j < columns)


def _blocks(dim_pad: int) -> tuple[int, int, int, int]:
    """Keys and queries a tile, warps and pipeline stages."""
    return (128, 64, 4, 3) if dim_pad <= 128 else (64, 64, 4, 2)


def column_sums(query: Tensor, key: Tensor, lse: Tensor, weights: Tensor | None, scaling: float, past: int) -> Tensor:
    """`Σ_i w_i · a[i, j]`, averaged over the query heads of each KV head.

    Args:
        query: `[1, H, T, D]`. key: `[1, G, past + T, D]`; both with contiguous vectors.
        lse: fp32 `[1, H, T]`. weights: fp32 `[G, T]`; None for ones.

    Returns:
        fp32 `[G, past + T]`.
    """
    _, heads, chunk, size = query.shape
    groups, columns = key.shape[1], key.shape[2]
    out = torch.empty((groups, columns), dtype=torch.float32, device=query.device)
    lse = lse[0].contiguous()
    weights = None if weights is None else weights.contiguous()
    dim_pad = max(16, triton.next_power_of_2(size))
    block_k, block_q, warps, stages = _blocks(dim_pad)
    _sums_kernel[(groups, triton.cdiv(columns, block_k))](
        query, key, lse, lse if weights is None else weights, out,
        query.stride(1), query.stride(2), key.stride(1), key.stride(2), scaling, chunk, past,
        REPEAT=heads // groups, DIM=size, DIM_PAD=dim_pad, WEIGHTED=weights is not None,
        BLOCK_K=block_k, BLOCK_Q=block_q, UPCAST=query.device.type == "cpu" and query.dtype == torch.bfloat16,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["chunk", "past", "count"])
def _hits_kernel(
    query, key, lse, least, out,
    query_head, query_token, key_head, key_token, scale, chunk, past, count,
    REPEAT: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, BITS: tl.constexpr,
    BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(0)
    columns = past + chunk
    j = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.arange(0, DIM_PAD)
    bit = tl.arange(0, 32)
    k = tl.load(
        key + g * key_head + j[:, None].to(tl.int64) * key_token + d[None, :],
        mask=(j < columns)[:, None] & (d < DIM)[None, :], other=0.0,
    )  # fmt: skip
    if UPCAST:
        k = k.to(tl.float32)
    words = tl.cdiv(count, BITS)
    for word in range(words):
        age = word * BITS + bit
        asked = (bit < BITS) & (age < count)
        i = chunk - 1 - age
        total = tl.zeros((BLOCK_K, 32), tl.float32)
        for r in range(REPEAT):
            head = g * REPEAT + r
            q = tl.load(
                query + head * query_head + i[None, :].to(tl.int64) * query_token + d[:, None],
                mask=asked[None, :] & (d < DIM)[:, None], other=0.0,
            )  # fmt: skip
            if UPCAST:
                q = q.to(tl.float32)
            norm = tl.load(lse + head * chunk + i, mask=asked, other=float("inf")) * 1.4426950408889634
            total += tl.exp2(tl.dot(k, q, input_precision="ieee") * (scale * 1.4426950408889634) - norm[None, :])
        enough = tl.load(least + g * count + (count - 1 - age), mask=asked, other=float("inf")) * REPEAT
        hit = (total >= enough[None, :]) & (j[:, None] <= i[None, :] + past) & asked[None, :]
        found = tl.sum(tl.where(hit, tl.full((1, 32), 1, tl.int32) << bit[None, :], 0), 1)
        tl.store(out + (g * words + word) * columns + j, found, mask=j < columns)


def hits(query: Tensor, key: Tensor, lse: Tensor, least: Tensor, scaling: float, past: int, bits: int) -> Tensor:
    """Whether the mean of `a[i, j]` over the query heads of a KV head is at least `least[i]`, for the last queries `i`.

    Args:
        query, key, lse: as for `column_sums`. least: fp32 `[G, N]`, of the chunk's last N queries.
        bits: queries a word, at most 31.

    Returns:
        int32 `[G, ceil(N / bits), past + T]`; the last query is the lowest bit of the first word.
    """
    _, heads, chunk, size = query.shape
    (groups, count), columns = least.shape, key.shape[2]
    out = torch.empty((groups, -(-count // bits), columns), dtype=torch.int32, device=query.device)
    dim_pad = max(16, triton.next_power_of_2(size))
    block_k = 128 if dim_pad <= 128 else 64
    _hits_kernel[(groups, triton.cdiv(columns, block_k))](
        query, key, lse[0].contiguous(), least.contiguous(), out,
        query.stride(1), query.stride(2), key.stride(1), key.stride(2), scaling, chunk, past, count,
        REPEAT=heads // groups, DIM=size, DIM_PAD=dim_pad, BITS=bits, BLOCK_K=block_k,
        UPCAST=query.device.type == "cpu" and query.dtype == torch.bfloat16, num_warps=4, num_stages=2,
    )  # fmt: skip
    return out

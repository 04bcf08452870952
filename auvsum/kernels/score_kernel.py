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


@triton.jit
def _tile_of_keys(
    key, g, j, key_head, key_token, columns, DIM: tl.constexpr, DIM_PAD: tl.constexpr, UPCAST: tl.constexpr
):
    """Keys `j` of a head, `[keys, DIM_PAD]`."""
    d = tl.arange(0, DIM_PAD)
    at = key + g * key_head + j[:, None].to(tl.int64) * key_token + d[None, :]
    k = tl.load(at, mask=(j < columns)[:, None] & (d < DIM)[None, :], other=0.0)
    return k.to(tl.float32) if UPCAST else k


@triton.jit
def _probabilities(
    k, query, norms, head, i, asked, query_head, query_token, scale, chunk,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """`exp(q_i·k_j·s - norm_i)` for a tile of keys and queries `i` of a head; 0 where not `asked`."""
    d = tl.arange(0, DIM_PAD)
    at = query + head * query_head + i[None, :].to(tl.int64) * query_token + d[:, None]
    q = tl.load(at, mask=asked[None, :] & (d < DIM)[:, None], other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    norm = tl.load(norms + head * chunk + i, mask=asked, other=float("inf"))
    return tl.exp2(tl.dot(k, q, input_precision="ieee") * (scale * 1.4426950408889634) - norm[None, :])


@triton.jit(do_not_specialize=["chunk"])
def _norms_kernel(lse, weights, out, chunk, REPEAT: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    """What is taken off a query's logits in base 2, so that `_sums_kernel` has nothing to multiply."""
    head = tl.program_id(0)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    norm = tl.load(lse + head * chunk + i, mask=i < chunk, other=0.0) * 1.4426950408889634
    if WEIGHTED:
        norm -= tl.log2(tl.load(weights + head // REPEAT * chunk + i, mask=i < chunk, other=1.0))
    tl.store(out + head * chunk + i, norm, mask=i < chunk)


def _norms(lse: Tensor, weights: Tensor | None, groups: int) -> Tensor:
    """`log2(e) lse_i - log2(w_i)`, fp32 `[H, T]`."""
    _, heads, chunk = lse.shape
    out = torch.empty((heads, chunk), dtype=torch.float32, device=lse.device)
    lse = lse[0].contiguous()
    _norms_kernel[(heads, triton.cdiv(chunk, 1024))](
        lse, lse if weights is None else weights.contiguous(), out, chunk,
        REPEAT=heads // groups, WEIGHTED=weights is not None, BLOCK=1024, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["chunk", "past"])
def _sums_kernel(
    query, key, norms, out,
    query_head, query_token, key_head, key_token, scale, chunk, past,
    REPEAT: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_Q: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # The first programs to start are those with the most queries: the first keys, of every head.
    head = tl.program_id(0)
    block = tl.program_id(1)
    columns = past + chunk
    j = block * BLOCK_K + tl.arange(0, BLOCK_K)
    k = _tile_of_keys(key, head // REPEAT, j, key_head, key_token, columns, DIM, DIM_PAD, UPCAST)
    # The first queries that see one of the keys, and those from which on all keys are seen.
    first = tl.maximum(block * BLOCK_K - past, 0) // BLOCK_Q * BLOCK_Q
    clear = tl.cdiv(tl.maximum(block * BLOCK_K + BLOCK_K - 1 - past, 0), BLOCK_Q) * BLOCK_Q
    total = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(first, tl.minimum(clear, chunk), BLOCK_Q):
        i = start + tl.arange(0, BLOCK_Q)
        a = _probabilities(k, query, norms, head, i, i < chunk, query_head, query_token, scale, chunk,
                           DIM, DIM_PAD, UPCAST)  # fmt: skip
        total += tl.sum(tl.where(j[:, None] <= i[None, :] + past, a, 0.0), 1)
    for start in range(clear, chunk, BLOCK_Q):
        i = start + tl.arange(0, BLOCK_Q)
        a = _probabilities(k, query, norms, head, i, i < chunk, query_head, query_token, scale, chunk,
                           DIM, DIM_PAD, UPCAST)  # fmt: skip
        total += tl.sum(a, 1)
    tl.store(out + head * columns + j, total, mask=j < columns)


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
    out = torch.empty((heads, columns), dtype=torch.float32, device=query.device)
    dim_pad = max(16, triton.next_power_of_2(size))
    block_k, block_q, warps, stages = _blocks(dim_pad)
    # A program a head and not a group, whose longest would take longer than all others together.
    _sums_kernel[(heads, triton.cdiv(columns, block_k))](
        query, key, _norms(lse, weights, groups), out,
        query.stride(1), query.stride(2), key.stride(1), key.stride(2), scaling, chunk, past,
        REPEAT=heads // groups, DIM=size, DIM_PAD=dim_pad,
        BLOCK_K=block_k, BLOCK_Q=block_q, UPCAST=query.device.type == "cpu" and query.dtype == torch.bfloat16,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out if heads == groups else out.view(groups, heads // groups, columns).mean(1)


@triton.jit(do_not_specialize=["chunk", "past", "count"])
def _hits_kernel(
    query, key, norms, least, out,
    query_head, query_token, key_head, key_token, scale, chunk, past, count,
    REPEAT: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, BITS: tl.constexpr,
    BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(0)
    columns = past + chunk
    j = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    bit = tl.arange(0, 32)
    k = _tile_of_keys(key, g, j, key_head, key_token, columns, DIM, DIM_PAD, UPCAST)
    words = tl.cdiv(count, BITS)
    for word in range(words):
        age = word * BITS + bit
        asked = (bit < BITS) & (age < count)
        i = chunk - 1 - age
        total = tl.zeros((BLOCK_K, 32), tl.float32)
        for r in range(REPEAT):
            total += _probabilities(k, query, norms, g * REPEAT + r, i, asked, query_head, query_token, scale, chunk,
                                    DIM, DIM_PAD, UPCAST)  # fmt: skip
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
        query, key, _norms(lse, None, groups), least.contiguous(), out,
        query.stride(1), query.stride(2), key.stride(1), key.stride(2), scaling, chunk, past, count,
        REPEAT=heads // groups, DIM=size, DIM_PAD=dim_pad, BITS=bits, BLOCK_K=block_k,
        UPCAST=query.device.type == "cpu" and query.dtype == torch.bfloat16, num_warps=4, num_stages=2,
    )  # fmt: skip
    return out

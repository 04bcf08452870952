"""Softmax over the chunk, over what is held and over the reconstructed key becomes one, in one launch (Triton)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["chunk"])
def _join_kernel(
    query, own, old, own_lse, old_lse, mean_key, mean_value, mean_valid, out, lse_out, chunk, scale,
    query_head, query_token, own_head, own_token, old_head, old_token, mean_group, valid_group,
    HEADS: tl.constexpr, REPEAT: tl.constexpr, FOLDED: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, DIM_PAD)
    at = i[:, None].to(tl.int64)
    tile = (i < chunk)[:, None] & (d < DIM)[None, :]
    own_at = own + head * own_head + at * own_token + d[None, :]
    old_at = old + head * old_head + at * old_token + d[None, :]
    mine = tl.load(own_at, mask=tile, other=0.0).to(tl.float32)
    theirs = tl.load(old_at, mask=tile, other=0.0).to(tl.float32)
    mine_lse = tl.load(own_lse + head * chunk + i, mask=i < chunk, other=0.0)
    theirs_lse = tl.load(old_lse + head * chunk + i, mask=i < chunk, other=0.0)
    most = tl.maximum(mine_lse, theirs_lse)
    if FOLDED:
        g = head // REPEAT
        valid = tl.load(mean_valid + g * valid_group) != 0
        mean_k = tl.load(mean_key + g * mean_group + d, mask=d < DIM, other=0.0).to(tl.float32)
        mean_v = tl.load(mean_value + g * mean_group + d, mask=d < DIM, other=0.0).to(tl.float32)
        q = tl.load(query + head * query_head + at * query_token + d[None, :], mask=tile, other=0.0).to(tl.float32)
        logit = tl.where(valid, tl.sum(q * mean_k[None, :], 1) * scale, float("-inf"))
        most = tl.maximum(most, logit)
    mine_p = tl.exp(mine_lse - most)
    theirs_p = tl.exp(theirs_lse - most)
    total = mine_p + theirs_p
    joined = mine * mine_p[:, None] + theirs * theirs_p[:, None]
    if FOLDED:
        mean_p = tl.exp(logit - most)
        total += mean_p
        joined += tl.where(valid, mean_v, 0.0)[None, :] * mean_p[:, None]
    tl.store(out + at * (HEADS * DIM) + head * DIM + d[None, :], joined / total[:, None], mask=tile)
    tl.store(lse_out + head * chunk + i, most + tl.log(total), mask=i < chunk)


def join(
    query: Tensor,
    own: tuple[Tensor, Tensor],
    old: tuple[Tensor, Tensor],
    folded: tuple[Tensor, Tensor, Tensor] | None,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """What `column_scores.attend_chunk` does with its parts in plain torch.

    Args:
        query: `[1, H, T, D]`. own, old: outputs `[1, H, T, D]`, whose vectors are contiguous, and lse `[1, H, T]`.
        folded: the reconstructed key and value `[G, 1, D]`, as slices of one store, and their validity `[G, 1]`.

    Returns:
        the output `[1, H, T, D]`, token by token in memory, and the lse, fp32 `[1, H, T]`.
    """
    _, heads, chunk, size = query.shape
    out = torch.empty((1, chunk, heads, size), dtype=query.dtype, device=query.device).transpose(1, 2)
    lse = torch.empty((1, heads, chunk), dtype=torch.float32, device=query.device)
    key, value, valid = folded or (query, query, query)
    groups = key.shape[0] if folded else heads
    dim_pad = max(16, triton.next_power_of_2(size))
    block = max(1, 4096 // dim_pad)
    _join_kernel[(heads, triton.cdiv(chunk, block))](
        query, own[0], old[0], own[1].contiguous(), old[1].contiguous(),
        key, value, valid.view(torch.uint8) if folded else valid, out, lse,
        chunk, scaling,
        query.stride(1), query.stride(2), own[0].stride(1), own[0].stride(2), old[0].stride(1), old[0].stride(2),
        key.stride(0), valid.stride(0),
        HEADS=heads, REPEAT=heads // groups, FOLDED=folded is not None, DIM=size, DIM_PAD=dim_pad, BLOCK=block,
        num_warps=4,
    )  # fmt: skip
    return out, lse

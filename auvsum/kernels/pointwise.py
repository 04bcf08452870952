"""Llama's steps between its matrix products, one launch each (Triton): the rotary turn, and SiLU of the gate times up.

transformers turns queries and keys in ten launches and multiplies the gate in two, all of them bound by memory. The
roundings are the same, so that the numbers are too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _turn_heads(x, out, cos, sin, x_head, HEADS: tl.constexpr, HEADS_PAD: tl.constexpr, HALF: tl.constexpr,
                HALF_PAD: tl.constexpr):  # fmt: skip
    kind = out.dtype.element_ty
    h = tl.arange(0, HEADS_PAD)[:, None]
    d = tl.arange(0, HALF_PAD)[None, :]
    inside = (h < HEADS) & (d < HALF)
    first = tl.load(x + h * x_head + d, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + h * x_head + d + HALF, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(2):
        c = tl.load(cos + part * HALF + d, mask=d < HALF, other=0.0).to(tl.float32)
        s = tl.load(sin + part * HALF + d, mask=d < HALF, other=0.0).to(tl.float32)
        straight = (first if part == 0 else second) * c
        across = (-second if part == 0 else first) * s
        turned = straight.to(kind).to(tl.float32) + across.to(kind).to(tl.float32)
        tl.store(out + h * (2 * HALF) + part * HALF + d, turned, mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def _turn_kernel(
    query, key, cos, sin, query_out, key_out, tokens,
    query_row, query_head, query_token, key_row, key_head, key_token, angle_row,
    HEADS: tl.constexpr, HEADS_PAD: tl.constexpr, GROUPS: tl.constexpr, GROUPS_PAD: tl.constexpr,
    HALF: tl.constexpr, HALF_PAD: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    b = program // tokens
    t = program % tokens
    cos += b * angle_row + t * (2 * HALF)
    sin += b * angle_row + t * (2 * HALF)
    _turn_heads(query + b * query_row + t * query_token, query_out + program * (HEADS * 2 * HALF), cos, sin, query_head,
                HEADS, HEADS_PAD, HALF, HALF_PAD)  # fmt: skip
    _turn_heads(key + b * key_row + t * key_token, key_out + program * (GROUPS * 2 * HALF), cos, sin, key_head,
                GROUPS, GROUPS_PAD, HALF, HALF_PAD)  # fmt: skip


def turn(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """transformers' `apply_rotary_pos_emb` for heads that are turned in halves.

    Args:
        query: `[B, H, T, D]`. key: `[B, G, T, D]`; vectors are contiguous. cos, sin: `[B or 1, T, D]`, contiguous.

    Returns:
        both turned; in memory their heads lie beside each other, token by token.
    """
    batch, heads, tokens, size = query.shape
    groups, half = key.shape[1], size // 2
    turned = [torch.empty((batch, tokens, h, size), dtype=query.dtype, device=query.device) for h in (heads, groups)]
    _turn_kernel[(batch * tokens,)](
        query, key, cos, sin, *turned, tokens,
        query.stride(0), query.stride(1), query.stride(2), key.stride(0), key.stride(1), key.stride(2),
        cos.stride(0) if cos.shape[0] > 1 else 0,
        HEADS=heads, HEADS_PAD=triton.next_power_of_2(heads), GROUPS=groups, GROUPS_PAD=triton.next_power_of_2(groups),
        HALF=half, HALF_PAD=triton.next_power_of_2(half), num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return turned[0].transpose(1, 2), turned[1].transpose(1, 2)


@triton.jit(do_not_specialize=["size"])
def _gate_kernel(packed, out, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(packed + row * 2 * size + n, mask=n < size, other=0.0).to(tl.float32)
    up = tl.load(packed + row * 2 * size + size + n, mask=n < size, other=0.0).to(tl.float32)
    opened = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * size + n, opened * up, mask=n < size)


def gate(packed: Tensor) -> Tensor:
    """`silu(gate) * up` `[.., F]` of the two beside each other, `[.., 2F]`, contiguous."""
    size = packed.shape[-1] // 2
    out = torch.empty((*packed.shape[:-1], size), dtype=packed.dtype, device=packed.device)
    block = min(2048, triton.next_power_of_2(size))
    _gate_kernel[(out.numel() // size, triton.cdiv(size, block))](packed, out, size, BLOCK=block, num_warps=4)
    return out

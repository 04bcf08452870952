"""A linear layer for one token (Triton): what a decode step of a single row spends its time on is reading weights."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _matvec_kernel(
    x, weight, bias, out, outputs, inputs,
    BIAS: tl.constexpr, RELU: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK)
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    row = weight + n[:, None].to(tl.int64) * inputs
    for start in range(0, inputs, BLOCK):
        at = start + k
        if EVEN:
            w = tl.load(row + at[None, :], eviction_policy="evict_first")
            v = tl.load(x + at)
        else:
            inside = at < inputs
            w = tl.load(row + at[None, :], mask=(n < outputs)[:, None] & inside[None, :], other=0.0)
            v = tl.load(x + at, mask=inside, other=0.0)
        sums += w.to(tl.float32) * v.to(tl.float32)[None, :]
    total = tl.sum(sums, 1)
    if BIAS:
        total += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)
    if RELU:
        total = tl.maximum(total, 0.0)
    tl.store(out + n, total, mask=n < outputs)


def matvec(
    x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool = False, *, rows: int = 2, block: int = 1024,
    warps: int = 4,
) -> Tensor:  # fmt: skip
    """`weight @ x + bias` with fp32 sums, and a ReLU on request.

    Args:
        x: `[.., K]` with one vector in all. weight: `[N, K]`, contiguous.

    Returns:
        `[.., N]`.
    """
    outputs, inputs = weight.shape
    out = torch.empty((*x.shape[:-1], outputs), dtype=x.dtype, device=x.device)
    _matvec_kernel[(triton.cdiv(outputs, rows),)](
        x, weight, weight if bias is None else bias, out, outputs, inputs,
        BIAS=bias is not None, RELU=relu, EVEN=outputs % rows == 0 and inputs % block == 0, ROWS=rows, BLOCK=block,
        num_warps=warps,
    )  # fmt: skip
    return out

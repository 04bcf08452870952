"""The plain versions: explicit softmax, readable, any dtype. The fused passes are tested against these.

Shapes: B batch, H query heads, G KV heads, R = H // G query heads a KV head, T queries, C keys, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention_probabilities(query: Tensor, key: Tensor, scaling: float, past: int) -> Tensor:
    """Softmax probabilities of a chunk's queries over `past` earlier keys and the chunk's own keys (causal).

    Args:
        query: `[B, H, T, D]`. key: `[B, G, past + T, D]`.

    Returns:
        fp32 (fp64 for fp64 input) `[B, G, R, T, past + T]`.
    """
    b, h, t, d = query.shape
    g, c = key.shape[1], key.shape[2]
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = query.view(b, g, h // g, t, d).to(wide)
    logits = grouped @ key.to(wide)[:, :, None].transpose(-1, -2) * scaling
    rows = torch.arange(t, device=query.device)[:, None]
    hidden = torch.arange(c, device=query.device)[None] > rows + past
    return logits.masked_fill(hidden, -torch.inf).softmax(-1)


def attend(query: Tensor, key: Tensor, value: Tensor, scaling: float, past: int) -> Tensor:
    """Attention output `[B, H, T, D]` of a chunk over `past` earlier keys and itself."""
    probabilities = attention_probabilities(query, key, scaling, past)
    out = probabilities @ value.to(probabilities.dtype)[:, :, None]
    return out.reshape(query.shape).to(query.dtype)


def column_sums(query: Tensor, key: Tensor, weights: Tensor, scaling: float, past: int) -> Tensor:
    """`Σ_i w_i · mean over the group's heads of a[i, j]`: `[B, G, past + T]`, with one weight `w_i` a query `[T]`."""
    probabilities = attention_probabilities(query, key, scaling, past)
    return (probabilities.mean(2) * weights.to(probabilities.dtype)[:, None]).sum(-2)


def decode_attention(query: Tensor, key: Tensor, value: Tensor, valid: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """One query a row over its slots, in the type of the arguments.

    Args:
        query: `[B, H, D]`. key, value: `[B, G, S, D]`. valid: `[B, G, S]`.

    Returns:
        the output `[B, H, D]` and the probabilities `[B, H, S]`, 0 for dead slots.
    """
    b, h, d = query.shape
    g = key.shape[1]
    logits = query.view(b, g, h // g, d) @ key.transpose(-1, -2) * scaling
    probabilities = logits.masked_fill(~valid[:, :, None], -torch.inf).softmax(-1)
    return (probabilities @ value).view(b, h, d), probabilities.view(b, h, -1)

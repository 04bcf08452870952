"""Weights in 8 bits: half the bytes to read for every token written, where reading weights is what takes the time.

Symmetric, one scale per output channel, weight-only: activations stay as they are. A decode step multiplies by the
8-bit weights directly; a prompt, whose many rows are bound by arithmetic, unpacks a layer's weights for the moment of
its product. There is no second copy: an embedding that is tied to the output head is looked up in the head's 8 bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from auvsum.engine.memory import mapped_files, release_mapped

#: With more rows than this, unpacking the weights for a product in full precision is as quick (docs/LOG.md).
_MOST_ROWS = 16
#: Weights that are unpacked at a time: fresh memory for a whole matrix would be page faults, a fifth of the product.
_UNPACKED = 1 << 20
#: Weights that are packed at a time: what this takes in fp32 stays in the processor's cache.
_PACKED = 1 << 18


class Int8Linear(nn.Module):
    """A linear layer whose weight is kept as int8 `[out, in]` with a scale for each output channel.

    Args:
        linear: the layer to take over; its weight is not kept. dtype: of activations.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype = dtype
        self.scale = torch.empty(self.out_features, dtype=torch.bfloat16)
        self.weight = torch.empty_like(weight, dtype=torch.int8)
        rows = max(1, _PACKED // self.in_features)
        for part, kept, scale in zip(*(torch.split(x, rows) for x in (weight, self.weight, self.scale)), strict=True):
            exact = part.float()
            scale.copy_(exact.abs().amax(1).div_(127).clamp_min_(torch.finfo(torch.float32).tiny))
            # By the scale as it is kept, so that its own rounding is not added to the weights'.
            kept.copy_((exact / scale.float()[:, None]).round_().clamp_(-127, 127))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """`[.., in]` -> `[.., out]`."""
        out = int8_product(x.reshape(-1, self.in_features), self.weight, self.scale, self.bias)
        return out.view(*x.shape[:-1], self.out_features)


class Int8Embedding(nn.Module):
    """An embedding that is looked up in the weight of the output head it is tied to.

    Args:
        padding_idx: as of the embedding whose place it takes.
    """

    def __init__(self, head: Int8Linear, padding_idx: int | None) -> None:
        super().__init__()
        self.weight, self.scale, self.padding_idx = head.weight, head.scale.to(head.dtype), padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids `[..]` -> `[.., D]`."""
        rows = functional.embedding(ids, self.weight)
        return rows.to(self.scale.dtype) * self.scale[ids][..., None]


def int8_product(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ (weight * scale).T + bias` for `x [rows, in]`; the activations of few rows are rounded to bf16 for it."""
    if x.shape[0] <= _MOST_ROWS:
        # The library's product for fp32 activations takes ten times as long as the one for bf16.
        out = torch._weight_int8pack_mm(x.to(scale.dtype), weight, scale).to(x.dtype)
    else:
        # The scale is applied to the product: int8 is exact in the activations' type, the scaled weight would not be.
        blocks = torch.split(weight, max(1, _UNPACKED // weight.shape[1]))
        parts = [functional.linear(x, block.to(x.dtype)) for block in blocks]
        out = (torch.cat(parts, -1) if len(parts) > 1 else parts[0]).mul_(scale)
    return out if bias is None else out.add_(bias)


def quantize_weights(model: Any, dtype: torch.dtype | None = None) -> None:
    """Replaces every linear layer of a model on the CPU by its 8-bit version, one at a time, in place.

    Args:
        dtype: what the rest of the model is turned to, from the type in which its weights are stored; None leaves it.
    """
    dtype = dtype or model.dtype
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and head.weight is embedding.weight
    files = mapped_files()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, Int8Linear(child, dtype))
                release_mapped(child.weight, files)
    if tied:
        model.set_input_embeddings(Int8Embedding(model.get_output_embeddings(), embedding.padding_idx))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)

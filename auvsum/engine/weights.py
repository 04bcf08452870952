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

#: With more rows than this, unpacking the weights for a product in full precision is as quick (docs/LOG.md).
_MOST_ROWS = 16
#: Output channels that are unpacked at a time: a whole output head would be tens of MB of fresh memory each time.
_UNPACKED = 4096


class Int8Linear(nn.Module):
    """A linear layer whose weight is kept as int8 `[out, in]` with a scale for each output channel.

    Args:
        linear: the layer to take over; its weight is not kept.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
        self.in_features, self.out_features = linear.in_features, linear.out_features
        # By the scale as it is kept, so that its own rounding is not added to the weights'.
        self.scale = scale.to(linear.weight.dtype)
        self.weight = (weight / self.scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
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
        self.weight, self.scale, self.padding_idx = head.weight, head.scale, padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids `[..]` -> `[.., D]`."""
        rows = functional.embedding(ids, self.weight)
        return rows.to(self.scale.dtype) * self.scale[ids][..., None]


def int8_product(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ (weight * scale).T + bias` for `x [rows, in]`."""
    if x.shape[0] <= _MOST_ROWS:
        out = torch._weight_int8pack_mm(x, weight, scale)
    else:
        # The scale is applied to the product: int8 is exact in the activations' type, the scaled weight would not be.
        parts = [functional.linear(x, part.to(x.dtype)) for part in torch.split(weight, _UNPACKED)]
        out = (torch.cat(parts, -1) if len(parts) > 1 else parts[0]).mul_(scale)
    return out if bias is None else out.add_(bias)


def quantize_weights(model: Any) -> None:
    """Replaces every linear layer of a model on the CPU by its 8-bit version, one at a time, in place."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and head.weight is embedding.weight
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, Int8Linear(child))
    if tied:
        model.set_input_embeddings(Int8Embedding(model.get_output_embeddings(), embedding.padding_idx))

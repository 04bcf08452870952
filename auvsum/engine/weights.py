"""Weights in 8 bits: half the bytes to read for every decoded token, where reading weights is what takes the time.

Symmetric, one scale per output channel, weight-only: activations stay in bf16. Decoding multiplies by the 8-bit weights
directly; a prompt, whose many rows make it compute-bound, unpacks a layer's weights for the moment of its product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

#: With more rows than this, unpacking the weights for a full-speed bf16 product is quicker (bench_cpu.py measures it).
_MOST_ROWS = 16


class Int8Linear(nn.Module):
    """A linear layer whose weight is kept as int8 `[out, in]` with a bf16 scale for each output channel.

    Args:
        linear: the layer to take over; its weight is not kept.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("weight", (weight / scale[:, None]).round().to(torch.int8), persistent=False)
        self.register_buffer("scale", scale.to(torch.bfloat16), persistent=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """`[.., in]` -> `[.., out]`."""
        weight, scale = self.get_buffer("weight"), self.get_buffer("scale")
        rows = x.reshape(-1, self.in_features)
        if rows.shape[0] <= _MOST_ROWS:
            out = torch._weight_int8pack_mm(rows, weight, scale)
        else:
            out = functional.linear(rows, weight.to(x.dtype)) * scale
        if self.bias is not None:
            out = out + self.bias
        return out.view(*x.shape[:-1], self.out_features)


def quantize_weights(model: Any) -> None:
    """Replaces every linear layer of a bf16 model on the CPU by its 8-bit version, one at a time, in place.

    An output head that shares the embedding's weight gets a copy of its own: the embedding is only looked up.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, Int8Linear(child))


def weight_bytes(model: Any) -> int:
    """Bytes of a model's parameters and buffers; what is shared counts once."""
    tensors = [*model.parameters(), *model.buffers()]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())

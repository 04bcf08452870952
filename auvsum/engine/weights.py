"""Weights in 8 or 4 bits: fewer bytes to read for every token written, where reading weights is what takes the time.

Weight-only: activations stay as they are. 8 bits are made here, symmetric, one scale per output channel; 4 bits are
those of a GGUF file, a step and a least value for 32 weights, and are never made: they cost nothing but the rounding of
these two to bf16. A decode step multiplies by them directly; a prompt, whose many rows are bound by arithmetic, unpacks
a layer's weights for the moment of its product. There is no second copy: an embedding that is tied to the output head
is looked up in the head's 8 bits.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from auvsum.engine.memory import mapped_files, release_mapped
from auvsum.errors import DeviceError

#: With more rows than this, unpacking the weights for a product in full precision is as quick (docs/LOG.md).
_MOST_ROWS = 16
#: Weights that are unpacked at a time: fresh memory for a whole matrix would be page faults, a fifth of the product.
_UNPACKED = 1 << 20
#: The same of 4-bit weights, which takes some copies of them on the way.
_UNPACKED_4 = 1 << 19
#: Weights of a row that share a step and a least value in a GGUF file's 4 bits.
_BLOCK = 32
#: The 4-bit product wants so many output channels at once at most, and whole multiples of them; others are quicker so.
_CHANNELS = 64
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
        few = torch._weight_int8pack_mm(x.to(scale.dtype), weight, scale).to(x.dtype)
        return few if bias is None else few.add_(bias)
    channels = _share(weight)
    out = x.new_empty((x.shape[0], weight.shape[0]))
    biases = [None] * -(-len(weight) // channels) if bias is None else torch.split(bias.detach(), channels)
    scales = torch.split(scale.to(x.dtype), channels)
    for block, factor, shift, part in zip(
        torch.split(weight, channels), scales, biases, torch.split(out, channels, 1), strict=True
    ):
        # The scale is applied to the product: int8 is exact in the activations' type, the scaled weight would not be.
        product = functional.linear(x, block.to(x.dtype))
        if shift is None:
            torch.mul(product, factor, out=part)
        else:
            torch.addcmul(shift, product, factor, out=part)
    return out


def _share(weight: Tensor) -> int:
    """Channels of 8-bit weights `[out, in]` to unpack at a time: equal parts, of whole registers."""
    parts = -(-weight.numel() // _UNPACKED)
    return -(-weight.shape[0] // (parts * _CHANNELS)) * _CHANNELS


class Int4Linear(nn.Module):
    """A linear layer in the 4 bits of a GGUF file.

    Args:
        codes, step, least: as `convert_gguf` writes them.

    Attributes:
        weight: uint8 `[out, in / 2]`, codes in the order that torch's product wants. scale: bf16 `[in / 32, out, 2]`,
            the step of 32 weights and the value of their code 8.
    """

    def __init__(self, codes: Tensor, step: Tensor, least: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = codes.shape[0], 2 * codes.shape[1]
        self.weight = torch.empty_like(codes)
        rows = max(1, _PACKED // self.in_features // _CHANNELS) * _CHANNELS
        for part, kept in zip(torch.split(codes, rows), torch.split(self.weight, rows), strict=True):
            halves = part.view(part.shape[0], -1, _BLOCK // 2)
            whole = torch.cat([halves & 15, halves >> 4], -1).view(part.shape[0], self.in_features)
            kept.copy_(torch.ops.aten._convert_weight_to_int4pack_for_cpu(whole.int(), 1))
        step, least = step.float(), least.float()
        self.scale = torch.stack([step, least + 8 * step], -1).transpose(0, 1).bfloat16().contiguous()
        self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        """`[.., in]` -> `[.., out]`."""
        out = int4_product(x.reshape(-1, self.in_features), self.weight, self.scale)
        return out.view(*x.shape[:-1], self.out_features)


def int4_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """`x [rows, in]` by the weights of an `Int4Linear`; the activations of few rows are rounded to bf16 for it."""
    if x.shape[0] <= _MOST_ROWS:
        # In fp32 the library's product takes forty times as long.
        few = x.to(scale.dtype).contiguous()
        out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(few, weight, _BLOCK, scale.contiguous())
        return out.to(x.dtype)
    channels = max(_CHANNELS, _UNPACKED_4 // x.shape[1] // _CHANNELS * _CHANNELS)
    parts = zip(torch.split(weight, channels), torch.split(scale, channels, 1), strict=True)
    products = [x @ _unpacked(*part, x.dtype) for part in parts]
    return torch.cat(products, -1) if len(products) > 1 else products[0]


def _unpacked(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights `[in, out]` of packed channels."""
    outs, ins, together = weight.shape[0], 2 * weight.shape[1], channels_together()
    packed = weight.view(outs // together, ins, together // 2)
    codes = torch.cat([packed & 15, packed >> 4], -1).view(torch.int8).sub_(8)
    # Put in order as single bytes: converting what does not lie in order takes twice as long.
    codes = codes.transpose(0, 1).reshape(ins // _BLOCK, _BLOCK, outs).to(dtype)
    step, middle = (part.contiguous() for part in scale.to(dtype)[:, None].unbind(-1))
    return torch.addcmul(middle, codes, step, out=codes).view(ins, outs)


@functools.cache
def channels_together() -> int:
    """Output channels that torch packs into one block on this processor, the first half of them in the lower 4 bits.

    Raises:
        DeviceError: it packs otherwise here: there is no fast 4-bit product then.
    """
    codes = torch.randint(16, (_CHANNELS, _BLOCK), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1).flatten()
    for together in (_CHANNELS, _CHANNELS // 2):
        low, high = codes.view(-1, 2, together // 2, _BLOCK).transpose(2, 3).unbind(1)
        if torch.equal(packed, (low + 16 * high).to(torch.uint8).flatten()):
            return together
    raise DeviceError("torch has no product for 4-bit weights on this processor", "use --weights int8")


def take_blocks(model: Any, file: Path) -> None:
    """Replaces the layers of a model on the CPU of which `convert_gguf` kept the 4 bits, in place.

    Raises:
        DeviceError: see `channels_together`.
    """
    from safetensors import safe_open

    channels_together()
    files = mapped_files()
    with safe_open(file, "pt") as stored:
        for name in sorted({key.rpartition(".")[0] for key in stored.keys()}):  # noqa: SIM118 (it is no mapping)
            parent, _, child = name.rpartition(".")
            owner, linear = model.get_submodule(parent), model.get_submodule(name)
            if linear.out_features % _CHANNELS == 0:
                blocks = [stored.get_tensor(f"{name}.{part}") for part in ("codes", "step", "least")]
                setattr(owner, child, Int4Linear(*blocks))
                release_mapped(linear.weight, files)


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

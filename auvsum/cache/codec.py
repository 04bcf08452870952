"""How a key or a value is kept in memory: in the model's type, or in 8 or 4 bits. One codec a store.

Few bits: a vector is rotated (Hadamard, which spreads outlying channels over all), cut into groups of at most 64
channels, and each group is kept as whole steps between its least and its greatest value, both ends in fp16. A token
carries its own scales, so that it can be scattered into any slot. Measured in docs/LOG.md: groups of 64 with the
rotation are as good as groups of 32 without it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

Index = Any

#: The most channels that share a scale.
_GROUP = 64
#: Bytes of a group's least value and step, fp16 each.
_SCALE_BYTES = 4


class Codec:
    """Keeps vectors in a floating-point type. `memory` is a list of tensors, so that other codecs can add scales.

    Args:
        dtype: the type kept.
    """

    bits = 16

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def allocate(self, shape: tuple[int, ...], head_dim: int, device: torch.device) -> list[Tensor]:
        """Memory for `shape` vectors; zeros, since a dead slot must not hold a NaN (0 · NaN is NaN)."""
        return self.pack(torch.zeros((*shape, head_dim), dtype=self.dtype, device=device))

    def pack(self, vectors: Tensor) -> list[Tensor]:
        """`[.., D]` as it is kept."""
        return [vectors.to(self.dtype)]

    def unpack(self, memory: list[Tensor]) -> Tensor:
        """What `pack` kept, as `turn` would have it: in the space where attention is cheapest."""
        return memory[0]

    def turn(self, vectors: Tensor) -> Tensor:
        """Into the space of `unpack`: an orthogonal rotation, so that q · k stays what it is."""
        return vectors

    def turn_back(self, vectors: Tensor) -> Tensor:
        """The inverse of `turn`."""
        return vectors

    def encode(self, memory: list[Tensor], where: Index, vectors: Tensor) -> None:
        """Writes `vectors` at `where`."""
        for kept, part in zip(memory, self.pack(vectors), strict=True):
            kept[where] = part

    def decode(self, memory: list[Tensor], where: Index = ...) -> Tensor:
        """Reads the vectors at `where`; all of them by default, in 16 bits without a copy."""
        return self.turn_back(self.unpack([kept[where] for kept in memory]))


class QuantizedCodec(Codec):
    """Keeps vectors in 8 or 4 bits a channel.

    Args:
        dtype: the type vectors come back in. bits: 8 or 4.
    """

    def __init__(self, dtype: torch.dtype, bits: int) -> None:
        super().__init__(dtype)
        self.bits = bits

    def allocate(self, shape: tuple[int, ...], head_dim: int, device: torch.device) -> list[Tensor]:
        _check(head_dim, self.bits)
        groups = head_dim // _group(head_dim)
        codes = torch.zeros((*shape, head_dim * self.bits // 8), dtype=torch.uint8, device=device)
        return [codes, torch.zeros((*shape, groups, 2), dtype=torch.float16, device=device)]

    def pack(self, vectors: Tensor) -> list[Tensor]:
        size = vectors.shape[-1]
        grouped = self.turn(vectors.float()).view(*vectors.shape[:-1], -1, _group(size))
        low = grouped.amin(-1, keepdim=True)
        step = (grouped.amax(-1, keepdim=True) - low) / (2**self.bits - 1)
        # Rounded as they are kept, so that the codes fit the scales that will be read.
        scales = torch.cat([low, step], -1).half()
        low, step = scales.float().chunk(2, -1)
        codes = ((grouped - low) / step.clamp_min(1e-8)).round_().clamp_(0, 2**self.bits - 1)
        codes = codes.view(vectors.shape).to(torch.uint8)
        if self.bits == 4:
            first, second = codes.chunk(2, -1)
            codes = first | (second << 4)
        return [codes, scales]

    def unpack(self, memory: list[Tensor]) -> Tensor:
        codes, scales = memory
        if self.bits == 4:
            codes = torch.cat([codes & 15, codes >> 4], -1)
        grouped = codes.view(*codes.shape[:-1], scales.shape[-2], -1).to(self.dtype)
        low, step = scales.to(self.dtype).chunk(2, -1)
        return torch.addcmul(low, grouped, step).view(codes.shape)

    def turn(self, vectors: Tensor) -> Tensor:
        return _rotate(vectors)

    def turn_back(self, vectors: Tensor) -> Tensor:
        return _rotate(vectors)


def make_codec(dtype: torch.dtype, bits: int) -> Codec:
    """The codec for a model's type and 16, 8 or 4 bits."""
    return Codec(dtype) if bits == 16 else QuantizedCodec(dtype, bits)


def vector_bytes(head_dim: int, element_bytes: int, bits: int) -> int:
    """Bytes of one key or value.

    Raises:
        PolicyError: a head size that does not fit the bits.
    """
    if bits == 16:
        return head_dim * element_bytes
    _check(head_dim, bits)
    return head_dim * bits // 8 + head_dim // _group(head_dim) * _SCALE_BYTES


def _check(head_dim: int, bits: int) -> None:
    if head_dim * bits % 8 or head_dim % 2:
        from auvsum.errors import PolicyError

        raise PolicyError(f"heads of size {head_dim} cannot be kept in {bits} bits", "leave --kv-bits at 16")


def _group(head_dim: int) -> int:
    """Channels that share a scale: the largest divisor of the head size up to 64."""
    return next(size for size in range(min(_GROUP, head_dim), 0, -1) if head_dim % size == 0)


def _rotate(vectors: Tensor) -> Tensor:
    """Multiplies `[.., D]` with a symmetric orthogonal matrix, its own inverse."""
    matrix = _hadamard(vectors.shape[-1], vectors.dtype, vectors.device)
    return vectors @ matrix


@functools.cache
def _hadamard(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Hadamard blocks (Sylvester) of the largest power of two that divides `size`, along the diagonal."""
    block = torch.ones(1, 1)
    while size % (2 * block.shape[0]) == 0:
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
    block = block / block.shape[0] ** 0.5
    matrix = torch.kron(torch.eye(size // block.shape[0]), block)
    return matrix.to(device=device, dtype=dtype)

"""How a key or a value is kept in memory: in the model's type, or in 8 or 4 bits. One codec a store.

Few bits: a vector is rotated (Hadamard, which spreads outlying channels over all), cut into groups of at most 64
channels, and each group is kept as whole steps between its least and its greatest value, both ends in fp16. A token
carries its own scales, so that it can be scattered into any slot. Measured in docs/LOG.md: groups of 64 with the
rotation are as good as groups of 32 without it.

Even fewer bits (3 or 2): one scale a group, levels in even steps on both sides of zero. Rounded one by one, such keys
lose more than the room they save gives back; rounded by what queries make of the errors (`EvenCodec.pack`), less.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

Index = Any

#: The most channels that share a scale.
_GROUP = 64
#: Bytes of a group's least value and step, fp16 each; of its step alone.
_SCALE_BYTES, _STEP_BYTES = 4, 2
#: The step, in root mean squares of a group, that is best for a normal distribution.
_STEPS = {3: 0.5860, 2: 0.9957}
#: Of a metric's mean diagonal, what is added to all of it: queries that were not seen may ask for any channel.
_DAMPING = 0.02


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

    def pack(self, vectors: Tensor, head: Tensor | None = None, metric: Tensor | None = None) -> list[Tensor]:
        """`[.., D]` as it is kept.

        Args:
            head: whose vectors `[N, D]` they are, int64 `[N]`, ascending. metric: `[G, D, D]`, how errors of a head's
                turned vectors add up (of keys: the second moments of queries). With both, few bits are chosen by it.
        """
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

    def pack(self, vectors: Tensor, head: Tensor | None = None, metric: Tensor | None = None) -> list[Tensor]:
        size = vectors.shape[-1]
        grouped = self.turn(vectors.float()).unflatten(-1, _groups(size))
        low = grouped.amin(-1, keepdim=True)
        step = (grouped.amax(-1, keepdim=True) - low) / (2**self.bits - 1)
        # Rounded as they are kept, so that the codes fit the scales that will be read.
        scales = torch.cat([low, step], -1).half()
        low, step = scales.float().chunk(2, -1)
        if head is None or metric is None:
            codes = ((grouped - low) / step.clamp_min(1e-8)).round_().clamp_(0, 2**self.bits - 1)
        else:
            ends = (x.expand_as(grouped).reshape(vectors.shape) for x in (low, step.clamp_min(1e-8)))
            codes = _fed_back(grouped.reshape(vectors.shape), *ends, 2**self.bits - 1, head, metric)
        codes = codes.view(vectors.shape).to(torch.uint8)
        if self.bits == 4:
            first, second = codes.chunk(2, -1)
            codes = first | (second << 4)
        return [codes, scales]

    def unpack(self, memory: list[Tensor]) -> Tensor:
        codes, scales = memory
        if self.bits == 4:
            codes = torch.cat([codes & 15, codes >> 4], -1)
        grouped = codes.unflatten(-1, _groups(codes.shape[-1])).to(self.dtype)
        low, step = scales.to(self.dtype).chunk(2, -1)
        return torch.addcmul(low, grouped, step).flatten(-2)

    def turn(self, vectors: Tensor) -> Tensor:
        return _rotate(vectors)

    def turn_back(self, vectors: Tensor) -> Tensor:
        return _rotate(vectors)


class EvenCodec(Codec):
    """Keeps vectors in 3 or 2 bits a channel.

    Args:
        dtype: the type vectors come back in. bits: 3 or 2.
    """

    def __init__(self, dtype: torch.dtype, bits: int) -> None:
        super().__init__(dtype)
        self.bits, self.middle = bits, (2**bits - 1) / 2

    def pack(self, vectors: Tensor, head: Tensor | None = None, metric: Tensor | None = None) -> list[Tensor]:
        y = self.turn(vectors.float())
        grouped = y.unflatten(-1, _groups(y.shape[-1]))
        step = grouped.square().mean(-1, keepdim=True).sqrt().mul_(_STEPS[self.bits]).clamp_min_(1e-8)
        if head is None or metric is None:
            codes = (grouped / step + self.middle).round_().clamp_(0, 2 * self.middle)
            found = codes - self.middle
            # The step that is best for the codes that were chosen.
            step = (found * grouped).sum(-1, keepdim=True) / found.square().sum(-1, keepdim=True)
            codes = codes.flatten(-2)
        else:
            steps = step.expand_as(grouped).flatten(-2)
            codes = _fed_back(y, -self.middle * steps, steps, round(2 * self.middle), head, metric)
            found = (codes - self.middle) * steps
            turned = torch.empty_like(found)
            for group, own in enumerate(metric.to(found.dtype)):
                turned[head == group] = found[head == group] @ own
            longer = (turned * y).sum(-1) / (turned * found).sum(-1).clamp_min(1e-20)
            step = step * longer[:, None, None]
        return [*self._planes(codes.to(torch.uint8)), step.half()]

    def _planes(self, codes: Tensor) -> list[Tensor]:
        """Two bits of four channels a byte, and the third of eight."""
        low = (codes & 3).chunk(4, -1)
        planes = [low[0] | (low[1] << 2) | (low[2] << 4) | (low[3] << 6)]
        if self.bits == 3:
            high = torch.stack((codes >> 2).chunk(8, -1))
            shifts = torch.arange(8, device=codes.device, dtype=torch.uint8).view(-1, *[1] * codes.dim())
            planes.append((high << shifts).sum(0, dtype=torch.uint8))
        return planes

    def unpack(self, memory: list[Tensor]) -> Tensor:
        low, *high, step = memory
        codes = torch.cat([low & 3, (low >> 2) & 3, (low >> 4) & 3, low >> 6], -1)
        if high:
            codes = codes | torch.cat([((high[0] >> i) & 1) << 2 for i in range(8)], -1)
        grouped = codes.unflatten(-1, _groups(codes.shape[-1])).to(self.dtype)
        return ((grouped - self.middle) * step.to(self.dtype)).flatten(-2)

    def turn(self, vectors: Tensor) -> Tensor:
        return _rotate(vectors)

    def turn_back(self, vectors: Tensor) -> Tensor:
        return _rotate(vectors)


class Tiers:
    """Vectors in two codecs that turn alike; a mask beside them tells which are in the finer one. `memory` holds the
    tensors of the finer, then those of the coarser, each in the order of its vectors.

    Args:
        coarse: None where all are in the finer one.
    """

    def __init__(self, fine: Codec, coarse: EvenCodec | None) -> None:
        self.fine, self.coarse = fine, coarse
        self.parts = 1 if fine.bits == 16 else 2

    def pack(
        self, vectors: Tensor, fine: Tensor, head: Tensor | None = None, metric: Tensor | None = None
    ) -> list[Tensor]:
        """`[N, D]`, of which `fine`, bool `[N]`, are in the finer codec."""
        if self.coarse is None:
            return self.fine.pack(vectors, head, metric)
        parts = ((self.fine, fine), (self.coarse, ~fine))
        return [x for codec, own in parts
                for x in codec.pack(vectors[own], None if head is None else head[own], metric)]  # fmt: skip

    def unpack(self, memory: list[Tensor], fine: Tensor) -> Tensor:
        """`[N, D]` in the turned space."""
        best = self.fine.unpack(memory[: self.parts])
        if self.coarse is None:
            return best
        found = best.new_empty((fine.shape[0], best.shape[-1]))
        found[fine], found[~fine] = best, self.coarse.unpack(memory[self.parts :])
        return found

    def added(self, memory: list[Tensor], vectors: Tensor) -> list[Tensor]:
        """More vectors `[N, D]` behind the finer ones."""
        own = zip(memory[: self.parts], self.fine.pack(vectors), strict=True)
        return [*(torch.cat(parts) for parts in own), *memory[self.parts :]]

    def select(self, memory: list[Tensor], fine: Tensor, order: Tensor) -> list[Tensor]:
        """The vectors `order`, int64 `[K]`, in that order."""
        if self.coarse is None:
            return [x[order] for x in memory]
        chosen = fine[order]
        best, rest = (fine.cumsum(0) - 1)[order[chosen]], ((~fine).cumsum(0) - 1)[order[~chosen]]
        return [*(x[best] for x in memory[: self.parts]), *(x[rest] for x in memory[self.parts :])]


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
    return head_dim * bits // 8 + head_dim // _group(head_dim) * (_STEP_BYTES if bits < 4 else _SCALE_BYTES)


def _fed_back(y: Tensor, low: Tensor, step: Tensor, most: int, head: Tensor, metric: Tensor) -> Tensor:
    """Codes `[N, D]` between 0 and `most` of rotated vectors `y`, which stand for `low + step * code`; all `[N, D]`.

    Channels are rounded one after the other, and each makes up for the errors of those before it, as far as the metric
    says that they matter together (Chee et al., QuIP, NeurIPS 2023).
    """
    heads, size = metric.shape[:2]
    counts = torch.bincount(head, minlength=heads)
    place = torch.arange(head.shape[0], device=head.device) - (counts.cumsum(0) - counts)[head]
    shape = (heads, int(counts.max()), size)
    wanted, least, length = y.new_zeros(shape), y.new_zeros(shape), y.new_ones(shape)
    wanted[head, place], least[head, place], length[head, place] = y, low, step
    metric = metric.double()
    mean = metric.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-12)
    metric = metric + torch.diag_embed((_DAMPING * mean)[:, None].expand(-1, size))
    # metric = (I + U) S (I + U)^T, U strictly upper: errors e = η (I + U)^-1 cost η S η^T, η those of rounding alone.
    upper = torch.linalg.cholesky(metric.flip(-1, -2)).flip(-1, -2)
    upper = (upper / upper.diagonal(dim1=-2, dim2=-1)[:, None]).to(y.dtype)
    codes, error = torch.empty_like(wanted), torch.zeros_like(wanted)
    for k in range(size):
        goal = wanted[..., k] - (error[..., :k] @ upper[:, :k, k, None])[..., 0]
        codes[..., k] = ((goal - least[..., k]) / length[..., k]).round_().clamp_(0, most)
        error[..., k] = least[..., k] + length[..., k] * codes[..., k] - wanted[..., k]
    return codes[head, place]


def _check(head_dim: int, bits: int) -> None:
    if head_dim * bits % 8 or head_dim % 2:
        from auvsum.errors import PolicyError

        raise PolicyError(f"heads of size {head_dim} cannot be kept in {bits} bits", "leave --kv-bits at 16")


def _group(head_dim: int) -> int:
    """Channels that share a scale: the largest divisor of the head size up to 64."""
    return next(size for size in range(min(_GROUP, head_dim), 0, -1) if head_dim % size == 0)


def _groups(head_dim: int) -> tuple[int, int]:
    """Groups of a vector, and channels of each."""
    return head_dim // _group(head_dim), _group(head_dim)


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

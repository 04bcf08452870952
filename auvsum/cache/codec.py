"""How a key or a value is kept in memory: in the model's type, or in 8 or 4 bits. One codec a store.

Few bits: a vector is rotated (Hadamard, which spreads outlying channels over all), cut into groups of at most 64
channels, and each group is kept as whole steps between its least and its greatest value, both ends in fp16. A token
carries its own scales, so that it can be scattered into any slot. Measured in docs/LOG.md: groups of 64 with the
rotation are as good as groups of 32 without it.

Even fewer bits (3 or 2): one scale of a byte a group, levels in even steps on both sides of zero. Rounded one by one,
such keys lose more than the room they save gives back; rounded by what queries make of the errors (`EvenCodec.pack`),
less.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Index = Any

#: Channels of a vector that are rounded at once, when errors are made up for.
_BLOCK = 4

#: The most channels that share a scale.
_GROUP = 64
#: Bytes of a group's least value and step, fp16 each; of its step alone, see `_logs`.
_SCALE_BYTES, _STEP_BYTES = 4, 1
#: The step, in root mean squares of a group, that is best for a normal distribution.
_STEPS = {3: 0.5860, 2: 0.9957}
#: Of a metric's mean diagonal, what is added to all of it: queries that were not seen may ask for any channel.
_DAMPING = 0.02


class Metric:
    """How errors of a head's rotated vectors add up: of keys, the second moments of the queries.

    Few bits are chosen by it: channels are rounded a few at a time, one block after the other, and each block makes up
    for the errors of those before it, as far as queries see them together (Chee et al., QuIP, NeurIPS 2023).

    Args:
        moments: `[G, D, D]`, of vectors that are not rotated; their scale does not matter.
    """

    def __init__(self, moments: Tensor) -> None:
        size = moments.shape[-1]
        turned = _rotate(_rotate(moments.float()).mT).double()
        mean = turned.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-12)
        turned = turned / mean[:, None, None] + _DAMPING * torch.eye(size, dtype=torch.float64, device=moments.device)
        # turned = (I + U) S (I + U)^T, U strictly upper and S diagonal in blocks: errors e = η (I + U)^-1 then cost
        # η S η^T, where η are the errors of rounding alone.
        root = torch.linalg.cholesky(turned.flip(-1, -2)).flip(-1, -2)
        self.blocks = [slice(at, at + _BLOCK) for at in range(0, size, _BLOCK)]
        block = torch.arange(size, device=moments.device) // _BLOCK
        within = root * (block[:, None] == block)
        upper = torch.linalg.solve_triangular(within, root, upper=True, left=False)
        self.upper, self.turned = upper.float(), turned.float()
        self.head: Tensor | None = None

    def to(self, device: torch.device) -> Metric:
        """The same on another device."""
        self.upper, self.turned = self.upper.to(device), self.turned.to(device)
        return self

    def codes(self, y: Tensor, low: Tensor, step: Tensor, most: int, head: Tensor) -> Tensor:
        """Codes between 0 and `most` of `y`, which stand for `low + step * code`; all `[N, D]`, heads `[N]`."""
        self._arrange(head)
        wanted, least, length = (self._spread(x) for x in (y, low, step))
        codes, error = torch.empty_like(wanted), torch.zeros_like(wanted)
        for own in self.blocks:
            goal = wanted[..., own] - error[..., : own.start] @ self.upper[:, : own.start, own]
            found = ((goal - least[..., own]) / length[..., own].clamp_min(1e-8)).round_().clamp_(0, most)
            codes[..., own] = found
            error[..., own] = least[..., own] + length[..., own] * found - wanted[..., own]
        return codes[head, self.place]

    def longer(self, found: Tensor, y: Tensor, head: Tensor) -> Tensor:
        """By how much `found` should be longer to be as near `y` as can be; `[N, D]` both, the answer `[N]`."""
        self._arrange(head)
        found, y = self._spread(found), self._spread(y)
        turned = found @ self.turned
        return ((turned * y).sum(-1) / (turned * found).sum(-1).clamp_min(1e-20))[head, self.place]

    def _arrange(self, head: Tensor) -> None:
        """Where each vector goes when those of a head lie side by side. Known where the heads are the last call's:
        both codecs of a vector ask, and one of them twice."""
        if head is self.head:
            return
        counts = torch.bincount(head, minlength=self.upper.shape[0])
        order = head.argsort(stable=True)
        place = torch.arange(head.shape[0], device=head.device) - (counts.cumsum(0) - counts)[head[order]]
        self.head, self.place = head, torch.empty_like(head).index_copy_(0, order, place)
        self.longest = int(counts.max())

    def _spread(self, x: Tensor) -> Tensor:
        found = x.new_zeros((self.upper.shape[0], self.longest, x.shape[-1]))
        found[self.head, self.place] = x
        return found


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

    def pack(self, vectors: Tensor, head: Tensor | None = None, metric: Metric | None = None) -> list[Tensor]:
        """`[.., D]` as it is kept.

        Args:
            head: whose vectors `[N, D]` they are, int64 `[N]`. metric: of those heads; with both, few bits are chosen
                by it.
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


class _RotatedCodec(Codec):
    """Keeps vectors rotated."""

    def turn(self, vectors: Tensor) -> Tensor:
        return _rotate(vectors)

    def turn_back(self, vectors: Tensor) -> Tensor:
        return _rotate(vectors)


class QuantizedCodec(_RotatedCodec):
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

    def pack(self, vectors: Tensor, head: Tensor | None = None, metric: Metric | None = None) -> list[Tensor]:
        grouped = _grouped(self.turn(vectors.float()))
        low = grouped.amin(-1, keepdim=True)
        step = (grouped.amax(-1, keepdim=True) - low) / (2**self.bits - 1)
        # Rounded as they are kept, so that the codes fit the scales that will be read.
        scales = torch.cat([low, step], -1).half()
        low, step = scales.float().chunk(2, -1)
        if head is None or metric is None:
            codes = ((grouped - low) / step.clamp_min(1e-8)).round_().clamp_(0, 2**self.bits - 1)
        else:
            least, length = (x.expand_as(grouped).reshape(vectors.shape) for x in (low, step))
            codes = metric.codes(grouped.reshape(vectors.shape), least, length, 2**self.bits - 1, head)
        codes = codes.view(vectors.shape).to(torch.uint8)
        if self.bits == 4:
            first, second = codes.chunk(2, -1)
            codes = first | (second << 4)
        return [codes, scales]

    def unpack(self, memory: list[Tensor]) -> Tensor:
        codes, scales = memory
        if self.bits == 4:
            codes = torch.cat([codes & 15, codes >> 4], -1)
        grouped = _grouped(codes).to(self.dtype)
        low, step = scales.to(self.dtype).chunk(2, -1)
        return torch.addcmul(low, grouped, step).flatten(-2)


class EvenCodec(_RotatedCodec):
    """Keeps vectors in 3 or 2 bits a channel.

    Args:
        dtype: the type vectors come back in. bits: 3 or 2.
    """

    def __init__(self, dtype: torch.dtype, bits: int) -> None:
        super().__init__(dtype)
        self.bits, self.middle = bits, (2**bits - 1) / 2

    def pack(self, vectors: Tensor, head: Tensor | None = None, metric: Metric | None = None) -> list[Tensor]:
        y = self.turn(vectors.float())
        grouped = _grouped(y)
        step = grouped.square().mean(-1, keepdim=True).sqrt().mul_(_STEPS[self.bits]).clamp_min_(1e-8)
        if head is None or metric is None:
            codes = (grouped / step + self.middle).round_().clamp_(0, 2 * self.middle)
            found = codes - self.middle
            # The step that is best for the codes that were chosen.
            step = (found * grouped).sum(-1, keepdim=True) / found.square().sum(-1, keepdim=True)
            codes = codes.flatten(-2)
        else:
            steps = step.expand_as(grouped).flatten(-2)
            codes = metric.codes(y, -self.middle * steps, steps, round(2 * self.middle), head)
            step = step * metric.longer((codes - self.middle) * steps, y, head)[:, None, None]
        return [*self._planes(codes.to(torch.uint8)), _logs(step)]

    def _planes(self, codes: Tensor) -> list[Tensor]:
        """Two bits of four channels a byte, and the third of eight."""
        planes = [(codes & 3, 4, 2)] + [(codes >> 2, 8, 1)] * (self.bits - 2)
        return [
            (bits.view(*bits.shape[:-1], count, bits.shape[-1] // count) << _shifts(count, width, codes.device)).sum(
                -2, dtype=torch.uint8
            )
            for bits, count, width in planes
        ]

    def unpack(self, memory: list[Tensor]) -> Tensor:
        low, *high, logs = memory
        codes = ((low[..., None, :] >> _shifts(4, 2, low.device)) & 3).flatten(-2)
        if high:
            third = ((high[0][..., None, :] >> _shifts(8, 1, low.device)) & 1).flatten(-2)
            codes = codes.add_(third, alpha=4)
        step = _steps(logs.device)[logs.int()].to(self.dtype)
        found: Tensor = _grouped(codes.to(self.dtype)).sub_(self.middle).mul_(step)
        return found.flatten(-2)


def _logs(step: Tensor) -> Tensor:
    """Steps in a byte each, in sixteenths of an octave from 2^-10 to nearly 2^6: at most 2.2% off."""
    return (step.clamp_min(1e-8).log2() * 16 + 160).round_().clamp_(0, 255).to(torch.uint8)


@functools.cache
def _steps(device: torch.device) -> Tensor:
    """The step of each such byte, fp32 `[256]`."""
    return ((torch.arange(256) - 160) / 16).exp2().to(device)


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
        self, vectors: Tensor, fine: Tensor, head: Tensor | None = None, metric: Metric | None = None
    ) -> list[Tensor]:
        """`[N, D]`, of which `fine`, bool `[N]`, are in the finer codec."""
        if self.coarse is None:
            return self.fine.pack(vectors, head, metric)
        parts = ((self.fine, fine), (self.coarse, ~fine))
        return [x for codec, own in parts
                for x in codec.pack(vectors[own], None if head is None else head[own], metric)]  # fmt: skip

    def unpack(self, memory: list[Tensor], fine: Tensor) -> Tensor:
        """All `[N, D]` in the turned space."""
        return self.read(memory, None if self.coarse is None else self.places(fine))

    def read(self, memory: list[Tensor], at: Tensor | None) -> Tensor:
        """Vectors in the turned space, where `at` finds them among all, those of the finer codec first."""
        found = self.fine.unpack(memory[: self.parts])
        if self.coarse is not None:
            found = torch.cat([found, self.coarse.unpack(memory[self.parts :])])
        return found if at is None else found[at]

    @staticmethod
    def places(fine: Tensor) -> Tensor:
        """Where each vector is when those of the finer codec lie before all others, int64 `[N]`."""
        best = fine.cumsum(0)
        return torch.where(fine, best - 1, best[-1:] - 1 + torch.arange(1, len(fine) + 1, device=fine.device) - best)

    def both(self, vectors: Tensor, head: Tensor, metric: Metric | None) -> list[Tensor]:
        """`[N, D]` in either codec, for `added` to choose from."""
        return [x for codec in (self.fine, self.coarse) if codec for x in codec.pack(vectors, head, metric)]

    def added(self, memory: list[Tensor], more: Sequence[Tensor], fine: Tensor) -> list[Tensor]:
        """Vectors in `both` codecs behind those of the one that `fine` names."""
        if self.coarse is None:
            return [torch.cat(parts) for parts in zip(memory, more, strict=True)]
        own = [x[fine] if number < self.parts else x[~fine] for number, x in enumerate(more)]
        return [torch.cat(parts) for parts in zip(memory, own, strict=True)]

    def select(self, memory: list[Tensor], fine: Tensor, order: Tensor) -> list[Tensor]:
        """The vectors `order`, int64 `[K]`, in that order."""
        if self.coarse is None:
            return [x[order] for x in memory]
        chosen, places = fine[order], self.places(fine)[order]
        best, rest = places[chosen], places[~chosen] - fine.sum()
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


def _check(head_dim: int, bits: int) -> None:
    if head_dim * bits % 8 or head_dim % 2:
        from auvsum.errors import PolicyError

        raise PolicyError(f"heads of size {head_dim} cannot be kept in {bits} bits", "leave --kv-bits at 16")


def _group(head_dim: int) -> int:
    """Channels that share a scale: the largest divisor of the head size up to 64."""
    return next(size for size in range(min(_GROUP, head_dim), 0, -1) if head_dim % size == 0)


@functools.cache
def _shifts(count: int, width: int, device: torch.device) -> Tensor:
    """By how far each of the values in a byte is shifted, `[count, 1]`."""
    return torch.arange(0, count * width, width, dtype=torch.uint8, device=device)[:, None]


def _grouped(vectors: Tensor) -> Tensor:
    """`[.., D]` as `[.., groups, channels of a group]`."""
    size = _group(vectors.shape[-1])
    return vectors.reshape(*vectors.shape[:-1], vectors.shape[-1] // size, size)


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

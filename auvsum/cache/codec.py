"""How a slot's key or value is kept in memory. One codec a store; only floating point for now."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Index = Any


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
        return [torch.zeros((*shape, head_dim), dtype=self.dtype, device=device)]

    def encode(self, memory: list[Tensor], where: Index, vectors: Tensor) -> None:
        """Writes `vectors` at `where`."""
        memory[0][where] = vectors.to(self.dtype)

    def decode(self, memory: list[Tensor], where: Index = ...) -> Tensor:
        """Reads the vectors at `where` (all of them by default, without a copy)."""
        return memory[0][where]

"""Rotary positions that can be given anew: how a stream goes on past the positions that a model was trained with.

A key of a rotary model is turned by its position; turning it back by the same angle undoes that exactly. So in a row
that streams, keys are stored un-turned, and each chunk is read with positions that count only what is held: the kept
tokens stand at `0 .. held-1` in their order, the chunk at `held .. held+T-1`. While nothing is evicted these are the
document's own positions. Turning from the stored keys each time, rather than on from the last angle, keeps the rounding
of a key independent of how many chunks have passed since.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from auvsum.cache.store import Held

#: Kinds of `rope_parameters` whose angles do not depend on the length of the text.
_FIXED = frozenset({"default", "linear", "llama3", "yarn"})


@dataclass(frozen=True)
class Rotary:
    """The angles of a model whose heads are turned in halves: dimension `i` with dimension `i + R/2` of the first `R`.

    Attributes:
        inv_freq: fp32 `[R/2]`, radians a position.
    """

    inv_freq: Tensor

    @classmethod
    def of(cls, model: nn.Module) -> Rotary | None:
        """The model's rotary angles; None when it has none, or turns its heads in a way that is not this one."""
        found: list[Any] = [module for module in model.modules() if hasattr(module, "inv_freq")]
        if len(found) != 1 or getattr(found[0], "rope_type", "default") not in _FIXED:
            return None
        rotary = cls(found[0].inv_freq.float())
        return rotary if rotary._agrees(model, found[0]) else None

    def turn(self, keys: Tensor, positions: Tensor) -> Tensor:
        """Keys `[.., C, D]` turned by `positions` `[C]` or `[.., C]`; negative ones turn back."""
        angles = positions[..., None].to(torch.float32) * self.inv_freq.to(keys.device)
        cos, sin = angles.cos(), angles.sin()
        half = self.inv_freq.shape[0]
        first, second, rest = torch.split(keys.float(), [half, half, keys.shape[-1] - 2 * half], -1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)
        return turned.to(keys.dtype)

    def place(self, held: Held, position: int) -> Tensor:
        """Keys `[G, C, D]` for attention: what was held stands just before `position`, the chunk from there on.

        `held.key`, of which a choice is stored, has the chunk's keys un-turned afterwards.
        """
        past = held.size - held.chunk
        old, new = torch.split(held.key, [past, held.chunk], 1)
        places = torch.arange(position - past, position + held.chunk, device=new.device)
        held.key = torch.cat([old, self.turn(new, -places[past:])], 1)
        return torch.cat([self.turn(old, places[:past]), new], 1)

    def place_mean(self, mean: Tensor, past: int, position: int) -> Tensor:
        """The reconstructed key `[G, 1, D]`, a mean of un-turned keys, in the middle of what is held."""
        return self.turn(mean, torch.tensor([position - 1 - past // 2], device=mean.device))

    def _agrees(self, model: nn.Module, module: Any) -> bool:
        """Whether the model's own function turns keys as `turn` does, up to the scale some models put on them."""
        apply = getattr(sys.modules[type(model).__module__], "apply_rotary_pos_emb", None)
        if apply is None:
            return False
        device, size = self.inv_freq.device, 2 * self.inv_freq.shape[0]
        key = torch.linspace(-1, 1, 7 * size, device=device).view(1, 1, 7, size)
        positions = torch.arange(3, 10, device=device)
        try:
            cos, sin = module(key, positions[None])
            theirs = apply(key, key, cos, sin)[1]
        except (TypeError, ValueError, RuntimeError):
            return False
        scale = float(getattr(module, "attention_scaling", 1.0))
        return theirs.shape == key.shape and torch.allclose(theirs, scale * self.turn(key, positions), atol=1e-4)

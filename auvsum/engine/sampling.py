"""From logits to a token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Args:
        temperature: 0 is greedy.
        top_p: keeps the smallest set of tokens of that probability.
        repetition_penalty: logits of tokens already written (not of those read) are divided by it when positive and
            multiplied when negative (Keskar et al., CTRL, 2019). 1 changes nothing.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    @property
    def plain(self) -> bool:
        """Whether the token drawn is always that of the largest logit."""
        return self.temperature == 0 and self.repetition_penalty == 1

    def noise(self, count: int) -> list[float]:
        """A document's random numbers in [0, 1), one a token, whatever its neighbours and its place."""
        if not self.temperature:
            return []
        generator = torch.Generator().manual_seed(self.seed)
        drawn: list[float] = torch.rand(count, generator=generator).tolist()
        return drawn

    def draw(self, logits: Tensor, written: Sequence[int], noise: float = 0.0) -> int:
        """One token id from one row's logits `[V]`, given what the row has written."""
        known = None
        if self.repetition_penalty != 1:
            known = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
            known[torch.tensor(list(written), dtype=torch.int64, device=logits.device)] = True
            known = known[None]
        return int(self.draw_rows(logits[None], known, torch.full((1,), noise, device=logits.device)))

    def draw_rows(self, logits: Tensor, written: Tensor | None, noise: Tensor) -> Tensor:
        """A token a row, without asking the device.

        Args:
            logits: `[B, V]`. written: bool `[B, V]`, what each row has written; unused without a penalty.
            noise: `[B]` in [0, 1); unused when greedy.

        Returns:
            int64 `[B]`.
        """
        if self.repetition_penalty != 1 and written is not None:
            changed = torch.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
            logits = torch.where(written, changed, logits)
        if self.temperature == 0:
            return logits.argmax(-1)
        probabilities = (logits.float() / self.temperature).softmax(-1)
        ordered, order = probabilities.sort(-1, descending=True)
        upto = ordered.cumsum(-1)
        inside = upto - ordered < self.top_p
        mass = (ordered * inside).sum(-1, keepdim=True)
        place = ((upto <= noise[:, None] * mass) & inside).sum(-1, keepdim=True)
        last = inside.sum(-1, keepdim=True) - 1
        return order.gather(-1, torch.minimum(place, last))[:, 0]

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

    def generator(self, request: int, device: torch.device) -> torch.Generator:
        """A document's own stream of random numbers: its summary does not depend on its neighbours."""
        return torch.Generator(device).manual_seed((self.seed * 1_000_003 + request) % 2**63)

    def draw(self, logits: Tensor, written: Sequence[int], generator: torch.Generator | None) -> int:
        """One token id from one row's logits `[V]`, given what the row has written."""
        if self.repetition_penalty != 1 and written:
            ids = torch.tensor(list(set(written)), device=logits.device)
            old = logits[ids]
            changed = torch.where(old > 0, old / self.repetition_penalty, old * self.repetition_penalty)
            logits = logits.index_copy(0, ids, changed)
        if self.temperature == 0 or generator is None:
            return int(logits.argmax())
        probabilities = (logits.float() / self.temperature).softmax(-1)
        if self.top_p < 1:
            ordered, order = probabilities.sort(descending=True)
            outside = ordered.cumsum(-1) - ordered >= self.top_p
            probabilities = probabilities.index_fill(0, order[outside], 0.0)
        return int(torch.multinomial(probabilities, 1, generator=generator))

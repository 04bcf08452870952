"""AUV with a second look: aggregation over queries that know what is asked, one ranking over all layers and heads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from auvsum.cache.tiered import TieredPolicy
from auvsum.errors import PolicyError

#: Tokens of the document between two pieces that are read again.
_STRIDE = 128


@dataclass(frozen=True)
class AUVLook(TieredPolicy):
    """Before anything is dropped, the model looks at the prompt again; what its queries attend to is kept.

    The scores are AUV's (eqs. 3 and 4: attention summed and divided by the number of queries that could pay it), of
    squares and with the root taken at the end: errors of an output add up by their squares. The queries are not all of
    the prompt's own: they are pieces of the document read once more behind the prompt (KVzip, Kim et al. 2025, reads
    all of it), the first tokens of a summary that is drafted with the full cache and thrown away, and the prompt's last
    tokens, behind the document, which say what is asked. One ranking over the tokens of all layers and KV heads shares
    the budget out, so that every head has its own number of slots. While it writes, new tokens gather in a write
    region; when that is full, the least of all the layer's tokens go (multi-step eviction, §3.4), and those that stay
    are quantized as they are scattered into slots.

    Slots of 4 bits have two precisions: a quarter of them is kept in 4 bits, and tokens ranked behind these in 3, of
    which there are the more. Codes of the prompt's keys are chosen by what the second look's own queries make of their
    errors (`codec.Metric`), those of written keys by the directions of queries that the model's profile tells.

    Args:
        look: share of the document that is read again, in pieces spread over it; 0 for none.
        lead: tokens of the document's beginning that are read again in any case.
        draft: tokens of the summary that are drafted; 0 for none.
        weight: of the draft's queries, against the second reading's, in [0, 1].
        ask: weight of the queries of what stands behind the document, against all others, in [0, 1].
        power: of attention, of which the mean's root is the score: 1 is AUV's mean, 2 the root mean square.
        value_norm: whether a score is multiplied by the length of its value.
        fine, coarse, write: see `TieredPolicy`.
        prior: how many written tokens the prompt's score counts for, once writing has begun.
        profile: whether scores are multiplied with the model's factors a head, where it has a profile.
    """

    look: float = 0.25
    lead: int = 128
    draft: int = 48
    weight: float = 0.6
    ask: float = 0.1
    power: float = 2.0
    value_norm: bool = False
    prior: int = 64
    profile: bool = True

    name: ClassVar[str] = "auv-look"
    paper: ClassVar[str] = "AUV's scores over a second look at the prompt; after KVzip (Kim et al., NeurIPS 2025)"
    evicts: ClassVar[str] = "end of prompt over all layers and heads, then tokens of a layer every few steps"
    state: ClassVar[tuple[str, ...]] = ("aas",)
    streams: ClassVar[bool] = False
    by_head: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        shares, counts = ("look", "weight", "ask"), ("lead", "draft")
        for name, most in (*((name, 1) for name in shares), *((name, math.inf) for name in counts)):
            if not 0 <= getattr(self, name) <= most:
                allowed = "between 0 and 1" if most == 1 else "at least 0"
                raise PolicyError(f"{name} is {getattr(self, name)}", f"it must be {allowed}")
        if self.power <= 0 or self.prior < 1:
            raise PolicyError(f"power is {self.power}, prior {self.prior}", "they must be more than 0 and at least 1")
        if not (self.look or self.lead or self.draft):
            raise PolicyError("there is nothing to look with", "give it look, lead or draft")

    @property
    def queries(self) -> tuple[object, ...]:
        """What the second look asks with: policies that agree in it can share one."""
        return self.power, self.look, self.lead, self.draft, self.ask > 0

    def tokens_to_look_with(self, document: Sequence[int]) -> list[int]:
        """What is read again: the document's lead, then a piece of every 128 tokens."""
        found = list(document[: self.lead])
        piece = round(_STRIDE * self.look)
        for start in range(self.lead, len(document), _STRIDE):
            found += document[start : start + piece]
        return found

    def blend(self, looked: Tensor | None, drafted: Tensor | None, asked: Tensor | None) -> Tensor:
        """One score of the powers of attention `[layers, G, n]` that these queries paid, mean a query; not all missing.
        The draft's scale is kept, where there is one: written tokens will be compared with it."""
        rest = 1 - self.ask
        shares = ((drafted, self.weight * rest), (looked, (1 - self.weight) * rest), (asked, self.ask))
        found = [(x.pow(1 / self.power), share) for x, share in shares if x is not None]
        whole = sum(share for _, share in found)
        scale = found[0][0].sum()
        parts = [x * (share / whole if whole else 1.0) * (scale / x.sum().clamp_min(1e-20)) for x, share in found]
        return torch.stack(parts).sum(0)


POLICY = AUVLook

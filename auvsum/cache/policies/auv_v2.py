"""AUV's V2 (§3.3, fig. 3): naive single-step eviction, the second-chance traversal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from auvsum.cache.policies.auv_v3 import AuvV3
from auvsum.cache.policy import ascending
from auvsum.cache.store import SlotStore


@dataclass(frozen=True)
class AuvV2(AuvV3):
    """The keys are traversed by ascending AAS, again and again: a count of 0 goes, any other loses 1 and is passed.

    The decrements persist and the next victim is sought from the start. So with `m` the least count, the victim is the
    first key with that count, all counts lose `m`, and the keys before the victim one more.
    """

    name: ClassVar[str] = "auv-v2"
    paper: ClassVar[str] = "AUV, ablation V2: naive single-step eviction"

    def victim(self, store: SlotStore, rows: Tensor, first: Tensor) -> Tensor:
        usage = store.state["usage"][rows]
        order = ascending(store.state["aas"][rows].masked_fill(~first, torch.inf), store.positions[rows])
        fewest = usage.masked_fill(~first, torch.inf).amin(-1, keepdim=True)
        chance = (first & (usage == fewest)).gather(-1, order).to(torch.int8)
        turn = chance.argmax(-1, keepdim=True)
        passed = torch.arange(order.shape[-1], device=order.device) < turn
        left = (usage - fewest).scatter_add(-1, order, -passed.to(usage.dtype))
        store.state["usage"][rows] = torch.where(first, left, usage)
        return order.gather(-1, turn)[..., 0]


POLICY = AuvV2

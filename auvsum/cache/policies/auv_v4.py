"""AUV's V4 (§4.3): multi-step eviction by usage count, without the reconstructed slot and without decay."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from auvsum.cache.policies.auv import AUV


@dataclass(frozen=True)
class AuvV4(AUV):
    """AUV with α = 1 and no reconstructed slot."""

    decay: float = field(default=1.0, init=False)
    reconstruct: bool = field(default=False, init=False)
    eviction: str = field(default="multi-step", init=False)

    name: ClassVar[str] = "auv-v4"
    paper: ClassVar[str] = "AUV, ablation V4: multi-step eviction with the usage count"


POLICY = AuvV4

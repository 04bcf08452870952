"""PyramidKV (Cai et al., 2024): SnapKV with more slots in the lower layers and fewer in the upper ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from auvsum.cache.policies.snapkv import SnapKV


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV's window is the same in all layers; what is left of the budget falls linearly from layer to layer."""

    name: ClassVar[str] = "pyramidkv"
    paper: ClassVar[str] = "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Funneling, arXiv 2406.02069"

    def layer_slots(self, slots: int, layers: int, prompt_tokens: int) -> list[int]:
        """`m = B - w`, from `hi = min(2m - lo, n - w)` in the first layer to `lo = m // 20` in the last, plus `w`.

        A budget that holds the prompt is left even. Rounding may push the sum above `B` a layer: then m is one less.
        """
        if slots >= prompt_tokens:
            return [slots] * layers
        window = min(self.window, slots // 2)
        for scored in range(slots - window, -1, -1):
            low = scored // 20
            high = min(2 * scored - low, prompt_tokens - window)
            numbers = [high - layer * (high - low) // max(1, layers - 1) + window for layer in range(layers)]
            if sum(numbers) <= slots * layers:
                return numbers
        raise AssertionError("unreachable: with nothing scored every layer has its window")


POLICY = PyramidKV

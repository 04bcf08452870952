"""Layers with a sliding window (Gemma 3, some Mistral and Qwen): exact, whatever the policy of the other layers.

Such a layer never looks further back than its window, so it holds just that many tokens, as a ring. Its bytes count;
the budget is what the other layers share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from auvsum.cache.policy import Policy
from auvsum.cache.rings import Ring
from auvsum.cache.store import Held, SlotStore
from auvsum.kernels.column_scores import ChunkAttention


def layer_windows(config: Any) -> list[int | None]:
    """The window of every layer of a model, None for those with full attention."""
    text = config.get_text_config(decoder=True)
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None) or ["sliding_attention"] * text.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def slots_by_layer(policy: Policy, slots: int, windows: Sequence[int | None], tokens: int) -> list[int]:
    """Slots of every layer for a prompt of that many tokens: a window's own, or a share of `slots` a layer."""
    shared = iter(policy.layer_slots(slots, windows.count(None), tokens))
    return [next(shared) if window is None else window for window in windows]


@dataclass(frozen=True)
class SlidingWindow(Ring):
    """What a layer with a window has in the place of a policy: the last `window` tokens, the new one included."""

    window: int = 1

    name: ClassVar[str] = "sliding window"
    paper: ClassVar[str] = "-"
    evicts: ClassVar[str] = "what left the window"

    @property
    def least_slots(self) -> int:
        return 1

    def observe_chunk(self, attention: ChunkAttention, held: Held, store: SlotStore, row: int) -> None:
        """There is nothing to learn."""

    def choose(self, held: Held, capacity: int) -> Tensor | None:
        if held.size <= capacity:
            return None
        return torch.arange(held.size - capacity, held.size, device=held.key.device).expand(held.key.shape[0], -1)

    def ring(self, store: SlotStore) -> Tensor:
        return store.capacity


def attend_window(query: Tensor, key: Tensor, value: Tensor, scaling: float, past: int, window: int) -> Tensor:
    """Attention of a chunk where each query sees the last `window` keys, its own included; by blocks of queries.

    Args:
        query: `[1, H, T, D]`. key, value: `[1, G, past + T, D]`, without gaps in their positions.

    Returns:
        `[1, H, T, D]`.
    """
    parts = []
    repeats = query.shape[1] // key.shape[1]
    for start in range(0, query.shape[2], window):
        end = min(start + window, query.shape[2])
        first = max(0, past + start - window + 1)
        rows = torch.arange(past + start, past + end, device=query.device)[:, None]
        columns = torch.arange(first, past + end, device=query.device)
        seen = (columns <= rows) & (columns > rows - window)
        keys, values = (x[:, :, first : past + end].repeat_interleave(repeats, 1) for x in (key, value))
        part = functional.scaled_dot_product_attention(query[:, :, start:end], keys, values, seen, scale=scaling)
        parts.append(part)
    return torch.cat(parts, 2)

"""One reading of a prompt, and one decode batch, for many caches at once.

In a one-shot prompt every token attends to all before it, whatever the policy: eviction comes after. So the prompt's
hidden states, queries, keys and values are the same for all policies and budgets, and one pass of the model can fill
every cache. A decode step is one batch whose rows lie in different caches, one after the other.

    fan = FanOut([h2o_cache, auv_cache])              # caches with `batch` rows each
    with fan.reading([(0, 0), (1, 0), (1, 1)]):       # (cache, row) pairs that this prompt goes to
        model(ids, past_key_values=fan, ...)
    model(tokens, past_key_values=fan, ...)           # rows: h2o's, then auv's
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from auvsum.cache.cache import BudgetedCache, LayerCache, UncountedLayer
from auvsum.cache.heads import HeadsCache, HeadsLayer
from auvsum.cache.sliding import attend_window
from auvsum.cache.windows import WindowLayer
from auvsum.errors import PolicyError
from auvsum.kernels.column_scores import ChunkAttention, attend_chunk


class FanOut(Cache):  # type: ignore[misc]
    """Several caches behind one `past_key_values`.

    Args:
        caches: each made with its number of rows (`batch=`); their rows follow each other in a decode batch.
    """

    def __init__(self, caches: Sequence[BudgetedCache | HeadsCache]) -> None:
        super().__init__(layers=[_FanLayer(members) for members in zip(*(c.layers for c in caches), strict=True)])

    @contextmanager
    def reading(self, rows: Iterable[tuple[int, int]]) -> Iterator[None]:
        """Within: the model is called with a whole prompt, batch 1, which goes to these (cache, row) pairs."""
        targets = list(rows)
        for layer in self.layers:
            layer.targets = targets
        try:
            yield
        finally:
            for layer in self.layers:
                layer.targets = None


class _FanLayer(UncountedLayer):
    """One layer of all caches."""

    def __init__(self, members: Sequence[LayerCache | HeadsLayer | WindowLayer]) -> None:
        super().__init__()
        self.members = list(members)
        self.targets: list[tuple[int, int]] | None = None
        self.window = self.members[0].window

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Links the new keys to this layer; the members take theirs in `attend`."""
        self.is_initialized = True
        key_states.auvsum_layer = self  # type: ignore[attr-defined]
        return key_states, value_states

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, tokens: Tensor | None) -> Tensor:
        """A prompt for the targets, or one decode step of every member's rows: `[B, T, H, D]`.

        Raises:
            PolicyError: padding, of which there is none here.
        """
        if tokens is not None:
            raise PolicyError("a fan-out takes no attention mask", "read prompts one at a time, without padding")
        if self.targets is not None:
            return self._read(self.targets, query, key, value, scale)
        parts, start = [], 0
        for member in self.members:
            rows = slice(start, start + member.row_count)
            start = rows.stop
            key_rows, value_rows = member.update(key[rows], value[rows])
            parts.append(member.attend(query[rows], key_rows, value_rows, scale, None))
        return torch.cat(parts)

    def _read(self, targets: list[tuple[int, int]], query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        if self.window is not None:
            for number, row in targets:
                self.members[number].take(row, key, value, None)
            return attend_window(query, key, value, scale, 0, self.window).transpose(1, 2)
        out, seen = attend_chunk(query, key, value, scale, 0)
        shared = _Shared(**{f.name: getattr(seen, f.name) for f in fields(ChunkAttention)}, seen=seen)
        for number, row in targets:
            self.members[number].take(row, key, value, shared)
        return out.transpose(1, 2)


@dataclass(frozen=True)
class _Shared(ChunkAttention):
    """Remembers the column sums that one policy or row has asked for: the next that asks for them gets a copy."""

    seen: ChunkAttention
    known: list[tuple[Tensor | None, float, Tensor]] = field(default_factory=list)

    def last_rows(self, count: int) -> Tensor:
        return self.seen.last_rows(count)

    def column_sums(self, weights: Tensor | None = None, power: float = 1.0) -> Tensor:
        for asked, exponent, total in self.known:
            same = weights is asked or (weights is not None and asked is not None and torch.equal(weights, asked))
            if same and exponent == power:
                return total.clone()
        total = self.seen.column_sums(weights, power)
        self.known.append((weights, power, total))
        return total.clone()

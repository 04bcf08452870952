"""Layers with a sliding window in a cache whose other layers rank their tokens (`cache/heads.py`).

Such a layer holds its window exactly, as in any cache. Until its row is settled it holds the prompt's end as it is, and
a second look at the prompt sees that end and leaves it as it was: what looks is forgotten behind each call, or, for a
draft, with the last. The prompt's own last tokens may be read again, too: therefore a little more than a window is held
until then.

Shapes: G KV heads, D head size, m tokens of a prompt's end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from auvsum.cache.cache import LayerCache
from auvsum.cache.ragged import Writing
from auvsum.cache.sliding import SlidingWindow, attend_window
from auvsum.cache.store import Held


class WindowLayer(LayerCache):
    """A sliding layer of a `HeadsCache`.

    Args:
        window: tokens that a query sees, its own included. writing: which rows have been settled.
        again: how many of a prompt's last tokens may be read once more.
    """

    def __init__(self, window: int, writing: Writing, again: int) -> None:
        super().__init__(SlidingWindow(window), window, len(writing.active))
        self.writing, self.again, self.size = writing, again, window
        #: Ends of prompts by row, keys and values `[1, G, m, D]`.
        self.ends: dict[int, tuple[Tensor, Tensor]] = {}
        #: What those that look see beside their own call, `[1, G, m, D]` too; None while nobody looks.
        self.seen: tuple[Tensor, Tensor] | None = None
        self.drafts = False
        self.transient = 0

    @property
    def reads(self) -> bool:
        """Whether a call is about a row that has not been settled."""
        return self.row is not None and not self.writing.width[self.row]

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **more: object) -> tuple[Tensor, Tensor]:
        if not self.reads:
            return super().update(key_states, value_states, *args, **more)
        key_states.auvsum_layer = self  # type: ignore[attr-defined]
        return key_states, value_states

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, tokens: Tensor | None) -> Tensor:
        if not self.reads:
            return super().attend(query, key, value, scale, tokens)
        assert self.row is not None
        before = self.ends.get(self.row) if self.seen is None else self.seen
        keys, values = key, value
        if before is not None:
            keys, values = torch.cat([before[0], key], 2), torch.cat([before[1], value], 2)
        out = attend_window(query, keys, values, scale, keys.shape[2] - key.shape[2], self.size)
        if self.seen is None:
            self.ends[self.row] = self._end(keys).clone(), self._end(values).clone()
        elif self.drafts:
            self.seen = keys, values
        self.transient = max(self.transient, keys.nbytes + values.nbytes)
        return out.transpose(1, 2)

    def take(self, row: int, key: Tensor, value: Tensor, _seen: object) -> None:
        """A whole prompt `[1, G, n, D]` that was attended to elsewhere; it is shared, not copied."""
        self.ends[row] = self._end(key), self._end(value)

    def _end(self, states: Tensor) -> Tensor:
        """What may be seen yet of a prompt's keys or values."""
        return states[:, :, -(self.size - 1 + self.again) :]

    def look(self, row: int, *, drafts: bool, again: int) -> None:
        """From now on calls see a row's end without being held.

        Args:
            drafts: each sees those before it. again: the prompt's last tokens, which it sees only where they are read.
        """
        self.row, self.drafts = row, drafts
        key, value = self.ends[row]
        self.seen = key[:, :, : key.shape[2] - again], value[:, :, : value.shape[2] - again]

    def look_away(self) -> None:
        """What looked is forgotten."""
        self.row, self.seen, self.drafts = None, None, False

    def close(self, row: int, tokens: int) -> None:
        """The end of a prompt of that many tokens goes into the row's slots: its last window."""
        key, value = (states[0, :, -self.size :] for states in self.ends.pop(row))
        if self._store is None:
            self.lazy_initialization(key[None], value[None])
        store = self.store
        self.unread.discard(row)
        store.clear(row)
        self.longest[row] = tokens
        self.settle(row, tokens)
        held = key.shape[1]
        positions = torch.arange(tokens - held, tokens, dtype=torch.int32, device=key.device).expand(key.shape[0], -1)
        store.fill(row, Held(key, value, positions, {}, tokens), None)

    def clear(self, row: int) -> None:
        """Frees the end of a row's prompt; its slots stay for the next."""
        self.ends.pop(row, None)

    def reset(self) -> None:
        super().reset()
        self.ends.clear()

    def row_bytes(self, row: int) -> int:
        """Bytes that a row has allocated in this layer."""
        end = sum(x.untyped_storage().nbytes() for x in self.ends.get(row, ()))
        return end + self.bytes // len(self.writing.active)

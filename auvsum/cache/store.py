"""SlotStore: the memory of one layer. A fixed block of slots per sequence that never grows and never moves.

Every slot knows its position, its validity and (through the store's codec) how its key and value are encoded; every
row of a batch has its own capacity, pointer and count of tokens seen; every layer has a store of its own, so the number
of slots may differ from layer to layer. A policy decides which slot a token takes; only this file touches memory.

Shapes: B rows (sequences), G KV heads, S slots (+ 1 for the reconstructed K(V), physically last, outside the pointer
arithmetic), D head size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from auvsum.cache.codec import Codec
from auvsum.cache.rotary import Rotary

_NO_POSITION = -1


def _nothing() -> None:
    pass


@dataclass
class Held:
    """What one row held before a chunk, plus the chunk: the candidates among which a policy chooses. By position.

    Attributes:
        key, value: `[G, C, D]`. positions: int32 `[G, C]`.
        state: the policy's per-token state by name, fp32 `[G, C]`; a policy updates it in place.
        chunk: how many of the columns, the last ones, are new.
    """

    key: Tensor
    value: Tensor
    positions: Tensor
    state: dict[str, Tensor]
    chunk: int

    @property
    def size(self) -> int:
        """C, the number of candidates."""
        return self.positions.shape[1]


@dataclass
class Counts:
    """What the host knows of a row without asking the device, while its prompt is read.

    Attributes:
        epoch: `live` and `seen` hold while it is the store's: decoding changes them on the device alone.
    """

    capacity: int
    live: int = 0
    seen: int = 0
    longest: float = 0.0
    folded: bool = False
    epoch: int = 0


class SlotStore:
    """One layer's slots for a batch of sequences.

    Args:
        batch: rows. kv_heads: G. slots: S, without the reconstructed slot. head_dim: D.
        state: names of the policy's fp32 values per slot.
        reconstruct: whether evicted tokens are folded into a reconstructed K(V) (eqs. 7, 8).
        codec: how keys and values are kept; None keeps them in `dtype`.
        layer: which layer of the model this is, for policies that draw at random.
    """

    def __init__(
        self,
        *,
        batch: int,
        kv_heads: int,
        slots: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        state: Sequence[str] = (),
        reconstruct: bool = False,
        codec: Codec | None = None,
        layer: int = 0,
    ) -> None:
        self.layer = layer
        self.slots = slots
        self.reconstruct = reconstruct
        self.dtype = dtype
        self.head_dim = head_dim
        shape = (batch, kv_heads, slots + reconstruct)
        self.codec = codec or Codec(dtype)
        self.keys = self.codec.allocate(shape, head_dim, device)
        self.values = self.codec.allocate(shape, head_dim, device)
        self.positions = torch.full(shape, _NO_POSITION, dtype=torch.int32, device=device)
        self.valid = torch.zeros(shape, dtype=torch.bool, device=device)
        self._state = {name: torch.zeros(shape, dtype=torch.float32, device=device) for name in state}
        #: Brings `state` up to date, where books are kept for several steps at once.
        self.catch_up: Callable[[], None] = _nothing
        # Per row. `granted` is its budget in slots a layer, on average over the layers; `capacity` its own number of
        # slots here (<= S), `pointer` where its next token goes, `seen` how many tokens it has read, `longest` the
        # constant N_max of eq. 2.
        self.granted = torch.full((batch,), slots, dtype=torch.int64, device=device)
        self.capacity = torch.full((batch,), slots, dtype=torch.int64, device=device)
        self.pointer = torch.zeros(batch, dtype=torch.int64, device=device)
        self.seen = torch.zeros(batch, dtype=torch.int64, device=device)
        self.longest = torch.zeros(batch, dtype=torch.float32, device=device)
        self.active = torch.ones(batch, dtype=torch.bool, device=device)
        if reconstruct:
            # r̄ and SES of eqs. 7 and 8, exact; slot S holds the copy that attention reads.
            self.folded_key = torch.zeros((batch, kv_heads, head_dim), dtype=torch.float32, device=device)
            self.folded_value = torch.zeros_like(self.folded_key)
            self.folded_mass = torch.zeros((batch, kv_heads), dtype=torch.float32, device=device)
        self.epoch = 0
        self.counts = [Counts(slots) for _ in range(batch)]
        self._rows = torch.arange(batch, device=device)[:, None]
        self._heads = torch.arange(kv_heads, device=device)[None]

    @property
    def state(self) -> dict[str, Tensor]:
        """The policy's values by name, fp32 `[B, G, S (+ 1)]`."""
        self.catch_up()
        return self._state

    def part(self, start: int, rows: int, layer: int) -> SlotStore:
        """A store over some of the rows, in the same memory: the layer's own when several share one."""
        part, chosen = copy.copy(self), slice(start, start + rows)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(part, name, value[chosen])
        part.keys, part.values = ([tensor[chosen] for tensor in memory] for memory in (self.keys, self.values))
        part._state = {name: values[chosen] for name, values in self._state.items()}
        part.counts = [Counts(self.slots) for _ in range(rows)]
        part._rows, part._heads = self._rows[:rows], self._heads.clone()
        part.layer = layer
        return part

    # -- whole rows ---------------------------------------------------------------------------------------------------

    def clear(self, row: int, capacity: int | None = None, *, lazily: bool = False) -> None:
        """Empties a row for the next document; no memory is given back or taken.

        Args:
            capacity: the row's own number of slots; default all of them.
            lazily: only note it: `kernels/squeeze.py` overwrites the row before anybody reads it.
        """
        if capacity is not None and not 0 < capacity <= self.slots:
            raise ValueError(f"a row of {capacity} slots does not fit a store of {self.slots}")
        self.catch_up()
        self.counts[row] = Counts(capacity or self.slots, epoch=self.epoch)
        if lazily:
            return
        self.positions[row] = _NO_POSITION
        self.valid[row] = False
        for values in self.state.values():
            values[row] = 0
        self.capacity[row].fill_(capacity or self.slots)
        self.pointer[row].fill_(0)
        self.seen[row].fill_(0)
        self.active[row].fill_(True)
        if self.reconstruct:
            self.folded_key[row] = 0
            self.folded_value[row] = 0
            self.folded_mass[row].fill_(0)

    def aim(self, row: int, longest: float) -> None:
        """Sets a row's N_max."""
        # `fill_`: assigning a number would wait for the GPU.
        self.longest[row].fill_(longest)
        self.counts[row].longest = longest

    def grant(self, row: int, granted: int, capacity: int) -> None:
        """Sets a row's budget: slots a layer on average over the layers, and its own number of slots here."""
        self.granted[row].fill_(granted)
        self.capacity[row].fill_(capacity)
        self.counts[row].capacity = capacity

    def live(self, row: int) -> int:
        """Live slots of a row, without the reconstructed one (the same for every head)."""
        known = self.counts[row]
        if known.epoch == self.epoch:
            return known.live
        return int(self.valid[row, 0, : self.slots].sum())

    def hold(self, row: int, key: Tensor, value: Tensor) -> Held:
        """What the row holds, ordered by position, followed by a chunk's keys and values `[G, T, D]`."""
        self.catch_up()
        groups, chunk, _ = key.shape
        live = self.live(row)
        known = self.counts[row]
        seen = known.seen if known.epoch == self.epoch else int(self.seen[row])
        fresh = torch.arange(seen, seen + chunk, dtype=torch.int32, device=key.device).expand(groups, chunk)
        if live == 0:
            state = {name: values.new_zeros((groups, chunk)) for name, values in self.state.items()}
            return Held(key, value, fresh, state, chunk)
        # `fill` leaves a row in order of position; only decoding mixes it.
        held = slice(0, live) if known.epoch == self.epoch else self._by_position(row, live)
        heads = slice(None) if isinstance(held, slice) else self._heads[0][:, None]
        old_key, old_value = (self.codec.decode(memory, (row, heads, held)) for memory in (self.keys, self.values))
        state = {
            name: torch.cat([values[row, heads, held], values.new_zeros((groups, chunk))], 1)
            for name, values in self.state.items()
        }
        positions = torch.cat([self.positions[row, heads, held], fresh], 1)
        return Held(torch.cat([old_key, key], 1), torch.cat([old_value, value], 1), positions, state, chunk)

    def fill(self, row: int, held: Held, keep: Tensor | None) -> None:
        """Replaces a row's content by the kept candidates, from slot 0 on, and points behind them.

        Args:
            keep: int64 `[G, kept]`, columns of `held`; None keeps all.
        """
        kept = held.size if keep is None else keep.shape[1]
        known = self.counts[row]
        if kept > known.capacity:
            raise ValueError(f"{kept} tokens do not fit {known.capacity} slots")
        key, value = held.key, held.value
        if keep is not None:
            pick = keep[..., None].expand(-1, -1, key.shape[-1])
            key, value = key.gather(1, pick), value.gather(1, pick)
        self.codec.encode(self.keys, (row, slice(None), slice(0, kept)), key)
        self.codec.encode(self.values, (row, slice(None), slice(0, kept)), value)
        self.positions[row, :, kept : self.slots] = _NO_POSITION
        self.positions[row, :, :kept] = held.positions if keep is None else held.positions.gather(1, keep)
        self.valid[row, :, : self.slots] = self.positions[row, :, : self.slots] >= 0
        for name, values in self.state.items():
            values[row, :, :kept] = held.state[name] if keep is None else held.state[name].gather(1, keep)
        self.pointer[row].fill_(kept)
        self.seen[row] += held.chunk
        if known.epoch == self.epoch:
            known.live, known.seen = kept, known.seen + held.chunk

    def copy_rows(self, count: int) -> None:
        """The first `count` rows again as the `count` rows behind them."""
        self.catch_up()
        tensors = [value for name, value in vars(self).items() if isinstance(value, Tensor) and name[0] != "_"]
        for tensor in (*tensors, *self.keys, *self.values, *self.state.values()):
            tensor[count : 2 * count] = tensor[:count]
        for row in range(count):
            self.counts[count + row] = copy.copy(self.counts[row])

    def turn(self, row: int, rotary: Rotary, position: int) -> None:
        """Turns a row's un-turned keys to the positions just before `position`, in their order."""
        self.catch_up()
        live = self.live(row)
        order = self._by_position(row, live)
        places = torch.zeros_like(self.positions[row])
        ranks = torch.arange(position - live, position, dtype=places.dtype, device=places.device)
        places.scatter_(1, order, ranks.expand_as(order))
        if self.reconstruct:
            places[:, self.slots] = position - 1 - live // 2
            self.folded_key[row] = rotary.turn(self.folded_key[row][:, None], places[:, self.slots :])[:, 0]
        self.codec.encode(self.keys, (row,), rotary.turn(self.codec.decode(self.keys, row), places))

    # -- one token a row ----------------------------------------------------------------------------------------------

    def append(self, at: Tensor, key: Tensor, value: Tensor) -> None:
        """Writes each row's new token `[B, G, D]` into slot `at` `[B, G]`, with fresh state."""
        self.enter(at)
        self.write(at, key, value)

    def write(self, at: Tensor | int, key: Tensor, value: Tensor) -> None:
        """The vectors of `append`; `at` may be the one slot of all heads and rows."""
        where = (slice(None), slice(None), at) if isinstance(at, int) else (self._rows, self._heads, at)
        self.codec.encode(self.keys, where, key)
        self.codec.encode(self.values, where, value)

    def enter(self, at: Tensor) -> None:
        """All of `append` but the vectors."""
        # `scatter_`: assigning a number by index would wait for the GPU.
        where = at[..., None]
        self.positions.scatter_(2, where, self.seen[:, None, None].to(torch.int32).expand_as(where))
        self.valid.scatter_(2, where, True)
        for values in self._state.values():  # not caught up: nothing that waits is about these slots
            values.scatter_(2, where, 0.0)
        self.seen += self.active
        self.decoded()

    def decoded(self) -> None:
        """Notes that rows have changed on the device."""
        self.epoch += 1

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values as attention needs them, `[B, G, S (+ 1), D]`; dead slots hold anything."""
        return self.codec.decode(self.keys), self.codec.decode(self.values)

    def move(self, row: int | Tensor, source: Tensor, target: Tensor) -> None:
        """Scatter filling (§3.4): tokens of slots `source` go, with all their state, to slots `target`, both `[G, m]`.

        The emptied slots become dead; the tensors stay where they are.

        Args:
            row: or several, int64 `[N]`; then the slots are `[N, G, m]`.
        """
        heads = self._heads[0][:, None]
        rows = row[:, None, None] if isinstance(row, Tensor) else row
        to, origin = (rows, heads, target), (rows, heads, source)
        for memory in (self.keys, self.values):
            self.codec.encode(memory, to, self.codec.decode(memory, origin))
        self.positions[to] = self.positions[origin]
        self.positions[origin] = _NO_POSITION
        self.valid[origin] = False
        for values in self.state.values():
            values[to] = values[origin]
            values[origin] = 0

    def drop(self, gone: Tensor) -> None:
        """Kills the slots where `gone` `[B, G, S]` is True, as many in each head of a row."""
        self.positions[..., : self.slots].masked_fill_(gone, _NO_POSITION)
        self.valid[..., : self.slots].masked_fill_(gone, False)
        for values in self.state.values():
            values[..., : self.slots].masked_fill_(gone, 0.0)
        self.decoded()

    # -- reconstructed K(V) -------------------------------------------------------------------------------------------

    def fold(self, row: int | Tensor, key: Tensor, value: Tensor, scores: Tensor) -> None:
        """Folds evicted tokens into the reconstructed K(V), eqs. 7 and 8, in fp32.

        Args:
            row: or several, int64 `[N]`; then the rest begins with `N` too.
            key, value: `[G, m, D]`. scores: their AES `[G, m]`; a zero takes no part.
        """
        for number in row.tolist() if isinstance(row, Tensor) else [row]:
            self.counts[number].folded = True
        before = self.folded_mass[row]
        mass = before + scores.sum(-1)
        # While the sum is 0 the slot stays zero and masked: no 0/0.
        divisor = torch.where(mass > 0, mass, 1.0)[..., None]
        for folded, tokens in ((self.folded_key, key), (self.folded_value, value)):
            total = folded[row] * before[..., None] + (scores[..., None, :] @ tokens.float())[..., 0, :]
            folded[row] = total / divisor
        self.folded_mass[row] = mass
        last = (row, slice(None), self.slots)
        self.codec.encode(self.keys, last, self.folded_key[row])
        self.codec.encode(self.values, last, self.folded_value[row])
        self.valid[last] = mass > 0

    def reconstructed(self, row: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """The row's reconstructed key and value as attention reads them, `[G, 1, D]`, and its validity `[G, 1]`.

        None while nothing has been folded.
        """
        known = self.counts[row]
        if not self.reconstruct or not (known.folded or known.epoch != self.epoch):
            return None
        last = (row, slice(None), slice(self.slots, self.slots + 1))
        return self.codec.decode(self.keys, last), self.codec.decode(self.values, last), self.valid[last]

    # -- looking in from outside --------------------------------------------------------------------------------------

    def bytes(self) -> int:
        """Bytes of every tensor of this store, which are views where layers share one memory; no query waits then."""
        self.catch_up()
        tensors: list[Tensor] = [*self.keys, *self.values]
        for value in vars(self).values():
            tensors += [value] if isinstance(value, Tensor) else list(value.values()) if isinstance(value, dict) else []
        return sum(tensor.nbytes for tensor in tensors)

    def snapshot(self, row: int, head: int) -> dict[str, Any]:
        """What one head of one row holds, by position; for tests and `auvsum inspect`."""
        live = self.live(row)
        order = self._by_position(row, live)[head]
        folded = None
        if self.reconstruct and bool(self.valid[row, head, self.slots]):
            folded = {
                "key": self.folded_key[row, head],
                "value": self.folded_value[row, head],
                "mass": float(self.folded_mass[row, head]),
            }
        return {
            "positions": self.positions[row, head, order].tolist(),
            "pointer": int(self.pointer[row]),
            "state": {name: values[row, head, order].tolist() for name, values in self.state.items()},
            "keys": self.codec.decode(self.keys, row)[head, order],
            "values": self.codec.decode(self.values, row)[head, order],
            "reconstructed": folded,
        }

    def _by_position(self, row: int, live: int) -> Tensor:
        """The row's live slots ordered by position: int64 `[G, live]`."""
        positions = self.positions[row, :, : self.slots]
        last = torch.iinfo(torch.int32).max
        return positions.masked_fill(~self.valid[row, :, : self.slots], last).argsort(-1)[:, :live]

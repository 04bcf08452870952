"""Memory in which every KV head of every row has its own number of slots, and what its layers share while they write.

`Slots` is one layer's memory for all rows that write: their candidates lie one after the other, with no room between
them, and a step reads them padded to the longest head. `Writing` is the host's knowledge of the write regions: it plans
a step once for all layers, so that nothing is asked of the device.

Shapes: M rows that write, G KV heads, D head size, N slots of a layer over its rows and heads, V tokens of the rows'
write regions together, T tokens that arrive (one in decoding).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

#: In how small units sums of attention are kept: fp16 has 11 bits from 6e-5 to 65504, and what matters is small.
_AAS_UNITS = 256
#: The most that a sum is taken for.
_AAS_MOST = 65504
#: How many positions a slot's word tells beside its tier; behind them a slot needs another byte.
NARROW = 1 << 15


def kept_sums(paid: Tensor) -> Tensor:
    """Sums of attention as slots keep them, fp16."""
    return (paid.float() * _AAS_UNITS).clamp_(max=_AAS_MOST).half()


def add_to_sums(sums: Tensor, index: Tensor, paid: Tensor) -> None:
    """Adds attention to the kept sums `[N]` of the slots `index`, where a slot may come more than once."""
    sums.index_add_(0, index, kept_sums(paid)).clamp_(max=_AAS_MOST)


def read_sums(sums: Tensor) -> Tensor:
    """What `kept_sums` kept, fp32."""
    return sums.float() / _AAS_UNITS


def words_of(position: Tensor, fine: Tensor, sizes: Sequence[int], wide: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """`words` and `high` of `Slots` that hold the tokens `position`, int64 `[N]`, of which `fine`, bool `[N]`, are in
    the finer codec."""
    words = (position % NARROW * 2 + fine).to(torch.int32).to(torch.int16)
    high = position[_in_wide_rows(sizes, wide, position.device)] // NARROW if any(wide) else position[:0]
    return words, high.to(torch.uint8)


def _in_wide_rows(sizes: Sequence[int], wide: Sequence[bool], device: torch.device) -> Tensor:
    """Which slots have high bits, bool `[N]`."""
    return torch.cat([torch.full((size,), own) for size, own in zip(sizes, wide, strict=True)]).to(device)


@dataclass
class Slots:
    """The candidates and write regions of M rows in one layer: row after row, in a row head after head.

    Attributes:
        keys, values: as `Tiers` keeps them, N vectors. words: twice the lowest 15 bits of a token's position, one
            more if it is in the finer codec, int16 `[N]`. high: the other bits of the position, uint8, of the slots of
            wide rows alone. aas: attention paid to each, see `kept_sums`, fp16 `[N]`.
        starts: where each head's begin, and N: int64 `[M * G + 1]`.
        write_keys, write_values: the rows' write regions, as the codec keeps them, first dimensions `[V, G]`.
        write_aas: fp32 `[V, G]`.
        sizes, fines, longest, wide, room: for each row its candidates, those in the finer codec, the most of a head,
            whether its slots have high bits, and the bytes that all of them may take.
        widths: tokens of each row's write region, V together.
    """

    keys: list[Tensor]
    values: list[Tensor]
    words: Tensor
    high: Tensor
    aas: Tensor
    starts: Tensor
    write_keys: list[Tensor]
    write_values: list[Tensor]
    write_aas: Tensor
    sizes: list[int]
    fines: list[int]
    longest: list[int]
    wide: list[bool]
    room: list[int]
    widths: list[int]
    #: How many of the tensors of `keys` are the finer codec's.
    parts: int
    unpacked: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    @property
    def positions(self) -> Tensor:
        """Of the tokens, int64 `[N]`."""
        found = (self.words.long() & 0xFFFF) >> 1
        if len(self.high):
            found[_in_wide_rows(self.sizes, self.wide, found.device)] += self.high.long() * NARROW
        return found

    @property
    def fine(self) -> Tensor:
        """Which are in the finer codec, bool `[N]`."""
        return (self.words & 1).bool()

    @property
    def groups(self) -> int:
        """KV heads."""
        return self.write_aas.shape[1]

    def row_bytes(self, row: int) -> int:
        """A row's part of the memory."""
        slots = (*self.keys, *self.values, self.high, self.words, self.aas)
        written = (*self.write_keys, *self.write_values, self.write_aas)
        write = sum(x.nbytes for x in written) // self.write_aas.shape[0]
        held = sum(x[part].nbytes for x, part in zip(slots, self._parts(row), strict=True))
        return held + write * self.widths[row] + self.starts.element_size() * (self.groups + 1)

    def _parts(self, row: int) -> list[slice]:
        """Where a row's slots lie in each of keys and values, and in the high bits, words and sums."""
        ends = [sum(self.sizes[: row + more]) for more in (0, 1)]
        fine = [sum(self.fines[: row + more]) for more in (0, 1)]
        coarse = slice(ends[0] - fine[0], ends[1] - fine[1])
        # Tensors of the finer codec come first; where there is one codec alone, all slots are in it.
        found = [slice(*fine) if number < self.parts else coarse for number in range(len(self.keys))]
        wide = [size * own for size, own in zip(self.sizes, self.wide, strict=True)]
        high = slice(sum(wide[:row]), sum(wide[: row + 1]))
        return [*found, *found, high, slice(*ends), slice(*ends)]

    def cut(self, row: int) -> Slots:
        """One row of it, in the same memory."""
        start, groups = sum(self.sizes[:row]), self.groups
        first = sum(self.widths[:row])
        written = slice(first, first + self.widths[row])
        slots = (*self.keys, *self.values, self.high, self.words, self.aas)
        own = [x[part] for x, part in zip(slots, self._parts(row), strict=True)]
        count = len(self.keys)
        return Slots(
            keys=own[:count],
            values=own[count : 2 * count],
            high=own[-3],
            words=own[-2],
            aas=own[-1],
            starts=self.starts[row * groups : (row + 1) * groups + 1] - start,
            write_keys=[x[written] for x in self.write_keys],
            write_values=[x[written] for x in self.write_values],
            write_aas=self.write_aas[written],
            sizes=[self.sizes[row]],
            fines=[self.fines[row]],
            longest=[self.longest[row]],
            wide=[self.wide[row]],
            room=[self.room[row]],
            widths=[self.widths[row]],
            parts=self.parts,
        )

    @staticmethod
    def join(rows: Sequence[Slots]) -> Slots:
        """Several rows in new memory."""
        before = accumulate((row.sizes[0] for row in rows), initial=0)
        starts = [row.starts[:-1] + size for row, size in zip(rows, before, strict=False)]
        starts.append(starts[0].new_full((1,), sum(row.sizes[0] for row in rows)))
        return Slots(
            keys=[torch.cat(parts) for parts in zip(*(row.keys for row in rows), strict=True)],
            values=[torch.cat(parts) for parts in zip(*(row.values for row in rows), strict=True)],
            words=torch.cat([row.words for row in rows]),
            high=torch.cat([row.high for row in rows]),
            aas=torch.cat([row.aas for row in rows]),
            starts=torch.cat(starts),
            write_keys=[torch.cat(parts) for parts in zip(*(row.write_keys for row in rows), strict=True)],
            write_values=[torch.cat(parts) for parts in zip(*(row.write_values for row in rows), strict=True)],
            write_aas=torch.cat([row.write_aas for row in rows]),
            sizes=[row.sizes[0] for row in rows],
            fines=[row.fines[0] for row in rows],
            longest=[row.longest[0] for row in rows],
            wide=[row.wide[0] for row in rows],
            room=[row.room[0] for row in rows],
            widths=[row.widths[0] for row in rows],
            parts=rows[0].parts,
        )

    def padded(self) -> tuple[Tensor, Tensor]:
        """Which slots each head has, as `[M, G, longest]` indices, and which of them are only padding."""
        begin = self.starts[:-1].view(-1, self.groups, 1)
        steps = torch.arange(max(self.longest), device=begin.device)
        index = (begin + steps).clamp_(max=self.words.shape[0] - 1)
        return index, steps >= self.starts.diff().view_as(begin)


class Writing:
    """What all layers share: how far each row has written. A step is planned before its first layer.

    Attributes (one number a row):
        width: tokens of its write region; 0 while the row has not been settled. written: tokens in it.
        first: position of the region's first token. since: tokens written since the prompt was settled.
        active: whether the row takes part.

    Attributes (of the step, for the rows that take part):
        at: where the arriving tokens go in `[V]`. region: what a row has written, `[M, longest]`. Slices for one row.
        later: bool `[M, T, longest]`, what a token must not see; None where there is nothing of the kind.
        due: rows whose region is full then, by their number among those that take part, and how many tokens leave it.
        flush: the tokens that leave, as indices into `[V]`; flush_rows, flush_positions: whose and which they are.
        shift: where what stays is found, `[V]`; emptied: what then is free. ends: all tokens of each row.
        reach: `[3, M]`, prompt length, tokens written since then, and all tokens.
    """

    at: slice | Tensor
    region: slice | Tensor
    later: Tensor | None
    flush: Tensor
    flush_rows: Tensor
    flush_positions: Tensor
    shift: Tensor
    emptied: Tensor
    ends: list[int]
    reach: Tensor

    def __init__(self, rows: int) -> None:
        self.width, self.written, self.first, self.since = ([0] * rows for _ in range(4))
        self.active = [True] * rows
        self.rows: list[int] = []
        self.due: dict[int, int] = {}

    def start(self, row: int, width: int, first: int) -> None:
        """A settled row begins to write."""
        self.width[row], self.first[row], self.written[row], self.since[row] = width, first, 0, 0

    def copy_rows(self, count: int) -> None:
        """The first rows again as the rows behind them."""
        for numbers in (self.width, self.written, self.first, self.since):
            numbers[count : 2 * count] = numbers[:count]
        self.active[count : 2 * count] = self.active[:count]

    def taking_part(self) -> list[int]:
        """Rows that have something to write."""
        return [row for row, width in enumerate(self.width) if width and self.active[row]]

    def plan(self, rows: list[int], tokens: int, device: torch.device) -> None:
        """These rows take so many tokens each."""
        self.rows = rows
        begins = list(accumulate((self.width[row] for row in rows), initial=0))
        before = [self.written[row] for row in rows]
        longest = max(before) + tokens
        if len(rows) == 1:
            self.at, self.region = slice(before[0], longest), slice(0, longest)
        else:
            places = torch.tensor([begins[:-1], before], device=device)
            steps = torch.arange(longest, device=device)
            self.at = (places.sum(0)[:, None] + steps[:tokens]).view(-1)
            self.region = (places[0][:, None] + steps).clamp_(max=begins[-1] - 1)
        self.later = None
        if len(rows) > 1 or tokens > 1:
            last = torch.tensor(before, device=device)[:, None, None] + torch.arange(tokens, device=device)[:, None]
            self.later = torch.arange(longest, device=device) > last
        for row in rows:
            self.written[row] += tokens
            self.since[row] += tokens
        full = [(number, row) for number, row in enumerate(rows) if self.written[row] == self.width[row]]
        self.due = {number: self.written[row] - self.written[row] // 2 for number, row in full}
        if self.due:
            self._plan_flush(begins, device)

    def _plan_flush(self, begins: list[int], device: torch.device) -> None:
        flush: list[tuple[int, int, int]] = []
        shift, emptied = list(range(begins[-1])), [False] * begins[-1]
        for number, leaving in self.due.items():
            row, begin = self.rows[number], begins[number]
            flush += [(begin + i, number, self.first[row] + i) for i in range(leaving)]
            rest = self.written[row] - leaving
            shift[begin : begin + rest] = range(begin + leaving, begin + leaving + rest)
            emptied[begin + rest : begins[number + 1]] = [True] * (self.width[row] - rest)
        self.flush, self.flush_rows, positions = torch.tensor(flush, device=device).unbind(1)
        self.flush_positions = positions.to(torch.int32)
        self.shift, self.emptied = torch.tensor(shift, device=device), torch.tensor(emptied, device=device)
        self.ends = [self.first[row] + self.written[row] for row in self.rows]
        since = [self.since[row] for row in self.rows]
        prompts = [end - count for end, count in zip(self.ends, since, strict=True)]
        self.reach = torch.tensor([prompts, since, self.ends], device=device)

    def finish(self) -> None:
        """Behind the last layer: what was due has left the write regions."""
        for number, leaving in self.due.items():
            row = self.rows[number]
            self.written[row] -= leaving
            self.first[row] += leaving
        self.due = {}

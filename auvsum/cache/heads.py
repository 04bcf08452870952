"""HeadsCache: a KV cache in which every KV head of every layer has its own number of slots.

A prompt is read with everything held (`open` rows); `look` collects what further queries attend to; `settle` ranks the
tokens of all layers and heads at once, keeps the best of each, in few bits if so wished, and frees the rest. While a
row writes, new tokens gather in a write region in the model's type; when it is full, the layer's least tokens go.

    cache = HeadsCache(model.config, AUVLook(), slots=200, bits=4)
    cache.begin(len(ids), row=0)
    with cache.reading(0):
        model(ids, past_key_values=cache, ...)
    cache.settle(0, second_look(model, cache, 0, ids, document=(start, end), first=token))
    model(token, position_ids=..., past_key_values=cache, ...)

Layers with a sliding window hold it as it is (`cache/windows.py`); "all layers" are the others, which rank.

Shapes: M rows that write, G KV heads, D head size, n prompt tokens, N slots of a layer over rows and heads, V tokens
of its write regions together, T tokens that arrive (one in decoding).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from auvsum.cache.cache import UncountedLayer, reading
from auvsum.cache.codec import Codec, EvenCodec, Metric, Tiers, make_codec
from auvsum.cache.head_profiles import find_profile
from auvsum.cache.policies.auv_look import AUVLook
from auvsum.cache.ragged import NARROW, Slots, Writing, add_to_sums, kept_sums, read_sums, words_of
from auvsum.cache.rotary import Rotary
from auvsum.cache.sliding import layer_windows
from auvsum.cache.tiered import bits_of_the_newest
from auvsum.cache.windows import WindowLayer
from auvsum.errors import PolicyError
from auvsum.kernels.column_scores import attend_chunk, attend_token

#: Tokens that look at a prompt in one call.
_LOOK_CHUNK = 512


@dataclass
class Open:
    """A row whose whole prompt is held: keys and values `[G, n, D]` in the model's type."""

    key: Tensor
    value: Tensor


@dataclass
class _Seen:
    """Attention that queries behind an open row paid to its tokens, to the policy's power: sums `[G, n]`, how many
    queries they were, and the sum of their own second moments `[G, D, D]`."""

    total: Tensor
    moments: Tensor
    queries: int = 0


@dataclass
class Look:
    """What a second look found, for one prompt: attention to the policy's power, mean a query `[layers, G, n]`, or None
    where there was none; and second moments of the queries `[layers, G, D, D]`. Shared by rows that read the same
    prompt."""

    looked: Tensor | None
    drafted: Tensor | None
    asked: Tensor | None = None
    moments: Tensor | None = None

    @functools.cached_property
    def metrics(self) -> list[Metric] | None:
        """By what the bits of the prompt's keys are chosen, for each layer."""
        return None if self.moments is None else [Metric(moments) for moments in self.moments]


class HeadsLayer(UncountedLayer):
    """One layer of a `HeadsCache`."""

    window: int | None = None

    def __init__(self, policy: AUVLook, bits: int, writing: Writing, place: tuple[int, int]) -> None:
        super().__init__()
        self.policy, self.bits = policy, bits
        self.writing = writing
        self.number, self.layers = place
        #: What its tokens are worth, those of the prompt and written ones, `[G, 2]`; None for all the same.
        self.factors: Tensor | None = None
        #: By what the bits of written tokens' keys are chosen, for the heads of all layers; None for each channel by
        #: itself.
        self.metric: Metric | None = None
        #: Layers that have to make room in this step, all layers' list.
        self.full: list[HeadsLayer] = []
        #: A prompt that is held whole; a settled row that has not written yet; all rows that write, and which they are.
        self.rows: list[Open | None] = [None] * len(writing.active)
        self.loose: dict[int, Slots] = {}
        self.held: Slots | None = None
        self.members: list[int] = []
        self.row: int | None = None
        self.reads_prompt = False
        self.looks: _Seen | None = None
        self.draft: Open | None = None
        #: How many of an open row's tokens stand before those that look.
        self.before: int | None = None
        #: Of candidates, and of the newest tokens.
        self.codec, self.write_codec = Tiers(Codec(torch.float32), None), Codec(torch.float32)
        #: Of a slot in either tier.
        self.slot_bytes = (0, 0)
        #: For measurements of quality alone: a step need not unpack what has not changed, at the price of its memory.
        self.keeps_unpacked = False
        self.transient = 0

    # -- transformers' side -------------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        size, element = key_states.shape[-1], key_states.element_size()
        self.slot_bytes = self.policy.slot_bytes(size, element, self.bits)
        rest = self.policy.coarse_bits(size, self.bits)
        coarse = None if rest is None else EvenCodec(key_states.dtype, rest)
        self.codec = Tiers(make_codec(key_states.dtype, self.bits), coarse)
        self.write_codec = make_codec(key_states.dtype, bits_of_the_newest(self.bits))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Hands the new keys through with a link to this layer; `attend` takes them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.row is None and key_states.shape[0] != len(self.rows):
            raise PolicyError(
                f"the cache holds {len(self.rows)} sequences, the model was called with {key_states.shape[0]}",
                "beam search and changing batches are not supported: use num_beams=1 and a new cache",
            )
        key_states.auvsum_layer = self  # type: ignore[attr-defined]
        return key_states, value_states

    def reset(self) -> None:
        for row in range(len(self.rows)):
            self.clear(row)

    def reorder_cache(self, beam_idx: Tensor) -> NoReturn:
        raise PolicyError("beam search is not supported by a budgeted cache", "use num_beams=1")

    # -- attention ----------------------------------------------------------------------------------------------------

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, tokens: Tensor | None) -> Tensor:
        """What the attention function does here: `[B, T, H, D]`.

        Raises:
            PolicyError: padding; rows are read one at a time.
        """
        if tokens is not None and not bool(tokens.all()):
            raise PolicyError(f"policy {self.policy.name!r} takes no padding", "read prompts one at a time")
        if self.looks is not None and self.row is not None:
            return self._look(self.looks, self.row, query, key, value, scale)
        if self.row is not None and not self.writing.width[self.row]:
            return self._read(self.row, query, key, value, scale)
        full = self.full
        if self.number == 0:
            full.clear()
            self._plan(query.shape[2], query.device)
        rows = self.writing.rows
        if self.members != rows:
            self._join(rows)
        if len(rows) == query.shape[0]:
            out = self._step(query, key, value, scale)
        else:
            out = torch.zeros_like(query.transpose(1, 2))
            if rows:
                out[rows] = self._step(query[rows], key[rows], value[rows], scale)
        if self.number == self.layers - 1:
            if full:
                _make_room(full)
            full.clear()
            self.writing.finish()
        return out

    def _plan(self, tokens: int, device: torch.device) -> None:
        """Which rows take part in this step, and where their tokens go in all layers."""
        writing = self.writing
        if any(row is not None and writing.active[number] for number, row in enumerate(self.rows)):
            raise PolicyError("the prompt has not been settled", "call cache.settle(row) before writing")
        rows = writing.taking_part()
        if self.row is not None and rows != [self.row]:
            raise PolicyError("one row alone cannot go on among several", "use a cache of one row")
        writing.plan(rows, tokens, device)

    def _join(self, rows: list[int]) -> None:
        """Rows that have been settled, or that wrote before, into one memory; what the others held is freed."""
        parts = [self.loose.pop(row) if row in self.loose else self._cut(row) for row in rows]
        single = len(parts) == 1 and rows[0] not in self.members
        self.held, self.members = (parts[0] if single else Slots.join(parts)) if parts else None, list(rows)

    def _cut(self, row: int) -> Slots:
        assert self.held is not None
        return self.held.cut(self.members.index(row))

    @property
    def row_count(self) -> int:
        """Rows of the batch."""
        return len(self.rows)

    def take(self, row: int, key: Tensor, value: Tensor, _seen: object) -> None:
        """A whole prompt `[1, G, n, D]` that was attended to elsewhere; it is shared, not copied."""
        if not self.is_initialized:
            self.lazy_initialization(key, value)
        self.rows[row] = Open(key[0], value[0])

    def _read(self, row: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """A prompt, or its next chunk: everything is held."""
        before = self.rows[row]
        past = 0
        if isinstance(before, Open):
            past = before.key.shape[1]
            key = torch.cat([before.key[None], key], 2)
            value = torch.cat([before.value[None], value], 2)
        out, _ = attend_chunk(query, key, value, scale, past, power=None)
        self.rows[row] = Open(key[0], value[0])
        return out.transpose(1, 2)

    def _look(self, seen: _Seen, row: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Queries behind an open row, which are not held, or (a draft) only for as long as it is drafted."""
        held = self.rows[row]
        assert isinstance(held, Open)
        size, own_key, own_value = held.key.shape[1], key, value
        past_key, past_value = held.key[None, :, : self.before], held.value[None, :, : self.before]
        if self.draft is not None:
            self.draft.key = torch.cat([self.draft.key, key[0]], 1)
            self.draft.value = torch.cat([self.draft.value, value[0]], 1)
            own_key, own_value = self.draft.key[None], self.draft.value[None]
        if query.shape[2] == 1:
            keys, values = (past_key, own_key), (past_value, own_value)
            out, paid = attend_token(query, keys, values, scale, self.policy.power)
            self.transient = max(self.transient, own_key.nbytes + own_value.nbytes)
        else:
            key, value = torch.cat([past_key, own_key], 2), torch.cat([past_value, own_value], 2)
            power = self.policy.power
            out, attention = attend_chunk(query, key, value, scale, key.shape[2] - query.shape[2], power=power)
            paid = attention.column_sums(power=power)
            self.transient = max(self.transient, key.nbytes + value.nbytes)
        seen.total += paid[:, :size]
        asked = query[0].float().reshape(key.shape[1], -1, query.shape[-1])
        seen.moments += asked.mT @ asked
        seen.queries += query.shape[2]
        return out.transpose(1, 2)

    def _step(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """The next tokens of all rows, one in decoding; query `[M, H, T, D]`, key, value `[M, G, T, D]`. Returns
        `[M, T, H, D]`."""
        held, writing, codec, newest = self.held, self.writing, self.codec, self.write_codec
        assert held is not None
        (rows, heads, tokens, size), groups = query.shape, key.shape[1]
        for memory, new in ((held.write_keys, key), (held.write_values, value)):
            newest.encode(memory, writing.at, new.transpose(1, 2).reshape(-1, groups, size))
        keys, values, index, padding = self._candidates(held)
        longest = keys.shape[2]
        own_key, own_value = (
            newest.unpack([part[writing.region] for part in memory]).view(rows, -1, groups, size).transpose(1, 2)
            for memory in (held.write_keys, held.write_values)
        )
        asked = query.reshape(rows, groups, -1, size)  # a group's query heads after each other, T tokens each
        logits = torch.cat([codec.fine.turn(asked) @ keys.mT, newest.turn(asked) @ own_key.mT], -1).float()
        logits[..., :longest].masked_fill_(padding[:, :, None], -torch.inf)
        if writing.later is not None:
            own = logits.view(rows, groups, -1, tokens, logits.shape[-1])[..., longest:]
            own.masked_fill_(writing.later[:, None, None], -torch.inf)
        probabilities = logits.mul_(scale).softmax(-1)
        spread = probabilities.to(values.dtype)
        out = codec.fine.turn_back(spread[..., :longest] @ values) + newest.turn_back(spread[..., longest:] @ own_value)
        paid = probabilities.pow_(self.policy.power).sum(2).div_(heads // groups)
        # Padding points at some slot and adds nothing to it: its probability is 0.
        add_to_sums(held.aas, index.view(-1), paid[..., :longest].reshape(-1))
        own_paid = paid[..., longest:].transpose(1, 2).reshape(-1, groups)
        if isinstance(writing.region, slice):
            held.write_aas[writing.region] += own_paid
        else:
            held.write_aas.index_add_(0, writing.region.view(-1), own_paid)
        if writing.due:
            self.full.append(self)
        return out.view(rows, heads, tokens, size).transpose(1, 2)

    def _candidates(self, held: Slots) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keys and values `[M, G, longest, D]` in the codec's space, their slots, and what is only padding."""
        if held.unpacked is not None:
            return held.unpacked
        index, padding = held.padded()
        at = index if self.codec.coarse is None else self.codec.places(held.fine)[index]
        keys, values = (self.codec.read(kept, at) for kept in (held.keys, held.values))
        found = keys, values, index, padding
        if self.keeps_unpacked:
            held.unpacked = found
        return found

    # -- eviction -----------------------------------------------------------------------------------------------------

    def keep(
        self,
        row: int,
        head: Tensor,
        position: Tensor,
        fine: Tensor,
        counts: Sequence[int],
        score: Tensor,
        metric: Metric | None,
        room: int,
        write: int,
    ) -> None:
        """Frees all of an open row but these tokens; their scores start the sums.

        Args:
            head, position: int64 `[N]`, in order of both. fine: which go into the finer codec, bool `[N]`.
            counts: tokens of each head. score: `[G, n]`. metric: of the keys.
            room: bytes that the layer's candidates may take from now on. write: tokens of the write region.
        """
        open_ = self.rows[row]
        assert open_ is not None
        groups, size = score.shape[0], open_.key.shape[-1]
        sizes, wide = [sum(counts)], [score.shape[1] > NARROW]
        words, high = words_of(position, fine, sizes, wide)
        self.rows[row] = None
        self.loose[row] = Slots(
            keys=self.codec.pack(open_.key[head, position], fine, head, metric),
            values=self.codec.pack(open_.value[head, position], fine),
            words=words,
            high=high,
            aas=kept_sums(score[head, position].float().pow(self.policy.power) * self.policy.prior),
            starts=torch.tensor(list(accumulate(counts, initial=0)), device=head.device),
            write_keys=self.write_codec.allocate((write, groups), size, head.device),
            write_values=self.write_codec.allocate((write, groups), size, head.device),
            write_aas=torch.zeros((write, groups), dtype=torch.float32, device=head.device),
            sizes=sizes,
            fines=[int(fine.sum())],
            longest=[max(counts)],
            wide=wide,
            room=[room],
            widths=[write],
            parts=self.codec.parts,
        )

    def make_room(self, new_keys: list[Tensor], new_values: list[Tensor], norms: Tensor | None) -> None:
        """Multi-step eviction: the older half of a full write region competes with the candidates of all heads.

        Args:
            new_keys, new_values: what leaves the write regions, as `Tiers.both` has it. norms: of those values.
        """
        held = self.held
        assert held is not None
        writing, groups, device = self.writing, held.groups, held.aas.device
        count, rows = held.words.shape[0], len(held.sizes)
        old = torch.arange(rows * groups, device=device).repeat_interleave(held.starts.diff(), output_size=count)
        fresh = writing.flush_rows[:, None] * groups + torch.arange(groups, device=device)
        head = torch.cat([old, fresh.view(-1)])
        position = torch.cat([held.positions, writing.flush_positions[:, None].expand_as(fresh).reshape(-1)])
        aas = torch.cat([held.aas, kept_sums(held.write_aas[writing.flush]).view(-1)])
        # The oldest token of each head stays: no head may be empty.
        oldest = torch.zeros_like(head, dtype=torch.bool)
        oldest[1:count] = old[1:] != old[:-1]
        oldest[0].fill_(True)
        score = self._scores(head, position, aas)
        if norms is not None:
            score *= torch.cat([self.codec.unpack(held.values, held.fine).float().norm(dim=-1), norms])
        # Row after row, in each the best first; on a tie the later one, so that the older goes.
        order = len(head) - 1 - score.masked_fill_(oldest, torch.inf).flip(0).argsort(descending=True, stable=True)
        if rows > 1:
            order = order[(head[order] // groups).argsort(stable=True)]
        owner = head[order] // groups
        leaving = torch.tensor([writing.due.get(row, 0) for row in range(rows)], device=device) * groups
        size = held.starts[groups::groups] - held.starts[:-1:groups]
        begin = (size + leaving).cumsum(0) - (size + leaving)
        fine = torch.ones_like(oldest)
        fine[:count] = held.fine
        if self.codec.coarse is not None:
            rank = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=device) - begin[owner])
            fine[count:] = (rank < self.policy.fine * size[head // groups])[count:]
        keys, values = (
            self.codec.added(kept, new, fine[count:])
            for kept, new in ((held.keys, new_keys), (held.values, new_values))
        )
        # A row keeps its best for as long as their bytes last; one that has no new tokens keeps all.
        for number in writing.due:
            held.wide[number] = writing.ends[number] > NARROW
        cost = torch.where(fine, *self.slot_bytes) + torch.tensor(held.wide, device=device)[head // groups]
        spent = cost[order].cumsum(0)
        before = torch.cat([spent.new_zeros(1), spent[begin[1:] - 1]])
        best = order[spent - before[owner] <= torch.tensor(held.room, device=device)[owner]]
        best = best[(head[best] * (1 << 40) + position[best]).argsort()]
        held.keys, held.values = (self.codec.select(x, fine, best) for x in (keys, values))
        held.aas = aas[best]
        counts = torch.bincount(head[best], minlength=rows * groups)
        held.starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        fines = torch.bincount(head[best] // groups, weights=fine[best].double(), minlength=rows)
        counts = counts.view(rows, groups)
        found = torch.stack([counts.sum(1), fines.long(), counts.amax(1)]).tolist()
        held.sizes, held.fines, held.longest = found
        held.words, held.high = words_of(position[best], fine[best], held.sizes, held.wide)
        held.write_keys, held.write_values = (
            [x[writing.shift] for x in kept] for kept in (held.write_keys, held.write_values)
        )
        held.write_aas = held.write_aas[writing.shift].masked_fill_(writing.emptied[:, None], 0)
        held.unpacked = None

    def _scores(self, head: Tensor, position: Tensor, aas: Tensor) -> Tensor:
        """By which tokens compete: the attention paid to each, a query that could pay it."""
        assert self.held is not None
        groups = self.held.groups
        prompt, since, end = self.writing.reach[:, head // groups]
        read = position < prompt
        score = (read_sums(aas) / torch.where(read, self.policy.prior + since, end - position)).pow(
            1 / self.policy.power
        )
        if self.factors is not None:
            self.factors = self.factors.to(score.device)
            score *= self.factors[head % groups, (~read).long()]
        return score

    # -- looking in from outside --------------------------------------------------------------------------------------

    def clear(self, row: int) -> None:
        """Frees what a row holds."""
        self.rows[row] = None
        self.loose.pop(row, None)
        if row in self.members:
            self._join([other for other in self.members if other != row])

    def row_bytes(self, row: int) -> int:
        """Bytes that a row has allocated in this layer."""
        open_ = self.rows[row]
        if open_ is not None:
            return open_.key.untyped_storage().nbytes() + open_.value.untyped_storage().nbytes()
        if row in self.loose:
            return self.loose[row].row_bytes(0)
        return self.held.row_bytes(self.members.index(row)) if self.held and row in self.members else 0

    def settled(self, row: int) -> Slots:
        """What a settled row holds."""
        return self.loose[row] if row in self.loose else self._cut(row)

    @property
    def heads(self) -> int:
        """KV heads."""
        held = next(iter(self.loose.values()), self.held)
        return held.groups if held else next(int(row.key.shape[0]) for row in self.rows if row is not None)

    def copy_rows(self, count: int) -> None:
        """The first `count` rows, settled and not yet written to, again as the `count` rows behind them."""
        for row in range(count):
            self.loose[count + row] = self.loose[row]

    def add_kept(self, total: Tensor) -> None:
        """Adds how many heads hold each token of the first rows to `total`, fp32 `[rows, tokens]`."""
        for row in range(total.shape[0]):
            positions = self.settled(row).positions
            total[row].index_add_(0, positions, torch.ones_like(positions, dtype=total.dtype))

    def held_positions(self, row: int, head: int) -> list[int]:
        """Positions of the tokens that a head holds, ascending."""
        open_, writing = self.rows[row], self.writing
        if open_ is not None:
            return list(range(open_.key.shape[1]))
        if not writing.width[row]:
            return []
        held = self.settled(row)
        start, end = held.starts[head : head + 2].tolist()
        own: list[int] = held.positions[start:end].tolist()
        return own + list(range(writing.first[row], writing.first[row] + writing.written[row]))


def _make_room(layers: Sequence[HeadsLayer]) -> None:
    """What leaves the layers' write regions goes into slots; its codes are chosen for all layers together."""
    writing, codec, policy = layers[0].writing, layers[0].codec, layers[0].policy
    held = [layer.held for layer in layers]
    leaving = []
    for memories in ([one.write_keys for one in held if one], [one.write_values for one in held if one]):
        parts = [torch.cat([part[writing.flush] for part in tensors]) for tensors in zip(*memories, strict=True)]
        leaving.append(layers[0].write_codec.decode(parts).flatten(0, 1))
    keys, values = leaving
    groups = layers[0].heads
    count = len(writing.flush) * groups
    numbers = torch.tensor([layer.number for layer in layers], device=keys.device)
    head = torch.arange(groups, device=keys.device).repeat(len(writing.flush))
    head = (numbers[:, None] * groups + head).view(-1)
    metric = layers[0].metric
    packed_keys = codec.both(keys, head, None if metric is None else metric.to(keys.device))
    packed_values = codec.both(values, head, None)
    norms = values.float().norm(dim=-1) if policy.value_norm else None
    for number, layer in enumerate(layers):
        own = slice(number * count, (number + 1) * count)
        layer.make_room(
            [x[own] for x in packed_keys], [x[own] for x in packed_values], None if norms is None else norms[own]
        )


class HeadsCache(Cache):  # type: ignore[misc]
    """A cache for policies that give every head its own number of slots.

    Args:
        config: the model's configuration.
        slots: the budget: slots a head, on average over layers and heads; or one number a layer, of which the mean
            counts. Layers with a sliding window hold that beside it.
        rows: sequences held together. bits: of a stored channel, 16, 8 or 4.

    Raises:
        PolicyError: too few slots, or a model of which every layer has a sliding window.
    """

    def __init__(
        self, config: Any, policy: AUVLook, slots: int | Sequence[int], *, rows: int = 1, bits: int = 16
    ) -> None:
        windows = layer_windows(config)
        if None not in windows:
            raise PolicyError(
                f"policy {policy.name!r} has nothing to do: every layer of this model has a sliding window",
                "use policy full, which holds just the window, or load the model with sliding_window=None",
            )
        self.policy, self.bits, self.windows = policy, bits, windows
        self._slots = [slots] * len(windows) if isinstance(slots, int) else list(slots)
        self._granted = [self._mean(slots)] * rows
        if self._granted[0] < policy.least_slots:
            message = f"policy {policy.name!r} needs at least {policy.least_slots} slots, not {self._granted[0]}"
            raise PolicyError(message, f"give it {policy.least_slots} or more")
        self._peak = 0
        self.writing = Writing(rows)
        profile = find_profile(config) if policy.profile else None
        #: What tokens of each head are worth, the prompt's and written ones, `[layers, G, 2]`; None for all the same.
        self.factors = None if profile is None else profile.factors()
        moments = None if profile is None or bits != 4 else profile.moments()
        metric = None if moments is None else Metric(moments.flatten(0, 1))
        full: list[HeadsLayer] = []
        count = windows.count(None)
        #: The layers that have no sliding window, by their number among these.
        self.ranked = [HeadsLayer(policy, bits, self.writing, (number, count)) for number in range(count)]
        ranked = iter(self.ranked)
        super().__init__(
            layers=[WindowLayer(w, self.writing, _LOOK_CHUNK) if w is not None else next(ranked) for w in windows]
        )
        for layer in self.ranked:
            layer.factors = None if self.factors is None else self.factors[layer.number]
            layer.metric, layer.full = metric, full

    # -- one prompt ---------------------------------------------------------------------------------------------------

    def begin(
        self,
        prompt_tokens: int,
        *,
        row: int = 0,
        slots: int | Sequence[int] | None = None,
        rotary: Rotary | None = None,
    ) -> None:
        """Declares a row's next prompt before its first chunk; what the row held is freed.

        Raises:
            PolicyError: positions that count only what is held.
        """
        if rotary is not None:
            raise PolicyError(f"policy {self.policy.name!r} cannot stream", "use --policy auv or h2o")
        if slots is not None:
            self._granted[row] = self._mean(slots)
        self._peak = 0
        self.writing.active[row], self.writing.width[row] = True, 0
        for layer in self.layers:
            layer.clear(row)
            layer.transient = 0

    def reading(self, row: int) -> AbstractContextManager[None]:
        """Within: the model is called with batch 1, and its tokens are a prompt chunk of that row."""
        return reading(self.layers, row)

    def regions(self, row: int) -> tuple[int, int]:
        """Slots of an open row's candidates, a head on average, and the tokens of its write region."""
        held = self.ranked[0].rows[row]
        assert isinstance(held, Open)
        return self.policy.regions(
            self._granted[row], head_dim=held.key.shape[-1], element_bytes=held.key.element_size(), bits=self.bits
        )

    def may_write(self, row: int) -> int:
        """How many tokens a row takes at once, when they are known: until its write region is full."""
        return self.writing.width[row] - self.writing.written[row]

    @contextmanager
    def looking(self, row: int, *, drafts: bool = False, before: int | None = None) -> Iterator[list[_Seen]]:
        """Within: the model is called with batch 1, and its tokens look at what that row holds without being held.

        Args:
            drafts: each call sees the tokens of the calls before it.
            before: they are the prompt's own tokens from this one on, once more; by default they follow the prompt.
        """
        found, again = [], 0
        for layer in self.ranked:
            held = layer.rows[row]
            assert isinstance(held, Open)
            layer.row, layer.before = row, before
            groups, tokens, size = held.key.shape
            again = 0 if before is None else tokens - before
            total, moments = (torch.zeros(groups, *own, device=held.key.device) for own in ((tokens,), (size, size)))
            layer.looks = _Seen(total, moments)
            layer.draft = Open(held.key[:, :0], held.value[:, :0]) if drafts else None
            found.append(layer.looks)
        for window in self.sliding:
            window.look(row, drafts=drafts, again=again)
        try:
            yield found
        finally:
            self._note_peak(row)
            for window in self.sliding:
                window.look_away()
            for layer in self.ranked:
                layer.row, layer.looks, layer.draft, layer.before = None, None, None, None

    def settle(self, row: int, look: Look | None) -> None:
        """Ranks the tokens of all layers and heads, keeps the best and frees the rest.

        Args:
            look: what the second look found; None keeps everything, which must fit.

        Raises:
            PolicyError: no look, and more tokens than slots.
        """
        self._note_peak(row)
        first = self.ranked[0].rows[row]
        assert first is not None
        groups, tokens, _ = first.key.shape
        room, write = self.regions(row)
        layers = len(self.ranked)
        heads = layers * groups
        granted = self.ranked[0].slot_bytes[0] * room * heads
        dear, cheap = (slot + (tokens > NARROW) for slot in self.ranked[0].slot_bytes)
        # In more bits what is left to gain is not worth the time.
        metrics: Sequence[Metric | None] = (look.metrics if look and self.bits == 4 else None) or [None] * layers
        if look is None:
            if not self.holds_all(row):
                raise PolicyError("nothing tells which tokens to keep", "call heads.second_look first")
            score = torch.zeros((layers, groups, tokens), device=first.key.device)
        else:
            score = self.policy.blend(look.looked, look.drafted, look.asked)
        ranking = score
        if self.policy.value_norm:
            held = [layer.rows[row] for layer in self.ranked]
            ranking = score * torch.stack([one.value.float().norm(dim=-1) for one in held if one])
        if self.factors is not None:
            ranking = ranking * self.factors[..., :1].to(ranking.device)
        # The first token stays in every head: it takes the attention that a query has no use for.
        ranking = ranking.clone()
        ranking[..., 0] = torch.inf
        count, better = self.policy.tiers(granted, tokens * heads, dear, cheap)
        best = ranking.flatten().topk(count).indices
        best, order = best.sort()
        fine = order < better  # topk gives the best first
        counts = torch.bincount(best // tokens, minlength=heads).view(layers, groups).tolist()
        head, position = best // tokens % groups, best % tokens
        shares = [sum(own) for own in counts]
        parts = (torch.split(part, shares) for part in (head, position, fine))
        for layer, *own, per_head, scored, metric in zip(self.ranked, *parts, counts, score, metrics, strict=True):
            most = granted // layers
            if count < tokens * heads:
                most = cheap * len(own[2]) + (dear - cheap) * int(own[2].sum())
            layer.keep(row, *own, per_head, scored, metric, most, write)
        for window in self.sliding:
            window.close(row, tokens)
        self.writing.start(row, write, tokens)

    def holds_all(self, row: int) -> bool:
        """Whether an open row has room for all of its tokens."""
        held, (slot, _) = self.ranked[0].rows[row], self.ranked[0].slot_bytes
        assert isinstance(held, Open)
        tokens = held.key.shape[1]
        holds: bool = self.regions(row)[0] * slot >= tokens * (slot + (tokens > NARROW))
        return holds

    def copy_rows(self, count: int) -> None:
        """The first `count` rows, settled and not yet written to, again as the `count` rows behind them."""
        self._granted[count : 2 * count] = self._granted[:count]
        self.writing.copy_rows(count)
        for layer in self.layers:
            layer.copy_rows(count)

    def next_part(self, row: int, share: int | None) -> NoReturn:
        raise PolicyError(f"policy {self.policy.name!r} cannot stream", "use --policy auv or h2o")

    def end_prompt(self, row: int) -> None:
        """Positions are the document's own."""

    def rest(self, row: int) -> None:
        """A row takes no further part in decoding; what it holds means nothing from now on."""
        self.writing.active[row] = False

    def allocate(self, **_: Any) -> None:
        """Nothing is allocated before a prompt shows which head needs what."""

    # -- looking in from outside --------------------------------------------------------------------------------------

    @property
    def sliding(self) -> list[WindowLayer]:
        """The other layers."""
        return [layer for layer in self.layers if isinstance(layer, WindowLayer)]

    @property
    def slots(self) -> list[int]:
        """Slots granted to each layer, a head, before the ranking shares them out."""
        return self._slots

    def _mean(self, slots: int | Sequence[int]) -> int:
        """Slots a layer that ranks."""
        if isinstance(slots, int):
            return slots
        own = [number for number, window in zip(slots, self.windows, strict=True) if window is None]
        return sum(own) // len(own)

    @property
    def rows(self) -> int:
        """Sequences held together."""
        return len(self._granted)

    def bytes(self) -> int:
        """Bytes really allocated, over all layers and rows, policy state included."""
        return sum(self.row_bytes(row) for row in range(self.rows))

    def row_bytes(self, row: int) -> int:
        """Those of one row."""
        return sum(layer.row_bytes(row) for layer in self.layers)

    @property
    def prefill_peak_bytes(self) -> int:
        """Bytes of the last prompt at its worst moment: all of it in the model's type, and one layer's look."""
        return self._peak

    def _note_peak(self, row: int) -> None:
        self._peak = max(self._peak, self.row_bytes(row) + max(layer.transient for layer in self.layers))


@torch.no_grad()
def second_look(
    model: Any,
    cache: HeadsCache,
    row: int,
    ids: Sequence[int],
    document: tuple[int, int],
    first: int | None,
    step: Callable[[Tensor, Tensor, HeadsCache], Tensor] | None = None,
) -> Look | None:
    """Reads pieces of the document and what is asked once more, and drafts a summary, with all of an open row held.

    Args:
        ids: the prompt. document: the span of it that is the document. first: the first token of the summary; None
            drafts nothing. step: one token `[1]` at a position `[1]` -> logits `[1, V]`, where that is faster than the
            model's own.

    Returns:
        None when the budget holds the whole prompt: there is nothing to choose.
    """
    policy, tokens = cache.policy, len(ids)
    if cache.holds_all(row):
        return None
    held = cache.ranked[0].rows[row]
    assert held is not None
    device = held.key.device

    def see(token_ids: Sequence[int], start: int) -> Tensor:
        out = model(
            torch.tensor([list(token_ids)], device=device),
            position_ids=torch.arange(start, start + len(token_ids), device=device)[None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = out.logits[0, -1]
        return logits

    looked = drafted = asked = None
    moments = []
    again = policy.tokens_to_look_with(ids[document[0] : document[1]])

    def draw(token: int, position: int) -> int:
        if step is None:
            return int(see([token], position).argmax())
        return int(step(torch.tensor([token]), torch.tensor([position]), cache).argmax())

    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    chunk = _LOOK_CHUNK if limit is None else min(_LOOK_CHUNK, limit - tokens)
    if again and chunk > 0:
        with cache.looking(row) as seen:
            for start in range(0, len(again), chunk):
                see(again[start : start + chunk], tokens)
        looked = torch.stack([layer.total / layer.queries for layer in seen])
        moments.append(torch.stack([layer.moments / layer.queries for layer in seen]))
    draft = policy.draft if limit is None else min(policy.draft, limit - tokens)
    if first is not None and draft > 0:
        with cache.looking(row, drafts=True) as seen:
            token = first
            for place in range(draft):
                token = draw(token, tokens + place)
        drafted = torch.stack([layer.total / layer.queries for layer in seen])
        moments.append(torch.stack([layer.moments / layer.queries for layer in seen]))
    tail = ids[max(document[1], tokens - _LOOK_CHUNK) :]
    if policy.ask and tail and len(tail) < tokens:
        with cache.looking(row, before=tokens - len(tail)) as seen:
            see(tail, tokens - len(tail))
        asked = torch.stack([layer.total / layer.queries for layer in seen])
    if looked is None and drafted is None and asked is None:
        raise PolicyError(
            f"the prompt of {tokens:,} tokens leaves the model no positions to look at it again",
            "use --policy auv, or a shorter document",
        )
    return Look(looked, drafted, asked, torch.stack(moments).mean(0) if moments else None)

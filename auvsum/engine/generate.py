"""The engine: prompts are read one at a time, squeezed to their slots, and decoded together. It yields events.

    for event in Engine(model, policy, eos_ids=...).run([Request(ids, slots=512, max_new_tokens=128)]):
        ...

A finished row is refilled by the next document at once (continuous batching); with one row this is the plain loop.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from auvsum.cache import heads
from auvsum.cache.cache import BudgetedCache
from auvsum.cache.heads import HeadsCache
from auvsum.cache.policies.auv_look import AUVLook
from auvsum.cache.policy import Policy
from auvsum.cache.rotary import Rotary
from auvsum.cache.sliding import layer_windows, slots_by_layer
from auvsum.engine.fuse import fuse
from auvsum.engine.graph import NOT_FINITE, RESTS, DecodeGraph, why_not
from auvsum.engine.kept import Kept
from auvsum.engine.lean import lean_step, straighten_head
from auvsum.engine.memory import MOST_ROWS, cache_shape, devices_of, is_out_of_memory, release_memory, rows_that_fit
from auvsum.engine.parts import Part, chunks
from auvsum.engine.sampling import Sampling
from auvsum.errors import DocumentError, DocumentTimeout, GenerationFailed, PolicyError
from auvsum.events import Event, Failed, Finished, FinishReason, Notice, Prefilled, PrefillProgress, Token

Waiting = deque[tuple[int, "Request"]]
AnyCache = BudgetedCache | HeadsCache


def make_cache(config: Any, policy: Policy, slots: int | Sequence[int], rows: int, bits: int = 16) -> AnyCache:
    """The cache that a policy needs."""
    if isinstance(policy, AUVLook):
        return HeadsCache(config, policy, slots, rows=rows, bits=bits)
    return BudgetedCache(config, policy, slots, batch=rows, bits=bits)


@dataclass(frozen=True)
class Request:
    """One document as token ids.

    Args:
        ids: the whole prompt.
        slots: slots per layer, which the policy may share out unevenly, or one number a layer.
        max_new_tokens: at most this many are written.
        parts: how the prompt is read when not at the positions of its tokens: see `engine/parts.py`.
        timeout: seconds after which the document fails; looked at between chunks and between tokens.
        document: the span of `ids` that is the document; None for all of them.
    """

    ids: Sequence[int]
    slots: int | Sequence[int]
    max_new_tokens: int
    parts: tuple[Part, ...] = ()
    timeout: float | None = None
    document: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not self.ids:
            raise GenerationFailed("the prompt is empty", "give it a document")

    @property
    def compact(self) -> bool:
        """Whether positions count what is held."""
        return any(part.position is None for part in self.parts)


@dataclass
class _Row:
    """A document that is being written."""

    index: int
    request: Request
    noise: list[float]
    admitted: float
    #: Position of the first token that is written.
    first: int = 0
    written: list[int] = field(default_factory=list)
    started: float = 0.0

    @property
    def position(self) -> int:
        """Of the last token written."""
        return self.first + len(self.written) - 1

    def check_time(self) -> None:
        """Raises `DocumentTimeout` when the document has had its time."""
        limit = self.request.timeout
        if limit is not None and time.perf_counter() - self.admitted > limit:
            raise DocumentTimeout(f"not finished within {limit:g} seconds", "raise --timeout, or lower --max-tokens")


class Engine:
    """Reads prompts and writes continuations over a budgeted cache.

    On a GPU the decode step is one CUDA graph; on a CPU `engine/lean.py` reads and steps where it knows the model;
    elsewhere, and without Triton, transformers does.

    Args:
        model: a transformers decoder; its attention implementation is set to "auvsum".
        eos_ids: tokens that end a document.
        chunk: tokens read at a time over the budgeted cache (streaming prefill); None reads a prompt in one pass.
        batch_size: documents decoded together; None takes as many as free memory holds.
        bits: of a stored channel: 16 (the model's type), 8 or 4.
        kept: where the cache and its captured step wait for the next run; engines of one model share it.
    """

    def __init__(
        self,
        model: Any,
        policy: Policy,
        *,
        eos_ids: Iterable[int] = (),
        chunk: int | None = None,
        batch_size: int | None = 1,
        sampling: Sampling | None = None,
        bits: int = 16,
        kept: Kept | None = None,
    ) -> None:
        self.model = model
        self.bits = bits
        self.policy = policy
        self.eos_ids = frozenset(eos_ids)
        self.chunk = chunk
        self.batch_size = batch_size
        self.sampling = sampling or Sampling()
        self.kept = kept or Kept()
        self.device: torch.device = next(model.parameters()).device
        self.windows = layer_windows(model.config)
        model.set_attn_implementation("auvsum")
        straighten_head(model)
        self.lean = lean_step(model)
        #: Documents that are being written together.
        self.rows = 1
        self._told: dict[int, int] = {}
        self._noticed: set[str] = set()

    def run(self, requests: Iterable[Request]) -> Iterator[Event]:
        """Yields `PrefillProgress`, `Prefilled`, `Token` and `Finished`, documents interleaved when batched.

        A document that cannot be written (logits that are not numbers, its time is up, too little memory for it alone)
        ends with `Failed`, and the others go on. Out of memory with several together, it goes on with half as many;
        those that were under way are read again, and their tokens are not told twice. Requests are taken one at a time,
        when a row is free for them or the one before is being read: however many there are, only one more waits than
        `batch_size` or its choice looks at.
        """
        incoming = enumerate(requests)
        self._told = {}
        ahead = self.batch_size or MOST_ROWS[self.device.type]
        waiting: Waiting = deque(islice(incoming, ahead))
        first = [request for _, request in waiting]
        batch = self.batch_size or rows_that_fit(self.model, self.policy, first, self.chunk, self.bits, self.kept.bytes)
        while waiting:
            rows: list[_Row | None] = [None] * min(batch, len(waiting))
            self.rows = len(rows)
            try:
                yield from self._together(waiting, incoming, rows)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                release_memory(self.device)
                waiting.extendleft((row.index, row.request) for row in reversed(rows) if row)
                if len(rows) == 1:
                    index, _ = waiting.popleft()
                    hint = "give it a smaller budget, or read it in chunks"
                    yield Failed(index, GenerationFailed("the document does not fit the memory", hint))
                else:
                    batch = len(rows) // 2
                    yield from self._notice(f"out of memory with {len(rows)} documents together: going on with {batch}")
            waiting.extend(islice(incoming, max(0, ahead - len(waiting))))

    def _together(
        self, waiting: Waiting, incoming: Iterator[tuple[int, Request]], rows: list[_Row | None]
    ) -> Iterator[Event]:
        """Fills rows with waiting documents, and refills them, until the next document needs another cache."""
        longest = max(request.max_new_tokens for _, request in waiting)
        kind = self._kind(waiting, len(rows), longest)
        cache, graph, reason = self._cache_for(kind, longest)
        if reason is not None:
            yield from self._notice(f"the plain decode step runs: {reason}")
        while True:
            for number in range(len(rows)):
                while rows[number] is None and self._next_fits(waiting, incoming, cache, longest):
                    look_ahead = partial(self._look_ahead, waiting, incoming)
                    rows[number] = yield from self._admit(cache, graph, number, *waiting[0], look_ahead)
                    waiting.popleft()
            if not any(rows):
                if graph is not None:
                    self.kept.put(kind, cache, graph)
                return
            if graph is None:
                yield from self._advance(cache, rows)
            else:
                yield from self._advance_graph(cache, graph, rows)

    def _notice(self, text: str) -> Iterator[Event]:
        if text not in self._noticed:
            self._noticed.add(text)
            yield Notice(text)

    # -- one document -------------------------------------------------------------------------------------------------

    def _admit(
        self,
        cache: AnyCache,
        graph: DecodeGraph | None,
        number: int,
        index: int,
        request: Request,
        meanwhile: Callable[[], None],
    ) -> Generator[Event, None, _Row | None]:
        """Reads a prompt into a row and writes its first token; returns the row, or None when that was all.

        Args:
            meanwhile: called while a GPU is reading.
        """
        row = _Row(index, request, self.sampling.noise(request.max_new_tokens), admitted=time.perf_counter())
        try:
            token = yield from self._prefill(cache, number, row, meanwhile)
            going = yield from self._write(cache, number, row, token)
        except DocumentError as error:
            cache.rest(number)
            yield Failed(index, error)
            return None
        if going is not None and graph is not None:
            graph.fill(number, token, row.position, request.max_new_tokens - 1, row.noise)
        return going

    def _prefill(
        self, cache: AnyCache, number: int, row: _Row, meanwhile: Callable[[], None]
    ) -> Generator[Event, None, int]:
        """Reads a row's prompt; returns its first new token."""
        request, total = row.request, len(row.request.ids)
        rotary = self._rotary() if request.compact else None
        cache.begin(total, row=number, slots=request.slots, rotary=rotary)
        logits, position = torch.empty(0), 0
        parts = request.parts or chunks(total, self.chunk)
        for part in parts:
            held = cache.next_part(number, part.share) if request.parts else 0
            position = held if part.position is None else part.position
            ids = request.ids[part.start : part.end]
            logits = self._read(cache, number, ids, position, more=part is not parts[-1])
            position += part.end - part.start
            yield PrefillProgress(row.index, part.end, total)
            row.check_time()
        if isinstance(cache, HeadsCache):
            span = request.document or (0, total)
            first = int(logits.argmax())
            look = heads.second_look(self.model, cache, number, request.ids, span, first, self.lean)
            cache.settle(number, look)
            row.check_time()
        compacted = cache.end_prompt(number)
        row.first = position if compacted is None else compacted
        meanwhile()
        token = self._draw(row, logits)
        row.started = time.perf_counter()
        held_bytes = cache.row_bytes(number)
        yield Prefilled(row.index, total, row.started - row.admitted, cache.prefill_peak_bytes, held_bytes)
        return token

    def _advance(self, cache: AnyCache, rows: list[_Row | None]) -> Iterator[Event]:
        """One decode step for all rows."""
        tokens = [row.written[-1] if row else 0 for row in rows]
        positions = [row.position if row else 0 for row in rows]
        logits = self._step(cache, tokens, positions)
        for number, row in enumerate(rows):
            if row is not None:
                rows[number] = yield from self._take(cache, number, row, partial(self._draw, row, logits[number]))

    def _advance_graph(self, cache: AnyCache, graph: DecodeGraph, rows: list[_Row | None]) -> Iterator[Event]:
        """Starts the next step of all rows and takes the tokens of the one before."""
        graph.launch(rows)
        arrived = graph.arrived()
        while arrived is not None:
            for number, (launched, token) in enumerate(zip(*arrived, strict=True)):
                row = rows[number]
                # A row that ended on the host's word since then has another document by now, or none.
                if row is not None and row is launched and token != RESTS:
                    rows[number] = yield from self._take(cache, number, row, partial(_finite, token))
            # Nobody writes any more: what is still under way is of rows at rest.
            arrived = None if any(rows) else graph.arrived(lag=0)

    def _take(
        self, cache: AnyCache, number: int, row: _Row, token: Callable[[], int]
    ) -> Generator[Event, None, _Row | None]:
        """A row's next token, or its failure; returns the row while it goes on."""
        try:
            row.check_time()
            return (yield from self._write(cache, number, row, token()))
        except DocumentError as error:
            cache.rest(number)
            yield Failed(row.index, error)
            return None

    def _write(self, cache: AnyCache, number: int, row: _Row, token: int) -> Generator[Event, None, _Row | None]:
        """Takes a row's next token; returns the row, or None when the document is complete."""
        reason: FinishReason | None = "eos" if token in self.eos_ids else None
        if reason is None:
            row.written.append(token)
            if len(row.written) > self._told.get(row.index, 0):
                self._told[row.index] = len(row.written)
                yield Token(row.index, token)
            reason = "length" if len(row.written) >= row.request.max_new_tokens else None
        if reason is None:
            return row
        cache.rest(number)
        seconds = time.perf_counter() - row.started
        self._told.pop(row.index, None)
        yield Finished(row.index, tuple(row.written), reason, seconds, cache.row_bytes(number))
        return None

    def _draw(self, row: _Row, logits: Tensor) -> int:
        if not bool(logits.isfinite().all()):
            raise _not_finite()
        return self.sampling.draw(logits, row.written, row.noise[len(row.written)] if row.noise else 0.0)

    # -- the model ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _read(self, cache: AnyCache, number: int, ids: Sequence[int], start: int, more: bool = False) -> Tensor:
        """A chunk of a prompt; the logits `[V]` of its last token, for which nobody asks where `more` follows."""
        tokens = torch.tensor([ids], device=self.device)
        positions = torch.arange(start, start + len(ids), device=self.device)[None]
        with cache.reading(number):
            if self.lean is not None:
                return self.lean(tokens[0], positions[0], cache, reads=True, more=more).reshape(-1)
            out = self.model(tokens, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits: Tensor = out.logits[0, -1]
        return logits

    @torch.no_grad()
    def _step(self, cache: AnyCache, tokens: list[int], positions: list[int]) -> Tensor:
        """The next token of every row; logits `[B, V]`."""
        if self.lean is not None:
            return self.lean(torch.tensor(tokens), torch.tensor(positions), cache)
        out = self.model(
            torch.tensor(tokens, device=self.device)[:, None],
            position_ids=torch.tensor(positions, device=self.device)[:, None],
            past_key_values=cache,
            use_cache=True,
        )
        logits: Tensor = out.logits[:, -1]
        return logits

    def _rotary(self) -> Rotary:
        slides = any(window is not None for window in self.windows)
        rotary = None if slides else Rotary.of(self.model)
        if rotary is None:
            raise PolicyError(
                "the positions of this model cannot be given anew", "use --strategy map-reduce for a long document"
            )
        return rotary

    # -- memory -------------------------------------------------------------------------------------------------------

    def _kind(self, waiting: Iterable[tuple[int, Request]], rows: int, longest: int) -> tuple[Any, ...]:
        """What a cache for the documents that come first depends on, and its step: slots, rows, and what is the same in
        a whole run. The slots are those of the largest document.
        """
        first = [self._per_layer(request) for _, request in waiting][:rows]
        slots = [max(layer) for layer in zip(*first, strict=True)]
        drawn = longest if self.sampling.temperature else 0
        return slots, rows, drawn, replace(self.sampling, seed=0), self.policy, self.bits, self.eos_ids

    def _cache_for(self, kind: tuple[Any, ...], longest: int) -> tuple[AnyCache, DecodeGraph | None, str | None]:
        """A cache and its captured step, those that are kept if they are of this kind; or why there is no such step."""
        if kept := self.kept.take(kind):
            return *kept, None
        slots, rows, *_ = kind
        cache = make_cache(self.model.config, self.policy, slots, rows, self.bits)
        return cache, *self._graph_for(cache, longest)

    def _graph_for(self, cache: AnyCache, longest: int) -> tuple[DecodeGraph | None, str | None]:
        """The captured decode step, or why there is none."""
        if len(devices := devices_of(self.model)) > 1:
            return None, f"the model is spread over {len(devices)} devices"
        if self.device.type == "cuda":
            shape, dtype = cache_shape(self.model), self.model.dtype
            cache.allocate(kv_heads=shape.kv_heads, head_dim=shape.head_dim, dtype=dtype, device=self.device)
        reason = why_not(cache, self.device)
        if reason is not None:
            return None, reason
        fuse(self.model)
        return DecodeGraph(self.model, cache, self.sampling, self.eos_ids, longest), None

    def _per_layer(self, request: Request) -> list[int]:
        """The slots of every layer; a layer with a sliding window has its own."""
        if not isinstance(request.slots, int):
            return list(request.slots)
        return slots_by_layer(self.policy, request.slots, self.windows, len(request.ids))

    @staticmethod
    def _look_ahead(waiting: Waiting, incoming: Iterator[tuple[int, Request]]) -> None:
        """Takes the request behind the one that is being read, which may have to be made first."""
        if len(waiting) == 1:
            waiting.extend(islice(incoming, 1))

    def _next_fits(
        self, waiting: Waiting, incoming: Iterator[tuple[int, Request]], cache: AnyCache, longest: int
    ) -> bool:
        """Whether there is a next document and it fits the slots; otherwise it waits for the next cache."""
        if not waiting:
            waiting.extend(islice(incoming, 1))
        if not waiting or (self.sampling.temperature and waiting[0][1].max_new_tokens > longest):
            return False
        slots = self._per_layer(waiting[0][1])
        return all(mine <= theirs for mine, theirs in zip(slots, cache.slots, strict=True))


def _finite(token: int) -> int:
    """A token that the device reported."""
    if token == NOT_FINITE:
        raise _not_finite()
    return token


def _not_finite() -> GenerationFailed:
    return GenerationFailed(
        "the model produced logits that are not finite numbers", "try --dtype fp32; `auvsum doctor` checks the model"
    )

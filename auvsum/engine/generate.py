"""The engine: prompts are read one at a time, squeezed to their slots, and decoded together. It yields events.

    for event in Engine(model, policy, eos_ids=...).run([Request(ids, slots=512, max_new_tokens=128)]):
        ...

A finished row is refilled by the next document at once (continuous batching); with one row this is the plain loop.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from auvsum.cache.cache import BudgetedCache
from auvsum.cache.policy import Policy
from auvsum.cache.rotary import Rotary
from auvsum.cache.sliding import layer_windows
from auvsum.engine.parts import Part, chunks
from auvsum.engine.sampling import Sampling
from auvsum.errors import DocumentError, DocumentTimeout, GenerationFailed, PolicyError
from auvsum.events import Event, Failed, Finished, FinishReason, Prefilled, PrefillProgress, Token


@dataclass(frozen=True)
class Request:
    """One document as token ids.

    Args:
        ids: the whole prompt.
        slots: slots per layer, which the policy may share out unevenly, or one number a layer.
        max_new_tokens: at most this many are written.
        parts: how the prompt is read when not at the positions of its tokens: see `engine/parts.py`.
        timeout: seconds after which the document fails; looked at between chunks and between tokens.
    """

    ids: Sequence[int]
    slots: int | Sequence[int]
    max_new_tokens: int
    parts: tuple[Part, ...] = ()
    timeout: float | None = None

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
    generator: torch.Generator | None
    admitted: float
    #: Position of the first token that is written.
    position: int = 0
    written: list[int] = field(default_factory=list)
    started: float = 0.0

    def check_time(self) -> None:
        """Raises `DocumentTimeout` when the document has had its time."""
        limit = self.request.timeout
        if limit is not None and time.perf_counter() - self.admitted > limit:
            raise DocumentTimeout(f"not finished within {limit:g} seconds", "raise --timeout, or lower --max-tokens")


class Engine:
    """Reads prompts and writes continuations over a budgeted cache.

    Args:
        model: a transformers decoder; its attention implementation is set to "auvsum".
        eos_ids: tokens that end a document.
        chunk: tokens read at a time over the budgeted cache (streaming prefill); None reads a prompt in one pass.
        batch_size: documents decoded together.
    """

    def __init__(
        self,
        model: Any,
        policy: Policy,
        *,
        eos_ids: Iterable[int] = (),
        chunk: int | None = None,
        batch_size: int = 1,
        sampling: Sampling | None = None,
    ) -> None:
        self.model = model
        self.policy = policy
        self.eos_ids = frozenset(eos_ids)
        self.chunk = chunk
        self.batch_size = batch_size
        self.sampling = sampling or Sampling()
        self.device: torch.device = next(model.parameters()).device
        self.windows = layer_windows(model.config)
        model.set_attn_implementation("auvsum")

    def run(self, requests: Iterable[Request]) -> Iterator[Event]:
        """Yields `PrefillProgress`, `Prefilled`, `Token` and `Finished`, documents interleaved when batched.

        A document that cannot be written (logits that are not numbers, its time is up) ends with `Failed`, and the
        others go on. Requests are taken one at a time, when a row is free for them: at most
        `batch_size` of them wait, however many there are.
        """
        incoming = enumerate(requests)
        waiting = deque(islice(incoming, self.batch_size))
        while waiting:
            cache = self._cache_for(waiting)
            rows: list[_Row | None] = [None] * len(waiting)
            while True:
                for number in range(len(rows)):
                    while rows[number] is None and self._next_fits(waiting, incoming, cache):
                        rows[number] = yield from self._admit(cache, number, *waiting.popleft())
                if not any(rows):
                    break
                yield from self._advance(cache, rows)
            waiting.extend(islice(incoming, self.batch_size - len(waiting)))

    # -- one document -------------------------------------------------------------------------------------------------

    def _admit(
        self, cache: BudgetedCache, number: int, index: int, request: Request
    ) -> Generator[Event, None, _Row | None]:
        """Reads a prompt into a row and writes its first token; returns the row, or None when that was all."""
        generator = self.sampling.generator(self.device) if self.sampling.temperature else None
        row = _Row(index, request, generator, admitted=time.perf_counter())
        try:
            first = yield from self._prefill(cache, number, row)
            return (yield from self._write(cache, number, row, first))
        except DocumentError as error:
            cache.set_active(number, False)
            yield Failed(index, error)
            return None

    def _prefill(self, cache: BudgetedCache, number: int, row: _Row) -> Generator[Event, None, int]:
        """Reads a row's prompt; returns its first new token."""
        request, total = row.request, len(row.request.ids)
        rotary = self._rotary() if request.compact else None
        cache.begin(total, row=number, slots=request.slots, rotary=rotary)
        logits, position = torch.empty(0), 0
        for part in request.parts or chunks(total, self.chunk):
            held = cache.next_part(number, part.share) if request.parts else 0
            position = held if part.position is None else part.position
            logits = self._read(cache, number, request.ids[part.start : part.end], position)
            position += part.end - part.start
            yield PrefillProgress(row.index, part.end, total)
            row.check_time()
        compacted = cache.end_prompt(number)
        row.position = position if compacted is None else compacted
        first = self._draw(row, logits)
        row.started = time.perf_counter()
        held = cache.bytes() // cache.rows
        yield Prefilled(row.index, total, row.started - row.admitted, cache.prefill_peak_bytes, held)
        return first

    def _advance(self, cache: BudgetedCache, rows: list[_Row | None]) -> Iterator[Event]:
        """One decode step for all rows."""
        tokens = [row.written[-1] if row else 0 for row in rows]
        positions = [row.position + len(row.written) - 1 if row else 0 for row in rows]
        logits = self._step(cache, tokens, positions)
        for number, row in enumerate(rows):
            if row is None:
                continue
            try:
                row.check_time()
                rows[number] = yield from self._write(cache, number, row, self._draw(row, logits[number]))
            except DocumentError as error:
                cache.set_active(number, False)
                rows[number] = None
                yield Failed(row.index, error)

    def _write(self, cache: BudgetedCache, number: int, row: _Row, token: int) -> Generator[Event, None, _Row | None]:
        """Takes a row's next token; returns the row, or None when the document is complete."""
        reason: FinishReason | None = "eos" if token in self.eos_ids else None
        if reason is None:
            row.written.append(token)
            yield Token(row.index, token)
            reason = "length" if len(row.written) >= row.request.max_new_tokens else None
        if reason is None:
            return row
        cache.set_active(number, False)
        seconds = time.perf_counter() - row.started
        yield Finished(row.index, tuple(row.written), reason, seconds, cache.bytes() // cache.rows)
        return None

    def _draw(self, row: _Row, logits: Tensor) -> int:
        if not bool(logits.isfinite().all()):
            raise GenerationFailed(
                "the model produced logits that are not finite numbers",
                "try --dtype fp32; `auvsum doctor` checks the model",
            )
        return self.sampling.draw(logits, row.written, row.generator)

    # -- the model ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _read(self, cache: BudgetedCache, number: int, ids: Sequence[int], start: int) -> Tensor:
        """A chunk of a prompt; the logits `[V]` of its last token."""
        tokens = torch.tensor([ids], device=self.device)
        positions = torch.arange(start, start + len(ids), device=self.device)[None]
        with cache.reading(number):
            out = self.model(tokens, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits: Tensor = out.logits[0, -1]
        return logits

    @torch.no_grad()
    def _step(self, cache: BudgetedCache, tokens: list[int], positions: list[int]) -> Tensor:
        """The next token of every row; logits `[B, V]`."""
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

    def _cache_for(self, waiting: Iterable[tuple[int, Request]]) -> BudgetedCache:
        """A cache for the documents that come first, as large as the largest of them needs."""
        first = [self._per_layer(request) for _, request in waiting][: self.batch_size]
        slots = [max(layer) for layer in zip(*first, strict=True)]
        return BudgetedCache(self.model.config, self.policy, slots, batch=len(first))

    def _per_layer(self, request: Request) -> list[int]:
        """The slots of every layer; a layer with a sliding window has its own."""
        if not isinstance(request.slots, int):
            return list(request.slots)
        shared = iter(self.policy.layer_slots(request.slots, self.windows.count(None), len(request.ids)))
        return [next(shared) if window is None else window for window in self.windows]

    def _next_fits(
        self, waiting: deque[tuple[int, Request]], incoming: Iterator[tuple[int, Request]], cache: BudgetedCache
    ) -> bool:
        """Whether there is a next document and its budget fits the slots; otherwise it waits for the next cache."""
        if not waiting:
            waiting.extend(islice(incoming, 1))
        if not waiting:
            return False
        slots = self._per_layer(waiting[0][1])
        return all(mine <= theirs for mine, theirs in zip(slots, cache.slots, strict=True))

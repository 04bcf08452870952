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
from typing import Any

import torch
from torch import Tensor

from auvsum.cache.cache import BudgetedCache
from auvsum.cache.policy import Policy
from auvsum.engine.fuse import fuse
from auvsum.engine.graph import NOT_FINITE, RESTS, DecodeGraph, why_not
from auvsum.engine.memory import cache_shape, is_out_of_memory, release_memory, rows_that_fit
from auvsum.engine.sampling import Sampling
from auvsum.errors import GenerationFailed
from auvsum.events import Event, Finished, FinishReason, Notice, Prefilled, PrefillProgress, Token


@dataclass(frozen=True)
class Request:
    """One document as token ids.

    Args:
        ids: the whole prompt.
        slots: slots per layer, or one number a layer.
        max_new_tokens: at most this many are written.
    """

    ids: Sequence[int]
    slots: int | Sequence[int]
    max_new_tokens: int

    def per_layer(self, layers: int) -> list[int]:
        """The slots of every layer."""
        return [self.slots] * layers if isinstance(self.slots, int) else list(self.slots)


@dataclass
class _Row:
    """A document that is being written."""

    index: int
    request: Request
    noise: list[float]
    written: list[int] = field(default_factory=list)
    started: float = 0.0

    @property
    def position(self) -> int:
        """Of the last token written."""
        return len(self.request.ids) + len(self.written) - 1


class Engine:
    """Reads prompts and writes continuations over a budgeted cache.

    On a GPU the decode step is one CUDA graph; elsewhere, and without Triton, it is plain torch.

    Args:
        model: a transformers decoder; its attention implementation is set to "auvsum".
        eos_ids: tokens that end a document.
        chunk: tokens read at a time over the budgeted cache (streaming prefill); None reads a prompt in one pass.
        batch_size: documents decoded together; None takes as many as free memory holds.
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
    ) -> None:
        self.model = model
        self.policy = policy
        self.eos_ids = frozenset(eos_ids)
        self.chunk = chunk
        self.batch_size = batch_size
        self.sampling = sampling or Sampling()
        self.device: torch.device = next(model.parameters()).device
        self.layers: int = model.config.get_text_config(decoder=True).num_hidden_layers
        model.set_attn_implementation("auvsum")
        self._told: dict[int, int] = {}
        self._noticed: set[str] = set()

    def run(self, requests: Iterable[Request]) -> Iterator[Event]:
        """Yields `PrefillProgress`, `Prefilled`, `Token` and `Finished`, documents interleaved when batched.

        Out of memory with several documents together, it goes on with half as many; those that were under way are
        read again, and their tokens are not told twice.

        Raises:
            GenerationFailed: an empty prompt, logits that are not numbers, or too little memory for one document.
        """
        waiting = deque(enumerate(requests))
        self._told = {}
        batch = self.batch_size or rows_that_fit(self.model, self.policy, [request for _, request in waiting])
        while waiting:
            rows: list[_Row | None] = [None] * min(batch, len(waiting))
            try:
                yield from self._together(waiting, rows)
                continue
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if len(rows) == 1:
                    message = "the document does not fit the memory"
                    raise GenerationFailed(message, "give it a smaller budget, or read it in chunks") from error
            waiting.extendleft((row.index, row.request) for row in reversed(rows) if row)
            batch = len(rows) // 2
            release_memory(self.device)
            yield from self._notice(f"out of memory with {len(rows)} documents together: going on with {batch}")

    def _together(self, waiting: deque[tuple[int, Request]], rows: list[_Row | None]) -> Iterator[Event]:
        """Fills rows with waiting documents, and refills them, until the next document needs another cache."""
        cache = self._cache_for(waiting, len(rows))
        graph, reason = self._graph_for(cache, waiting)
        if reason is not None:
            yield from self._notice(f"the plain decode step runs: {reason}")
        while True:
            for number, row in enumerate(rows):
                if row is None and waiting and self._fits(waiting[0][1], cache):
                    rows[number] = yield from self._admit(cache, graph, number, *waiting[0])
                    waiting.popleft()
            if not any(rows):
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
        self, cache: BudgetedCache, graph: DecodeGraph | None, number: int, index: int, request: Request
    ) -> Generator[Event, None, _Row | None]:
        """Reads a prompt into a row and writes its first token; returns the row, or None when that was all."""
        if not request.ids:
            raise GenerationFailed("the prompt is empty", "give it a document")
        start = time.perf_counter()
        total = len(request.ids)
        cache.begin(total, row=number, slots=request.per_layer(self.layers))
        logits = torch.empty(0)
        for done in range(0, total, self.chunk or total):
            ids = request.ids[done : done + (self.chunk or total)]
            logits = self._read(cache, number, ids, done)
            yield PrefillProgress(index, done + len(ids), total)
        row = _Row(index, request, self.sampling.noise(index, request.max_new_tokens))
        first = self._draw(row, logits)
        row.started = time.perf_counter()
        yield Prefilled(index, total, row.started - start, cache.prefill_peak_bytes)
        going = yield from self._write(cache, number, row, first)
        if going is not None and graph is not None:
            graph.fill(number, first, row.position, request.max_new_tokens - 1, row.noise)
        return going

    def _advance(self, cache: BudgetedCache, rows: list[_Row | None]) -> Iterator[Event]:
        """One decode step for all rows."""
        tokens = [row.written[-1] if row else 0 for row in rows]
        positions = [row.position if row else 0 for row in rows]
        logits = self._step(cache, tokens, positions)
        for number, row in enumerate(rows):
            if row is not None:
                rows[number] = yield from self._write(cache, number, row, self._draw(row, logits[number]))

    def _advance_graph(self, cache: BudgetedCache, graph: DecodeGraph, rows: list[_Row | None]) -> Iterator[Event]:
        """Starts the next step of all rows and takes the tokens of the one before."""
        graph.launch(rows)
        arrived = graph.arrived()
        while arrived is not None:
            for number, (row, token) in enumerate(zip(*arrived, strict=True)):
                if row is None or token == RESTS:
                    continue
                if token == NOT_FINITE:
                    raise _not_finite()
                rows[number] = yield from self._write(cache, number, row, token)
            # Nobody writes any more: what is still under way is of rows at rest.
            arrived = None if any(rows) else graph.arrived(lag=0)

    def _write(self, cache: BudgetedCache, number: int, row: _Row, token: int) -> Generator[Event, None, _Row | None]:
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
        yield Finished(row.index, tuple(row.written), reason, seconds, cache.bytes() // cache.rows)
        return None

    def _draw(self, row: _Row, logits: Tensor) -> int:
        if not bool(logits.isfinite().all()):
            raise _not_finite()
        return self.sampling.draw(logits, row.written, row.noise[len(row.written)] if row.noise else 0.0)

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

    # -- memory -------------------------------------------------------------------------------------------------------

    def _cache_for(self, waiting: Iterable[tuple[int, Request]], rows: int) -> BudgetedCache:
        """A cache for the documents that come first, as large as the largest of them needs."""
        first = [request.per_layer(self.layers) for _, request in waiting][:rows]
        slots = [max(layer) for layer in zip(*first, strict=True)]
        return BudgetedCache(self.model.config, self.policy, slots, batch=rows)

    def _graph_for(
        self, cache: BudgetedCache, waiting: Iterable[tuple[int, Request]]
    ) -> tuple[DecodeGraph | None, str | None]:
        """The captured decode step, or why there is none."""
        if self.device.type == "cuda":
            cache.allocate(**cache_shape(self.model), device=self.device)
        reason = why_not(cache, self.device)
        if reason is not None:
            return None, reason
        fuse(self.model)
        longest = max(request.max_new_tokens for _, request in waiting)
        return DecodeGraph(self.model, cache, self.sampling, self.eos_ids, longest), None

    def _fits(self, request: Request, cache: BudgetedCache) -> bool:
        """Whether a document's budget fits the slots there are; otherwise it waits for the next cache."""
        return all(mine <= theirs for mine, theirs in zip(request.per_layer(self.layers), cache.slots, strict=True))


def _not_finite() -> GenerationFailed:
    return GenerationFailed(
        "the model produced logits that are not finite numbers", "try --dtype fp32; `auvsum doctor` checks the model"
    )

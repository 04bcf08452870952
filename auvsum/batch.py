"""Many documents, one model: taken lazily, written together where the engine can, handed on in order.

Imports nothing heavy: it runs whatever summarizer it is given.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from auvsum._version import __version__
from auvsum.config import Settings
from auvsum.errors import AuvsumError, InternalError, ModelError, OutputError
from auvsum.events import DocumentDone, DocumentEvent, DocumentFailed, Event, Failed, Finished, Notice, Text
from auvsum.rounds import Piece, Rounds
from auvsum.text.readers import Document

if TYPE_CHECKING:
    from auvsum.engine.generate import Request
    from auvsum.summarize import Plan, Summarizer, Summary

#: Documents whose next prompt needs another engine than the one that runs: beyond that many, no new ones are begun.
_MOST_WAITING = 16


@dataclass(frozen=True)
class Failure:
    """A document that has no summary."""

    id: str
    source: str
    error: AuvsumError
    settings: Settings

    def record(self) -> dict[str, Any]:
        """The document's record."""
        return {
            "id": self.id,
            "source": self.source,
            "summary": None,
            "error": self.error.record(),
            "model": self.settings.model,
            "policy": self.settings.policy,
            "warnings": [],
            "settings": {"seed": self.settings.seed, "version": __version__},
        }


Listener = Callable[[Event], None]


def run(
    summarizer: Summarizer,
    documents: Iterable[Document | Failure],
    *,
    batch_size: int | None = 1,
    ordered: bool = True,
    on_event: Listener | None = None,
) -> Iterator[Summary | Failure]:
    """See `Summarizer.run`."""
    hear = on_event or (lambda event: None)
    if batch_size == 1:
        for index, document in enumerate(documents):
            yield _announced(index, _single(summarizer, index, document, hear), hear)
        return
    waiting: dict[int, Summary | Failure] = {}
    following = 0
    for index, result in _Together(summarizer, documents, batch_size, hear).results():
        _announced(index, result, hear)
        if not ordered:
            yield result
            continue
        waiting[index] = result
        while following in waiting:
            yield waiting.pop(following)
            following += 1


def _single(summarizer: Summarizer, index: int, document: Document | Failure, hear: Listener) -> Summary | Failure:
    """One document by itself."""
    if isinstance(document, Failure):
        return document
    try:
        summary = summarizer.summarize(
            document.text,
            id=document.id,
            source=document.source,
            pages=document.pages,
            on_event=lambda event: hear(_of(event, index)),
            on_text=lambda piece: hear(Text(index, piece)),
        )
    except Exception as error:
        return failure(error, document.id, document.source, summarizer.settings)
    summary.warnings[:0] = document.warnings
    return summary


@dataclass(eq=False)
class _Begun:
    """A document that has been planned, and the prompts of its current round."""

    index: int
    document: Document
    rounds: Rounds
    pieces: Iterator[Piece]
    ahead: Piece | None = None
    over: bool = False

    def peek(self) -> Piece | None:
        """The next prompt of the round, planned; None when there is none."""
        if self.ahead is None:
            self.ahead = next(self.pieces, None)
        return self.ahead


class _Together:
    """Continuous batching: the engine asks for the next prompt when a row is free for it.

    That is the next one of the documents that have been begun (windows of map-reduce, or what their summaries are
    reduced to), and only then a new document's.
    """

    def __init__(
        self, summarizer: Summarizer, documents: Iterable[Document | Failure], size: int | None, hear: Listener
    ) -> None:
        self._summarizer = summarizer
        self._incoming = enumerate(documents)
        self._size = size
        self._hear = hear
        #: Measured once: what a run itself holds must not change the budgets of its later documents.
        self._free = summarizer.free_bytes()
        #: Documents that have prompts to be read; those with an older document's next round come first.
        self._begun: deque[_Begun] = deque()
        self._failed: list[tuple[int, Failure]] = []
        #: What the engine's requests are, by their index there.
        self._flying: dict[int, tuple[_Begun, Piece]] = {}

    def results(self) -> Iterator[tuple[int, Summary | Failure]]:
        """Index and result of every document, in the order in which they end."""
        while (begun := self._next(None)) is not None:
            assert begun.ahead is not None
            yield from self._engine_run(begun.ahead.plan)
        yield from self._drain()

    def _engine_run(self, plan: Plan) -> Iterator[tuple[int, Summary | Failure]]:
        """Writes prompts as long as there are some that are planned like this one."""
        self._flying = {}
        engine = self._summarizer.engine(plan, self._size)
        try:
            for event in engine.run(self._requests(plan.engine_key)):
                if isinstance(event, Notice):
                    self._hear(event)
                else:
                    yield from self._heard(event, engine.rows)
                yield from self._drain()
        except (ModelError, OutputError):
            raise
        except Exception:
            # One of those that were being written broke the engine, or all of them together its memory: each by itself.
            broken = list(dict.fromkeys(begun for begun, _ in self._flying.values() if not begun.over))
            self._begun = deque(begun for begun in self._begun if begun not in broken)
            for begun in broken:
                yield begun.index, _single(self._summarizer, begun.index, begun.document, self._hear)
        yield from self._drain()

    def _heard(self, event: DocumentEvent, rows: int) -> Iterator[tuple[int, Summary | Failure]]:
        """Takes note of an event; yields the document that it completes."""
        begun, piece = self._flying[event.request]
        if isinstance(event, (Finished, Failed)):
            del self._flying[event.request]
        if begun.over:  # another of its windows failed
            return
        told = begun.rounds.told(piece, replace(event, request=begun.index))
        if told is not None:
            self._hear(told)
        try:
            text = begun.rounds.hear(piece, event, rows)
        except AuvsumError as error:
            yield begun.index, self._give_up(begun, error)
            return
        if text:
            self._hear(Text(begun.index, text))
        summary, document = begun.rounds.summary, begun.document
        if summary is not None:
            summary.warnings[:0] = document.warnings
            self._summarizer.finish(summary, document.text, document.pages)
            yield begun.index, summary
        elif begun.rounds.due:
            begun.pieces = begun.rounds.pieces()
            self._begun.appendleft(begun)

    def _give_up(self, begun: _Begun, error: Exception) -> Failure:
        begun.over = True
        if begun in self._begun:
            self._begun.remove(begun)
        return failure(error, begun.document.id, begun.document.source, self._summarizer.settings)

    def _requests(self, key: object) -> Iterator[Request]:
        """The engine's requests, planned one at a time."""
        number = 0
        while (begun := self._next(key)) is not None:
            piece, begun.ahead = begun.ahead, None
            assert piece is not None
            self._flying[number] = (begun, piece)
            yield piece.request
            number += 1

    def _next(self, key: object) -> _Begun | None:
        """A document with a prompt `ahead` that is planned like `key` (None: like any).

        A new document is begun when no other has one, unless too many wait for another engine.
        """
        others = 0
        for begun in list(self._begun):
            try:
                piece = begun.peek()
            except Exception as error:
                self._failed.append((begun.index, self._give_up(begun, error)))
                continue
            if piece is None:
                self._begun.remove(begun)
            elif key in (None, piece.plan.engine_key):
                return begun
            else:
                others += 1
        if others > _MOST_WAITING or not self._begin():
            return None
        newest = self._begun[-1]
        alike = newest.ahead is not None and key in (None, newest.ahead.plan.engine_key)
        return newest if alike else None

    def _begin(self) -> bool:
        """Plans the next document and its first prompt; those that cannot be planned are put aside as failed."""
        for index, document in self._incoming:
            if isinstance(document, Failure):
                self._failed.append((index, document))
                continue
            try:
                plan = self._summarizer.plan(document.text, free=self._free)
                rounds = Rounds(self._summarizer, plan, document.text, document.id, document.source, free=self._free)
                begun = _Begun(index, document, rounds, rounds.pieces())
                begun.peek()
            except Exception as error:
                failed = failure(error, document.id, document.source, self._summarizer.settings)
                self._failed.append((index, failed))
                continue
            self._begun.append(begun)
            self._hear(rounds.started(index))
            return True
        return False

    def _drain(self) -> Iterator[tuple[int, Failure]]:
        failed, self._failed = self._failed, []
        yield from failed


def failure(error: Exception, id: str, source: str, settings: Settings) -> Failure:
    """An error as a failed document.

    Raises:
        ModelError, OutputError: there is no going on without a model or an output.
    """
    if isinstance(error, (ModelError, OutputError)):
        raise error
    return Failure(id, source, error if isinstance(error, AuvsumError) else InternalError(error), settings)


def _of(event: Event, index: int) -> Event:
    """An event of the engine about its only document, as one about the document `index`."""
    return event if isinstance(event, Notice) else replace(event, request=index)


def _announced(index: int, result: Summary | Failure, hear: Listener) -> Summary | Failure:
    if isinstance(result, Failure):
        hear(DocumentFailed(index, result.id, result.error))
    else:
        hear(DocumentDone(index, result.id))
    return result


__all__ = ["Failure", "failure", "run"]

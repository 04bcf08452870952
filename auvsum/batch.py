"""Many documents, one model: taken lazily, written together where the engine can, handed on in order.

Imports nothing heavy: it runs whatever summarizer it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from auvsum._version import __version__
from auvsum.config import Settings
from auvsum.errors import AuvsumError, InternalError, ModelError, OutputError
from auvsum.events import DocumentDone, DocumentFailed, Event, Finished, Notice, Text
from auvsum.text.readers import Document

if TYPE_CHECKING:
    from auvsum.summarize import Plan, Summarizer, Summary, Writing


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


class _Together:
    """Continuous batching: the engine asks for the next document when a row is free for it."""

    def __init__(
        self, summarizer: Summarizer, documents: Iterable[Document | Failure], size: int | None, hear: Listener
    ) -> None:
        self._summarizer = summarizer
        self._incoming = enumerate(documents)
        self._size = size
        self._hear = hear
        #: Measured once: what a run itself holds must not change the budgets of its later documents.
        self._free = summarizer.free_bytes()
        #: The next document, planned, when it needs another engine than the one that runs.
        self._next: tuple[int, Document, Plan] | None = None
        self._failed: list[tuple[int, Failure]] = []
        #: What the engine's requests are, by their index there.
        self._flying: dict[int, tuple[int, Document, Writing]] = {}

    def results(self) -> Iterator[tuple[int, Summary | Failure]]:
        """Index and result of every document, in the order in which they end."""
        while (upcoming := self._peek()) is not None:
            if upcoming[2].passes == 1:
                yield from self._engine_run(upcoming[2])
            else:
                self._next = None
                yield upcoming[0], _single(self._summarizer, upcoming[0], upcoming[1], self._hear)
        yield from self._drain()

    def _engine_run(self, plan: Plan) -> Iterator[tuple[int, Summary | Failure]]:
        """Writes documents as long as they are planned like this one."""
        self._flying = {}
        engine = self._summarizer.engine(plan, self._size)
        try:
            for event in engine.run(self._requests(plan.engine_key)):
                if isinstance(event, Notice):
                    self._hear(event)
                    continue
                index, document, writing = self._flying[event.request]
                self._hear(replace(event, request=index))
                try:
                    piece = writing.hear(event)
                except AuvsumError as error:
                    del self._flying[event.request]
                    yield index, failure(error, writing.summary.id, writing.summary.source, self._summarizer.settings)
                else:
                    if piece:
                        self._hear(Text(index, piece))
                    if isinstance(event, Finished):
                        del self._flying[event.request]
                        writing.summary.batch_size = engine.rows
                        self._summarizer.finish(writing.summary, document.text, document.pages)
                        yield index, writing.summary
                yield from self._drain()
        except (ModelError, OutputError):
            raise
        except Exception:
            # One of those that were being written broke the engine, or all of them together its memory: each by itself.
            for index, document, _ in self._flying.values():
                yield index, _single(self._summarizer, index, document, self._hear)
        yield from self._drain()

    def _requests(self, key: object) -> Iterator[Any]:
        """The engine's requests, planned one at a time."""
        number = 0
        while (upcoming := self._peek()) is not None and upcoming[2].engine_key == key:
            from auvsum.summarize import Writing

            index, document, plan = upcoming
            self._next = None
            writing = Writing(self._summarizer, plan, document.id, document.source)
            writing.summary.warnings[:0] = document.warnings
            self._flying[number] = (index, document, writing)
            self._hear(writing.started(index))
            yield writing.request
            number += 1

    def _peek(self) -> tuple[int, Document, Plan] | None:
        """The next document that can be planned; those that cannot are put aside as failed."""
        while self._next is None:
            index, document = next(self._incoming, (0, None))
            if document is None:
                return None
            if isinstance(document, Failure):
                self._failed.append((index, document))
                continue
            try:
                self._next = index, document, self._summarizer.plan(document.text, free=self._free)
            except Exception as error:
                failed = failure(error, document.id, document.source, self._summarizer.settings)
                self._failed.append((index, failed))
        return self._next

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

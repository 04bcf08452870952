"""Deals documents out to workers, as many as each wants, and hands on what they make, in order.

    with Pool(Processes(settings, ["cuda:0", "cuda:1"]), settings) as pool:
        for result in pool.run(documents):
            ...

What a worker had when it died is done again, each document by itself, so that one which kills its worker is known: it
fails when it does so again, and takes no other with it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol

from auvsum.batch import Failure
from auvsum.config import Settings
from auvsum.errors import GenerationFailed
from auvsum.events import DocumentDone, DocumentFailed, Event, Warned
from auvsum.scale.worker import Broken, Died, Message, Ready, Result, Told, Wants, Written
from auvsum.text.readers import Document

#: In order, at most so many results a place in the workers wait for one that takes long.
_AHEAD = 8


class Crew(Protocol):
    """Workers somewhere, by number. One that died is replaced under its number, which then says `Ready` again."""

    names: list[str]

    def give(self, worker: int, index: int, document: Document) -> None: ...
    def hear(self) -> Iterable[tuple[int, Message]]:
        """What workers say; waits until one says something, or for a moment."""
        ...

    def close(self) -> None: ...


@dataclass
class _Worker:
    """What a worker is doing, as seen from here. `size` is 0 while it loads its model.

    Attributes:
        wants: documents that it has asked for and not been given.
    """

    size: int = 0
    wants: int = 0
    has: dict[int, Document] = field(default_factory=dict)
    #: Whether it has a document that is to be alone.
    alone: bool = False

    @property
    def room(self) -> int:
        """Documents that may be given to it."""
        return 0 if self.alone else max(0, self.wants)

    def ready(self, message: Ready) -> None:
        """It has its model, and nothing to do."""
        self.size = self.wants = message.size


class Pool:
    """Workers with a model each. Closed at the end, or when a run is left before its end."""

    def __init__(self, crew: Crew, settings: Settings) -> None:
        self._crew = crew
        self._settings = settings
        self._workers = [_Worker() for _ in crew.names]

    @property
    def workers(self) -> int:
        """How many there are."""
        return len(self._workers)

    @property
    def complete(self) -> bool:
        """Whether every worker has its model."""
        return all(worker.size for worker in self._workers)

    def start(self, on_event: Callable[[Event], None] | None = None) -> Ready:
        """Waits for the first worker that has its model, and as long again for the others; late ones join later.

        A small folder is shared out between those that are there at the start.

        Raises:
            AuvsumError: the model or the device is not to be had.
        """
        first: Ready | None = None
        begun, took = time.monotonic(), 0.0
        while first is None or not (self.complete or time.monotonic() - begun > 2 * took):
            for worker, message in self._crew.hear():
                if isinstance(message, Broken):
                    raise message.error
                if isinstance(message, Ready):
                    self._workers[worker].ready(message)
                    took = took or time.monotonic() - begun
                    first = first or message
                elif isinstance(message, Told) and on_event is not None:
                    for event in message.events:
                        on_event(event)
        return first

    def run(
        self,
        documents: Iterable[Document | Failure],
        *,
        ordered: bool = True,
        together: bool = True,
        on_event: Callable[[Event], None] | None = None,
    ) -> Iterator[Written | Failure]:
        """As `Summarizer.run`, and its documents are as lazily taken: when a worker has room for one."""
        hear = on_event or (lambda event: None)
        work = _Work(self._crew, self._workers, self._settings, documents, ordered, together, hear)
        waiting: dict[int, Written | Failure] = {}
        try:
            for index, result in work.results():
                _announce(index, result, hear)
                if not ordered:
                    yield result
                    continue
                waiting[index] = result
                while work.following in waiting:
                    done = waiting.pop(work.following)
                    work.following += 1
                    yield done
        finally:
            if any(worker.has for worker in self._workers):
                self.close()

    def close(self) -> None:
        """Ends all workers."""
        self._crew.close()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class _Work:
    """The documents of one run, on their way through the workers."""

    def __init__(
        self,
        crew: Crew,
        workers: list[_Worker],
        settings: Settings,
        documents: Iterable[Document | Failure],
        ordered: bool,
        together: bool,
        hear: Callable[[Event], None],
    ) -> None:
        self._crew = crew
        self._workers = workers
        self._settings = settings
        self._incoming = enumerate(documents)
        self._ordered = ordered
        self._together = together
        self._hear = hear
        self._ended = False
        self._taken = 0
        #: Documents whose worker died; and those that are being, or have been, done again.
        self._suspects: deque[tuple[int, Document]] = deque()
        self._again: set[int] = set()
        #: The next document that the reader wants, in order.
        self.following = 0

    def results(self) -> Iterator[tuple[int, Written | Failure]]:
        """Index and result of every document, in the order in which they end."""
        while True:
            yield from self._deal()
            if self._ended and not self._suspects and not any(worker.has for worker in self._workers):
                return
            for worker, message in self._crew.hear():
                yield from self._take(worker, message)

    def _deal(self) -> Iterator[tuple[int, Failure]]:
        """Gives every worker what it has room for; while a suspect waits for an idle one, nothing else."""
        for number, worker in enumerate(self._workers):
            if self._suspects and worker.size and not worker.has:
                worker.alone = True
                self._give(number, *self._suspects.popleft())
        while not self._suspects and (free := self._most_room()) is not None and not self._too_far:
            index, document = next(self._incoming, (0, None))
            if document is None:
                self._ended = True
                return
            self._taken = index + 1
            if isinstance(document, Failure):
                yield index, document
            else:
                self._give(free, index, document)

    @property
    def _too_far(self) -> bool:
        """Whether enough has been read past the document that is wanted next."""
        places = sum(worker.size + 1 for worker in self._workers)
        return self._ended or (self._ordered and self._taken - self.following > _AHEAD * places)

    def _most_room(self) -> int | None:
        if not self._together and any(worker.has for worker in self._workers):
            return None
        number = max(range(len(self._workers)), key=lambda number: self._workers[number].room)
        return number if self._workers[number].room else None

    def _give(self, number: int, index: int, document: Document) -> None:
        self._workers[number].has[index] = document
        self._workers[number].wants -= 1
        self._crew.give(number, index, document)

    def _take(self, number: int, message: Message) -> Iterator[tuple[int, Written | Failure]]:
        """What a worker said."""
        worker = self._workers[number]
        if isinstance(message, Broken):
            raise message.error
        if isinstance(message, Ready):
            worker.ready(message)
        elif isinstance(message, Wants):
            worker.wants += message.number
        elif isinstance(message, Told):
            for event in message.events:
                self._hear(event)
        elif isinstance(message, Result):
            if worker.has.pop(message.index, None) is not None:
                worker.alone = False
                yield message.index, message.result
        else:
            yield from self._bury(worker, self._crew.names[number], message)

    def _bury(self, worker: _Worker, name: str, message: Died) -> Iterator[tuple[int, Failure]]:
        """A worker died: what it had is done again, or has failed."""
        lost, worker.has, worker.size, worker.wants, worker.alone = worker.has, {}, 0, 0, False
        names = ", ".join(document.id for document in list(lost.values())[:3]) + (", ..." if len(lost) > 3 else "")
        self._hear(Warned(f"the worker on {name} {message.why}" + (f"; it had {names}" if lost else "")))
        for index, document in lost.items():
            if index in self._again:
                error = GenerationFailed(
                    f"it ended its worker twice, the second time alone there (the last one {message.why})",
                    "is there memory enough for it? a smaller --budget or --strategy stream takes less",
                )
                yield index, Failure(document.id, document.source, error, self._settings)
            else:
                self._again.add(index)
                self._suspects.append((index, document))


def _announce(index: int, result: Written | Failure, hear: Callable[[Event], None]) -> None:
    if isinstance(result, Failure):
        hear(DocumentFailed(index, result.id, result.error))
    else:
        hear(DocumentDone(index, result.id))


__all__ = ["Crew", "Pool"]

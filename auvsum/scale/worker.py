"""One worker's end of a pool: documents in, events and results out. The same in a process and in a Ray actor."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from auvsum._env import prepare
from auvsum.batch import Failure
from auvsum.config import Settings
from auvsum.errors import AuvsumError, InternalError
from auvsum.events import DocumentDone, DocumentFailed, Event, Notice, Text, Token
from auvsum.text.readers import Document

if TYPE_CHECKING:
    from auvsum.engine.models import LoadedModel
    from auvsum.summarize import Summarizer, Summary

#: Seconds to wait for one more document before those that are being written are finished without it.
_PATIENCE = 0.1
#: Documents that lie ready for the next free row: no more, because another worker could have begun them.
_AHEAD = 1
#: Tokens are told together, this many seconds of them at a time: the panel draws four times a second.
_TELL = 0.1


@dataclass(frozen=True)
class Written:
    """A summary made elsewhere: what is left of a `Summary` without its model."""

    id: str
    source: str
    text: str
    warnings: list[str]
    made: dict[str, Any]

    def record(self) -> dict[str, Any]:
        """The document's record."""
        return dict(self.made)


@dataclass(frozen=True)
class Ready:
    """The model is loaded. `size`: documents written together."""

    size: int
    name: str
    load_seconds: float


@dataclass(frozen=True)
class Wants:
    """There is use for so many documents more; what `Ready` says is wanted first."""

    number: int


@dataclass(frozen=True)
class Told:
    """What happened to documents; `request` is the document's index in the pool."""

    events: tuple[Event, ...]


@dataclass(frozen=True)
class Result:
    """A document is finished."""

    index: int
    result: Written | Failure


@dataclass(frozen=True)
class Broken:
    """There is no going on: no model, no device, or a defect outside of any document."""

    error: AuvsumError


@dataclass(frozen=True)
class Died:
    """The worker is gone, and with it all it was given. Another takes its place, and says `Ready`."""

    why: str


Message = Ready | Wants | Told | Result | Broken | Died
Inbox = queue.Queue[tuple[int, Document]]
Send = Callable[[Message], None]
Load = Callable[[Settings], "Summarizer"]


def load(settings: Settings) -> Summarizer:
    """The summarizer of the settings."""
    from auvsum.summarize import Summarizer

    return Summarizer.from_settings(settings)


def work(load: Load, settings: Settings, inbox: Inbox, send: Send) -> None:
    """Loads a model, then summarizes what comes, for ever or until there is no going on."""
    try:
        prepare(download=settings.download)
        summarizer = load(settings)
        loaded = summarizer.loaded
        size = summarizer.batch_size or _most(loaded)
        send(Ready(size, loaded.name, loaded.load_seconds))
        supply = _Supply(inbox, size, send)
        while True:
            _write(summarizer, _Portion(supply, size), send)
    except AuvsumError as error:
        send(Broken(error))
    except Exception as error:
        send(Broken(InternalError(error)))


def _most(loaded: LoadedModel) -> int:
    """Documents for an engine that chooses by itself how many it writes together."""
    from auvsum.engine.memory import MOST_ROWS

    return MOST_ROWS[loaded.device.type]


class _Supply:
    """The inbox of a worker, which asks for what comes there.

    Args:
        asked: documents that have been asked for already.
    """

    def __init__(self, inbox: Inbox, asked: int, send: Send) -> None:
        self._inbox = inbox
        self._send = send
        #: Asked for and not taken yet, whether they have come or not.
        self._owed = asked

    def want(self, number: int) -> None:
        """Sees to it that so many are here or on their way."""
        if number > self._owed:
            self._send(Wants(number - self._owed))
            self._owed = number

    def take(self) -> tuple[int, Document]:
        """The next document, however long it takes to come."""
        taken = self._inbox.get()
        self._owed -= 1
        return taken

    def another(self) -> tuple[int, Document] | None:
        """The next document if it comes soon."""
        try:
            taken = self._inbox.get(timeout=_PATIENCE)
        except queue.Empty:
            return None
        self._owed -= 1
        return taken


class _Portion:
    """Documents for one run of the engine: it ends when no more come, so that none waits for those to come.

    One that starts with fewer than are written together is only those: the engine makes its batch at the start. Others
    gather meanwhile for the next. One that starts with as many goes on with a document for each that is finished; they
    are asked for one by one, so that workers who are fed from one queue finish it together.
    """

    def __init__(self, supply: _Supply, size: int) -> None:
        self._supply = supply
        self._size = size
        #: The pool's number of every document, by the engine's.
        self.indices: list[int] = []

    def __iter__(self) -> Iterator[Document]:
        supply = self._supply
        supply.want(self._size)
        first = [supply.take()]
        while len(first) < self._size and (another := supply.another()) is not None:
            first.append(another)
        full = len(first) == self._size
        supply.want(_AHEAD if full else self._size)
        for index, document in first:
            self.indices.append(index)
            yield document
        while full and (another := supply.another()) is not None:
            supply.want(_AHEAD)
            self.indices.append(another[0])
            yield another[1]
        supply.want(self._size)


def _write(summarizer: Summarizer, portion: _Portion, send: Send) -> None:
    """One run of the engine."""
    told = _Telling(portion, send)
    for result in summarizer.run(portion, ordered=False, on_event=told.hear):
        told.flush()
        # A result comes right after the event that announces it.
        send(Result(told.announced, result if isinstance(result, Failure) else _written(result)))
    told.flush()


class _Telling:
    """Passes events on under the pool's numbers; tokens in bundles."""

    def __init__(self, portion: _Portion, send: Send) -> None:
        self._portion = portion
        self._send = send
        self._events: list[Event] = []
        self._last = time.monotonic()
        self.announced = -1

    def hear(self, event: Event) -> None:
        if isinstance(event, Notice):
            self._events.append(event)
            return
        index = self._portion.indices[event.request]
        if isinstance(event, (DocumentDone, DocumentFailed)):
            self.announced = index  # the pool says so itself, when the result is there
            return
        self._events.append(replace(event, request=index))
        if not isinstance(event, (Token, Text)) or time.monotonic() - self._last > _TELL:
            self.flush()

    def flush(self) -> None:
        if self._events:
            self._send(Told(tuple(self._events)))
        self._events = []
        self._last = time.monotonic()


def _written(summary: Summary) -> Written:
    return Written(summary.id, summary.source, summary.text, list(summary.warnings), summary.record())


__all__ = ["Broken", "Died", "Inbox", "Load", "Message", "Ready", "Result", "Told", "Wants", "Written", "load", "work"]

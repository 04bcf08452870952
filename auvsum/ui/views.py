"""What a run shows of its events while it works. Each view hears every event; none of them decides anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from auvsum.events import DocumentDone, DocumentFailed, DocumentStarted, Event, PrefillProgress, Text
from auvsum.ui.console import Console, PrefillBar


class View(Protocol):
    def hear(self, event: Event) -> None: ...
    def skipped(self) -> None: ...
    def close(self) -> None: ...


class Lines:
    """Off a terminal: nothing while a document is read and written; its line comes when it is done."""

    def hear(self, event: Event) -> None:
        pass

    def skipped(self) -> None:
        pass

    def close(self) -> None:
        pass


class Stream:
    """On a terminal: a bar while a document is read, then its text as it comes, on stdout.

    Args:
        title: what stands before a document's text.
    """

    def __init__(self, console: Console, title: Callable[[str], str]) -> None:
        self._console = console
        self._title = title
        self._name = ""
        self._bar: PrefillBar | None = None
        self._started = False

    def hear(self, event: Event) -> None:
        if isinstance(event, DocumentStarted):
            self._name = event.name
            self._bar = self._console.progress(event.name)
        elif isinstance(event, PrefillProgress) and self._bar is not None:
            self._bar.update(event.done_tokens, event.total_tokens)
        elif isinstance(event, Text):
            self._text(event.piece)
        elif isinstance(event, (DocumentDone, DocumentFailed)):
            self.close()

    def skipped(self) -> None:
        pass

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._started:
            self._started = False
            self._console.write("\n")

    def _text(self, piece: str) -> None:
        if self._bar is not None:
            self._bar.stop()
        if not self._started:
            piece = piece.lstrip()
            if not piece:
                return
            self._started = True
            piece = self._title(self._name) + piece
        self._console.write(piece)

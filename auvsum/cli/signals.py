"""Ctrl-C and SIGTERM: the first ends the run in good order, the second at once; neither leaves half an output."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from auvsum.cli.guard import INTERRUPTED

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM") if hasattr(signal, name))


class Interruptible:
    """Turns signals into `KeyboardInterrupt`, except where that would tear something: there it waits."""

    def __init__(self) -> None:
        self._asked = False
        self._shielded = False

    @contextmanager
    def active(self) -> Iterator[Interruptible]:
        """Within, the signals are handled here."""
        before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def shielded(self) -> Iterator[None]:
        """Within, a first signal has to wait until the end: an output and its line in the journal belong together."""
        self._shielded = True
        try:
            yield
        finally:
            self._shielded = False
        if self._asked:
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            os._exit(INTERRUPTED)
        self._asked = True
        if not self._shielded:
            raise KeyboardInterrupt

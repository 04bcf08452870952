"""The live panel on stderr: what is done, what is being read and written, and what it takes. It reads only events.

It never touches stdout, draws at most four times a second, and fits 60 columns.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.console import Group
from rich.live import Live
from rich.panel import Panel as Frame
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text as Line

from auvsum.budget import ResolvedBudget, size
from auvsum.events import (
    DocumentDone,
    DocumentFailed,
    DocumentStarted,
    Event,
    Notice,
    Prefilled,
    PrefillProgress,
    Text,
    Token,
)
from auvsum.ui.console import neutralize
from auvsum.ui.usage import gpu_bytes, resident_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console as RichConsole
    from rich.console import RenderableType

#: Seconds over which a speed is measured.
_WINDOW = 10.0
_TEXT_LINES = 3


@dataclass
class _Flight:
    """A document that is being read or written."""

    name: str
    prompt_tokens: int
    budget: ResolvedBudget
    read: int = 0
    written: int = 0
    kv_bytes: int = 0
    text: str = ""
    begun: float = 0.0


@dataclass
class State:
    """What the panel knows, from events alone.

    Args:
        total: documents in all. workers: how many read at the same time. clock: seconds, for the tests.
    """

    total: int
    workers: int = 1
    clock: Callable[[], float] = time.monotonic
    done: int = 0
    failed: int = 0
    skipped: int = 0
    current: int | None = None
    flights: dict[int, _Flight] = field(default_factory=dict)
    #: (when, tokens) of what was read and written of late.
    _reads: deque[tuple[float, int, float]] = field(default_factory=lambda: deque(maxlen=32))
    _writes: deque[float] = field(default_factory=lambda: deque(maxlen=512))

    def __post_init__(self) -> None:
        self.started = self._last_read = self.clock()

    def hear(self, event: Event) -> None:
        now = self.clock()
        if isinstance(event, DocumentStarted):
            self.flights[event.request] = _Flight(event.name, event.prompt_tokens, event.budget, begun=now)
            self.current = event.request
            self._last_read = now
        elif isinstance(event, (DocumentDone, DocumentFailed)):
            self.flights.pop(event.request, None)
            self.done += isinstance(event, DocumentDone)
            self.failed += isinstance(event, DocumentFailed)
            if self.current == event.request:
                self.current = next(iter(self.flights), None)
        elif not isinstance(event, Notice) and (flight := self.flights.get(event.request)) is not None:
            self._hear_about(flight, event, now)

    def _hear_about(self, flight: _Flight, event: Event, now: float) -> None:
        if isinstance(event, PrefillProgress):
            self._reads.append((now, event.done_tokens - flight.read, now - self._last_read))
            flight.read = event.done_tokens
            self.current = event.request
            self._last_read = now
        elif isinstance(event, Prefilled):
            flight.kv_bytes = event.kv_bytes
            self._last_read = now
        elif isinstance(event, Token):
            flight.written += 1
            self._writes.append(now)
            self._last_read = now
        elif isinstance(event, Text):
            flight.text += event.piece

    @property
    def left(self) -> int:
        """Documents that are not finished."""
        return max(0, self.total - self.done - self.failed - self.skipped)

    @property
    def reading_speed(self) -> float:
        """Prompt tokens a second of late: while reading, or of several workers together."""
        if self.workers > 1:
            recent = [(at, tokens) for at, tokens, _ in self._reads if self.clock() - at <= _WINDOW]
            passed = recent[-1][0] - recent[0][0] if recent else 0.0
            return sum(tokens for _, tokens in recent[1:]) / passed if passed > 0 else 0.0
        seconds = sum(took for _, _, took in self._reads)
        return sum(tokens for _, tokens, _ in self._reads) / seconds if seconds > 0 else 0.0

    @property
    def writing_speed(self) -> float:
        """New tokens a second, over all documents, of late."""
        now = self.clock()
        recent = [at for at in self._writes if now - at <= _WINDOW]
        return (len(recent) - 1) / (recent[-1] - recent[0]) if len(recent) > 1 and recent[-1] > recent[0] else 0.0

    @property
    def seconds_left(self) -> float | None:
        """From the documents so far; `None` before the first one is done."""
        finished = self.done + self.failed
        return (self.clock() - self.started) / finished * self.left if finished else None


class Panel:
    """Draws a `State` on stderr.

    Args:
        console: a Rich console on stderr. total: documents in all. workers: see `State`.
    """

    def __init__(self, console: RichConsole, total: int, workers: int = 1) -> None:
        self.state = State(total, workers)
        self._console = console
        # Rich draws from a thread of its own.
        self._lock = threading.RLock()
        self._live = Live(
            console=console,
            get_renderable=self.render,
            refresh_per_second=4,
            transient=True,
            # Rich must not capture the streams: stdout carries the summaries.
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._live.start()

    def hear(self, event: Event) -> None:
        with self._lock:
            self.state.hear(event)

    def skipped(self) -> None:
        self.state.skipped += 1

    def close(self) -> None:
        self._live.stop()

    @contextmanager
    def away(self) -> Iterator[None]:
        """Within, the panel is not on the terminal: something else is being written there."""
        self._live.stop()
        try:
            yield
        finally:
            self._live.start()

    def above(self, line: str, style: str = "") -> None:
        """A line of text that stays, above the panel."""
        self._console.print(Line(line, style=style), soft_wrap=True)

    def render(self) -> RenderableType:
        """The whole panel; everything that comes from outside has passed `neutralize` and is no markup."""
        with self._lock:
            return self._render()

    def _render(self) -> RenderableType:
        state = self.state
        rows: list[RenderableType] = [self._documents(), _bar(state.done + state.failed + state.skipped, state.total)]
        flight = state.flights.get(state.current) if state.current is not None else None
        if flight is not None:
            rows += self._current(flight)
        rows.append(self._resources())
        return Frame(Group(*rows), title="auvsum", title_align="left", border_style="dim", padding=(0, 1))

    def _documents(self) -> Line:
        state = self.state
        line = Line.assemble((f"{state.done} done", "green"), " · ")
        line.append(f"{state.failed} failed", "red" if state.failed else "dim")
        if state.skipped:
            line.append(f" · {state.skipped} skipped", "dim")
        line.append(f" · {state.left} left")
        if state.left and state.seconds_left is not None:
            line.append(f" · about {duration(state.seconds_left)}")
        return _one_line(line)

    def _current(self, flight: _Flight) -> list[RenderableType]:
        name = Line(neutralize(flight.name).replace("\n", " "), style="bold")
        others = len(self.state.flights) - 1
        if others:
            name.append(f"  (+{others})", "dim")
        if flight.read < flight.prompt_tokens:
            share = flight.read / max(1, flight.prompt_tokens)
            what = Line(f"reading {flight.read:,} of {flight.prompt_tokens:,} tokens ({share:.0%})")
        else:
            what = Line(f"read {flight.prompt_tokens:,} tokens · {flight.written} written")
        text = Line(" ".join(neutralize(flight.text).split()), style="italic")
        # Only the end of the text: it always takes the same room, so that the panel does not jump.
        width = max(20, self._console.width - 4)
        lines = text.wrap(self._console, width)[-_TEXT_LINES:]
        shown = Line("\n").join([*lines, *[Line("")] * (_TEXT_LINES - len(lines))])
        return [_one_line(name), _one_line(what), shown]

    def _resources(self) -> RenderableType:
        state = self.state
        flights = state.flights.values()
        live = sum(flight.kv_bytes for flight in flights)
        budget = sum(flight.budget.bytes for flight in flights)
        full = sum(flight.budget.full_bytes for flight in flights)
        cells = [
            ("read", f"{state.reading_speed:,.0f} tok/s"),
            ("write", f"{state.writing_speed:,.1f} tok/s"),
            ("KV", f"{size(live)} of {size(budget)}"),
            ("full cache", size(full)),
            ("RSS", size(resident_bytes())),
        ]
        gpu = gpu_bytes()
        if gpu is not None:
            cells.append(("GPU", size(gpu)))
        width = self._console.width
        columns = 1 if width < 50 else 2 if width < 90 else 3 if width < 160 else 6
        table = Table.grid(padding=(0, 2))
        for _ in range(columns):
            table.add_column(style="dim", no_wrap=True)
            table.add_column(no_wrap=True, min_width=14)
        for at in range(0, len(cells), columns):
            table.add_row(*(part for cell in cells[at : at + columns] for part in cell))
        return table


def duration(seconds: float) -> str:
    """`42 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _bar(done: int, total: int) -> RenderableType:
    # By itself a bar does not end its line.
    row = Table.grid(expand=True)
    row.add_row(ProgressBar(total=max(1, total), completed=done))
    return row


def _one_line(line: Line) -> Line:
    line.no_wrap = True
    line.overflow = "ellipsis"
    return line

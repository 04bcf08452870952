"""What people read: lines on stderr, data on stdout. Nothing that a model or a document says passes through markup."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING

from auvsum.errors import OutputError

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.progress import Progress

    from auvsum.ui.panel import Panel

_STYLES = {"red": "\x1b[31m", "yellow": "\x1b[33m", "dim": "\x1b[2m"}
_RESET = "\x1b[0m"
#: Control characters as harmless pictures; newline and tab stay. C1 controls start escape sequences too.
_PICTURES = {
    **{c: chr(0x2400 + c) for c in range(0x20) if chr(c) not in "\n\t"},
    0x7F: "\u2421",
    **dict.fromkeys(range(0x80, 0xA0), "\ufffd"),
}


def neutralize(text: str) -> str:
    """Text that cannot steer a terminal."""
    return text.translate(_PICTURES)


class Console:
    """The two streams of one run.

    Args:
        color: `auto` (a terminal, and NO_COLOR unset), `always` or `never`.
        quiet: only errors on stderr.
        verbose: `detail` lines too.
        debug: tracebacks for errors.
    """

    def __init__(self, color: str = "auto", quiet: bool = False, verbose: bool = False, debug: bool = False) -> None:
        self.quiet = quiet
        self.verbose = verbose and not quiet
        self.debug = debug
        #: While there is one, lines are shown above it, and it gives way to what stdout shows on the same terminal.
        self.panel: Panel | None = None
        self.stdout_is_terminal = _is_terminal(sys.stdout)
        self.stderr_is_terminal = _is_terminal(sys.stderr)
        plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
        self.color = color == "always" or (color == "auto" and self.stderr_is_terminal and not plain)

    def note(self, text: str) -> None:
        """What happened, unless `--quiet`."""
        if not self.quiet:
            self._line(text)

    def detail(self, text: str) -> None:
        """What only `--verbose` asks for."""
        if self.verbose:
            self._line(text, "dim")

    def warn(self, text: str) -> None:
        if not self.quiet:
            self._line(f"warning: {text}", "yellow")

    def error(self, message: str, hint: str = "") -> None:
        self._line(f"error: {message}", "red")
        if hint:
            self._line(f"  hint: {hint}")

    def write(self, text: str) -> None:
        """Data on stdout as UTF-8. On a terminal control characters become pictures.

        Raises:
            OutputError: when it cannot be written.
        """
        if sys.stdout is None:
            raise OutputError("standard output is closed", "send it to a file or a pipe")
        if self.stdout_is_terminal:
            text = neutralize(text)
            if self.panel is not None:
                with self.panel.away():
                    self._write(text)
                return
        self._write(text)

    def _write(self, text: str) -> None:
        try:
            # A lone surrogate (an undecodable file name) becomes \udcXX, which JSON reads as what it was.
            sys.stdout.buffer.write(text.encode("utf-8", "backslashreplace"))
            sys.stdout.buffer.flush()
        except OSError as error:
            _drop_stdout()
            raise OutputError(f"standard output cannot be written: {error.strerror}", "check the disk") from error

    @contextmanager
    def status(self, text: str) -> Iterator[None]:
        """A spinner on a terminal while something takes long; nothing elsewhere."""
        if self.quiet or not self.stderr_is_terminal:
            yield
            return
        with self.rich().status(neutralize(text).replace("[", r"\[")):
            yield

    def progress(self, label: str) -> PrefillBar:
        """A bar for the tokens of one prompt, drawn on a terminal only."""
        return PrefillBar(None if self.quiet or not self.stderr_is_terminal else self.rich(), label)

    def rich(self) -> RichConsole:
        """A Rich console on stderr, for what is drawn."""
        from rich.console import Console as RichConsole

        return RichConsole(stderr=True, no_color=not self.color, highlight=False)

    def _line(self, text: str, style: str = "") -> None:
        if sys.stderr is None:
            return
        line = neutralize(text.replace("\n", " "))
        if self.panel is not None:
            self.panel.above(line, style)
            return
        if self.color and style:
            line = f"{_STYLES[style]}{line}{_RESET}"
        sys.stderr.buffer.write(f"{line}\n".encode("utf-8", "backslashreplace"))
        sys.stderr.buffer.flush()


class PrefillBar:
    """Tokens read of one prompt; vanishes when it is read."""

    def __init__(self, console: RichConsole | None, label: str) -> None:
        self._console = console
        self._label = neutralize(label).replace("[", r"\[")
        self._bar: Progress | None = None

    def update(self, done: int, total: int) -> None:
        if self._console is None:
            return
        if self._bar is None:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn(f"{self._label}: reading"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            # Rich must not capture the streams: the summary is written beside it.
            self._bar = Progress(
                *columns, console=self._console, transient=True, redirect_stdout=False, redirect_stderr=False
            )
            self._bar.add_task("read", total=total)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=done)

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _is_terminal(stream: IO[str] | None) -> bool:
    return stream is not None and not stream.closed and stream.isatty()


def _drop_stdout() -> None:
    """Nothing more can be written; without this the interpreter would complain once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

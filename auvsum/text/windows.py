"""A long text cut into windows: at paragraphs where that works, else at sentences, else anywhere; headings go along."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

_PARAGRAPH_END = re.compile(r"\n[ \t]*\n\s*")
_SENTENCE_END = re.compile(r"(?<=[.!?…。！？])[\"'”’)\]]*\s+(?=[\"'“‘(\[]*[^\W\d_a-z]|[-*•\d])|(?<=[。！？])")
_HEADING = re.compile(
    r"#{1,6}\s+\S.*|(?:(?:chapter|part|section|appendix)\b|[0-9IVX]+(?:\.\d+)*\.?\s)[^.!?]{1,70}", re.IGNORECASE
)
#: Tokens of a text are counted this many pieces at a time.
_AT_ONCE = 1024

Count = Callable[[Sequence[str]], list[int]]


@dataclass(frozen=True)
class Window:
    """A stretch of a text, without a copy of it.

    Attributes:
        heading: the last heading before it, or its own first line; may be empty.
        tokens: how many its pieces have.
    """

    source: str
    start: int
    end: int
    heading: str
    tokens: int

    @property
    def text(self) -> str:
        """The stretch, without blanks around it."""
        return self.source[self.start : self.end].strip()


def sentences(text: str) -> list[str]:
    """The sentences of a text, without blanks around them."""
    return [part for line in _PARAGRAPH_END.split(text) for part in _SENTENCE_END.split(line.strip()) if part.strip()]


def sentence_spans(text: str) -> Iterator[tuple[int, int]]:
    """Start and end of each sentence, which no paragraph's end divides, with the blanks that follow it."""
    for start, end in _split(text, 0, len(text), _PARAGRAPH_END):
        yield from _split(text, start, end, _SENTENCE_END)


def cut(text: str, room: int, count: Count) -> list[Window]:
    """Windows of at most `room` tokens and about equal length, which together are the whole text.

    Args:
        count: how many tokens each of some strings has.
    """
    units = list(_units(text, room, count))
    total = sum(tokens for _, _, tokens in units)
    number = -(-total // room)
    windows: list[Window] = []
    heading = ""
    start = end = held = done = 0
    for unit_start, unit_end, tokens in units:
        # The next window begins where its share of the text does, or where this one is full.
        if held and (held + tokens > room or done >= total * (len(windows) + 1) / number):
            windows.append(_window(text, start, end, heading, held))
            heading, start, held = _last_heading(text[start:end]) or heading, unit_start, 0
        end = unit_end
        held += tokens
        done += tokens
    if held:
        windows.append(_window(text, start, end, heading, held))
    return windows


def _window(text: str, start: int, end: int, heading: str, tokens: int) -> Window:
    first = text[start:end].strip().partition("\n")[0].strip()
    return Window(text, start, end, first if _is_heading(first) else heading, tokens)


def _is_heading(line: str) -> bool:
    return len(line) <= 100 and bool(_HEADING.fullmatch(line) or (line.isupper() and len(line) > 3))


def _last_heading(text: str) -> str:
    lines = (line.strip() for line in reversed(text.split("\n")))
    return next((line for line in lines if _is_heading(line)), "")


Unit = tuple[int, int, int]


def _units(text: str, room: int, count: Count) -> Iterator[Unit]:
    """Start, end and tokens of pieces: paragraphs, of the long ones the sentences, of those that do not fit slices."""
    for start, end, tokens in _counted(text, _split(text, 0, len(text), _PARAGRAPH_END), count):
        if tokens <= room // 3:
            yield start, end, tokens
            continue
        for first, last, some in _counted(text, _split(text, start, end, _SENTENCE_END), count):
            if some <= room:
                yield first, last, some
            else:
                yield from _sliced(text, first, last, some, room, count)


def _sliced(text: str, start: int, stop: int, tokens: int, room: int, count: Count) -> Iterator[Unit]:
    """A run of text without any end of a sentence, at blanks where there are some."""
    size = max(1, (stop - start) * room // (tokens * 2))
    while start < stop:
        end = min(stop, start + size)
        blank = text.rfind(" ", start + size // 2, end)
        end = blank + 1 if blank > 0 and end < stop else end
        here = count([text[start:end]])[0]
        if here > room and end - start > 1:
            yield from _sliced(text, start, end, here, room, count)
        else:
            yield start, end, here
        start = end


def _split(text: str, start: int, stop: int, separator: re.Pattern[str]) -> Iterator[tuple[int, int]]:
    """The stretch in pieces, each with the blanks that follow it."""
    for match in separator.finditer(text, start, stop):
        if match.end() > start:
            yield start, match.end()
            start = match.end()
    if start < stop:
        yield start, stop


def _counted(text: str, pieces: Iterator[tuple[int, int]], count: Count) -> Iterator[Unit]:
    batch: list[tuple[int, int]] = []
    for piece in chain(pieces, (None,)):
        if piece is not None:
            batch.append(piece)
        if batch and (piece is None or len(batch) == _AT_ONCE):
            counts = count([text[start:end] for start, end in batch])
            yield from ((start, end, tokens) for (start, end), tokens in zip(batch, counts, strict=True))
            batch = []

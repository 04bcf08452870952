"""A long text cut into windows: at paragraphs where that works, else at sentences, else anywhere; headings go along."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

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
    """A stretch of a text. `heading` is the last heading before it, or its own first line; may be empty."""

    text: str
    heading: str


def sentences(text: str) -> list[str]:
    """The sentences of a text, without blanks around them."""
    return [part for line in _PARAGRAPH_END.split(text) for part in _SENTENCE_END.split(line.strip()) if part.strip()]


def cut(text: str, room: int, count: Count) -> list[Window]:
    """Windows of at most `room` tokens and about equal length, which together are the whole text.

    Args:
        count: how many tokens each of some strings has.
    """
    units = list(_units(text, room, count))
    total = sum(tokens for _, tokens in units)
    number = -(-total // room)
    windows: list[Window] = []
    heading = ""
    parts: list[str] = []
    held = done = 0
    for unit, tokens in units:
        # The next window begins where its share of the text does, or where this one is full.
        if parts and (held + tokens > room or done >= total * (len(windows) + 1) / number):
            windows.append(_window(parts, heading))
            heading, parts, held = _last_heading(parts) or heading, [], 0
        parts.append(unit)
        held += tokens
        done += tokens
    if parts:
        windows.append(_window(parts, heading))
    return windows


def _window(parts: list[str], heading: str) -> Window:
    text = "".join(parts).strip()
    first = text.partition("\n")[0].strip()
    return Window(text, first if _is_heading(first) else heading)


def _is_heading(line: str) -> bool:
    return len(line) <= 100 and bool(_HEADING.fullmatch(line) or (line.isupper() and len(line) > 3))


def _last_heading(parts: list[str]) -> str:
    lines = [line.strip() for part in parts for line in part.split("\n")]
    return next((line for line in reversed(lines) if _is_heading(line)), "")


def _units(text: str, room: int, count: Count) -> Iterator[tuple[str, int]]:
    """Pieces with their token counts: paragraphs, of the long ones the sentences, of those that do not fit slices."""
    for paragraph, tokens in _counted(_split(text, _PARAGRAPH_END), count):
        if tokens <= room // 3:
            yield paragraph, tokens
            continue
        for sentence, some in _counted(_split(paragraph, _SENTENCE_END), count):
            if some <= room:
                yield sentence, some
            else:
                yield from _sliced(sentence, some, room, count)


def _sliced(text: str, tokens: int, room: int, count: Count) -> Iterator[tuple[str, int]]:
    """A run of text without any end of a sentence, at blanks where there are some."""
    size = max(1, len(text) * room // (tokens * 2))
    start = 0
    while start < len(text):
        end = start + size
        blank = text.rfind(" ", start + size // 2, end)
        end = blank + 1 if blank > 0 and end < len(text) else end
        piece = text[start:end]
        tokens_here = count([piece])[0]
        if tokens_here > room and len(piece) > 1:
            yield from _sliced(piece, tokens_here, room, count)
        else:
            yield piece, tokens_here
        start = end


def _split(text: str, end: re.Pattern[str]) -> Iterator[str]:
    """The text in pieces, each with the blanks that follow it."""
    start = 0
    for match in end.finditer(text):
        if match.end() > start:
            yield text[start : match.end()]
            start = match.end()
    if start < len(text):
        yield text[start:]


def _counted(pieces: Iterator[str], count: Count) -> Iterator[tuple[str, int]]:
    batch: list[str] = []
    for piece in pieces:
        batch.append(piece)
        if len(batch) == _AT_ONCE:
            yield from zip(batch, count(batch), strict=True)
            batch = []
    if batch:
        yield from zip(batch, count(batch), strict=True)

"""PDF -> text through pdfium: page by page, without running headers and page numbers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from statistics import median

from auvsum.errors import DocumentUnreadable
from auvsum.text.formats import MOST_CHARACTERS, Extracted
from auvsum.text.normalize import join_hyphens, normalize

#: How many lines at the top and at the bottom of a page may be furniture.
_EDGE = 3
_PAGE_NUMBER = re.compile(
    r"\W*((page|seite|p\.|página)\s*)?(\d{1,5}|[ivxlc]{1,7})(\s*(of|/|von|de)\s*\d{1,5})?\W*\Z", re.IGNORECASE
)
_OCR = "run OCR on it first, for example: ocrmypdf in.pdf out.pdf"
#: pdfium's mark for a hyphen at the end of a line, after which it leaves the line break away.
_BROKEN_WORD = "\ufffe"
_SENTENCE_END = re.compile(r"[.!?:][\"'”’)\]]*\Z")


def read(data: bytes, label: str, *, pages: Collection[int] | None, encoding: str | None) -> Extracted:
    """The text layer of the pages asked for."""
    every = _page_texts(data, label)
    # What is furniture shows over the whole document, however few pages were asked for.
    lines = {number: _lines(text) for number, text in every.items()}
    furniture = _furniture(list(lines.values()))
    texts = every if pages is None else {number: every[number] for number in pages if number in every}
    if not texts:
        raise DocumentUnreadable(f"{label} has only {len(every)} pages", "choose others with --pages")
    empty = [number for number, text in texts.items() if not text.strip()]
    if len(empty) == len(texts):
        raise DocumentUnreadable(f"{label} has no text layer: its pages are images, as of a scan", _OCR)
    warnings = []
    if empty:
        shown = ", ".join(map(str, empty[:8])) + (", ..." if len(empty) > 8 else "")
        warnings.append(f"{label}: {len(empty)} of {len(texts)} pages have no text (page {shown}); OCR would add it")
    lines = {number: lines[number] for number in texts}
    width = median([len(line) for page in lines.values() for line in page] or [0])
    text, starts = "", []
    parts: list[str] = []
    length = 0
    for number, page in lines.items():
        body = _paragraphs(_without_edges(page, furniture), width)
        starts.append((length, number))
        text = normalize(join_hyphens(body, eager=True))
        # A sentence may run over the page's end: a paragraph ends there only where a sentence does.
        text += "\n\n" if not text or _SENTENCE_END.search(text) else "\n"
        parts.append(text)
        length += len(text)
    return Extracted("".join(parts), tuple(starts), tuple(warnings))


def _page_texts(data: bytes, label: str) -> dict[int, str]:
    """Page number -> raw text."""
    import pypdfium2

    try:
        document = pypdfium2.PdfDocument(bytes(data))
    except pypdfium2.PdfiumError as error:
        if "password" in str(error).lower():
            raise DocumentUnreadable(f"{label} is protected by a password", "save it without one first") from error
        raise DocumentUnreadable(f"{label} is damaged or cut short", "get the file again, or repair it") from error
    with document:
        count = len(document)
        if not count:
            raise DocumentUnreadable(f"{label} is damaged: it has no pages", "get the file again")
        texts: dict[int, str] = {}
        total = 0
        for number in range(1, count + 1):
            try:
                page = document[number - 1]
                layer = page.get_textpage()
                texts[number] = layer.get_text_range()
                layer.close()
                page.close()
            except pypdfium2.PdfiumError:
                texts[number] = ""
            total += len(texts[number])
            if total > MOST_CHARACTERS:
                break
        return texts


def _lines(text: str) -> list[str]:
    text = text.replace(_BROKEN_WORD, "-\n").replace("\r\n", "\n").replace("\r", "\n").replace("\x00", "")
    return [line.strip() for line in text.split("\n") if line.strip()]


def _shape(line: str) -> str:
    """A line with its numbers forgotten: `Page 3 of 12` and `Page 4 of 12` look alike."""
    return re.sub(r"\d+", "#", line).lower()


def _furniture(pages: list[list[str]]) -> set[str]:
    """Shapes of lines that come back at the edge of a third of the pages, and of at least three."""
    seen: Counter[str] = Counter()
    for page in pages:
        seen.update({_shape(line) for line in [*page[:_EDGE], *page[-_EDGE:]]})
    return {shape for shape, count in seen.items() if count >= max(3, len(pages) / 3)}


def _without_edges(page: list[str], furniture: set[str]) -> list[str]:
    """The page without its running header, footer and number."""

    def is_furniture(line: str) -> bool:
        return _shape(line) in furniture or bool(_PAGE_NUMBER.match(line))

    top = [line for line in page[:_EDGE] if not is_furniture(line)]
    middle, bottom = page[_EDGE : max(_EDGE, len(page) - _EDGE)], page[max(_EDGE, len(page) - _EDGE) :]
    return [*top, *middle, *(line for line in bottom if not is_furniture(line))]


def _paragraphs(lines: list[str], width: float) -> str:
    """Lines again, with a blank one after each that ends a sentence well before the margin."""
    out: list[str] = []
    for line in lines:
        out.append(line)
        if len(line) < 0.85 * width and _SENTENCE_END.search(line):
            out.append("")
    return "\n".join(out).strip("\n")

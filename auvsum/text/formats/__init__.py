"""Documents that are more than text: one file per format, each bytes -> `Extracted`. Found by content, not by name.

The libraries behind them (pdfium for PDF, lxml for the others) come with the extra `auvsum[docs]`.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import PurePath

from auvsum.errors import DocumentUnreadable
from auvsum.text.decoding import Data

#: Text that a document may hold once it is unpacked: far above any book, far below any memory.
MOST_CHARACTERS = 512 * 2**20

_INSTALL = "type: pip install 'auvsum[docs]'"
_NEEDS = {"pdf": "pypdfium2", "docx": "lxml", "epub": "lxml", "html": "lxml"}
_NAMES = {"pdf": "a PDF document", "docx": "a Word document (DOCX)", "epub": "an EPUB book", "html": "an HTML page"}
_HTML = re.compile(rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*<(!doctype\s+html|html)\b", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class Extracted:
    """The text of a document.

    Attributes:
        pages: where each page starts in the text, with the page's own number; empty for formats without pages.
    """

    text: str
    pages: tuple[tuple[int, int], ...] = ()
    warnings: tuple[str, ...] = ()


def detect(data: Data, label: str) -> str | None:
    """`pdf`, `docx`, `epub`, `html`, or None for everything else.

    Args:
        data: the document; what tells is near its start, but an archive lists its contents at the end.
        label: its name: an HTML page may begin with anything.
    """
    if data[:64].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"%PDF-"):
        return "pdf"
    if data[:4] == b"PK\x03\x04":
        if data.find(b"word/document") >= 0:
            return "docx"
        marks = (b"META-INF/container.xml", b"mimetypeapplication/epub+zip")
        return "epub" if any(data.find(mark) >= 0 for mark in marks) else None
    named = PurePath(label).suffix.lower() in (".html", ".htm", ".xhtml")
    start = data[:65536]
    if _HTML.match(start.removeprefix(b"\xef\xbb\xbf")) or (named and b"<" in start):
        return "html"
    return None


def extract(kind: str, data: bytes, label: str, pages: Collection[int] | None, encoding: str | None) -> Extracted:
    """The text of a document of a known kind.

    Args:
        pages: numbers of the pages to read, from 1; None for all.
        encoding: what an HTML page is in; otherwise it says so itself.

    Raises:
        DocumentError: broken, protected, without text, or without the library that reads it.
    """
    if pages is not None and kind != "pdf":
        raise no_pages(label, _NAMES[kind])
    try:
        importlib.import_module(_NEEDS[kind])
    except ImportError as error:
        raise DocumentUnreadable(f"{label} is {_NAMES[kind]}, which needs the readers of auvsum[docs]", _INSTALL) from (
            error
        )
    reader = importlib.import_module(f"auvsum.text.formats.{kind}")
    found: Extracted = reader.read(data, label, pages=pages, encoding=encoding)
    if len(found.text) > MOST_CHARACTERS:
        raise DocumentUnreadable(f"{label} unpacks to more than {MOST_CHARACTERS >> 20} MiB of text", "split it")
    return found


def no_pages(label: str, what: str) -> DocumentUnreadable:
    """The error of `--pages` for a format that has none."""
    return DocumentUnreadable(f"{label} is {what}, which has no pages to choose from", "leave --pages away")

"""File -> text. Every way in which a file can fail to be text is an error with a hint; no guess is silent."""

from __future__ import annotations

import difflib
import mmap
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from auvsum.errors import (
    ConfigError,
    DocumentBinary,
    DocumentEmpty,
    DocumentNotFound,
    DocumentUnreadable,
)
from auvsum.text import formats
from auvsum.text.decoding import MARKS, Data, check_encoding, decode
from auvsum.text.normalize import join_hyphens, normalize

#: From this size on a file is mapped rather than read: its bytes then never count beside its text. (Below it, a file
#: that another program cuts short while it is read is merely short; a mapped one would end the process.)
_MAPPED = 64 * 2**20
_PAGE_RANGE = re.compile(r"\s*(\d+)?\s*(-)?\s*(\d+)?\s*")
_MOST_PAGES = 1_000_000
_MAGIC = (
    (b"\x89PNG\r\n\x1a\n", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF87a", "a GIF image"),
    (b"GIF89a", "a GIF image"),
    (b"II*\x00", "a TIFF image"),
    (b"MM\x00*", "a TIFF image"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ\x00", "an xz archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!\x1a\x07", "a RAR archive"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document (.doc, .xls, .ppt)"),
    (b"{\\rtf", "an RTF document"),
    (b"\x7fELF", "a program"),
    (b"GGUF", "a GGUF model"),
    (b"SQLite format 3\x00", "an SQLite database"),
)
_ZIP_CONTENTS = (
    (b"xl/", "an Excel workbook (XLSX)"),
    (b"ppt/", "a PowerPoint file (PPTX)"),
    (b"application/vnd.oasis.opendocument", "an OpenDocument file"),
)


@dataclass(frozen=True)
class Document:
    """A text that has been read. `source` is the absolute path, or `-` for standard input; newlines are `\\n`.

    Attributes:
        pages: where each page starts in the text, with the page's own number; empty for formats without pages.
    """

    source: str
    text: str
    encoding: str
    warnings: tuple[str, ...] = ()
    pages: tuple[tuple[int, int], ...] = ()
    name: str = ""

    @property
    def id(self) -> str:
        """The name that people see: its path within a folder that was named, or the file's name, or `stdin`."""
        return self.name or document_id(self.source)


def document_id(source: str) -> str:
    """The short name of a document: the file's name, or `stdin` for `-`."""
    return "stdin" if source == "-" else Path(source).name


def read_document(
    path: str | Path, *, encoding: str | None = None, pages: str | None = None, name: str = ""
) -> Document:
    """Reads one file, or standard input for `-`: plain text, and with `auvsum[docs]` PDF, DOCX, HTML and EPUB.

    Args:
        encoding: decode with this and nothing else; by default byte order mark, then UTF-8, then a guess from the
            whole file, which adds a warning.
        pages: of a PDF, only these: `10-40`, `7`, `1-3,9`, `12-`.
        name: what people shall see as the document's name.

    Raises:
        DocumentError: missing, unreadable, binary, undecodable or empty.
        ConfigError: `encoding` is not one that Python knows, or `pages` are no pages.
    """
    file = str(path)
    if encoding is not None:
        check_encoding(encoding)
    wanted = None if pages is None else parse_pages(pages)
    data = sys.stdin.buffer.read() if file == "-" else _read_bytes(Path(file))
    label, source = ("stdin", "-") if file == "-" else (file, os.path.abspath(file))
    kind = formats.detect(data, label)
    if kind is not None:
        found = formats.extract(kind, data[:], label, wanted, encoding)
        document = Document(source, normalize(found.text), kind, found.warnings, found.pages, name)
    else:
        _refuse_binary(label, data, encoding)
        if wanted is not None:
            raise formats.no_pages(label, "plain text")
        text, used, warnings = decode(label, data, encoding)
        if "\x00" in text:
            raise DocumentBinary(f"{label} is not text: it contains NUL bytes", "convert it to plain text first")
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        document = Document(source, join_hyphens(normalize(text), eager=False), used, warnings, name=name)
    if not document.text or document.text.isspace():
        raise DocumentEmpty(f"{label} is empty", "there is nothing to summarize")
    return document


def parse_pages(text: str) -> list[int]:
    """`1-3,9` -> [1, 2, 3, 9].

    Raises:
        ConfigError: for anything else.
    """
    numbers: set[int] = set()
    for part in text.split(","):
        match = _PAGE_RANGE.fullmatch(part)
        first, dash, last = match.groups() if match else (None, None, None)
        start = int(first or 1)
        end = int(last) if last else _MOST_PAGES if dash else start
        if not (first or last) or (last and not dash) or not 1 <= start <= end <= _MOST_PAGES:
            raise ConfigError(f"pages {text!r} are not understood", "for example --pages 10-40, 7, 1-3,9 or 12-")
        numbers.update(range(start, end + 1))
    return sorted(numbers)


def _read_bytes(path: Path) -> Data:
    try:
        if path.is_file() and path.stat().st_size >= _MAPPED:
            with path.open("rb") as file:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return path.read_bytes()
    except FileNotFoundError as error:
        raise DocumentNotFound(f"{path} does not exist", _nearest_name(path)) from error
    except IsADirectoryError as error:
        raise DocumentUnreadable(f"{path} is a folder", f"name its files, like {path / '*.txt'}") from error
    except PermissionError as error:
        raise DocumentUnreadable(f"{path} may not be read: permission denied", "check its permissions") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise DocumentUnreadable(f"{path} cannot be read: {reason}", "check the path") from error


def _nearest_name(path: Path) -> str:
    folder = path.parent
    try:
        names = [entry.name for entry in os.scandir(folder)]
    except OSError:
        return f"there is no folder {folder}"
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"did you mean {folder / near[0]}?" if near else "check the path"


def _refuse_binary(label: str, data: Data, encoding: str | None) -> None:
    """Names a known format by its first bytes; NUL bytes without a Unicode mark are not text either."""
    for magic, what in _MAGIC:
        if data[: len(magic)] == magic:
            raise _binary(label, what)
    if data[:4] == b"PK\x03\x04":
        raise _binary(label, next((what for mark, what in _ZIP_CONTENTS if data.find(mark) >= 0), "a ZIP archive"))
    marked = any(data[: len(mark)] == mark for mark, _ in MARKS)
    if encoding is None and not marked and data.find(b"\x00") >= 0:
        raise DocumentBinary(
            f"{label} is not text: it contains NUL bytes",
            "convert it to plain text first; if it is UTF-16 without a mark, say --encoding utf-16-le",
        )


def _binary(label: str, what: str) -> DocumentBinary:
    return DocumentBinary(f"{label} is {what}, which is not supported yet", "convert it to plain text (.txt) first")

"""File -> text. Every way in which a file can fail to be text is an error with a hint; no guess is silent."""

from __future__ import annotations

import codecs
import difflib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from auvsum.errors import (
    ConfigError,
    DocumentBinary,
    DocumentEmpty,
    DocumentEncoding,
    DocumentNotFound,
    DocumentUnreadable,
)

#: Byte order marks, the longer first: UTF-32 LE starts with the mark of UTF-16 LE.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_MAGIC = (
    (b"%PDF-", "a PDF document"),
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
    (b"word/", "a Word document (DOCX)"),
    (b"xl/", "an Excel workbook (XLSX)"),
    (b"ppt/", "a PowerPoint file (PPTX)"),
    (b"application/epub+zip", "an EPUB book"),
    (b"application/vnd.oasis.opendocument", "an OpenDocument file"),
)
#: Encodings that documents are really in. Exotic pages of DOS and the old Mac fit nearly any bytes and win by luck.
_GUESSES = (
    *("cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256", "koi8_r"),
    *("cp932", "euc_jp", "gb18030", "big5", "cp949"),
)


@dataclass(frozen=True)
class Document:
    """A text that has been read. `source` is the absolute path, or `-` for standard input; newlines are `\\n`."""

    source: str
    text: str
    encoding: str
    warnings: tuple[str, ...] = ()
    name: str = ""

    @property
    def id(self) -> str:
        """The name that people see: its path within a folder that was named, or the file's name, or `stdin`."""
        return self.name or document_id(self.source)


def document_id(source: str) -> str:
    """The short name of a document: the file's name, or `stdin` for `-`."""
    return "stdin" if source == "-" else Path(source).name


def read_document(path: str | Path, *, encoding: str | None = None, name: str = "") -> Document:
    """Reads one plain-text file, or standard input for `-`.

    Args:
        encoding: decode with this and nothing else; by default byte order mark, then UTF-8, then a guess from the
            whole file, which adds a warning.
        name: what people shall see as the document's name.

    Raises:
        DocumentError: missing, unreadable, binary, undecodable or empty.
        ConfigError: `encoding` is not one that Python knows.
    """
    file = str(path)
    if encoding is not None:
        _check_encoding(encoding)
    data = sys.stdin.buffer.read() if file == "-" else _read_bytes(Path(file))
    label = "stdin" if file == "-" else file
    _refuse_binary(label, data, encoding)
    text, used, warnings = _decode(label, data, encoding)
    if "\x00" in text:
        raise DocumentBinary(f"{label} is not text: it contains NUL bytes", "convert it to plain text first")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise DocumentEmpty(f"{label} is empty", "there is nothing to summarize")
    return Document("-" if file == "-" else os.path.abspath(file), text, used, warnings, name)


def _read_bytes(path: Path) -> bytes:
    try:
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


def _refuse_binary(label: str, data: bytes, encoding: str | None) -> None:
    """Names a known format by its first bytes; NUL bytes without a Unicode mark are not text either."""
    for magic, what in _MAGIC:
        if data.startswith(magic):
            raise _binary(label, what)
    if data.startswith(b"PK\x03\x04"):
        raise _binary(label, next((what for mark, what in _ZIP_CONTENTS if mark in data), "a ZIP archive"))
    marked = any(data.startswith(mark) for mark, _ in _MARKS)
    if encoding is None and not marked and b"\x00" in data:
        raise DocumentBinary(
            f"{label} is not text: it contains NUL bytes",
            "convert it to plain text first; if it is UTF-16 without a mark, say --encoding utf-16-le",
        )


def _binary(label: str, what: str) -> DocumentBinary:
    return DocumentBinary(f"{label} is {what}, which is not supported yet", "convert it to plain text (.txt) first")


def _check_encoding(encoding: str) -> None:
    try:
        "".encode(encoding)
    except LookupError as error:
        raise ConfigError(f"encoding {encoding!r} is unknown", "for example utf-8, latin-1 or cp1252") from error


def _decode(label: str, data: bytes, encoding: str | None) -> tuple[str, str, tuple[str, ...]]:
    """-> text, encoding used, warnings."""
    marked = next((name for mark, name in _MARKS if data.startswith(mark)), None)
    certain = encoding or marked or "utf-8"
    try:
        return data.decode(certain), certain, ()
    except UnicodeError as error:
        if encoding or marked:
            start = getattr(error, "start", 0)
            raise DocumentEncoding(
                f"{label} is not {certain}: byte {start:,} cannot be decoded",
                "leave --encoding away to have it guessed, or name another" if encoding else "say --encoding",
            ) from error
    found = _guess(data)
    if found is None:
        raise DocumentBinary(f"{label} is not text in any known encoding", "convert it to UTF-8, or say --encoding")
    guess = f"{label} is not UTF-8; read as {found[1]} by guess (--encoding says otherwise)"
    return *found, (guess,)


def _guess(data: bytes) -> tuple[str, str] | None:
    """-> text and encoding, guessed from all of the bytes, so that one accent on the last page counts."""
    from charset_normalizer import from_bytes

    matches = list(from_bytes(data, steps=max(5, len(data) // 4096), chunk_size=4096, cp_isolation=list(_GUESSES)))
    if not matches:
        return None
    best = matches[0]
    if best.encoding == "cp1250":
        # Western text fits the Central European page as well; the detector lists that one first, whatever the language.
        western = [m for m in matches if "cp1252" in m.could_be_from_charset and m.coherence >= best.coherence]
        if western:
            return data.decode("cp1252"), "cp1252"
    return str(best), best.encoding

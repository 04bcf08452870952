"""Bytes -> text: a byte order mark, UTF-8, or a guess from the whole file that is always said."""

from __future__ import annotations

import codecs
import mmap
import re

from auvsum.errors import ConfigError, DocumentBinary, DocumentEncoding

#: A file's content: read, or mapped when it is large.
Data = bytes | mmap.mmap

#: Byte order marks, the longer first: UTF-32 LE starts with the mark of UTF-16 LE.
MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
#: Encodings that documents are really in. Exotic pages of DOS and the old Mac fit nearly any bytes and win by luck.
_GUESSES = (
    *("cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256", "koi8_r"),
    *("cp932", "euc_jp", "gb18030", "big5", "cp949"),
)
#: Up to here a guess weighs every byte; of longer files it weighs the words that are not ASCII, up to as much.
_GUESS_BYTES = 2**20
_AROUND = 80


def check_encoding(encoding: str) -> None:
    """Raises ConfigError unless Python knows the encoding."""
    try:
        "".encode(encoding)
    except LookupError as error:
        raise ConfigError(f"encoding {encoding!r} is unknown", "for example utf-8, latin-1 or cp1252") from error


def decode(label: str, data: Data, encoding: str | None = None) -> tuple[str, str, tuple[str, ...]]:
    """-> text, encoding used, warnings.

    Raises:
        DocumentEncoding, DocumentBinary: the bytes are not text in that encoding, or in any.
    """
    marked = next((name for mark, name in MARKS if data[: len(mark)] == mark), None)
    certain = encoding or marked or "utf-8"
    try:
        return str(data, certain), certain, ()
    except UnicodeError as error:
        if encoding or marked:
            start = getattr(error, "start", 0)
            raise DocumentEncoding(
                f"{label} is not {certain}: byte {start:,} cannot be decoded",
                "leave --encoding away to have it guessed, or name another" if encoding else "say --encoding",
            ) from error
    mixed = _mixed(data)
    if mixed is not None:
        text, strays = mixed
        return text, "utf-8", (f"{label} mixes encodings: {strays:,} bytes that are not UTF-8 were read as cp1252",)
    found = _guess(data)
    if found is None:
        raise DocumentBinary(f"{label} is not text in any known encoding", "convert it to UTF-8, or say --encoding")
    guess = f"{label} is not UTF-8; read as {found[1]} by guess (--encoding says otherwise)"
    return *found, (guess,)


def _as_cp1252(error: UnicodeError) -> tuple[str, int]:
    """One undecodable byte as Windows would show it."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    byte = error.object[error.start : error.start + 1]
    return byte.decode("cp1252", "replace"), error.start + 1


codecs.register_error("auvsum-cp1252", _as_cp1252)


def _mixed(data: Data) -> tuple[str, int] | None:
    """A file glued from several: most of what is not ASCII is good UTF-8, a few bytes are not. -> text, stray bytes."""
    text = str(data, "utf-8", "surrogateescape")
    strays = sum(map(len, re.findall("[\udc80-\udcff]+", text)))
    good = sum(map(len, re.findall("[\u0080-\ud7ff\ue000-\U0010ffff]+", text)))
    return (str(data, "utf-8", "auvsum-cp1252"), strays) if good >= 2 * strays else None


def _guess(data: Data) -> tuple[str, str] | None:
    """-> text and encoding, guessed from all of the bytes, so that one accent on the last page counts."""
    from charset_normalizer import from_bytes

    sample = data[:] if len(data) <= _GUESS_BYTES else _telling_parts(data)
    matches = list(from_bytes(sample, steps=max(5, len(sample) // 4096), chunk_size=4096, cp_isolation=[*_GUESSES]))
    if not matches:
        return None
    best = matches[0]
    name = best.encoding
    if name == "cp1250":
        # Western text fits the Central European page as well; the detector lists that one first, whatever the language.
        western = [m for m in matches if "cp1252" in m.could_be_from_charset and m.coherence >= best.coherence]
        name = "cp1252" if western else name
    try:
        return str(data, name), name
    except UnicodeError:
        return None


def _telling_parts(data: Data) -> bytes:
    """What of a large file is not ASCII, up to a bound, with some words around it: the rest says nothing."""
    parts, size, done = [], 0, 0
    for match in re.finditer(rb"[\x80-\xff]+", data):
        if match.start() < done:
            continue
        # Cut at blanks, which are no part of any character in any of the encodings.
        start = max(done, data.rfind(b" ", max(done, match.start() - _AROUND), match.start()) + 1)
        blank = data.find(b" ", match.end(), match.end() + _AROUND)
        done = match.end() if blank < 0 else blank
        start = match.start() if start == done else start
        parts.append(data[start:done])
        size += len(parts[-1])
        if size >= _GUESS_BYTES:
            break
    return b" ".join(parts)

"""Readers: text in any encoding becomes text, everything else is an error that names what it is."""

from __future__ import annotations

import io
import os
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from auvsum.errors import (
    AuvsumError,
    ConfigError,
    DocumentBinary,
    DocumentEmpty,
    DocumentEncoding,
    DocumentNotFound,
    DocumentUnreadable,
)
from auvsum.text.readers import document_id, read_document

SPANISH = "El niño y la señora comieron en la montaña el año pasado. "
RUSSIAN = "Привет мир, это документ о погоде и доме. "
JAPANESE = "これは日本語の文書です。東京で。"


def written(folder: Path, data: bytes, name: str = "report.txt") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def test_plain_utf8(tmp_path: Path) -> None:
    path = written(tmp_path, "Grüße, 世界 🌍\nEnd".encode())
    document = read_document(path)
    assert document.text == "Grüße, 世界 🌍\nEnd"
    assert (document.encoding, document.warnings, document.id) == ("utf-8", (), "report.txt")
    assert document.source == str(path)


def test_relative_path_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, b"text")
    monkeypatch.chdir(tmp_path)
    assert read_document("report.txt").source == str(tmp_path / "report.txt")


def test_newlines_are_one_kind(tmp_path: Path) -> None:
    assert read_document(written(tmp_path, b"a\r\nb\rc\nd\r\n")).text == "a\nb\nc\nd\n"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks(tmp_path: Path, encoding: str) -> None:
    document = read_document(written(tmp_path, SPANISH.encode(encoding)))
    assert (document.text, document.encoding, document.warnings) == (SPANISH, encoding, ())


@pytest.mark.parametrize(
    ("text", "encoding", "guessed"),
    [
        (SPANISH * 20, "latin-1", "cp1252"),
        ("The company’s report “said” so — really. " * 20, "cp1252", "cp1252"),
        (RUSSIAN * 20, "cp1251", "cp1251"),
        (RUSSIAN * 20, "koi8-r", "koi8_r"),
        (JAPANESE * 10, "shift_jis", "cp932"),
        ("Zażółć gęślą jaźń. Dzisiaj jest ładny dzień, a wczoraj padał deszcz. " * 20, "cp1250", "cp1250"),
    ],
)
def test_guessed_encodings_are_right_and_said(tmp_path: Path, text: str, encoding: str, guessed: str) -> None:
    document = read_document(written(tmp_path, text.encode(encoding)))
    assert (document.text, document.encoding) == (text, guessed)
    assert len(document.warnings) == 1
    assert guessed in document.warnings[0]


def test_the_whole_file_counts(tmp_path: Path) -> None:
    text = "The report has many pages without any accent at all. " * 10_000 + "Señor Nuñez"
    document = read_document(written(tmp_path, text.encode("latin-1")))
    assert document.text.endswith("Señor Nuñez")


def test_given_encoding_is_used_without_a_guess(tmp_path: Path) -> None:
    document = read_document(written(tmp_path, SPANISH.encode("cp850")), encoding="cp850")
    assert (document.text, document.encoding, document.warnings) == (SPANISH, "cp850", ())
    assert read_document(written(tmp_path, "ab".encode("utf-16-le")), encoding="utf-16-le").text == "ab"


def failing(path: str | Path, kind: type[AuvsumError], *parts: str, encoding: str | None = None) -> None:
    with pytest.raises(AuvsumError) as caught:
        read_document(path, encoding=encoding)
    error = caught.value
    assert type(error) is kind
    text = f"{error.message} | {error.hint}"
    for part in parts:
        assert part in text
    assert error.hint
    assert "\n" not in text


def test_undecodable_with_a_given_encoding(tmp_path: Path) -> None:
    failing(written(tmp_path, b"abc\xff"), DocumentEncoding, "is not utf-8", "byte 3", encoding="utf-8")
    failing(written(tmp_path, b"\xef\xbb\xbfab\xff"), DocumentEncoding, "utf-8-sig")
    failing(written(tmp_path, b"abc"), ConfigError, "'utf-9' is unknown", encoding="utf-9")


def test_missing_names_the_nearest(tmp_path: Path) -> None:
    written(tmp_path, b"x")
    failing(tmp_path / "reprot.txt", DocumentNotFound, "does not exist", f"did you mean {tmp_path / 'report.txt'}?")
    failing(tmp_path / "unlike-anything", DocumentNotFound, "check the path")
    failing(tmp_path / "no" / "where.txt", DocumentNotFound, "there is no folder")


def test_folder_and_odd_paths(tmp_path: Path) -> None:
    failing(tmp_path, DocumentUnreadable, "is a folder")
    failing(written(tmp_path, b"x") / "below", DocumentUnreadable, "Not a directory")
    failing("a\x00b", DocumentUnreadable, "null")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path: Path) -> None:
    path = written(tmp_path, b"x")
    path.chmod(0)
    failing(path, DocumentUnreadable, "permission denied")


def test_no_permission_for_anyone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    failing(tmp_path / "x", DocumentUnreadable, "permission denied")


@pytest.mark.parametrize("data", [b"", b"  \n\t\r\n ", "\ufeff \n".encode()])
def test_empty(tmp_path: Path, data: bytes) -> None:
    failing(written(tmp_path, data), DocumentEmpty, "is empty")


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"\x89PNG\r\n\x1a\n\x00", "a PNG image"),
        (b"\xff\xd8\xff\xe0", "a JPEG image"),
        (b"\x1f\x8b\x08\x00", "a gzip archive"),
        (b"{\\rtf1 text}", "an RTF document"),
        (b"\x7fELF\x02", "a program"),
    ],
)
def test_formats_are_named(tmp_path: Path, data: bytes, what: str) -> None:
    failing(written(tmp_path, data), DocumentBinary, what, "not supported yet", "convert it to plain text")


@pytest.mark.parametrize(
    ("member", "what"),
    [("ppt/slides.xml", "PPTX"), ("xl/book.xml", "XLSX"), ("a.txt", "ZIP archive")],
)
def test_zips_are_named_by_what_they_hold(tmp_path: Path, member: str, what: str) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(member, "content")
    failing(written(tmp_path, buffer.getvalue()), DocumentBinary, what)


def test_nul_bytes_are_binary(tmp_path: Path) -> None:
    failing(written(tmp_path, b"text\x00text"), DocumentBinary, "NUL bytes", "utf-16-le")
    failing(written(tmp_path, b"text\x00text"), DocumentBinary, "NUL bytes", encoding="latin-1")
    failing(written(tmp_path, bytes(range(256)) * 40), DocumentBinary)


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"from a pipe\r\n")))
    document = read_document("-")
    assert (document.source, document.id, document.text) == ("-", "stdin", "from a pipe\n")
    assert document_id("-") == "stdin"
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"")))
    failing("-", DocumentEmpty, "stdin is empty")

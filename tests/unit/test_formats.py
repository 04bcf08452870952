"""PDF, DOCX, HTML and EPUB: the right text, or an error that says what is wrong, whatever the file holds."""

from __future__ import annotations

import builtins
import importlib
import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from auvsum.errors import AuvsumError, ConfigError, DocumentBinary, DocumentEmpty, DocumentUnreadable
from auvsum.text.normalize import join_hyphens, normalize
from auvsum.text.readers import parse_pages, read_document

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "samples"
REPORT = "money-bail"
W = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"


def written(folder: Path, data: bytes, name: str = "report") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def failing(path: Path, *parts: str, **options: Any) -> None:
    with pytest.raises(AuvsumError) as caught:
        read_document(path, **options)
    error = caught.value
    assert type(error) is DocumentUnreadable, error
    text = f"{error.message} | {error.hint}"
    assert error.hint
    assert "\n" not in text
    for part in parts:
        assert part in text


# -- the samples -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pdf", "docx", "html", "epub"])
def test_every_format_of_the_sample_holds_its_words_and_nothing_else(kind: str, tmp_path: Path) -> None:
    words = (SAMPLES / f"{REPORT}.txt").read_text(encoding="utf-8").split()
    document = read_document(SAMPLES / f"{REPORT}.{kind}")
    assert document.text.replace("# ", "").split() == words
    assert (document.encoding, document.warnings) == (kind, ())
    assert bool(document.pages) == (kind == "pdf")
    # Found by content: a name that says nothing changes nothing.
    renamed = written(tmp_path, (SAMPLES / f"{REPORT}.{kind}").read_bytes(), "download")
    assert read_document(renamed).text == document.text


def test_pages_of_a_pdf() -> None:
    path = SAMPLES / f"{REPORT}.pdf"
    whole = read_document(path)
    assert [number for _, number in whole.pages] == [1, 2, 3, 4, 5, 6]
    part = read_document(path, pages="2-3")
    start, end = whole.pages[1][0], whole.pages[3][0]
    assert part.text.split() == whole.text[start:end].split()
    assert [number for _, number in part.pages] == [2, 3]
    assert part.pages[0][0] == 0
    assert read_document(SAMPLES / f"{REPORT}.txt").pages == ()
    failing(path, "only 6 pages", pages="9-")
    failing(SAMPLES / f"{REPORT}.docx", "no pages", pages="1")
    failing(SAMPLES / f"{REPORT}.txt", "no pages", pages="1")


def test_page_ranges() -> None:
    assert parse_pages("1-3,9") == [1, 2, 3, 9]
    assert parse_pages(" 7 ") == [7]
    assert parse_pages("999999-") == [999_999, 1_000_000]
    assert parse_pages("-2") == [1, 2]
    for wrong in ("", "0", "3-1", "a", "1-2-3", "1,,2", "-"):
        with pytest.raises(ConfigError, match="not understood"):
            parse_pages(wrong)


@pytest.mark.parametrize("kind", ["pdf", "docx", "html", "epub"])
def test_without_the_extra_the_error_names_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def without(name: str, package: str | None = None) -> Any:
        if name in ("lxml", "pypdfium2"):
            raise ImportError(name)
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", without)
    failing(SAMPLES / f"{REPORT}.{kind}", "pip install 'auvsum[docs]'")


def test_plain_text_needs_no_reader(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        assert name not in ("lxml", "pypdfium2")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    assert read_document(written(tmp_path, b"A <b>bold</b> word; %PDF-1.7 too.", "a.txt")).encoding == "utf-8"


# -- PDF ---------------------------------------------------------------------------------------------------------------


def pdf(pages: list[list[str]]) -> bytes:
    """A PDF with these lines on its pages, written by hand."""
    kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(len(pages)))
    parts = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>".encode(),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>",
    ]
    for i, lines in enumerate(pages):
        shown = "".join(f"({line}) Tj T* " for line in lines)
        stream = f"BT /F1 10 Tf 12 TL 72 720 Td {shown}ET".encode("cp1252")
        parts.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {5 + 2 * i} 0 R "
            "/Resources << /Font << /F1 3 0 R >> >> >>".encode()
        )
        parts.append(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream))
    out, places = b"%PDF-1.4\n", []
    for number, part in enumerate(parts, 1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, part)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    end = b"trailer << /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(parts) + 1, len(out))
    return out + b"xref\n0 %d\n0000000000 65535 f \n%s" % (len(parts) + 1, table) + end


def test_furniture_goes_and_text_stays(tmp_path: Path) -> None:
    names = ["bridge", "river", "tunnel", "mayor", "harbour", "school", "market", "tower", "museum", "garden"]
    bodies = [[f"The {name} opened", f"in {1990 + 7 * i} with", f"{3 * i} visitors.", f"So the {name}", f"{name} is."]
              for i, name in enumerate(names)]  # fmt: skip
    pages = [
        ["Annual Report 2020" if i % 2 else "City of Example", f"{i} of 10", *body, f"Page {i}"]
        for i, body in enumerate(bodies, 1)
    ]
    text = read_document(written(tmp_path, pdf(pages))).text
    assert text.split() == [word for body in bodies for line in body for word in line.split()]


def test_words_broken_at_line_ends_are_joined(tmp_path: Path) -> None:
    lines = ["The depart-", "ment met the mayor-elect, a well-", "known per-", "son, said the mayor-", "elect."]
    text = read_document(written(tmp_path, pdf([lines]))).text
    wanted = "The department met the mayor-elect, a wellknown person, said the mayor-elect."
    assert text.split() == wanted.split()


def test_scanned_and_partly_scanned(tmp_path: Path) -> None:
    failing(written(tmp_path, pdf([[], []])), "no text layer", "OCR")
    document = read_document(written(tmp_path, pdf([["Some text here."], [], ["And more."]])))
    assert document.text.split() == ["Some", "text", "here.", "And", "more."]
    assert "page 2" in document.warnings[0]
    assert [number for _, number in document.pages] == [1, 2, 3]


def test_broken_pdfs(tmp_path: Path) -> None:
    whole = (SAMPLES / f"{REPORT}.pdf").read_bytes()
    failing(Path(__file__).parents[1] / "data" / "encrypted.pdf", "password")
    failing(written(tmp_path, whole[: len(whole) // 3]), "damaged or cut short")
    failing(written(tmp_path, b"%PDF-1.7\n%\xe2\xe3"), "damaged")


# -- DOCX and EPUB -----------------------------------------------------------------------------------------------------


def zipped(parts: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data, zipfile.ZIP_STORED if name == "mimetype" else zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def docx(body: str, **parts: bytes) -> bytes:
    document = f'<w:document xmlns:w="{W}"><w:body>{body}</w:body></w:document>'.encode()
    return zipped({"word/document.xml": document, **parts})


def test_docx_structure_and_tracked_changes(tmp_path: Path) -> None:
    body = """
    <w:p><w:pPr><w:pStyle w:val="H"/></w:pPr><w:r><w:t>Plan</w:t></w:r></w:p>
    <w:p><w:r><w:t xml:space="preserve">It costs </w:t></w:r><w:del><w:r><w:delText>five</w:delText></w:r></w:del>
      <w:ins><w:r><w:t>six</w:t></w:r></w:ins><w:r><w:tab/><w:t>euros.</w:t></w:r></w:p>
    <w:tbl><w:tr><w:tc><w:p><w:r><w:t>a</w:t></w:r></w:p></w:tc><w:tc><w:p><w:r><w:t>b</w:t></w:r></w:p></w:tc></w:tr>
    </w:tbl><w:p><w:pPr><w:numPr/></w:pPr><w:r><w:t>point</w:t></w:r></w:p>"""
    styles = f'<w:styles xmlns:w="{W}"><w:style w:styleId="H"><w:name w:val="heading 2"/></w:style></w:styles>'
    text = read_document(written(tmp_path, docx(body, **{"word/styles.xml": styles.encode()}))).text
    assert text == "## Plan\n\nIt costs six\teuros.\n\na | b\n\n- point\n"


def bomb(name: str, **others: bytes) -> bytes:
    return zipped({**others, name: b"<a>" + bytes(40 * 2**20)})


@pytest.mark.parametrize(
    "data",
    [
        bomb("word/document.xml"),
        bomb("META-INF/container.xml", mimetype=b"application/epub+zip"),
    ],
    ids=["docx", "epub"],
)
def test_zip_bombs_are_not_unpacked(data: bytes, tmp_path: Path) -> None:
    failing(written(tmp_path, data), "zip bomb")


def test_entities_are_not_expanded(tmp_path: Path) -> None:
    laughs = "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 12))
    xml = f'<!DOCTYPE d [<!ENTITY a0 "ha">{laughs}]><w:document xmlns:w="{W}"><w:p><w:r><w:t>x&a11;</w:t></w:r></w:p>'
    data = zipped({"word/document.xml": f"{xml}</w:document>".encode()})
    try:
        assert len(read_document(written(tmp_path, data)).text) < 100
    except AuvsumError as error:
        assert "damaged" in error.message  # noqa: PT017


def test_broken_archives(tmp_path: Path) -> None:
    whole = (SAMPLES / f"{REPORT}.docx").read_bytes()
    failing(written(tmp_path, docx("<w:p>")), "damaged inside")
    failing(written(tmp_path, whole[: len(whole) - 400]), "cut short")
    failing(written(tmp_path, zipped({"mimetype": b"application/epub+zip"})), "no EPUB inside")
    rights = {"mimetype": b"application/epub+zip", "META-INF/rights.xml": b"<r/>"}
    failing(written(tmp_path, zipped(rights)), "DRM")
    with pytest.raises(DocumentEmpty):
        read_document(written(tmp_path, docx("<w:p/>")))


# -- HTML and text -----------------------------------------------------------------------------------------------------


def test_html(tmp_path: Path) -> None:
    page = """<!DOCTYPE html><html><head><title>t</title><style>p{}</style></head><body><nav>Menu</nav>
    <h2>Rivers &amp; bridges</h2><p>One<br>two <b>three</b> four.</p><script>alert("no")</script>
    <p style="display: none">hidden</p><ul><li>first<li>second</ul><table><tr><td>a<td>b</table><pre>x
  y</pre></body>"""
    text = read_document(written(tmp_path, page.encode())).text
    assert text == "## Rivers & bridges\n\nOne\ntwo three four.\n\n- first\n- second\n\na b\n\nx\ny\n"


@pytest.mark.parametrize(
    ("head", "encoding"),
    [('<meta charset="iso-8859-1">', "latin-1"), ("", "utf-8"), ("", "latin-1"), ("", "utf-8-sig")],
)
def test_html_encodings(head: str, encoding: str, tmp_path: Path) -> None:
    body = "<p>El niño comió en la montaña el año pasado.</p>" * 30
    path = written(tmp_path, f"<html><head>{head}</head><body>{body}</body></html>".encode(encoding))
    assert "El niño comió en la montaña" in read_document(path).text
    assert "niño" in read_document(path, encoding=encoding).text


def test_html_that_nests_too_deep_or_is_cut_short(tmp_path: Path) -> None:
    deep = written(tmp_path, b"<html><body>" + b"<div>" * 100_000 + b"core" + b"</div>" * 50, "deep.html")
    try:
        read_document(deep)
    except AuvsumError as error:
        assert error.hint  # noqa: PT017
    assert "begins" in read_document(written(tmp_path, b"<html><body><p>It begins <b>and en")).text


def test_five_megabytes_on_one_line(tmp_path: Path) -> None:
    line = "The council met in the town hall. " * 150_000
    assert read_document(written(tmp_path, line.encode())).text == line
    accented = line + "Señor Nuñez spoke. "
    assert read_document(written(tmp_path, accented.encode("latin-1"))).text.endswith("Señor Nuñez spoke. ")


def test_mixed_encodings_are_read_piece_by_piece(tmp_path: Path) -> None:
    data = ("Größe und Käse für Füße. " * 20).encode() + "Señor “Nuñez”".encode("cp1252")
    document = read_document(written(tmp_path, data))
    assert document.text.endswith("Füße. Señor “Nuñez”")
    assert "mixes encodings" in document.warnings[0]


def test_large_files_are_mapped_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("auvsum.text.readers._MAPPED", 10)
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail("read"))
    for text, encoding in (("A report, long.\r\n", "utf-8"), ("﻿Größe", "utf-8"), ("Señor Nuñez. " * 20, "latin-1")):
        path = written(tmp_path, b"")
        path.write_bytes(text.encode(encoding))
        assert read_document(path).text == text.replace("\r", "").lstrip("\ufeff")
    path.write_bytes(bytes(100))
    with pytest.raises(DocumentBinary):
        read_document(path)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("oﬃce ﬂoor", "office floor"),
        ("cafe\u0301", "café"),
        ("hy\u00adphen zero\u200bwidth", "hyphen zerowidth"),
        ("soft\u00ad\nbreak", "softbreak"),
        ("naïve 世界 🌍", "naïve 世界 🌍"),
    ],
)
def test_normalized(given: str, wanted: str) -> None:
    assert normalize(given) == wanted


def test_hyphens_of_plain_text_are_joined_only_where_the_text_proves_it() -> None:
    join: Callable[[str], str] = lambda text: join_hyphens(text, eager=False)  # noqa: E731
    assert join("The depart-\nment. A department.") == "The department. A department."
    assert join("a well-\nknown man") == "a well-\nknown man"
    assert join("day-to-\nday work") == "day-to-\nday work"
    assert join_hyphens("day-to-\nday work today", eager=True) == "day-to-day work today"

"""Writes the samples in other formats from the plain text beside it: `python samples/make_formats.py`.

Needs `pip install reportlab python-docx`. Every run gives the same bytes: no dates, no random numbers.
"""

from __future__ import annotations

import html
import re
import zipfile
from pathlib import Path

HERE = Path(__file__).parent
NAME = "money-bail"
_EPOCH = (2020, 1, 1, 0, 0, 0)
_CONTAINER = """<?xml version="1.0"?>
<container version="1.0" xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>
<rootfile full-path="OEBPS/book.opf" media-type="application/oebps-package+xml"/></rootfiles></container>"""
_SITE = """<nav><a href="/">Home</a> <a href="/reports">All reports</a></nav>
<script>var tracking = "not part of the report";</script>
<style>body { font-family: serif }</style>"""


def paragraphs() -> list[str]:
    """The report's paragraphs, each on one line; the first is its title."""
    text = (HERE / f"{NAME}.txt").read_text(encoding="utf-8")
    return [" ".join(block.split()) for block in re.split(r"\n\s*\n", text) if block.strip()]


def write_pdf(blocks: list[str]) -> None:
    """Letter paper, a running header and a page number on every page, words hyphenated at line ends."""
    from reportlab.lib.pagesizes import letter
    from reportlab.lib.styles import ParagraphStyle
    from reportlab.platypus import Paragraph, SimpleDocTemplate

    def furniture(canvas, document) -> None:  # type: ignore[no-untyped-def]
        canvas.setFont("Times-Italic", 9)
        canvas.drawString(72, 756, "Congressional Research Service")
        canvas.drawRightString(540, 756, "Money Bail")
        canvas.drawCentredString(306, 36, f"Page {document.page}")

    body = ParagraphStyle("body", fontName="Times-Roman", fontSize=11, leading=13.5, spaceAfter=7)
    body.embeddedHyphenation, body.uriWasteReduce = 1, 0
    title = ParagraphStyle("title", parent=body, fontName="Times-Bold", fontSize=16, leading=20)
    story = [Paragraph(html.escape(_soft(block)), body if i else title) for i, block in enumerate(blocks)]
    file = SimpleDocTemplate(str(HERE / f"{NAME}.pdf"), pagesize=letter, invariant=1, title=blocks[0])
    file.build(story, onFirstPage=furniture, onLaterPages=furniture)


def _soft(text: str) -> str:
    """Long words may break after these syllables."""
    return re.sub(r"\b(depart|consti|defen|juris|deten)(ment|tution|dants|diction|tion)", "\\1\u00ad\\2", text)


def write_docx(blocks: list[str]) -> None:
    from docx import Document

    document = Document()
    document.core_properties.author = "auvsum samples"
    document.add_heading(blocks[0], 0)
    for block in blocks[1:]:
        document.add_paragraph(block)
    path = HERE / f"{NAME}.docx"
    document.save(str(path))
    with zipfile.ZipFile(path) as made:
        parts = {name: made.read(name) for name in made.namelist()}
    _zip(path, parts)


def write_html(blocks: list[str]) -> None:
    (HERE / f"{NAME}.html").write_text(_page(blocks, _SITE), encoding="utf-8")


def write_epub(blocks: list[str]) -> None:
    """Three chapters, in the order that the spine says and not in the order of the archive."""
    third = -(-len(blocks) // 3)
    names = ["c", "a", "b"]
    chapters = {name: blocks[i * third : (i + 1) * third] for i, name in enumerate(names)}
    items = "".join(f'<item id="{n}" href="{n}.xhtml" media-type="application/xhtml+xml"/>' for n in sorted(chapters))
    spine = "".join(f'<itemref idref="{name}"/>' for name in names)
    package = (
        '<?xml version="1.0"?><package xmlns="http://www.idpf.org/2007/opf" version="3.0" unique-identifier="id">'
        '<metadata xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:identifier id="id">auvsum-sample</dc:identifier>'
        f"<dc:title>{html.escape(blocks[0])}</dc:title><dc:language>en</dc:language></metadata>"
        f"<manifest>{items}</manifest><spine>{spine}</spine></package>"
    )
    parts = {"mimetype": b"application/epub+zip", "META-INF/container.xml": _CONTAINER.encode()}
    parts |= {"OEBPS/book.opf": package.encode()}
    parts |= {f"OEBPS/{name}.xhtml": _page(chapters[name], "").encode() for name in sorted(chapters)}
    _zip(HERE / f"{NAME}.epub", parts)


def _page(blocks: list[str], furniture: str) -> str:
    text = "\n".join(f"<p>{html.escape(block)}</p>" for block in blocks[1:])
    return (
        '<html xmlns="http://www.w3.org/1999/xhtml"><head><meta charset="utf-8"/>'
        f"<title>{html.escape(blocks[0])}</title></head><body>{furniture}\n"
        f"<h1>{html.escape(blocks[0])}</h1>\n{text}\n</body></html>\n"
    )


def _zip(path: Path, parts: dict[str, bytes]) -> None:
    """An archive without dates; `mimetype` stays uncompressed, as EPUB wants it."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in parts.items():
            kind = zipfile.ZIP_STORED if name == "mimetype" else zipfile.ZIP_DEFLATED
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), data, kind)


if __name__ == "__main__":
    report = paragraphs()
    for write in (write_pdf, write_docx, write_html, write_epub):
        write(report)

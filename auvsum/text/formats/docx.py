"""DOCX -> text: paragraphs, headings, lists and tables in order; inserted text counts, deleted text does not."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any

from auvsum.errors import DocumentUnreadable
from auvsum.text.formats import Extracted
from auvsum.text.formats.archive import Archive

_W = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
_SKIPPED = frozenset(_W + name for name in ("del", "moveFrom", "pPr", "rPr", "instrText", "sectPr", "fldData"))
#: What stands in for a choice of drawings: Word writes the same text twice, once for older programs.
_FALLBACK = "{http://schemas.openxmlformats.org/markup-compatibility/2006}Fallback"
_CHARACTERS = {_W + "tab": "\t", _W + "br": "\n", _W + "cr": "\n", _W + "noBreakHyphen": "-"}
_HEADING = re.compile(r"(?:heading|überschrift|titre)\s*([1-6])\Z", re.IGNORECASE)
_NOTES = ("word/footnotes.xml", "word/endnotes.xml")


def read(data: bytes, label: str, *, pages: Collection[int] | None, encoding: str | None) -> Extracted:
    """The body of the document, then its notes."""
    archive = Archive(data, label)
    if "word/document.xml" not in archive.names:
        raise DocumentUnreadable(f"{label} is no Word document inside", "open it in Word and save it anew")
    headings = _headings(parse_xml(archive.read("word/styles.xml"), label)) if _has(archive, "word/styles.xml") else {}
    blocks = list(_blocks(parse_xml(archive.read("word/document.xml"), label), headings))
    for name in _NOTES:
        if _has(archive, name):
            blocks += _blocks(parse_xml(archive.read(name), label), {})
    return Extracted("\n\n".join(blocks) + "\n")


def parse_xml(data: bytes, label: str) -> Any:
    """XML from a stranger: no entities, no network, however large."""
    from lxml import etree

    parser = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False, huge_tree=True)
    try:
        root = etree.fromstring(data, parser)
    except etree.XMLSyntaxError as error:
        raise DocumentUnreadable(f"{label} is damaged inside: {error.msg}", "save it anew") from error
    return root


def _has(archive: Archive, name: str) -> bool:
    return name in archive.names


def _headings(styles: Any) -> dict[str, str]:
    """Style id -> the marks of its heading, `## `."""
    found = {}
    for style in styles.iter(_W + "style"):
        name = style.find(_W + "name")
        title = "" if name is None else name.get(_W + "val", "")
        match = _HEADING.match(title)
        if match or title.lower() == "title":
            found[style.get(_W + "styleId", "")] = "#" * (int(match[1]) if match else 1) + " "
    return found


def _blocks(root: Any, headings: dict[str, str]) -> Iterator[str]:
    """Paragraphs and table rows in the order of the document."""
    tables = {_W + "tbl"}
    stack = [root]
    while stack:
        node = stack.pop()
        if node.tag == _W + "p":
            text = _text(node).strip()
            if text:
                yield _marks(node, headings) + text
        elif node.tag in tables:
            rows = [
                " | ".join(cell for cell in map(_cell, row.iter(_W + "tc")) if cell) for row in node.iter(_W + "tr")
            ]
            text = "\n".join(row for row in rows if row)
            if text:
                yield text
        elif node.tag not in _SKIPPED:
            stack.extend(reversed(node))


def _cell(cell: Any) -> str:
    return " ".join(text for text in (_text(p).strip() for p in cell.iter(_W + "p")) if text)


def _marks(paragraph: Any, headings: dict[str, str]) -> str:
    properties = paragraph.find(_W + "pPr")
    if properties is None:
        return ""
    style = properties.find(_W + "pStyle")
    if style is not None and style.get(_W + "val") in headings:
        return headings[style.get(_W + "val")]
    return "- " if properties.find(_W + "numPr") is not None else ""


def _text(paragraph: Any) -> str:
    """The characters of one paragraph, without what was deleted under change tracking."""
    parts: list[str] = []
    stack = [paragraph]
    while stack:
        node = stack.pop()
        if node.tag == _W + "t":
            parts.append(node.text or "")
        elif node.tag in _CHARACTERS:
            parts.append(_CHARACTERS[node.tag])
        elif node.tag not in _SKIPPED and node.tag != _FALLBACK:
            stack.extend(reversed(node))
    return "".join(parts)

"""EPUB -> text: the chapters in the order of the book's spine, each read as the HTML that it is."""

from __future__ import annotations

import posixpath
from collections.abc import Collection
from urllib.parse import unquote

from auvsum.errors import DocumentUnreadable
from auvsum.text.formats import Extracted
from auvsum.text.formats.archive import Archive
from auvsum.text.formats.docx import parse_xml
from auvsum.text.formats.html import text_of

_CONTAINER = "META-INF/container.xml"
_PAGES = ("application/xhtml+xml", "text/html", "application/x-dtbook+xml")


def read(data: bytes, label: str, *, pages: Collection[int] | None, encoding: str | None) -> Extracted:
    """The text of every chapter of the spine."""
    archive = Archive(data, label)
    if "META-INF/rights.xml" in archive.names:
        raise DocumentUnreadable(f"{label} is protected by DRM", "auvsum reads books without it only")
    if _CONTAINER not in archive.names:
        raise DocumentUnreadable(f"{label} is no EPUB inside: it has no {_CONTAINER}", "get the file again")
    roots = parse_xml(archive.read(_CONTAINER), label).xpath("//*[local-name()='rootfile']/@full-path")
    if not roots or roots[0] not in archive.names:
        raise DocumentUnreadable(f"{label} is damaged: its table of contents is missing", "get the file again")
    package = parse_xml(archive.read(roots[0]), label)
    folder = posixpath.dirname(roots[0])
    files = {
        item.get("id"): posixpath.normpath(posixpath.join(folder, unquote(item.get("href", ""))))
        for item in package.xpath("//*[local-name()='manifest']/*[local-name()='item']")
        if item.get("media-type") in _PAGES and "nav" not in item.get("properties", "").split()
    }
    spine = package.xpath("//*[local-name()='spine']/*[local-name()='itemref']/@idref")
    chapters = [files[name] for name in spine if name in files]
    missing = [name for name in chapters if name not in archive.names]
    texts = [text_of(archive.read(name), label) for name in chapters if name in archive.names]
    warnings = (f"{label} lacks {len(missing)} of its {len(chapters)} chapters",) if missing else ()
    return Extracted("\n\n".join(text.strip() for text in texts if text.strip()) + "\n", warnings=warnings)

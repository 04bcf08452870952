"""HTML -> text: headings, paragraphs, list items and rows on lines of their own; no scripts, menus, hidden parts."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from auvsum.errors import DocumentUnreadable
from auvsum.text.formats import Extracted

# fmt: off
_DROPPED = frozenset((
    "script", "style", "noscript", "template", "head", "nav", "aside", "iframe", "object", "embed", "svg", "math",
    "canvas", "audio", "video", "button", "select", "textarea", "input", "form", "dialog",
))
_LINES = frozenset(("tr", "li", "dt", "dd", "tbody", "thead", "tfoot", "br"))
_PARAGRAPHS = frozenset((
    "address", "article", "blockquote", "body", "center", "details", "div", "dl", "fieldset", "figcaption", "figure",
    "footer", "header", "hr", "html", "main", "ol", "p", "pre", "section", "summary", "table", "ul",
    "h1", "h2", "h3", "h4", "h5", "h6",
))
# fmt: on
_HEADINGS = {f"h{level}": "#" * level + " " for level in range(1, 7)}
#: Elements waiting to be written; a page that needs more is built to exhaust whoever reads it.
_MOST_WAITING = 1_000_000
_CHARSET = re.compile(rb"<meta[^>]*charset|<\?xml[^>]*encoding", re.IGNORECASE)


def read(data: bytes, label: str, *, pages: Collection[int] | None, encoding: str | None) -> Extracted:
    """The text that a reader of the page would see, without its menus."""
    warnings: tuple[str, ...] = ()
    source: bytes | str = data
    marked = data[:2] in (b"\xff\xfe", b"\xfe\xff") or data[:3] == b"\xef\xbb\xbf"
    if encoding is not None or (not marked and not _CHARSET.search(data[:4096])):
        # Nothing says what it is in: decode it as any other text, UTF-8 or a guess from the whole page.
        from auvsum.text.decoding import decode

        source, _, warnings = decode(label, data, encoding)
    return Extracted(text_of(source, label), warnings=warnings)


def text_of(source: bytes | str, label: str) -> str:
    """The text of one page."""
    from lxml import etree
    from lxml import html as lxml_html

    # lxml refuses text that declares an encoding, so text goes in as UTF-8 and the declaration is overruled.
    known = "utf-8" if isinstance(source, str) else None
    data = source.encode("utf-8", "replace") if isinstance(source, str) else source
    parser = lxml_html.HTMLParser(encoding=known, huge_tree=True, remove_comments=True, remove_pis=True)
    try:
        root = lxml_html.document_fromstring(data, parser=parser)
    except (etree.LxmlError, ValueError) as error:
        raise DocumentUnreadable(f"{label} cannot be read as HTML: {error}", "save it as plain text") from error
    return _Writer().text(root)


class _Writer:
    """Walks a tree without recursion: pages nest deeper than Python likes."""

    def __init__(self) -> None:
        self._parts: list[str] = []

    def text(self, root: Any) -> str:
        stack: list[tuple[Any, bool, bool]] = [(root, False, False)]
        while stack:
            node, leaving, verbatim = stack.pop()
            tag = node.tag if isinstance(node.tag, str) else ""
            if leaving:
                if tag in _PARAGRAPHS:
                    self._break(tag)
                self._write(node.tail, verbatim)
                continue
            if tag in _DROPPED or not tag or _hidden(node):
                self._write(node.tail, verbatim)
                continue
            self._break(tag)
            self._parts.append(_HEADINGS.get(tag, "- " if tag == "li" else ""))
            inside = verbatim or tag == "pre"
            self._write(node.text, inside)
            stack.append((node, True, verbatim))
            if len(stack) < _MOST_WAITING:
                stack.extend((child, False, inside) for child in reversed(node))
        text = "".join(self._parts)
        text = re.sub(r"[ \t]*\n[ \t]*", "\n", text)
        text = re.sub(r"^(#+|-) *\n+", "", text, flags=re.MULTILINE)
        return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"

    def _break(self, tag: str) -> None:
        if tag in _LINES:
            self._parts.append("\n")
        elif tag in ("td", "th"):
            self._parts.append(" ")
        elif tag in _PARAGRAPHS:
            self._parts.append("\n\n")

    def _write(self, text: str | None, verbatim: bool) -> None:
        if text:
            self._parts.append(text if verbatim else re.sub(r"\s+", " ", text))


def _hidden(node: Any) -> bool:
    style = node.get("style", "").replace(" ", "").lower()
    role = node.get("role", "")
    return (
        node.get("hidden") is not None
        or node.get("aria-hidden") == "true"
        or role in ("navigation", "search", "banner", "contentinfo")
        or "display:none" in style
        or "visibility:hidden" in style
    )

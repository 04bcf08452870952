"""One form for every text: composed characters, plain letters for ligatures, nothing invisible."""

from __future__ import annotations

import re
import unicodedata

#: Typesetters' ligatures, soft hyphens, zero-width characters and the byte order mark as people would type them.
_PLAIN = {
    **{ord(c): plain for c, plain in zip("ﬀﬁﬂﬃﬄﬅﬆ", ("ff", "fi", "fl", "ffi", "ffl", "st", "st"), strict=True)},
    **dict.fromkeys((0x00AD, 0x200B, 0x2060, 0xFEFF)),
    0x2028: "\n",
    0x2029: "\n\n",
}
_NEEDS_PLAIN = re.compile("[" + "".join(map(chr, _PLAIN)) + "]")
_BROKEN = re.compile(r"(\w*[^\W\d_])[-‐]\n[ \t]*([^\W\d_]\w*)")


def normalize(text: str) -> str:
    """NFC, ligatures spelled out, soft hyphens and zero-width characters gone. A text that is so already is not copied.

    A soft hyphen at a line's end joins the two halves of its word.
    """
    if text.isascii():
        return text
    if "\u00ad\n" in text:
        text = text.replace("\u00ad\n", "")
    if _NEEDS_PLAIN.search(text):
        text = text.translate(_PLAIN)
    return text if unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", text)


def join_hyphens(text: str, *, eager: bool) -> str:
    """Joins words that were hyphenated at a line's end.

    Args:
        eager: join unless the text itself writes the word with a hyphen elsewhere (typeset pages); otherwise join only
            words that the text also writes in one (plain text, where a hyphen at a line's end may be the word's own).
    """
    if "-\n" not in text and "‐\n" not in text:
        return text
    words = {match[0] for match in re.finditer(r"\w+(?:-\w+)*", text)}  # each once, however long the text

    def joined(match: re.Match[str]) -> str:
        first, second = match[1], match[2]
        whole, hyphened = first + second, f"{first}-{second}"
        compound = text[match.start() - 1 : match.start()] == "-" or text[match.end() : match.end() + 1] == "-"
        if compound and eager:
            return hyphened
        if whole in words or (eager and hyphened not in words and second[0].islower()):
            return whole
        return hyphened if eager or hyphened in words else match[0]

    return _BROKEN.sub(joined, text)

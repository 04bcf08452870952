"""The shape of a summary: asked for in the prompt, and given to whatever the model wrote."""

from __future__ import annotations

import re

from auvsum.text.windows import sentences

#: What is added to the instruction.
ASKED = {
    None: "",
    "paragraph": " Write one paragraph of plain sentences.",
    "bullets": " Write it as a list of short points, each on a line of its own that begins with a dash.",
}
_BULLET = re.compile(r"\s*(?:[-*•‣–—]|\(?\d{1,2}[.)])\s+")


def question(query: str) -> str:
    """The instruction of `--query`."""
    text = query.strip()
    return f"Answer from the text above alone: {text if text.endswith('?') else text + '?'}"


def shaped(text: str, style: str | None) -> str:
    """The summary in the shape asked for; as it is without one."""
    if style is None or not text:
        return text
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if style == "paragraph":
        return " ".join(_BULLET.sub("", line, count=1) for line in lines)
    if any(_BULLET.match(line) for line in lines):
        points = [_BULLET.sub("", line, count=1) for line in lines if _BULLET.match(line) or not line.endswith(":")]
    else:
        points = [part.strip() for line in lines for part in sentences(line)]
    return "\n".join(f"- {point}" for point in points)

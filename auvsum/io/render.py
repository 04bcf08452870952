"""A document's record -> the bytes that people keep, in one of four formats."""

from __future__ import annotations

import json
from typing import Any

SUFFIXES = {"text": ".txt", "md": ".md", "json": ".json", "jsonl": ".jsonl"}


def render(record: dict[str, Any], format: str) -> str:
    """One document in a format; empty for a failed one where the format holds nothing but summaries."""
    if format == "json":
        return json.dumps(record, ensure_ascii=False, indent=2) + "\n"
    if format == "jsonl":
        return json.dumps(record, ensure_ascii=False) + "\n"
    if record["summary"] is None:
        return ""
    summary = record["summary"].strip() + "\n" + sources(record.get("citations") or [])
    return f"# {record['id']}\n\n{summary}" if format == "md" else summary


def encode(text: str) -> bytes:
    """UTF-8. A lone surrogate (an undecodable file name) becomes `\\udcXX`, which JSON reads as what it was."""
    return text.encode("utf-8", "backslashreplace")


def sources(citations: list[dict[str, Any]]) -> str:
    """Where each sentence comes from, one line each: `[2] page 4: "..."`; empty without citations."""
    lines = []
    for number, cited in enumerate(citations, 1):
        source = cited["source"]
        if source is None:
            lines.append(f"[{number}] no passage of the document says this\n")
            continue
        place = f"page {source['page']}" if source["page"] is not None else f"line {source['line']}"
        lines.append(f'[{number}] {place}: "{source["text"]}"\n')
    return "\n" + "".join(lines) if lines else ""

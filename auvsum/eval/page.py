"""One self-contained HTML page of a run or several: tables, plots, and example documents with what each cache kept."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from auvsum.errors import ConfigError
from auvsum.eval.plots import inline_svg
from auvsum.eval.runs import Run
from auvsum.eval.tables import cells_of, differences, heads, merge

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; color: #222 }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto }
td, th { border-bottom: 1px solid #ddd; padding: .25em .7em; text-align: right; white-space: nowrap }
td:first-child, th:first-child { text-align: left }
figure { margin: 1em 0 } svg { max-width: 100%; height: auto }
.side { display: grid; grid-template-columns: repeat(auto-fit, minmax(20em, 1fr)); gap: 1em }
.side > div { border: 1px solid #ddd; padding: .6em .9em; overflow-wrap: anywhere }
.document { font-size: 12px; max-height: 24em; overflow: auto; border: 1px solid #ddd; padding: .6em;
  white-space: pre-wrap; overflow-wrap: anywhere }
.note { color: #a40 } h4 { margin: .2em 0 }
""" + "".join(f".k{i} {{ background: rgba(255, 170, 0, {i / 12:.2f}) }}\n" for i in range(1, 10))


def page(runs: Sequence[Run]) -> str:
    """The page's text; it refers to nothing outside itself.

    Raises:
        RunError: the runs cannot be compared.
    """
    metrics, rows = merge(runs)
    names = ", ".join(run.name for run in runs)
    parts = [f"<h1>{escape(names)}</h1>"]
    for line in heads(metrics):
        parts.append(f"<p{' class=note' if line.startswith('note:') else ''}>{escape(line)}</p>")
    parts.append(_table(cells_of(rows, several=len(runs) > 1)))
    parts.append(
        "<p>agree: how often a cache thinks the full cache's next token best; nats lost: how much less likely it finds "
        "it, a token. Both are teacher-forced on the full cache's own summary; brackets are 95% bootstrap intervals "
        "over documents. matched: every summary cut to the length of the full cache's.</p>"
    )
    pairs = differences(metrics)
    if len(pairs) > 1:
        parts.append(f"<details><summary>Paired differences</summary>{_table(pairs)}</details>")
    try:
        parts += [f"<figure>{svg}</figure>" for svg in inline_svg(runs).values()]
    except ConfigError as error:
        parts.append(f"<p class=note>{escape(error.message)}: {escape(error.hint)}</p>")
    for run in runs:
        parts += [_example(run, sample) for sample in run.samples() if sample.get("pieces")]
    return (
        f"<!doctype html>\n<html lang=en><meta charset=utf-8><title>{escape(names)} - auvsum</title>\n"
        f"<style>{_STYLE}</style>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _table(table: Sequence[Sequence[str]]) -> str:
    lines = ["<table>"]
    for number, row in enumerate(table):
        tag = "td" if number else "th"
        lines.append("<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row) + "</tr>")
    return "\n".join([*lines, "</table>"])


def _example(run: Run, sample: dict[str, Any]) -> str:
    """A document: every row's summary side by side, then the text as each cache kept it."""
    boxes = [f"<div><h4>reference</h4>{escape(sample['reference']) or '(none)'}</div>"]
    texts = []
    for name, row in sample["rows"].items():
        summary = row.get("summary")
        if summary is not None:
            boxes.append(f"<div><h4>{escape(name)}</h4>{escape(summary) or '<i>(empty)</i>'}</div>")
        if row.get("shade"):
            text = _shaded(sample["pieces"], row["shade"])
            texts.append(
                f"<details><summary>kept by {escape(name)}</summary><div class=document>{text}</div></details>"
            )
    head = f"<h2>{escape(run.name)}: {escape(sample['id'])}</h2>"
    return head + f"<div class=side>{''.join(boxes)}</div>" + "".join(texts)


def _shaded(pieces: Sequence[str], shades: str) -> str:
    """The document with a background where tokens were kept: the more layers and heads, the darker."""
    out, last = [], ""
    for piece, shade in zip(pieces, shades, strict=True):
        if shade != last:
            out.append(("</span>" if last else "") + f"<span class=k{shade}>")
            last = shade
        out.append(escape(piece))
    return "".join(out) + ("</span>" if last else "")

"""One table for one run or several of the same documents, as text, Markdown, CSV or JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from auvsum.budget import size
from auvsum.errors import RunError
from auvsum.eval.runs import Run

#: Metric -> its column's head, and the digits shown.
COLUMNS = {
    "agreement": ("agree", 3),
    "nats": ("nats lost", 3),
    "rouge1": ("R-1", 1),
    "rouge2": ("R-2", 1),
    "rougeL": ("R-L", 1),
    "rougeLsum": ("R-Lsum", 1),
    "bertscore": ("BERTScore", 1),
    "words": ("words", 0),
    "tokens_per_s": ("tokens/s", 1),
    "rouge1@matched": ("R-1 matched", 1),
    "bertscore@matched": ("BERTScore matched", 1),
}
#: Columns whose interval stands beside the mean.
_WITH_INTERVAL = ("agreement", "nats", "rouge1", "bertscore")


def merge(runs: Sequence[Run]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The metrics of several runs and the rows of their common table; each row knows its run.

    Raises:
        RunError: runs of different documents, or one that has not been scored.
    """
    metrics = [run.metrics() for run in runs]
    for run, found in zip(runs[1:], metrics[1:], strict=True):
        if found["documents"] != metrics[0]["documents"]:
            mine = {d["id"]: d["sha256"] for d in found["documents"]}
            theirs = {d["id"]: d["sha256"] for d in metrics[0]["documents"]}
            both = sum(theirs.get(id) == sha for id, sha in mine.items())
            raise RunError(
                f"{run.path} and {runs[0].path} measured different documents: {both} of {len(mine)} and {len(theirs)} "
                "are the same",
                "compare runs of the same dataset, limit and seed",
            )
        if found["encoder"] != metrics[0]["encoder"]:
            raise RunError(
                f"{run.path} was scored with encoder {found['encoder']}, {runs[0].path} with {metrics[0]['encoder']}",
                f"type: auvsum score {run.path} --encoder NAME",
            )
    rows = [
        {"run": run.name, "name": name, **row}
        for run, found in zip(runs, metrics, strict=True)
        for name, row in found["rows"].items()
    ]
    return metrics, rows


def heads(metrics: Sequence[dict[str, Any]]) -> list[str]:
    """Lines above a table: what was measured, and what must be known before believing it."""
    lines = []
    for found in metrics:
        config = found["config"]
        lines.append(
            f"{config['dataset']} ({len(found['documents'])} documents, {found['prompt_tokens']:,.0f} prompt tokens, "
            f"{config['condition']}), {config['model']}, {found['setting']}"
        )
        lines += [f"note: {note}" for note in found["notes"]]
        lines += [f"note: {one['id']} failed: {one['message']}" for one in found["failed"]]
    encoder = metrics[0]["encoder"]
    if encoder:
        lines.append(f"BERTScore F1 by {encoder}")
    return list(dict.fromkeys(lines))


def cells_of(rows: Sequence[dict[str, Any]], *, several: bool) -> list[list[str]]:
    """Head and rows as text; an interval stands beside the scores that are compared. `kept` is the share of the tokens
    of the document's first and of its last tenth: a truncation in disguise shows there."""
    shown = [metric for metric in COLUMNS if any(metric in row["scores"] for row in rows)]
    head = [*(["run"] if several else []), "cache", "bytes", "slots", *(COLUMNS[m][0] for m in shown), "kept", "n"]
    table = [head]
    for row in rows:
        counts = [row["scores"][m]["n"] for m in shown if m in row["scores"]]
        table.append(
            [
                *([row["run"]] if several else []),
                row["name"],
                size(row["bytes"]) if row["bytes"] else "-",
                f"{row['slots']:,.0f}" if row["slots"] else "-",
                *(_value(row, metric) for metric in shown),
                f"{row['kept'][0]:.0%}, {row['kept'][-1]:.0%}" if row["kept"] else "-",
                str(max(counts, default=0)),
            ]
        )
    return table


def _value(row: dict[str, Any], metric: str) -> str:
    found = row["scores"].get(metric)
    if found is None:
        return "-"
    digits = COLUMNS[metric][1]
    text = f"{found['mean']:.{digits}f}"
    if metric in _WITH_INTERVAL and found["low"] != found["high"]:
        text += f" [{found['low']:.{digits}f}, {found['high']:.{digits}f}]"
    return text


def differences(metrics: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Paired differences of the nats lost, most certain first: below 0, the first loses less."""
    table = [["first", "second", "nats: first - second", "95%"]]
    for found in metrics:
        pairs = [pair for pair in found["paired"] if pair["metric"] == "nats"]
        for pair in pairs:
            interval = f"[{pair['low']:+.3f}, {pair['high']:+.3f}]"
            table.append([pair["first"], pair["second"], f"{pair['mean']:+.3f}", interval])
    return table


def text_table(table: Sequence[Sequence[str]]) -> str:
    """Plain columns, numbers to the right."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = []
    for row in table:
        cells = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines) + "\n"


def markdown_table(table: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table]
    lines.insert(1, "|---" + "|---:" * (len(table[0]) - 1) + "|")
    return "\n".join(lines) + "\n"


def render(runs: Sequence[Run], form: str) -> str:
    """The comparison as `text`, `md`, `csv` or `json`.

    Raises:
        RunError: the runs cannot be compared.
    """
    metrics, rows = merge(runs)
    if form == "json":
        bare = [{k: v for k, v in row.items() if k != "documents"} for row in rows]
        data = {"heads": heads(metrics), "rows": bare, "paired": [p for found in metrics for p in found["paired"]]}
        return json.dumps(data, ensure_ascii=False, indent=1) + "\n"
    if form == "csv":
        return _csv(rows)
    table = cells_of(rows, several=len(runs) > 1)
    if form == "md":
        return "\n\n".join(heads(metrics)) + "\n\n" + markdown_table(table)
    text = "\n".join(heads(metrics)) + "\n\n" + text_table(table)
    pairs = differences(metrics)
    return text + ("\n" + text_table(pairs) if len(pairs) > 1 else "")


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    kinds = ("mean", "low", "high", "n")
    fixed = ("run", "name", "kind", "policy", "budget", "scope", "kv_bits", "bytes", "slots")
    writer.writerow([*fixed, *(f"{metric}_{kind}" for metric in COLUMNS for kind in kinds)])
    for row in rows:
        values = [row["scores"].get(metric, {}).get(kind, "") for metric in COLUMNS for kind in kinds]
        writer.writerow([*(row[key] if row[key] is not None else "" for key in fixed), *values])
    return out.getvalue()

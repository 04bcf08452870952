"""Plots of runs: quality against bytes with the Pareto front, what the caches kept, and time a document."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from auvsum.errors import ConfigError, RunError
from auvsum.eval.runs import Run
from auvsum.eval.tables import COLUMNS, merge

#: Which metrics get a plot of their own, and whether more is better.
PLOTTED = {"nats": False, "agreement": True, "rouge1": True, "bertscore": True}


def pareto(points: Sequence[tuple[float, float]], *, more_is_better: bool) -> list[tuple[float, float]]:
    """Of (bytes, quality) the points that no other beats in both, by bytes."""
    front: list[tuple[float, float]] = []
    for size, quality in sorted(points, key=lambda p: (p[0], -p[1] if more_is_better else p[1])):
        if not front or (quality > front[-1][1] if more_is_better else quality < front[-1][1]):
            front.append((size, quality))
    return front


def figures(runs: Sequence[Run]) -> dict[str, Any]:
    """matplotlib figures by name.

    Raises:
        RunError: runs that cannot be compared, or nothing to plot. ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("plots need matplotlib", "type: pip install 'auvsum[eval]'") from error
    metrics, rows = merge(runs)
    found: dict[str, Any] = {}
    for metric in PLOTTED:
        if any(metric in row["scores"] for row in rows if row["kind"] == "cache"):
            found[f"quality-{metric}"] = _quality(Figure(figsize=(7, 4.5), layout="constrained"), rows, metric, runs)
    if any("tokens_per_s" in row["scores"] for row in rows):
        found["throughput"] = _quality(Figure(figsize=(7, 4.5), layout="constrained"), rows, "tokens_per_s", runs)
    if any(row["kept"] for row in rows):
        found["kept"] = _kept(Figure(figsize=(7, 4.5), layout="constrained"), rows)
    if not found:
        raise RunError("there is nothing to plot: no cache has a score", "measure at least one policy")
    title = f"{metrics[0]['config']['dataset']}, {metrics[0]['config']['model']}, {metrics[0]['setting']}"
    for figure in found.values():
        figure.suptitle(title, fontsize=9)
    return found


def _quality(figure: Any, rows: Sequence[dict[str, Any]], metric: str, runs: Sequence[Run]) -> Any:
    axes = figure.subplots()
    lines: dict[str, list[dict[str, Any]]] = {}
    points = []
    for row in rows:
        if metric not in row["scores"]:
            continue
        if row["bytes"] is None:
            axes.axhline(row["scores"][metric]["mean"], linestyle=":", linewidth=1, color="0.6")
            axes.annotate(
                row["name"], (0.01, row["scores"][metric]["mean"]), xycoords=("axes fraction", "data"), size=7
            )
            continue
        parts = [row["policy"], "paper" if row["scope"] == "paper" else "", *([row["run"]] if len(runs) > 1 else [])]
        parts += [f"{row['kv_bits']}-bit"] if row["kv_bits"] != 16 else []
        lines.setdefault(" ".join(part for part in parts if part), []).append(row)
        points.append((row["bytes"] / 2**20, row["scores"][metric]["mean"]))
    for label, line in lines.items():
        line.sort(key=lambda row: row["bytes"])
        means = [row["scores"][metric]["mean"] for row in line]
        below = [m - row["scores"][metric]["low"] for m, row in zip(means, line, strict=True)]
        above = [row["scores"][metric]["high"] - m for m, row in zip(means, line, strict=True)]
        sizes = [row["bytes"] / 2**20 for row in line]
        axes.errorbar(sizes, means, yerr=(below, above), marker="o", markersize=4, capsize=2, label=label)
    front = pareto(points, more_is_better=PLOTTED.get(metric, True))
    axes.plot(*zip(*front, strict=True), color="0.8", linewidth=5, zorder=0, label="Pareto front")
    axes.set_xscale("log")
    axes.set_xlabel("KV bytes a document at the peak, MiB")
    axes.set_ylabel(COLUMNS[metric][0])
    axes.legend(fontsize=7)
    return figure


def _kept(figure: Any, rows: Sequence[dict[str, Any]]) -> Any:
    axes = figure.subplots()
    for row in rows:
        if row["kept"]:
            axes.plot(range(1, 11), row["kept"], marker=".", label=f"{row['run']}: {row['name']}")
    axes.set_xlabel("tenth of the document")
    axes.set_ylabel("share of its tokens kept after reading")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7)
    return figure


def save(runs: Sequence[Run], out: Path, form: str) -> list[Path]:
    """Writes every figure as `png` or `svg` into a folder and returns the files."""
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for name, figure in figures(runs).items():
        path = out / f"{name}.{form}"
        figure.savefig(path, format=form, dpi=150)
        files.append(path)
    return files


def inline_svg(runs: Sequence[Run]) -> dict[str, str]:
    """The figures as SVG elements for a page."""
    found = {}
    for name, figure in figures(runs).items():
        out = io.StringIO()
        figure.savefig(out, format="svg")
        text = out.getvalue()
        found[name] = text[text.index("<svg") :]
    return found

"""`auvsum compare | plot | report`: what finished runs say, as tables, pictures and a page."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from auvsum.cli import options
from auvsum.cli.guard import guarded
from auvsum.eval.runs import Run, write_whole
from auvsum.ui.console import Console

Runs = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of scored runs of the same documents.")]


class TableForm(str, Enum):
    text = "text"
    md = "md"
    csv = "csv"
    json = "json"


class PlotForm(str, Enum):
    png = "png"
    svg = "svg"


def compare(
    runs: Runs,
    format: Annotated[TableForm, typer.Option("--format", help="How the table is written.", show_default=False)] = (
        TableForm.text
    ),
    color: options.ColorOption = options.Color.auto,
    debug: options.Debug = False,
) -> int:
    """One table of one or several runs, on stdout. Runs of different documents are refused.

    \b
    Examples:
      auvsum compare runs/xsum
      auvsum compare runs/xsum-16bit runs/xsum-4bit --format md
      auvsum compare runs/* --format csv > all.csv
    """
    console = Console(color.value, debug=debug)

    def work() -> int:
        from auvsum.eval.tables import render

        console.write(render([Run(run) for run in runs], format.value))
        return 0

    return guarded(console, work)


def plot(
    runs: Runs,
    out: Annotated[Path | None, typer.Option(help="A folder; default that of the first run.", metavar="DIR")] = None,
    format: Annotated[PlotForm, typer.Option("--format", help="png or svg.", show_default=False)] = PlotForm.png,
    color: options.ColorOption = options.Color.auto,
    debug: options.Debug = False,
) -> int:
    """Plot quality against bytes with the Pareto front, and which part of the documents was kept.

    \b
    Examples:
      auvsum plot runs/xsum
      auvsum plot runs/xsum runs/xsum-paper --out plots --format svg
    """
    console = Console(color.value, debug=debug)

    def work() -> int:
        from auvsum.eval.plots import save

        for file in save([Run(run) for run in runs], out or runs[0], format.value):
            console.write(f"{file}\n")
        return 0

    return guarded(console, work)


def report(
    runs: Runs,
    html: Annotated[bool, typer.Option("--html", help="One self-contained HTML page.")] = False,
    out: Annotated[Path | None, typer.Option(help="The file; default report.html in the first run.")] = None,
    peer: Annotated[
        list[Path] | None, typer.Option(help="What benchmarks/eval_kvpress.py wrote, for the Markdown.", metavar="FILE")
    ] = None,
    color: options.ColorOption = options.Color.auto,
    debug: options.Debug = False,
) -> int:
    """Everything that runs say: as Markdown on stdout, or with `--html` as a page with plots and example documents.

    \b
    Examples:
      auvsum report runs/xsum --html
      auvsum report runs/cnn runs/xsum > docs/RESULTS.md
      auvsum report runs/cnn --peer kvpress-cpu.json
    """
    console = Console(color.value, debug=debug)

    def work() -> int:
        kept = [Run(run) for run in runs]
        if not html:
            from auvsum.eval.results import results

            text = results(kept, peer or ())
            if out is None:
                console.write(text)
            else:
                write_whole(out, text)
            return 0
        from auvsum.eval.page import page

        path = out or runs[0] / "report.html"
        write_whole(path, page(kept))
        console.write(f"{path}\n")
        return 0

    return guarded(console, work)

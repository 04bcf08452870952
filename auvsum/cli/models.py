"""`auvsum models list | pull | path`: which models there are, bringing one here, and where it lies."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from auvsum.budget import size
from auvsum.cli import options
from auvsum.cli.guard import guarded
from auvsum.ui.console import Console

if TYPE_CHECKING:
    from auvsum.engine.catalogue import ModelInfo

app = typer.Typer(help="Models: list them, bring one here, find its folder.")

Name = Annotated[
    str | None,
    typer.Argument(metavar="NAME", help="Short name, folder, or hub id; the default model without it."),
]


@app.command("list")
def list_(
    format: options.FormatOption = options.Format.text,
    color: options.ColorOption = options.Color.auto,
    debug: options.Debug = False,
) -> int:
    """List the models with a short name and those in the local Hugging Face cache.

    \b
    Examples:
      auvsum models list
      auvsum models list --format json
    """
    console = Console(color.value, debug=debug)

    def work() -> int:
        from auvsum.engine.catalogue import listing

        models = listing()
        if format is options.Format.json:
            data = [{**asdict(model), "path": str(model.path) if model.path else None} for model in models]
            console.write(json.dumps(data, ensure_ascii=False, indent=2) + "\n")
        else:
            console.write(_table(models))
        return 0

    return guarded(console, work)


@app.command("pull")
def pull(
    name: Name = None,
    download: options.Download = None,
    color: options.ColorOption = options.Color.auto,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> int:
    """Bring a model here, so that it can be used offline; its folder goes to stdout.

    \b
    Examples:
      auvsum models pull
      auvsum models pull facebook/opt-1.3b --download
    """
    console = Console(color.value, quiet, debug=debug)

    def work() -> int:
        from auvsum.engine.models import pull as bring

        console.write(f"{bring(name, download=bool(download), progress=console.note)}\n")
        return 0

    return guarded(console, work)


@app.command("path")
def path(
    name: Name = None,
    color: options.ColorOption = options.Color.auto,
    debug: options.Debug = False,
) -> int:
    """Show the folder of a model that is here.

    \b
    Examples:
      auvsum models path opt-1.3b
    """
    console = Console(color.value, debug=debug)

    def work() -> int:
        from auvsum.engine.models import resolve

        console.write(f"{resolve(name, progress=console.note)}\n")
        return 0

    return guarded(console, work)


def _table(models: list[ModelInfo]) -> str:
    """Plain columns: a table that `grep` and `awk` can read."""
    rows = [("NAME", "HERE", "ARCHITECTURE", "POSITIONS", "SIZE", "LICENCE", "NOTE")]
    for model in models:
        here = "yes" if model.present else "no"
        note = model.problem or ("" if model.supported else "not supported") or model.note
        positions = "" if model.positions is None else f"{model.positions:,}"
        rows.append((model.name, here, model.architecture, positions, size(model.size_bytes), model.licence, note))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines) + "\n"

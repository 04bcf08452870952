"""`auvsum inspect FILE`: which tokens of a document each policy kept."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from auvsum.cli import options
from auvsum.cli.guard import guarded
from auvsum.config import load_settings
from auvsum.text.readers import read_document
from auvsum.ui.console import Console, OutputError

_FLAGS = ("model", "budget", "budget_scope", "strategy", "chunk", "template", "instruction", "truncate")
_MACHINE_FLAGS = ("device", "dtype", "threads", "download")
#: `auto` would keep everything.
_BUDGET = "10%"


def command(
    ctx: typer.Context,
    file: Annotated[str, typer.Argument(metavar="FILE", help="A text file; - is standard input.")],
    policies: Annotated[str, typer.Option(help="Names, separated by commas.", metavar="NAMES")] = "auv,h2o",
    layer: Annotated[int | None, typer.Option(help="Only this layer.", metavar="N", show_default=False)] = None,
    head: Annotated[int | None, typer.Option(help="Only this KV head.", metavar="N", show_default=False)] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page here as well.", show_default=False)] = None,
    budget: options.Budget = None,
    budget_scope: options.BudgetScope = None,
    strategy: options.Strategy = None,
    chunk: options.Chunk = None,
    template: options.Template = None,
    instruction: options.Instruction = None,
    truncate: options.Truncate = None,
    encoding: options.Encoding = None,
    model: options.Model = None,
    download: options.Download = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    format: options.FormatOption = options.Format.text,
    config: options.Config = None,
    color: options.ColorOption = options.Color.auto,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> int:
    """Show which tokens of a document each policy kept at the end of the prompt, with a budget of 10% unless told.

    \b
    Examples:
      auvsum inspect report.txt
      auvsum inspect report.txt --policies auv,h2o,snapkv --budget 4%
      auvsum inspect report.txt --layer 5 --head 0 --format json
      auvsum inspect report.txt --html kept.html
    """
    console = Console(color.value, quiet, debug=debug)

    def work() -> int:
        flags = {name: ctx.params[name] for name in (*_FLAGS, *_MACHINE_FLAGS)}
        settings, origins = load_settings(flags, config_path=config)
        if origins["budget"] == "default":
            settings = replace(settings, budget=_BUDGET)
        document = read_document(file, encoding=encoding)
        for warning in document.warnings:
            console.warn(warning)
        with console.status("reading"):
            from auvsum._env import prepare

            prepare(download=settings.download)
            from auvsum import inspection
            from auvsum.cache.policy import policy_class
            from auvsum.engine.models import load

            names = [name.strip() for name in policies.split(",") if name.strip()]
            for name in names:
                policy_class(name)  # a misspelt name should not cost a model load
            loaded = load(
                settings.model,
                device=settings.device,
                dtype=settings.dtype,
                threads=settings.threads,
                download=settings.download,
            )
            found = inspection.inspect(loaded, settings, document.text, names, layer, head)
        if html is not None:
            try:
                html.write_text(inspection.html_report(found, document.id), encoding="utf-8")
            except OSError as error:
                raise OutputError(f"{html} cannot be written: {error.strerror}", "name another file") from error
            console.note(f"written: {html}")
        if format is options.Format.json:
            records = [kept.record(positions=layer is not None or head is not None) for kept in found]
            console.write(json.dumps({"id": document.id, "policies": records}, ensure_ascii=False) + "\n")
        else:
            width = shutil.get_terminal_size().columns - 4 if console.stdout_is_terminal else 76
            console.write(inspection.text_report(found, width))
        return 0

    return guarded(console, work)

"""`auvsum config show`: the settings a run here would use, and where each came from."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

import typer
import yaml

from auvsum.cli import options
from auvsum.cli.guard import guarded
from auvsum.config import load_settings
from auvsum.ui.console import Console

HELP = """Settings, and where each came from.

Precedence: flag, AUVSUM_* variable, --config or ./auvsum.yaml, the user's config.yaml, default.
"""
app = typer.Typer(help=HELP, short_help="Settings, and where each came from.")


@app.callback()
def root() -> None:
    pass


@app.command("show")
def show(
    config: options.Config = None,
    origins: options.Origins = False,
    format: options.FormatOption = options.Format.text,
    color: options.ColorOption = options.Color.auto,
    debug: options.Debug = False,
) -> int:
    """Show the settings that a run in this folder would use.

    \b
    Examples:
      auvsum config show --origins
      auvsum config show > auvsum.yaml
    """
    console = Console(color.value, debug=debug)

    def work() -> int:
        settings, came_from = load_settings({}, config_path=config)
        values = asdict(settings)
        if format is options.Format.json:
            data = {key: {"value": value, "origin": came_from[key]} for key, value in values.items()}
            console.write(json.dumps(data if origins else values, ensure_ascii=False, indent=2) + "\n")
            return 0
        for key, value in values.items():
            line = f"{key}: {_yaml(value)}"
            console.write(f"{line:<36}  # {came_from[key]}\n" if origins else f"{line}\n")
        return 0

    return guarded(console, work)


def _yaml(value: Any) -> str:
    """A value on one line."""
    text: str = yaml.safe_dump(value, allow_unicode=True, default_flow_style=True, width=sys.maxsize)
    return text.removesuffix("...\n").strip()

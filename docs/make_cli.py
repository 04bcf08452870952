"""Writes docs/CLI.md from what `--help` shows. `python docs/make_cli.py`; a test keeps the file true."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import typer.main

from auvsum.cli.app import app

FILE = Path(__file__).with_name("CLI.md")
HEAD = """# Command line

Made by `python docs/make_cli.py` from what `--help` shows; do not edit it by hand.
"""


def sections() -> Iterator[tuple[str, str]]:
    """Every command's name and help, the root first."""
    root = typer.main.get_command(app)

    def visit(command: object, name: str, parent: object) -> Iterator[tuple[str, str]]:
        context = command.make_context(  # type: ignore[attr-defined]
            name.split()[-1], [], parent=parent, resilient_parsing=True, terminal_width=100, max_content_width=100
        )
        yield name, "\n".join(line.rstrip() for line in command.get_help(context).splitlines())  # type: ignore[attr-defined]
        for child_name, child in getattr(command, "commands", {}).items():
            yield from visit(child, f"{name} {child_name}", context)

    yield from visit(root, "auvsum", None)


def reference() -> str:
    """The whole page."""
    return HEAD + "".join(f"\n## {name}\n\n```text\n{text}\n```\n" for name, text in sections())


if __name__ == "__main__":
    FILE.write_text(reference(), encoding="utf-8")

"""The command line: parses, then hands over to one module a command. Nothing heavy is imported to show help."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from auvsum import __version__
from auvsum.cli import calibrate, config, doctor, inspect, models, policies, runs, summarize
from auvsum.cli import eval as evaluation
from auvsum.cli.guard import INTERRUPTED
from auvsum.ui.console import Console

HELP = """Summarize long documents offline, with a KV cache inside a fixed budget.

\b
Examples:
  auvsum summarize report.txt                     one file, summary on stdout
  auvsum summarize report.txt --budget 4%         hold 4% of the full KV cache
  cat notes.md | auvsum summarize -               a pipe
  auvsum summarize a.txt --format json | jq .kv   what it cost
  auvsum inspect report.txt --policies auv,h2o    what each policy kept
  auvsum policies                                 eviction policies and their options
  auvsum models list                              models, and which are here
  auvsum doctor                                   is everything in order?

\b
Exit codes: 0 all fine, 1 a document failed, 2 usage or configuration,
3 model or device not available, 130 interrupted.
"""

app = typer.Typer(
    help=HELP,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("summarize")(summarize.command)
app.command("inspect", short_help="Show which tokens each policy kept.")(inspect.command)
app.command("policies", short_help="List the eviction policies.")(policies.command)
app.add_typer(models.app, name="models")
app.command("doctor", short_help="Check that this installation works.")(doctor.command)
app.command("eval", short_help="Measure policies and budgets on documents with summaries.")(evaluation.command)
app.command("calibrate", short_help="Fit a model's profile for auv-look from documents.")(calibrate.command)
app.command("score", short_help="Score a run again, without generating.")(evaluation.score_command)
app.command("compare", short_help="One table of several runs.")(runs.compare)
app.command("plot", short_help="Plots of runs.")(runs.plot)
app.command("report", short_help="A page, or Markdown, of runs.")(runs.report)
app.add_typer(config.app, name="config")


@app.callback(invoke_without_command=True)
def root(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version.", is_eager=True)] = False,
) -> int:
    if version:
        Console().write(f"auvsum {__version__}\n")
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        if sys.stdin is not None and sys.stdin.isatty():
            Console().write(ctx.get_help() + "\n")
            raise typer.Exit
        Console().error("no command given", "try `auvsum summarize FILE`, or `auvsum --help`")
        raise typer.Exit(2)
    return 0


def run(arguments: Sequence[str]) -> int:
    """Runs one command line and returns its exit code; whatever goes wrong is one line on stderr."""
    try:
        # Typer would answer a closed pipe and Ctrl-C in its own way, were it standalone.
        code = app(args=list(arguments), prog_name="auvsum", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        # A usage error of Typer; its class has another home in each release.
        if not hasattr(error, "format_message"):
            raise
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "auvsum"
        Console().error(" ".join(error.format_message().split()), f"see `{command} --help`")
        code = int(getattr(error, "exit_code", 2))
    return int(code or 0)

"""`auvsum summarize`: files, folders and pipes in, summaries out."""

from __future__ import annotations

from typing import Annotated

import typer

from auvsum.cli import options
from auvsum.cli.guard import guarded
from auvsum.cli.preview import preview
from auvsum.cli.run import Choices, Reading, Run
from auvsum.config import Settings, load_settings
from auvsum.errors import UsageError
from auvsum.io.inputs import Input, Selection, Shard, expand, read_names
from auvsum.scale.placement import Placement
from auvsum.text.templates import load_template
from auvsum.ui.console import Console

_SETTING_FLAGS = (
    *("model", "policy", "budget", "budget_scope", "kv_bits", "strategy", "chunk", "max_tokens", "sentences", "words"),
    *("template", "instruction", "device", "dtype", "weights", "threads", "temperature", "top_p"),
    *("repetition_penalty", "seed", "truncate", "download"),
    *("query", "style", "cite", "window", "batch_size", "timeout"),
)


def command(
    ctx: typer.Context,
    files: Annotated[
        list[str] | None,
        typer.Argument(metavar="FILE", help="Text files, folders, patterns; - is standard input."),
    ] = None,
    sentences: options.Sentences = None,
    words: options.Words = None,
    instruction: options.Instruction = None,
    query: options.Query = None,
    style: options.Style = None,
    cite: options.Cite = None,
    pages: options.Pages = None,
    template: options.Template = None,
    max_tokens: options.MaxTokens = None,
    truncate: options.Truncate = None,
    encoding: options.Encoding = None,
    output: options.Output = None,
    output_dir: options.OutputDir = None,
    format: options.SummaryFormatOption = options.SummaryFormat.text,
    force: options.Force = False,
    files_from: options.FilesFrom = None,
    null: options.Null = False,
    include: options.Include = None,
    exclude: options.Exclude = None,
    hidden: options.Hidden = False,
    shard: options.Shard = None,
    timeout: options.Timeout = None,
    batch_size: options.BatchSize = None,
    budget: options.Budget = None,
    budget_scope: options.BudgetScope = None,
    policy: options.Policy = None,
    policy_option: options.PolicyOption = None,
    kv_bits: options.KvBits = None,
    strategy: options.Strategy = None,
    chunk: options.Chunk = None,
    window: options.Window = None,
    model: options.Model = None,
    download: options.Download = None,
    device: options.Device = None,
    devices: options.Devices = None,
    engine: options.Placed = options.Where.local,
    address: options.Address = None,
    workers: options.Workers = None,
    dtype: options.Dtype = None,
    weights: options.Weights = None,
    threads: options.Threads = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.Seed = None,
    score: options.Score = None,
    dry_run: options.DryRun = False,
    show_prompt: options.ShowPrompt = False,
    config: options.Config = None,
    panel: options.ShowPanel = None,
    color: options.ColorOption = options.Color.auto,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    debug: options.Debug = False,
) -> int:
    """Summarize text files. Summaries go to stdout, everything else to stderr.

    \b
    Examples:
      auvsum summarize report.txt
      auvsum summarize report.txt --budget 4% --sentences 3
      cat notes.md | auvsum summarize - --words 60
      auvsum summarize reports/ 'notes/**/*.md' -O summaries/
      auvsum summarize reports/ --format jsonl | jq .summary
      find . -name '*.txt' -print0 | auvsum summarize -0 --files-from - -O out/
      auvsum summarize report.txt --instruction "List the decisions."
      auvsum summarize reports/ --dry-run
      auvsum summarize reports/ -O summaries/ --devices all
    """
    console = Console(color.value, quiet, verbose, debug)

    def work() -> int:
        flags = {name: ctx.params[name] for name in _SETTING_FLAGS}
        flags["policy_options"] = options.policy_options(policy_option)
        settings, origins = load_settings(flags, config_path=config)
        load_template(settings.template)
        _say_origins(console, settings, origins)
        if output is not None and output_dir is not None:
            raise UsageError("-o and -O exclude each other", "-o is one file for all, -O a folder with one each")
        if null and files_from is None:
            raise UsageError("-0 says how --files-from is read", "name the list: --files-from - is standard input")
        selection = Selection(
            include=tuple(include or ()),
            exclude=tuple(exclude or ()),
            hidden=hidden,
            without=() if output_dir is None else (output_dir,),
        )
        reading = Reading(encoding, pages)
        inputs = _inputs(files or [], files_from, null, selection)
        if score is not None and len(inputs) != 1:
            raise UsageError(f"--score compares one document, not {len(inputs)}", "name a single file")
        part = None if shard is None else Shard.parse(shard)
        if dry_run or show_prompt:
            mine = [item for item in inputs if part is None or part.holds(item)]
            return preview(console, settings, mine, reading, format.value, show_prompt)
        placement = Placement(devices, engine.value, address, workers)
        choices = Choices(format.value, output, output_dir, force, reading, score, panel, part, placement)
        return Run(console, settings, choices).all(inputs)

    return guarded(console, work)


def _inputs(files: list[str], files_from: str | None, null: bool, selection: Selection) -> list[Input]:
    """The documents of the arguments, then those of the list.

    Raises:
        UsageError: none at all.
    """
    listed = [] if files_from is None else read_names(files_from, null)
    if not files and not listed:
        what = "no file given" if files_from is None else f"the list {files_from} names no file"
        raise UsageError(what, "try `auvsum summarize FILE`, or `auvsum summarize --help`")
    if "-" in files and files_from == "-":
        raise UsageError("standard input cannot be a document and a list", "write the list to a file")
    return [*expand(files, selection), *expand(listed, selection, listed=True)]


def _say_origins(console: Console, settings: Settings, origins: dict[str, str]) -> None:
    for name, origin in origins.items():
        if origin != "default":
            console.detail(f"{name} = {getattr(settings, name)!r} ({origin})")

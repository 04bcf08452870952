"""`auvsum calibrate`: fits what `auv-look` should know about a model, from documents."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from auvsum._env import prepare
from auvsum.cli import options
from auvsum.cli.guard import guarded
from auvsum.errors import DatasetError, DocumentError
from auvsum.ui.console import Console


def command(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Short name, folder, or hub id; the default model without it.")
    ] = None,
    data: Annotated[
        str,
        typer.Option(
            help="Data sets of `auvsum eval`, or .jsonl and .parquet files with a column `document`.", metavar="A,B"
        ),
    ] = "sample",
    data_dir: options.DataDir = None,
    half: Annotated[
        str,
        typer.Option(
            help="Rows with an even or an odd number: learn from one, report the other.", metavar="all|even|odd"
        ),
    ] = "all",
    limit: Annotated[int, typer.Option(help="Documents of each data set.", min=1, metavar="N")] = 24,
    max_document_tokens: Annotated[int, typer.Option(help="Longer documents are cut.", min=1, metavar="N")] = 4000,
    epochs: Annotated[int, typer.Option(help="How often each document is learned from.", min=1, metavar="N")] = 4,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Another file than the one that auv-look finds by itself.", metavar="FILE"),
    ] = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    download: options.Download = None,
    color: options.ColorOption = options.Color.auto,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> int:
    """Fit a profile: how much the tokens of each KV head are worth to auv-look. Its file's name goes to stdout.

    \b
    Two numbers a head are learned from the model's own summaries; a fifth of the documents is left out, and tells
    whether it helps. From then on, auv-look uses the profile for this model and its fine-tuned relatives.

    \b
    Examples:
      auvsum calibrate qwen2.5-0.5b-instruct --data reports.jsonl
      auvsum calibrate --data gao,beigebook --data-dir data/ --half even --limit 12 --out mine.json
    """
    console = Console(color.value, quiet, debug=debug)

    def work() -> int:
        prepare(bool(download))
        from auvsum.engine.models import load
        from auvsum.eval.config import EvalConfig, split_list
        from auvsum.eval.datasets import load_examples
        from auvsum.io.atomic import write_whole

        folder = options.data_folder(data_dir)
        sets = [
            (config, load_examples(name, data_dir=folder, download=bool(download)))
            for name in split_list(data)
            for config in [EvalConfig(dataset=name, half=half, limit=limit, max_document_tokens=max_document_tokens)]
        ]
        with console.status("loading the model"):
            loaded = load(
                model, device=device or "auto", dtype=dtype or "auto", threads=threads, download=bool(download)
            )
        from auvsum.cache.head_profiles import own_profiles
        from auvsum.eval.calibrate import Calibration
        from auvsum.eval.runner import Runner

        calibration = Calibration(loaded, console.note)
        lessons = []
        for config, examples in sets:
            runner = Runner(config, loaded, examples)
            for example in runner.examples:
                try:
                    prompt = runner.prompter.ask(example.document).prompt
                    lessons.append(calibration.lesson(prompt.ids, prompt.document, runner.prompter.max_new_tokens))
                except DocumentError as error:
                    console.note(f"{example.id} is left out: {error}")
            console.note(f"{config.dataset}: {len(lessons)} documents read")
        if len(lessons) < 3:
            raise DatasetError(f"{len(lessons)} documents are too few to learn from", "give at least three with --data")
        found = calibration.run(lessons, epochs)
        console.note(
            f"{found.left_out} of {found.documents} documents were left out; at 4% of the bytes they lose "
            f"{found.after:.3f} nats a token with the profile, {found.before:.3f} without"
        )
        if out is None and found.after >= found.before:
            console.error(
                "the profile does not help on documents it has not seen, and was not kept",
                "give more documents, or --out FILE to keep it anyway",
            )
            return 1
        place = out or own_profiles() / f"{Path(loaded.name).name}.json"
        place.parent.mkdir(parents=True, exist_ok=True)
        write_whole(place, found.profile.to_json().encode())
        console.write(f"{place}\n")
        return 0

    return guarded(console, work)

"""`auvsum eval` and `auvsum score`: a matrix of policies and budgets, measured; a run, scored again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from auvsum._env import prepare
from auvsum.cli import options
from auvsum.cli.guard import guarded
from auvsum.errors import ConfigError, UsageError
from auvsum.eval.config import EvalConfig, split_list
from auvsum.ui.console import Console

if TYPE_CHECKING:
    from auvsum.eval.encoder import Encoder
    from auvsum.eval.runs import Run

_LISTS = ("policies", "budgets", "budget_scopes", "metrics")


def _option(help_: str, *names: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=help_, metavar=metavar, show_default=False)


EncoderFlag = Annotated[str | None, _option("BERTScore's encoder: short name, folder, cached hub id.", "--encoder")]
EncoderLayer = Annotated[int | None, _option("Its layer, where that is not known.", "--encoder-layer", metavar="N")]
Rescale = Annotated[bool | None, _option("Rescale BERTScore with the encoder's baseline.", "--rescale/--no-rescale")]
Out = Annotated[Path | None, _option("Where the run is kept; default runs/DATASET-...", metavar="DIR")]
Scopes = Annotated[str | None, _option("bytes, paper, or both.", "--budget-scope", metavar="bytes,paper")]
Column = Annotated[
    list[str] | None, _option("The file's name of document, summary or id.", "--column", metavar="OURS=THEIRS")
]
Recipe = Annotated[Path | None, _option("Settings of runs in YAML: configs/paper/fig5.yaml.", metavar="FILE")]


def command(
    ctx: typer.Context,
    dataset: Annotated[
        str | None,
        _option(
            "sample, xsum, cnn_dailymail, newsroom, govreport, gao, beigebook, qmsum; a .jsonl or .parquet file; "
            "or the name of a file in --data-dir.",
            metavar="NAME|FILE",
        ),
    ] = None,
    out: Out = None,
    resume: Annotated[bool, _option("Go on with a run that was killed.", "--resume")] = False,
    model: options.Model = None,
    policies: Annotated[str | None, _option("h2o,auv or auv(decay=0.9).", metavar="A,B")] = None,
    budgets: Annotated[str | None, _option("2%,10% or slots or sizes.", metavar="A,B")] = None,
    budget_scopes: Scopes = None,
    kv_bits: Annotated[str | None, _option("Bits of a stored key or value.", metavar="16,8,4")] = None,
    shots: Annotated[int | None, _option("0, or 5 as in the paper.", metavar="0|5")] = None,
    condition: Annotated[
        str | None, _option("The order of a document's paragraphs.", metavar="plain|shuffled|key-last")
    ] = None,
    half: Annotated[
        str | None,
        _option("Rows with an even or an odd number: tune on one, report the other.", metavar="all|even|odd"),
    ] = None,
    limit: Annotated[int | None, _option("Measure only so many documents.", metavar="N")] = None,
    seed: Annotated[int | None, _option("Draws the documents, the examples and the shuffling.", metavar="N")] = None,
    max_document_tokens: Annotated[int | None, _option("Cut longer documents, and label them.", metavar="N")] = None,
    max_tokens: options.MaxTokens = None,
    metrics: Annotated[str | None, _option("Which of fidelity,rouge,bertscore.", metavar="A,B")] = None,
    encoder: EncoderFlag = None,
    encoder_layer: EncoderLayer = None,
    rescale: Rescale = None,
    column: Column = None,
    data_dir: options.DataDir = None,
    download: Annotated[
        bool, _option("Allow model, encoder and dataset to be downloaded.", "--download/--no-download")
    ] = False,
    recipe: Recipe = None,
    only: Annotated[str | None, _option("Names of the recipe's runs to measure.", metavar="A,B")] = None,
    batch_size: Annotated[
        int | None, _option("Documents written together; default 1, on a GPU what its memory holds.", metavar="N")
    ] = None,
    write_only: Annotated[
        bool, _option("Write and stop; `auvsum score` scores later, here or elsewhere.", "--write-only")
    ] = False,
    jobs: Annotated[
        int, typer.Option(help="Processes that measure documents side by side, a model each.", min=1, metavar="N")
    ] = 1,
    device: options.Device = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    color: options.ColorOption = options.Color.auto,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> int:
    """Measure policies and budgets on documents with known summaries. The table goes to stdout.

    \b
    Every table has rows that are not ours: the full cache, the first words of the document, LexRank, and the prompt
    truncated to the same bytes. Fidelity is measured against the full cache's own summary, token by token.

    \b
    Examples:
      auvsum eval
      auvsum eval --dataset sample --policies h2o,auv --budgets 4%,10%
      auvsum eval --dataset xsum --shots 5 --budgets 2%,4%,10% --download
      auvsum eval --dataset mine.jsonl --column document=article --metrics fidelity
      auvsum eval --dataset cnn_dailymail --data-dir data/ --condition key-last --out runs/cnn --resume
      auvsum eval --recipe configs/paper/fig5.yaml --data-dir data/
    """
    console = Console(color.value, quiet, debug=debug)

    def work() -> int:
        flags = {name: ctx.params[name] for name in vars(EvalConfig()) if ctx.params.get(name) is not None}
        flags |= {name: split_list(flags[name]) for name in _LISTS if name in flags}
        if kv_bits is not None:
            flags["kv_bits"] = _numbers(kv_bits)
        if column:
            flags["columns"] = dict(_mapping(text) for text in column)
        prepare(download)
        from auvsum.eval.recipes import configurations
        from auvsum.eval.runs import Run

        folder = options.data_folder(data_dir)
        machine = _Machine(folder, download, device or "auto", threads, batch_size, jobs, write_only)
        codes = []
        for name, config in configurations(recipe, flags, split_list(only or "")):
            where = (out / name if name else out) if out else Path("runs") / (name or _default_name(config))
            codes.append(_evaluate(console, config, Run(where), resume or bool(name), machine))
        return max(codes)

    return guarded(console, work)


def score_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    encoder: EncoderFlag = None,
    encoder_layer: EncoderLayer = None,
    rescale: Rescale = None,
    jobs: Annotated[int, typer.Option(help="Processes for ROUGE.", min=1, metavar="N")] = 1,
    device: options.Device = None,
    color: options.ColorOption = options.Color.auto,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> int:
    """Score a run again, without generating anything: with another encoder, say.

    \b
    Examples:
      auvsum score runs/xsum
      auvsum score runs/xsum --encoder microsoft/deberta-xlarge-mnli --rescale
    """
    console = Console(color.value, quiet, debug=debug)

    def work() -> int:
        from auvsum.eval.runs import Run

        kept = Run(run)
        config = kept.config
        changed = {"encoder": encoder, "encoder_layer": encoder_layer, "rescale": rescale}
        if encoder is not None and encoder_layer is None:
            config = EvalConfig.from_mapping({**vars(config), "encoder_layer": None})
        config = EvalConfig.from_mapping({**vars(config), **{k: v for k, v in changed.items() if v is not None}})
        _score(console, kept, _encoder(config, device or "auto", False), jobs)
        return 0

    return guarded(console, work)


@dataclass(frozen=True)
class _Machine:
    """Where and how fast, but not what, is measured."""

    data_dir: Path | None
    download: bool
    device: str
    threads: int | None
    batch_size: int | None
    jobs: int
    write_only: bool


def _evaluate(console: Console, config: EvalConfig, run: Run, resume: bool, machine: _Machine) -> int:
    """Checks everything that can be checked first, then loads the model, runs and scores."""
    from auvsum.eval.cells import cells
    from auvsum.eval.datasets import load_examples
    from auvsum.eval.texts import needs_sumy

    cells(config)
    needs_sumy()
    download = machine.download
    examples = load_examples(config.dataset, columns=config.columns, data_dir=machine.data_dir, download=download)
    encoder = None if machine.write_only else _encoder(config, machine.device, download)
    run.begin(config, resume=resume)
    from auvsum.engine.models import load
    from auvsum.eval.runner import Runner

    with console.status(f"loading {config.model}"):
        loaded = load(
            config.model, device=machine.device, dtype=config.dtype, threads=machine.threads, download=download
        )
    runner = Runner(config, loaded, examples, batch_size=machine.batch_size, progress=console.note)
    console.note(f"{len(runner.examples)} documents, {len(runner.cells)} rows, {runner.prompter.setting} -> {run.path}")
    runner.into(run, machine.jobs)
    if machine.write_only:
        console.note(f"kept in {run.path}; type: auvsum score {run.path}")
        return int(any(sample["error"] for sample in run.samples()))
    metrics = _score(console, run, encoder, machine.jobs)
    return 1 if metrics["failed"] else 0


def _score(console: Console, run: Run, encoder: Encoder | None, jobs: int) -> dict[str, Any]:
    from auvsum.eval.score import score
    from auvsum.eval.tables import render

    with console.status("scoring"):
        metrics = score(run, encoder=encoder, jobs=jobs, progress=console.note)
    console.write(render([run], "text"))
    console.note(f"kept in {run.path}; auvsum report {run.path} --html makes a page of it")
    return metrics


def _encoder(config: EvalConfig, device: str, download: bool) -> Encoder | None:
    if "bertscore" not in config.metrics:
        return None
    from auvsum.engine.hardware import choose_device
    from auvsum.eval.encoder import Encoder

    return Encoder(
        config.encoder,
        layer=config.encoder_layer,
        rescale=config.rescale,
        device=str(choose_device(device)),
        download=download,
    )


def _default_name(config: EvalConfig) -> str:
    parts = [Path(config.dataset).stem, Path(config.model).name, f"{config.shots}-shot"]
    return "-".join(parts + ([config.condition] if config.condition != "plain" else []))


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in split_list(text))
    except ValueError as error:
        raise UsageError(f"{text!r} is not a list of numbers", "for example --kv-bits 16,4") from error


def _mapping(text: str) -> tuple[str, str]:
    ours, equals, theirs = text.partition("=")
    if not (ours.strip() and equals and theirs.strip()):
        raise ConfigError(f"column {text!r} is not OURS=THEIRS", "for example --column document=article")
    return ours.strip(), theirs.strip()

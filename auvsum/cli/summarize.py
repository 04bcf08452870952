"""`auvsum summarize FILE|-`: files in, summaries out; one document that fails does not stop the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from auvsum.budget import size
from auvsum.cli import options
from auvsum.cli.guard import InternalError, guarded, report
from auvsum.config import Settings, load_settings
from auvsum.errors import AuvsumError, ModelError
from auvsum.events import Event, PrefillProgress
from auvsum.text.readers import Document, document_id, read_document
from auvsum.text.templates import load_template
from auvsum.ui.console import Console, OutputError

if TYPE_CHECKING:
    from auvsum.summarize import Plan, Summarizer

_SETTING_FLAGS = (
    *("model", "policy", "budget", "budget_scope", "kv_bits", "strategy", "chunk", "max_tokens", "sentences", "words"),
    *("template", "instruction", "device", "dtype", "threads", "temperature", "top_p"),
    *("repetition_penalty", "seed", "truncate", "download"),
)


def command(
    ctx: typer.Context,
    files: Annotated[list[str], typer.Argument(metavar="FILE", help="Text files; - is standard input.")],
    sentences: options.Sentences = None,
    words: options.Words = None,
    instruction: options.Instruction = None,
    template: options.Template = None,
    max_tokens: options.MaxTokens = None,
    truncate: options.Truncate = None,
    encoding: options.Encoding = None,
    budget: options.Budget = None,
    budget_scope: options.BudgetScope = None,
    policy: options.Policy = None,
    policy_option: options.PolicyOption = None,
    kv_bits: options.KvBits = None,
    strategy: options.Strategy = None,
    chunk: options.Chunk = None,
    model: options.Model = None,
    download: options.Download = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.Seed = None,
    format: options.FormatOption = options.Format.text,
    dry_run: options.DryRun = False,
    config: options.Config = None,
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
      auvsum summarize a.txt b.txt --format json
      auvsum summarize report.txt --instruction "List the decisions."
      auvsum summarize report.txt --dry-run
    """
    console = Console(color.value, quiet, verbose, debug)

    def work() -> int:
        flags = {name: ctx.params[name] for name in _SETTING_FLAGS}
        flags["policy_options"] = options.policy_options(policy_option)
        settings, origins = load_settings(flags, config_path=config)
        load_template(settings.template)
        for name, origin in origins.items():
            if origin != "default":
                console.detail(f"{name} = {getattr(settings, name)!r} ({origin})")
        return _Run(console, settings, format is options.Format.json, dry_run).all(files, encoding)

    return guarded(console, work)


class _Run:
    """The documents of one command line, one after the other, with one model."""

    def __init__(self, console: Console, settings: Settings, as_json: bool, dry_run: bool) -> None:
        self._console = console
        self._settings = settings
        self._json = as_json
        self._dry_run = dry_run
        self._model: Summarizer | None = None
        self._written = False

    def all(self, files: list[str], encoding: str | None) -> int:
        """Every document in order.

        Returns:
            0, or the exit code of the only document, or 1 if any of several failed.

        Raises:
            ModelError, OutputError: there is no going on without a model or an output.
        """
        codes = []
        for file in files:
            try:
                document = read_document(file, encoding=encoding)
                for warning in document.warnings:
                    self._console.warn(warning)
                if self._dry_run:
                    self._plan(document)
                else:
                    self._summarize(document, titled=len(files) > 1)
                codes.append(0)
            except (ModelError, OutputError):
                raise
            except AuvsumError as error:
                self._failed(file, error)
                codes.append(error.exit_code)
            except Exception as error:
                self._failed(file, InternalError(error))
                codes.append(InternalError.exit_code)
        return codes[0] if len(codes) == 1 else int(any(codes))

    def _plan(self, document: Document) -> None:
        plan = self._summarizer().plan(document.text)
        if self._json:
            self._console.write(_json(_plan_record(document, plan)))
            return
        self._console.write(f"{document.id}: {_plan_line(plan)}\n")
        self._console.write(f"  budget: {plan.budget.echo()}\n")
        for warning in plan.warnings:
            self._console.warn(f"{document.id}: {warning}")

    def _summarize(self, document: Document, titled: bool) -> None:
        model = self._summarizer()
        plan = model.plan(document.text)
        self._console.detail(f"{document.id}: {_plan_line(plan)}")
        self._console.note(f"budget: {plan.budget.echo()}")
        title = f"==> {document.id} <==\n" if titled and not self._json else ""
        if title and self._written:
            title = f"\n{title}"
        out = _Output(self._console, document.id, title, self._console.stdout_is_terminal and not self._json)
        try:
            summary = model.summarize(
                document.text, id=document.id, source=document.source, on_event=out.event, on_text=out.text
            )
        finally:
            out.close()
        record = summary.record()
        if self._json:
            record["warnings"] = [*document.warnings, *record["warnings"]]
            self._console.write(_json(record))
        elif not out.live:
            self._console.write(f"{title}{summary.text.strip()}\n")
        self._written = True
        for warning in summary.warnings:
            self._console.warn(f"{document.id}: {warning}")
        self._console.note(cost_line(record))

    def _summarizer(self) -> Summarizer:
        """The model, loaded when the first readable document asks for it."""
        if self._model is None:
            with self._console.status(f"loading {self._settings.model}"):
                _prepare(self._settings.download)
                from auvsum.summarize import Summarizer

                self._model = Summarizer.from_settings(self._settings)
            loaded = self._model.loaded
            self._console.note(f"{loaded.name}: loaded in {loaded.load_seconds:.1f} s")
        return self._model

    def _failed(self, file: str, error: AuvsumError) -> None:
        name = document_id(file)
        report(self._console, error, "" if name in error.message else name)
        if self._json:
            _prepare(self._settings.download)
            from auvsum.summarize import Summarizer

            source = file if file == "-" else str(Path(file).absolute())
            record = Summarizer.failed_record(error, name, source, self._settings)
            self._console.write(_json(record))


class _Output:
    """What one document shows while it is worked on: a bar while it is read, then its text as it comes."""

    def __init__(self, console: Console, label: str, title: str, live: bool) -> None:
        self.live = live
        self._title = title
        self._console = console
        self._bar = console.progress(label)
        self._started = False

    def event(self, event: Event) -> None:
        if isinstance(event, PrefillProgress):
            self._bar.update(event.done_tokens, event.total_tokens)
        else:
            self._bar.stop()

    def text(self, piece: str) -> None:
        if not self.live:
            return
        self._bar.stop()
        if not self._started:
            piece = piece.lstrip()
            if not piece:
                return
            self._started = True
            piece = self._title + piece
        self._console.write(piece)

    def close(self) -> None:
        self._bar.stop()
        if self._started:
            self._console.write("\n")


def cost_line(record: dict[str, Any]) -> str:
    """What a summary cost, from its record: `report.txt: 5,214 tokens read in 3.1 s · ...`."""
    tokens, time, kv = record["tokens"], record["time"], record["kv"]
    return (
        f"{record['id']}: {tokens['prompt']:,} tokens read in {time['prefill_s']:.1f} s"
        f" · {tokens['generated']:,} tokens written at {time['decode_tokens_per_s'] or 0:.1f} tok/s"
        f" · KV {size(kv['peak_bytes'])} held (full cache {size(kv['full_bytes'])})"
    )


def _plan_line(plan: Plan) -> str:
    tokens = f"{plan.prompt_tokens:,} tokens ({plan.document_tokens:,} of the document)"
    return f"{tokens} · policy {plan.policy.name} · strategy {plan.strategy}"


def _plan_record(document: Document, plan: Plan) -> dict[str, Any]:
    budget = plan.budget
    return {
        "id": document.id,
        "source": document.source,
        "tokens": {"document": plan.document_tokens, "prompt": plan.prompt_tokens},
        "strategy": plan.strategy,
        "policy": plan.policy.name,
        "budget": {"asked": budget.asked, "slots": budget.slots, "bytes": budget.bytes},
        "warnings": [*document.warnings, *plan.warnings],
    }


def _json(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, indent=2) + "\n"


def _prepare(download: bool) -> None:
    """Quiet and offline, before anything of Hugging Face is imported."""
    from auvsum._env import prepare

    prepare(download=download)

"""A run over documents: read, skip what is finished, summarize, write, and say so. One that fails stops no other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from auvsum._env import prepare
from auvsum.batch import Failure, failure
from auvsum.budget import size
from auvsum.cli.guard import report
from auvsum.cli.signals import Interruptible
from auvsum.config import Settings
from auvsum.events import DocumentStarted, Event, Notice
from auvsum.io.inputs import Input
from auvsum.io.manifest import settings_key
from auvsum.io.render import sources
from auvsum.io.sinks import FileSink, FolderSink, Sink, StreamSink
from auvsum.text.readers import Document, read_document
from auvsum.ui.console import Console
from auvsum.ui.views import Lines, Stream, View

if TYPE_CHECKING:
    from auvsum.summarize import Summarizer, Summary


@dataclass(frozen=True)
class Reading:
    """How files are read: their encoding, and of a PDF only these pages."""

    encoding: str | None = None
    pages: str | None = None


@dataclass(frozen=True)
class Choices:
    """What the flags say beside the settings."""

    format: str
    output: Path | None = None
    output_dir: Path | None = None
    force: bool = False
    reading: Reading = Reading()
    score: Path | None = None
    panel: bool | None = None


class Run:
    """The documents of one command line, with one model, which is loaded when the first document asks for it."""

    def __init__(self, console: Console, settings: Settings, choices: Choices) -> None:
        self._console = console
        self._settings = settings
        self._choices = choices
        self._view: View = Lines()
        self._interruptible = Interruptible()
        self._total = 0
        self._done = self._skipped = 0
        self._codes: list[int] = []

    def all(self, inputs: list[Input]) -> int:
        """Every document.

        Returns:
            0, or the exit code of the only document, or 1 if any of several failed.

        Raises:
            ModelError, OutputError: there is no going on without a model or an output.
        """
        self._total = len(inputs)
        reference = _reference(self._choices)
        with ExitStack() as stack:
            stack.callback(self._say_outcome)
            stack.enter_context(self._interruptible.active())
            sink = stack.enter_context(self._sink())
            stack.callback(self._close_view)
            for result in self._results(inputs, sink):
                self._take(result, sink, reference)
        return self._codes[0] if len(inputs) == 1 and self._codes else int(any(self._codes))

    def _results(self, inputs: list[Input], sink: Sink) -> Iterator[Summary | Failure]:
        """Summaries and failures, as the sink wants them; without a document to read no model is loaded."""
        documents = self._documents(inputs, sink)
        for document in documents:
            if isinstance(document, Failure):
                yield document
                continue
            summarizer = self._load(sink)
            rest = chain([document], documents)
            ordered = not isinstance(sink, FolderSink)
            together = self._total > 1 and not isinstance(self._view, Stream)
            yield from summarizer.run(rest, ordered=ordered, together=together, on_event=self._hear)

    def _documents(self, inputs: list[Input], sink: Sink) -> Iterator[Document | Failure]:
        """The documents that the sink wants, read one at a time."""
        for item in inputs:
            if not sink.wants(item):
                self._skipped += 1
                self._view.skipped()
                continue
            try:
                how = self._choices.reading
                yield read_document(item.path, encoding=how.encoding, pages=how.pages, name=item.place)
            except Exception as error:
                yield failure(error, item.place, item.source, self._settings)

    def _take(self, result: Summary | Failure, sink: Sink, reference: str | None) -> None:
        """Writes a result and says what it cost, or why there is none."""
        failed = isinstance(result, Failure)
        record = result.record()
        if reference is not None and not isinstance(result, Failure):
            from auvsum.score import score

            record["score"] = score(result.text, reference)
        if not isinstance(self._view, Stream) or failed:
            with self._interruptible.shielded():
                sink.write(record)
        elif record.get("citations"):
            self._console.write(sources(record["citations"]))
        if isinstance(result, Failure):
            report(self._console, result.error, "" if result.id in result.error.message else result.id)
            self._codes.append(result.error.exit_code)
            return
        self._codes.append(0)
        self._done += 1
        for warning in result.warnings:
            self._console.warn(warning if warning.startswith(result.id) else f"{result.id}: {warning}")
        self._console.note(cost_line(record))
        if "score" in record:
            self._console.note(score_line(record))

    def _hear(self, event: Event) -> None:
        if isinstance(event, DocumentStarted):
            tokens = f"{event.prompt_tokens:,} tokens ({event.document_tokens:,} of the document)"
            self._console.detail(f"{event.name}: {tokens} · policy {event.policy} · strategy {event.strategy}")
            if self._total == 1:
                self._console.note(f"budget: {event.budget.echo()}")
        if isinstance(event, Notice):
            self._console.detail(event.text)
            return
        self._view.hear(event)

    def _load(self, sink: Sink) -> Summarizer:
        """The model; then the view, which needs the terminal for itself."""
        summarizer = load_summarizer(self._console, self._settings)
        self._view = self._make_view(sink)
        return summarizer

    def _make_view(self, sink: Sink) -> View:
        console, choices = self._console, self._choices
        text_on_terminal = isinstance(sink, StreamSink) and console.stdout_is_terminal
        wanted = console.stderr_is_terminal and not text_on_terminal and not console.quiet
        if choices.panel or (choices.panel is None and wanted):
            from auvsum.ui.panel import Panel

            panel = Panel(console.rich(), self._total)
            panel.state.skipped = self._skipped
            panel.state.failed = len(self._codes)
            console.panel = panel
            return panel
        if text_on_terminal and choices.format == "text" and isinstance(sink, StreamSink) and self._one_at_a_time:
            return Stream(console, sink.title)
        return Lines()

    @property
    def _one_at_a_time(self) -> bool:
        return self._total == 1 or self._settings.batch_size in ("1", "auto")

    def _close_view(self) -> None:
        self._console.panel = None
        self._view.close()

    def _sink(self) -> Sink:
        choices, titled = self._choices, self._total > 1
        if choices.output_dir is not None:
            settings = settings_key(
                self._settings, format=choices.format, encoding=choices.reading.encoding, pages=choices.reading.pages
            )
            return FolderSink(choices.output_dir, choices.format, settings, choices.force)
        if choices.output is not None:
            return FileSink(choices.output, choices.format, titled)
        return StreamSink(self._console, choices.format, titled)

    def _say_outcome(self) -> None:
        if not self._skipped and (self._total == 1 or not self._codes):
            return
        failed = sum(code != 0 for code in self._codes)
        parts = [f"{self._done} done", f"{failed} failed"]
        if self._skipped:
            parts.append(f"{self._skipped} skipped (finished before; --force does them again)")
        left = self._total - self._done - failed - self._skipped
        if left:
            parts.append(f"{left} left")
        self._console.note(", ".join(parts))


def load_summarizer(console: Console, settings: Settings) -> Summarizer:
    """The model that the settings name, quietly and offline."""
    with console.status(f"loading {settings.model}"):
        prepare(download=settings.download)
        from auvsum.summarize import Summarizer

        summarizer = Summarizer.from_settings(settings)
    console.note(f"{summarizer.loaded.name}: loaded in {summarizer.loaded.load_seconds:.1f} s")
    return summarizer


def cost_line(record: dict[str, Any]) -> str:
    """What a summary cost, from its record: `report.txt: 5,214 tokens read in 3.1 s · ...`."""
    tokens, time, kv = record["tokens"], record["time"], record["kv"]
    return (
        f"{record['id']}: {tokens['prompt']:,} tokens read in {time['prefill_s']:.1f} s"
        f" · {tokens['generated']:,} tokens written at {time['decode_tokens_per_s'] or 0:.1f} tok/s"
        f" · KV {size(kv['peak_bytes'])} held (full cache {size(kv['full_bytes'])})"
    )


def score_line(record: dict[str, Any]) -> str:
    """The scores of a summary against its reference, in percent, and what BERTScore's depends on."""
    found = dict(record["score"])
    encoder = found.pop("encoder")
    if found["bertscore"] is None:
        del found["bertscore"]
        encoder = f"no BERTScore: type auvsum models pull {encoder}"
    scores = " · ".join(f"{name} {value}" for name, value in found.items())
    return f"{record['id']}: {scores} ({encoder})"


def _reference(choices: Choices) -> str | None:
    """The text of `--score`, read before a model is loaded for nothing."""
    return None if choices.score is None else read_document(choices.score).text


__all__ = ["Choices", "Reading", "Run", "cost_line", "load_summarizer"]

"""`--dry-run` and `--show-prompt`: what would be read and held, without writing a summary."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from auvsum.budget import size
from auvsum.cli.guard import report
from auvsum.cli.run import Reading, load_summarizer
from auvsum.config import Settings
from auvsum.errors import AuvsumError, InternalError, ModelError, OutputError
from auvsum.io.inputs import Input
from auvsum.text.readers import Document, read_document
from auvsum.ui.console import Console

if TYPE_CHECKING:
    from auvsum.estimate import Rates
    from auvsum.summarize import Plan, Summarizer


def preview(
    console: Console, settings: Settings, inputs: list[Input], reading: Reading, format: str, show_prompt: bool
) -> int:
    """Plans every document and shows the plans, or the prompts.

    Returns:
        The exit code that a run would start with.
    """
    return _Preview(console, settings, format, show_prompt).all(inputs, reading)


class _Preview:
    def __init__(self, console: Console, settings: Settings, format: str, show_prompt: bool) -> None:
        self._console = console
        self._settings = settings
        self._format = format
        self._show_prompt = show_prompt
        self._summarizer: Summarizer | None = None
        self._rates: Rates | None = None
        self._tokens = 0
        self._largest: Plan | None = None
        self._seconds = 0.0

    def all(self, inputs: list[Input], reading: Reading) -> int:
        codes = []
        for item in inputs:
            try:
                document = read_document(item.path, encoding=reading.encoding, pages=reading.pages, name=item.place)
                self._one(document)
                codes.append(0)
            except (ModelError, OutputError):
                raise
            except Exception as error:
                problem = error if isinstance(error, AuvsumError) else InternalError(error)
                report(self._console, problem, "" if item.place in problem.message else item.place)
                codes.append(problem.exit_code)
        if len(inputs) > 1 and not self._show_prompt and self._format in ("text", "md"):
            self._total(codes.count(0))
        return codes[0] if len(codes) == 1 else int(any(codes))

    def _one(self, document: Document) -> None:
        if self._summarizer is None:
            self._summarizer = load_summarizer(self._console, self._settings)
        plan = self._summarizer.plan(document.text)
        if self._show_prompt:
            self._console.write(f"{self._summarizer.prompt_text(plan)}\n")
            return
        if self._rates is None:
            with self._console.status("measuring"):
                self._rates = self._summarizer.measure()
        seconds = self._rates.seconds(plan.prompt_tokens, plan.max_new_tokens)
        self._tokens += plan.prompt_tokens
        self._seconds += seconds
        if self._largest is None or plan.budget.bytes > self._largest.budget.bytes:
            self._largest = plan
        record = _plan_record(document, plan, seconds)
        if self._format in ("json", "jsonl"):
            indent = 2 if self._format == "json" else None
            self._console.write(json.dumps(record, ensure_ascii=False, indent=indent) + "\n")
        else:
            self._console.write(f"{document.id}: {_plan_line(plan)}\n")
            self._console.write(f"  budget: {plan.budget.echo()}\n")
            self._console.write(f"  time: about {seconds:.1f} s, an estimate from a short trial\n")
        for warning in (*document.warnings, *plan.warnings):
            self._console.warn(warning if warning.startswith(document.id) else f"{document.id}: {warning}")

    def _total(self, documents: int) -> None:
        together = held = 0
        if self._summarizer is not None and self._largest is not None:
            together = self._summarizer.together(self._largest, documents)
            held = self._largest.budget.bytes * together
        self._console.write(
            f"{documents:,} documents, {together} together: {self._tokens:,} tokens, at most {size(held)} of KV cache, "
            f"about {self._seconds:.0f} s by that estimate\n"
        )


def _plan_line(plan: Plan) -> str:
    tokens = f"{plan.prompt_tokens:,} tokens ({plan.document_tokens:,} of the document)"
    return f"{tokens} · policy {plan.policy.name} · strategy {plan.strategy}"


def _plan_record(document: Document, plan: Plan, seconds: float) -> dict[str, Any]:
    budget = plan.budget
    return {
        "id": document.id,
        "source": document.source,
        "tokens": {"document": plan.document_tokens, "prompt": plan.prompt_tokens, "new_at_most": plan.max_new_tokens},
        "strategy": plan.strategy,
        "policy": plan.policy.name,
        "budget": {
            "asked": budget.asked,
            "slots": budget.slots,
            "bytes": budget.bytes,
            "full_bytes": budget.full_bytes,
        },
        "estimate": {"seconds": round(seconds, 1), "from": "a short trial"},
        "warnings": [*document.warnings, *plan.warnings],
    }

"""Stands for `auvsum.summarize` in tests of the command line alone: no torch, and a document says what is to happen.

`FAIL` the document fails · `SMALL` its budget is too small · `CRASH` a defect · `WAIT` takes for ever ·
`SLOW` half a second · `DEAF` hears no Ctrl-C · `ESCAPE` the model writes escape sequences.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

from auvsum import batch
from auvsum.budget import ResolvedBudget
from auvsum.config import Settings
from auvsum.errors import BudgetError, GenerationFailed, ModelNotFound
from auvsum.estimate import Rates
from auvsum.events import DocumentStarted, Event, Finished, Prefilled, PrefillProgress, Token

PIECES = (" The", " council", " met — and", " decided\n", "to [bold]build[/bold].", " ")


class Summarizer:
    def __init__(self, settings: Settings) -> None:
        self.loaded = SimpleNamespace(name=settings.model, load_seconds=1.25)
        self.settings = settings

    @classmethod
    def from_settings(cls, settings: Settings) -> Summarizer:
        if settings.model == "nowhere":
            raise ModelNotFound("no model is called 'nowhere'", "auvsum models list shows the names")
        return cls(settings)

    def plan(self, text: str) -> SimpleNamespace:
        if "SMALL" in text:
            raise BudgetError("budget 2 gives 2 slots per layer", "the least that works here is 5 (slots)")
        budget = ResolvedBudget(self.settings.budget, "bytes", 209, 2**21, 2**26, 5214, False, 30)
        return SimpleNamespace(
            prompt_tokens=5214,
            max_new_tokens=30,
            document_tokens=5160,
            strategy="stream",
            policy=SimpleNamespace(name="auv"),
            budget=budget,
            warnings=("tiny",),
        )

    def measure(self) -> Rates:
        return Rates(1000.0, 10.0)

    def prompt_text(self, plan: SimpleNamespace) -> str:
        return "<|user|>the document<|assistant|>"

    def together(self, plan: SimpleNamespace, documents: int) -> int:
        return 1

    def run(
        self, documents: Iterable[Any], *, ordered: bool, together: bool, on_event: Callable[[Event], None]
    ) -> Iterator[Any]:
        return batch.run(self, documents, ordered=ordered, on_event=on_event)  # type: ignore[arg-type]

    def summarize(
        self,
        text: str,
        *,
        id: str,
        source: str,
        pages: Any = (),
        on_event: Callable[[Event], None],
        on_text: Callable[[str], None],
    ) -> SimpleNamespace:
        plan = self.plan(text)
        on_event(DocumentStarted(0, id, plan.document_tokens, plan.prompt_tokens, "auv", plan.strategy, plan.budget))
        for done in range(512, 5214, 512):
            on_event(PrefillProgress(0, done, 5214))
        if "WAIT" in text:
            sys.stderr.write("waiting\n")
            sys.stderr.flush()
            time.sleep(60)
        while "DEAF" in text:
            try:
                sys.stderr.write("waiting\n")
                sys.stderr.flush()
                # In short naps: a signal that comes just before a nap is heard at its end.
                for _ in range(600):
                    time.sleep(0.1)
            except KeyboardInterrupt:
                sys.stderr.write("what?\n")
                sys.stderr.flush()
        if "SLOW" in text:
            time.sleep(0.5)
        on_event(Prefilled(0, 5214, 3.1, 2**21, 2**21))
        if "FAIL" in text:
            raise GenerationFailed("nothing was written", "try a larger --budget")
        if "CRASH" in text:
            raise ZeroDivisionError("division by zero")
        pieces = (" \x1b[31mred\x1b[0m\x07", "\x9b2J") if "ESCAPE" in text else PIECES
        for piece in pieces:
            on_event(Token(0, 1))
            on_text(piece)
        on_event(Finished(0, (1,) * len(pieces), "eos", 1.0, 2**21))
        summary = "".join(pieces).strip()
        record = {
            "id": id,
            "source": source,
            "summary": summary,
            "error": None,
            "tokens": {"document": 5160, "prompt": 5214, "generated": 96},
            "kv": {"peak_bytes": 2_200_000, "prefill_peak_bytes": 2_200_000, "full_bytes": 120_000_000},
            "warnings": ["it repeats itself"],
            "time": {"load_s": 1.25, "prefill_s": 3.1, "decode_s": 2.3, "decode_tokens_per_s": 41.5},
        }
        warnings = record["warnings"]
        return SimpleNamespace(id=id, source=source, text=summary, warnings=warnings, record=lambda: record)


if __name__ == "__main__":
    sys.modules["auvsum.summarize"] = sys.modules["__main__"]
    from auvsum.__main__ import main

    main()

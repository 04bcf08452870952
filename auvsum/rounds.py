"""What a document needs from an engine, round by round: one prompt, or its windows, and (map-reduce) their summaries.

    rounds = Rounds(summarizer, plan, text, id, source)
    while rounds.summary is None:
        for piece in rounds.pieces():        # prompts that can be read in any order, beside those of other documents
            ...                              # rounds.hear(piece, event) for each event of the engine about it

Every round shortens the text, until one prompt holds it: the last round, whose summary is the document's. map-rank has
windows alone, extract one: the best sentences of their summaries, beside the document's own, are the document's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from auvsum.errors import DocumentTooLong, GenerationFailed
from auvsum.events import DocumentStarted, Event, Failed, Finished, Prefilled, PrefillProgress
from auvsum.text.central import CENTRAL, OPENING, central_sentences, gathered
from auvsum.text.passages import best_passages
from auvsum.text.prompts import Prompt
from auvsum.text.windows import Count, Window, cut

if TYPE_CHECKING:
    from auvsum.config import Settings
    from auvsum.engine.generate import Request
    from auvsum.engine.models import LoadedModel
    from auvsum.summarize import Plan, Summarizer, Summary, Writing

#: Tokens of a window of map-reduce, where the model has room for so many.
WINDOW = 2048
#: The most tokens of a window's summary: of one that will be read again, and of one whose best sentences are kept.
PART, PART_RANKED = 192, 64
#: Summaries of windows may not grow past this share of what they summarize: each round must shorten the text.
_SHRINK = 4
#: The share of a window that the passages take of which a question is asked, and characters a token, about.
_PASSAGES, _CHARACTERS = 4, 4


@dataclass(frozen=True)
class Mapping:
    """How long the windows of map-reduce and their summaries are, in tokens."""

    room: int
    max_new_tokens: int


def mapping(prompt: Prompt, settings: Settings, loaded: LoadedModel, max_new_tokens: int) -> Mapping:
    """Windows as long as asked, and as the positions allow.

    Raises:
        DocumentTooLong: the positions leave no room for one.
    """
    start, end = prompt.document
    frame = len(prompt.ids) - (end - start)
    limit = loaded.max_positions
    wanted = settings.window or WINDOW
    if limit is not None:
        # Texts tokenize a little differently once they are cut: leave some room.
        wanted = min(wanted, int((limit - frame - max_new_tokens) * 0.97) - 8)
    if wanted < 64:
        raise DocumentTooLong(
            f"{loaded.name} has {limit} positions: the instruction and the summary leave no room for a window",
            "shorten --instruction, or lower --max-tokens",
        )
    return Mapping(wanted, max(16, min(max_new_tokens, PART, wanted // _SHRINK)))


def cut_windows(text: str, room: int, tokenizer: Any) -> list[Window]:
    """The windows of a text."""

    return cut(text, room, _counter(tokenizer))


def sentences_to_read(text: str, room: int, tokenizer: Any) -> list[Window]:
    """One window of the central sentences; none where there are no sentences."""
    count = _counter(tokenizer)
    found = central_sentences(text, room, count)
    return [Window(found, 0, len(found), "", count([found])[0])] if found else []


def _counter(tokenizer: Any) -> Count:
    """How many tokens each of some strings has."""

    def count(pieces: Sequence[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(list(pieces), add_special_tokens=False, verbose=False)["input_ids"]]

    return count


def passages_to_read(text: str, room: int, query: str, tokenizer: Any) -> list[Window]:
    """One window of the passages that share a question's words; none where there are none.

    Asked of every window, a small model makes up an answer in most of them (docs/LOG.md).
    """
    characters = room // _PASSAGES * _CHARACTERS
    while passages := best_passages(text, query, characters):
        tokens = len(tokenizer(passages, verbose=False)["input_ids"])
        if tokens <= room:
            return [Window(passages, 0, len(passages), "", tokens)]
        characters //= 2
    return []


def _count_words(pieces: Sequence[str]) -> list[int]:
    return [len(piece.split()) for piece in pieces]


@dataclass(frozen=True, eq=False)
class Piece:
    """A prompt of a document's current round. `writing` is there in the last one."""

    number: int
    plan: Plan
    request: Request
    writing: Writing | None = None


class Rounds:
    """A document on its way to its summary.

    Args:
        text: of the document that was planned.
        free: bytes of free memory that the budget `auto` looks at; what is free now without it.

    Attributes:
        summary: there once the document is complete.
        due: whether a round waits for `pieces` to be called.
    """

    def __init__(
        self, summarizer: Summarizer, plan: Plan, text: str, id: str, source: str, *, free: int | None = None
    ) -> None:
        self.plan, self.due = plan, True
        self.summary: Summary | None = None
        self._id, self._source, self._free = id, source, free
        self._summarizer = summarizer
        self._cost = _Cost()
        self._windows = list(plan.windows)
        self._parts: dict[int, str] = {}
        # Of map-rank the windows, of extract the whole document: where the summary has its own sentences from.
        self._own: list[Window] = self._windows if plan.strategy == "map-rank" and len(self._windows) > 1 else []
        if plan.strategy == "extract" and not summarizer.settings.query and plan.windows[0].source != text:
            self._own = [Window(text, 0, len(text), "", plan.document_tokens)]
        self._round = 0
        if plan.windows:
            settings = summarizer.settings
            self._how = mapping(plan.prompt, settings, summarizer.loaded, plan.max_new_tokens)
            part = self._how.max_new_tokens
            if plan.strategy == "map-rank":  # few windows have more to say each
                part = min(part, max(PART_RANKED, 2 * plan.max_new_tokens // len(plan.windows)))
            elif self._own:  # the rest of the summary are sentences of the document
                part = max(16, int((1 - OPENING - CENTRAL) * plan.max_new_tokens))
            shorter = replace(settings, strategy="single", sentences=None, words=None, style=None, max_tokens=part)
            self._mapper = summarizer.with_settings(shorter)

    def started(self, index: int) -> DocumentStarted:
        """The event that announces the document."""
        plan = self.plan
        return DocumentStarted(
            index, self._id, plan.document_tokens, plan.prompt_tokens, plan.policy.name, plan.strategy, plan.budget
        )

    def pieces(self) -> Iterator[Piece]:
        """The prompts of the round that is due, planned as they are taken.

        Raises:
            DocumentError, BudgetError: one of them cannot be planned.
        """
        from auvsum.summarize import Writing

        self.due = False
        if len(self._windows) > 1 or self._own:
            for number, window in enumerate(self._windows):
                plan = self._mapper.plan(window.text, free=self._free)
                yield Piece(number, plan, self._mapper.request(plan))
            return
        if self.plan.windows:  # the last round: what is left is one prompt
            final = self._summarizer.with_settings(replace(self._summarizer.settings, strategy="single"))
            plan = final.plan(self._windows[0].text, free=self._free)
            writing = Writing(final, plan, self._id, self._source)
        else:
            plan = self.plan
            writing = Writing(self._summarizer, plan, self._id, self._source)
        yield Piece(0, plan, writing.request, writing)

    def told(self, piece: Piece, event: Event) -> Event | None:
        """An event of the engine as listeners to the document hear it; None for what windows do among themselves."""
        if piece.writing is not None or isinstance(event, Failed):
            return event
        if self._round == 0 and isinstance(event, PrefillProgress) and event.done_tokens == event.total_tokens:
            total = self.plan.prompt_tokens
            self._cost.windows += 1
            return PrefillProgress(event.request, total * self._cost.windows // len(self._windows), total)
        return None

    def hear(self, piece: Piece, event: Event, rows: int) -> str:
        """Takes note of an event about a piece.

        Args:
            rows: how many prompts are written together.

        Returns:
            The text of the summary that it completes; empty for most.

        Raises:
            DocumentError: the document cannot be completed.
        """
        if piece.writing is not None:
            text = piece.writing.hear(event)
            if isinstance(event, Finished):
                self._complete(piece.writing.summary, rows)
            return text
        if isinstance(event, Failed):
            raise event.error
        self._cost.hear(event, rows, min(rows, len(self._windows)))
        if isinstance(event, Finished):
            self._parts[piece.number] = self._mapper.text_of(event.token_ids)
            if len(self._parts) == len(self._windows):
                return self._rank(rows) if self._own else self._reduce()
        return ""

    def _rank(self, rows: int) -> str:
        """All windows have their summaries: their best sentences and the document's own are its summary, returned."""
        from auvsum.summarize import Summary

        settings, loaded = self._summarizer.settings, self._summarizer.loaded
        room, count = self.plan.max_new_tokens, _counter(loaded.tokenizer)
        if settings.words is not None:
            room, count = settings.words, _count_words
        parts = [self._parts[i] for i in range(len(self._windows))]
        text = gathered(self._own, parts, room, count, settings.sentences)
        if not text:
            raise GenerationFailed("the summaries of its parts are empty", "use another model, or a larger budget")
        self._complete(Summary(self._id, self._source, text, self.plan, settings, loaded), rows)
        return text

    def _reduce(self) -> str:
        """All windows have their summaries: these are the text of the next round. Nothing is written yet."""
        before = sum(window.end - window.start for window in self._windows)
        joined = join(self._windows, [self._parts[i] for i in range(len(self._windows))])
        if not joined:
            raise GenerationFailed("the summaries of its parts are empty", "use another model, or a larger budget")
        if len(joined) >= before:
            raise DocumentTooLong("the summaries of its parts are no shorter than the document", "lower --max-tokens")
        self._windows = cut_windows(joined, self._how.room, self._summarizer.loaded.tokenizer)
        self._parts, self._round, self.due = {}, self._round + 1, True
        return ""

    def _complete(self, summary: Summary, rows: int) -> None:
        cost = self._cost
        summary.batch_size = max(rows, cost.rows)
        if self.plan.windows:
            summary.plan, summary.settings = self.plan, self._summarizer.settings
            summary.warnings[:0] = [warning for warning in self.plan.warnings if warning not in summary.warnings]
            summary.prefill_seconds += cost.prefill
            summary.decode_seconds += cost.decode
            summary.peak_bytes = max(summary.peak_bytes, cost.held)
            summary.prefill_peak_bytes = max(summary.prefill_peak_bytes, cost.prefill_peak)
            summary.generated_tokens = len(summary.token_ids) + cost.tokens
        self.summary = summary


@dataclass
class _Cost:
    """What the rounds before the last one cost."""

    prefill: float = 0.0
    decode: float = 0.0
    held: int = 0
    prefill_peak: int = 0
    tokens: int = 0
    windows: int = 0
    rows: int = 1

    def hear(self, event: Event, rows: int, own: int) -> None:
        """Takes note of a window's event; prompts that are written together share their time.

        Args:
            own: how many of the rows may be this document's.
        """
        self.rows = max(self.rows, rows)
        if isinstance(event, Prefilled):
            self.prefill += event.seconds
            self.prefill_peak = max(self.prefill_peak, event.prefill_peak_bytes)
        elif isinstance(event, Finished):
            self.decode += event.decode_seconds / rows
            self.held = max(self.held, event.kv_bytes * own)
            self.tokens += len(event.token_ids)


def join(windows: Sequence[Window], summaries: Sequence[str]) -> str:
    """The summaries in the order of the text, each under its window's heading where that is a new one."""
    parts, heading = [], ""
    for window, summary in zip(windows, summaries, strict=True):
        if not summary:
            continue
        parts.append(f"{window.heading}\n{summary}" if window.heading and window.heading != heading else summary)
        heading = window.heading
    return "\n\n".join(parts)

"""From a document to its summary: read this file first.

    document -> prompt (token ids) -> plan (strategy, policy, budget in slots) -> rounds -> engine (events) -> Summary

Text lives in this file and above; below it there are only token ids and tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, groupby
from typing import TYPE_CHECKING, Any

from auvsum import rounds, strategies
from auvsum._version import __version__
from auvsum.budget import SENSIBLE_SLOTS, ResolvedBudget, parse_budget, resolve
from auvsum.cache.policy import Policy, make_policy
from auvsum.cache.sliding import SlidingWindow
from auvsum.config import Settings
from auvsum.engine.generate import Engine, Request
from auvsum.engine.memory import MOST_ROWS, free_over, rows_that_fit
from auvsum.engine.models import LoadedModel, load
from auvsum.engine.parts import Part
from auvsum.engine.sampling import Sampling
from auvsum.errors import BudgetError, DocumentEmpty
from auvsum.events import Event, Failed, Finished, Notice, Prefilled, Token
from auvsum.text.citations import Citations, cite
from auvsum.text.prompts import Prompt, build_prompt, truncate_document
from auvsum.text.styles import shaped
from auvsum.text.windows import Window

if TYPE_CHECKING:
    from auvsum.batch import Failure
    from auvsum.estimate import Rates
    from auvsum.text.readers import Document


@dataclass(frozen=True)
class Plan:
    """What will be done with a document, before anything costs time.

    Attributes:
        document_tokens: of the whole document, before any truncation. cut_tokens: how many of them are not read.
        strategy: what `strategies.py` chose; where there are windows, the budget is a window's.
        policy: the policy that runs; `full` when the budget is `auto` and the full cache fits.
        parts: how the prompt is read when not at the positions of its tokens.
        windows: of a long document, or the one that `extract` makes. The prompt of a very long one is only the frame.
        bits: of a stored key or value.
    """

    prompt: Prompt
    document_tokens: int
    cut_tokens: int
    max_new_tokens: int
    strategy: str
    policy: Policy
    budget: ResolvedBudget
    warnings: tuple[str, ...]
    parts: tuple[Part, ...] = ()
    bits: int = 16
    windows: tuple[Window, ...] = ()

    @property
    def layer_slots(self) -> list[int]:
        """Slots of each layer that has no sliding window, as the policy shares them out."""
        return self.policy.layer_slots(self.budget.slots, self.budget.layers, self.prompt_tokens)

    @property
    def prompt_tokens(self) -> int:
        """Tokens the model reads: the document's, and those of the frame around it."""
        return self.document_tokens - self.cut_tokens + self.prompt.frame_tokens

    @property
    def engine_key(self) -> tuple[str, str, int]:
        """Documents that agree in this can be written together by one engine."""
        return self.policy.name, self.strategy, self.bits


@dataclass
class Summary:
    """A summary and what it cost."""

    id: str
    source: str
    text: str
    plan: Plan
    settings: Settings
    loaded: LoadedModel
    token_ids: tuple[int, ...] = ()
    warnings: list[str] = field(default_factory=list)
    peak_bytes: int = 0
    prefill_peak_bytes: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    #: All tokens written; more than the summary's own where windows were summarized first.
    generated_tokens: int = 0
    citations: Citations | None = None
    batch_size: int = 1

    @property
    def tokens_per_second(self) -> float:
        """Decoded tokens a second; the first token belongs to the prefill."""
        tokens = self.generated_tokens or len(self.token_ids)
        return (tokens - 1) / self.decode_seconds if self.decode_seconds > 0 else 0.0

    def record(self) -> dict[str, Any]:
        """The document's record for `--format json`: see docs and `auvsum summarize --help`."""
        plan, budget = self.plan, self.plan.budget
        return {
            "id": self.id,
            "source": self.source,
            "summary": self.text,
            "error": None,
            "model": self.loaded.name,
            "policy": plan.policy.name,
            "strategy": plan.strategy,
            "truncated": plan.cut_tokens > 0,
            "tokens": {
                "document": plan.document_tokens,
                "prompt": plan.prompt_tokens,
                "generated": self.generated_tokens or len(self.token_ids),
            },
            "budget": {
                "asked": budget.asked,
                "scope": budget.scope,
                "slots": budget.slots,
                "layer_slots": plan.layer_slots,
                "kv_bits": plan.bits,
            },
            "kv": {
                "peak_bytes": self.peak_bytes,
                "prefill_peak_bytes": self.prefill_peak_bytes,
                "full_bytes": budget.full_bytes,
            },
            "warnings": list(self.warnings),
            **(self.citations.record() if self.citations else {}),
            "time": {
                "load_s": round(self.loaded.load_seconds, 3),
                "prefill_s": round(self.prefill_seconds, 3),
                "decode_s": round(self.decode_seconds, 3),
                "decode_tokens_per_s": round(self.tokens_per_second, 2),
            },
            "settings": {
                "dtype": str(self.loaded.dtype).removeprefix("torch."),
                "weights": self.loaded.weights,
                "device": self.loaded.runs_on,
                "batch_size": self.batch_size,
                "seed": self.settings.seed,
                "version": __version__,
            },
        }


class Summarizer:
    """A loaded model with its settings.

    summarizer = Summarizer.from_pretrained("smollm2-135m-instruct", budget="10%")
    print(summarizer.summarize(text).text)
    """

    def __init__(self, loaded: LoadedModel, settings: Settings) -> None:
        self.loaded = loaded
        self.settings = settings
        self.policy = _policy(settings)
        #: What `auto` prefers: it holds a whole prompt until it has chosen, and its decode step is plain torch.
        self.second_look: Policy | None = None
        wished = settings.policy == "auto" and not settings.policy_options
        if wished and loaded.device.type == "cpu":
            self.second_look = make_policy("auv-look")

    @property
    def batch_size(self) -> int | None:
        """Documents written together; None takes as many as free memory holds, up to `engine.memory.MOST_ROWS`.

        `auto` is 1 beside a time limit: together, documents wait for each other, and more of them would miss it.
        """
        asked = self.settings.batch_size
        if asked == "auto":
            return None if self.settings.timeout is None else 1
        return int(asked)

    def together(self, plan: Plan, documents: int) -> int:
        """How many of that many documents, all planned like this one, would be written together now."""
        if self.batch_size is not None:
            return min(self.batch_size, documents)
        requests = [self.request(plan)] * min(documents, MOST_ROWS[self.loaded.device.type])
        chunk = self.settings.chunk if plan.strategy == "stream" else None
        return rows_that_fit(self.loaded.model, plan.policy, requests, chunk, plan.bits, self.loaded.kept.bytes)

    def free_bytes(self) -> int:
        """Free memory of the device, or devices, now; what is only kept for the next run is free too."""
        return free_over(self.loaded.devices or (self.loaded.device,)) + self.loaded.kept.bytes

    @classmethod
    def from_pretrained(cls, model: str | None = None, **settings: Any) -> Summarizer:
        """Loads a model: a folder, a short name or a cached hub id; the settings are those of `Settings`.

        Raises:
            UsageError: settings that make no sense. ModelError: the model or the device is not to be had.
        """
        chosen = Settings(**settings) if model is None else Settings(model=model, **settings)
        return cls.from_settings(chosen)

    @classmethod
    def from_settings(cls, settings: Settings) -> Summarizer:
        """Loads the model that the settings name."""
        _policy(settings)  # a mistake in the settings should not cost a model load
        loaded = load(
            settings.model,
            device=settings.device,
            dtype=settings.dtype,
            weights=settings.weights,
            threads=settings.threads,
            download=settings.download,
        )
        return cls(loaded, settings)

    def plan(self, text: str, *, free: int | None = None) -> Plan:
        """Decides everything about a document that can be decided before reading it.

        Args:
            free: bytes of free memory that the budget `auto` looks at; what is free now without it.

        Raises:
            DocumentEmpty, DocumentTooLong: the document cannot be read (whole). BudgetError: the budget is too small.
        """
        if not text.strip():
            raise DocumentEmpty("the document is empty", "give it some text")
        settings, warnings = self.settings, []
        very_long = strategies.surely_over(text, settings, self.loaded)
        prompt = build_prompt(
            self.loaded.tokenizer,
            "" if very_long else text,
            template=settings.template,
            instruction=settings.instruction,
            sentences=settings.sentences,
            words=settings.words,
            query=settings.query,
            style=settings.style,
        )
        document_tokens = prompt.document[1] - prompt.document[0]
        max_new_tokens = settings.max_tokens or prompt.max_new_tokens
        if very_long:
            strategy = strategies.beyond(settings) if settings.strategy == "auto" else settings.strategy
        else:
            strategy = strategies.choose(prompt, max_new_tokens, settings, self.loaded, self.policy)
        if strategy == "stream":
            self.policy.refuse_chunks()
        over = self._over(prompt, max_new_tokens)
        free = self.free_bytes() if free is None else free
        if strategy != "single":
            return self._plan_long(text, prompt, max_new_tokens, strategy, over, free)
        cut = 0
        if over:
            prompt, cut = truncate_document(prompt, (self.loaded.max_positions or 0) - max_new_tokens)
        if cut:
            warnings.append(
                f"the last {cut:,} of {document_tokens:,} document tokens were cut to fit the model's "
                f"{self.loaded.max_positions:,} positions"
            )
        policy, budget, bits = self._budget(len(prompt.ids), max_new_tokens, free, self.second_look or self.policy)
        warnings += _budget_warnings(policy, budget)
        return Plan(prompt, document_tokens, cut, max_new_tokens, strategy, policy, budget, tuple(warnings), bits=bits)

    def _plan_long(self, text: str, prompt: Prompt, max_new_tokens: int, strategy: str, over: bool, free: int) -> Plan:
        """The plan of a document that is streamed, or read in windows."""
        settings, loaded = self.settings, self.loaded
        parts: tuple[Part, ...] = ()
        windows: list[Window] = []
        document_tokens = prompt.document[1] - prompt.document[0]
        if strategy != "stream":
            how = rounds.mapping(prompt, settings, loaded, max_new_tokens)
            windows = rounds.cut_windows(text, how.room, loaded.tokenizer)
            document_tokens = max(document_tokens, sum(window.tokens for window in windows))
            chosen: list[Window] = []
            if settings.query and len(windows) > 1:
                chosen = rounds.passages_to_read(text, how.room, settings.query, loaded.tokenizer)
            elif strategy == "extract" and len(windows) > 1:
                chosen = rounds.sentences_to_read(text, how.room, loaded.tokenizer)
            frame = prompt.frame_tokens
            windows = chosen or windows
            ranks = strategy == "map-rank"
            warnings = strategies.explain(
                document_tokens + frame, loaded, settings, windows, ranks=ranks, chosen=bool(chosen)
            )
            tokens = min(document_tokens, how.room) + frame
            policy, budget, bits = self._budget(tokens, max_new_tokens, free, self.second_look or self.policy)
        elif over:
            policy, bits = strategies.must_evict(self.policy), _bits(settings)
            most = strategies.stream_slots(loaded, settings.chunk, max_new_tokens)
            budget = self._resolve(policy, len(prompt.ids), max_new_tokens, free, bits, most)
            parts, warning = strategies.stream_parts(prompt, max_new_tokens, settings.chunk, loaded, policy, budget)
            warnings = [warning]
        else:
            policy, budget, bits = self._budget(len(prompt.ids), max_new_tokens, free, self.policy)
            warnings = []
        warnings += _budget_warnings(policy, budget)
        told = tuple(warnings)
        return Plan(
            prompt, document_tokens, 0, max_new_tokens, strategy, policy, budget, told, parts, bits, tuple(windows)
        )

    def with_settings(self, settings: Settings) -> Summarizer:
        """The same model with other settings."""
        return Summarizer(self.loaded, settings)

    def engine(self, plan: Plan, batch_size: int | None = 1) -> Engine:
        """The engine for documents that are planned like this one: see `Plan.engine_key` and `batch_size`."""
        settings = self.settings
        return Engine(
            self.loaded.model,
            plan.policy,
            eos_ids=self.loaded.eos_ids,
            chunk=settings.chunk if plan.strategy == "stream" else None,
            batch_size=batch_size,
            sampling=Sampling(settings.temperature, settings.top_p, settings.repetition_penalty, settings.seed),
            bits=plan.bits,
            kept=self.loaded.kept,
        )

    def request(self, plan: Plan) -> Request:
        """A planned document as the engine reads it."""
        return Request(
            plan.prompt.ids,
            plan.budget.slots,
            plan.max_new_tokens,
            plan.parts,
            self.settings.timeout,
            plan.prompt.document,
        )

    def text_of(self, token_ids: Sequence[int]) -> str:
        """What tokens say, without surrounding blanks."""
        text: str = self.loaded.tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text.strip()

    def summarize(
        self,
        text: str,
        *,
        plan: Plan | None = None,
        id: str = "document",
        source: str = "",
        pages: Sequence[tuple[int, int]] = (),
        on_event: Callable[[Event], None] | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> Summary:
        """Summarizes a text.

        Args:
            plan: the text's `plan()`, when it has been made already.
            id, source: what the record calls the document. pages: where its pages start, for citations.
            on_event: hears every engine event. on_text: hears the summary piece by piece as it is written.

        Raises:
            DocumentError: this document cannot be summarized. BudgetError: the budget is too small for it.
        """
        plan = plan or self.plan(text)
        if self.settings.style and on_text:
            # The shape of a summary is made when it is whole: it is heard then, and not piece by piece.
            on_text, whole = None, on_text
        else:
            whole = None
        work = rounds.Rounds(self, plan, text, id, source)
        if on_event:
            on_event(work.started(0))
        while work.summary is None:
            # Prompts of one round rarely need different engines, but budgets that look at free memory may differ.
            for _, alike in groupby(work.pieces(), key=lambda piece: piece.plan.engine_key):
                self._write(work, alike, on_event, on_text)
        summary = work.summary
        self.finish(summary, text, pages)
        if whole:
            whole(summary.text)
        return summary

    def _write(
        self,
        work: rounds.Rounds,
        pieces: Iterator[rounds.Piece],
        on_event: Callable[[Event], None] | None,
        on_text: Callable[[str], None] | None,
    ) -> None:
        """Prompts of one document through one engine."""
        first = next(pieces)
        taken: list[rounds.Piece] = []

        def requests() -> Iterator[Request]:
            for piece in chain((first,), pieces):
                taken.append(piece)
                yield piece.request

        engine = self.engine(first.plan, 1 if first.writing else self.batch_size)
        for event in engine.run(requests()):
            piece = first if isinstance(event, Notice) else taken[event.request]
            told = event if isinstance(event, Notice) else work.told(piece, replace(event, request=0))
            if on_event and told:
                on_event(told)
            text = "" if isinstance(event, Notice) else work.hear(piece, event, engine.rows)
            if on_text and text:
                on_text(text)

    def finish(self, summary: Summary, text: str, pages: Sequence[tuple[int, int]] = ()) -> None:
        """What happens to a written summary: its shape, and where its sentences come from in the document's text."""
        summary.text = shaped(summary.text, self.settings.style)
        if self.settings.cite:
            summary.citations = cite(summary.text, text, pages)
            summary.warnings += summary.citations.warnings()

    def run(
        self,
        documents: Iterable[Document | Failure],
        *,
        ordered: bool = True,
        together: bool = True,
        on_event: Callable[[Event], None] | None = None,
    ) -> Iterator[Summary | Failure]:
        """Summarizes many documents, `batch_size` of them together; one that fails does not stop the others.

        Args:
            documents: taken lazily; a `Failure` among them (a file that could not be read) is passed on.
            ordered: results in the order of the documents; otherwise each as soon as it is there.
            together: False writes one document after the other all the same, so that their events do not mix.
            on_event: hears every event; its `request` is the document's index.
        """
        from auvsum.batch import run

        batch_size = self.batch_size if together else 1
        return run(self, documents, batch_size=batch_size, ordered=ordered, on_event=on_event)

    def prompt_text(self, plan: Plan) -> str:
        """What the model reads, control tokens included."""
        text: str = self.loaded.tokenizer.decode(list(plan.prompt.ids), skip_special_tokens=False)
        return text

    def measure(self) -> Rates:
        """How fast this model reads and writes here, from a short trial."""
        from auvsum.estimate import measure

        return measure(self)

    def _over(self, prompt: Prompt, max_new_tokens: int) -> bool:
        """Whether the prompt and its summary need more positions than the model has."""
        limit = self.loaded.max_positions
        return limit is not None and len(prompt.ids) + max_new_tokens > limit

    def _budget(
        self, prompt_tokens: int, max_new_tokens: int, free: int, policy: Policy
    ) -> tuple[Policy, ResolvedBudget, int]:
        """The policy that runs, its budget and its bits: `auto` means the full cache when there is room for it."""
        budget = parse_budget(self.settings.budget, self.settings.budget_scope)
        bits = _bits(self.settings)

        def resolved(policy: Policy, bits: int) -> ResolvedBudget:
            return self._resolve(policy, prompt_tokens, max_new_tokens, free, bits)

        full = policy if policy.name == "full" else make_policy("full")
        if budget.kind == "auto" or policy.name == "full":
            unbound = resolved(full, bits)
            if unbound.never_binds:
                return full, unbound, bits
            if policy.name == "full":
                raise BudgetError(
                    f"the full cache of {prompt_tokens:,} + {max_new_tokens} tokens does not fit budget {budget.asked}",
                    "use --policy auv, which evicts, or --budget auto",
                )
        if not policy.by_head:
            return policy, resolved(policy, bits), bits
        # As many bits as hold everything; where none do, few bits lose less than few tokens (docs/LOG.md).
        choices = (16, 8, 4) if self.settings.kv_bits == "auto" else (bits,)
        refusal: BudgetError | None = None
        for bits in choices:
            try:
                found = resolved(policy, bits)
            except BudgetError as error:
                refusal = error
                continue
            if found.never_binds or bits == choices[-1]:
                return policy, found, bits
        assert refusal is not None
        if policy is not self.second_look:
            raise refusal
        # `auto` goes on with the policy that works with the fewest slots.
        return self._budget(prompt_tokens, max_new_tokens, free, self.policy)

    def _resolve(
        self,
        policy: Policy,
        prompt_tokens: int,
        max_new_tokens: int,
        free: int,
        bits: int,
        most_slots: int | None = None,
    ) -> ResolvedBudget:
        """The budget asked for, in slots of a policy."""
        shape = self.loaded.shape
        vector = {"kv_heads": shape.kv_heads, "head_dim": shape.head_dim, "element_bytes": shape.element_bytes}
        windows = 0
        for window in shape.windows:
            cost = SlidingWindow(window).slot_cost(**vector)
            windows += cost.fixed + window * cost.per_slot
        return resolve(
            parse_budget(self.settings.budget, self.settings.budget_scope),
            shape=shape,
            cost=policy.slot_cost(**vector, bits=bits),
            prompt_tokens=prompt_tokens,
            max_new_tokens=max_new_tokens,
            least_slots=policy.least_slots,
            slots_to_hold=policy.slots_to_hold,
            paper_slots=policy.paper_slots,
            free_bytes=free // (self.batch_size or 1),
            window_bytes=windows,
            most_slots=most_slots,
        )


def _budget_warnings(policy: Policy, budget: ResolvedBudget) -> list[str]:
    """What a budget means that people may not expect."""
    if budget.never_binds and budget.asked != "auto" and policy.name != "full":
        return [f"budget {budget.asked} never binds: nothing of {budget.prompt_tokens:,} tokens will be evicted"]
    if budget.slots < SENSIBLE_SLOTS and not budget.never_binds:
        return [f"budget {budget.asked} gives only {budget.slots} slots per layer: expect a poor summary"]
    return []


class Writing:
    """A summary while it is written: hears the engine's events about one document."""

    def __init__(self, summarizer: Summarizer, plan: Plan, id: str, source: str) -> None:
        self.plan = plan
        self.request = summarizer.request(plan)
        self.summary = Summary(
            id, source, "", plan, summarizer.settings, summarizer.loaded, warnings=list(plan.warnings)
        )
        self._pieces = _Pieces(summarizer.loaded.tokenizer)

    def hear(self, event: Event) -> str:
        """Takes note of an event.

        Returns:
            The text that it completes; empty for most.

        Raises:
            DocumentError: the event says that the document failed.
        """
        summary = self.summary
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Prefilled):
            summary.prefill_seconds = event.seconds
            summary.prefill_peak_bytes = event.prefill_peak_bytes
        elif isinstance(event, Token):
            return self._pieces.add(event.token_id)
        elif isinstance(event, Finished):
            summary.token_ids = event.token_ids
            summary.decode_seconds = event.decode_seconds
            summary.peak_bytes = event.kv_bytes
            if event.reason == "length":
                summary.warnings.append(
                    f"the summary stopped at its limit of {self.plan.max_new_tokens} tokens; --max-tokens raises it"
                )
            rest = self._pieces.finish()
            summary.text = self._pieces.text
            summary.warnings += _degenerate(summary.text, summary.token_ids)
            return rest
        return ""


def _policy(settings: Settings) -> Policy:
    """The policy that the settings ask for; of `auto` the one that reads in chunks and runs anywhere."""
    return make_policy("auv" if settings.policy == "auto" else settings.policy, **settings.policy_options)


def _bits(settings: Settings) -> int:
    """Bits of a stored key or value; `auto` is the model's own type."""
    return 16 if settings.kv_bits == "auto" else int(settings.kv_bits)


class _Pieces:
    """Token ids -> text, piece by piece: a piece is let go once its characters are complete."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._given = ""

    @property
    def text(self) -> str:
        """The whole text so far, without surrounding blanks."""
        decoded: str = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        return decoded.strip()

    def add(self, token_id: int) -> str:
        """The text that one more token completes; empty while a character is incomplete."""
        self._ids.append(token_id)
        return "" if self.text.endswith("\ufffd") else self.finish()

    def finish(self) -> str:
        """What has not been given out yet."""
        text = self.text
        if not text.startswith(self._given):
            return ""
        piece, self._given = text[len(self._given) :], text
        return piece


def _degenerate(text: str, token_ids: tuple[int, ...], width: int = 4) -> list[str]:
    """Warnings about a summary that cannot be right: nothing at all, or the same words over and over."""
    if not text:
        return ["the summary is empty"]
    grams = [token_ids[i : i + width] for i in range(len(token_ids) - width + 1)]
    if len(grams) >= 16 and len(set(grams)) < len(grams) / 2:
        return ["the summary repeats itself: the budget or the model is too small for this document"]
    return []


__all__ = ["Plan", "Summarizer", "Summary"]

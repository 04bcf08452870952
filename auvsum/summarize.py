"""From a document to its summary: read this file first.

    document -> prompt (token ids) -> plan (strategy, policy, budget in slots) -> engine (events) -> Summary

Text lives in this file and above; below it there are only token ids and tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from auvsum._version import __version__
from auvsum.budget import SENSIBLE_SLOTS, ResolvedBudget, parse_budget, resolve
from auvsum.cache.policy import Policy, make_policy
from auvsum.config import Settings
from auvsum.engine.generate import Engine, Request
from auvsum.engine.memory import free_bytes
from auvsum.engine.models import LoadedModel, load
from auvsum.engine.sampling import Sampling
from auvsum.errors import AuvsumError, BudgetError, DocumentEmpty, DocumentTooLong, PolicyError
from auvsum.events import Event, Finished, Prefilled, Token
from auvsum.text.prompts import Prompt, build_prompt, truncate_document


@dataclass(frozen=True)
class Plan:
    """What will be done with a document, before anything costs time.

    Attributes:
        document_tokens: of the whole document, before any truncation. cut_tokens: how many of them are not read.
        strategy: `single` (one pass over the prompt) or `stream` (chunks over the budgeted cache).
        policy: the policy that runs; `full` when the budget is `auto` and the full cache fits.
    """

    prompt: Prompt
    document_tokens: int
    cut_tokens: int
    max_new_tokens: int
    strategy: str
    policy: Policy
    budget: ResolvedBudget
    warnings: tuple[str, ...]

    @property
    def prompt_tokens(self) -> int:
        """Tokens the model reads."""
        return len(self.prompt.ids)


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

    @property
    def tokens_per_second(self) -> float:
        """Decoded tokens a second; the first token belongs to the prefill."""
        return (len(self.token_ids) - 1) / self.decode_seconds if self.decode_seconds > 0 else 0.0

    def record(self) -> dict[str, Any]:
        """The document's record for `--format json`: see docs and `auvsum summarize --help`."""
        plan, budget = self.plan, self.plan.budget
        return {
            **_record_head(self.id, self.source),
            "summary": self.text,
            "error": None,
            "model": self.loaded.name,
            "policy": plan.policy.name,
            "strategy": plan.strategy,
            "truncated": plan.cut_tokens > 0,
            "tokens": {
                "document": plan.document_tokens,
                "prompt": plan.prompt_tokens,
                "generated": len(self.token_ids),
            },
            "budget": {
                "asked": budget.asked,
                "scope": budget.scope,
                "slots": budget.slots,
                "kv_bits": self.settings.kv_bits,
            },
            "kv": {
                "peak_bytes": self.peak_bytes,
                "prefill_peak_bytes": self.prefill_peak_bytes,
                "full_bytes": budget.full_bytes,
            },
            "warnings": list(self.warnings),
            "time": {
                "load_s": round(self.loaded.load_seconds, 3),
                "prefill_s": round(self.prefill_seconds, 3),
                "decode_s": round(self.decode_seconds, 3),
                "decode_tokens_per_s": round(self.tokens_per_second, 2),
            },
            "settings": {
                "dtype": str(self.loaded.dtype).removeprefix("torch."),
                "device": str(self.loaded.device),
                "batch_size": 1,
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
            threads=settings.threads,
            download=settings.download,
        )
        return cls(loaded, settings)

    def plan(self, text: str) -> Plan:
        """Decides everything about a document that can be decided before reading it.

        Raises:
            DocumentEmpty, DocumentTooLong: the document cannot be read (whole). BudgetError: the budget is too small.
        """
        if not text.strip():
            raise DocumentEmpty("the document is empty", "give it some text")
        settings, warnings = self.settings, []
        prompt = build_prompt(
            self.loaded.tokenizer,
            text,
            template=settings.template,
            instruction=settings.instruction,
            sentences=settings.sentences,
            words=settings.words,
        )
        document_tokens = prompt.document[1] - prompt.document[0]
        max_new_tokens = settings.max_tokens or prompt.max_new_tokens
        prompt, cut = self._within_positions(prompt, max_new_tokens)
        if cut:
            warnings.append(
                f"the last {cut:,} of {document_tokens:,} document tokens were cut to fit the model's "
                f"{self.loaded.max_positions:,} positions"
            )
        policy, budget = self._budget(len(prompt.ids), max_new_tokens)
        if budget.never_binds and budget.asked != "auto" and policy.name != "full":
            warnings.append(f"budget {budget.asked} never binds: nothing of {len(prompt.ids):,} tokens will be evicted")
        elif budget.slots < SENSIBLE_SLOTS and not budget.never_binds:
            warnings.append(f"budget {budget.asked} gives only {budget.slots} slots per layer: expect a poor summary")
        strategy = "single" if settings.strategy == "auto" else settings.strategy
        return Plan(prompt, document_tokens, cut, max_new_tokens, strategy, policy, budget, tuple(warnings))

    def summarize(
        self,
        text: str,
        *,
        plan: Plan | None = None,
        id: str = "document",
        source: str = "",
        on_event: Callable[[Event], None] | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> Summary:
        """Summarizes a text.

        Args:
            plan: the text's `plan()`, when it has been made already.
            id, source: what the record calls the document.
            on_event: hears every engine event. on_text: hears the summary piece by piece as it is written.

        Raises:
            DocumentError: this document cannot be summarized. BudgetError: the budget is too small for it.
        """
        plan = plan or self.plan(text)
        settings = self.settings
        engine = Engine(
            self.loaded.model,
            plan.policy,
            eos_ids=self.loaded.eos_ids,
            chunk=settings.chunk if plan.strategy == "stream" else None,
            sampling=Sampling(settings.temperature, settings.top_p, settings.repetition_penalty, settings.seed),
        )
        summary = Summary(id, source, "", plan, settings, self.loaded, warnings=list(plan.warnings))
        pieces = _Pieces(self.loaded.tokenizer)
        for event in engine.run([Request(plan.prompt.ids, plan.budget.slots, plan.max_new_tokens)]):
            if on_event:
                on_event(event)
            if isinstance(event, Prefilled):
                summary.prefill_seconds = event.seconds
                summary.prefill_peak_bytes = event.prefill_peak_bytes
            elif isinstance(event, Token):
                piece = pieces.add(event.token_id)
                if on_text and piece:
                    on_text(piece)
            elif isinstance(event, Finished):
                summary.token_ids = event.token_ids
                summary.decode_seconds = event.decode_seconds
                summary.peak_bytes = event.kv_bytes
                if event.reason == "length":
                    summary.warnings.append(
                        f"the summary stopped at its limit of {plan.max_new_tokens} tokens; --max-tokens raises it"
                    )
        rest = pieces.finish()
        if on_text and rest:
            on_text(rest)
        summary.text = pieces.text
        summary.warnings += _degenerate(summary.text, summary.token_ids)
        return summary

    @staticmethod
    def failed_record(error: AuvsumError, id: str, source: str, settings: Settings) -> dict[str, Any]:
        """The record of a document that failed."""
        return {
            **_record_head(id, source),
            "summary": None,
            "error": error.record(),
            "model": settings.model,
            "policy": settings.policy,
            "warnings": [],
            "settings": {"seed": settings.seed, "version": __version__},
        }

    def _within_positions(self, prompt: Prompt, max_new_tokens: int) -> tuple[Prompt, int]:
        """The prompt, cut when that is allowed and needed, and how many tokens were cut."""
        limit = self.loaded.max_positions
        if limit is None or len(prompt.ids) + max_new_tokens <= limit:
            return prompt, 0
        if not self.settings.truncate:
            raise DocumentTooLong(
                f"the document needs {len(prompt.ids):,} tokens to read and {max_new_tokens} to write, "
                f"but {self.loaded.name} has {limit:,} positions",
                "--truncate reads only as much of its beginning as fits",
            )
        return truncate_document(prompt, limit - max_new_tokens)

    def _budget(self, prompt_tokens: int, max_new_tokens: int) -> tuple[Policy, ResolvedBudget]:
        """The policy that runs and its budget: `auto` means the full cache when there is room for it."""
        settings = self.settings
        budget = parse_budget(settings.budget, settings.budget_scope)
        shape, free = self.loaded.shape, free_bytes(self.loaded.device)

        def resolved(policy: Policy) -> ResolvedBudget:
            cost = policy.slot_cost(kv_heads=shape.kv_heads, head_dim=shape.head_dim, element_bytes=shape.element_bytes)
            return resolve(
                budget,
                shape=shape,
                cost=cost,
                prompt_tokens=prompt_tokens,
                max_new_tokens=max_new_tokens,
                least_slots=policy.least_slots,
                slots_to_hold=policy.slots_to_hold,
                paper_slots=policy.paper_slots,
                free_bytes=free,
            )

        full = self.policy if self.policy.name == "full" else make_policy("full")
        if budget.kind == "auto" or self.policy.name == "full":
            unbound = resolved(full)
            if unbound.never_binds:
                return full, unbound
            if self.policy.name == "full":
                raise BudgetError(
                    f"the full cache of {prompt_tokens:,} + {max_new_tokens} tokens does not fit budget {budget.asked}",
                    "use --policy auv, which evicts, or --budget auto",
                )
        return self.policy, resolved(self.policy)


def _policy(settings: Settings) -> Policy:
    """The policy that the settings ask for."""
    if settings.kv_bits != 16:
        raise PolicyError(f"{settings.kv_bits}-bit slots are not supported", "leave --kv-bits at 16")
    return make_policy(settings.policy, **settings.policy_options)


def _record_head(id: str, source: str) -> dict[str, Any]:
    return {"id": id, "source": source}


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

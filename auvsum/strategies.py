"""How a document is read that may be longer than the model's positions. One choice, made before anything costs time.

single       the prompt at once; it must fit the positions
stream       in chunks over the budgeted cache; past the positions, positions count only what is held (rotary
             models), or windows restart after the prompt's head (learned positions). An approximation: said so
map-reduce   windows at paragraphs and sentences, summarized together in one batch, their summaries summarized
auto         single where the document fits, else what the measurements in docs/LOG.md prefer
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from auvsum.budget import ResolvedBudget
from auvsum.cache.policy import Policy
from auvsum.cache.rotary import Rotary
from auvsum.engine.parts import Part, chunks, windows
from auvsum.errors import BudgetError, DocumentTooLong, PolicyError
from auvsum.events import DocumentStarted, Event, Failed, Finished, Prefilled, PrefillProgress
from auvsum.text.prompts import Prompt
from auvsum.text.windows import Window, cut

if TYPE_CHECKING:
    from auvsum.config import Settings
    from auvsum.engine.models import LoadedModel
    from auvsum.summarize import Plan, Summarizer, Summary

#: What `auto` does with a document past the positions.
BEYOND = "map-reduce"
#: Tokens of a window of map-reduce, where the model has room for so many.
WINDOW = 2048
#: Summaries of windows may not grow past this share of what they summarize: each round must shorten the text.
_SHRINK = 4
_APPROXIMATION = "an approximation: --strategy map-reduce reads each part at its own positions"


def choose(prompt: Prompt, max_new_tokens: int, settings: Settings, loaded: LoadedModel, policy: Policy) -> str:
    """The strategy for a document.

    Raises:
        DocumentTooLong: `single` for a document past the model's positions.
    """
    asked, limit = settings.strategy, loaded.max_positions
    over = limit is not None and len(prompt.ids) + max_new_tokens > limit
    if not over or asked == "map-reduce":
        return "single" if asked == "auto" else asked
    if settings.truncate and asked != "stream":
        return "single"
    if asked == "single":
        raise DocumentTooLong(
            f"the document needs {len(prompt.ids):,} tokens to read and {max_new_tokens} to write, "
            f"but {loaded.name} has {limit:,} positions",
            "leave --strategy away to have it read in parts; --truncate reads only as much of its beginning as fits",
        )
    return BEYOND if asked == "auto" else asked


def explain(strategy: str, prompt: Prompt, loaded: LoadedModel, settings: Settings, number: int) -> list[str]:
    """What people should know about a strategy that is not the plain one."""
    auto = "auto chose it" if settings.strategy == "auto" else "as asked"
    if strategy == "map-reduce" and number > 1:
        return [
            f"map-reduce ({auto}): {len(prompt.ids):,} tokens in {number} windows, whose summaries are summarized; "
            f"{loaded.name} has {loaded.max_positions or 0:,} positions"
        ]
    return []


# -- stream past the positions ----------------------------------------------------------------------------------------


def stream_slots(loaded: LoadedModel, chunk: int, max_new_tokens: int) -> int | None:
    """The most slots with which positions inside the cache suffice; None where the budget alone decides.

    Raises:
        PolicyError: this model's positions cannot be given anew. BudgetError: no room beside a chunk.
    """
    if not _rotary(loaded.model):
        return None
    room = (loaded.max_positions or 0) - max(chunk, max_new_tokens)
    if room < 1:
        raise BudgetError(f"a chunk of {chunk} tokens leaves no positions for the cache", "use a smaller --chunk")
    return room


def stream_parts(
    prompt: Prompt, max_new_tokens: int, chunk: int, loaded: LoadedModel, policy: Policy, budget: ResolvedBudget
) -> tuple[tuple[Part, ...], str]:
    """How a prompt past the positions is read, and the warning that says what that is.

    Raises:
        BudgetError: a window's share of the slots is less than the policy works with.
    """
    total, (start, end) = len(prompt.ids), prompt.document
    if _rotary(loaded.model):
        how = f"{total:,} tokens past {loaded.max_positions:,} positions: positions count only what the cache holds"
        return chunks(total, chunk, compact=True), f"{how}, {_APPROXIMATION}"
    room = (loaded.max_positions or 0) - max_new_tokens
    if room <= start + total - end:
        raise DocumentTooLong("the instruction alone fills the model's positions", "shorten --instruction")
    parts = windows(total, head=start, tail=total - end, room=room, slots=policy.capacity(budget.slots))
    share = parts[0].share or 0
    if share < policy.least_slots:
        raise BudgetError(
            f"{len(parts)} windows share {budget.slots} slots per layer: {share} each are fewer than the "
            f"{policy.least_slots} this policy needs",
            "raise --budget, or use --strategy map-reduce",
        )
    return parts, f"{total:,} tokens in {len(parts)} windows whose positions restart, {_APPROXIMATION}"


def _rotary(model: Any) -> bool:
    """Whether positions can be given anew; learned ones can restart instead.

    Raises:
        PolicyError: neither is possible.
    """
    if Rotary.of(model) is not None:
        return True
    if any("embed_positions" in name for name, _ in model.named_modules()):
        return False
    raise PolicyError("the positions of this model cannot be given anew", "use --strategy map-reduce")


def must_evict(policy: Policy) -> Policy:
    """The policy of a stream past the positions.

    Raises:
        PolicyError: it keeps everything, or needs the whole prompt at once.
    """
    if policy.name == "full" or not policy.streams:
        raise PolicyError(
            f"policy {policy.name!r} cannot stream past the model's positions",
            "use --policy auv or h2o, or --strategy map-reduce",
        )
    return policy


# -- map-reduce -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mapping:
    """Settings of the rounds of map-reduce: how long windows and their summaries are."""

    room: int
    max_new_tokens: int


def mapping(prompt: Prompt, settings: Settings, loaded: LoadedModel, max_new_tokens: int) -> Mapping:
    """Windows as long as asked, and as the positions allow."""
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
    return Mapping(wanted, max(16, min(max_new_tokens, wanted // _SHRINK)))


def cut_windows(text: str, room: int, tokenizer: Any) -> list[Window]:
    """The windows of a text."""

    def count(pieces: Sequence[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(list(pieces), add_special_tokens=False, verbose=False)["input_ids"]]

    return cut(text, room, count)


def map_reduce(
    summarizer: Summarizer,
    text: str,
    plan: Plan,
    *,
    on_event: Callable[[Event], None] | None,
    on_text: Callable[[str], None] | None,
) -> Summary:
    """Summarizes the windows of a text, then their summaries, until one prompt holds them."""
    settings = summarizer.settings
    how = mapping(plan.prompt, settings, summarizer.loaded, plan.max_new_tokens)
    mapper = summarizer.with_settings(
        replace(settings, strategy="single", sentences=None, words=None, style=None, max_tokens=how.max_new_tokens)
    )
    final = summarizer.with_settings(replace(settings, strategy="single"))
    cost = _Cost()
    windows = cut_windows(text, how.room, summarizer.loaded.tokenizer)
    while len(windows) > 1:
        before = sum(len(window.text) for window in windows)
        joined = _join(windows, list(_map(mapper, windows, cost, on_event)))
        if len(joined) >= before:
            raise DocumentTooLong("the summaries of its parts are no shorter than the document", "lower --max-tokens")
        windows = cut_windows(joined, how.room, summarizer.loaded.tokenizer)
    summary = final.summarize(windows[0].text, on_event=_without_start(on_event), on_text=on_text)
    summary.prefill_seconds += cost.prefill
    summary.decode_seconds += cost.decode
    summary.peak_bytes = max(summary.peak_bytes, cost.held)
    summary.prefill_peak_bytes = max(summary.prefill_peak_bytes, cost.prefill_peak)
    summary.generated_tokens = len(summary.token_ids) + cost.tokens
    return summary


def _without_start(on_event: Callable[[Event], None] | None) -> Callable[[Event], None] | None:
    """A listener to the last round, which is not the start of a document of its own."""
    if on_event is None:
        return None
    hear = on_event
    return lambda event: None if isinstance(event, DocumentStarted) else hear(event)


@dataclass
class _Cost:
    """What the rounds before the last one cost."""

    prefill: float = 0.0
    decode: float = 0.0
    held: int = 0
    prefill_peak: int = 0
    tokens: int = 0


def _map(
    mapper: Summarizer, windows: Sequence[Window], cost: _Cost, on_event: Callable[[Event], None] | None
) -> Iterator[str]:
    """The windows' summaries, in order, written together."""
    plans = [mapper.plan(window.text) for window in windows]
    total, done = sum(plan.prompt_tokens for plan in plans), 0
    texts: dict[int, str] = {}
    engine = mapper.engine(plans[0], mapper.batch_size)
    for event in engine.run([mapper.request(plan) for plan in plans]):
        if isinstance(event, PrefillProgress) and event.done_tokens == event.total_tokens:
            done += event.total_tokens
            if on_event:
                on_event(PrefillProgress(0, done, total))
        elif isinstance(event, Failed):
            raise event.error
        elif isinstance(event, Prefilled):
            cost.prefill += event.seconds
            cost.prefill_peak = max(cost.prefill_peak, event.prefill_peak_bytes)
        elif isinstance(event, Finished):
            texts[event.request] = mapper.text_of(event.token_ids)
            cost.decode = cost.decode + event.decode_seconds / engine.rows
            cost.held = max(cost.held, event.kv_bytes * engine.rows)
            cost.tokens += len(event.token_ids)
    yield from (texts.get(i, "") for i in range(len(plans)))


def _join(windows: Sequence[Window], summaries: Sequence[str]) -> str:
    """The summaries in the order of the text, each under its window's heading where that is a new one."""
    parts, heading = [], ""
    for window, summary in zip(windows, summaries, strict=True):
        if not summary:
            continue
        parts.append(f"{window.heading}\n{summary}" if window.heading and window.heading != heading else summary)
        heading = window.heading
    return "\n\n".join(parts)

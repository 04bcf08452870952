"""How a document is read that may be longer than the model's positions. One choice, made before anything costs time.

single       the prompt at once; it must fit the positions
stream       in chunks over the budgeted cache; past the positions, positions count only what is held (rotary
             models), or windows restart after the prompt's head (learned positions). An approximation: said so
map-reduce   windows at paragraphs and sentences, summarized together in one batch, their summaries summarized
             (`rounds.py`)
map-rank     windows as well; the central sentences of their summaries are kept, beside the document's own first and
             central ones (`text/central.py`)
extract      the sentences of all parts that are most like the others, as many as a window holds, in one prompt; half of
             the summary is written, half are the document's own sentences, as with map-rank
auto         by the measurements in docs/LOG.md: map-rank past the positions, and with a small model for documents of
             several windows; else single
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from auvsum.budget import ResolvedBudget
from auvsum.cache.policy import Policy
from auvsum.cache.rotary import Rotary
from auvsum.engine.parts import Part, chunks, windows
from auvsum.errors import BudgetError, DocumentTooLong, PolicyError
from auvsum.rounds import WINDOW
from auvsum.text.prompts import Prompt

if TYPE_CHECKING:
    from auvsum.config import Settings
    from auvsum.engine.models import LoadedModel
    from auvsum.text.windows import Window

#: What `auto` does with a document past the positions.
BEYOND = "map-rank"
#: A model of fewer parameters summarizes a document of more than so many windows worse at once than in windows.
_SMALL, _WHOLE = 10**9, 3
#: More characters than this a token has no text, but for blanks.
_CHARACTERS = 64
_APPROXIMATION = "an approximation: --strategy map-reduce reads each part at its own positions"


def choose(prompt: Prompt, max_new_tokens: int, settings: Settings, loaded: LoadedModel, policy: Policy) -> str:
    """The strategy for a document.

    Raises:
        DocumentTooLong: `single` for a document past the model's positions.
    """
    asked, limit = settings.strategy, loaded.max_positions
    over = limit is not None and len(prompt.ids) + max_new_tokens > limit
    if asked == "auto" and not over:
        return beyond(settings) if _better_in_windows(prompt, settings, loaded) else "single"
    if not over or asked in ("map-reduce", "map-rank", "extract"):
        return asked
    if settings.truncate and asked != "stream":
        return "single"
    if asked == "single":
        raise DocumentTooLong(
            f"the document needs {len(prompt.ids):,} tokens to read and {max_new_tokens} to write, "
            f"but {loaded.name} has {limit:,} positions",
            "leave --strategy away to have it read in parts; --truncate reads only as much of its beginning as fits",
        )
    return beyond(settings) if asked == "auto" else asked


def _better_in_windows(prompt: Prompt, settings: Settings, loaded: LoadedModel) -> bool:
    """Whether a document that fits is summarized better part by part; not asked where policy or budget were chosen."""
    untouched = settings.policy == settings.budget == "auto" and not (settings.query or settings.truncate)
    if not untouched or len(prompt.ids) <= _WHOLE * WINDOW:
        return False
    return bool(sum(parameter.numel() for parameter in loaded.model.parameters()) < _SMALL)


def beyond(settings: Settings) -> str:
    """What `auto` does with a document past the positions. Answers to a question are read again, not chosen from."""
    return "map-reduce" if settings.query else BEYOND


def surely_over(text: str, settings: Settings, loaded: LoadedModel) -> bool:
    """Whether a text is so long that it will not be read at once, without counting its tokens: they are never all held.

    A text that is mostly blanks may be judged wrongly; it is then one window, and read as it would have been.
    """
    limit = loaded.max_positions
    pieces = settings.strategy not in ("single", "stream") and not settings.truncate
    return limit is not None and pieces and len(text) > _CHARACTERS * limit


def explain(
    tokens: int, loaded: LoadedModel, settings: Settings, windows: Sequence[Window], *, ranks: bool, chosen: bool
) -> list[str]:
    """What people should know about a text of `tokens` that is read in windows, or in the part that was `chosen`.

    Args:
        ranks: whether sentences of the windows' summaries are kept as they are.
    """
    positions = f"{loaded.name} has {loaded.max_positions or 0:,} positions"
    auto = "auto chose it" if settings.strategy == "auto" else "as asked"
    number = len(windows)
    if chosen and settings.query:
        return [f"the question is asked of the passages that share its words, of {tokens:,} tokens in all: {positions}"]
    if chosen:
        read = sum(window.tokens for window in windows)
        return [
            f"extract ({auto}): the model reads the {read:,} tokens of the central sentences, of {tokens:,} in all, "
            "and writes half of the summary; the rest are the document's own first and central sentences"
        ]
    if number > 1:
        kept = "the central sentences of whose summaries are kept, beside the document's own first and central ones"
        last = kept if ranks else "whose summaries are summarized"
        strategy = "map-rank" if ranks else "map-reduce"
        return [f"{strategy} ({auto}): {tokens:,} tokens in {number} windows, {last}; {positions}"]
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

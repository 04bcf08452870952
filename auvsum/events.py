"""What the engine says while it works. The engine prints nothing: the token stream, the panel, the JSON record,
the evaluation and the tests all read these.

`request` is the index of the document in the order given; times are seconds, sizes are bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from auvsum.budget import ResolvedBudget
from auvsum.errors import AuvsumError

FinishReason = Literal["eos", "length"]


@dataclass(frozen=True, slots=True)
class PrefillProgress:
    """A chunk of a prompt has been read."""

    request: int
    done_tokens: int
    total_tokens: int


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A prompt has been read and squeezed into its slots."""

    request: int
    prompt_tokens: int
    seconds: float
    prefill_peak_bytes: int
    kv_bytes: int


@dataclass(frozen=True, slots=True)
class Token:
    """One new token of one document."""

    request: int
    token_id: int


@dataclass(frozen=True, slots=True)
class Finished:
    """A document is complete. `token_ids` excludes the end-of-sequence token."""

    request: int
    token_ids: tuple[int, ...]
    reason: FinishReason
    decode_seconds: float
    kv_bytes: int


@dataclass(frozen=True, slots=True)
class Failed:
    """A document could not be written; the others go on."""

    request: int
    error: AuvsumError


@dataclass(frozen=True, slots=True)
class Notice:
    """How the engine works is not what one might expect, such as a slower path or a smaller batch; said once."""

    text: str


@dataclass(frozen=True, slots=True)
class Warned(Notice):
    """A notice that people should see without having asked, such as a worker that died."""


# -- added by `summarize.py` and `batch.py`: documents with names, and text -------------------------------------------


@dataclass(frozen=True, slots=True)
class DocumentStarted:
    """A document has been tokenized and planned, and is about to be read."""

    request: int
    name: str
    document_tokens: int
    prompt_tokens: int
    policy: str
    strategy: str
    budget: ResolvedBudget


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of a summary, as soon as its characters are complete."""

    request: int
    piece: str


@dataclass(frozen=True, slots=True)
class DocumentDone:
    """A document has its summary."""

    request: int
    name: str


@dataclass(frozen=True, slots=True)
class DocumentFailed:
    """A document has none: it could not be read, planned or written."""

    request: int
    name: str
    error: AuvsumError


DocumentEvent = (
    PrefillProgress | Prefilled | Token | Finished | Failed | DocumentStarted | Text | DocumentDone | DocumentFailed
)
Event = DocumentEvent | Notice

"""How long a document may take: an estimate from a short trial with the loaded model, not a promise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from auvsum.events import Finished, Prefilled

if TYPE_CHECKING:
    from auvsum.summarize import Summarizer

_TRIAL_TOKENS = 128
_TRIAL_NEW = 8


@dataclass(frozen=True)
class Rates:
    """Tokens a second, read and written by one document alone.

    Measured on a short prompt: attention costs more on a long one, so that the estimate for a long document read in
    one pass is on the low side.
    """

    read: float
    write: float

    def seconds(self, prompt_tokens: int, new_tokens: int) -> float:
        """For a prompt of that many tokens and the longest summary."""
        return prompt_tokens / self.read + new_tokens / self.write


def measure(summarizer: Summarizer) -> Rates:
    """Reads and writes a few tokens, once to warm up and once by the clock."""
    from auvsum.cache.policy import make_policy
    from auvsum.engine.generate import Engine, Request

    loaded = summarizer.loaded
    tokens = min(_TRIAL_TOKENS, (loaded.max_positions or _TRIAL_TOKENS) - _TRIAL_NEW)
    # Any token will do: how long it takes does not depend on which.
    ids = [number % 100 for number in range(tokens)]
    engine = Engine(loaded.model, make_policy("full"))
    rates = Rates(1.0, 1.0)
    for _ in range(2):
        read = write = 0.0
        for event in engine.run([Request(ids, tokens + _TRIAL_NEW, _TRIAL_NEW)]):
            if isinstance(event, Prefilled):
                read = event.seconds
            elif isinstance(event, Finished):
                write = event.decode_seconds
        rates = Rates(tokens / max(read, 1e-6), (_TRIAL_NEW - 1) / max(write, 1e-6))
    return rates

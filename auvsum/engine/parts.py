"""In which parts a prompt is read, and at which positions. Pure arithmetic.

chunks(1200, 512)                 absolute positions: the model's own, as far as it has any
chunks(90_000, 512, compact=True) positions inside the cache: order among what is held (rotary models)
windows(...)                      positions that restart after the prompt's head (learned positions)
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens `start .. end-1` of a prompt, read in one call.

    Attributes:
        position: of the first of them; None puts them behind what the cache holds.
        share: the part keeps at most that many slots a layer, and takes none from the parts before; None lets it
            compete for all of them.
    """

    start: int
    end: int
    position: int | None
    share: int | None = None


def chunks(total: int, size: int | None, *, compact: bool = False) -> tuple[Part, ...]:
    """The prompt in chunks of `size` tokens; None reads it at once."""
    step = size or max(1, total)
    return tuple(
        Part(start, min(total, start + step), None if compact else start) for start in range(0, max(1, total), step)
    )


def windows(total: int, *, head: int, tail: int, room: int, slots: int) -> tuple[Part, ...]:
    """The prompt in windows of equal length: the first with the head, the last with the closing instruction.

    Args:
        head, tail: tokens before and after the document.
        room: the most positions that the prompt may use.
        slots: what the windows share.
    """
    length = total - head - tail
    number = -(-length // max(1, room - head - tail))
    cuts = [head + length * i // number for i in range(number + 1)]
    cuts[0], cuts[-1] = 0, total
    share = slots // number
    return tuple(Part(start, end, head if start else 0, share) for start, end in itertools.pairwise(cuts))

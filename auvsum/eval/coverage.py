"""How much of a summary is about each third of its document: a summary of the beginning alone shows here."""

from __future__ import annotations

import math
import re
from collections import Counter

_WORD = re.compile(r"[^\W_]+")


def coverage(summary: str, document: str, parts: int = 3) -> list[float]:
    """The share of the summary that is about each part of the document.

    A word of the summary counts for the parts that have it, in proportion to how often they do, weighted by how telling
    it is: a word that is as frequent in every part tells nothing and counts nothing.

    Args:
        parts: how many equal stretches (in words) the document is cut into; 3 for thirds.

    Returns:
        one share a part; they sum to 1, or are all 0 when no word tells anything.
    """
    words = _words(document)
    size = len(words) / parts
    counts = [Counter(words[round(i * size) : round((i + 1) * size)]) for i in range(parts)]
    totals = [0.0] * parts
    for word, times in Counter(_words(summary)).items():
        rates = [count[word] / max(1, count.total()) for count in counts]
        whole = sum(rates)
        if whole == 0:
            continue
        shares = [rate / whole for rate in rates]
        telling = math.log(parts) + sum(share * math.log(share) for share in shares if share)
        for i, share in enumerate(shares):
            totals[i] += times * telling * share
    total = sum(totals)
    return [value / total for value in totals] if total > 1e-12 else [0.0] * parts


def _words(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]

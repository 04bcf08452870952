"""The passages of a text that are most like a question, by BM25 over words. No model: wording is all it knows."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator

from auvsum.text.citations import COMMON

_PARAGRAPH = re.compile(r"\S.*?(?=\n[ \t]*\n|\Z)", re.DOTALL)
_WORD = re.compile(r"[^\W_]+")
#: A paragraph longer than this is looked at in pieces cut at blanks.
_LONGEST = 1200
#: Words of questions that say nothing about what is asked.
_ASKING = frozenset({"about", "how", "say", "tell", "text", "document", "why", "where", "whose", "which", "answer"})
#: BM25's saturation of repeated words, and how much a passage's length counts.
_K1, _B = 1.2, 0.75


def best_passages(text: str, question: str, characters: int) -> str:
    """The passages most like a question, in the order of the text, of at most so many characters in all.

    Returns:
        an empty text where no passage shares a telling word with the question.
    """
    wanted = set(_words(question)) - COMMON - _ASKING
    spans: list[tuple[int, int]] = []
    counts: list[tuple[Counter[str], int]] = []
    frequency: Counter[str] = Counter()
    total = number = 0
    for start, end in _passages(text):
        words = list(_words(text[start:end]))
        number, total = number + 1, total + len(words)
        shared = Counter(word for word in words if word in wanted)
        if shared:
            spans.append((start, end))
            counts.append((shared, len(words)))
            frequency.update(shared.keys())
    if not spans:
        return ""
    mean = total / number
    weight = {word: math.log(1 + (number - n + 0.5) / (n + 0.5)) for word, n in frequency.items()}
    scores = [
        sum(weight[w] * n * (_K1 + 1) / (n + _K1 * (1 - _B + _B * length / mean)) for w, n in shared.items())
        for shared, length in counts
    ]
    chosen: list[tuple[int, int]] = []
    left = characters
    for at in sorted(range(len(spans)), key=lambda at: (-scores[at], at)):
        start, end = spans[at]
        if end - start > left:
            break
        left -= end - start
        chosen.append((start, end))
    return "\n\n".join(text[start:end].strip() for start, end in sorted(chosen))


def _passages(text: str) -> Iterator[tuple[int, int]]:
    for paragraph in _PARAGRAPH.finditer(text):
        start, stop = paragraph.span()
        while stop - start > _LONGEST:
            blank = text.rfind(" ", start + _LONGEST // 2, start + _LONGEST)
            end = blank if blank > 0 else start + _LONGEST
            yield start, end
            start = end
        yield start, stop


def _words(text: str) -> Iterator[str]:
    """Lower case, without a plural s."""
    for match in _WORD.finditer(text):
        word = match[0].lower()
        yield word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word

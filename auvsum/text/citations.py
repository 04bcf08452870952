"""Where each sentence of a summary comes from, and what in it the document does not say. By shared words alone.

A passage is a sentence of the document. It is the source of a summary's sentence when they share most of the weight of
its words (rare words weigh more, as in TF-IDF). That finds wording, not truth: a passage is there to be read.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from auvsum.text.windows import sentences

_WORD = re.compile(r"[^\W_]+(?:['’.,][^\W_]+)*")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_NAME = re.compile(r"[A-ZÀ-ÖØ-ÞŁŚŻĆŹ][\w’'&.-]*(?:[ \u00a0](?:of|the|and|for|de|van|von)?[ ]?[A-Z][\w’'&-]*)*")
_PASSAGE = re.compile(r"\S.*?(?:[.!?…。！？][\"'”’)\]]*(?=\s|\Z)|(?=\n\s*\n)|\Z)", re.DOTALL)
#: Share of a sentence's weight that its source must have.
_LEAST = 0.3
#: A passage longer than this is cut where it is shown.
_SHOWN = 300
#: A run of text without any end of a sentence is looked at in pieces of this many characters.
_LONGEST = 4000
_SPELLED = {
    word: str(number)
    for number, word in enumerate(
        re.findall(r"\w+", "zero one two three four five six seven eight nine ten eleven twelve")
    )
}
#: Words that tell nothing about what a text is about.
COMMON = frozenset(
    re.findall(
        r"\w+",
        "a an and are as at be been but by can could did do does for from had has have he her his i if in into is it "
        "its may more most no not of on or our she should so some such than that the their them then there these they "
        "this those to was we were what when which who will with would you your also other s",
    )
)


@dataclass(frozen=True)
class Cited:
    """A sentence of the summary with its best passage: `source` is None where nothing in the document is like it."""

    sentence: str
    source: dict[str, Any] | None


@dataclass(frozen=True)
class Citations:
    """All sentences of a summary, and the numbers and names that the document does not contain."""

    cited: list[Cited]
    unsupported: list[dict[str, Any]] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """`"citations"` and `"unsupported"` of the JSON record."""
        return {
            "citations": [{"sentence": cited.sentence, "source": cited.source} for cited in self.cited],
            "unsupported": self.unsupported,
        }

    def warnings(self) -> list[str]:
        """One line about everything that was made up, as far as words can tell."""
        found = list(dict.fromkeys(item["text"] for item in self.unsupported))
        if not found:
            return []
        return [f"the document does not contain: {', '.join(found)} (models invent; check before you rely on it)"]


@dataclass
class _Best:
    score: float = 0.0
    start: int = 0
    end: int = 0


def cite(summary: str, text: str, pages: Sequence[tuple[int, int]] = ()) -> Citations:
    """Finds the sources of a summary in its document.

    Args:
        pages: where each page starts in the text, with its number; without, places are lines.
    """
    parts = [part.strip() for part in sentences(summary)]
    parts = [part for part in parts if _WORD.search(part)]
    wanted = [_content(part) for part in parts]
    vocabulary = frozenset().union(*wanted)
    claims = [(i, kind, claim) for i, part in enumerate(parts) for kind, claim in _claims(part)]
    needed = vocabulary | {word for _, _, claim in claims for word in _forms(claim)}
    # One pass over the document: of each passage only the words that matter are remembered.
    passages: list[tuple[int, int, frozenset[str]]] = []
    frequency: Counter[str] = Counter()
    known: set[str] = set()
    for start, end in _passages(text):
        words = frozenset(_words(text[start:end])) & needed
        if words:
            known |= words
            passages.append((start, end, words & vocabulary))
            frequency.update(words & vocabulary)
    weight = {word: math.log(1 + len(passages) / frequency[word]) if frequency[word] else 1.0 for word in vocabulary}
    best = [_Best() for _ in parts]
    for start, end, words in passages:
        for found, own in zip(best, wanted, strict=True):
            score = _score(own, words, weight)
            if score > found.score:
                found.score, found.start, found.end = score, start, end
    cited = [
        Cited(part, _place(text, found, pages) if found.score >= _LEAST else None)
        for part, found in zip(parts, best, strict=True)
    ]
    unsupported = [
        {"kind": kind, "text": claim, "sentence": i} for i, kind, claim in claims if not _supported(kind, claim, known)
    ]
    return Citations(cited, unsupported)


def _score(own: frozenset[str], words: frozenset[str], weight: dict[str, float]) -> float:
    shared = own & words
    if not shared:
        return 0.0
    return sum(weight[word] for word in shared) / sum(weight[word] for word in own)


def _passages(text: str) -> Iterator[tuple[int, int]]:
    """Start and end of each sentence."""
    at = 0
    while at < len(text):
        match = _PASSAGE.search(text, at, at + _LONGEST)
        if match:
            yield match.span()
        at = match.end() if match else at + _LONGEST


def _words(text: str) -> Iterator[str]:
    """Words and numbers in one form: lower case, no thousands' commas, no plural s."""
    for match in _WORD.finditer(text):
        yield from _forms(match[0])


def _forms(text: str) -> list[str]:
    """The words of a piece of text as they are compared."""
    forms = []
    for word in re.findall(r"[^\W_]+(?:[.,][^\W_]+)*", text.lower()):
        if _NUMBER.fullmatch(word):
            forms.append(word.replace(",", ""))
        else:
            forms += [_SPELLED.get(part, _stem(part)) for part in re.split(r"[.,]", word)]
    return forms


def _stem(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def _content(text: str) -> frozenset[str]:
    return frozenset(word for word in _words(text) if word not in COMMON)


def _claims(sentence: str) -> Iterator[tuple[str, str]]:
    """Numbers and names of a sentence. A capital at its start alone makes no name."""
    for match in _NUMBER.finditer(sentence):
        yield "number", match[0]
    first = re.search(r"[^\W_]", sentence)
    for match in _NAME.finditer(sentence):
        name = match[0].rstrip(".'’-")
        alone = first is not None and match.start() == first.start() and " " not in name and not name[1:].isupper()
        if not alone and name != "I" and len(name) > 1:
            yield "name", name.removesuffix("’s").removesuffix("'s")


def _supported(kind: str, claim: str, known: set[str]) -> bool:
    """Whether the document has every word of a name, or the number, somewhere."""
    return all(form in known or form in COMMON for form in _forms(claim))


def _place(text: str, found: _Best, pages: Sequence[tuple[int, int]]) -> dict[str, Any]:
    passage = " ".join(text[found.start : found.end].split())
    page = None
    for start, number in pages:
        if start <= found.start:
            page = number
    return {
        "text": passage if len(passage) <= _SHOWN else passage[: _SHOWN - 1] + "…",
        "start": found.start,
        "end": found.end,
        "page": page,
        "line": text.count("\n", 0, found.start) + 1,
        "score": round(found.score, 3),
    }

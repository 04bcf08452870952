"""Text rules of the evaluation: sentences, words, paragraphs in another order, and summaries that no model wrote."""

from __future__ import annotations

import importlib.util
import math
import random
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from auvsum.errors import ConfigError

#: A sentence ends at . ! ? (or their wide forms) before a blank and something that can begin one.
_SENTENCE_END = re.compile(r"(?<=[.!?。！？])[\"'”’)\]]*\s+(?=[\"'“‘(\[]*[A-Z0-9À-ÞА-Я\u0370-\uffff])|\n{2,}")
_ABBREVIATION = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|Prof|St|Gov|Sen|Rep|Gen|Col|No|vs|etc|Inc|Co|Jr|Sr|e\.g|i\.e|[A-Z])\.$")
_LATIN_WORD = re.compile(r"[a-z0-9]+")
#: Paragraphs of news on one line are cut after so many sentences.
_SENTENCES_A_PARAGRAPH = 3


def sentences(text: str) -> list[str]:
    """Sentences by punctuation and blank lines; no model, no download."""
    found: list[str] = []
    for part in _SENTENCE_END.split(text):
        part = " ".join(part.split())
        if found and _ABBREVIATION.search(found[-1]) and part:
            found[-1] += f" {part}"
        elif part:
            found.append(part)
    return found


def first_words(text: str, count: int) -> str:
    """The first `count` words, blanks made single."""
    return " ".join(text.split()[:count])


def rouge_words(text: str) -> list[str]:
    """What ROUGE's tokenizer keeps: `[a-z0-9]` alone."""
    return _LATIN_WORD.findall(text.lower())


def paragraphs(text: str) -> list[str]:
    """The paragraphs; a text without blank lines or lines is cut after every few sentences."""
    for pattern in (r"\n\s*\n", r"\n"):
        parts = [part.strip() for part in re.split(pattern, text) if part.strip()]
        if len(parts) > 2:
            return parts
    parts = sentences(text)
    return [" ".join(parts[i : i + _SENTENCES_A_PARAGRAPH]) for i in range(0, len(parts), _SENTENCES_A_PARAGRAPH)]


def arrange(document: str, reference: str, condition: str, *, seed: int, id: str) -> str:
    """The document under a condition that catches a truncation in disguise.

    Args:
        condition: `plain`; `shuffled`: the paragraphs in an order drawn from the seed and the id; `key-last`: the
            paragraph that shares most words with the reference (the first one without a reference) goes to the end.
    """
    if condition == "plain":
        return document
    parts = paragraphs(document)
    if condition == "shuffled":
        random.Random(f"{seed}:{id}").shuffle(parts)
    else:
        wanted = Counter(rouge_words(reference))
        scores = [sum((Counter(rouge_words(part)) & wanted).values()) for part in parts]
        parts.append(parts.pop(scores.index(max(scores))))
    return "\n\n".join(parts)


def needs_sumy() -> None:
    """Raises ConfigError where LexRank cannot be had."""
    if importlib.util.find_spec("sumy") is None:
        raise ConfigError("the LexRank row of every table needs sumy", "type: pip install 'auvsum[eval]'")


def lexrank(document: str, words: int) -> str:
    """LexRank (Erkan and Radev 2004) by `sumy`: its best sentences in the document's order, cut to `words` words.

    Raises:
        ConfigError: `sumy` is not installed.
    """
    needs_sumy()
    found = [_Sentence(i, text, tuple(rouge_words(text) or text.split())) for i, text in enumerate(sentences(document))]

    def enough(ranked: list[Any]) -> list[Any]:
        """The best sentences that together have the words wanted."""
        total, best = 0, []
        for info in ranked:
            if total >= words:
                break
            best.append(info)
            total += len(info.sentence.text.split())
        return best

    best = _ranker()(_Document(tuple(found)), enough) if words else ()
    return first_words(" ".join(sentence.text for sentence in best), words)


def _ranker() -> Any:
    """sumy's LexRank with its loops over pairs of sentences as one product: seconds instead of half an hour."""
    import numpy
    from sumy.summarizers.lex_rank import LexRankSummarizer

    class Ranker(LexRankSummarizer):  # type: ignore[misc]
        @staticmethod
        def _compute_idf(sentences: list[list[str]]) -> dict[str, float]:
            found = Counter(word for sentence in sentences for word in set(sentence))
            return {word: math.log(len(sentences) / (1 + number)) for word, number in found.items()}

        def _create_matrix(
            self,
            sentences: list[list[str]],
            threshold: float,
            tf_metrics: list[dict[str, float]],
            idf_metrics: dict[str, float],
        ) -> Any:
            columns = {word: column for column, word in enumerate(idf_metrics)}
            vectors = numpy.zeros((len(sentences), len(columns)))
            for row, metrics in enumerate(tf_metrics):
                for word, tf in metrics.items():
                    vectors[row, columns[word]] = tf * idf_metrics[word]
            lengths = numpy.linalg.norm(vectors, axis=1, keepdims=True)
            vectors /= numpy.where(lengths > 0, lengths, 1)
            alike = (vectors @ vectors.T > threshold).astype(float)
            return alike / numpy.maximum(alike.sum(1, keepdims=True), 1)

    return Ranker()


@dataclass(frozen=True)
class _Sentence:
    """As sumy wants it."""

    number: int
    text: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class _Document:
    """As sumy wants it."""

    sentences: tuple[_Sentence, ...]

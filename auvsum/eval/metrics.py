"""Scores of summaries against references, and statistics over documents. Percent throughout."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from auvsum.errors import MetricError
from auvsum.eval.texts import rouge_words, sentences

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
_RESAMPLES = 2000


class Rouge:
    """ROUGE-1, -2, -L and -Lsum F1 by `rouge-score`, stemmed; -Lsum gets one sentence a line."""

    def __init__(self) -> None:
        from rouge_score.rouge_scorer import RougeScorer

        self._scorer: Any = RougeScorer(list(ROUGE), use_stemmer=True)

    def scores(self, hypothesis: str, reference: str) -> dict[str, float]:
        """F1 in percent by name; 0 for an empty hypothesis.

        Raises:
            MetricError: an empty reference.
        """
        if not reference.strip():
            raise MetricError("ROUGE was asked to compare with an empty reference", "leave such rows out")
        found = self._scorer.score("\n".join(sentences(reference)), "\n".join(sentences(hypothesis)))
        return {name: 100 * found[name].fmeasure for name in ROUGE}


def rouge_sees(text: str) -> bool:
    """Whether ROUGE's tokenizer, which keeps only `[a-z0-9]`, finds at least a third of the words of a text."""
    words = text.split()
    return not words or 3 * sum(1 for word in words if rouge_words(word)) >= len(words)


@dataclass(frozen=True)
class Estimate:
    """A mean over documents with its 95% bootstrap interval; `count` documents."""

    mean: float
    low: float
    high: float
    count: int

    def record(self) -> dict[str, float]:
        """For JSON."""
        return {"mean": self.mean, "low": self.low, "high": self.high, "n": self.count}


def estimate(values: Sequence[float], seed: int = 0) -> Estimate:
    """The mean and its percentile bootstrap interval over documents (2,000 resamples).

    Raises:
        MetricError: no values, or one that is not a number: it is never averaged away.
    """
    if not values:
        raise MetricError("there is nothing to average", "measure at least one document")
    for value in values:
        if not math.isfinite(value):
            raise MetricError(f"a score is {value}", "it must be a number; look at the run's samples.jsonl")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Estimate(mean, mean, mean, 1)
    draw = random.Random(seed)
    means = sorted(math.fsum(draw.choices(values, k=len(values))) / len(values) for _ in range(_RESAMPLES))
    return Estimate(mean, means[int(0.025 * _RESAMPLES)], means[int(0.975 * _RESAMPLES) - 1], len(values))


def paired(first: Sequence[float], second: Sequence[float], seed: int = 0) -> Estimate:
    """The mean difference `first - second` over the same documents, with its interval."""
    return estimate([a - b for a, b in zip(first, second, strict=True)], seed)

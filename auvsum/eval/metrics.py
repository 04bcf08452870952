"""Scores of summaries against references, and statistics over documents. Percent throughout."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from types import SimpleNamespace
from typing import Any

from auvsum.errors import MetricError
from auvsum.eval.texts import rouge_words, sentences

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
_RESAMPLES = 2000
#: Pieces of work a process of `rouge_scores` gets, so that none waits long for the last.
_PIECES_A_JOB = 4

#: A summary and its reference.
Pair = tuple[str, str]


class Rouge:
    """ROUGE-1, -2, -L and -Lsum F1 by `rouge-score`, stemmed; -Lsum gets one sentence a line."""

    def __init__(self) -> None:
        self._scorer: Any = _rouge_scorer().RougeScorer(list(ROUGE), tokenizer=_Tokenizer())

    def scores(self, hypothesis: str, reference: str) -> dict[str, float]:
        """F1 in percent by name; 0 for an empty hypothesis.

        Raises:
            MetricError: an empty reference.
        """
        if not reference.strip():
            raise MetricError("ROUGE was asked to compare with an empty reference", "leave such rows out")
        found = self._scorer.score("\n".join(sentences(reference)), "\n".join(sentences(hypothesis)))
        return {name: 100 * float(found[name].fmeasure) for name in ROUGE}


def rouge_scores(pairs: Sequence[Pair], jobs: int = 1) -> list[dict[str, float]]:
    """`Rouge.scores` of each pair, by `jobs` processes; fastest where pairs of one reference follow each other."""
    if jobs == 1:
        return _rouge_scores(pairs)
    size = max(1, -(-len(pairs) // (jobs * _PIECES_A_JOB)))
    with get_context("spawn").Pool(jobs) as pool:
        parts = pool.map(_rouge_scores, [pairs[i : i + size] for i in range(0, len(pairs), size)], chunksize=1)
    return [one for part in parts for one in part]


def _rouge_scores(pairs: Sequence[Pair]) -> list[dict[str, float]]:
    rouge = Rouge()
    return [rouge.scores(hypothesis, reference) for hypothesis, reference in pairs]


class _Tokenizer:
    """`rouge-score`'s words, stemmed as by its own tokenizer, but each text and each word once: a reference comes again
    with every summary, and the stemmer takes longer than all scores together."""

    def __init__(self) -> None:
        from nltk.stem.porter import PorterStemmer
        from rouge_score.tokenize import tokenize

        stemmer = SimpleNamespace(stem=lru_cache(maxsize=100_000)(PorterStemmer().stem))
        self.tokenize = lru_cache(maxsize=1000)(lambda text: tokenize(text, stemmer))


def _rouge_scorer() -> Any:
    """`rouge-score`'s module with longest common subsequences found faster: the same ones, so the scores are the same.

    It is a copy of our own, what others import stays as it is.
    """
    spec = importlib.util.find_spec("rouge_score.rouge_scorer")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cell_by_cell = module._lcs_table

    def lcs_ind(ref: list[str], can: list[str]) -> list[int]:
        # A word of `ref` that `can` lacks is in no common subsequence, and the walk back always steps over it.
        shared = set(can)
        places = [i for i, word in enumerate(ref) if word in shared]
        words = [ref[i] for i in places]
        return [places[i] for i in module._backtrack_norec(cell_by_cell(words, can), words, can)]

    module.lcs_ind, module._lcs_table = lcs_ind, _lcs_table
    return module


def _lcs_table(ref: list[str], can: list[str]) -> Any:
    """Lengths of longest common subsequences `[len(ref) + 1, len(can) + 1]`, one word of `can` after the other."""
    import numpy

    numbers: dict[str, int] = {}
    words, others = (numpy.array([numbers.setdefault(w, len(numbers)) for w in text]) for text in (ref, can))
    table = numpy.zeros((len(can) + 1, len(ref) + 1), dtype=numpy.int32)
    for row, word in enumerate(others, 1):
        longer = numpy.maximum(table[row - 1, 1:], table[row - 1, :-1] + (words == word))
        numpy.maximum.accumulate(longer, out=table[row, 1:])
    return table.T


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
    means = _resampled_means(values, seed)
    return Estimate(mean, means[int(0.025 * _RESAMPLES)], means[int(0.975 * _RESAMPLES) - 1], len(values))


def _resampled_means(values: Sequence[float], seed: int) -> list[float]:
    import numpy

    means = numpy.asarray(values, dtype=float)[_draws(len(values), seed)].sum(1) / len(values)
    found: list[float] = numpy.sort(means).tolist()
    return found


@lru_cache(maxsize=8)
def _draws(count: int, seed: int) -> Any:
    """Which of `count` values each resample takes `[2000, count]`: those of `random.Random(seed).choices`."""
    import numpy

    draw = numpy.random.RandomState([seed])  # seeded by a list, its numbers are those of Python's own generator
    return (draw.random_sample((_RESAMPLES, count)) * count).astype(numpy.intp)


def paired(first: Sequence[float], second: Sequence[float], seed: int = 0) -> Estimate:
    """The mean difference `first - second` over the same documents, with its interval."""
    return estimate([a - b for a, b in zip(first, second, strict=True)], seed)

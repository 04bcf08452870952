"""The sentences of a text that are most like all the others: LexRank (Erkan and Radev 2004). No model."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence

from auvsum.text.windows import Count, sentence_spans

#: Sentences that are ranked together: matrices grow with the square, and each part of a text keeps its share.
BLOCK = 512
#: Two sentences are neighbours from this cosine on, and the share of rank that does not come from neighbours: both the
#: paper's.
_ALIKE, _DAMPING = 0.1, 0.15
_TURNS = 50
#: A sentence with fewer words says nothing by itself, one with more characters is none.
_FEWEST_WORDS, _LONGEST = 5, 2000
_WORD = re.compile(r"[^\W_]+")


def central_sentences(text: str, room: int, count: Count) -> str:
    """The central sentences of a text in its order, of at most about `room` tokens in all.

    Every stretch of `BLOCK` sentences gets a share of the room that is as large as its own of the text.

    Args:
        count: how many tokens each of some strings has.

    Returns:
        an empty text where there are no sentences.
    """
    blocks = list(_blocks(text))
    length = sum(end - start for block in blocks for start, end, _ in block)
    chosen: list[tuple[int, int]] = []
    spent = done = 0
    for block in blocks:
        done += sum(end - start for start, end, _ in block)
        tokens = count([text[start:end] for start, end, _ in block])
        ranks = lexrank([words for *_, words in block])
        for at in sorted(range(len(block)), key=lambda at: -ranks[at]):
            # What one block leaves over is the next one's.
            if spent + tokens[at] + 1 <= room * done // length:
                spent += tokens[at] + 1
                chosen.append(block[at][:2])
    return _joined(text, sorted(chosen))


def _blocks(text: str) -> Iterator[list[tuple[int, int, tuple[str, ...]]]]:
    """Start, end and words of the sentences that can stand by themselves, each wording once, block by block."""
    block: list[tuple[int, int, tuple[str, ...]]] = []
    known: set[int] = set()
    for start, end in sentence_spans(text):
        words = tuple(match[0].lower() for match in _WORD.finditer(text, start, end))
        if len(words) < _FEWEST_WORDS or end - start > _LONGEST or hash(words) in known:
            continue
        known.add(hash(words))
        block.append((start, end, words))
        if len(block) == BLOCK:
            yield block
            block = []
    if block:
        yield block


def lexrank(sentences: Sequence[Sequence[str]]) -> list[float]:
    """The rank of each sentence among the others, given its words.

    Cosines of term frequencies weighted by inverse sentence frequency, neighbours from a threshold on, PageRank.
    """
    import numpy

    frequency = Counter(word for words in sentences for word in set(words))
    columns = {word: column for column, word in enumerate(frequency)}
    vectors = numpy.zeros((len(sentences), len(columns)), dtype=numpy.float32)
    for row, words in enumerate(sentences):
        for word, number in Counter(words).items():
            vectors[row, columns[word]] = number * math.log(1 + len(sentences) / frequency[word])
    vectors /= numpy.linalg.norm(vectors, axis=1, keepdims=True)
    alike = (vectors @ vectors.T > _ALIKE).astype(numpy.float32)  # each is its own neighbour
    alike /= alike.sum(1, keepdims=True)
    ranks = numpy.full(len(sentences), 1 / len(sentences), dtype=numpy.float32)
    for _ in range(_TURNS):
        ranks = _DAMPING / len(sentences) + (1 - _DAMPING) * (alike.T @ ranks)
    found: list[float] = ranks.tolist()
    return found


def _joined(text: str, spans: Sequence[tuple[int, int]]) -> str:
    """Sentences that follow each other stay together; where something was left out a new line begins."""
    parts: list[str] = []
    last = -1
    for start, end in spans:
        if parts:
            parts.append(" " if not text[last:start].strip() and "\n" not in text[last:start] else "\n")
        parts.append(" ".join(text[start:end].split()))
        last = end
    return "".join(parts)

"""The sentences of a text that are most like all the others: LexRank (Erkan and Radev 2004). No model."""

from __future__ import annotations

import math
import re
from bisect import bisect
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from itertools import islice

from auvsum.text.windows import Count, Window, sentence_spans, sentences

#: Sentences that are ranked together: matrices grow with the square, and each part of a text keeps its share.
BLOCK = 512
#: Two sentences are neighbours from this cosine on, and the share of rank that does not come from neighbours: both the
#: paper's.
_ALIKE, _DAMPING = 0.1, 0.15
_TURNS = 50
#: Sentences of summaries that are ranked at most; of more, some.
_MOST = 4096
#: A sentence with fewer words says nothing by itself, one with more characters is none.
_FEWEST_WORDS, _LONGEST = 5, 2000
#: The shares of a summary from windows that are the document's own sentences: its first, and its central ones. Chosen
#: on one half of the documents (docs/LOG.md).
OPENING, CENTRAL = 0.25, 0.25
_WORD = re.compile(r"[^\W_]+")


def central_sentences(text: str, room: int, count: Count) -> str:
    """The central sentences of a text in its order, of at most about `room` tokens in all: see `central_spans`.

    Args:
        count: how many tokens each of some strings has.

    Returns:
        an empty text where there are no sentences.
    """
    return _joined(text, central_spans(text, room, count))


def central_spans(text: str, room: int, count: Count, behind: int = 0) -> list[tuple[int, int]]:
    """Start and end of the central sentences of a text in its order, of at most about `room` tokens in all.

    Every stretch of `BLOCK` sentences gets a share of the room that is as large as its own of the text.

    Args:
        count: how many tokens each of some strings has.
        behind: sentences that begin before this character are left out.
    """
    length = sum(end - start for block in _blocks(text, behind) for start, end, _ in block)
    chosen: list[tuple[int, int]] = []
    spent = done = 0
    for block in _blocks(text, behind):
        done += sum(end - start for start, end, _ in block)
        tokens = count([text[start:end] for start, end, _ in block])
        ranks = lexrank([words for *_, words in block])
        for at in sorted(range(len(block)), key=lambda at: -ranks[at]):
            # What one block leaves over is the next one's.
            if spent + tokens[at] + 1 <= room * done // length:
                spent += tokens[at] + 1
                chosen.append(block[at][:2])
    return sorted(chosen)


def gathered(windows: Sequence[Window], parts: Sequence[str], room: int, count: Count, most: int | None = None) -> str:
    """A summary of a document: its first sentences, its central ones, and the best of its windows' summaries.

    In the order of the document, of at most `room` tokens and `most` sentences. The document's own have at most
    `OPENING` and `CENTRAL` of both, and nothing where no window has a summary.

    Args:
        parts: the summary of each window.
        count: how many tokens each of some strings has.
    """
    if not any(_words(sentence) for part in parts for sentence in _whole(part)):
        return ""
    text = windows[0].source
    own, left = [], int(OPENING * room)
    for start, end, _ in islice(_standing(text), int(OPENING * most) if most else None):
        left -= count([text[start:end]])[0] + 1
        if left < 0:
            break
        own.append((start, end))
    opened = own[-1][1] if own else 0
    own += central_spans(text, int(CENTRAL * room), count, opened)[: int(CENTRAL * most) if most else None]
    said = [" ".join(text[start:end].split()) for start, end in own]
    room -= sum(count(said)) + len(own) if own else 0
    written = best_sentences(parts, room, count, most - len(own) if most else None, said)
    # What is written of a window comes before its own sentences, but for the document's first ones.
    ends = [window.end for window in windows]
    placed = [(number, 0, sentence) for number, sentence in written]
    for (start, end), sentence in zip(own, said, strict=True):
        placed.append((-1 if end <= opened else bisect(ends, start), 1, sentence))
    return " ".join(sentence for *_, sentence in sorted(placed, key=lambda one: one[:2]))


def best_sentences(
    parts: Sequence[str], room: int, count: Count, most: int | None = None, known: Collection[str] = ()
) -> list[tuple[int, str]]:
    """The central sentences of several summaries in their order, of at most `room` tokens and `most` in number.

    Each summary has one before any has two. The one that says most is kept even where it is too long.

    Args:
        known: sentences that are not wanted again.

    Returns:
        the number of the summary and the sentence, for each.
    """
    found: dict[str, tuple[int, tuple[str, ...]]] = {}
    for number, part in enumerate(parts):
        for text in _whole(part):
            if (words := _words(text)) and text not in known:
                found.setdefault(text, (number, words))
    some = list(found)[:: -(-len(found) // _MOST) or 1]
    if not some:
        return []
    ranks = dict(zip(some, lexrank([found[text][1] for text in some]), strict=True))
    left = sorted(some, key=lambda text: -ranks[text])
    tokens = dict(zip(left, count(left), strict=True))
    chosen = [left.pop(0)]
    served = {found[chosen[0]][0]}
    room -= tokens[chosen[0]] + 1
    while left and len(chosen) < (most or len(some)):
        following = next((text for text in left if found[text][0] not in served and tokens[text] < room), None)
        if following is not None:
            left.remove(following)
            chosen.append(following)
            served.add(found[following][0])
            room -= tokens[following] + 1
        elif served:  # all that can have had their turn
            served = set()
        else:
            break
    return [(found[text][0], text) for text in some if text in chosen]


def _whole(part: str) -> list[str]:
    """The sentences of a summary; without the last one where that was cut off and is not the only one."""
    found = [" ".join(text.split()) for text in sentences(part)]
    return found[:-1] if len(found) > 1 and found[-1][-1].isalnum() else found


def _words(text: str) -> tuple[str, ...]:
    return tuple(match[0].lower() for match in _WORD.finditer(text))


def _blocks(text: str, behind: int) -> Iterator[list[tuple[int, int, tuple[str, ...]]]]:
    """Start, end and words of the sentences that can stand by themselves, each wording once, block by block."""
    block: list[tuple[int, int, tuple[str, ...]]] = []
    known: set[int] = set()
    for start, end, words in _standing(text):
        if start < behind or hash(words) in known:
            continue
        known.add(hash(words))
        block.append((start, end, words))
        if len(block) == BLOCK:
            yield block
            block = []
    if block:
        yield block


def _standing(text: str) -> Iterator[tuple[int, int, tuple[str, ...]]]:
    """Start, end and words of the sentences that can stand by themselves."""
    for start, end in sentence_spans(text):
        words = _words(text[start:end])
        if len(words) >= _FEWEST_WORDS and end - start <= _LONGEST:
            yield start, end, words


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

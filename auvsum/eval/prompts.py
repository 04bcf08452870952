"""The two prompts of the evaluation: the zero-shot one that people use, and the paper's with five examples.

The paper's (as H2O took it over from HELM), five times with a summary and once without:

    ###
    Article: ...

    Summarize the above article in 1 sentence.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from auvsum.errors import DatasetError, DocumentEmpty, DocumentTooLong
from auvsum.eval.datasets import Example
from auvsum.eval.tasks import Task
from auvsum.text.prompts import Prompt, build_prompt, plain_prompt, truncate_document

#: What ends a summary in the prompt with examples.
STOP = "###"
SHOTS = 5
_LEAST_DOCUMENT = 16


@dataclass(frozen=True)
class Asked:
    """A document as a model gets it.

    Attributes:
        document_tokens: before any cut. cut_tokens: how many of them the harness took away.
    """

    prompt: Prompt
    document_tokens: int
    cut_tokens: int


class Prompter:
    """Builds the prompts of one setting.

    Args:
        shots: the examples to put first; none for the zero-shot prompt.
        max_document_tokens: longer documents are cut at their end. positions: the model's limit.
    """

    def __init__(
        self,
        tokenizer: Any,
        task: Task,
        shots: Sequence[Example],
        *,
        max_document_tokens: int | None,
        max_tokens: int | None,
        positions: int | None,
    ) -> None:
        self.tokenizer, self.task, self.shots = tokenizer, task, list(shots)
        self.max_document_tokens, self.positions = max_document_tokens, positions
        self.max_new_tokens = max_tokens or task.max_new_tokens or self._build("a", self.shots).max_new_tokens

    @property
    def setting(self) -> str:
        """What every result says about its prompt."""
        length = f"{self.task.sentences} sentence(s)" if self.task.sentences else "free length"
        kind = f"{len(self.shots)}-shot ### prompt" if self.shots else "zero-shot"
        return f"{kind}, {length}, at most {self.max_new_tokens} new tokens"

    def ask(self, document: str) -> Asked:
        """The prompt of a document.

        Raises:
            DocumentEmpty: there is no text. DocumentTooLong: it does not fit the model's positions.
        """
        if not document.strip():
            raise DocumentEmpty("the document is empty", "give it some text")
        prompt = self._build(document, self.shots)
        tokens = prompt.document[1] - prompt.document[0]
        if self.max_document_tokens is not None and tokens > self.max_document_tokens:
            prompt, _ = truncate_document(prompt, len(prompt.ids) - tokens + self.max_document_tokens)
        needed = len(prompt.ids) + self.max_new_tokens
        if self.positions is not None and needed > self.positions:
            room = self.positions - needed + (prompt.document[1] - prompt.document[0])
            raise DocumentTooLong(
                f"prompt and summary need {needed:,} tokens, the model has {self.positions:,} positions",
                f"--max-document-tokens {room} would fit this one" if room > 0 else "use a model with more positions",
            )
        return Asked(prompt, tokens, tokens - (prompt.document[1] - prompt.document[0]))

    def truncated(self, asked: Asked, tokens: int) -> Prompt:
        """The prompt cut to about `tokens` tokens: without examples, its document cut at its end, to 16 at least."""
        start, end = asked.prompt.document
        bare = self._bare(asked.prompt.ids[start:end])
        frame = len(bare.ids) - (bare.document[1] - bare.document[0])
        return truncate_document(bare, frame + max(_LEAST_DOCUMENT, tokens - frame))[0]

    def text(self, token_ids: Sequence[int]) -> str:
        """A summary's text: up to the next example, if the model went on to write one."""
        text: str = self.tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return (text.split(STOP)[0] if self.shots else text).strip()

    def scored(self, token_ids: Sequence[int]) -> int:
        """How many of a summary's tokens lie before the next example."""
        if not self.shots or STOP not in self.tokenizer.decode(list(token_ids), skip_special_tokens=True):
            return len(token_ids)
        low = next(
            i
            for i in range(1, len(token_ids) + 1)
            if STOP in self.tokenizer.decode(list(token_ids[:i]), skip_special_tokens=True)
        )
        return low - 1

    def _bare(self, document_ids: tuple[int, ...]) -> Prompt:
        """The frame without examples around the same document tokens."""
        frame = self._build("a", ())
        start, end = frame.document
        ids = (*frame.ids[:start], *document_ids, *frame.ids[end:])
        return replace(frame, ids=ids, document=(start, start + len(document_ids)))

    def _build(self, document: str, shots: Sequence[Example]) -> Prompt:
        if not self.shots:
            prompt = build_prompt(self.tokenizer, document, sentences=self.task.sentences)
            return prompt
        number = self.task.sentences or 1
        ask = f"\n\nSummarize the above article in {number} sentence{'s' if number > 1 else ''}.\n"
        before = "".join(f"{STOP}\nArticle: {shot.document}{ask}{shot.reference}\n\n" for shot in shots)
        return plain_prompt(
            self.tokenizer,
            f"{before}{STOP}\nArticle: ",
            document,
            ask,
            template=f"{len(shots)}-shot",
            max_new_tokens=64,
        )


def choose_shots(examples: Sequence[Example], seed: int) -> list[Example]:
    """Five examples for the prompt, drawn from the shorter half: they must fit into 2,048 positions with an article.

    They are taken out of what is measured.

    Raises:
        DatasetError: too few rows with a document and a summary.
    """
    whole = [example for example in examples if example.document.strip() and example.reference]
    if len(examples) <= SHOTS or len(whole) < SHOTS:
        raise DatasetError(
            f"{len(whole)} whole rows are too few for {SHOTS} examples and something to measure", "type: --shots 0"
        )
    whole.sort(key=lambda example: (len(example.document), example.id))
    shorter = whole[: max(SHOTS, len(whole) // 5)]
    return random.Random(seed).sample(shorter, SHOTS)

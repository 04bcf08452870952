"""Text -> token ids, with the span of ids that is the document. Pure data: no tensors, no model.

A prompt is `frame + document + frame`, each tokenized on its own: the span is exact whatever the tokenizer merges, and
text inside the document that looks like a control token (`<|im_end|>`, `</s>`) stays text.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Any

from auvsum.errors import DocumentTooLong, TemplateError
from auvsum.text import styles
from auvsum.text.templates import Template, load_template

#: Stands for the document while a chat template is rendered; letters only, so that no template changes it.
_SENTINEL = "AUVSUMxDOCUMENTxGOESxHERE"
_TOKENS_PER_SENTENCE = 40
#: Characters that are tokenized at a time, of texts longer than twice that; and of the trial that it changes nothing.
_PIECE = 2**17
_TRIAL = 2000
_BLANK_IN_WORDS = re.compile(r"(?<=[a-z]) (?=[a-z])")
_TOKENS_PER_WORD = 1.6


@dataclass(frozen=True)
class Prompt:
    """Token ids that a model reads.

    Attributes:
        document: start and end (exclusive) of the document's ids in `ids`.
        template: the template's name, or the path it was read from.
        max_new_tokens: how many new tokens the length asked for may need.
    """

    ids: tuple[int, ...]
    document: tuple[int, int]
    template: str
    max_new_tokens: int

    @property
    def frame_tokens(self) -> int:
        """Tokens that are not the document."""
        return len(self.ids) - (self.document[1] - self.document[0])


def build_prompt(
    tokenizer: Any,
    document: str,
    *,
    template: str = "auto",
    instruction: str | None = None,
    sentences: int | None = None,
    words: int | None = None,
    query: str | None = None,
    style: str | None = None,
) -> Prompt:
    """Puts a document to a model.

    Args:
        tokenizer: a transformers tokenizer.
        template: `chat`, `completion`, `auto` (chat where the tokenizer has a chat template), or a YAML file.
        instruction: what to ask for, instead of the template's own instruction.
        query: a question, which is asked in place of an instruction.
        style: `paragraph` or `bullets`, which a chat model is asked for.

    Raises:
        TemplateError: the template is not to be had, or does not fit the tokenizer.
    """
    if template == "auto":
        template = "chat" if getattr(tokenizer, "chat_template", None) else "completion"
    form = load_template(template)
    asked = form.ask(styles.question(query) if query and instruction is None else instruction, sentences, words)
    if query and instruction is not None:
        asked = f"{asked} {styles.question(query)}"
    if form.kind == "chat":
        asked += styles.ASKED[style]
    before, after = form.frame(asked)
    if form.kind == "chat":
        before, after = _render_chat(tokenizer, form.system, before, after)
        head = _encode(tokenizer, before)
    else:
        head = [*_leading_ids(tokenizer), *_encode(tokenizer, before)]
    body = _encode_data(tokenizer, document)
    return Prompt(
        ids=(*head, *body, *_encode(tokenizer, after)),
        document=(len(head), len(head) + len(body)),
        template=template,
        max_new_tokens=_new_tokens(form, sentences, words),
    )


def plain_prompt(
    tokenizer: Any, before: str, document: str, after: str, *, template: str, max_new_tokens: int
) -> Prompt:
    """A document between two texts, without chat or template: a prompt with examples, say. Nothing is a control token.

    Args:
        template: what the prompt calls its form.
    """
    head = [*_leading_ids(tokenizer), *_encode_data(tokenizer, before)]
    body = _encode_data(tokenizer, document)
    return Prompt(
        ids=(*head, *body, *_encode_data(tokenizer, after)),
        document=(len(head), len(head) + len(body)),
        template=template,
        max_new_tokens=max_new_tokens,
    )


def truncate_document(prompt: Prompt, limit: int) -> tuple[Prompt, int]:
    """Cuts the document at its end so that the whole prompt has at most `limit` tokens.

    Returns:
        The prompt and how many of its tokens were cut, 0 if it fitted.

    Raises:
        DocumentTooLong: when not one token of the document would be left.
    """
    cut = max(0, len(prompt.ids) - limit)
    start, end = prompt.document
    if cut and cut >= end - start:
        raise DocumentTooLong(
            f"the instruction takes {len(prompt.ids) - (end - start):,} of {limit:,} tokens: no room for a document",
            "shorten --instruction, or use a model with more positions",
        )
    ids = prompt.ids[: end - cut] + prompt.ids[end:]
    return replace(prompt, ids=ids, document=(start, end - cut)), cut


def _render_chat(tokenizer: Any, system: str, before: str, after: str) -> tuple[str, str]:
    """The chat template's text before and after the document."""
    if not getattr(tokenizer, "chat_template", None):
        raise TemplateError("this model has no chat template", "use --template completion")
    user = f"{before}{_SENTINEL}{after}"
    plain = [{"role": "user", "content": user}]
    with_system = [{"role": "system", "content": system}, *plain] if system else plain
    # Some templates (Gemma's) refuse a system message: there it opens the user's own.
    folded = [{"role": "user", "content": f"{system}\n\n{user}" if system else user}]
    for messages in (with_system, folded):
        try:
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
        except Exception as error:  # whatever the model's own template raises
            reason = error
            continue
        if str(text).count(_SENTINEL) == 1:
            head, _, tail = str(text).partition(_SENTINEL)
            return head, tail
        reason = ValueError("it does not keep the user's message as it is")
    raise TemplateError(f"the model's chat template failed: {reason}", "use --template completion") from reason


def _encode(tokenizer: Any, text: str) -> list[int]:
    """Text of the frame: control tokens in it are meant."""
    return list(tokenizer.encode(text, add_special_tokens=False)) if text else []


def _encode_data(tokenizer: Any, text: str) -> list[int]:
    """Text of the document: nothing in it is a control token."""
    pieces = safe_pieces(tokenizer, text)
    if len(pieces) > 1:
        return [i for piece in pieces for i in _encode_data(tokenizer, piece)]
    ids = list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False))
    control = {i: str(t) for i, t in tokenizer.added_tokens_decoder.items() if t.special and str(t) in text}
    if control.keys().isdisjoint(ids):
        return ids
    # A tokenizer that ignores `split_special_tokens`: hand it each such token in two parts.
    cuts = re.compile("|".join(f"(?<={re.escape(t[0])})(?={re.escape(t[1:])})" for t in control.values() if len(t) > 1))
    return [i for part in cuts.split(text) for i in tokenizer.encode(part, add_special_tokens=False, verbose=False)]


def safe_pieces(tokenizer: Any, text: str) -> list[str]:
    """A long text in pieces that tokenize by themselves as they do together, so that no step holds much of it.

    Byte-pair tokenizers look at a word with the blank before it: a cut there changes nothing. Tokenizers that treat the
    start of a text in a way of their own are found out by a trial on the text itself, which then stays whole.
    """
    if len(text) <= 2 * _PIECE:
        return [text]
    pieces, start = [], 0
    while len(text) - start > 2 * _PIECE:
        cut = next((m.start() for m in _BLANK_IN_WORDS.finditer(text, start + _PIECE, start + 2 * _PIECE)), -1)
        if cut < 0:
            return [text]
        pieces.append(text[start:cut])
        start = cut
    pieces.append(text[start:])
    left, right = pieces[0][-_TRIAL:], pieces[1][:_TRIAL]

    def encoded(part: str) -> list[int]:
        return list(tokenizer.encode(part, add_special_tokens=False, verbose=False))

    return pieces if encoded(left) + encoded(right) == encoded(left + right) else [text]


def _leading_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before any text: `</s>` for OPT, `<s>` for Llama, nothing for others."""
    marked, bare = tokenizer.encode("a"), tokenizer.encode("a", add_special_tokens=False)
    at = next((i for i in range(len(marked)) if marked[i : i + len(bare)] == bare), 0)
    return list(marked[:at])


def _new_tokens(form: Template, sentences: int | None, words: int | None) -> int:
    """Room for the length asked for, with some to spare: 3 sentences -> 128."""
    wanted = [form.max_new_tokens] if sentences is None and words is None else []
    if sentences is not None:
        wanted.append(sentences * _TOKENS_PER_SENTENCE + 8)
    if words is not None:
        wanted.append(math.ceil(words * _TOKENS_PER_WORD) + 32)
    return max(wanted)

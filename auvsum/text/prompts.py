"""Text -> token ids, with the span of ids that is the document. Pure data: no tensors, no model.

A prompt is `frame + document + frame`, each tokenized on its own: the span is exact whatever the tokenizer merges, and
text inside the document that looks like a control token (`<|im_end|>`, `</s>`) stays text.
"""

from __future__ import annotations

import math
import re
import string
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from auvsum.config import nearest_hint
from auvsum.errors import DocumentTooLong, TemplateError

#: Stands for the document while a chat template is rendered; letters only, so that no template changes it.
_SENTINEL = "AUVSUMxDOCUMENTxGOESxHERE"
_TOKENS_PER_SENTENCE = 40
_TOKENS_PER_WORD = 1.6


@dataclass(frozen=True)
class Template:
    """How a document is put to a model.

    Attributes:
        kind: `chat` (rendered through the tokenizer's chat template) or `completion` (plain text).
        body: the text, with the fields `{document}` (exactly once) and `{instruction}`; `{{` is a brace.
        instruction: what is asked when no length is asked for.
        sized_instruction: the same with the field `{length}`.
        system: system message of a chat; empty for none.
        one_sentence, sentences, length_words: phrases for `{length}`; `{n}` is the number.
        max_new_tokens: the most new tokens when no length is asked for.
    """

    kind: str
    body: str
    instruction: str
    sized_instruction: str
    system: str = ""
    one_sentence: str = "one sentence"
    sentences: str = "{n} sentences"
    length_words: str = "about {n} words"
    max_new_tokens: int = 192

    def __post_init__(self) -> None:
        if self.kind not in ("chat", "completion"):
            raise TemplateError(f"template kind {self.kind!r} is unknown", "use chat or completion")
        for name, value in vars(self).items():
            if name == "max_new_tokens":
                if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                    raise TemplateError(f"template max_new_tokens must be a whole number from 1, not {value!r}")
            elif not isinstance(value, str):
                raise TemplateError(f"template {name} must be text, not {value!r}", "quote it")
        if _fields_of(self.body, "body", {"document", "instruction"}).count("document") != 1:
            raise TemplateError("template body must have {document} exactly once", "for example 'Article: {document}'")
        _fields_of(self.sized_instruction, "sized_instruction", {"length"})
        for name in ("one_sentence", "sentences", "length_words"):
            _fields_of(getattr(self, name), name, {"n"})

    def length(self, sentences: int | None, words: int | None) -> str:
        """The length asked for as a phrase; empty if none."""
        phrases = []
        if sentences is not None:
            phrases.append((self.one_sentence if sentences == 1 else self.sentences).format(n=sentences))
        if words is not None:
            phrases.append(self.length_words.format(n=words))
        return ", ".join(phrases)

    def ask(self, instruction: str | None, sentences: int | None, words: int | None) -> str:
        """The instruction with its length. One given by the user may hold `{length}`; else the length follows it."""
        length = self.length(sentences, words)
        if instruction is None:
            return self.sized_instruction.format(length=length) if length else self.instruction
        if "{length}" in instruction:
            return instruction.replace("{length}", length or "a few sentences")
        return f"{instruction} Length: {length}." if length else instruction

    def frame(self, instruction: str) -> tuple[str, str]:
        """The text before the document and the text after it."""
        before, after = self.body.split("{document}")
        return before.format(instruction=instruction), after.format(instruction=instruction)


CHAT = Template(
    kind="chat",
    system="You summarize documents. Use only what the document says. Answer with the summary alone.",
    body="{document}\n\n{instruction}",
    instruction="Summarize the text above in a few sentences.",
    sized_instruction="Summarize the text above in {length}.",
)
COMPLETION = Template(
    kind="completion",
    body="Article: {document}\n\n{instruction}",
    instruction="TL;DR:",
    sized_instruction="TL;DR in {length}:",
    max_new_tokens=96,
)


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


def build_prompt(
    tokenizer: Any,
    document: str,
    *,
    template: str = "auto",
    instruction: str | None = None,
    sentences: int | None = None,
    words: int | None = None,
) -> Prompt:
    """Puts a document to a model.

    Args:
        tokenizer: a transformers tokenizer.
        template: `chat`, `completion`, `auto` (chat where the tokenizer has a chat template), or a YAML file.
        instruction: what to ask for, instead of the template's own instruction.

    Raises:
        TemplateError: the template is not to be had, or does not fit the tokenizer.
    """
    if template == "auto":
        template = "chat" if getattr(tokenizer, "chat_template", None) else "completion"
    form = load_template(template)
    before, after = form.frame(form.ask(instruction, sentences, words))
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


def load_template(template: str) -> Template:
    """A built-in template by name (`auto` stands for `chat` here), or one from a YAML file.

    Raises:
        TemplateError: no such name or file, or the file is not a template.
    """
    if template in ("auto", "chat"):
        return CHAT
    if template == "completion":
        return COMPLETION
    try:
        content = yaml.safe_load(Path(template).expanduser().read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise TemplateError(f"template {template!r} is unknown", "use chat, completion or a YAML file") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TemplateError(
            f"template {template} cannot be read as YAML", "it must hold kind, body, instruction"
        ) from error
    return _template_from(content, template)


def _template_from(content: Any, source: str) -> Template:
    """A mapping from YAML -> Template; what it leaves out comes from the built-in of its kind."""
    if not isinstance(content, dict):
        raise TemplateError(f"template {source} does not hold a mapping", "write kind, body and instruction")
    known = tuple(f.name for f in fields(Template))
    for key in content:
        if key not in known:
            raise TemplateError(f"unknown key {str(key)!r} in template {source}", nearest_hint(str(key), known))
    base = COMPLETION if content.get("kind") == "completion" else CHAT
    if "instruction" in content and "sized_instruction" not in content:
        content = {**content, "sized_instruction": f"{_escape(content['instruction'])} Length: {{length}}."}
    try:
        return replace(base, **{"kind": "chat", **content})
    except TemplateError as error:
        raise TemplateError(f"{error.message} (in {source})", error.hint) from error


def _escape(text: Any) -> str:
    return str(text).replace("{", "{{").replace("}", "}}")


def _fields_of(text: str, name: str, allowed: set[str]) -> list[str]:
    """The `{fields}` of a format string, all of them allowed."""
    try:
        found = [field for _, field, _, _ in string.Formatter().parse(text) if field is not None]
    except ValueError as error:
        raise TemplateError(f"template {name} has a lone brace: {error}", "write {{ for a brace") from error
    for field in found:
        if field not in allowed:
            known = ", ".join(sorted(allowed))
            raise TemplateError(f"template {name} has an unknown field {{{field}}}", f"fields: {known}")
    return found


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
    ids = list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False))
    control = {i: str(t) for i, t in tokenizer.added_tokens_decoder.items() if t.special and str(t) in text}
    if control.keys().isdisjoint(ids):
        return ids
    # A tokenizer that ignores `split_special_tokens`: hand it each such token in two parts.
    cuts = re.compile("|".join(f"(?<={re.escape(t[0])})(?={re.escape(t[1:])})" for t in control.values() if len(t) > 1))
    return [i for part in cuts.split(text) for i in tokenizer.encode(part, add_special_tokens=False, verbose=False)]


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

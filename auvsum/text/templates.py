"""How a document is put to a model: two built-in templates, and those of people, in YAML. No tokens in here."""

from __future__ import annotations

import string
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from auvsum.config import nearest_hint
from auvsum.errors import TemplateError


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

"""What an evaluation measures, completely described: the contents of `config.yaml`. No torch in here.

Two runs with the same configuration measure the same thing; what only changes how fast (device, threads, documents a
batch) is kept beside it, in `env.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import yaml

from auvsum.budget import parse_budget
from auvsum.config import nearest_hint, parse_option
from auvsum.errors import BudgetError, ConfigError

METRICS = ("fidelity", "rouge", "bertscore")
#: Measured only when asked for: every cache writes once more, alone, at batch 1.
THROUGHPUT = "throughput"
HALVES = ("all", "even", "odd")
CONDITIONS = ("plain", "shuffled", "key-last")
SCOPES = ("bytes", "paper")
DEFAULT_ENCODER = "all-minilm-l6-v2"


@dataclass(frozen=True)
class EvalConfig:
    """One evaluation.

    Attributes:
        dataset: a name of `auvsum eval --help` or a .jsonl or .parquet file. columns: our name -> the file's.
        policies: `auv`, or with options `auv(decay=0.9,reconstruct=false)`.
        budgets: of the budget grammar; every policy gets each of them in every scope and at every number of bits.
        shots: 0, the zero-shot prompt that people use, or 5, the paper's in-context prompt.
        condition: the order of the document's paragraphs (`conditions.py`).
        half: rows of the file with an even or an odd number, from 0 on: choose on one, report on the other.
        limit: documents; None for all. max_document_tokens: longer documents are cut, and labelled.
        max_tokens: new tokens; None lets the dataset decide.
        encoder: of BERTScore. encoder_layer: None for the encoder's own.

    Raises:
        ConfigError, BudgetError: when a value makes no sense.
    """

    dataset: str = "sample"
    columns: dict[str, str] = field(default_factory=dict)
    model: str = "smollm2-135m-instruct"
    dtype: str = "auto"
    policies: tuple[str, ...] = ("h2o", "auv")
    budgets: tuple[str, ...] = ("10%",)
    budget_scopes: tuple[str, ...] = ("bytes",)
    kv_bits: tuple[int, ...] = (16,)
    shots: int = 0
    condition: str = "plain"
    half: str = "all"
    limit: int | None = None
    seed: int = 0
    max_document_tokens: int | None = None
    max_tokens: int | None = None
    metrics: tuple[str, ...] = METRICS
    encoder: str = DEFAULT_ENCODER
    encoder_layer: int | None = None
    rescale: bool = False

    def __post_init__(self) -> None:
        for name in ("policies", "budgets", "budget_scopes", "kv_bits", "metrics"):
            values = getattr(self, name)
            if not values:
                raise ConfigError(f"{name} is empty", f"name at least one of the {name.replace('_', ' ')}")
            if len(set(values)) < len(values):
                raise ConfigError(f"{name} names something twice: {', '.join(map(str, values))}", "name each once")
        for name, known in (("metrics", (*METRICS, THROUGHPUT)), ("budget_scopes", SCOPES)):
            for value in getattr(self, name):
                if value not in known:
                    raise ConfigError(f"{name} {value!r} is unknown", nearest_hint(value, known))
        if self.condition not in CONDITIONS:
            raise ConfigError(f"condition {self.condition!r} is unknown", nearest_hint(self.condition, CONDITIONS))
        if self.half not in HALVES:
            raise ConfigError(f"half {self.half!r} is unknown", nearest_hint(self.half, HALVES))
        if self.shots not in (0, 5):
            raise ConfigError(f"shots must be 0 or 5, not {self.shots}", "5 is the paper's prompt")
        for bits in self.kv_bits:
            if bits not in (16, 8, 4):
                raise ConfigError(f"kv_bits {bits!r} is unknown", "use 16, 8 or 4")
        for name in ("limit", "max_document_tokens", "max_tokens", "encoder_layer"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}", f"leave --{name.replace('_', '-')} out")
        for column in self.columns:
            if column not in ("id", "document", "summary"):
                raise ConfigError(f"column {column!r} is unknown", "map id, document or summary")
        for budget in self.budgets:
            if parse_budget(budget).kind == "auto":
                raise BudgetError("budget 'auto' depends on the machine", "name shares, slots or sizes")
            for scope in self.budget_scopes:
                parse_budget(budget, "paper" if scope == "paper" else "bytes")
        for policy in self.policies:
            split_policy(policy)

    def to_yaml(self) -> str:
        """The text of `config.yaml`."""
        values = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}
        text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        return text

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], source: str = "the configuration") -> EvalConfig:
        """From YAML or flags; a single value stands for a list of one.

        Raises:
            ConfigError: an unknown key, or a value of the wrong type.
        """
        known = {f.name: f for f in fields(cls)}
        given: dict[str, Any] = {}
        for key, value in values.items():
            if key not in known:
                raise ConfigError(f"unknown key {str(key)!r} in {source}", nearest_hint(str(key), tuple(known)))
            given[key] = _typed(key, value, str(known[key].type), source)
        return cls(**given)


def _typed(key: str, value: Any, kind: str, source: str) -> Any:
    if kind.startswith("tuple"):
        items = value if isinstance(value, list | tuple) else [value]
        wanted: type = int if "int" in kind else str
        items = tuple(str(item) if wanted is str and isinstance(item, int | float) else item for item in items)
        good = all(isinstance(item, wanted) and not isinstance(item, bool) for item in items)
        value = items
    elif kind.startswith("dict"):
        good = isinstance(value, dict) and all(isinstance(x, str) for pair in value.items() for x in pair)
    elif kind == "bool":
        good = isinstance(value, bool)
    elif kind.startswith("int"):
        good = (value is None and "None" in kind) or (isinstance(value, int) and not isinstance(value, bool))
    else:
        good = isinstance(value, str)
    if not good:
        raise ConfigError(f"{key} has a value of the wrong kind: {value!r} (in {source})", "see `auvsum eval --help`")
    return value


def split_list(text: str) -> tuple[str, ...]:
    """`h2o,auv(decay=0.9,top_k=8)` -> its parts; commas inside brackets belong to a part."""
    parts, depth = [""], 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return tuple(part.strip() for part in parts if part.strip())


def split_policy(spec: str) -> tuple[str, dict[str, Any]]:
    """`auv(decay=0.9,reconstruct=false)` -> its name and options.

    Raises:
        ConfigError: not written like that.
    """
    name, bracket, rest = spec.partition("(")
    if not name.strip() or (bracket and not rest.endswith(")")):
        raise ConfigError(f"policy {spec!r} is not understood", "write auv, or auv(decay=0.9,reconstruct=false)")
    return name.strip(), dict(parse_option(part) for part in split_list(rest.removesuffix(")")))

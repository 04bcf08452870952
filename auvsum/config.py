"""Everything a run needs to know, and where each value came from. No torch in here: mistakes must be told at once.

Precedence: flag > `AUVSUM_*` > `--config` or `./auvsum.yaml` > `$XDG_CONFIG_HOME/auvsum/config.yaml` > default.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from auvsum.budget import Scope, parse_budget
from auvsum.errors import ConfigError

TEMPLATE_NAMES = ("auto", "chat", "completion")

_CHOICES: dict[str, tuple[Any, ...]] = {
    "budget_scope": ("bytes", "paper"),
    "kv_bits": ("auto", "16", "8", "4"),
    "strategy": ("auto", "single", "stream", "map-reduce", "map-rank", "extract"),
    "style": (None, "paragraph", "bullets"),
    "dtype": ("auto", "bf16", "fp16", "fp32", "bfloat16", "float16", "float32"),
    "weights": ("auto", "bf16", "int8", "gguf"),
}
_BATCH_SIZE = re.compile(r"auto|[1-9]\d*")
_AT_LEAST = {"chunk": 1, "window": 64, "max_tokens": 1, "sentences": 1, "words": 1, "threads": 1, "seed": 0}
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+(\+cuda:\d+)*)?")
_BOOLEANS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


@dataclass(frozen=True)
class Settings:
    """One run, completely described. Field names are the flag names with underscores.

    Attributes:
        policy: a name, or `auto`: `auv-look` on a CPU, where the budget binds and a prompt is read at once; else `auv`.
        kv_bits: of a stored key or value, or `auto`: the most with which a policy that chooses by head holds
            everything, else 4; 16 with the other policies, as their papers have it.
        chunk: tokens read at a time by the `stream` strategy.
        window: tokens of a window of a long document, or of what `extract` reads; `None` takes what measured best and
            fits the positions.
        weights: `bf16` leaves them as `dtype` says, `int8` halves them (on a CPU), `gguf` takes the 4 bits that the
            model's GGUF file has (on a CPU), `auto` decides.
        query: a question to answer instead of a summary. style: the summary's shape. cite: give sources.
        max_tokens: the most new tokens; `None` lets the requested length decide.
        repetition_penalty: how strongly tokens that the summary already has are discouraged; 1 is not at all.
        template: `auto`, `chat`, `completion`, or the path of a YAML template.
        batch_size: documents written together, or `auto`: what free memory holds. timeout: seconds a document may take.

    Raises:
        ConfigError, BudgetError: when a value makes no sense; one line that names the setting.
    """

    model: str = "smollm2-135m-instruct"
    policy: str = "auto"
    policy_options: dict[str, Any] = field(default_factory=dict)
    budget: str = "auto"
    budget_scope: Scope = "bytes"
    kv_bits: int | str = "auto"
    strategy: str = "auto"
    chunk: int = 512
    window: int | None = None
    max_tokens: int | None = None
    sentences: int | None = None
    words: int | None = None
    template: str = "auto"
    instruction: str | None = None
    query: str | None = None
    style: str | None = None
    cite: bool = False
    device: str = "auto"
    dtype: str = "auto"
    weights: str = "auto"
    threads: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.1
    seed: int = 0
    truncate: bool = False
    download: bool = False
    batch_size: str = "auto"
    timeout: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "kv_bits", str(self.kv_bits))  # a library's 4 is a command line's "4"
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ConfigError(
                    f"{name} {value!r} is unknown", f"use one of {', '.join(str(c) for c in choices if c is not None)}"
                )
        for name, least in _AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} must be at least {least}, not {value}", _flag_hint(name))
        for name in ("model", "policy", "template"):
            if not getattr(self, name).strip():
                raise ConfigError(f"{name} is empty", _flag_hint(name))
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature must be 0 or more, not {self.temperature}", "0 takes the likeliest token")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be more than 0 and at most 1, not {self.top_p}", "1 samples from all tokens")
        if not 1 <= self.repetition_penalty <= 10:
            raise ConfigError(
                f"repetition_penalty must be from 1 to 10, not {self.repetition_penalty}", "1 discourages nothing"
            )
        if not _DEVICE.fullmatch(self.device):
            raise ConfigError(f"device {self.device!r} is unknown", "use auto, cpu, cuda, cuda:1 or cuda:0+cuda:1")
        if not _BATCH_SIZE.fullmatch(self.batch_size):
            raise ConfigError(f"batch_size {self.batch_size!r} is not understood", "use auto, or a number from 1")
        if self.timeout is not None and not (math.isfinite(self.timeout) and self.timeout > 0):
            raise ConfigError(f"timeout must be more than 0 seconds, not {self.timeout}", _flag_hint("timeout"))
        parse_budget(self.budget, self.budget_scope)


_FIELDS = tuple(f.name for f in fields(Settings))


def load_settings(
    flags: Mapping[str, Any],
    *,
    config_path: Path | None = None,
    env: Mapping[str, str] = os.environ,
    cwd: Path | None = None,
) -> tuple[Settings, dict[str, str]]:
    """Merges all sources of settings.

    Args:
        flags: values by field name; `None` means that the flag was not given, `False` and 0 are values.
        config_path: the file given by `--config`; it takes the place of `./auvsum.yaml`.

    Returns:
        The settings, and for each field where its value came from: `flag --budget`, `AUVSUM_BUDGET`, a file, `default`.

    Raises:
        ConfigError, BudgetError: for an unknown key, a value of the wrong type, or one that makes no sense.
    """
    types = get_type_hints(Settings)
    values: dict[str, Any] = {}
    origins = dict.fromkeys(_FIELDS, "default")
    for path in _config_files(config_path, env, cwd or Path.cwd()):
        for key, value in _read_file(path).items():
            values[key] = _typed(key, value, types[key], str(path))
            origins[key] = str(path)
    for key, text in _from_environment(env).items():
        variable = _variable(key)
        values[key] = _typed(key, _parse_text(text, types[key], variable), types[key], variable)
        origins[key] = variable
    for key, value in flags.items():
        if value is not None:
            values[key] = value
            origins[key] = f"flag {_flag(key)}"
    return Settings(**values), origins


def parse_option(text: str) -> tuple[str, Any]:
    """`KEY=VALUE` of `--policy-option`; the value is YAML: `true`, `0.5`, `multi-step` are what they look like."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip() or not value.strip():
        raise ConfigError(f"policy option {text!r} is not KEY=VALUE", "for example --policy-option decay=0.9")
    try:
        return key.strip().replace("-", "_"), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"policy option {text!r} has an unreadable value", "quote it as in YAML") from error


def _config_files(config_path: Path | None, env: Mapping[str, str], cwd: Path) -> list[Path]:
    """The files to read, the weakest first."""
    home = Path(env.get("XDG_CONFIG_HOME") or Path(env.get("HOME") or "~").expanduser() / ".config")
    local = config_path or cwd / "auvsum.yaml"
    if config_path is not None and not config_path.is_file():
        raise ConfigError(f"configuration {config_path} is not a file", "check the path given to --config")
    # What may not even be looked at (the home of another user) is as good as not there: `os.path`, for it is an error
    # to `pathlib`.
    return [path for path in (home / "auvsum" / "config.yaml", local) if os.path.isfile(path)]


def _read_file(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}", "it must be a YAML file in UTF-8") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark else ""
        raise ConfigError(f"{path} is not valid YAML{line}", "write one `key: value` a line") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} does not hold settings", "write one `key: value` a line")
    for key in content:
        if key not in _FIELDS:
            raise ConfigError(f"unknown key {str(key)!r} in {path}", nearest_hint(str(key), _FIELDS))
    template = content.get("template")
    if isinstance(template, str) and template not in TEMPLATE_NAMES:
        content["template"] = str(path.parent / Path(template).expanduser())
    return content


def _from_environment(env: Mapping[str, str]) -> dict[str, str]:
    """`AUVSUM_*` by field name. An empty variable is not set; one that is nearly a setting is a mistake, not noise."""
    for name in env:
        if name.startswith("AUVSUM_") and name[7:].lower() not in _FIELDS:
            near = difflib.get_close_matches(name[7:].lower(), _FIELDS, n=1, cutoff=0.8)
            if near:
                raise ConfigError(f"unknown environment variable {name}", f"did you mean {_variable(near[0])}?")
    return {key: env[_variable(key)] for key in _FIELDS if env.get(_variable(key))}


def _parse_text(text: str, kind: Any, variable: str) -> Any:
    """Text of an environment variable -> a value of about the right type; `_typed` has the last word."""
    if kind is bool:
        return _BOOLEANS.get(text.strip().lower(), text)
    if kind == dict[str, Any]:
        return dict(parse_option(part) for part in text.split(","))
    if kind in (int, int | None):
        return int(text) if re.fullmatch(r"\s*[+-]?\d+\s*", text) else text
    if kind in (float, float | None):
        try:
            return float(text)
        except ValueError:
            return text
    return text


def _typed(key: str, value: Any, kind: Any, where: str) -> Any:
    """The value if its type fits the field, widened where that loses nothing.

    Raises:
        ConfigError: otherwise, naming the key, the type and the place.
    """
    if key in ("budget", "batch_size") and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if kind in (float, float | None) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    expected, name = {
        bool: (bool, "true or false"),
        float: (float, "a number"),
        float | None: (float, "a number"),
        int: (int, "a whole number"),
        int | None: (int, "a whole number"),
        str | None: (str, "text"),
        dict[str, Any]: (dict, "a mapping"),
    }.get(kind, (str, "text"))
    if value is None and kind in (int | None, float | None, str | None):
        return None
    if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
        raise ConfigError(f"{key} must be {name}, not {value!r} (in {where})", _flag_hint(key))
    return value


def nearest_hint(word: str, known: tuple[str, ...]) -> str:
    """`did you mean 'budget'?`, or all there are."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"


def _flag(key: str) -> str:
    return "--" + ("policy-option" if key == "policy_options" else key.replace("_", "-"))


def _variable(key: str) -> str:
    return f"AUVSUM_{key.upper()}"


def _flag_hint(key: str) -> str:
    return f"see {_flag(key)} in `auvsum summarize --help`"

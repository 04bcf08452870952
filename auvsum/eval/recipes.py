"""Recipes: one or several runs in a YAML file (`configs/paper/*.yaml`), flags on top."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from auvsum.config import nearest_hint
from auvsum.errors import ConfigError
from auvsum.eval.config import EvalConfig


def configurations(
    recipe: Path | None, flags: Mapping[str, Any], only: Sequence[str] = ()
) -> list[tuple[str, EvalConfig]]:
    """Names (of run directories; empty without a recipe) and configurations.

    Args:
        only: names of the recipe's runs; all of them without it.

    A recipe holds the keys of `config.yaml`, and under `runs` a mapping from names to the keys in which each differs.

    Raises:
        ConfigError: the file is not a recipe, or a value makes no sense.
    """
    if recipe is None:
        return [("", EvalConfig.from_mapping(flags, "the command line"))]
    try:
        content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"recipe {recipe} cannot be read", "it must be a YAML file") from error
    if not isinstance(content, dict):
        raise ConfigError(f"recipe {recipe} does not hold settings", "write one `key: value` a line")
    runs = content.pop("runs", None) or {recipe.stem: {}}
    if not isinstance(runs, dict) or not all(isinstance(value, dict | None) for value in runs.values()):
        raise ConfigError(f"`runs` in {recipe} is not a mapping of names to settings", "see configs/paper")
    for name in only:
        if name not in runs:
            raise ConfigError(f"{recipe} has no run {name!r}", nearest_hint(name, tuple(map(str, runs))))
    found = []
    for name, own in runs.items():
        if only and name not in only:
            continue
        values = {**content, **(own or {}), **flags}
        found.append((f"{recipe.stem}/{name}", EvalConfig.from_mapping(values, f"{recipe}, run {name}")))
    return found

"""What `auvsum models list` shows: known names and what the caches hold. Reads small files only, and no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from auvsum.engine import checkpoint, registry
from auvsum.engine.locate import find
from auvsum.engine.registry import KnownModel
from auvsum.errors import ModelError, ModelNotFound


@dataclass(frozen=True)
class ModelInfo:
    """One line of `auvsum models list`. `problem` says why a model that is here cannot be used."""

    name: str
    architecture: str
    positions: int | None
    licence: str
    parameters: str
    size_bytes: int
    present: bool
    supported: bool
    path: Path | None = None
    problem: str = ""
    note: str = ""


def listing() -> list[ModelInfo]:
    """The known names, here or not, then every other model of the local Hugging Face cache. Reads no weights."""
    known = [_known_info(model) for model in registry.KNOWN.values()]
    listed = {model.hub_id for model in registry.KNOWN.values() if model.wheel is None}
    hub = registry.hub_cache_dir()
    folders = sorted(hub.glob("models--*")) if os.path.isdir(hub) else []
    ids = [folder.name.removeprefix("models--").replace("--", "/") for folder in folders]
    return known + [info for hub_id in ids if hub_id not in listed if (info := _cached_info(hub_id)) is not None]


def _known_info(known: KnownModel) -> ModelInfo:
    path, problem, disk = None, "", known.size_bytes
    try:
        found = find(known.name)
        path, disk = found.path, found.weight_bytes
    except ModelNotFound:
        pass
    except ModelError as error:
        problem = error.message
    return ModelInfo(
        name=known.name,
        architecture=known.model_type,
        positions=known.positions,
        licence=known.licence,
        parameters=known.parameters,
        size_bytes=disk,
        present=path is not None,
        supported=known.model_type in registry.SUPPORTED,
        path=path,
        problem=problem,
        note=known.note,
    )


def _cached_info(hub_id: str) -> ModelInfo | None:
    """A repository of the hub cache; None for those that hold no language model (data, encoders without a config)."""
    snapshot = registry.hub_snapshot(hub_id)
    if snapshot is None or not (snapshot / "config.json").is_file():
        return None
    problem, disk = "", 0
    config: dict[str, Any] = {}
    try:
        config = checkpoint.read_config(snapshot)
        disk = checkpoint.inspect(snapshot, hub_id).weight_bytes
    except ModelError as error:
        problem = error.message
    return ModelInfo(
        name=hub_id,
        architecture=config.get("model_type", "unknown"),
        positions=config.get("max_position_embeddings"),
        licence="see its model card",
        parameters="",
        size_bytes=disk,
        present=not problem,
        supported=not checkpoint.unsupported(config),
        path=snapshot,
        problem=problem,
    )

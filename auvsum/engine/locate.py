"""From a model's name to the folder where it lies, and to what to type when it is not here."""

from __future__ import annotations

import os
from pathlib import Path

from auvsum.engine import checkpoint, registry
from auvsum.engine.checkpoint import Checkpoint
from auvsum.engine.registry import KnownModel
from auvsum.engine.staging import read_marker
from auvsum.errors import ModelError, ModelIncomplete, ModelNotFound, ModelUnsupported


def is_path(name: str) -> bool:
    """Whether `name` can only mean a folder."""
    return name.startswith((".", "~", "/", "\\")) or name.count("/") > 1 or "\\" in name


def locate(name: str) -> Path:
    """Where the model lies, looked at no further. Short names come first, then folders, then hub ids.

    Raises:
        ModelNotFound · ModelIncomplete: it is not here, or a download was begun and came to nothing.
    """
    if (known := registry.find(name)) is not None:
        if known.wheel is None:
            path = hub_snapshot_of(known.hub_id)
        else:
            path = registry.model_dir(known.name)
            path = path if read_marker(path) is not None else None
        if path is not None:
            return path
        here = f", or ./{name} for the folder here" if Path(name, "config.json").is_file() else ""
        raise ModelNotFound(f"the model {name} is not on this machine", f"type: {pull_command(known)}{here}")
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise ModelUnsupported(f"{name} is a file; a model is a folder", "give the folder, in Hugging Face's layout")
    if is_path(name):
        raise ModelNotFound(f"there is no folder {name}", "auvsum models list shows what is here")
    nearest = registry.nearest(name)
    meant = f"did you mean {nearest}? " if nearest else ""
    if registry.is_hub_id(name):
        if (path := hub_snapshot_of(name)) is not None:
            return path
        raise ModelNotFound(
            f"the model {name} is not in the local Hugging Face cache",
            f"{meant}to fetch it type: auvsum models pull {name} --download",
        )
    hint = f"{meant}type: {pull_command(registry.KNOWN[nearest])}" if nearest else "auvsum models list shows the names"
    raise ModelNotFound(f"no model is called {name!r}", hint)


def find(name: str) -> Checkpoint:
    """The checkpoint that a name means, looked at.

    Raises:
        ModelError: it is not here, not whole, not supported, or may not be read.
    """
    try:
        return checkpoint.inspect(locate(name), name)
    except PermissionError as error:
        raise ModelError(
            f"{name} may not be read: no permission for {error.filename}",
            "check its permissions, or where HOME, HF_HOME and AUVSUM_CACHE point",
        ) from error


def pull_command(known: KnownModel) -> str:
    return f"auvsum models pull {known.name}" + ("" if known.wheel else " --download")


def hub_snapshot_of(hub_id: str) -> Path | None:
    """The snapshot of `hub_id` in the local cache; None when it was never fetched.

    Raises:
        ModelIncomplete: when a download was begun and no snapshot came of it.
    """
    if (snapshot := registry.hub_snapshot(hub_id)) is not None:
        return snapshot
    blobs = registry.hub_folder(hub_id) / "blobs"
    partial = sorted(blobs.glob("*.incomplete")) if blobs.is_dir() else []
    if partial:
        name = os.path.relpath(partial[0], registry.hub_cache_dir())
        raise ModelIncomplete(f"{hub_id} is half downloaded: {name}", f"type: auvsum models pull {hub_id} --download")
    return None

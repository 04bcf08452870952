"""Folders that appear whole or not at all: written beside their place, under a lock, marked last, then renamed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from auvsum._version import __version__
from auvsum.budget import size
from auvsum.engine.registry import MARKER
from auvsum.errors import ModelError

Progress = Callable[[str], None]


def silent(message: str) -> None:
    """The default listener of long work: hears nothing."""


def read_marker(folder: Path) -> dict[str, Any] | None:
    """What the marker says; None where the folder was never finished."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return marker if isinstance(marker, dict) else None


@contextmanager
def locked(target: Path, progress: Progress = silent) -> Iterator[None]:
    """One process at a time works on `target`; the others wait. A lock dies with its process.

    Raises:
        ModelError: when the cache folder cannot be written.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(target.parent / f".{target.name}.lock")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            progress(f"waiting for another auvsum that is preparing {target.name}")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()
    except OSError as error:
        raise ModelError(
            f"the model cache {target.parent} cannot be written: {error.strerror or error}",
            "free some space there, or set AUVSUM_CACHE to another folder",
        ) from error


def publish(target: Path, marker: Mapping[str, Any], write: Callable[[Path], None], *, needs: int) -> None:
    """Makes `target` out of what `write` puts into an empty folder, given `needs` bytes of disk. Hold `locked(target)`.

    Left-overs of a process that died are removed: whoever holds the lock is the only one at work.
    """
    if (free := shutil.disk_usage(target.parent).free) < needs:
        raise ModelError(
            f"{target.parent} has {size(free)} free, and {target.name} needs {size(needs)} there",
            "free some space, or set AUVSUM_CACHE to another folder",
        )
    prefix = f".{target.name}.partial-"
    for left_over in target.parent.glob(prefix + "*"):
        shutil.rmtree(left_over, ignore_errors=True)
    partial = target.parent / f"{prefix}{os.getpid()}"
    partial.mkdir()
    try:
        write(partial)
        text = json.dumps({**marker, "auvsum": __version__}, indent=2) + "\n"
        for file in partial.iterdir():
            file.chmod(0o666 & ~_umask())  # some writers make private files
        _sync(partial)
        (partial / MARKER).write_text(text, encoding="utf-8")
        _sync(partial)
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
        _sync_folder(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(folder: Path) -> None:
    for file in folder.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # other systems cannot open a folder
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

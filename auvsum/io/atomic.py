"""Files that are there whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import contextlib
import os
from io import FileIO
from pathlib import Path

from auvsum.errors import OutputError

#: Ends the name of a file that is not finished. A later run takes it for nothing and writes it anew.
PARTIAL = ".partial"


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file beside its place, brings it to the disk, and moves it there.

    Raises:
        OutputError: names the file; nothing of it is left behind.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    except OSError as error:
        discard(partial)
        raise unwritable(path, error) from error
    except BaseException:
        discard(partial)
        raise


def append_whole(file: FileIO, data: bytes) -> None:
    """Writes all of the data to an unbuffered file, and brings it to the disk."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) or 0 :]
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Brings a rename to the disk, where the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def discard(path: Path) -> None:
    """Deletes a file if it is there and may be deleted."""
    with contextlib.suppress(OSError):
        path.unlink()


def unwritable(path: Path, error: OSError) -> OutputError:
    """The error that names the file and what to look at."""
    return OutputError(f"{path} cannot be written: {error.strerror or error}", "check the disk and its permissions")

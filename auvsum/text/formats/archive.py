"""Parts of a ZIP archive, unpacked within bounds: an archive of a kilobyte can claim to hold gigabytes."""

from __future__ import annotations

import io
import zipfile
import zlib

from auvsum.errors import DocumentUnreadable

#: The most that one document may unpack to, and how much denser than its archive it may be beyond the first megabytes.
MOST_BYTES = 256 * 2**20
MOST_RATIO = 200
_HARMLESS_BYTES = 16 * 2**20


class Archive:
    """A ZIP file in memory.

    Raises:
        DocumentUnreadable: it is broken, or unpacks to more than any document does.
    """

    def __init__(self, data: bytes, label: str) -> None:
        self._label = label
        self._size = len(data)
        self._read = 0
        try:
            self._zip = zipfile.ZipFile(io.BytesIO(data))
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
            raise DocumentUnreadable(f"{label} is damaged or cut short: {error}", "get the file again") from error
        self.names = frozenset(self._zip.namelist())

    def read(self, name: str) -> bytes:
        """One part, whole. What the archive claims about its size is not believed."""
        parts: list[bytes] = []
        try:
            with self._zip.open(name) as part:
                while piece := part.read(2**20):
                    parts.append(piece)
                    self._read += len(piece)
                    self._check()
        except (KeyError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error, EOFError) as error:
            encrypted = "password" in str(error) or "encrypted" in str(error)
            what = "is protected by a password" if encrypted else f"is damaged: {name} cannot be read"
            hint = "save it without a password" if encrypted else "get the file again, or save it anew"
            raise DocumentUnreadable(f"{self._label} {what}", hint) from error
        return b"".join(parts)

    def _check(self) -> None:
        dense = self._read > _HARMLESS_BYTES and self._read > MOST_RATIO * self._size
        if dense or self._read > MOST_BYTES:
            raise DocumentUnreadable(
                f"{self._label} unpacks to far more than its {self._size:,} bytes: it looks like a zip bomb",
                "open it in the program that made it and save it as plain text",
            )

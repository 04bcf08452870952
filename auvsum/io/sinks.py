"""Where summaries go: standard output, one file, or a folder that mirrors what was read.

A sink is asked first whether a document is wanted (`wants`), and given its record at the end (`write`). Of a document
that another shard does it is only told (`passes`).
"""

from __future__ import annotations

import hashlib
import os
import stat
from contextlib import ExitStack
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from auvsum.errors import OutputError
from auvsum.io.atomic import PARTIAL, append_whole, sync_folder, unwritable, write_whole
from auvsum.io.inputs import Input, Shard
from auvsum.io.manifest import HIDDEN, INDEX, Manifest, document_key
from auvsum.io.render import SUFFIXES, encode, render
from auvsum.ui.console import Console

#: File systems take 255 bytes a name; the rest is for what marks an unfinished file.
_NAME_BYTES = 240


class Sink(Protocol):
    """A place for summaries. `write` raises `OutputError` when there is no going on."""

    def wants(self, item: Input) -> bool: ...
    def passes(self, item: Input) -> None: ...
    def write(self, record: dict[str, Any]) -> None: ...
    def __enter__(self) -> Sink: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None: ...


class StreamSink:
    """Standard output: each document is flushed as it comes; `titled` puts names between several texts."""

    def __init__(self, console: Console, format: str, titled: bool) -> None:
        self._console = console
        self._format = format
        self._titled = titled and format == "text"
        self._written = False

    def wants(self, item: Input) -> bool:
        return True

    def passes(self, item: Input) -> None:
        pass

    def title(self, name: str) -> str:
        """What stands before a document's text."""
        gap = "\n" if self._written and self._format in ("text", "md") else ""
        self._written = True
        return f"{gap}==> {name} <==\n" if self._titled else gap

    def write(self, record: dict[str, Any]) -> None:
        text = render(record, self._format)
        if text:
            self._console.write(self.title(record["id"]) + text)

    def __enter__(self) -> StreamSink:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        pass


class FileSink:
    """One file, which appears when the run ends (an interrupted one too); until then it is `FILE.partial`.

    What is no ordinary file (`/dev/null`, a named pipe) is written as it comes.
    """

    def __init__(self, path: Path, format: str, titled: bool) -> None:
        self._path = path
        self._format = format
        self._titled = titled and format == "text"
        self._file: FileIO | None = None
        self._written = False

    def wants(self, item: Input) -> bool:
        return True

    def passes(self, item: Input) -> None:
        pass

    def write(self, record: dict[str, Any]) -> None:
        text = render(record, self._format)
        if not text:
            return
        if self._titled:
            text = f"==> {record['id']} <==\n{text}"
        if self._written and self._format in ("text", "md"):
            text = "\n" + text
        self._written = True
        assert self._file is not None
        try:
            if self._direct:
                self._file.write(encode(text))
            else:
                append_whole(self._file, encode(text))
        except OSError as error:
            raise unwritable(self._path, error) from error

    def __enter__(self) -> FileSink:
        try:
            self._direct = self._path.exists() and not stat.S_ISREG(self._path.stat().st_mode)
            self._partial = self._path.with_name(self._path.name + PARTIAL)
            self._file = open(self._path if self._direct else self._partial, "wb", buffering=0)
        except OSError as error:
            raise unwritable(self._path, error) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._file is not None
        self._file.close()
        if self._direct:
            return
        try:
            if self._written:
                os.replace(self._partial, self._path)
                sync_folder(self._path.parent)
            else:
                self._partial.unlink()
        except OSError as problem:
            raise unwritable(self._path, problem) from problem


class FolderSink:
    """A folder with one file a document, whole or not there; what is finished already is not wanted again.

    Args:
        settings: hash of the settings (`manifest.settings_key`). force: want everything.
        shard: the part of the documents that this run does, where others do the rest.
    """

    def __init__(
        self, folder: Path, format: str, settings: str, force: bool = False, shard: Shard | None = None
    ) -> None:
        self._folder = folder
        self._format = format
        self._settings = settings
        self._force = force
        self._places = Places(SUFFIXES[format])
        self._manifest = Manifest(folder, shard)
        #: Output and key by source, of the documents that are wanted and not written yet.
        self._wanted: dict[str, tuple[str, str]] = {}
        self._seen: set[str] = set()
        #: Folders that are made, and known to lie within this one.
        self._ready: set[Path] = set()
        self._stack = ExitStack()

    def wants(self, item: Input) -> bool:
        if item.source in self._seen:
            return False  # named twice: it has one output all the same
        self._seen.add(item.source)
        output = self._places.of(item.place)
        try:
            key = "" if item.path == "-" else document_key(item.path, self._settings)
        except OSError:
            key = ""  # the reader says what is wrong with it
        if key and not self._force and self._manifest.finished(output, key):
            return False
        self._wanted[item.source] = (output, key)
        return True

    def passes(self, item: Input) -> None:
        # Its output's name is taken: where two names collide, all shards must tell them apart in the same way.
        if item.source not in self._seen:
            self._seen.add(item.source)
            self._places.of(item.place)

    def write(self, record: dict[str, Any]) -> None:
        output, key = self._wanted.pop(record["source"])
        if record["summary"] is None:
            self._manifest.add(output, key, None, record)
            return
        data = encode(render(record, self._format))
        write_whole(self._inside(output), data)
        self._manifest.add(output, key, len(data), record)

    def _inside(self, output: str) -> Path:
        """Where an output goes; its folders are made.

        Raises:
            OutputError: a link in the folder leads out of it, or the folders cannot be made.
        """
        path = self._folder / output
        if path.parent in self._ready:
            return path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(path, error) from error
        if not path.parent.resolve().is_relative_to(self._folder.resolve()):
            raise OutputError(f"{path} leads out of {self._folder}", "a link in that folder points elsewhere")
        self._ready.add(path.parent)
        return path

    def __enter__(self) -> FolderSink:
        self._stack.enter_context(self._manifest)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._stack:
            # After an `OutputError` the disk is full, and a second error would hide the first.
            if not isinstance(error, OutputError):
                self._manifest.write_index()


class Places:
    """Names of outputs: the source's own, with the format's suffix added unless it ends so; no two the same.

    `sub/report.pdf` -> `sub/report.pdf.txt`, `notes.txt` -> `notes.txt`, a second `notes.txt` -> `notes-2.txt`. A name
    depends on what was named before it only when the two collide, so that a later run finds its outputs again.
    """

    def __init__(self, suffix: str) -> None:
        self._suffix = suffix
        #: Compared without case, as some file systems do.
        self._files = {INDEX}
        self._folders: set[str] = set()

    def of(self, place: str) -> str:
        """The output's path below the folder; it cannot leave it."""
        *folders, name = [part for part in place.split("/") if part not in ("", ".", "..")] or ["document"]
        path = ""
        for folder in folders:
            path = self._free(path, _short("_auvsum" if folder == HIDDEN else folder), "", self._files)
            self._folders.add(path.casefold())
        stem = name[: -len(self._suffix)] if name.endswith(self._suffix) and name != self._suffix else name
        path = self._free(path, _short(stem, self._suffix), self._suffix, self._files, self._folders)
        self._files.add(path.casefold())
        return path

    @staticmethod
    def _free(parent: str, stem: str, suffix: str, *taken: set[str]) -> str:
        base = f"{parent}/{stem}" if parent else stem
        path, number = base + suffix, 1
        while any(path.casefold() in names for names in taken):
            number += 1
            path = f"{base}-{number}{suffix}"
        return path


def _short(stem: str, suffix: str = "") -> str:
    """A name that the file system takes; a cut one keeps apart by a hash of the whole."""
    room = _NAME_BYTES - len(suffix)
    data = os.fsencode(stem)
    if len(data) <= room:
        return stem
    mark = hashlib.sha256(data).hexdigest()[:8]
    return os.fsencode(stem)[: room - 9].decode("utf-8", "ignore") + f"~{mark}"

"""What people name on the command line -> the files it stands for, in a stable order, each once.

Files, folders (read recursively), patterns (`notes/**/*.md`, where the shell leaves them alone), `-`, lists of names.
A `Shard` is one machine's part of them.
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from auvsum.errors import ConfigError, DocumentNotFound, UsageError
from auvsum.text.readers import document_id


@dataclass(frozen=True, slots=True)
class Input:
    """One document to read.

    Attributes:
        path: what to open; `-` is standard input.
        place: where it lies below the folder that was named, with `/`; the file's name if it was named itself.
    """

    path: str
    place: str

    @property
    def source(self) -> str:
        """The absolute path, or `-`."""
        return "-" if self.path == "-" else os.path.abspath(self.path)


@dataclass(frozen=True)
class Selection:
    """Which files of a folder, or of a pattern, are meant; a file that is named itself always is.

    Attributes:
        include, exclude: shell patterns for the name (`*.md`) or, with a `/`, for the place (`drafts/*`). A folder that
            is excluded is not entered.
        hidden: whether names that start with a dot count.
        without: folders never entered: that of the output.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    hidden: bool = False
    without: tuple[Path, ...] = ()

    def wants(self, place: str) -> bool:
        """Whether a file is meant."""
        return (not self.include or _matches(place, self.include)) and self.enters(place)

    def enters(self, place: str) -> bool:
        """Whether a folder is to be looked into (or a file not excluded)."""
        name = PurePosixPath(place).name
        return (self.hidden or not name.startswith(".")) and not _matches(place, self.exclude)


@dataclass(frozen=True)
class Shard:
    """Part `number` of `of`, counted from 1. Every document is in exactly one part, on every machine the same one."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """`3/8`.

        Raises:
            UsageError: anything else.
        """
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text.strip())
        if match is None:
            raise UsageError(f"shard {text!r} is not understood", "write --shard 3/8 for the third of eight parts")
        number, of = int(match[1]), int(match[2])
        if not 1 <= number <= of:
            hint = f"the parts of {of} are 1/{of} to {of}/{of}" if of else "there must be at least one part"
            raise UsageError(f"shard {text!r} does not exist", hint)
        return cls(number, of)

    def holds(self, item: Input) -> bool:
        """Whether a document is in this part: by its name below the folder that was named, and by nothing else."""
        digest = hashlib.sha256(os.fsencode(item.place)).digest()
        return int.from_bytes(digest[:8], "big") % self.of == self.number - 1

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


def expand(names: Iterable[str], selection: Selection | None = None, listed: bool = False) -> list[Input]:
    """The documents that names stand for: arguments in their order, a folder's files sorted, none of them twice.

    Args:
        listed: the names come from a list: a relative one keeps its folders as its place, as `find` writes them.

    Raises:
        DocumentNotFound: a folder or a pattern that holds no document. A *file* that does not exist is left to the
            reader: the others go on.
    """
    selection = selection or Selection()
    found: list[Input] = []
    seen: set[str] = set()
    for name in names:
        if name == "-" or os.path.isfile(name):
            # Named twice is meant twice, as with `cat`.
            found.append(Input(name, _place(name, listed)))
            seen.add(os.path.abspath(name))
            continue
        if os.path.isdir(name):
            some, what = _walk(name, selection), f"folder {name}"
        elif glob.has_magic(name) and not os.path.lexists(name):
            some, what = _pattern(name, selection), f"pattern {name!r}"
        else:
            found.append(Input(name, _place(name, listed)))
            continue
        empty = True
        for item in some:
            empty = False
            if item.source not in seen:
                seen.add(item.source)
                found.append(item)
        if empty:
            raise DocumentNotFound(f"{what} holds no document", "see --include, --exclude and --hidden")
    return found


def read_names(where: str, zero: bool = False) -> list[str]:
    """Names of documents from a file, or from standard input for `-`: one a line, or with `zero` ended by NUL bytes.

    Raises:
        ConfigError: the list cannot be read.
    """
    try:
        data = sys.stdin.buffer.read() if where == "-" else Path(where).read_bytes()
    except OSError as error:
        raise ConfigError(f"the list {where} cannot be read: {error.strerror}", "check --files-from") from error
    names = data.split(b"\0") if zero else data.splitlines()
    return [os.fsdecode(name) for name in names if name.strip()]


def _place(name: str, listed: bool) -> str:
    if name == "-" or not listed or os.path.isabs(name):
        return document_id(name)
    return os.path.normpath(name).replace(os.sep, "/")


def _walk(root: str, selection: Selection, depth: int | None = None) -> Iterator[Input]:
    """The files below a folder, sorted by name folder by folder; a folder that links bring up again is left alone.

    Args:
        depth: how many folders below `root` are entered; `None` is all.
    """
    entered: set[tuple[int, int]] = set()
    barred = {_identity(str(path)) for path in selection.without if path.is_dir()}

    def folder(path: str, place: str) -> Iterator[Input]:
        identity = _identity(path)
        if identity in entered or identity in barred:
            return
        entered.add(identity)
        try:
            with os.scandir(path) as entries:
                children = sorted(entries, key=lambda entry: entry.name)
        except OSError:
            # Whoever may not look into a folder hears of it when the reader fails to open it.
            yield Input(path, place)
            return
        for child in children:
            where = f"{place}/{child.name}" if place else child.name
            if _is_folder(child):
                if selection.enters(where) and (depth is None or where.count("/") < depth):
                    yield from folder(child.path, where)
            elif selection.wants(where) and _is_document(child):
                yield Input(child.path, where)

    yield from folder(root, "")


def _pattern(pattern: str, selection: Selection) -> Iterator[Input]:
    """The files that a pattern stands for; `**` is any number of folders."""
    root = _fixed_part(pattern)
    if not os.path.isdir(root or "."):
        return
    wanted = pattern[len(root) :].lstrip("/")
    depth = None if "**" in wanted else wanted.count("/")
    matches = re.compile(_expression(wanted)).fullmatch
    for item in _walk(root or ".", selection, depth):
        if matches(item.place):
            yield Input(os.path.join(root, item.place), item.place)


def _expression(pattern: str) -> str:
    """A shell pattern for a path as a regular expression."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]]+\])", pattern)
    known = {"**/": r"(?:[^/]+/)*", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(
        known.get(part) or (part.replace("[!", "[^") if part.startswith("[") and len(part) > 2 else re.escape(part))
        for part in parts
    )


def _fixed_part(pattern: str) -> str:
    """The folder before the first wildcard: `notes` of `notes/**/*.md`."""
    before = pattern[: re.search(r"[*?[]", pattern).start()]  # type: ignore[union-attr]
    return before[: before.rfind("/") + 1]


def _matches(place: str, patterns: tuple[str, ...]) -> bool:
    name = PurePosixPath(place).name
    return any(fnmatch.fnmatch(place if "/" in p.rstrip("/") else name, p.rstrip("/")) for p in patterns)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _is_document(entry: os.DirEntry[str]) -> bool:
    """A file, or a link to something that is not there (the reader says so); no socket, pipe or device."""
    try:
        return entry.is_file() or entry.is_symlink()
    except OSError:
        return False


def _identity(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return (-1, hash(path))
    return status.st_dev, status.st_ino

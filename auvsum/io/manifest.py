"""What an output folder holds already: a journal of finished documents, so that none is summarized twice.

`DIR/.auvsum/manifest.jsonl` gets one line a document, brought to the disk after the output itself: what the journal
names is there. A line that a crash cut short is dropped, and its document done again. `DIR/index.jsonl` is made from
the journal: one record a document, sorted by output, written whole at the end of a run.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

from auvsum._version import __version__
from auvsum.config import Settings
from auvsum.errors import ConfigError
from auvsum.io.atomic import PARTIAL, append_whole, discard, sync_folder, unwritable

HIDDEN = ".auvsum"
INDEX = "index.jsonl"
#: What does not change a summary, or only how soon it comes.
_NOT_IN_KEY = ("download", "threads", "batch_size", "timeout")


@dataclass(frozen=True, slots=True)
class _Line:
    """The newest line about one output: where it stands in the journal, and what it promises."""

    offset: int
    key: str
    size: int | None


class Manifest:
    """The journal of one output folder, locked while it is open.

    Raises:
        ConfigError: another run has the folder. OutputError: it cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / HIDDEN / "manifest.jsonl"
        self._lines: dict[str, _Line] = {}
        #: Unbuffered: what could not be written must not be tried once more when the file is closed.
        self._file: FileIO | None = None
        self._lock: Any = None

    def __enter__(self) -> Manifest:
        from filelock import FileLock, Timeout

        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.path.with_name("lock"))
            self._lock.acquire(timeout=0)
            self._file = open(self.path, "ab", buffering=0)
            self._read()
        except Timeout as error:
            raise ConfigError(
                f"another run is writing to {self.folder}", "wait for it, or give this one another -O"
            ) from error
        except OSError as error:
            raise unwritable(self.path, error) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()
        if self._lock is not None:
            self._lock.release()

    def finished(self, output: str, key: str) -> bool:
        """Whether an output was made from this key, and is there still as it was written."""
        line = self._lines.get(output)
        if line is None or line.key != key or line.size is None:
            return False
        try:
            return os.stat(self.folder / output).st_size == line.size
        except OSError:
            return False

    def add(self, output: str, key: str, size: int | None, record: dict[str, Any]) -> None:
        """Notes a document whose output is on the disk; `size` is `None` for one that failed and has none."""
        assert self._file is not None
        line = {"output": output, "key": key, "size": size, "record": record}
        try:
            offset = self._file.seek(0, os.SEEK_END)
            append_whole(self._file, json.dumps(line).encode() + b"\n")
        except OSError as error:
            raise unwritable(self.path, error) from error
        self._lines[output] = _Line(offset, key, size)

    def write_index(self) -> None:
        """`index.jsonl`: the newest record of every output that is there, and of every document that failed."""
        index = self.folder / INDEX
        partial = index.with_name(INDEX + PARTIAL)
        try:
            with open(partial, "wb") as file, open(self.path, "rb") as journal:
                for output, line in sorted(self._lines.items()):
                    if line.size is not None and not (self.folder / output).exists():
                        continue
                    journal.seek(line.offset)
                    record = json.loads(journal.readline())["record"]
                    named = {"output": output if line.size is not None else None, **record}
                    file.write(json.dumps(named, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, index)
            sync_folder(self.folder)
        except OSError as error:
            discard(partial)
            raise unwritable(index, error) from error

    def _read(self) -> None:
        """Takes in the journal; what follows its last whole line is cut off, so that the next line starts fresh."""
        assert self._file is not None
        offset = 0
        with open(self.path, "rb") as journal:
            for text in journal:
                if not text.endswith(b"\n"):
                    self._file.truncate(offset)
                    break
                try:
                    line = json.loads(text)
                    self._lines[line["output"]] = _Line(offset, line["key"], line["size"])
                except (ValueError, KeyError, TypeError):
                    pass  # not a line of ours: its document is done again
                offset += len(text)


def settings_key(settings: Settings, **more: Any) -> str:
    """A hash of everything but the document that decides what an output holds."""
    values = {name: value for name, value in vars(settings).items() if name not in _NOT_IN_KEY}
    template = Path(settings.template).expanduser()
    if template.is_file():
        values["template"] = template.read_text(encoding="utf-8", errors="replace")
    text = json.dumps({**values, **more, "version": __version__}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()


def document_key(path: str, settings: str) -> str:
    """A hash of a file's bytes and of the settings; the file is never in memory as a whole.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256(settings.encode())
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

"""What an output folder holds already: a journal of finished documents, so that none is summarized twice.

`DIR/.auvsum/manifest.jsonl` gets one line a document, brought to the disk after the output itself: what the journal
names is there. A line that a crash cut short is dropped, and its document done again. `DIR/index.jsonl` is made from
the journal: one record a document, sorted by output, written whole at the end of a run.

Shards that share a folder have a journal and a lock each (`manifest-3-of-8.jsonl`, `lock-3-of-8`) and read everyone's:
what one run finished, another with other shards, or none, does not do again. Each writes the index of all journals at
its end, so that the last one's is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from auvsum._version import __version__
from auvsum.config import Settings
from auvsum.errors import ConfigError
from auvsum.io.atomic import PARTIAL, append_whole, discard, sync_folder, unwritable
from auvsum.io.inputs import Shard

HIDDEN = ".auvsum"
INDEX = "index.jsonl"
_JOURNAL = re.compile(r"manifest(-\d+-of-\d+)?\.jsonl")
#: What does not change a summary, or only how soon it comes.
_NOT_IN_KEY = ("download", "threads", "batch_size", "timeout")


#: Seconds to wait for shards that start, or write the index, at the same moment.
_MOMENT = 60.0


@dataclass(frozen=True, slots=True)
class _Line:
    """The newest line about one output: where it stands in which journal, when it was written, what it promises."""

    journal: Path
    offset: int
    at: float
    key: str
    size: int | None


class Manifest:
    """The journal of one output folder, or of one shard of it; locked while it is open.

    Raises:
        ConfigError: another run has the folder. OutputError: it cannot be written.
    """

    def __init__(self, folder: Path, shard: Shard | None = None) -> None:
        self.folder = folder
        self._suffix = f"-{shard.number}-of-{shard.of}" if shard else ""
        self._shard = shard
        self.path = folder / HIDDEN / f"manifest{self._suffix}.jsonl"
        self._lines: dict[str, _Line] = {}
        #: Unbuffered: what could not be written must not be tried once more when the file is closed.
        self._file: FileIO | None = None
        self._locks = ExitStack()

    def __enter__(self) -> Manifest:
        from filelock import Timeout

        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._take_locks()
            self._file = open(self.path, "ab", buffering=0)
            self._mend()
            self._read_all()
        except Timeout as error:
            self._locks.close()
            raise ConfigError(
                f"another run is writing to {self.folder}", "wait for it, or give this one another -O"
            ) from error
        except OSError as error:
            self._locks.close()
            raise unwritable(self.path, error) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()
        self._locks.close()

    def _take_locks(self) -> None:
        """The folder's lock for a run of its own; a shard has one beside those of its sisters, and no stranger's.

        Raises:
            Timeout: another run has the folder, this shard, or a part of another division.
        """
        from filelock import FileLock

        hidden = self.path.parent
        with ExitStack() as locks:
            locks.enter_context(FileLock(hidden / "lock").acquire(timeout=_MOMENT if self._shard else 0))
            for path in hidden.glob("lock-*-of-*"):
                if self._shard is None or not path.name.endswith(f"-of-{self._shard.of}"):
                    FileLock(path).acquire(timeout=0).lock.release()
            if self._shard is None:
                self._locks = locks.pop_all()
            else:
                self._locks.enter_context(FileLock(hidden / f"lock{self._suffix}").acquire(timeout=0))

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
        now = time.time()
        line = {"output": output, "key": key, "size": size, "at": round(now, 3), "record": record}
        try:
            offset = self._file.seek(0, os.SEEK_END)
            append_whole(self._file, json.dumps(line).encode() + b"\n")
        except OSError as error:
            raise unwritable(self.path, error) from error
        self._lines[output] = _Line(self.path, offset, now, key, size)

    def write_index(self) -> None:
        """`index.jsonl`: the newest record of every output that is there, and of every document that failed."""
        from filelock import FileLock, Timeout

        index = self.folder / INDEX
        partial = index.with_name(INDEX + PARTIAL)
        try:
            with ExitStack() as stack:
                if self._shard is not None:
                    stack.enter_context(FileLock(self.path.with_name("lock")).acquire(timeout=_MOMENT))
                    self._read_all()
                self._write_lines(stack.enter_context(open(partial, "wb")))
                os.replace(partial, index)
            sync_folder(self.folder)
        except OSError as error:
            discard(partial)
            what = OSError("another shard is writing it") if isinstance(error, Timeout) else error
            raise unwritable(index, what) from error

    def _write_lines(self, file: BinaryIO) -> None:
        """The lines of the index."""
        with ExitStack() as stack:
            paths = {line.journal for line in self._lines.values()}
            journals = {path: stack.enter_context(open(path, "rb")) for path in paths}
            for output, line in sorted(self._lines.items()):
                if line.size is not None and not (self.folder / output).exists():
                    continue
                journals[line.journal].seek(line.offset)
                record = json.loads(journals[line.journal].readline())["record"]
                named = {"output": output if line.size is not None else None, **record}
                file.write(json.dumps(named, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
        file.flush()
        os.fsync(file.fileno())

    def _mend(self) -> None:
        """Cuts off what follows the last whole line of this run's journal, so that the next line starts fresh."""
        assert self._file is not None
        with open(self.path, "rb") as journal:
            end = 0
            for text in journal:
                if not text.endswith(b"\n"):
                    self._file.truncate(end)
                end += len(text)

    def _read_all(self) -> None:
        """Takes in every journal of the folder; of two lines about one output the newer holds."""
        self._lines = {}
        for path in sorted(self.path.parent.glob("manifest*.jsonl")):
            if _JOURNAL.fullmatch(path.name):
                self._read(path)

    def _read(self, path: Path) -> None:
        offset = 0
        with open(path, "rb") as journal:
            for text in journal:
                if not text.endswith(b"\n"):
                    break  # a sister is writing it at this moment, or was killed
                try:
                    line = json.loads(text)
                    new = _Line(path, offset, line.get("at", 0.0), line["key"], line["size"])
                    old = self._lines.get(line["output"])
                    if old is None or old.at <= new.at:
                        self._lines[line["output"]] = new
                except (ValueError, KeyError, TypeError, AttributeError):
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

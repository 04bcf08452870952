"""Documents with the summaries that people wrote: shipped samples, files, a data folder, the local hub cache.

Nothing touches the network unless `download` says so.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from auvsum import _env
from auvsum.errors import DatasetError
from auvsum.eval.tasks import HubSource, Task, task_of

_COMMIT = re.compile("[0-9a-f]{40}")
_ENDINGS = (".jsonl", ".parquet")


@dataclass(frozen=True)
class Example:
    """A document and its reference summary; an empty reference means that there is none."""

    id: str
    document: str
    reference: str


def load_examples(
    dataset: str,
    *,
    columns: Mapping[str, str] | None = None,
    data_dir: Path | None = None,
    download: bool = False,
) -> list[Example]:
    """All rows of a dataset, in the order of the file.

    Args:
        dataset: a name, or a .jsonl or .parquet file.
        columns: our names (`id`, `document`, `summary`) -> the file's, where they differ.

    Raises:
        DatasetError: it is not here (the hint says what to type), or its rows are not what is needed.
    """
    task = task_of(dataset)
    path = _file(dataset, task, data_dir)
    if path is not None:
        held = _read_parquet(path) if path.suffix == ".parquet" else _read_jsonl(path)
        return _examples(held, {**_same(), **(columns or {})}, str(path))
    if task.source is None:
        raise DatasetError(f"the dataset {dataset!r} is not here", _how_to_get(task, data_dir))
    rows = _read_hub(task, task.source, data_dir, download)
    return _examples(rows, {**_same(), **task.source.columns, **(columns or {})}, task.source.repository)


def _same() -> dict[str, str]:
    return {"id": "id", "document": "document", "summary": "summary"}


def _file(dataset: str, task: Task, data_dir: Path | None) -> Path | None:
    """The file that holds a dataset; None where only the hub cache may have it."""
    if dataset == "sample":
        return sample_file()
    if dataset.endswith(_ENDINGS):
        path = Path(dataset).expanduser()
        if not path.is_file():
            raise DatasetError(f"there is no file {dataset}", "check the path, or give a name of `auvsum eval --help`")
        return path
    if data_dir is not None and not data_dir.is_dir():
        raise DatasetError(f"{data_dir} is not a folder", "check the path given to --data-dir")
    for name in task.files if data_dir is not None else ():
        assert data_dir is not None
        if (data_dir / name).is_file():
            return data_dir / name
    return None


def sample_file() -> Path:
    """The shipped rows: beside this file in an installed wheel, in `samples/` of a checkout."""
    here = Path(__file__).parent
    packed = here / "sample.jsonl"
    path = packed if packed.is_file() else here.parents[1] / "samples" / "eval.jsonl"
    if not path.is_file():
        raise DatasetError("the sample rows are missing from this installation", "install auvsum again")
    return path


def _how_to_get(task: Task, data_dir: Path | None) -> str:
    wanted = task.files[0] if task.files else f"{task.name}.jsonl"
    where = f"put {wanted} into {data_dir}" if data_dir else f"type --data-dir DIR, where DIR holds {wanted}"
    if task.source is not None:
        return f"type: auvsum eval --dataset {task.name} --download, or {where}"
    return f"{where} (one JSON object a line: id, document, summary)"


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} cannot be read: {error}", "it must be JSON lines in UTF-8") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DatasetError(f"{path}, line {number} is not JSON: {error}", "one JSON object a line") from error
        if not isinstance(row, dict):
            raise DatasetError(f"{path}, line {number} is not a JSON object", "one JSON object a line")
        rows.append(row)
    return rows


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    _needs("pyarrow", f"to read {path.name}")
    import pyarrow.parquet

    try:
        rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path} cannot be read: {error}", "it must be a parquet file") from error
    return rows


def _read_hub(task: Task, source: HubSource, data_dir: Path | None, download: bool) -> Iterable[dict[str, Any]]:
    """The split, from the local Hugging Face cache, or fetched into it."""
    _needs("datasets", f"to read {source.repository}", or_else=_how_to_get(task, data_dir))
    _env.prepare(download=download)
    if not download:
        os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    import datasets

    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity_error()
    try:
        rows = datasets.load_dataset(
            source.repository, source.configuration, revision=source.revision, split=source.split
        )
    except Exception as error:  # the library raises its own, the hub's, OSError and ValueError
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        what = "could not be fetched" if download else "is not in the local Hugging Face cache"
        raise DatasetError(f"{source.repository} {what}: {reason}", _how_to_get(task, data_dir)) from error
    finally:
        _env.prepare()
    # Offline the library takes whatever revision is there, and names its folder after it.
    held = {Path(file["filename"]).parent.name for file in rows.cache_files}
    if _COMMIT.fullmatch(source.revision) and held and held != {source.revision}:
        raise DatasetError(
            f"the local Hugging Face cache holds revision {', '.join(sorted(held))} of {source.repository}, "
            f"not {source.revision}",
            _how_to_get(task, data_dir),
        )
    found: Iterable[dict[str, Any]] = rows
    return found


def _needs(module: str, what: str, or_else: str = "") -> None:
    if importlib.util.find_spec(module) is None:
        alternative = f"; or {or_else.removeprefix('type: ')}" if or_else else ""
        raise DatasetError(f"{module} is needed {what}", f"type: pip install 'auvsum[data]'{alternative}")


def _examples(rows: Iterable[dict[str, Any]], columns: Mapping[str, str], source: str) -> list[Example]:
    examples: list[Example] = []
    seen: set[str] = set()
    for number, row in enumerate(rows, 1):
        for ours in ("document", "summary"):
            if columns[ours] not in row:
                there = ", ".join(map(str, row)) or "nothing"
                raise DatasetError(
                    f"{source}, row {number} has no column {columns[ours]!r}; there is: {there}",
                    f"name it: --column {ours}=NAME",
                )
            if not isinstance(row[columns[ours]] or "", str):
                raise DatasetError(
                    f"{source}, row {number}: {columns[ours]} is not text but {row[columns[ours]]!r}",
                    "give text, or leave it empty",
                )
        id = str(row.get(columns["id"]) or f"row-{number}")
        if id in seen:
            raise DatasetError(f"{source}, row {number}: the id {id!r} is there twice", "give every row its own id")
        seen.add(id)
        examples.append(Example(id, row[columns["document"]] or "", (row[columns["summary"]] or "").strip()))
    if not examples:
        raise DatasetError(f"{source} holds no rows", "give at least one document")
    return examples

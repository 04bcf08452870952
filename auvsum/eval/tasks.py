"""Which datasets have a name, where they are to be had, and what is asked of their documents. No torch in here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HubSource:
    """Where the Hugging Face hub keeps a dataset: repository, configuration, revision, split, our column -> theirs."""

    repository: str
    configuration: str | None
    revision: str
    split: str
    columns: dict[str, str]


@dataclass(frozen=True)
class Task:
    """A named dataset.

    Attributes:
        files: names of the file in `--data-dir`, the first that is there is taken.
        sentences: asked for in the prompt; None for the template's own instruction.
        max_new_tokens: None for what the template gives.
        limit: documents by default; None for all.
        source: None where the hub does not have it under a licence that lets it be read by a script.
    """

    name: str
    files: tuple[str, ...]
    sentences: int | None = None
    max_new_tokens: int | None = None
    limit: int | None = None
    source: HubSource | None = None


_TASKS = [
    Task("sample", (), max_new_tokens=64, limit=4),
    Task(
        "xsum",
        ("xsum.jsonl",),
        sentences=1,
        max_new_tokens=64,
        # The repository itself holds a script; the hub's own conversion to parquet lives under this reference.
        source=HubSource(
            "EdinburghNLP/xsum",
            None,
            "refs/convert/parquet",
            "test",
            {"document": "document", "summary": "summary", "id": "id"},
        ),
    ),
    Task(
        "cnn_dailymail",
        ("cnn_dailymail.jsonl", "cnndm.jsonl"),
        sentences=3,
        max_new_tokens=128,
        source=HubSource(
            "abisee/cnn_dailymail",
            "3.0.0",
            "96df5e686bee6baa90b8bee7c28b81fa3fa6223d",
            "test",
            {"document": "article", "summary": "highlights", "id": "id"},
        ),
    ),
    Task("newsroom", ("newsroom.jsonl",), sentences=1, max_new_tokens=64),
    Task(
        "govreport",
        ("govreport.jsonl", "gov_leval.jsonl"),
        source=HubSource(
            "ccdv/govreport-summarization",
            None,
            "refs/convert/parquet",
            "test",
            {"document": "report", "summary": "summary"},
        ),
    ),
    Task("gao", ("gao.jsonl",)),
    Task("beigebook", ("beigebook.jsonl",)),
    Task("qmsum", ("qmsum.jsonl",)),
]
TASKS: dict[str, Task] = {task.name: task for task in _TASKS}


def task_of(dataset: str) -> Task:
    """The named task; a file, or a name that only `--data-dir` knows, is a task without wishes of its own."""
    return TASKS.get(dataset) or Task(dataset, (f"{dataset}.jsonl", f"{dataset}.parquet"))

"""Sections of the CPU table that ran side by side become one record, or none."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import bench_cpu

RECORD: dict[str, Any] = {
    "benchmark": "cpu",
    "chunk": 512,
    "machine": {"cpu": "one", "load_average": 1.0},
    "versions": {"commit": "abc"},
    "sections": {"batch": {"cores": [0, 1], "rows": [{"engine": "a"}]}},
}


def written(folder: Path, name: str, section: str, **changes: Any) -> Path:
    record = copy.deepcopy(RECORD) | changes
    record["sections"] = {section: {"cores": [2, 3], "rows": [{"engine": name}]}}
    record["machine"] = {**record["machine"], "load_average": 2.0}
    file = folder / f"{name}.json"
    file.write_text(json.dumps(record))
    return file


def test_sections_of_several_files_are_joined_in_the_tables_order(tmp_path: Path) -> None:
    files = [written(tmp_path, "one", "batch"), written(tmp_path, "two", "document")]
    joined = bench_cpu.join(files)
    assert list(joined["sections"]) == ["document", "batch"]
    assert [section["rows"][0]["engine"] for section in joined["sections"].values()] == ["two", "one"]
    assert joined["versions"] == RECORD["versions"]


@pytest.mark.parametrize(
    "changes", [{"chunk": 256}, {"versions": {"commit": "def"}}, {"machine": {"cpu": "two", "load_average": 2.0}}]
)
def test_records_of_unlike_runs_are_not_joined(tmp_path: Path, changes: dict[str, Any]) -> None:
    files = [written(tmp_path, "one", "batch"), written(tmp_path, "two", "document", **changes)]
    with pytest.raises(SystemExit, match=r"two\.json was measured otherwise than"):
        bench_cpu.join(files)


def test_a_section_that_two_files_hold_is_refused(tmp_path: Path) -> None:
    files = [written(tmp_path, "one", "batch"), written(tmp_path, "two", "batch")]
    with pytest.raises(SystemExit, match="holds batch once more"):
        bench_cpu.join(files)

"""`benchmarks/bench_scale.py --tiny`: the parts for GPUs run on a CPU, and the file for programs is written."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="needs accelerate: 'auvsum[split]'")
def test_parts_for_gpus(tmp_path: Path) -> None:
    out = tmp_path / "scale.json"
    done = subprocess.run(
        [sys.executable, "benchmarks/bench_scale.py", "--tiny", "--only", "documents,equal,split", "--out", str(out)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert json.loads(done.stdout.splitlines()[-1]) == record
    assert record["tiny"]
    assert record["machine"]["cpu"]
    values = {row["what"]: row["value"] for row in record["rows"]}
    assert values["equal summaries, two workers and one engine"] == 12
    assert values["equal summaries, tiny over two devices and on one"] == 8
    assert values["two workers against one"] > 0
    assert [sum(row["by_device"].values()) for row in record["rows"][:2]] == [12, 12]
    assert sum("decode, batch" in what for what in values) == 2

"""`--engine ray`: without Ray, without a cluster, and on one of several nodes that loses one of them and its driver."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray: pip install 'auvsum[ray]'")


def test_without_ray(cli: Any, one_line: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    cli.write("a.txt", "text")
    result = cli.inside("summarize", "a.txt", "--engine", "ray")
    assert (result.code, result.out) == (2, b"")
    one_line(result.err)
    assert "type: pip install 'auvsum[ray]'" in result.err


@needs_ray
@pytest.mark.parametrize("address", ["auto", "127.0.0.1:1"])
def test_without_a_cluster(cli: Any, one_line: Any, address: str) -> None:
    cli.write("a.txt", "text")
    result = cli.real("summarize", "a.txt", "--engine", "ray", "--address", address, "--model", "nowhere")
    assert (result.code, result.out) == (2, b"")
    one_line(result.err)
    assert f"no Ray cluster at {address}" in result.err


@needs_ray
def test_a_node_and_the_driver_are_lost() -> None:
    """A short form of `python -m tests.soak_ray`."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.soak_ray", "--documents", "30", "--nodes", "2"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    counted = json.loads(done.stdout.splitlines()[-1])
    assert (counted["documents"], counted["missing"], counted["other bytes"]) == (30, 0, 0)

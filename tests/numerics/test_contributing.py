"""The worked example of CONTRIBUTING.md is a policy: it is put where policies are, found, and run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from auvsum.cache import policies
from auvsum.cache.policy import make_policy, policy_names
from tests import tiny
from tests.numerics import harness

DOCUMENT = Path(__file__).parents[2] / "CONTRIBUTING.md"


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "peak.py").write_text(example, encoding="utf-8")
    monkeypatch.setattr(policies, "__path__", [*policies.__path__, str(tmp_path)])
    assert "peak" in policy_names()
    assert make_policy("peak", recent=6).least_slots == 7
    calls = harness.split(tiny.tokens(60, seed=95), 40, [15, 25])
    model = tiny.tiny_llama()
    trace, _cache = harness.run_package(model, calls, policy="peak", slots=20)
    assert harness.evictions(trace) >= 10
    for call in trace[1:]:
        for view in call.heads.values():
            assert len(view["positions"]) == 20
            assert view["positions"][-4:] == list(range(view["positions"][-1] - 3, view["positions"][-1] + 1))
    full, _ = harness.run_package(model, calls, policy="full")
    unbound, _ = harness.run_package(model, calls, policy="peak", slots=100)
    for mine, theirs in zip(unbound, full, strict=True):
        harness.close(mine.logits, theirs.logits, "logits", harness.LOGITS)


def test_policies_are_short() -> None:
    """One file of about 120 lines each; a longer one wants a helper in the protocol."""
    for path in policies.__path__:
        for file in Path(path).glob("*.py"):
            assert len(file.read_text(encoding="utf-8").splitlines()) <= 130, file.name

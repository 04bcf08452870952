"""`--jobs`: documents measured in processes of their own are the documents measured one after the other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from auvsum.engine.models import load
from auvsum.eval.config import EvalConfig
from auvsum.eval.datasets import Example
from auvsum.eval.runner import Runner
from auvsum.eval.runs import Run
from tests import checkpoints

WORDS = ["the", "bank", "lent", "money", "and", "town", "paid", "back", "with", "interest", "every", "year"]
EXAMPLES = [
    Example(str(n), " ".join(WORDS[(n + i * i) % len(WORDS)] for i in range(120 + 9 * n)) + ".", "money was lent")
    for n in range(5)
]
CONFIG = EvalConfig(
    dataset="mine.jsonl",
    dtype="fp32",
    policies=("h2o", "auv-look"),
    budgets=("40%",),
    kv_bits=(8,),
    max_tokens=12,
    metrics=("fidelity",),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(checkpoints.llama(tmp_path_factory.mktemp("jobs") / "model"))


@pytest.mark.parametrize("batch_size", [None, 2])
def test_two_processes_measure_what_one_does(tmp_path: Path, model: str, batch_size: int | None) -> None:
    config = replace(CONFIG, model=model)
    found = []
    for jobs in (1, 2):
        run = Run(tmp_path / f"jobs-{jobs}")
        run.begin(config, resume=False)
        Runner(config, load(model, dtype="fp32", threads=1), EXAMPLES, batch_size=batch_size).into(run, jobs)
        samples = {sample["id"]: sample["rows"] for sample in run.samples()}
        assert len(samples) == len(list(run.samples())) == 5
        found.append(samples)
    assert found[0] == found[1]
    rows = next(iter(found[0].values()))
    assert {"h2o @ 40% 8-bit", "auv-look @ 40% 8-bit"} <= set(rows)


@pytest.mark.parametrize("as_on_a_gpu", [False, True], ids=["a cache a row", "a cache a policy"])
@pytest.mark.parametrize("bits", [16, 8])
def test_documents_measured_together_are_those_measured_alone(
    model: str, bits: int, as_on_a_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if as_on_a_gpu:
        monkeypatch.setattr(Runner, "_group", lambda _, cell: cell.kind)
    policies = ("h2o", "nacl", "auv-v1", "auv-v4", "auv", "snapkv", "pyramidkv", "tova", "streaming", "auv-look")
    config = replace(CONFIG, model=model, policies=policies, budgets=("30%", "40%"), kv_bits=(bits,))
    config = replace(config, metrics=("fidelity", "rouge"))
    loaded = load(model, dtype="fp32", threads=1)

    def measured(batch_size: int) -> list[dict[str, Any]]:
        runner = Runner(config, loaded, EXAMPLES, batch_size=batch_size)
        return [{**sample, "seconds": 0} for sample in runner._by_batches(runner.examples)]

    alone, together = measured(1), measured(4)
    assert [sample["id"] for sample in together] == [sample["id"] for sample in alone]
    for one, other in zip(alone, together, strict=True):
        assert set(one["rows"]) == set(other["rows"])
        for name, row in one["rows"].items():
            assert "error" not in row, name
            # Products of several rows are rounded otherwise: a few ulp.
            assert other["rows"][name].pop("nats", 0) == pytest.approx(row.pop("nats", 0), abs=1e-4), name
            assert other["rows"][name] == row, name


def test_out_of_memory_is_tried_again_with_half_the_documents(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CONFIG, model=model)
    runner = Runner(config, load(model, dtype="fp32", threads=1), EXAMPLES, batch_size=5)
    real, sizes = runner._write, []

    def small(work: list[Any]) -> Any:
        sizes.append(len(work))
        if len(work) > 2 or any(item.example.id == "4" for item in work):
            raise torch.OutOfMemoryError("too many")
        return real(work)

    monkeypatch.setattr(runner, "_write", small)
    samples = list(runner._by_batches(runner.examples))
    assert [sample["id"] for sample in samples] == ["0", "1", "2", "3", "4"]
    assert [bool(sample["error"]) for sample in samples] == [False] * 4 + [True]
    assert sizes == [5, 3, 2, 1, 2, 1, 1]

"""`--jobs`: documents measured in processes of their own are the documents measured one after the other."""

from __future__ import annotations

from pathlib import Path

from auvsum.engine.models import load
from auvsum.eval.config import EvalConfig
from auvsum.eval.datasets import Example
from auvsum.eval.runner import Runner
from auvsum.eval.runs import Run
from tests import checkpoints


def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    model = str(checkpoints.llama(tmp_path / "model"))
    words = ["the", "bank", "lent", "money", "and", "town", "paid", "back", "with", "interest", "every", "year"]
    examples = [
        Example(str(n), " ".join(words[(n + i * i) % len(words)] for i in range(120)) + ".", "money was lent")
        for n in range(5)
    ]
    config = EvalConfig(
        dataset="mine.jsonl",
        model=model,
        dtype="fp32",
        policies=("h2o", "auv-look"),
        budgets=("40%",),
        kv_bits=(8,),
        max_tokens=12,
        metrics=("fidelity",),
    )
    found = []
    for jobs in (1, 2):
        run = Run(tmp_path / f"jobs-{jobs}")
        run.begin(config, resume=False)
        Runner(config, load(model, dtype="fp32", threads=1), examples).into(run, jobs)
        samples = {sample["id"]: sample["rows"] for sample in run.samples()}
        assert len(samples) == len(list(run.samples())) == 5
        found.append(samples)
    assert found[0] == found[1]
    rows = next(iter(found[0].values()))
    assert {"h2o @ 40% 8-bit", "auv-look @ 40% 8-bit"} <= set(rows)

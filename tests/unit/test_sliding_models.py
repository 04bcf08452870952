"""A model in which half of the layers slide, from end to end: budgets, `auvsum inspect` and `auvsum eval`."""

from __future__ import annotations

from pathlib import Path

import pytest

from auvsum.cache.sliding import SlidingWindow
from auvsum.config import Settings
from auvsum.engine.models import LoadedModel, load
from auvsum.eval.config import EvalConfig
from auvsum.eval.datasets import Example
from auvsum.eval.runner import Runner
from auvsum.eval.runs import Run
from auvsum.inspection import inspect
from auvsum.summarize import Summarizer
from tests import checkpoints
from tests.numerics.test_families import WINDOW, build

TEXT = "The committee met on the first of May, and what it decided was read aloud. " * 5


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder, tokenizer = tmp_path_factory.mktemp("models") / "gemma", checkpoints.chatml_tokenizer()
    build("gemma3", seed=8, vocab_size=len(tokenizer), max_position_embeddings=2048).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load(str(folder), device="cpu", dtype="fp32", threads=1)


@pytest.mark.parametrize("policy", ["auv-look", "h2o"])
def test_windows_come_off_the_budget(loaded: LoadedModel, policy: str) -> None:
    summarizer = Summarizer(loaded, Settings(policy=policy, budget="40%", kv_bits=8, max_tokens=24))
    plan, record = summarizer.plan(TEXT), summarizer.summarize(TEXT).record()
    cost = SlidingWindow(WINDOW).slot_cost(kv_heads=2, head_dim=8, element_bytes=4)
    windows = 2 * (cost.fixed + WINDOW * cost.per_slot)
    assert record["tokens"]["generated"] == 24
    assert windows < record["kv"]["peak_bytes"] <= plan.budget.bytes <= 0.4 * plan.budget.full_bytes


def test_auto_takes_the_second_look_as_elsewhere(loaded: LoadedModel) -> None:
    assert Summarizer(loaded, Settings(budget="40%", max_tokens=24)).plan(TEXT).policy.name == "auv-look"


def test_inspect_shows_the_other_layers(loaded: LoadedModel) -> None:
    (kept,) = inspect(loaded, Settings(policy="auv-look", budget="40%", kv_bits=8), TEXT, ["auv-look"])
    assert {layer for layer, _ in kept.heads} == {1, 3}
    assert 0 < sum(kept.share) < len(kept.share)


def test_eval_gives_shares_of_the_layers_that_evict(loaded: LoadedModel, tmp_path: Path) -> None:
    """All the windows of a short document would leave nothing to share."""
    config = EvalConfig(
        policies=["auv-look", "h2o"], budgets=["30%"], kv_bits=[8], metrics=["fidelity"], max_tokens=12, limit=2
    )
    runner = Runner(config, loaded, [Example("a", TEXT, ""), Example("b", TEXT[40:], "")])
    run = Run(tmp_path)
    runner.into(run)
    for sample in run.samples():
        assert sample["full_bytes"] == sample["tokens"]["prompt"] * 2 * 2 * 2 * 8 * 4
        for name in ("auv-look @ 30% 8-bit", "h2o @ 30% 8-bit"):
            row = sample["rows"][name]
            assert 0.25 * sample["full_bytes"] < row["bytes"] <= 0.3 * sample["full_bytes"]
            assert row["nats"] > 0.01

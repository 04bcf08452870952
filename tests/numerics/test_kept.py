"""A cache and its step that are used again write what fresh ones write. On a CPU the step is not captured, but run."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from auvsum.cache.cache import BudgetedCache
from auvsum.cache.policy import make_policy
from auvsum.engine import generate
from auvsum.engine.generate import Engine, Request
from auvsum.engine.graph import DecodeGraph
from auvsum.engine.kept import Kept
from auvsum.engine.memory import cache_shape
from auvsum.engine.sampling import Sampling
from auvsum.events import Finished, Prefilled

MADE: list[DecodeGraph] = []


class Uncaptured(DecodeGraph):
    """The step as it would be captured, run anew every time."""

    def __init__(self, model: Any, cache: BudgetedCache, *more: Any) -> None:
        shape = cache_shape(model)
        cache.allocate(kv_heads=shape.kv_heads, head_dim=shape.head_dim, dtype=model.dtype, device=model.device)
        MADE.append(self)
        super().__init__(model, cache, *more)

    def _capture(self) -> Any:
        return SimpleNamespace(replay=torch.no_grad()(self._step))


@pytest.fixture(autouse=True)
def on_a_cpu(opt: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes the engine take its way for a GPU."""
    before = opt.config._attn_implementation
    event = SimpleNamespace(record=lambda: None, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(generate, "DecodeGraph", Uncaptured)
    monkeypatch.setattr(generate, "fuse", lambda model: None)
    monkeypatch.setattr(generate, "why_not", lambda cache, device: None)
    MADE.clear()
    yield
    opt.set_attn_implementation(before)


def requests(seed: int, count: int = 7, new: int = 9) -> list[Request]:
    """Documents of different lengths and budgets, the largest budget among the first."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, 97, (25 + 5 * i,), generator=generator).tolist() for i in range(count)]
    return [Request(each, 25 - 4 * (i % 3), new - i % 4) for i, each in enumerate(ids)]


def events(engine: Engine, asked: list[Request]) -> list[tuple[Any, ...]]:
    """What does not depend on time: tokens, and bytes."""
    told: list[tuple[Any, ...]] = []
    for event in engine.run(asked):
        if isinstance(event, Finished):
            told.append((event.request, event.token_ids, event.reason, event.kv_bytes))
        elif isinstance(event, Prefilled):
            told.append((event.request, event.prefill_peak_bytes, event.kv_bytes))
    return told


@pytest.mark.parametrize("policy", ["auv", "h2o"])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, 0.9, 1.2, seed=3)], ids=["greedy", "drawn"])
def test_used_again_it_writes_what_a_fresh_one_writes(opt: PreTrainedModel, policy: str, sampling: Sampling) -> None:
    kept, runs = Kept(), [requests(1), requests(2), requests(1, count=3)]
    for number, asked in enumerate(runs):
        again = Engine(opt, make_policy(policy), batch_size=3, sampling=sampling, eos_ids=[5], kept=kept)
        fresh = Engine(opt, make_policy(policy), batch_size=3, sampling=sampling, eos_ids=[5])
        assert events(again, asked) == events(fresh, asked)
        assert len(MADE) == 1 + number + 1, "one for all runs of `kept`, one for each of the others"
    assert kept.bytes == MADE[0].cache.bytes()


@pytest.mark.parametrize("policy", ["auv", "h2o", "full"])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, 0.9, 1.2, seed=3)], ids=["greedy", "drawn"])
def test_the_step_writes_what_the_plain_one_writes(
    opt: PreTrainedModel, policy: str, sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = requests(4)
    if policy == "full":
        asked = [Request(request.ids, 70, request.max_new_tokens) for request in asked]
    ways = []
    for reason in (None, "a test says so"):
        monkeypatch.setattr(generate, "why_not", lambda cache, device, reason=reason: reason)
        engine = Engine(opt, make_policy(policy), batch_size=3, sampling=sampling, eos_ids=[5])
        ways.append(sorted(events(engine, asked), key=str))
    assert len(MADE) == 1
    assert ways[0] == ways[1]


@pytest.mark.parametrize(
    "other",
    [
        {"policy": make_policy("h2o")},
        {"policy": make_policy("auv", decay=0.25)},
        {"batch_size": 2},
        {"eos_ids": [6]},
        {"sampling": Sampling(repetition_penalty=1.1)},
        {"sampling": Sampling(temperature=0.5)},
    ],
    ids=str,
)
def test_of_another_kind_it_is_let_go(opt: PreTrainedModel, other: dict[str, Any]) -> None:
    kept = Kept()
    usual: dict[str, Any] = {"policy": make_policy("auv"), "batch_size": 3, "eos_ids": [5], "kept": kept}
    events(Engine(opt, **usual), requests(1))
    for asked, changed, made in [(requests(1), {}, 1), (requests(2), other, 2), (requests(3), {}, 3)]:
        events(Engine(opt, **{**usual, **changed}), asked)
        assert len(MADE) == made
    assert kept.bytes == MADE[-1].cache.bytes()


def test_other_slots_and_longer_draws_are_another_kind(opt: PreTrainedModel) -> None:
    engine = Engine(opt, make_policy("auv"), batch_size=3)
    more = [Request(request.ids, request.slots + 1, request.max_new_tokens) for request in requests(1)]
    for asked, made in [(requests(1), 1), (requests(1, new=12), 1), (more, 2)]:
        events(engine, asked)
        assert len(MADE) == made
    engine = Engine(opt, make_policy("auv"), batch_size=3, sampling=Sampling(temperature=1.0))
    for asked, made in [(requests(1), 3), (requests(1), 3), (requests(1, new=12), 4)]:
        events(engine, asked)
        assert len(MADE) == made


def test_what_a_run_leaves_in_the_middle_is_not_kept(opt: PreTrainedModel) -> None:
    engine = Engine(opt, make_policy("auv"), batch_size=3)
    running = engine.run(requests(1))
    next(event for event in running if isinstance(event, Finished))
    running.close()  # type: ignore[attr-defined]
    assert engine.kept.bytes == 0
    alone = Engine(opt, make_policy("auv"), batch_size=3)
    assert events(engine, requests(2)) == events(alone, requests(2))


def test_requests_are_taken_one_ahead(opt: PreTrainedModel) -> None:
    taken = 0

    def lazily() -> Iterator[Request]:
        nonlocal taken
        for request in requests(1, count=20, new=4):
            taken += 1
            yield request

    done = 0
    for event in Engine(opt, make_policy("auv"), batch_size=2).run(lazily()):
        if isinstance(event, Finished):
            done += 1
        assert taken <= done + 2 + 1
    assert done == 20

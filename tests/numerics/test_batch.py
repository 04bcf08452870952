"""Continuous batching: what a row writes does not depend on its neighbours; too little memory means fewer rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from auvsum.cache import together
from auvsum.cache.cache import BudgetedCache
from auvsum.cache.policy import make_policy
from auvsum.engine import memory
from auvsum.engine.generate import Engine, Request
from auvsum.engine.sampling import Sampling
from auvsum.errors import GenerationFailed
from auvsum.events import Failed, Finished, Notice, Token


@pytest.fixture(autouse=True)
def restored(opt: PreTrainedModel, llama: PreTrainedModel) -> Iterator[None]:
    """The engine sets the attention of the models, which other tests share."""
    before = [model.config._attn_implementation for model in (opt, llama)]
    yield
    for model, name in zip((opt, llama), before, strict=True):
        model.set_attn_implementation(name)


def requests(count: int = 6) -> list[Request]:
    """Documents of different lengths, budgets and numbers of tokens, so that rows are refilled in different phases."""
    generator = torch.Generator().manual_seed(7)
    return [
        Request(torch.randint(3, 97, (25 + 9 * i,), generator=generator).tolist(), 13 + 4 * (i % 3), 5 + 6 * (i % 4))
        for i in range(count)
    ]


def written(model: Any, policy: str, batch: int | None, sampling: Sampling) -> dict[int, tuple[int, ...]]:
    events = Engine(model, make_policy(policy), batch_size=batch, sampling=sampling, eos_ids=[5]).run(requests())
    return {event.request: event.token_ids for event in events if isinstance(event, Finished)}


SAMPLINGS = {
    "greedy": Sampling(),
    "drawn": Sampling(temperature=0.8, top_p=0.9, seed=3),
    "penalized": Sampling(repetition_penalty=1.3),
}


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize(("model", "policy"), [("opt", "auv"), ("llama", "auv"), ("llama", "h2o")], indirect=["model"])
def test_neighbours_change_nothing(model: PreTrainedModel, policy: str, sampling: str) -> None:
    """The tokens of every document are those it gets alone; the margins of these models are far above rounding."""
    alone = written(model, policy, 1, SAMPLINGS[sampling])
    assert set(alone) == set(range(6))
    assert len(set(alone.values())) > 1
    for batch in (2, 4, None):
        assert written(model, policy, batch, SAMPLINGS[sampling]) == alone


def test_logits_of_a_row_do_not_depend_on_its_neighbours(llama: PreTrainedModel) -> None:
    """One row beside different neighbours, with a budget of its own: equal logits at every step, to rounding."""
    traces = []
    stream = torch.randint(3, 97, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    for seed in (11, 12):
        engine = Engine(llama, make_policy("auv"), batch_size=3)
        cache = BudgetedCache(llama.config, "auv", slots=31, batch=3)
        generator = torch.Generator().manual_seed(seed)
        for row, (length, slots) in enumerate([(50, 31), (40, 19), (20 + seed, 25)]):
            ids = stream if row == 1 else torch.randint(3, 97, (length,), generator=generator).tolist()
            cache.begin(len(ids), row=row, slots=slots)
            engine._read(cache, row, ids, 0)
        steps = []
        for number in range(30):
            others = torch.randint(3, 97, (2,), generator=generator).tolist()
            tokens = [others[0], stream[number], others[1]]
            steps.append(engine._step(cache, tokens, [50 + number, 40 + number, 20 + seed + number])[1])
        traces.append(torch.stack(steps))
    assert torch.allclose(*traces, rtol=1e-5, atol=1e-5)


class Short:
    """A model that runs out of memory when more than `most` rows are decoded together."""

    def __init__(self, model: PreTrainedModel, most: int) -> None:
        self._model, self._most = model, most
        self.failures = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, tokens: torch.Tensor, **options: Any) -> Any:
        self.steps = getattr(self, "steps", 0) + 1
        if tokens.shape[0] > self._most and self.steps % 9 == 0:  # not at once: some tokens have been told by then
            self.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory (as told by a test)")
        return self._model(tokens, **options)


def test_out_of_memory_goes_on_with_fewer_rows(opt: PreTrainedModel) -> None:
    expected = written(opt, "auv", 1, Sampling())
    short = Short(opt, 2)
    events = list(Engine(short, make_policy("auv"), batch_size=6, eos_ids=[5]).run(requests()))
    assert {e.request: e.token_ids for e in events if isinstance(e, Finished)} == expected
    told: dict[int, list[int]] = {}
    for event in events:
        if isinstance(event, Token):
            told.setdefault(event.request, []).append(event.token_id)
    assert {index: tuple(tokens) for index, tokens in told.items()} == expected
    assert short.failures >= 1
    assert any(isinstance(e, Notice) and "out of memory" in e.text for e in events)


def test_out_of_memory_with_one_row_is_an_error(opt: PreTrainedModel) -> None:
    events = list(Engine(Short(opt, 0), make_policy("auv"), batch_size=2).run(requests(2)))
    failed = [event for event in events if isinstance(event, Failed)]
    ended = {event.request for event in events if isinstance(event, Finished)}
    assert failed
    assert ended.isdisjoint(event.request for event in failed)
    assert ended | {event.request for event in failed} == {0, 1}
    assert all(isinstance(event.error, GenerationFailed) and "memory" in event.error.message for event in failed)


def test_rows_follow_the_free_memory(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy("auv")
    fits = {}
    for kibibytes in (500, 1000, 1500, 10_000_000):
        monkeypatch.setattr(memory, "free_bytes", lambda _, n=kibibytes: n * 2**10)
        fits[kibibytes] = memory.rows_that_fit(llama, policy, [Request([1] * 30, 256, 8)] * 40)
    assert 1 <= fits[500] < fits[1000] < fits[1500] <= fits[10_000_000] == memory.MOST_ROWS["cpu"]
    assert memory.rows_that_fit(llama, policy, [Request([1] * 30, 256, 8)] * 3) == 3


def test_the_plain_path_says_so_once(opt: PreTrainedModel) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is there: the other path runs")
    engine = Engine(opt, make_policy("auv"))
    notices = [event.text for _ in range(2) for event in engine.run(requests(2)) if isinstance(event, Notice)]
    assert notices == ["the plain decode step runs: the device is cpu, not a GPU"]


def decoded(model: PreTrainedModel, steps: int) -> list[dict[str, Any]]:
    """What AUV holds after that many steps that nobody looked into, in every layer, row and head."""
    cache = BudgetedCache(model.config, "auv", slots=31)
    ids = torch.randint(3, 97, (2, 50 + steps), generator=torch.Generator().manual_seed(2))
    model.set_attn_implementation("auvsum")
    with torch.no_grad():
        model(ids[:, :50], past_key_values=cache)
        for at in range(50, 50 + steps):
            positions = torch.full((2, 1), at)
            model(ids[:, at : at + 1], position_ids=positions, past_key_values=cache)
    places = [(layer.store, row, head) for layer in cache.layers for row in range(2) for head in range(layer.heads)]
    return [store.snapshot(row, head) for store, row, head in places]


@pytest.mark.parametrize("steps", [7, 10, 23])  # L is 10: before, at and behind an eviction
@pytest.mark.parametrize("model", ["opt", "llama"], indirect=True)
def test_books_of_several_steps_at_once_are_those_of_each(
    model: PreTrainedModel, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(together, "_MOST_STEPS", 1)
    wanted = decoded(model, steps)
    assert any(count > 0 for held in wanted for count in held["state"]["usage"])
    for most in (3, 8):
        monkeypatch.setattr(together, "_MOST_STEPS", most)
        for found, want in zip(decoded(model, steps), wanted, strict=True):
            assert found["positions"] == want["positions"]
            assert found["state"]["usage"] == want["state"]["usage"]
            for name in ("aas", "cnt"):
                assert found["state"][name] == pytest.approx(want["state"][name], rel=1e-5)


@pytest.mark.parametrize("model", ["opt", "llama"], indirect=True)
def test_rows_that_are_refilled_while_books_wait(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(together, "_MOST_STEPS", 1)
    wanted = written(model, "auv", 3, Sampling())
    monkeypatch.setattr(together, "_MOST_STEPS", 8)
    assert written(model, "auv", 3, Sampling()) == wanted

"""Positions inside the cache: keys turned anew equal keys computed there; nothing changes while nothing is evicted."""

from __future__ import annotations

import itertools

import pytest
import torch

from auvsum.cache.cache import BudgetedCache
from auvsum.cache.policy import make_policy
from auvsum.cache.rotary import Rotary
from auvsum.engine.generate import Engine, Request
from auvsum.engine.lean import lean_step
from auvsum.engine.parts import Part, chunks, windows
from auvsum.events import Finished
from tests import checkpoints
from tests.tiny import VOCAB, tiny_llama, tiny_opt


def ids(count: int, seed: int = 0) -> list[int]:
    return torch.randint(2, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def written(model: torch.nn.Module, request: Request, policy: str = "auv", **options: object) -> list[int]:
    events = Engine(model, make_policy(policy, **options)).run([request])
    return next(list(event.token_ids) for event in events if isinstance(event, Finished))


def test_keys_turned_anew_equal_keys_computed_there() -> None:
    model = tiny_llama()
    rotary = Rotary.of(model)
    assert rotary is not None
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    keys = torch.randn(1, 2, 50, 2 * rotary.inv_freq.shape[0], generator=torch.Generator().manual_seed(1))

    def computed(positions: torch.Tensor) -> torch.Tensor:
        return apply_rotary_pos_emb(keys, keys, *model.model.rotary_emb(keys, positions[None]))[1]

    there, here = torch.arange(3000, 3050), torch.arange(50)
    moved = rotary.turn(rotary.turn(computed(there), -there), here)
    assert torch.allclose(moved, computed(here), atol=2e-4)
    assert torch.allclose(rotary.turn(keys, there), computed(there), atol=1e-5)
    assert not torch.allclose(computed(there), computed(here), atol=1e-1)


def test_models_without_such_angles_are_recognized() -> None:
    assert Rotary.of(tiny_opt()) is None
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert Rotary.of(checkpoints.llama_model(rope_parameters=dynamic)) is None
    assert Rotary.of(checkpoints.llama_model(rope_parameters={**dynamic, "rope_type": "linear"})) is not None


@pytest.mark.parametrize(("policy", "slots"), [("full", 200), ("auv", 220), ("h2o", 200)])
def test_compact_equals_literal_while_nothing_is_evicted(policy: str, slots: int) -> None:
    model, prompt = tiny_llama(), ids(150)
    literal = written(model, Request(prompt, slots, 20), policy)
    for size in (7, 64, 150):
        parts = chunks(150, size, compact=True)
        assert written(model, Request(prompt, slots, 20, parts), policy) == literal


def test_what_is_held_equals_a_cache_with_those_positions() -> None:
    """After eviction, too: the stored keys are the un-turned keys of the kept tokens, turned to their ranks."""
    model, prompt = tiny_llama(), ids(120)
    engine = Engine(model, make_policy("h2o"))
    rotary = Rotary.of(model)
    assert rotary is not None
    cache = BudgetedCache(model.config, "h2o", 40, batch=1)
    cache.begin(120, row=0, slots=40, rotary=rotary)
    for part in chunks(120, 30, compact=True):
        engine._read(cache, 0, prompt[part.start : part.end], cache.next_part(0, None))
    # The first layer's keys depend on token and position alone, so they can be had without any of this.
    literal = BudgetedCache(model.config, "full", 130)
    engine._read(literal, 0, prompt, 0)
    assert cache.end_prompt(0) == 40
    for head in range(cache.layers[0].store.positions.shape[1]):
        kept = cache.layers[0].store.snapshot(0, head)
        whole = literal.layers[0].store.snapshot(0, head)
        at = torch.tensor(kept["positions"])
        wanted = rotary.turn(rotary.turn(whole["keys"][at], -at), torch.arange(40))
        assert torch.allclose(kept["keys"], wanted, atol=1e-4)
        assert torch.allclose(kept["values"], whole["values"][at], atol=1e-5)
    assert cache.end_prompt(0) is None


@pytest.mark.parametrize("policy", ["auv", "h2o"])
def test_a_stream_goes_on_past_the_positions(policy: str) -> None:
    model = checkpoints.llama_model(VOCAB, max_position_embeddings=128)
    seen: list[int] = []
    step = lean_step(model)
    assert step is not None

    def watch(tokens: torch.Tensor, positions: torch.Tensor, *rest: object, **more: object) -> object:
        seen.append(int(positions.max()))
        return step(tokens, positions, *rest, **more)

    model.auvsum_step = watch  # what reads and what writes
    tokens = written(model, Request(ids(1000), 61, 16, chunks(1000, 32, compact=True)), policy)
    assert len(tokens) > 0
    assert max(seen) < 128
    assert min(seen[-3:]) >= 40


@pytest.mark.parametrize("policy", ["auv", "h2o"])
def test_windows_restart_after_the_head_and_share_the_slots(policy: str) -> None:
    model, prompt = tiny_opt(), ids(1300)
    parts = windows(1300, head=10, tail=6, room=480, slots=60)
    assert [part.position for part in parts] == [0, 10, 10]
    assert (parts[0].start, parts[-1].end) == (0, 1300)
    assert all(a.end == b.start for a, b in itertools.pairwise(parts))
    assert all((part.position or 0) + part.end - part.start <= 480 for part in parts)
    engine = Engine(model, make_policy(policy))
    cache = BudgetedCache(model.config, policy, 61, batch=1)
    cache.begin(1300, row=0, slots=61)
    for part in parts:
        cache.next_part(0, part.share)
        engine._read(cache, 0, prompt[part.start : part.end], part.position or 0)
        positions = cache.layers[1].store.snapshot(0, 1)["positions"]
        assert any(part.start <= position < part.end for position in positions)
    counts = [sum(part.start <= position < part.end for position in positions) for part in parts]
    assert len(set(counts)) == 1
    assert len(positions) <= 60
    assert written(model, Request(prompt, 61, 8, parts), policy)


def test_parts() -> None:
    assert chunks(10, 4) == (Part(0, 4, 0), Part(4, 8, 4), Part(8, 10, 8))
    assert chunks(5, None) == (Part(0, 5, 0),)
    assert [part.position for part in chunks(10, 4, compact=True)] == [None] * 3

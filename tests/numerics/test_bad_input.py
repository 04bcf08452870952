"""What people and models get wrong: a clear error, or an exact result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from auvsum.cache.cache import BudgetedCache
from auvsum.cache.policy import make_policy
from auvsum.cache.store import SlotStore
from auvsum.engine.generate import Engine, Request
from auvsum.errors import GenerationFailed, PolicyError
from auvsum.events import Failed
from tests import tiny
from tests.numerics import harness

POLICIES = harness.SLOT_POLICIES


@pytest.mark.parametrize("policy", POLICIES)
def test_too_few_slots_names_the_least_and_the_least_works(llama: PreTrainedModel, policy: str) -> None:
    least = make_policy(policy).least_slots
    with pytest.raises(PolicyError, match=f"at least {least} slots") as error:
        BudgetedCache(llama.config, policy=policy, slots=least - 1)
    assert str(least) in error.value.hint
    calls = harness.split(tiny.tokens(40, seed=97), 30)
    trace, _ = harness.run_package(llama, calls, policy=policy, slots=least)
    assert torch.isfinite(trace[-1].logits).all()


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("policy", POLICIES)
def test_tiny_prompts_are_exact(llama: PreTrainedModel, policy: str, tokens: int) -> None:
    """One token, or fewer than the local area: what the engine writes is what the full cache writes."""
    ids = tiny.tokens(tokens, seed=98)[0].tolist()

    def written(name: str, slots: int) -> tuple[int, ...]:
        events = list(Engine(llama, make_policy(name)).run([Request(ids, slots, 8)]))
        return tuple(events[-1].token_ids)

    with harness.attention(llama, "auvsum"):
        assert written(policy, 40) == written("full", 40)


def test_an_empty_prompt_and_logits_that_are_not_numbers(llama: PreTrainedModel) -> None:
    with harness.attention(llama, "auvsum"), pytest.raises(GenerationFailed, match="empty"):
        list(Engine(llama, make_policy("auv")).run([Request([], 20, 4)]))
    broken = tiny.tiny_llama()
    with torch.no_grad():
        broken.lm_head.weight[3, 0] = torch.nan
    last = list(Engine(broken, make_policy("auv")).run([Request([5, 6, 7], 20, 4)]))[-1]
    assert isinstance(last, Failed)
    assert isinstance(last.error, GenerationFailed)
    assert "not finite" in last.error.message


@pytest.mark.parametrize("policy", ["auv", "snapkv", "full"])
def test_beam_search_is_refused(llama: PreTrainedModel, policy: str) -> None:
    cache = BudgetedCache(llama.config, policy=policy, slots=None if policy == "full" else 20)
    with harness.attention(llama, "auvsum"), pytest.raises(PolicyError, match="beam search") as error:
        llama.generate(tiny.tokens(30, seed=99), past_key_values=cache, num_beams=2, max_new_tokens=4)
    assert "num_beams=1" in error.value.hint


@pytest.mark.parametrize(
    ("policy", "options"),
    [("auv", {}), ("auv-v3", {}), ("h2o", {}), ("scissorhands", {"window": 24}), ("snapkv", {})],
)
def test_ten_thousand_steps(policy: str, options: dict[str, Any]) -> None:
    """Counts and scores stay finite, the cap holds and the newest token is there: one policy of each kind of state."""
    chosen: Any = make_policy(policy, **options)
    store = SlotStore(
        batch=1, kv_heads=2, slots=chosen.capacity(24), head_dim=2, dtype=torch.float32, device=torch.device("cpu"),
        state=chosen.state, reconstruct=chosen.keeps_reconstructed,
    )  # fmt: skip
    store.longest[0] = 1
    draws = torch.rand((97, 1, 2, store.positions.shape[2]), generator=torch.Generator().manual_seed(1))
    vectors = torch.ones(1, 2, 2)
    for step in range(10_000):
        store.append(chosen.place(store), vectors, vectors)
        weights = draws[step % 97] * store.valid
        chosen.observe(store, weights / weights.sum(-1, keepdim=True))
    assert int(store.seen[0]) == 10_000
    assert store.live(0) <= chosen.capacity(24)
    assert store.snapshot(0, 1)["positions"][-1] == 9_999
    for name, values in store.state.items():
        assert torch.isfinite(values).all(), name
        assert (values >= 0).all(), name
        # A count that reached 2**24 would stand still.
        assert values.max() < 2**24, name

"""A cache that evicts nothing is transformers' own, token for token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests import tiny
from tests.numerics import harness
from tests.numerics.naive import NaiveHead

PROMPT, NEW = 40, 35

# "Never binds" is n + max_new_tokens <= 3L: 75 = 3 * 25 is the least that qualifies for AUV.
UNBOUND: dict[str, dict[str, Any]] = {
    "full": {"policy": "full"},
    "auv": {"policy": "auv", "slots": 400},
    "auv, exactly 3L": {"policy": "auv", "slots": PROMPT + NEW + 1},
    "auv without reconstructed slot, exactly 3L": {"policy": "auv", "slots": PROMPT + NEW, "reconstruct": False},
    "h2o": {"policy": "h2o", "slots": 400},
    "h2o, exactly the tokens": {"policy": "h2o", "slots": PROMPT + NEW},
}


def greedy(model: PreTrainedModel, ids: torch.Tensor, chunks: list[int], **options: Any) -> tuple[list[int], Any]:
    from auvsum.cache.cache import BudgetedCache

    cache = BudgetedCache(model.config, **options)
    out: list[int] = []
    with harness.attention(model, "auvsum"), torch.no_grad():
        for part in torch.split(ids, chunks, dim=1):
            logits = model(part, past_key_values=cache, use_cache=True).logits
        while True:
            out.append(int(logits[0, -1].argmax()))
            if len(out) == NEW:
                return out, cache
            logits = model(torch.tensor([[out[-1]]]), past_key_values=cache, use_cache=True).logits


def generated(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, cache: Any = None) -> list[list[int]]:
    """What transformers' own greedy loop adds to each row."""
    given = {} if cache is None else {"past_key_values": cache}
    out = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, **given)
    return out[:, ids.shape[1] :].tolist()


@pytest.fixture(scope="module")
def prompt() -> torch.Tensor:
    return tiny.tokens(PROMPT, seed=51)


@pytest.mark.parametrize("chunks", [[PROMPT], [15, 2, 23]], ids=["one-shot", "chunked"])
@pytest.mark.parametrize("name", UNBOUND)
def test_unbound_equals_generate(model: PreTrainedModel, prompt: torch.Tensor, name: str, chunks: list[int]) -> None:
    reference = generated(model, prompt, torch.ones_like(prompt))[0]
    assert len(set(reference)) > 5, "a model that repeats one token would agree with anything"
    out, cache = greedy(model, prompt, chunks, **UNBOUND[name])
    assert out == reference
    for layer in cache.layers:
        assert sorted(layer.store.snapshot(0, 0)["positions"]) == list(range(PROMPT + NEW - 1))


@pytest.mark.parametrize(
    "options", [{"policy": "full"}, {"policy": "auv", "slots": 25}, {"policy": "h2o", "slots": 16}], ids=str
)
def test_generate_takes_the_cache(model: PreTrainedModel, prompt: torch.Tensor, options: dict[str, Any]) -> None:
    """As `past_key_values` of transformers' own loop it gives what feeding the model token by token gives."""
    from auvsum.cache.cache import BudgetedCache

    with harness.attention(model, "auvsum"):
        out = generated(model, prompt, torch.ones_like(prompt), BudgetedCache(model.config, **options))
    assert out[0] == greedy(model, prompt, [PROMPT], **options)[0]


@pytest.mark.parametrize(
    "options", [{"policy": "full"}, {"policy": "auv", "slots": 25}, {"policy": "h2o", "slots": 16}], ids=str
)
def test_generate_with_left_padding(model: PreTrainedModel, prompt: torch.Tensor, options: dict[str, Any]) -> None:
    """Two rows, one padded: each says what it says alone, with Llama's position ids as transformers gives them."""
    from auvsum.cache.cache import BudgetedCache

    short, pads = tiny.tokens(PROMPT - 17, seed=54), 17
    padded = torch.cat([torch.zeros(1, pads, dtype=torch.long), short], dim=1)
    both = torch.cat([prompt, padded])
    mask = torch.ones_like(both)
    mask[1, :pads] = 0
    with harness.attention(model, "auvsum"):
        out = generated(model, both, mask, BudgetedCache(model.config, **options))
    assert out[0] == greedy(model, prompt, [PROMPT], **options)[0]
    assert out[1] == greedy(model, short, [PROMPT - pads], **options)[0]


def test_one_slot_group_less_does_bind(opt: PreTrainedModel, prompt: torch.Tensor) -> None:
    """The other side of "exactly 3L": with L = 24 something has gone by the end."""
    _, cache = greedy(opt, prompt, [PROMPT], policy="auv", slots=73)
    assert len(cache.layers[0].store.snapshot(0, 0)["positions"]) < PROMPT + NEW - 1


@pytest.mark.parametrize("chunks", [None, [15, 2, 23]], ids=["one-shot", "chunked"])
def test_full_matches_the_oracle(model: PreTrainedModel, chunks: list[int] | None) -> None:
    calls = harness.split(tiny.tokens(100, seed=52), 40, chunks)
    expected, _ = harness.run_naive(model, calls, NaiveHead)
    actual, _ = harness.run_package(model, calls, policy="full")
    harness.compare(actual, expected)


def test_full_with_left_padding(opt: PreTrainedModel) -> None:
    alone, pads = tiny.tokens(60, seed=53), 10
    padded = torch.cat([torch.zeros(1, pads, dtype=torch.long), alone], dim=1)
    mask = torch.ones_like(padded)
    mask[0, :pads] = 0
    expected, _ = harness.run_naive(opt, harness.split(alone, 30), NaiveHead)
    actual, _ = harness.run_package(opt, harness.split(padded, 40), mask=mask, policy="full")
    actual[0].logits = actual[0].logits[pads:]
    harness.compare(actual, expected)

"""A cache that nobody uses any more is gone at once: what waits for a garbage collection is missing on a full GPU."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from auvsum.cache.cache import BudgetedCache
from auvsum.cache.policy import make_policy
from auvsum.engine.generate import Engine, make_cache
from tests import tiny


@pytest.fixture(autouse=True)
def no_collection(opt: PreTrainedModel) -> Iterator[None]:
    before = opt.config._attn_implementation
    gc.disable()
    yield
    gc.enable()
    opt.set_attn_implementation(before)


def everything(cache: BudgetedCache) -> dict[str, weakref.ref[Any]]:
    """The cache, its layers, their stores and books, and a tensor of each store."""
    parts: dict[str, Any] = {"cache": cache}
    for number, layer in enumerate(cache.layers):
        parts[f"layer {number}"] = layer
        parts |= {f"store {number}": layer.store, f"books {number}": layer.books, f"all {number}": layer.books.whole}
        parts[f"keys {number}"] = layer.store.keys[0]
    return {name: weakref.ref(part) for name, part in parts.items()}


@pytest.mark.parametrize("policy", ["auv", "h2o", "full"])
@pytest.mark.parametrize("lean", [True, False])
def test_a_cache_is_freed_without_a_collection(policy: str, lean: bool, opt: PreTrainedModel) -> None:
    engine = Engine(opt, make_policy(policy))
    if not lean:
        engine.lean = None
    cache = make_cache(opt.config, engine.policy, 40 if policy == "full" else 16, 1)
    cache.begin(24)
    engine._read(cache, 0, tiny.tokens(24, 0)[0].tolist(), 0)
    for position in range(24, 35):  # evictions, and books that wait
        engine._step(cache, [5], [position])
    known = everything(cache)
    del cache
    assert [name for name, part in known.items() if part() is not None] == []


def test_a_store_by_itself_has_its_books_kept(opt: PreTrainedModel) -> None:
    """Whoever holds a store alone sees the steps that waited when the cache went."""
    engine = Engine(opt, make_policy("auv"))
    stores = []
    for ask_before in (True, False):
        cache = make_cache(opt.config, engine.policy, 16, 1)
        cache.begin(24)
        engine._read(cache, 0, tiny.tokens(24, 0)[0].tolist(), 0)
        engine._step(cache, [5], [24])
        stores.append(cache.layers[0].store)
        if ask_before:
            assert stores[0].state["cnt"].max() > 1
        del cache
    assert torch.equal(*(store.state["cnt"] for store in stores))

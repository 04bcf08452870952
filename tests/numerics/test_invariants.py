"""Whatever the lengths, the budget and the chunks: the cap holds, the newest token lives, the bytes are told truly."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from auvsum.cache.policy import make_policy
from tests import tiny
from tests.numerics import harness

MODELS = {"opt": tiny.tiny_opt(layers=1), "llama": tiny.tiny_llama(layers=1)}
DECODE = 12
POLICIES = harness.SLOT_POLICIES


@st.composite
def runs(draw: st.DrawFn) -> dict[str, Any]:
    prompt = draw(st.integers(1, 120))
    policy = draw(st.sampled_from(["auv without reconstructed slot", *POLICIES]))
    least = 3 if " " in policy else make_policy(policy).least_slots
    options: dict[str, Any] = {"policy": policy.split()[0], "slots": draw(st.integers(least, 70))}
    if " " in policy:
        options["reconstruct"] = False
    streams = make_policy(options["policy"]).streams
    return {
        "model": draw(st.sampled_from(sorted(MODELS))),
        "batch": draw(st.integers(1, 2)),
        "prompt": prompt,
        "chunks": draw(chunk_sizes(prompt)) if streams else [prompt],
        "options": options,
        "seed": draw(st.integers(0, 1000)),
    }


@st.composite
def chunk_sizes(draw: st.DrawFn, prompt: int) -> list[int]:
    """Sizes of at least 2 that add up to the prompt: a call of one token is a decode step."""
    sizes: list[int] = []
    left = prompt
    while left > 3 and draw(st.booleans()):
        sizes.append(draw(st.integers(2, left - 2)))
        left -= sizes[-1]
    return [*sizes, left]


def tensors(root: Any, name: str = "store", visited: set[int] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor that can be reached from an object through attributes, mappings and sequences."""
    visited = set() if visited is None else visited
    if isinstance(root, torch.Tensor):
        yield name, root
        return
    if id(root) in visited or isinstance(root, (str, bytes, int, float, type, torch.dtype, torch.device, type(None))):
        return
    visited.add(id(root))
    if isinstance(root, dict):
        children = [(f"{name}[{key}]", value) for key, value in root.items()]
    elif isinstance(root, (list, tuple, set)):
        children = [(f"{name}[{index}]", value) for index, value in enumerate(root)]
    elif type(root).__module__.split(".")[0] == "auvsum":
        slots = [slot for base in type(root).__mro__ for slot in getattr(base, "__slots__", ())]
        held = {slot: getattr(root, slot) for slot in slots if hasattr(root, slot)} | getattr(root, "__dict__", {})
        children = [(f"{name}.{key}", value) for key, value in held.items()]
    else:
        return
    for child_name, child in children:
        yield from tensors(child, child_name, visited)


def storages(cache: Any) -> dict[int, int]:
    """Address -> bytes of every storage under the stores of all layers, each once."""
    found = {}
    for layer in cache.layers:
        for _, tensor in tensors(layer.store):
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def slot_addresses(cache: Any) -> dict[str, int]:
    """Name -> address of every tensor that holds keys, values, positions or state."""
    return {
        f"{index}: {name}": tensor.untyped_storage().data_ptr()
        for index, layer in enumerate(cache.layers)
        for name, tensor in tensors(layer.store)
    }


def check_slots(cache: Any, run: dict[str, Any], kv_heads: int, seen: int) -> None:
    for layer in cache.layers:
        for row in range(run["batch"]):
            for head in range(kv_heads):
                view = layer.store.snapshot(row, head)
                positions = [int(position) for position in view["positions"]]
                live = len(positions) + (view["reconstructed"] is not None)
                assert live <= run["options"]["slots"]
                assert len(set(positions)) == len(positions)
                assert positions == sorted(positions)
                assert positions[0] >= 0
                # The newest token lives, and nothing is beyond it; TOVA alone may drop even that one after a prompt.
                newest = positions[-1] == seen - 1
                assert newest or (run["options"]["policy"] == "tova" and seen <= run["prompt"])
                assert len(view["keys"]) == len(view["values"]) == len(positions)
                for name, values in view["state"].items():
                    assert len(values) == len(positions), name
                    assert all(value == value and value >= 0 for value in map(float, values)), name


@settings(max_examples=120, deadline=None)
@given(run=runs())
def test_the_cache_keeps_its_word(run: dict[str, Any]) -> None:
    from auvsum.cache.cache import BudgetedCache

    model: PreTrainedModel = MODELS[run["model"]]
    kv_heads = getattr(model.config, "num_key_value_heads", model.config.num_attention_heads)
    stream = torch.cat([tiny.tokens(run["prompt"] + DECODE, run["seed"] + row) for row in range(run["batch"])])
    cache = BudgetedCache(model.config, **run["options"])
    cache.begin(prompt_tokens=run["prompt"])
    seen = 0
    addresses: dict[str, int] = {}
    with harness.attention(model, "auvsum"), torch.no_grad():
        for ids in harness.split(stream, run["prompt"], run["chunks"]):
            assert torch.isfinite(model(ids, past_key_values=cache, use_cache=True).logits).all()
            seen += ids.shape[1]
            assert cache.get_seq_length() == seen
            check_slots(cache, run, kv_heads, seen)
            assert cache.bytes() == sum(storages(cache).values())
            if seen == run["prompt"]:
                addresses = slot_addresses(cache)
                assert any("key" in name for name in addresses)
                assert any("value" in name for name in addresses)
            elif seen > run["prompt"]:
                assert slot_addresses(cache) == addresses  # nothing was concatenated or reallocated


@pytest.mark.parametrize(
    ("options", "least"),
    [
        ({"policy": "auv", "slots": 3}, "4"),
        ({"policy": "auv", "slots": 2, "reconstruct": False}, "3"),
    ],
)
def test_too_small_a_budget_names_the_least_that_works(options: dict[str, Any], least: str) -> None:
    """`L < 1` is an error, at the latest when the first tokens come."""
    from auvsum.cache.cache import BudgetedCache
    from auvsum.errors import AuvsumError

    model = MODELS["opt"]
    with harness.attention(model, "auvsum"), torch.no_grad(), pytest.raises(AuvsumError) as error:
        model(tiny.tokens(8, 0), past_key_values=BudgetedCache(model.config, **options), use_cache=True)
    assert least in f"{error.value} {getattr(error.value, 'hint', '')}"

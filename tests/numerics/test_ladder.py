"""AUV's ladder: the equivalences that the paper's steps have, the names, the memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from auvsum.cache.policies.auv_v2 import AuvV2
from auvsum.cache.policies.auv_v3 import AuvV3
from auvsum.cache.policy import ascending, make_policy
from auvsum.cache.store import SlotStore
from auvsum.errors import PolicyError
from tests import tiny
from tests.numerics import harness
from tests.numerics.test_invariants import slot_addresses

KEYS, HEADS = 24, 3


def state(seed: int) -> tuple[Tensor, Tensor]:
    """fp64 AAS without zeros and integer usage counts of one row, `[G, KEYS]`."""
    generator = torch.Generator().manual_seed(seed)
    aas = torch.rand((HEADS, KEYS), generator=generator, dtype=torch.float64) + 1e-6
    usage = torch.randint(1, 5, (HEADS, KEYS), generator=generator).double()
    return aas, usage


def store_of(aas: Tensor, usage: Tensor) -> SlotStore:
    store = SlotStore(
        batch=1, kv_heads=HEADS, slots=KEYS, head_dim=2, dtype=torch.float32, device=torch.device("cpu"),
        state=("aas", "cnt", "usage"),
    )  # fmt: skip
    store.state["aas"], store.state["usage"] = aas[None].clone(), usage[None].clone()
    store.positions[0] = torch.arange(KEYS, dtype=torch.int32)
    store.valid[0] = True
    return store


def victims(policy: Any, aas: Tensor, usage: Tensor, count: int) -> list[list[int]]:
    """The victims one after the other; what has gone is out of reach."""
    store, out = store_of(aas, usage), []
    for _ in range(count):
        at = policy.victim(store, torch.tensor([0]), torch.ones((1, 1, KEYS), dtype=torch.bool))[0]
        out.append(at.tolist())
        heads = torch.arange(HEADS)
        store.state["usage"][0, heads, at] = 1e9
        store.state["aas"][0, heads, at] = 1e9
    return [list(head) for head in zip(*out, strict=True)]


def second_chance(aas: list[float], usage: list[float], count: int) -> list[int]:
    """Fig. 3 to the letter, for one head."""
    out: list[int] = []
    usage = list(usage)
    while len(out) < count:
        order = sorted((j for j in range(len(aas)) if j not in out), key=lambda j: (aas[j], j))
        found = None
        while found is None:
            for j in order:
                if usage[j] == 0:
                    found = j
                    break
                usage[j] -= 1
        out.append(found)
    return out


@pytest.mark.parametrize("seed", range(5))
def test_v2_v3_and_c_pick_the_same_first_victim_and_v3_and_c_the_same_set(seed: int) -> None:
    aas, usage = state(seed)
    composite = usage * aas.amax(-1, keepdim=True) + aas  # eq. 5
    order = ascending(composite, torch.arange(KEYS).expand(HEADS, KEYS))
    naive, optimized = (victims(policy(), aas, usage, KEYS // 2) for policy in (AuvV2, AuvV3))
    for head in range(HEADS):
        assert naive[head] == second_chance(aas[head].tolist(), usage[head].tolist(), KEYS // 2)
        assert naive[head][0] == optimized[head][0] == int(order[head, 0])
        assert optimized[head] == order[head, : KEYS // 2].tolist()
    assert naive != optimized  # the decrements before the first victim change the later ones


def test_names_and_options_of_the_ladder() -> None:
    assert make_policy("auv", eviction="single-step", top_k=3) == make_policy("auv-v3", top_k=3)
    assert make_policy("auv", eviction="naive") == make_policy("auv-v2")
    assert make_policy("auv", eviction="multi-step") == make_policy("auv")
    assert make_policy("auv", eviction="single-step", reconstruct=False, decay=1.0) == make_policy("auv-v3")
    v4 = make_policy("auv-v4")
    assert (v4.decay, v4.reconstruct) == (1.0, False)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("auv", {"eviction": "single-step", "reconstruct": True}),
        ("auv", {"eviction": "naive", "decay": 0.5}),
        ("auv", {"eviction": "all-at-once"}),
        ("auv-v4", {"decay": 0.5}),
        ("auv-v3", {"top_k": 0}),
        ("kvcrush", {"base": "full"}),
        ("kvcrush", {"base": "h3o"}),
        ("kvcrush", {"anchor": "median"}),
        ("kvcrush", {"hh": 1.0}),
        ("snapkv", {"kernel": 4}),
        ("snapkv", {"window": 0}),
        ("streaming", {"sinks": -1}),
        ("scissorhands", {"recent": 0}),
        ("nacl", {"sink": 3}),
    ],
)
def test_options_that_make_no_sense(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(PolicyError) as error:
        make_policy(name, **options)
    assert error.value.hint


@pytest.mark.parametrize("options", [{"policy": "auv-v4"}, {"policy": "auv", "reconstruct": False, "decay": 1.0}])
def test_v4_is_auv_without_its_additions(options: dict[str, Any]) -> None:
    model, calls = tiny.tiny_llama(), harness.split(tiny.tokens(60, seed=71), 40)
    other, _ = harness.run_package(model, calls, policy="auv", slots=24, reconstruct=False, decay=1.0)
    harness.compare(harness.run_package(model, calls, slots=24, **options)[0], other)


@pytest.mark.parametrize("policy", ["auv", "auv-v2", "auv-v3", "h2o-ring", "scissorhands", "snapkv"])
def test_nothing_moves_after_the_prompt(policy: str) -> None:
    """Both memories of §3.4: every tensor keeps its address and its size until the sequence ends."""
    model = tiny.tiny_llama()
    _, cache = harness.run_package(model, [tiny.tokens(40, seed=72)], policy=policy, slots=20)
    before, held = slot_addresses(cache), cache.bytes()
    with harness.attention(model, "auvsum"), torch.no_grad():
        for token in tiny.tokens(50, seed=73)[0]:
            model(token.view(1, 1), past_key_values=cache)
            assert slot_addresses(cache) == before
    assert cache.bytes() == held


def test_the_ring_goes_round_in_the_latter_half() -> None:
    """L = 4: the new token takes the place of the ring's oldest, which takes the victim's place in the first half."""
    model = tiny.tiny_llama(layers=1)
    _, cache = harness.run_package(model, [tiny.tokens(20, seed=74)], policy="auv-v3", slots=9)
    store = cache.layers[0].store
    assert store.slots == 8
    with harness.attention(model, "auvsum"), torch.no_grad():
        for step in range(10):
            oldest = store.positions[0, :, 4 + step % 4].clone()
            first = store.positions[0, :, :4].clone()
            model(tiny.tokens(1, seed=75 + step), past_key_values=cache)
            assert (store.positions[0, :, 4 + step % 4] == 20 + step).all()
            changed = store.positions[0, :, :4] != first
            assert (changed.sum(-1) == 1).all()
            assert (store.positions[0, :, :4][changed] == oldest).all()

"""Every policy beside AUV and H2O against its naive version: both models, three lengths of prompt, padded batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from auvsum.cache.cache import BudgetedCache
from auvsum.cache.policy import make_policy, policy_names
from auvsum.engine.generate import Engine, Request
from auvsum.errors import PolicyError
from auvsum.events import Finished
from tests import tiny
from tests.numerics import harness
from tests.numerics import naive_baselines as nb
from tests.numerics.naive import NaiveAuv, NaiveHead

SLOTS = 20
NAIVE: dict[str, Callable[[int], NaiveHead]] = {
    "auv-v1": nb.NaiveV1,
    "auv-v2": nb.NaiveV2,
    "auv-v3": nb.NaiveV3,
    "auv-v4": lambda slots: NaiveAuv(slots, decay=1.0, reconstruct=False),
    "h2o-ring": nb.NaiveH2oRing,
    "kvcrush": nb.NaiveCrush,
    "nacl": nb.NaiveNacl,
    "pyramidkv": nb.NaivePyramid,
    "scissorhands": nb.NaiveScissorhands,
    "snapkv": nb.NaiveSnap,
    "streaming": nb.NaiveStreaming,
    "tova": nb.NaiveTova,
}
#: Policies that read a prompt in chunks; the others refuse.
STREAMS = [name for name in NAIVE if make_policy(name).streams]
PROMPTS = {"short": 12, "exact": SLOTS, "long": 60}
STEPS = 40


def expected(
    model: PreTrainedModel, calls: list[torch.Tensor], make: Callable[[int], NaiveHead], clear: bool = True
) -> list[harness.Call]:
    heads = getattr(model.config, "num_key_value_heads", model.config.num_attention_heads)
    trace, naive = harness.run_naive(model, calls, nb.Family(lambda: make(SLOTS), heads))
    if clear:
        assert naive.smallest_margin() > harness.CLEAR, "a decision is too close to judge: take another seed"
    return trace


def test_every_policy_has_a_naive_version() -> None:
    """AUV, H2O, the full cache and `auv-look` have theirs in files of their own."""
    assert {*NAIVE, "auv", "auv-look", "h2o", "full"} == set(policy_names())


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("policy", NAIVE)
def test_every_step_matches(model: PreTrainedModel, policy: str, prompt: str) -> None:
    calls = harness.split(tiny.tokens(PROMPTS[prompt] + STEPS, seed=61), PROMPTS[prompt])
    want = expected(model, calls, NAIVE[policy])
    assert harness.evictions(want) >= 4
    harness.compare(harness.run_package(model, calls, policy=policy, slots=SLOTS)[0], want)


@pytest.mark.parametrize("policy", STREAMS)
def test_chunks_match(llama: PreTrainedModel, policy: str) -> None:
    """The rule of the end of the prompt applies to what is held, after each chunk."""
    calls = harness.split(tiny.tokens(70, seed=62), 50, [11, 2, 23, 14])
    if policy.startswith("auv"):
        want = expected(llama, calls, lambda slots: _with_longest(NAIVE[policy](slots), 50))
    else:
        want = expected(llama, calls, NAIVE[policy])
    harness.compare(harness.run_package(llama, calls, begin=50, policy=policy, slots=SLOTS)[0], want)


def _with_longest(head: Any, n_max: int) -> NaiveHead:
    head.n_max = n_max
    return head


@pytest.mark.parametrize("policy", sorted(set(NAIVE) - set(STREAMS)))
def test_chunks_are_refused(llama: PreTrainedModel, policy: str) -> None:
    calls = harness.split(tiny.tokens(30, seed=62), 30, [20, 10])
    with pytest.raises(PolicyError, match=policy) as error:
        harness.run_package(llama, calls, begin=30, policy=policy, slots=SLOTS)
    assert "single" in error.value.hint


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("policy", [*NAIVE, "auv", "h2o", "full"])
def test_padded_rows_are_what_they_are_alone(model: PreTrainedModel, policy: str, side: str) -> None:
    """Two rows of different lengths in one batch; every row decides, and says, what it does alone."""
    lengths, steps, longest = (48, 31), 12, 48
    slots = {} if policy == "full" else {"slots": SLOTS}
    streams = [tiny.tokens(length + steps, seed=63 + row) for row, length in enumerate(lengths)]
    rows, masks = [], []
    for stream, length in zip(streams, lengths, strict=True):
        pads = torch.zeros(1, longest - length, dtype=torch.long)
        prompt, rest, ones = stream[:, :length], stream[:, length:], torch.ones(1, length, dtype=torch.long)
        rows.append(torch.cat([pads, prompt, rest] if side == "left" else [prompt, pads, rest], 1))
        masks.append(torch.cat([pads, ones] if side == "left" else [ones, pads], 1))
    ids, mask = torch.cat(rows), torch.cat([torch.cat(masks), torch.ones(2, steps, dtype=torch.long)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = BudgetedCache(model.config, policy=policy, **slots)
    got: list[torch.Tensor] = []
    with harness.attention(model, "auvsum"), torch.no_grad():
        for start, end in [(0, longest), *((i, i + 1) for i in range(longest, longest + steps))]:
            out = model(
                ids[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, start:end],
                past_key_values=cache,
            )
            got.append(out.logits)
    logits = torch.cat(got, 1)
    for row, (stream, length) in enumerate(zip(streams, lengths, strict=True)):
        alone, own = harness.run_package(model, harness.split(stream, length), policy=policy, **slots)
        want = torch.cat([call.logits for call in alone])
        harness.close(logits[row][mask[row].bool()], want, f"row {row}", harness.LOGITS)
        for layer, (together, single) in enumerate(zip(cache.layers, own.layers, strict=True)):
            assert together.store.snapshot(row, 1)["positions"] == single.store.snapshot(0, 1)["positions"], layer


@pytest.mark.parametrize("policy", NAIVE)
def test_an_unbound_budget_equals_the_full_cache(model: PreTrainedModel, policy: str) -> None:
    calls = harness.split(tiny.tokens(60, seed=65), 40)
    full, _ = harness.run_package(model, calls, policy="full")
    for slots in (make_policy(policy).slots_to_hold(61), 200):
        got, cache = harness.run_package(model, calls, policy=policy, slots=slots)
        for mine, theirs in zip(got, full, strict=True):
            harness.close(mine.logits, theirs.logits, "logits", harness.LOGITS)
        assert cache.layers[0].store.snapshot(0, 0)["positions"] == list(range(60))


@pytest.mark.parametrize("policy", ["tova", "kvcrush", "streaming"])
def test_one_set_a_layer(llama: PreTrainedModel, policy: str) -> None:
    trace, _ = harness.run_package(llama, harness.split(tiny.tokens(70, seed=66), 60), policy=policy, slots=SLOTS)
    for call in trace:
        for layer in range(2):
            assert call.heads[layer, 0]["positions"] == call.heads[layer, 1]["positions"]


@pytest.mark.parametrize("base", ["auv", "auv-v3", "h2o-ring", "nacl", "snapkv", "tova", "streaming"])
@pytest.mark.parametrize("anchor", ["mean", "random", "alternate"])
def test_kvcrush_over_other_bases(llama: PreTrainedModel, base: str, anchor: str) -> None:
    calls = harness.split(tiny.tokens(90, seed=66), 60)
    trace, cache = harness.run_package(llama, calls, policy="kvcrush", base=base, anchor=anchor, slots=25)
    assert len({tuple(view["positions"]) for view in trace[-1].heads.values()}) <= 2  # one set a layer
    assert all(len(view["positions"]) <= 25 for call in trace for view in call.heads.values())
    assert cache.layers[0].store.snapshot(0, 0)["positions"][-1] == 89


def test_the_anchor_matters(llama: PreTrainedModel) -> None:
    calls = [tiny.tokens(60, seed=66)]
    held = {
        anchor: str(harness.run_package(llama, calls, policy="kvcrush", anchor=anchor, slots=25)[0][0].heads)
        for anchor in ("mean", "alternate")
    }
    assert held["mean"] != held["alternate"]


def test_pyramid_stays_within_the_bytes_and_falls(llama: PreTrainedModel) -> None:
    policy = make_policy("pyramidkv")
    for layers in (1, 2, 3, 4, 12, 31):
        for slots in (2, 3, 9, 64, 100, 333):
            for tokens in (50, 200, 4000):
                numbers = policy.layer_slots(slots, layers, tokens)
                assert len(numbers) == layers
                assert sum(numbers) <= slots * layers
                assert min(numbers) >= 1
                assert numbers == sorted(numbers, reverse=True)
    _, even = harness.run_package(llama, [tiny.tokens(60, seed=66)], policy="snapkv", slots=SLOTS)
    _, steep = harness.run_package(llama, [tiny.tokens(60, seed=66)], policy="pyramidkv", slots=SLOTS)
    assert steep.bytes() <= even.bytes()
    assert steep.layers[0].store.slots > SLOTS > steep.layers[1].store.slots


def test_the_engine_shares_slots_out_as_the_drop_in_does(llama: PreTrainedModel) -> None:
    """Documents of different lengths together: each has its own pyramid, in a cache that fits the larger one."""
    lengths, batch = (60, 45), 2
    prompts = [tiny.tokens(length, seed=66)[0].tolist() for length in lengths]
    with harness.attention(llama, "auvsum"):
        engine = Engine(llama, make_policy("pyramidkv"), batch_size=batch)
        events = list(engine.run([Request(ids, SLOTS, 8) for ids in prompts]))
        written = {event.request: list(event.token_ids) for event in events if isinstance(event, Finished)}
        for index, ids in enumerate(prompts):
            cache = BudgetedCache(llama.config, policy="pyramidkv", slots=SLOTS)
            row = torch.tensor([ids])
            out = llama.generate(
                row, attention_mask=torch.ones_like(row), past_key_values=cache, max_new_tokens=8, do_sample=False
            )
            assert out[0, len(ids) :].tolist() == written[index]


@pytest.mark.parametrize("seed", [1, 2])
def test_nacl_draws_by_its_seed(llama: PreTrainedModel, seed: int) -> None:
    calls = [tiny.tokens(60, seed=66)]
    once, again, other = (
        [
            view["positions"]
            for view in harness.run_package(llama, calls, policy="nacl", slots=SLOTS, seed=s)[0][0].heads.values()
        ]
        for s in (seed, seed, seed + 7)
    )
    assert once == again
    assert once != other


# -- mutations: each comparison above can fail -------------------------------------------------------------------------


class V1ProtectsAll(nb.NaiveV1):
    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self.recent += 1


class V2Forgets(nb.NaiveV2):
    """The decrements do not persist."""

    def victim(self, candidates: list[Any]) -> Any:
        before = [token.state["usage"] for token in candidates]
        found = super().victim(candidates)
        for token, usage in zip(candidates, before, strict=True):
            token.state["usage"] = usage
        return found


class V3ByScore(nb.NaiveV3):
    def victim(self, candidates: list[Any]) -> Any:
        return self.select(candidates, self.aas, 1)[0]


class RingNewest(nb.NaiveH2oRing):
    """The newest of the ring leaves it, not the oldest."""

    def before_decode(self) -> None:
        self.ring.reverse()
        super().before_decode()
        self.ring.reverse()


class CrushBackwards(nb.NaiveCrush):
    def target(self, bits: list[list[bool]]) -> list[bool]:
        return [not bit for bit in super().target(bits)]


class NaclMoreProxies(nb.NaiveNacl):
    def proxies(self, n: int) -> int:
        return 9


class PyramidUpsideDown(nb.NaivePyramid):
    def budget(self, n: int) -> int:
        self.layer = self.layers - 1 - self.layer
        return super().budget(n)


class SnapUnpooled(nb.NaiveSnap):
    def pooled(self, sums: list[float], j: int) -> float:
        return sums[j]


class ShortHistory(nb.NaiveScissorhands):
    window = 30


class ThreeSinks(nb.NaiveStreaming):
    sinks = 3


class TovaOfOneHead(nb.NaiveTova):
    def weight(self, token: Any) -> float:
        return float(self.siblings[0].last[self.seen][token.position])


MUTATIONS: dict[str, Callable[[int], NaiveHead]] = {
    "auv-v1": V1ProtectsAll,
    "auv-v2": V2Forgets,
    "auv-v3": V3ByScore,
    "auv-v4": lambda slots: NaiveAuv(slots, decay=0.5, reconstruct=False),
    "h2o-ring": RingNewest,
    "kvcrush": CrushBackwards,
    "nacl": NaclMoreProxies,
    "pyramidkv": PyramidUpsideDown,
    "scissorhands": ShortHistory,
    "snapkv": SnapUnpooled,
    "streaming": ThreeSinks,
    "tova": TovaOfOneHead,
}


@pytest.mark.parametrize("policy", NAIVE)
def test_a_mutation_is_detected(llama: PreTrainedModel, policy: str) -> None:
    calls = harness.split(tiny.tokens(PROMPTS["long"] + STEPS, seed=61), PROMPTS["long"])
    mutated = expected(llama, calls, MUTATIONS[policy], clear=False)
    with pytest.raises(harness.Mismatch):
        harness.compare(harness.run_package(llama, calls, policy=policy, slots=SLOTS)[0], mutated)


def test_scissorhands_forgets_what_left_its_window(llama: PreTrainedModel) -> None:
    """A window of 30 in the package and in the oracle, across the words in which histories are packed."""
    calls = harness.split(tiny.tokens(100, seed=61), 40, [7, 28, 5])
    want = expected(llama, calls, ShortHistory)
    harness.compare(harness.run_package(llama, calls, policy="scissorhands", slots=SLOTS, window=30)[0], want)

"""`auv-look` against a slow version of itself that holds everything and remembers who is alive."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from auvsum.cache import heads, ragged
from auvsum.cache.codec import EvenCodec, Metric, QuantizedCodec
from auvsum.cache.head_profiles import Profile, few_directions, shape_of
from auvsum.cache.heads import HeadsCache, Look, second_look
from auvsum.cache.policies.auv_look import AUVLook
from auvsum.cache.sliding import SlidingWindow, layer_windows
from auvsum.engine.generate import Engine, Request
from auvsum.errors import PolicyError
from auvsum.events import Finished, Prefilled
from auvsum.kernels.column_scores import attend_chunk
from tests import tiny
from tests.numerics import harness
from tests.numerics.test_families import build

PROMPT, NEW = 60, 30
MODELS = {"llama": tiny.tiny_llama, "opt": tiny.tiny_opt}
#: Half of its layers have a sliding window of 16 tokens.
SLIDING = {**MODELS, "gemma3": lambda: build("gemma3", seed=8)}


class Naive:
    """Every key and value ever seen, one head after the other, and a set of living positions for each. With few bits a
    vector is replaced by what is left of it. Layers that slide look at the last of their tokens; the others count."""

    def __init__(
        self, model: Any, policy: AUVLook, profile: Profile | None = None, bits: int = 16, narrow: int = 1 << 15
    ) -> None:
        factors, self.static = (profile.factors(), profile.moments()) if profile else (None, None)
        self.bits, self.size = bits, model.config.hidden_size // model.config.num_attention_heads
        config, self.factors = model.config, factors
        self.model, self.policy = model, policy
        self.windows = layer_windows(config)
        self.ranked = [layer for layer, window in enumerate(self.windows) if window is None]
        self.layers = len(self.ranked)
        self.slid: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.groups = getattr(config, "num_key_value_heads", config.num_attention_heads)
        self.keys: list[list[list[Tensor]]] = [[[] for _ in range(self.groups)] for _ in range(self.layers)]
        self.values: list[list[list[Tensor]]] = [[[] for _ in range(self.groups)] for _ in range(self.layers)]
        self.alive: list[list[list[int]]] = [[[] for _ in range(self.groups)] for _ in range(self.layers)]
        self.paid: dict[tuple[int, int, int], float] = {}
        #: Queries' second moments, and which tokens are in the coarser codec.
        self.moments: dict[tuple[int, int], Tensor] = {}
        self.coarse: set[tuple[int, int, int]] = set()
        self.room = [0] * self.layers
        self.first = self.written = self.prompt = self.now = 0
        #: From how many tokens on a slot takes a byte more.
        self.narrow = narrow
        AttentionInterface.register("naive-look", self.attend)
        AttentionMaskInterface.register("naive-look", lambda **_: None)

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, _m: Any, scaling: float, **_: Any) -> Any:
        if self.windows[module.layer_idx] is not None:
            return self.slide(module.layer_idx, query, key, value, scaling), None
        layer, heads = self.ranked.index(module.layer_idx), query.shape[1]
        out = torch.zeros(1, query.shape[2], heads, query.shape[3])
        for token in range(query.shape[2]):
            for group in range(self.groups):
                position = len(self.keys[layer][group])
                for held, vectors in ((self.keys, key), (self.values, value)):
                    vector = vectors[0, group, token]
                    held[layer][group].append(self.few(vector, 8) if self.first and self.bits < 16 else vector)
                paid: dict[int, float] = {}
                self.alive[layer][group].append(position)
                alive = self.alive[layer][group]
                for head in range(group * heads // self.groups, (group + 1) * heads // self.groups):
                    asked = query[0, head, token]
                    self.moments[layer, group] = self.moments.get((layer, group), 0) + torch.outer(asked, asked)
                    logits = torch.stack([self.keys[layer][group][p] @ query[0, head, token] for p in alive]) * scaling
                    weights = logits.softmax(-1)
                    values = torch.stack([self.values[layer][group][p] for p in alive])
                    out[0, token, head] = weights @ values
                    for p, weight in zip(alive, weights.tolist(), strict=True):
                        paid[p] = paid.get(p, 0.0) + weight**self.policy.power * self.groups / heads
                for p, new in paid.items():
                    before, rounded = self.paid.get((layer, group, p), 0.0), self.rounded if p < self.first else float
                    self.paid[layer, group, p] = rounded(before + rounded(new))
        return out, None

    def slide(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """A layer with a window: each token in turn sees the last of all that were ever there, itself included."""
        held, out = self.slid.setdefault(layer, []), []
        for token in range(query.shape[2]):
            held.append((key[0, :, token], value[0, :, token]))
            keys, values = (torch.stack(x, 1) for x in zip(*held[-(self.windows[layer] or 0) :], strict=True))
            keys, values = (x.repeat_interleave(query.shape[1] // self.groups, 0) for x in (keys, values))
            weights = ((keys @ query[0, :, token, :, None])[..., 0] * scaling).softmax(-1)
            out.append((weights[:, None] @ values)[:, 0])
        return torch.stack(out)[None]

    @staticmethod
    def rounded(paid: float) -> float:
        """Sums of slots are kept in 16 bits."""
        return float(torch.tensor(paid * 256).clamp(max=65504).half()) / 256

    def few(self, vector: Tensor, bits: int, moments: Tensor | None = None) -> Tensor:
        """What is left of a vector."""
        codec = EvenCodec(torch.float32, bits) if bits < 4 else QuantizedCodec(torch.float32, bits)
        metric = None if moments is None else Metric(moments[None])
        return codec.decode(codec.pack(vector[None], torch.zeros(1, dtype=torch.int64), metric))[0]

    def quantize(self, layer: int, group: int, position: int, moments: Tensor | None) -> None:
        """A token goes into a slot."""
        bits = self.policy.coarse if (layer, group, position) in self.coarse else self.bits
        keys, values = self.keys[layer][group], self.values[layer][group]
        if self.bits < 16:
            keys[position] = self.few(keys[position], bits, None if moments is None else moments[layer, group])
            values[position] = self.few(values[position], bits)

    def call(self, ids: list[int], start: int) -> Tensor:
        with harness.attention(self.model, "naive-look"), torch.no_grad():
            positions = torch.arange(start, start + len(ids))[None]
            logits: Tensor = self.model(torch.tensor([ids]), position_ids=positions, use_cache=False).logits[0]
        return logits

    def look(self, calls: list[list[int]], *, chained: bool) -> Tensor:
        """Mean attention that tokens behind the prompt pay to it; they are forgotten again."""
        self.paid, self.moments, count = {}, {}, 0
        for number, ids in enumerate(calls):
            self.call(ids, self.prompt + (number if chained else 0))
            count += len(ids)
            if not chained:
                self.forget()
        self.forget()
        found = torch.zeros(self.layers, self.groups, self.prompt)
        for (layer, group, position), paid in self.paid.items():
            if position < self.prompt:
                found[layer, group, position] = paid / count
        return found

    def ask(self, ids: list[int], tail: int) -> Tensor:
        """The same of the prompt's own last tokens, which are read again for it."""
        self.prompt = len(ids) - tail
        self.forget()
        self.paid = {}
        self.call(ids[-tail:], self.prompt)
        self.prompt = len(ids)
        found = torch.zeros(self.layers, self.groups, self.prompt)
        for place, paid in self.paid.items():
            found[place] = paid / tail
        return found

    def forget(self) -> None:
        for layer in range(self.layers):
            for group in range(self.groups):
                for held in (self.keys, self.values, self.alive):
                    del held[layer][group][self.prompt :]
        for slid in self.slid.values():
            del slid[self.prompt :]

    def settle(self, score: Tensor, slots: int, write: int, moments: Tensor | None = None) -> None:
        """The best of all layers and heads stay, the very best in the finer codec."""
        ranked = []
        for layer in range(self.layers):
            for group in range(self.groups):
                for position in range(self.prompt):
                    norm = float(self.values[layer][group][position].norm()) if self.policy.value_norm else 1.0
                    rank = float(score[layer, group, position]) * norm * self.factor(layer, group, position)
                    rank = float("inf") if position == 0 else rank
                    ranked.append((rank, layer, group, position))
        ranked.sort(reverse=True)
        heads = self.layers * self.groups
        self.now = self.prompt
        granted = slots * heads * self.policy.slot_bytes(self.size, 4, self.bits)[0]
        dear, cheap = self.slot_bytes()
        count = fine = granted // dear
        if cheap < dear:
            # All of the bytes, a share of the slots fine.
            share = self.policy.fine
            mean = share * dear + (1 - share) * cheap
            count = max(n for n in range(self.prompt * heads + 1) if n * mean <= granted)
            fine = (granted - count * cheap) // (dear - cheap)
        kept = [place for _, *place in ranked[:count]]
        self.coarse = {(layer, group, p) for layer, group, p in kept[fine:]}
        for layer in range(self.layers):
            for group in range(self.groups):
                self.alive[layer][group] = sorted(p for one, other, p in kept if (one, other) == (layer, group))
            self.room[layer] = sum(self.cost(layer, g, p) for g in range(self.groups) for p in self.alive[layer][g])
        for place in kept:
            self.quantize(*place, moments)
        self.paid = {}
        for layer, group, p in kept:
            start = float(score[layer, group, p]) ** self.policy.power * self.policy.prior
            self.paid[layer, group, p] = self.rounded(start)
        self.write, self.first = write, self.prompt

    def cost(self, layer: int, group: int, position: int) -> int:
        """Bytes of a token's slot."""
        return self.slot_bytes()[(layer, group, position) in self.coarse]

    def slot_bytes(self) -> tuple[int, int]:
        dear, cheap = self.policy.slot_bytes(self.size, 4, self.bits)
        return dear + (self.now > self.narrow), cheap + (self.now > self.narrow)

    def factor(self, layer: int, group: int, position: int) -> float:
        """What a token of that head is worth."""
        return 1.0 if self.factors is None else float(self.factors[layer, group, int(position >= self.prompt)])

    def evict(self, now: int) -> None:
        """When the write region is full its older half competes with all that the layer holds."""
        if now - self.first < self.write:
            return
        leaving, self.now = self.write - self.write // 2, now
        for layer in range(self.layers):
            for group in range(self.groups):
                for p in range(self.first, self.first + leaving):
                    self.paid[layer, group, p] = self.rounded(self.paid[layer, group, p])
        self.first += leaving
        for layer in range(self.layers):
            ranked = []
            for group in range(self.groups):
                old = [p for p in self.alive[layer][group] if p < self.first]
                for position in old:
                    norm = float(self.values[layer][group][position].norm()) if self.policy.value_norm else 1.0
                    queries = (self.policy.prior + now - self.prompt) if position < self.prompt else now - position
                    score = (self.paid[layer, group, position] / queries) ** (1 / self.policy.power) * norm
                    score *= self.factor(layer, group, position)
                    fresh = position >= self.first - leaving
                    tie = (position, group) if fresh else (group, position)
                    ranked.append((float("inf") if position == old[0] else score, fresh, tie, group, position))
            ranked.sort(reverse=True)
            spent, before = 0, len(ranked) - leaving * self.groups
            for rank, (*_, group, position) in enumerate(ranked):
                if position >= self.first - leaving:
                    dear, cheap = self.policy.slot_bytes(self.size, 4, self.bits)
                    if cheap < dear and rank >= self.policy.fine * before:
                        self.coarse.add((layer, group, position))
                    self.quantize(layer, group, position, self.static)
            for *_, group, position in ranked:
                spent += self.cost(layer, group, position)
                if spent > self.room[layer]:
                    self.alive[layer][group].remove(position)


def mean_moments(naive: Naive, queries: int) -> Tensor:
    """Of what the last look asked, `[layers, G, D, D]`."""
    rows = [[naive.moments[layer, group] for group in range(naive.groups)] for layer in range(naive.layers)]
    return torch.stack([torch.stack(row) for row in rows]) / queries


@pytest.mark.parametrize("name", SLIDING)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"draft": 0, "power": 1.0, "value_norm": True},
        {"look": 0.0, "lead": 20, "ask": 0.0},
        {"profile": True},
        {"bits": 4, "profile": True},
        {"bits": 4, "coarse": 2, "fine": 0.5, "value_norm": True},
        {"chunk": 9},
        {"bits": 4, "narrow": 32},
        {"bits": 4, "narrow": 70},
    ],
)
def test_it_does_what_the_slow_version_does(
    name: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, profile = SLIDING[name](), None
    if options.get("profile"):
        monkeypatch.setenv("AUVSUM_CACHE", str(tmp_path))
        groups = getattr(model.config, "num_key_value_heads", model.config.num_attention_heads)
        logs = torch.randn(2, 2, groups, generator=torch.Generator().manual_seed(4)).tolist()
        size = model.config.hidden_size // model.config.num_attention_heads
        queries = torch.randn(2, groups, 40, size, generator=torch.Generator().manual_seed(5))
        queries[..., 0] *= 9
        told = few_directions(queries.mT @ queries)
        profile = Profile("tiny", shape_of(model.config), *(tuple(map(tuple, one)) for one in logs), queries=told)
        (tmp_path / "profiles").mkdir()
        (tmp_path / "profiles" / "tiny.json").write_text(profile.to_json())
    options = dict(options)
    bits, chunk, narrow = options.pop("bits", 16), options.pop("chunk", PROMPT), options.pop("narrow", 1 << 15)
    monkeypatch.setattr(heads, "_LOOK_CHUNK", chunk)
    for module in (ragged, heads):
        monkeypatch.setattr(module, "NARROW", narrow)
    policy = AUVLook(**{"look": 0.5, "lead": 8, "draft": 5, "prior": 6, **options})
    stream = tiny.tokens(PROMPT + NEW, 18)[0].tolist()
    ids, span, slots = stream[:PROMPT], (4, 55), 40
    cache, naive = HeadsCache(model.config, policy, slots, bits=bits), Naive(model, policy, profile, bits, narrow)
    with harness.attention(model, "auvsum"), torch.no_grad(), cache.reading(0):
        model(torch.tensor([ids]), past_key_values=cache)
    naive.call(ids, 0)
    naive.prompt = PROMPT
    first = 3
    with harness.attention(model, "auvsum"):
        look = second_look(model, cache, 0, ids, span, first)
    assert look is not None
    again = policy.tokens_to_look_with(ids[slice(*span)])
    pieces = [again[start : start + chunk] for start in range(0, len(again), chunk)]
    looked = naive.look(pieces, chained=False) if again else None
    moments = [mean_moments(naive, len(again))] if again else []
    drafted = None
    if policy.draft:
        token, calls = first, []
        for place in range(policy.draft):
            calls.append([token])
            token = int(naive.call([token], PROMPT + place)[-1].argmax())
        naive.forget()
        drafted = naive.look(calls, chained=True)
        moments.append(mean_moments(naive, len(calls)))
    asked = naive.ask(ids, PROMPT - span[1]) if policy.ask else None
    for mine, theirs in ((look.looked, looked), (look.drafted, drafted), (look.asked, asked)):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(look.moments, torch.stack(moments).mean(0), rtol=1e-3, atol=1e-4)
    cache.settle(0, look)
    room, write = policy.regions(slots, head_dim=model.config.hidden_size // model.config.num_attention_heads,
                                 element_bytes=4, bits=bits)  # fmt: skip
    naive.settle(policy.blend(look.looked, look.drafted, look.asked), room, write, look.moments)
    counts = set()
    for step, token in enumerate(stream[PROMPT:]):
        for layer in range(naive.layers):
            for group in range(naive.groups):
                mine = cache.ranked[layer].held_positions(0, group)
                assert mine == naive.alive[layer][group], (step, layer, group)
                counts.add(len(mine))
        with harness.attention(model, "auvsum"), torch.no_grad():
            got = model(torch.tensor([[token]]), position_ids=torch.tensor([[PROMPT + step]]), past_key_values=cache)
        torch.testing.assert_close(got.logits[0], naive.call([token], PROMPT + step), rtol=1e-4, atol=1e-4)
        naive.evict(PROMPT + step + 1)
    assert len(counts) > 3, "heads were meant to hold different numbers of tokens"
    assert naive.first > PROMPT, "nothing was evicted while writing"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_it_takes_no_more_than_its_budget(name: str, bits: int) -> None:
    model, policy = MODELS[name](), AUVLook(draft=3)
    config = model.config
    groups = getattr(config, "num_key_value_heads", config.num_attention_heads)
    size = config.hidden_size // config.num_attention_heads
    cost = policy.slot_cost(kv_heads=groups, head_dim=size, element_bytes=4, bits=bits)
    events = []
    cache = HeadsCache(config, policy, 48, bits=bits)
    with harness.attention(model, "auvsum"):
        ids = tiny.tokens(200, 5)[0].tolist()
        with torch.no_grad(), cache.reading(0):
            model(torch.tensor([ids]), past_key_values=cache)
        full = cache.bytes()
        cache.settle(0, second_look(model, cache, 0, ids, (0, 200), 1))
        for step in range(40):
            events.append(cache.bytes())
            with torch.no_grad():
                model(torch.tensor([[5]]), position_ids=torch.tensor([[200 + step]]), past_key_values=cache)
    granted = config.num_hidden_layers * (cost.fixed + 48 * cost.per_slot)
    assert max(events) <= granted < full
    assert max(events) >= 0.85 * granted
    assert cache.prefill_peak_bytes >= full


def test_windows_are_held_beside_what_is_ranked() -> None:
    """They take what the budget counts for them, and the other layers share its slots."""
    model, policy = SLIDING["gemma3"](), AUVLook(draft=3)
    config, sizes = model.config, {"kv_heads": 2, "head_dim": 8, "element_bytes": 4}
    cache = HeadsCache(config, policy, [16, 50, 16, 46])
    ids = tiny.tokens(200, 5)[0].tolist()
    with harness.attention(model, "auvsum"), torch.no_grad():
        with cache.reading(0):
            model(torch.tensor([ids]), past_key_values=cache)
        cache.settle(0, second_look(model, cache, 0, ids, (0, 200), 1))
    ranked, window = policy.slot_cost(**sizes), SlidingWindow(16).slot_cost(**sizes)
    held = sum(layer.row_bytes(0) for layer in cache.ranked)
    assert 0.85 * 2 * (ranked.fixed + 48 * ranked.per_slot) <= held <= 2 * (ranked.fixed + 48 * ranked.per_slot)
    assert cache.bytes() == held + 2 * (window.fixed + 16 * window.per_slot)
    for layer in cache.sliding:
        assert [layer.held_positions(0, group) for group in range(2)] == [list(range(184, 200))] * 2
    with harness.attention(model, "auvsum"), torch.no_grad():
        model(torch.tensor([[5]]), position_ids=torch.tensor([[200]]), past_key_values=cache)
    assert cache.sliding[0].held_positions(0, 0) == list(range(185, 201))


@pytest.mark.parametrize("name", SLIDING)
def test_a_prompt_that_was_given_up_leaves_nothing(name: str) -> None:
    model, ids = SLIDING[name](), tiny.tokens(60, 5)
    cache = HeadsCache(model.config, AUVLook(), 300)
    with harness.attention(model, "auvsum"), torch.no_grad():
        for length in (30, 60):
            cache.begin(length)
            with cache.reading(0):
                logits = model(ids[:, :length], past_key_values=cache).logits
    with harness.attention(model, "eager"), torch.no_grad():
        torch.testing.assert_close(logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("bits", "off"), [(16, 1e-4), (8, 0.4)])
@pytest.mark.parametrize("name", SLIDING)
def test_with_room_for_everything_it_is_the_full_cache(name: str, bits: int, off: float) -> None:
    model = SLIDING[name]()
    ids = tiny.tokens(50, 8)[0].tolist()
    with harness.attention(model, "eager"), torch.no_grad():
        want = model(torch.tensor([ids])).logits[0, 40:]
    cache = HeadsCache(model.config, AUVLook(), 300, bits=bits)
    with harness.attention(model, "auvsum"), torch.no_grad():
        with cache.reading(0):  # in chunks: nothing leaves before the end of the prompt
            model(torch.tensor([ids[:15]]), past_key_values=cache)
            model(torch.tensor([ids[15:40]]), position_ids=torch.arange(15, 40)[None], past_key_values=cache)
        assert second_look(model, cache, 0, ids[:40], (0, 40), 1) is None
        cache.settle(0, None)
        got = [
            model(torch.tensor([[token]]), position_ids=torch.tensor([[40 + i]]), past_key_values=cache).logits[0, 0]
            for i, token in enumerate(ids[40:])
        ]
    torch.testing.assert_close(torch.stack(got), want, rtol=1e-4, atol=off)


def test_written_tokens_may_stay_beside_a_share_of_the_prompts() -> None:
    """As KVzip counts: a tenth of the prompt's tokens a head, chosen once, and all that is written."""
    model, policy = tiny.tiny_llama(), AUVLook(write=31, draft=4)
    ids, cache = tiny.tokens(200, 5)[0].tolist(), HeadsCache(model.config, policy, policy.paper_slots(20))
    with harness.attention(model, "auvsum"), torch.no_grad():
        with cache.reading(0):
            model(torch.tensor([ids]), past_key_values=cache)
        cache.settle(0, second_look(model, cache, 0, ids, (0, 200), 1))
        first = [layer.held_positions(0, group) for layer in cache.layers for group in range(2)]
        for step in range(30):
            model(torch.tensor([[5]]), position_ids=torch.tensor([[200 + step]]), past_key_values=cache)
    last = [layer.held_positions(0, group) for layer in cache.layers for group in range(2)]
    assert last == [[*own, *range(200, 230)] for own in first]
    assert sum(map(len, first)) == 20 * 4


def test_sums_of_attention_end_where_their_type_does() -> None:
    sums = ragged.kept_sums(torch.tensor([0.5, 200.0, 1e6]))
    ragged.add_to_sums(sums, torch.tensor([0, 1, 0]), torch.tensor([0.25, 100.0, 0.25]))
    torch.testing.assert_close(ragged.read_sums(sums), torch.tensor([1.0, 65504 / 256, 65504 / 256]))


def test_the_second_look_reads_the_lead_and_pieces_of_the_rest() -> None:
    document = list(range(1000))
    assert AUVLook(lead=0, look=0.0).tokens_to_look_with(document) == []
    assert AUVLook(lead=100, look=0.0).tokens_to_look_with(document) == document[:100]
    want = [*range(100), *(i for start in range(100, 1000, 128) for i in range(start, min(1000, start + 32)))]
    assert AUVLook(lead=100, look=0.25).tokens_to_look_with(document) == want
    assert AUVLook(lead=0, look=1.0).tokens_to_look_with(document) == document


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_known_tokens_may_be_written_several_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as the write region takes: the same logits and the same evictions as one after the other."""
    for module in (ragged, heads):  # in 16 bits sums are rounded with every call, and near ties fall otherwise
        monkeypatch.setattr(module, "kept_sums", lambda paid: paid.float() * ragged._AAS_UNITS)
    model, policy = SLIDING[name](), AUVLook(draft=4)
    stream = tiny.tokens(90, 3)[0].tolist()
    found = []
    for together in (False, True):
        cache = HeadsCache(model.config, policy, 40, bits=8)
        with harness.attention(model, "auvsum"), torch.no_grad():
            with cache.reading(0):
                model(torch.tensor([stream[:60]]), past_key_values=cache)
            cache.settle(0, second_look(model, cache, 0, stream[:60], (0, 60), 1))
            at, logits = 60, []
            while at < 90:
                tokens = stream[at : at + (cache.may_write(0) if together else 1)]
                with cache.reading(0):
                    out = model(torch.tensor([tokens]), position_ids=torch.arange(at, at + len(tokens))[None],
                                past_key_values=cache)  # fmt: skip
                logits.append(out.logits[0])
                at += len(tokens)
        held = [layer.held_positions(0, group) for layer in cache.layers for group in range(2)]
        found.append((torch.cat(logits), held))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-4)
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize(("name", "bits"), [("llama", 16), ("llama", 4), ("gemma3", 16)])
def test_rows_do_not_depend_on_their_neighbours(name: str, bits: int) -> None:
    model, policy = SLIDING[name](), AUVLook(draft=4)
    requests = [Request(tiny.tokens(n, n)[0].tolist(), slots, 20, document=(2, n - 3))
                for n, slots in ((70, 40), (90, 60), (50, 38), (64, 44))]  # fmt: skip

    def run(batch: int) -> dict[int, tuple[int, ...]]:
        with harness.attention(model, "auvsum"):
            events = list(Engine(model, policy, batch_size=batch, bits=bits).run(requests))
        return {event.request: event.token_ids for event in events if isinstance(event, Finished)}

    alone = run(1)
    assert set(alone) == {0, 1, 2, 3}
    assert run(3) == alone


@pytest.mark.parametrize(
    ("name", "bits", "narrow"),
    [("llama", 16, 1 << 15), ("llama", 8, 1 << 15), ("llama", 4, 80), ("gemma3", 16, 1 << 15)],
)
def test_rows_written_together_hold_what_each_holds_alone(
    name: str, bits: int, narrow: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of other sizes and phases, one copied from another, one that ends earlier: the same slots, bytes, logits.
    Some are wide, one of them once it has written a while."""
    for module in (ragged, heads):
        monkeypatch.setattr(module, "NARROW", narrow)
    model, policy = SLIDING[name](), AUVLook(draft=4)
    prompts = [(70, 40), (90, 160), (50, 38)]
    stream = tiny.tokens(30, 2)[0].tolist()

    def begin(cache: HeadsCache, row: int, length: int, slots: int) -> None:
        ids = tiny.tokens(length, length)[0].tolist()
        cache.begin(length, row=row, slots=slots)
        with cache.reading(row):
            model(torch.tensor([ids]), past_key_values=cache)
        cache.settle(row, second_look(model, cache, row, ids, (0, length), 1))

    def held(cache: HeadsCache, row: int) -> list[list[int]]:
        return [layer.held_positions(row, group) for layer in cache.layers for group in range(2)]

    def own(cache: HeadsCache, row: int) -> int:
        return sum(layer.row_bytes(row) for layer in cache.ranked)

    with harness.attention(model, "auvsum"), torch.no_grad():
        together = HeadsCache(model.config, policy, 160, rows=7, bits=bits)
        single = [HeadsCache(model.config, policy, slots, bits=bits) for _, slots in prompts]
        for row, (length, slots) in enumerate(prompts):
            begin(together, row, length, slots)
            begin(single[row], 0, length, slots)
        together.copy_rows(3)  # row 6 stays empty
        lengths = [length for length, _ in prompts * 2] + [0]
        for step, token in enumerate(stream):
            if step == 20:
                together.rest(1)
            positions = torch.tensor(lengths)[:, None] + step
            got = model(torch.full((7, 1), token), position_ids=positions, past_key_values=together).logits[:, 0]
            for row, cache in enumerate(single):
                want = model(
                    torch.tensor([[token]]), position_ids=positions[row : row + 1], past_key_values=cache
                ).logits[0, 0]
                for twin in (row, row + 3):
                    if twin == 1 and step >= 20:
                        assert own(together, twin) == 0, "what rests is freed by the next step"
                        continue
                    torch.testing.assert_close(got[twin], want, rtol=1e-4, atol=1e-4)
                    assert held(together, twin) == held(cache, 0)
                    assert own(together, twin) == own(cache, 0)
                    assert cache.row_bytes(0) == cache.bytes()


@pytest.mark.parametrize("bits", [16, 4])
def test_the_bytes_it_names_are_those_it_has_allocated(bits: int) -> None:
    model, policy = tiny.tiny_llama(), AUVLook(draft=4)
    cache = HeadsCache(model.config, policy, 60, rows=2, bits=bits)
    with harness.attention(model, "auvsum"), torch.no_grad():
        for row, length in enumerate((90, 70)):
            ids = tiny.tokens(length, 1)[0].tolist()
            cache.begin(length, row=row)
            with cache.reading(row):
                model(torch.tensor([ids]), past_key_values=cache)
            cache.settle(row, second_look(model, cache, row, ids, (0, length), 1))
        for step in range(9):
            model(torch.tensor([[5], [6]]), position_ids=torch.tensor([[90], [70]]) + step, past_key_values=cache)
            held = [layer.held for layer in cache.layers]
            tensors = [x for one in held for x in vars(one).values() if isinstance(x, torch.Tensor)]
            tensors += [x for one in held for x in (*one.keys, *one.values, *one.write_keys, *one.write_values)]
            allocated = sum({x.data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())
            # The end of one row's slots is the beginning of the next one's.
            assert cache.bytes() == allocated + 8 * len(cache.layers)


def test_the_engine_says_what_the_second_look_took() -> None:
    model = tiny.tiny_llama()
    request = Request(tiny.tokens(120, 4)[0].tolist(), 40, 12)
    with harness.attention(model, "auvsum"):
        events = list(Engine(model, AUVLook(draft=4), bits=4).run([request]))
    prefilled = next(event for event in events if isinstance(event, Prefilled))
    finished = next(event for event in events if isinstance(event, Finished))
    assert prefilled.prefill_peak_bytes > 5 * finished.kv_bytes


def test_what_it_cannot_do_is_said() -> None:
    model, policy = tiny.tiny_llama(), AUVLook()
    with pytest.raises(PolicyError, match="at least 30 slots"):
        HeadsCache(model.config, policy, 20)
    cache = HeadsCache(model.config, policy, 40)
    with harness.attention(model, "auvsum"), torch.no_grad():
        with cache.reading(0):
            model(tiny.tokens(80, 1), past_key_values=cache)
        with pytest.raises(PolicyError, match="not been settled"):
            model(torch.tensor([[1]]), past_key_values=cache)
        with pytest.raises(PolicyError, match="nothing tells which tokens to keep"):
            cache.settle(0, None)
    for options in (
        {"look": 2.0},
        {"weight": -1.0},
        {"draft": -1},
        {"prior": 0},
        {"ask": 2.0},
        {"power": 0.0},
        {"look": 0.0, "lead": 0, "draft": 0},
    ):
        with pytest.raises(PolicyError):
            AUVLook(**options)


def test_a_prompt_that_fills_the_positions_is_looked_at_with_what_is_left() -> None:
    """OPT has 512 positions here: a prompt of 508 leaves four for each look."""
    model, policy = tiny.tiny_opt(), AUVLook(draft=16)
    ids = tiny.tokens(508, 6)[0].tolist()
    cache = HeadsCache(model.config, policy, 60)
    with harness.attention(model, "auvsum"):
        with torch.no_grad(), cache.reading(0):
            model(torch.tensor([ids]), past_key_values=cache)
        look = second_look(model, cache, 0, ids, (0, 508), 1)
    assert isinstance(look, Look)
    assert look.looked is not None
    assert bool(look.looked.isfinite().all())
    assert look.drafted is not None


@pytest.mark.parametrize("power", [1.0, 2.0, 0.5])
def test_powers_of_attention_are_summed_without_its_matrix(power: float) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 9, 16), torch.randn(1, 2, 30, 16), torch.randn(1, 2, 30, 16)
    _, attention = attend_chunk(query, key, value, 0.25, 21)
    logits = query @ key.repeat_interleave(2, 1).mT * 0.25
    hidden = torch.ones(9, 30, dtype=torch.bool).triu(22)
    want = logits.masked_fill(hidden, -torch.inf).softmax(-1).pow(power).sum(2).view(2, 2, 30).mean(1)
    torch.testing.assert_close(attention.column_sums(power=power), want, rtol=1e-4, atol=1e-6)

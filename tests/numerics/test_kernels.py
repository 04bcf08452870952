"""The Triton kernels against the plain torch step and `kernels/reference.py`.

On a machine with a GPU they run on it; elsewhere under Triton's interpreter, which `tests/conftest.py` turns on.
"""

from __future__ import annotations

import copy
import importlib.util
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama import modeling_llama

from tests import tiny

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
from auvsum.cache import policy as policy_module
from auvsum.cache.policies.auv import AUV
from auvsum.cache.policies.full import Full
from auvsum.cache.policies.h2o import H2O
from auvsum.cache.policy import Policy
from auvsum.cache.store import Held, SlotStore
from auvsum.engine.fuse import fuse
from auvsum.kernels import (
    column_scores,
    decode_step,
    evict,
    join,
    keep,
    matvec,
    norm,
    pointwise,
    reference,
    score_kernel,
    squeeze,
)

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


def make_store(policy: Policy, slots: int, batch: int, groups: int, size: int, dtype: torch.dtype) -> SlotStore:
    return SlotStore(
        batch=batch, kv_heads=groups, slots=policy.capacity(slots), head_dim=size, dtype=dtype, device=DEVICE,
        state=policy.state, reconstruct=policy.keeps_reconstructed,
    )  # fmt: skip


def plain_step(policy: Policy, store: SlotStore, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """The step of `auvsum.cache.attention` in fp32 whatever the type of the store."""
    batch, heads, _, size = query.shape
    groups = key.shape[1]
    store.append(policy.place(store), key[:, :, 0], value[:, :, 0])
    keys, values = (memory.float() for memory in store.read())
    out, probabilities = reference.decode_attention(query[:, :, 0].float(), keys, values, store.valid, scale)
    policy.observe(store, probabilities.view(batch, groups, heads // groups, -1).mean(2))
    return out.view(batch, 1, heads, size)


def fused_step(policy: Policy, store: SlotStore, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    out = decode_step.step(policy, store, query, key, value, scale)
    decode_step.evict(policy, [store])
    return out


def close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    expected, actual = expected.double(), actual.double()
    assert bool(actual.isfinite().all()), what
    error = (actual - expected).norm() / expected.norm().clamp_min(1e-30)
    assert error <= tolerance, f"{what}: relative error {error:.2e}"


def compare_stores(fused: SlotStore, plain: SlotStore, tolerance: float, when: str) -> None:
    assert fused.pointer.tolist() == plain.pointer.tolist(), when
    assert fused.seen.tolist() == plain.seen.tolist(), when
    for row in range(fused.positions.shape[0]):
        for head in range(fused.positions.shape[1]):
            got, want = fused.snapshot(row, head), plain.snapshot(row, head)
            where = f"{when}, row {row}, head {head}"
            assert got["positions"] == want["positions"], where
            for name, values in want["state"].items():
                close(torch.tensor(got["state"][name]), torch.tensor(values), tolerance, f"{where}: {name}")
            assert torch.equal(got["keys"], want["keys"]), where
            assert torch.equal(got["values"], want["values"]), where
            assert (got["reconstructed"] is None) == (want["reconstructed"] is None), where
            if want["reconstructed"] is not None:
                for name in ("key", "value", "mass"):
                    a, b = (torch.as_tensor(side["reconstructed"][name]) for side in (got, want))
                    close(a, b, 10 * tolerance, f"{where}: reconstructed {name}")


POLICIES: dict[str, Policy] = {
    "auv": AUV(),
    "auv top 1, no slot": AUV(top_k=1, reconstruct=False, decay=0.8),
    "h2o": H2O(),
    "full": Full(),
}
#: heads, KV heads, head size, slots: odd lengths, several blocks, grouped-query, sizes that are no power of two.
SHAPES = {
    "one head": (1, 1, 32, 7),
    "opt": (3, 3, 128, 13),
    "grouped": (6, 2, 64, 16),
    "80": (2, 2, 80, 10),
    "wide": (8, 1, 256, 140),
    "many slots": (2, 1, 64, 400),
    "several tiles": (2, 2, 128, 60),
}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["few", "many"])
def programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether a multiprocessor counts as having few programs or many: four warps a head, or one."""
    monkeypatch.setattr(decode_step, "_FEW", 0 if request.param == "many" else 10**9)
    return str(request.param)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16] if CUDA else [torch.float32])
def test_decode_step_equals_the_plain_one(name: str, shape: str, dtype: torch.dtype, programs: str) -> None:
    """Rows in different phases, one of them at rest, over several evictions; fresh random inputs every step."""
    heads, groups, size, slots = SHAPES[shape]
    if programs == "many" and (heads != groups or slots > 256):
        pytest.skip("four warps a head, however many they are")
    policy = POLICIES[name]
    batch, scale = 3, size**-0.5
    plain = make_store(policy, slots, batch, groups, size, dtype)
    plain.capacity[1] = policy.capacity(max(6, slots // 2))
    plain.longest[:] = torch.tensor([slots, 2 * slots, 5], device=DEVICE)
    plain.active[2] = False
    fused = copy.deepcopy(plain)
    capacity = plain.capacity.tolist()
    start = 0
    if slots > 100:  # the plain steps are slow: begin with nearly full rows
        for row in range(2):
            kept = capacity[row] - 3
            for store in (plain, fused):
                generator = torch.Generator(DEVICE).manual_seed(row)
                draw = lambda *s, g=generator: torch.randn(s, generator=g, device=DEVICE)  # noqa: E731
                store.keys[0][row, :, :kept] = draw(groups, kept, size).to(dtype)
                store.values[0][row, :, :kept] = draw(groups, kept, size).to(dtype)
                store.positions[row, :, :kept] = torch.arange(kept, dtype=torch.int32, device=DEVICE)
                store.valid[row, :, :kept] = True
                for values in store.state.values():
                    values[row, :, :kept] = draw(groups, kept).abs() + 0.1
                store.pointer[row] = store.seen[row] = kept
        start = 1
    steps = 5 if start else 2 * slots if CUDA else slots + 5  # on a GPU through several evictions
    if name == "full":
        steps = min(steps, min(capacity[:2]) - int(plain.pointer.max()) if not start else 3)
    tolerance = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}[dtype]
    for number in range(steps):
        query = (torch.randn(batch, heads, 1, size, device=DEVICE) * 2).to(dtype)
        key, value = (torch.randn(batch, groups, 1, size, device=DEVICE).to(dtype) for _ in range(2))
        if number == steps // 2:  # a row that stops, as finished documents do
            for store in (plain, fused):
                store.active[0] = False
        if number == steps // 2 + 1:
            for store in (plain, fused):
                store.active[0] = True
        before = copy.deepcopy(plain) if not bool(plain.active.all()) else plain
        wanted = plain_step(policy, plain, query, key, value, scale)
        for row in (~plain.active).nonzero()[:, 0].tolist():  # what a row at rest holds means nothing: restore it
            restore(plain, before, row)
        got = fused_step(policy, fused, query, key, value, scale)
        on = plain.active
        close(got[on], wanted[on], tolerance, f"step {number}: output")
        assert bool((got[~on] == 0).all())
        if number % 5 == 0 or number > steps - 4 or start:
            # Half precision rounds the reconstructed slot: from the first eviction on scores may differ by that.
            compare_stores(fused, plain, 2e-4 if dtype == torch.float32 else tolerance, f"step {number}")


def restore(store: SlotStore, before: SlotStore, row: int) -> None:
    for name in ("positions", "valid", "pointer", "seen"):
        getattr(store, name)[row] = getattr(before, name)[row]
    for name, values in store.state.items():
        values[row] = before.state[name][row]
    store.keys[0][row], store.values[0][row] = before.keys[0][row], before.values[0][row]
    if store.reconstruct:
        for name in ("folded_key", "folded_value", "folded_mass"):
            getattr(store, name)[row] = getattr(before, name)[row]


@pytest.mark.parametrize("slots", [10, 200])
@pytest.mark.usefixtures("programs")
def test_ties_are_broken_by_age(slots: int) -> None:
    """Equal keys give equal probabilities: the newer counts as used, the older is evicted first."""
    policy, size = AUV(top_k=2), 32
    plain = make_store(policy, slots, 1, 1, size, torch.float32)
    plain.longest[:] = 8
    kept = int(plain.capacity[0]) - 2
    plain.positions[0, 0, :kept] = torch.randperm(kept, device=DEVICE).int()
    plain.valid[0, 0, :kept] = True
    plain.pointer[:] = plain.seen[:] = kept
    for name in policy.state:
        plain.state[name][0, 0, :kept] = 1.0
    fused = copy.deepcopy(plain)
    zero = torch.zeros(1, 1, 1, size, device=DEVICE)
    for number in range(3):
        value = torch.randn(1, 1, 1, size, device=DEVICE)
        plain_step(policy, plain, zero, zero, value, 1.0)
        fused_step(policy, fused, zero, zero, value, 1.0)
        compare_stores(fused, plain, 1e-5, f"step {number}")
    assert plain.live(0) == int(plain.capacity[0]) // 3 * 2 + 1


@pytest.mark.parametrize(("launched", "together"), [(12800, 1), (14, 2), (2, 16)])
def test_layers_evict_together(launched: int, together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three layers with slots and phases of their own, one eviction behind the last: as if each had been alone."""
    policy, size, batch, groups = AUV(), 32, 3, 3
    monkeypatch.setattr(evict, "_PROGRAMS", launched)
    assert evict.rows_together(batch, 3, groups) == together
    plain = [make_store(policy, slots, batch, groups, size, torch.float32) for slots in (10, 13, 40)]
    for layer, store in enumerate(plain):
        store.longest[:] = 20
        store.capacity[1] = policy.capacity(7)
        store.capacity[2] = policy.capacity(10)
        for row in range(batch):
            kept = int(store.capacity[row]) - 1 - layer
            store.positions[row, :, :kept] = torch.arange(kept, dtype=torch.int32, device=DEVICE)
            store.valid[row, :, :kept] = True
            store.keys[0][row, :, :kept] = torch.randn(groups, kept, size, device=DEVICE)
            store.values[0][row, :, :kept] = torch.randn(groups, kept, size, device=DEVICE)
            for values in store.state.values():
                values[row, :, :kept] = torch.rand(groups, kept, device=DEVICE) + 0.1
            store.pointer[row] = store.seen[row] = kept
    fused = copy.deepcopy(plain)
    evictions = 0
    for number in range(6):
        for one, other in zip(plain, fused, strict=True):
            query, key, value = (torch.randn(batch, groups, 1, size, device=DEVICE) for _ in range(3))
            before = one.pointer.clone()
            plain_step(policy, one, query, key, value, 1.0)
            evictions += int((one.pointer < before).sum())
            decode_step.step(policy, other, query, key, value, 1.0)
        decode_step.evict(policy, fused)
        for layer, (one, other) in enumerate(zip(plain, fused, strict=True)):
            compare_stores(other, one, 1e-4, f"step {number}, layer {layer}")
    assert evictions >= 6


def test_decode_attention_is_softmax() -> None:
    query, keys, values = torch.randn(2, 4, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    valid = torch.ones(2, 2, 5, dtype=torch.bool)
    out, probabilities = reference.decode_attention(query, keys, values, valid, 0.5)
    logits = [math.exp(0.5 * float(query[1, 3] @ keys[1, 1, j])) for j in range(5)]
    expected: Any = sum(w * values[1, 1, j] for j, w in enumerate(logits)) / sum(logits)
    assert torch.allclose(out[1, 3], expected, atol=1e-5)
    assert torch.allclose(probabilities[1, 3], torch.tensor(logits) / sum(logits), atol=1e-5)


@pytest.mark.parametrize(("heads", "groups", "size", "past", "chunk"), [
    (2, 2, 32, 0, 37), (4, 2, 64, 70, 150), (3, 1, 80, 5, 129), (1, 1, 256, 0, 65), (2, 1, 128, 200, 1),
])  # fmt: skip
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_column_sums(
    heads: int, groups: int, size: int, past: int, chunk: int, weighted: bool, dtype: torch.dtype
) -> None:
    query = torch.randn(1, chunk, heads, size, device=DEVICE).to(dtype).transpose(1, 2)
    key = torch.randn(1, groups, past + chunk, size, device=DEVICE).to(dtype)
    weights = torch.rand(groups, chunk, device=DEVICE) + 0.1 if weighted else None
    scale = size**-0.5
    logits = (query.double() @ key.double().repeat_interleave(heads // groups, 1).transpose(2, 3)) * scale
    hidden = torch.ones(chunk, past + chunk, dtype=torch.bool, device=DEVICE).triu(past + 1)
    lse = logits.masked_fill(hidden, -torch.inf).logsumexp(-1).float()
    got = score_kernel.column_sums(query, key, lse, weights, scale, past)
    for group in range(groups):
        each = weights[group] if weights is not None else torch.ones(chunk, device=DEVICE)
        wanted = reference.column_sums(query.double(), key.double(), each, scale, past)[0, group]
        close(got[group], wanted, 1e-5, f"group {group}")


@pytest.mark.parametrize(("heads", "groups", "size", "past", "chunk", "last"), [
    (2, 2, 32, 0, 37, 37), (4, 2, 64, 70, 150, 32), (3, 1, 80, 5, 129, 61), (1, 1, 256, 0, 65, 8),
    (2, 1, 128, 200, 1, 1),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_and_hits_of_the_last_queries(
    heads: int, groups: int, size: int, past: int, chunk: int, last: int, dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """What SnapKV, NACL, TOVA and Scissorhands ask for, as they ask for it."""
    monkeypatch.setattr(column_scores, "_score_kernel", lambda _: score_kernel)
    query = torch.randn(1, chunk, heads, size, device=DEVICE).to(dtype).transpose(1, 2)
    key = torch.randn(1, groups, past + chunk, size, device=DEVICE).to(dtype)
    scale = size**-0.5
    every = reference.attention_probabilities(query.double(), key.double(), scale, past)[0]
    logits = (query.double() @ key.double().repeat_interleave(heads // groups, 1).transpose(2, 3)) * scale
    hidden = torch.ones(chunk, past + chunk, dtype=torch.bool, device=DEVICE).triu(past + 1)
    lse = logits.masked_fill(hidden, -torch.inf).logsumexp(-1).float()
    seen = column_scores.ChunkAttention(query, key, scale, past, None, lse)
    rows = every.mean(1)[:, chunk - last :]
    close(seen.last_sums(last), rows.sum(1), 1e-5, "sums")
    least = 1 / seen.keys_seen[:, chunk - last :]
    sure = ((rows / least[..., None] - 1).abs() > 1e-4) | (rows == 0)
    assert float(sure.double().mean()) > 0.9
    for bits in (24, 7):
        got = seen.last_hits(least, bits)
        assert got.shape == (groups, math.ceil(last / bits), past + chunk)
        for number in range(last):  # from the last query back
            hit = (got[:, number // bits] >> (number % bits)) & 1
            wanted = (rows >= least[..., None])[:, last - 1 - number].to(torch.int32)
            assert torch.equal(hit * sure[:, last - 1 - number], wanted * sure[:, last - 1 - number]), number
        assert bool((got >> bits == 0).all())


@pytest.mark.parametrize(("columns", "recent", "best"), [(50, 0, 20), (51, 17, 1), (700, 100, 599), (1500, 5, 0)])
@pytest.mark.parametrize("scores", ["different", "tied", "large", "infinite"])
def test_what_is_kept(columns: int, recent: int, best: int, scores: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As two stable sorts choose, whatever the scores are."""
    drawn = torch.rand(3, columns, device=DEVICE)
    if scores == "tied":
        drawn = (drawn * 3).floor()
    if scores == "large":
        drawn = (drawn * 60 - 30).exp2()
    if scores == "infinite":
        drawn[:, columns - recent - best // 2 - 1 :] = torch.inf
    got = keep.keep(drawn, recent, best)
    monkeypatch.setattr(policy_module, "_keep_kernel", lambda _: None)
    assert torch.equal(got, policy_module.keep_recent_and_best(drawn, recent, best))


def same_held(first: Held, second: Held) -> None:
    assert (first.chunk, first.state.keys()) == (second.chunk, second.state.keys())
    for name in ("key", "value", "positions"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    assert all(torch.equal(values, second.state[name]) for name, values in first.state.items())


@pytest.mark.parametrize("name", ["auv", "auv top 1, no slot", "h2o", "full"])
def test_squeeze_fills_and_folds(name: str) -> None:
    """Two chunks into one row of three: what is kept, what is folded, and the neighbours untouched."""
    policy, groups, size, slots = POLICIES[name], 2, 40, 50
    dtype = torch.float16 if CUDA else torch.float32
    plain = make_store(policy, slots, 3, groups, size, dtype)
    plain.clear(1, policy.capacity(40))
    plain.aim(1, 90)
    fused = copy.deepcopy(plain)
    for chunk, kept in ((45, 30 if name != "full" else None), (7, 21 if name != "full" else None)):
        if name == "full":
            chunk = chunk // 3
        key, value = (torch.randn(1, chunk, groups, size, device=DEVICE).to(dtype).transpose(1, 2)[0] for _ in range(2))
        held = plain.hold(1, key, value)
        for values in held.state.values():
            values.copy_(torch.rand(values.shape, device=DEVICE))
        other = fused.hold(1, key, value)
        assert torch.equal(other.positions, held.positions)
        if fused.counts[1].live:
            same_held(squeeze.hold(fused, 1, key, value), other)
        other.state = {name: values.clone() for name, values in held.state.items()}
        keep = None
        if kept is not None:
            keep = torch.stack([torch.randperm(held.size, device=DEVICE)[:kept].sort().values for _ in range(groups)])
            if plain.reconstruct:
                plain.fold(1, held.key, held.value, held.state[policy.folds_by].scatter(-1, keep, 0.0))
        plain.fill(1, held, keep)
        squeeze.squeeze(fused, 1, other, keep, policy.folds_by)
        compare_stores(fused, plain, 1e-5, f"chunk of {chunk}")
        assert fused.counts[1] == plain.counts[1]
        assert torch.equal(fused.valid, plain.valid)


@pytest.mark.parametrize("outputs", [64, 37])
def test_matvec_and_norm(outputs: int) -> None:
    dtype = torch.float16 if CUDA else torch.float32
    x, weight = torch.randn(1, 1, 300, device=DEVICE).to(dtype), torch.randn(outputs, 300, device=DEVICE).to(dtype)
    bias = torch.randn(outputs, device=DEVICE).to(dtype)
    wanted = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    close(matvec.matvec(x, weight, bias), wanted, 1e-3, "linear")
    close(matvec.matvec(x, weight, bias, True), wanted.relu(), 1e-3, "with ReLU")
    close(matvec.matvec(x, weight, None), wanted - bias.double(), 1e-3, "without bias")
    rows, scale, shift = torch.randn(5, 300, device=DEVICE).to(dtype), weight[0], weight[1]
    layer = torch.nn.functional.layer_norm(rows.double(), (300,), scale.double(), shift.double(), 1e-5)
    close(norm.norm(rows, scale, shift, 1e-5, False), layer, 1e-3, "LayerNorm")
    rms = rows.double() * (rows.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt() * scale.double()
    close(norm.norm(rows, scale, None, 1e-5, True), rms, 1e-3, "RMSNorm")


@pytest.mark.parametrize(("heads", "groups", "size", "chunk"), [(4, 2, 64, 37), (3, 1, 80, 5), (2, 2, 256, 130)])
@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16] if CUDA else [torch.float32])
def test_join(heads: int, groups: int, size: int, chunk: int, folded: bool, dtype: torch.dtype) -> None:
    """Softmax over three sets of keys from the softmax over each; one group's reconstructed key is not live."""
    past, scale = 29, size**-0.5
    query = torch.randn(1, chunk, heads, size, device=DEVICE).to(dtype).transpose(1, 2)
    sets = [torch.randn(2, 1, groups, n, size, device=DEVICE).to(dtype) for n in (chunk, past, 1)]
    valid = torch.arange(groups, device=DEVICE)[:, None] > 0
    logits = []
    for number, (keys, _) in enumerate(sets):
        each = query.double() @ keys.double().repeat_interleave(heads // groups, 1).transpose(2, 3) * scale
        if number == 0:
            each = each.masked_fill(torch.ones(chunk, chunk, dtype=torch.bool, device=DEVICE).triu(1), -torch.inf)
        if number == 2:
            seen = (valid if folded else valid & False).repeat_interleave(heads // groups, 0)
            each = each.masked_fill(~seen[None, :, :, None], -torch.inf)
        logits.append(each)
    wide = [values.double().repeat_interleave(heads // groups, 1) for _, values in sets]
    parts = [(each.softmax(-1) @ v, each.logsumexp(-1).float()) for each, v in zip(logits[:2], wide, strict=False)]
    own, old = ((out.to(dtype), lse) for out, lse in parts)
    mean = (sets[2][0, 0], sets[2][1, 0], valid) if folded else None
    out, lse = join.join(query, own, old, mean, scale)
    every = torch.cat(logits, -1)
    close(out, every.softmax(-1) @ torch.cat(wide, 2), 1e-5 if dtype == torch.float32 else 1e-2, "output")
    close(lse, every.logsumexp(-1), 1e-5, "lse")


@pytest.mark.parametrize(("heads", "groups", "size", "tokens"), [(4, 2, 64, 5), (3, 1, 80, 1), (2, 2, 256, 3)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32] if CUDA else [torch.float32])
def test_turn_and_gate_are_those_of_transformers(
    heads: int, groups: int, size: int, tokens: int, dtype: torch.dtype
) -> None:
    packed = torch.randn(2, tokens, (heads + groups) * size, device=DEVICE).to(dtype)
    query, key = (x.view(2, tokens, -1, size).transpose(1, 2) for x in packed.split([heads * size, groups * size], -1))
    for batch in (1, 2):
        cos, sin = (torch.rand(batch, tokens, size, device=DEVICE).to(dtype) for _ in range(2))
        wanted = modeling_llama.apply_rotary_pos_emb(query, key, cos, sin)
        for got, expected in zip(pointwise.turn(query, key, cos, sin), wanted, strict=True):
            close(got, expected, 1e-6, "turned")
    first, second = packed.chunk(2, -1) if packed.shape[-1] % 2 == 0 else (packed, packed)
    wanted = torch.nn.functional.silu(first) * second
    close(pointwise.gate(torch.cat([first, second], -1)), wanted, 1e-6 if dtype == torch.float32 else 1e-3, "gate")


@pytest.mark.parametrize("family", ["llama", "opt"])
@torch.no_grad()
def test_a_fused_model_computes_the_same(family: str) -> None:
    """And it is the fused code that ran: the model's own rotary function is not called any more."""
    model = (tiny.tiny_llama() if family == "llama" else tiny.tiny_opt()).to(DEVICE)
    ids = torch.arange(7, 19, device=DEVICE)[None]
    plain = model(ids, output_hidden_states=True)
    wanted = plain.logits
    fuse(model)
    fused = model(ids, output_hidden_states=True)
    close(fused.logits, wanted, 1e-4, "logits")
    for got, expected in zip(fused.hidden_states, plain.hidden_states, strict=True):
        close(got, expected, 1e-4, "hidden states, which later layers leave alone")
    close(model(ids[:, :1]).logits, wanted[:, :1], 1e-4, "one token")
    if family == "llama":
        attention, feed_forward = model.model.layers[0].self_attn, model.model.layers[0].mlp
        assert attention.forward.__globals__["apply_rotary_pos_emb"].__name__ == "turned"
        assert "forward" in vars(feed_forward)
        assert "forward" in vars(model.model.layers[0])

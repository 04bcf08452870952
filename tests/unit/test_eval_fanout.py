"""One reading for all caches must be the same as a reading and a decode for each."""

from __future__ import annotations

import pytest
import torch

from auvsum.cache import attention
from auvsum.cache.heads import HeadsCache, second_look
from auvsum.cache.policy import make_policy
from auvsum.engine.generate import Engine, Request, make_cache
from auvsum.errors import GenerationFailed
from auvsum.eval.lockstep import Start, Written, write_together
from auvsum.events import Finished
from auvsum.kernels import plain_chunk
from tests import tiny
from tests.numerics.test_families import build

NEW = 24
POLICIES = ["h2o", "auv", "auv-v3", "auv-v4", "nacl", "snapkv", "pyramidkv", "tova", "streaming"]


def prompts() -> list[tuple[int, ...]]:
    return [tuple(tiny.tokens(n, seed=n)[0].tolist()) for n in (61, 90)]


def alone(model: object, start: Start, prompt: tuple[int, ...]) -> tuple[int, ...]:
    """The engine's own greedy continuation."""
    engine = Engine(model, start.policy)
    done = [event for event in engine.run([Request(prompt, start.slots, NEW)]) if isinstance(event, Finished)]
    return done[0].token_ids


@torch.no_grad()
def forced(model: object, start: Start, prompt: tuple[int, ...], teacher: tuple[int, ...]) -> torch.Tensor:
    """Logits `[steps, V]` of one cache of its own, fed the teacher's tokens one by one."""
    model.set_attn_implementation("auvsum")
    cache = make_cache(model.config, start.policy, start.slots, 1)
    with cache.reading(0):
        out = model(torch.tensor([prompt]), past_key_values=cache)
    if isinstance(cache, HeadsCache):
        cache.settle(0, second_look(model, cache, 0, prompt, (0, len(prompt)), int(out.logits[0, -1].argmax())))
    rows = []
    for step, token in enumerate(teacher[:-1]):
        position = torch.tensor([[len(prompt) + step]])
        out = model(torch.tensor([[token]]), position_ids=position, past_key_values=cache)
        rows.append(out.logits[0, -1])
    return torch.stack(rows)


MODELS = {"opt": tiny.tiny_opt, "llama": tiny.tiny_llama, "gemma3": lambda: build("gemma3")}


@pytest.fixture(scope="module", params=MODELS)
def both(request: pytest.FixtureRequest) -> tuple[object, list[tuple[Written, list[Written]]], list[Start]]:
    model = MODELS[request.param]()
    starts = [Start(make_policy(name), slots) for name in POLICIES for slots in (16, 31)]
    starts += [Start(make_policy("auv-look"), slots) for slots in (36, 48)]
    starts.append(Start(make_policy("full"), 200, prompt=prompts()[0][:20], group="cut"))
    return model, write_together(model, prompts(), [starts, starts], max_new_tokens=NEW), starts


def test_free_rows_are_what_the_engine_writes(both: tuple) -> None:
    model, results, starts = both
    for prompt, (full, others) in zip(prompts(), results, strict=True):
        assert full.token_ids == alone(model, Start(make_policy("full"), len(prompt) + NEW), prompt)
        for start, other in zip(starts, others, strict=True):
            assert other.token_ids == alone(model, start, start.prompt or prompt)


def test_forced_rows_are_a_cache_fed_the_full_summary(both: tuple) -> None:
    model, results, starts = both
    for prompt, (full, others) in zip(prompts(), results, strict=True):
        teacher = full.token_ids
        best = forced(model, Start(make_policy("full"), len(prompt) + NEW), prompt, teacher)
        truth = torch.tensor(teacher[1:])
        assert full.agrees == [True] * (NEW - 1)
        assert full.lost == [0.0] * (NEW - 1)
        for start, other in zip(starts, others, strict=True):
            logits = forced(model, start, start.prompt or prompt, teacher)
            lost = (best.log_softmax(-1) - logits.log_softmax(-1)).gather(-1, truth[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(other.lost), lost, atol=1e-4, rtol=1e-4)
            assert other.agrees == (logits.argmax(-1) == truth).tolist()
            assert not all(other.agrees)  # else this test shows nothing


def test_kept_share_counts_what_the_stores_hold(both: tuple) -> None:
    _, results, starts = both
    for prompt, (full, others) in zip(prompts(), results, strict=True):
        assert full.kept.tolist() == [1.0] * len(prompt)
        for start, other in zip(starts[:2], others[:2], strict=True):
            assert float(other.kept.sum()) == pytest.approx(start.slots)
            assert float(other.kept[-1]) == 1


def test_end_of_text_ends_a_row_and_is_scored() -> None:
    model = tiny.tiny_llama()
    prompt = prompts()[0]
    (full, _), *_ = write_together(model, [prompt], [[]], max_new_tokens=NEW)
    eos = full.token_ids[5]
    first = full.token_ids.index(eos)
    start = Start(make_policy("h2o"), 13)
    ((short, (other,)),) = write_together(model, [prompt], [[start]], max_new_tokens=NEW, eos_ids=[eos])
    assert short.ended
    assert short.token_ids == full.token_ids[:first]
    assert len(other.lost) == first


def test_logits_that_are_no_numbers_are_refused() -> None:
    model = tiny.tiny_opt()
    with torch.no_grad():
        model.model.decoder.layers[0].fc1.weight.fill_(torch.nan)
    with pytest.raises(GenerationFailed):
        write_together(model, prompts()[:1], [[]], max_new_tokens=4)


def test_the_kernels_of_a_gpu_read_and_write_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter. A column that a policy chose as an expanded view once sent a kernel outside its memory."""
    pytest.importorskip("triton")
    from auvsum.kernels import decode_step, squeeze

    model = tiny.tiny_llama()
    asked = [[Start(make_policy(name), slots) for name in (*POLICIES, "auv-v1", "auv-look") for slots in (36, 48)]] * 2
    plain = write_together(model, prompts(), asked, max_new_tokens=12)
    monkeypatch.setattr(attention, "fused_step", lambda _: decode_step)
    monkeypatch.setattr(attention, "fused_squeeze", lambda _: squeeze)
    fused = write_together(model, prompts(), asked, max_new_tokens=12)
    for (full, others), (full_fused, others_fused) in zip(plain, fused, strict=True):
        assert full.token_ids == full_fused.token_ids
        for start, one, other in zip(asked[0], others, others_fused, strict=True):
            assert one.token_ids == other.token_ids, start.policy.name
            assert other.lost == pytest.approx(one.lost, abs=1e-3), start.policy.name
            assert torch.equal(one.kept, other.kept), start.policy.name


def test_the_plain_products_of_a_cpu_read_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are for bf16; in fp32 the caches' choices can be compared exactly."""
    model = tiny.tiny_llama()
    asked = [[Start(make_policy(name), 36) for name in (*POLICIES, "auv-look")]] * 2
    fused = write_together(model, prompts(), asked, max_new_tokens=12)
    monkeypatch.setattr(plain_chunk, "pays", lambda query, columns, power: query.shape[2] > 1)
    plain = write_together(model, prompts(), asked, max_new_tokens=12)
    for (full, others), (full_plain, others_plain) in zip(fused, plain, strict=True):
        assert full.token_ids == full_plain.token_ids
        for start, one, other in zip(asked[0], others, others_plain, strict=True):
            assert one.token_ids == other.token_ids, start.policy.name
            assert torch.equal(one.kept, other.kept), start.policy.name

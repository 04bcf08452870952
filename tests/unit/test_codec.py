"""Vectors in 8 bits and fewer: how near they come back, what they take, and that scattering them changes nothing."""

from __future__ import annotations

import pytest
import torch

from auvsum.cache.codec import EvenCodec, Metric, QuantizedCodec, Tiers, make_codec, vector_bytes
from auvsum.errors import PolicyError

SIZES = [8, 32, 64, 80, 96, 128, 256]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("size", SIZES)
def test_each_channel_is_off_by_at_most_half_a_step(size: int, bits: int) -> None:
    codec = QuantizedCodec(torch.float32, bits)
    vectors = torch.randn(5, 3, size, generator=torch.Generator().manual_seed(size))
    vectors[0, 0, 0] = 40.0  # a channel that stands out, as some of the keys' do
    turned, back = codec.turn(vectors), codec.unpack(codec.pack(vectors))
    group = next(g for g in range(min(64, size), 0, -1) if size % g == 0)
    # By hand, group by group: whole steps between the ends.
    for token in range(5):
        for head in range(3):
            for start in range(0, size, group):
                want = turned[token, head, start : start + group]
                step = float(want.max() - want.min()) / (2**bits - 1)
                off = (back[token, head, start : start + group] - want).abs().max()
                assert off <= step * 0.51 + 2e-3 * float(want.abs().max()), (token, head, start)


@pytest.mark.parametrize("size", SIZES)
def test_the_rotation_is_its_own_inverse_and_keeps_products(size: int) -> None:
    codec = QuantizedCodec(torch.float32, 4)
    a, b = torch.randn(2, 7, size, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(codec.turn_back(codec.turn(a)), a)
    torch.testing.assert_close((codec.turn(a) * codec.turn(b)).sum(-1), (a * b).sum(-1))


def test_an_outlying_channel_is_spread_before_it_is_cut_into_steps() -> None:
    """Why there is a rotation: one large channel would take all the steps of its group."""
    codec = QuantizedCodec(torch.float32, 4)
    vectors = torch.randn(200, 64, generator=torch.Generator().manual_seed(3))
    vectors[:, 5] += 30
    rotated = (codec.turn_back(codec.unpack(codec.pack(vectors))) - vectors)[:, torch.arange(64) != 5]
    codec.turn = codec.turn_back = lambda x: x  # type: ignore[method-assign]
    plain = (codec.unpack(codec.pack(vectors)) - vectors)[:, torch.arange(64) != 5]
    assert rotated.abs().mean() < 0.75 * plain.abs().mean()


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_what_is_allocated_is_what_the_budget_counts(bits: int) -> None:
    codec = make_codec(torch.bfloat16, bits)
    memory = codec.allocate((2, 3, 10), 64, torch.device("cpu"))
    assert sum(part.nbytes for part in memory) == 2 * 3 * 10 * vector_bytes(64, 2, bits)
    assert not codec.decode(memory).any()


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_scattered_token_is_the_token(bits: int) -> None:
    codec = make_codec(torch.float32, bits)
    memory = codec.allocate((1, 2, 6), 16, torch.device("cpu"))
    vectors = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(2))
    heads, slots = torch.tensor([[0], [1]]), torch.tensor([[5, 0, 2], [1, 3, 4]])
    codec.encode(memory, (0, heads, slots), vectors)
    torch.testing.assert_close(
        codec.decode(memory, (0, heads, slots)), codec.turn_back(codec.unpack(codec.pack(vectors)))
    )
    untouched = codec.decode(memory, (0, 0, 1))
    assert not untouched.any()


def test_a_head_size_that_does_not_fit_is_refused() -> None:
    with pytest.raises(PolicyError, match="heads of size 7 cannot be kept in 4 bits"):
        vector_bytes(7, 2, 4)


@pytest.mark.parametrize("bits", [3, 2])
@pytest.mark.parametrize("size", [64, 80, 96, 128])
def test_even_steps_on_both_sides_of_zero(size: int, bits: int) -> None:
    """Each channel comes back as its best level, of a step that no other step of the group beats by much."""
    codec = EvenCodec(torch.float32, bits)
    vectors = torch.randn(6, size, generator=torch.Generator().manual_seed(size))
    turned, memory = codec.turn(vectors), codec.pack(vectors)
    back = codec.unpack(memory)
    assert sum(part.nbytes for part in memory) == 6 * vector_bytes(size, 4, bits)
    group = next(g for g in range(min(64, size), 0, -1) if size % g == 0)
    for token in range(6):
        for start in range(0, size, group):
            want, got = (x[token, start : start + group] for x in (turned, back))
            step = 2 ** ((float(memory[-1][token, start // group, 0]) - 160) / 16)
            levels = step * (torch.arange(2**bits) - (2**bits - 1) / 2)
            assert (got[:, None] - levels).abs().amin(1).max() < 1e-5
            rms = float(want.square().mean().sqrt())
            best = min(
                float(
                    (want[:, None] - rms * s / 50 * (torch.arange(2**bits) - (2**bits - 1) / 2))
                    .abs()
                    .amin(1)
                    .square()
                    .sum()
                )
                for s in range(10, 100)
            )
            assert float((got - want).square().sum()) <= 1.5 * best


@pytest.mark.parametrize(
    "codec", [EvenCodec(torch.float32, 2), EvenCodec(torch.float32, 3), QuantizedCodec(torch.float32, 4)]
)
def test_codes_chosen_by_a_metric_lose_less_of_it(codec: EvenCodec | QuantizedCodec) -> None:
    """Queries of a head that lie near a few directions: errors go where no query looks."""
    seed = torch.Generator().manual_seed(0)
    directions = torch.randn(3, 64, 64, generator=seed) * torch.linspace(0, 2, 64).exp().flip(0)[:, None]
    metric = directions.mT @ directions
    head = torch.tensor([0] * 5 + [2] * 40)  # a head without vectors between them
    vectors = torch.randn(45, 64, generator=seed)
    own, lost = codec.turn(codec.turn(metric).mT)[head], []
    for chosen in (None, Metric(metric)):
        error = codec.unpack(codec.pack(vectors, None if chosen is None else head, chosen)) - codec.turn(vectors)
        lost.append(float((error[:, None] @ own @ error[..., None]).mean()))
    assert lost[1] < 0.6 * lost[0]
    # One head after the other gives the same codes.
    alone = [codec.pack(vectors[head == h], head[head == h] * 0, Metric(metric[h : h + 1])) for h in (0, 2)]
    for together, parts in zip(codec.pack(vectors, head, Metric(metric)), zip(*alone, strict=True), strict=True):
        assert torch.equal(together, torch.cat(parts))


def test_without_correlations_a_metric_changes_nothing() -> None:
    codec, vectors = QuantizedCodec(torch.float32, 4), torch.randn(9, 32, generator=torch.Generator().manual_seed(1))
    head = torch.arange(9) // 3
    plain, aware = codec.pack(vectors), codec.pack(vectors, head, Metric(5 * torch.eye(32).expand(3, -1, -1)))
    assert all(torch.equal(one, other) for one, other in zip(plain, aware, strict=True))


@pytest.mark.parametrize("step", [2.0**-10, 0.013, 1.0, 37.0])
def test_a_step_in_one_byte_is_off_by_half_a_sixteenth_of_an_octave(step: float) -> None:
    codec = EvenCodec(torch.float32, 2)
    # The best step of these is known: half of the channels are 3/2 steps long, the others 1/2.
    vectors = codec.turn(step * torch.tensor([1.5, -0.5, -1.5, 0.5]).repeat(16)[None])
    ratio = codec.unpack(codec.pack(vectors)) / codec.turn(vectors)
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))
    assert abs(float(ratio[0, 0].log2())) <= 1 / 32 + 1e-4


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_tiers_hold_each_vector_in_its_codec_through_every_move(share: float) -> None:
    fine, coarse = QuantizedCodec(torch.float32, 4), EvenCodec(torch.float32, 3)
    tiers, seed = Tiers(fine, coarse), torch.Generator().manual_seed(4)
    vectors, more = torch.randn(20, 16, generator=seed), torch.randn(3, 16, generator=seed)
    best = torch.rand(20, generator=seed) < share
    want = torch.where(best[:, None], fine.unpack(fine.pack(vectors)), coarse.unpack(coarse.pack(vectors)))
    memory = tiers.pack(vectors, best)
    assert torch.equal(tiers.unpack(memory, best), want)
    added = torch.tensor([True, False, True])
    both = tiers.both(more, torch.zeros(3, dtype=torch.int64), None)
    memory, best = tiers.added(memory, both, added), torch.cat([best, added])
    want = torch.cat(
        [want, torch.where(added[:, None], fine.unpack(fine.pack(more)), coarse.unpack(coarse.pack(more)))]
    )
    assert torch.equal(tiers.unpack(memory, best), want)
    order = torch.randperm(23, generator=seed)[:11]
    assert torch.equal(tiers.unpack(tiers.select(memory, best, order), best[order]), want[order])

"""Vectors in 8 and 4 bits: how near they come back, what they take, and that scattering them changes nothing."""

from __future__ import annotations

import pytest
import torch

from auvsum.cache.codec import QuantizedCodec, make_codec, vector_bytes
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

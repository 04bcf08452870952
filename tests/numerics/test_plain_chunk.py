"""The plain products of `kernels/plain_chunk.py` against the fused attention and its exchanged pass, in fp32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from auvsum.kernels import column_scores, plain_chunk
from auvsum.kernels.column_scores import attend_chunk
from auvsum.kernels.plain_chunk import PlainAttention

HEADS, GROUPS, SIZE = 6, 2, 16


def draw(chunk: int, past: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(chunk + past)
    shapes = ((HEADS, chunk), (GROUPS, past + chunk), (GROUPS, past + chunk))
    query, key, value = (torch.randn(1, heads, tokens, SIZE).bfloat16().to(dtype) for heads, tokens in shapes)
    return query, key, value


def draw_folded(dtype: torch.dtype) -> plain_chunk.Folded:
    """A reconstructed key that is live in the first group alone."""
    torch.manual_seed(1)
    key, value = (torch.randn(GROUPS, 1, SIZE).bfloat16().to(dtype) for _ in range(2))
    return key, value, torch.tensor([[True], [False]])


@pytest.mark.parametrize("with_folded", [False, True])
@pytest.mark.parametrize("past", [0, 37])
@pytest.mark.parametrize("block", [512, 50])
@pytest.mark.parametrize("power", [None, 1.0, 2.0])
def test_equals_the_fused_attention(
    power: float | None, block: int, past: int, with_folded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it was told would be asked for."""
    monkeypatch.setitem(plain_chunk.BLOCK, torch.float32, block)
    chunk, scale = 130, SIZE**-0.5
    tensors = draw(chunk, past, torch.float32)
    folded = draw_folded(torch.float32) if with_folded else None
    expected, fused = attend_chunk(*tensors, scale, past, folded, power=None)
    assert not isinstance(fused, PlainAttention)
    out, seen = plain_chunk.attend(*tensors, scale, past, folded, power)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    weights = torch.rand(GROUPS, chunk) + 0.5
    torch.testing.assert_close(seen.column_sums(weights), fused.column_sums(weights), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen.column_sums(), fused.column_sums(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen.column_sums(power=2.0), fused.column_sums(power=2.0), rtol=1e-4, atol=1e-5)
    longest = torch.tensor(200.0)
    torch.testing.assert_close(seen.aggregated(longest), fused.aggregated(longest), rtol=1e-4, atol=1e-6)
    squares = fused.column_sums(weights, power=2.0)
    torch.testing.assert_close(seen.column_sums(weights, power=2.0), squares, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen.last_rows(70), fused.last_rows(70), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(seen.keys_seen, fused.keys_seen)


def test_is_what_a_chunk_in_bf16_goes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_chunk, "has_tiles", lambda: False)
    chunk, past, scale = 100, 20, SIZE**-0.5
    out, seen = attend_chunk(*draw(chunk, past, torch.bfloat16), scale, past, draw_folded(torch.bfloat16))
    assert isinstance(seen, PlainAttention)
    exact = draw(chunk, past, torch.float32)
    expected, fused = attend_chunk(*exact, scale, past, draw_folded(torch.float32), power=None)
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.03)
    torch.testing.assert_close(seen.column_sums(), fused.column_sums(), rtol=0.02, atol=0)

    assert not plain_chunk.pays(draw(10, past, torch.bfloat16)[0], 1.0)
    # With matrix tiles the library's fused attention is the faster one, and says the same.
    monkeypatch.setattr(plain_chunk, "has_tiles", lambda: True)
    other, seen = attend_chunk(*draw(chunk, past, torch.bfloat16), scale, past, draw_folded(torch.bfloat16))
    assert not isinstance(seen, PlainAttention)
    torch.testing.assert_close(other.float(), out.float(), rtol=0, atol=0.03)
    torch.testing.assert_close(seen.column_sums(), fused.column_sums(), rtol=0.02, atol=0)


def test_a_chunk_in_fp32_goes_through_it_where_column_sums_are_wanted() -> None:
    tensors = draw(100, 0, torch.float32)
    for power, plain in ((None, False), (1.0, True)):
        _, seen = column_scores.attend_chunk(*tensors, 1.0, 0, power=power)
        assert isinstance(seen, PlainAttention) == plain
    _, seen = column_scores.attend_chunk(*(x.double() for x in tensors), 1.0, 0)
    assert not isinstance(seen, PlainAttention)

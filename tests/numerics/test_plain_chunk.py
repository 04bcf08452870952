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
@pytest.mark.parametrize("block", [(512, 1), (50, 1), (50, HEADS // GROUPS), (128, HEADS)])
@pytest.mark.parametrize("power", [None, 1.0, 2.0])
def test_equals_the_fused_attention(
    power: float | None, block: tuple[int, int], past: int, with_folded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it was told would be asked for, and however many queries and heads a block has."""
    monkeypatch.setattr(plain_chunk, "_shape_of_blocks", lambda *_: block)
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

    assert not plain_chunk.pays(draw(10, past, torch.bfloat16)[0], 10 + past, 1.0)


def test_with_matrix_tiles_a_chunk_in_bf16_goes_through_it_where_column_sums_are_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The library's fused attention is quick there, and says the same."""
    monkeypatch.setattr(plain_chunk, "has_tiles", lambda: True)
    chunk, past, scale = 300, 20, SIZE**-0.5
    found = {}
    for power in (None, 1.0):
        tensors, folded = draw(chunk, past, torch.bfloat16), draw_folded(torch.bfloat16)
        out, seen = found[power] = attend_chunk(*tensors, scale, past, folded, power)
        assert isinstance(seen, PlainAttention) == (power is not None)
    assert not plain_chunk.pays(tensors[0], 2000, 1.0)
    (expected, fused), (out, seen) = found.values()
    torch.testing.assert_close(out, expected, rtol=0, atol=0.03)
    torch.testing.assert_close(seen.column_sums(), fused.column_sums(), rtol=0.02, atol=0)


@pytest.mark.parametrize(("columns", "blocks"), [(400, (128, 6)), (4000, (128, 3)), (9000, (128, 3))])
def test_blocks_with_matrix_tiles_have_as_many_heads_as_the_cache_holds(
    columns: int, blocks: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain_chunk, "has_tiles", lambda: True)
    query, _, _ = draw(100, 0, torch.bfloat16)
    assert plain_chunk._shape_of_blocks(query, HEADS // GROUPS, columns) == blocks
    assert plain_chunk._shape_of_blocks(query.float(), HEADS // GROUPS, columns)[1] == 1


def test_a_chunk_in_fp32_goes_through_it_where_column_sums_are_wanted() -> None:
    tensors = draw(100, 0, torch.float32)
    for power, plain in ((None, False), (1.0, True)):
        _, seen = column_scores.attend_chunk(*tensors, 1.0, 0, power=power)
        assert isinstance(seen, PlainAttention) == plain
    _, seen = column_scores.attend_chunk(*(x.double() for x in tensors), 1.0, 0)
    assert not isinstance(seen, PlainAttention)

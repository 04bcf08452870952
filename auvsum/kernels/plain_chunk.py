"""Attention of a chunk on a CPU, as plain products over some queries of some heads at a time.

The library's fused CPU attention multiplies in bf16 at a tenth of the speed that its products reach (docs/LOG.md). A
block of probabilities that fits the processor's cache is made by two products and a softmax instead, and while it is
there, what policies ask of it costs next to nothing: no second attention as in `column_scores.py`, which makes this the
faster way also where the fused attention is quick (in fp32, and in bf16 on a processor with matrix tiles) if column
sums are wanted. The n x n matrix still never exists.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from auvsum.kernels.column_scores import ChunkAttention

#: Queries of a block of one head in fp32, and in bf16, whose products cost more to call.
BLOCK = {torch.float32: 128, torch.bfloat16: 512}
#: With matrix tiles products are so quick that calling them is what costs: queries of a block of several heads, and
#: how many probabilities it has at most, unless those of a KV head's query heads are more.
TILED = (128, 1 << 21)
#: With more columns the library's fused attention and a second, exchanged one are quicker there.
_MOST_COLUMNS = 1024
#: With fewer queries the calls, a handful for each head, cost more than the fused attention.
_LEAST = 64

#: The reconstructed key and value `[G, 1, D]` and where they are valid `[G, 1]`.
Folded = tuple[Tensor, Tensor, Tensor]


def pays(query: Tensor, columns: int, power: float | None) -> bool:
    """Whether this is the faster way for a chunk's queries `[1, H, T, D]`; `power` as of `attend_chunk`."""
    if query.device.type != "cpu" or query.dtype not in BLOCK or query.shape[2] < _LEAST:
        return False
    if query.dtype == torch.float32:
        return power is not None
    return not has_tiles() or (power is not None and columns <= _MOST_COLUMNS)


@functools.cache
def has_tiles() -> bool:
    """Whether the processor multiplies matrices in bf16 tiles, and the library's fused attention with them."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is not None:
        return bool(capabilities().get("amx_bf16"))
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return probe is not None and bool(probe())


@dataclass(frozen=True)
class PlainAttention(ChunkAttention):
    """A `ChunkAttention` without log-sum-exps: what is most asked for is at hand, other things are made again.

    Attributes:
        folded: the reconstructed key and value, which take part but are no column.
        sums: fp32 `[2, G, past + T]`, column sums of the probabilities' `power`, by queries and by `keys_seen`.
    """

    folded: Folded | None
    power: float | None
    sums: Tensor

    def aggregated(self, longest: Tensor) -> Tensor:
        return self.sums[1] / longest if self.power == 1 else super().aggregated(longest)

    def column_sums(self, weights: Tensor | None = None, power: float = 1.0) -> Tensor:
        if weights is None and power == self.power:
            return self.sums[0].clone()
        heads, groups = self.query.shape[1], self.key.shape[1]
        if weights is None:
            weights = torch.ones((groups, self.query.shape[2]))
        weights = weights.repeat_interleave(heads // groups, 0)[:, None]
        sums = torch.zeros((heads, 1, self.key.shape[2]))
        for own, start, probabilities in _blocks(self.query, self.key, self.scaling, self.past, self.folded):
            _add_sums(sums, weights, own, start, probabilities, power, self.folded)
        return sums.view(groups, heads // groups, -1).mean(1)

    def last_rows(self, count: int) -> Tensor:
        _, heads, chunk, _ = self.query.shape
        groups, columns = self.key.shape[1], self.key.shape[2]
        last, past = self.query[:, :, chunk - count :], columns - count
        rows = torch.zeros((heads, count, columns))
        for own, start, part in _blocks(last, self.key, self.scaling, past, self.folded):
            part = part[..., 0 if self.folded is None else 1 :]
            rows[own, start : start + part.shape[1], : part.shape[2]] = part
        return rows.view(groups, heads // groups, count, columns).mean(1)


def attend(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, past: int, folded: Folded | None, power: float | None
) -> tuple[Tensor, ChunkAttention]:
    """`column_scores.attend_chunk`, of the same arguments."""
    _, heads, chunk, size = query.shape
    groups = key.shape[1]
    repeats = heads // groups
    out = query.new_empty((1, heads, chunk, size))
    lse = query.new_empty(0, dtype=torch.float32)
    sums = torch.zeros((heads, 2, past + chunk if power is not None else 0))
    valid = None if folded is None else folded[2]
    seen = PlainAttention(query, key, scaling, past, valid, lse, folded, power, sums)
    weights = torch.stack([torch.ones((groups, chunk)), seen.keys_seen], 1).repeat_interleave(repeats, 0)
    values = value[0] if folded is None else torch.cat([folded[1], value[0]], 1)
    for own, start, probabilities in _blocks(query, key, scaling, past, folded):
        count, rows, columns = probabilities.shape
        shared = slice(own.start // repeats, -(-own.stop // repeats))
        grouped = probabilities.to(value.dtype).view(-1, min(count, repeats) * rows, columns)
        out[0, own, start : start + rows] = torch.bmm(grouped, values[shared, :columns]).view(count, rows, size)
        if power is not None:
            _add_sums(sums, weights, own, start, probabilities, power, folded)
    return out, replace(seen, sums=sums.view(groups, repeats, 2, -1).mean(1).transpose(0, 1))


def _add_sums(
    sums: Tensor, weights: Tensor, own: slice, start: int, probabilities: Tensor, power: float, folded: Folded | None
) -> None:
    """Adds a block's column sums, weighted by `weights` `[H, W, T]`, to `sums` `[H, W, past + T]`."""
    if power != 1:
        probabilities.pow_(power)
    # The reconstructed key's column is left out behind the product, which would copy a part of the probabilities.
    found = torch.bmm(weights[own, :, start : start + probabilities.shape[1]], probabilities)
    found = found if folded is None else found[..., 1:]
    sums[own, :, : found.shape[2]] += found


def _blocks(
    query: Tensor, key: Tensor, scaling: float, past: int, folded: Folded | None
) -> Iterator[tuple[slice, int, Tensor]]:
    """Heads, first query and probabilities `[heads, rows, past + start + rows]` in fp32 of one block after the other.

    With a reconstructed key its column comes before the others. A block has one head, or all those of some KV heads.
    """
    _, heads, chunk, size = query.shape
    repeats = heads // key.shape[1]
    scaled = query[0] * scaling
    keys = key[0] if folded is None else torch.cat([folded[0], key[0]], 1)
    first = keys.shape[1] - past - chunk  # column of the first key that is not reconstructed
    block, together = _shape_of_blocks(query, repeats, keys.shape[1])
    for start in range(0, chunk, block):
        rows = min(block, chunk - start)
        columns = first + past + start + rows
        hidden = query.new_full((rows, rows), -torch.inf).triu_(1)
        for head in range(0, heads, together):
            own = slice(head, min(head + together, heads))
            shared = slice(head // repeats, -(-own.stop // repeats))
            asked = scaled[own, start : start + rows].reshape(shared.stop - shared.start, -1, size)
            logits = torch.bmm(asked, keys[shared, :columns].mT).view(-1, rows, columns)
            logits[..., columns - rows :] += hidden
            if folded is not None:
                dead = ~folded[2][shared].repeat_interleave(min(together, repeats), 0)
                logits[..., :1].masked_fill_(dead[..., None], -torch.inf)
            yield own, start, logits.softmax(-1, dtype=torch.float32)


def _shape_of_blocks(query: Tensor, repeats: int, columns: int) -> tuple[int, int]:
    """Queries of a block, and how many heads."""
    if query.dtype != torch.bfloat16 or not has_tiles():
        return BLOCK[query.dtype], 1
    rows, most = TILED
    return rows, min(max(1, most // (rows * columns * repeats)) * repeats, query.shape[1])

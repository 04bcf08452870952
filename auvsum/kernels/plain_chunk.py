"""Attention of a chunk on a CPU, as plain products over some queries of one head at a time.

The library's fused CPU attention multiplies in bf16 at a tenth of the speed that its products reach (docs/LOG.md), but
on a processor with matrix tiles (AMX), where it is the faster one. A block of probabilities that fits the processor's
cache is made by two products and a softmax instead, and while it is there, what policies ask of it costs next to
nothing: no second attention as in `column_scores.py`, which makes this the faster way in fp32 too where column sums are
wanted. The n x n matrix still never exists.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from auvsum.kernels.column_scores import ChunkAttention

#: Queries of a block in fp32, and in bf16, whose products cost more to call.
BLOCK = {torch.float32: 128, torch.bfloat16: 512}
#: With fewer queries the calls, a handful for each head, cost more than the fused attention.
_LEAST = 64

#: The reconstructed key and value `[G, 1, D]` and where they are valid `[G, 1]`.
Folded = tuple[Tensor, Tensor, Tensor]


def pays(query: Tensor, power: float | None) -> bool:
    """Whether this is the faster way for a chunk's queries `[1, H, T, D]`; `power` as of `attend_chunk`."""
    bf16 = query.dtype == torch.bfloat16 and not has_tiles()
    wanted = bf16 or (query.dtype == torch.float32 and power is not None)
    return query.device.type == "cpu" and wanted and query.shape[2] >= _LEAST


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
        sums = torch.zeros((heads, self.key.shape[2]))
        for head, start, probabilities in _blocks(self.query, self.key, self.scaling, self.past, self.folded):
            rows, columns = probabilities.shape
            if power != 1:
                probabilities.pow_(power)
            sums[head, :columns] += weights[head // (heads // groups), start : start + rows] @ probabilities
        return sums.view(groups, heads // groups, -1).mean(1)

    def last_rows(self, count: int) -> Tensor:
        _, heads, chunk, _ = self.query.shape
        groups, columns = self.key.shape[1], self.key.shape[2]
        last, past = self.query[:, :, chunk - count :], columns - count
        rows = torch.zeros((heads, count, columns))
        for head, start, part in _blocks(last, self.key, self.scaling, past, self.folded):
            rows[head, start : start + part.shape[0], : part.shape[1]] = part
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
    sums = torch.zeros((2, heads, past + chunk if power is not None else 0))
    valid = None if folded is None else folded[2]
    seen = PlainAttention(query, key, scaling, past, valid, lse, folded, power, sums)
    weights = torch.stack([torch.ones((groups, chunk)), seen.keys_seen])
    for head, start, probabilities in _blocks(query, key, scaling, past, folded):
        rows, columns = probabilities.shape
        part, group = out[0, head, start : start + rows], head // repeats
        torch.mm(probabilities.to(value.dtype), value[0, group, :columns], out=part)
        if folded is not None:
            mass = 1 - probabilities.sum(-1, keepdim=True)  # what the reconstructed key got
            part += (mass * folded[1][group].float()).to(part.dtype)
        if power is not None:
            if power != 1:
                probabilities.pow_(power)
            sums[:, head, :columns] += weights[:, group, start : start + rows] @ probabilities
    return out, replace(seen, sums=sums.view(2, groups, repeats, -1).mean(2))


def _blocks(
    query: Tensor, key: Tensor, scaling: float, past: int, folded: Folded | None
) -> Iterator[tuple[int, int, Tensor]]:
    """Head, first query and probabilities `[rows, past + start + rows]` in fp32 of one block after the other."""
    _, heads, chunk, _ = query.shape
    repeats = heads // key.shape[1]
    scaled, block = query[0] * scaling, BLOCK[query.dtype]
    for start in range(0, chunk, block):
        end = min(start + block, chunk)
        columns = past + end
        mask = query.new_zeros((end - start, columns))
        mask[:, past + start :] = torch.full((end - start, end - start), -torch.inf).triu_(1)
        for head in range(heads):
            group, rows = head // repeats, scaled[head, start:end]
            logits = torch.addmm(mask, rows, key[0, group, :columns].t())
            if folded is None:
                yield head, start, logits.softmax(-1, dtype=torch.float32)
                continue
            own = (rows @ folded[0][group].t()).masked_fill_(~folded[2][group], -torch.inf)
            yield head, start, torch.cat([own, logits], -1).softmax(-1, dtype=torch.float32)[:, 1:]

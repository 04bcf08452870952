"""Attention of a chunk in bf16 on a CPU, as plain products over a few hundred queries of one head at a time.

The library's fused CPU attention multiplies at a tenth of the speed that its bf16 products reach (docs/LOG.md). A block
of probabilities that fits the processor's cache is made by two products and a softmax instead, and policies get their
column sums from it for one more product, without the second attention of `column_scores.py`. The n x n matrix still
never exists: of a chunk of one block the probabilities are kept until the layer is done, of a longer one they are made
again, block by block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from auvsum.kernels.column_scores import ChunkAttention

#: Queries of a block.
BLOCK = 512
#: With fewer queries the calls, a handful for each head, cost more than the fused attention.
_LEAST = 64

#: The reconstructed key and value `[G, 1, D]` and where they are valid `[G, 1]`.
Folded = tuple[Tensor, Tensor, Tensor]


def pays(query: Tensor) -> bool:
    """Whether this is the faster way for a chunk's queries `[1, H, T, D]`."""
    return query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.shape[2] >= _LEAST


@dataclass(frozen=True)
class PlainAttention(ChunkAttention):
    """A `ChunkAttention` without log-sum-exps: the probabilities are at hand, or are made again.

    Attributes:
        folded: the reconstructed key and value, which take part but are no column.
        kept: fp32 `[H, T, past + T]`, the probabilities of a chunk of one block; None for a longer one.
    """

    folded: Folded | None
    kept: Tensor | None

    @property
    def scratch(self) -> tuple[Tensor, ...]:
        return () if self.kept is None else (self.kept,)

    def column_sums(self, weights: Tensor | None = None, power: float = 1.0) -> Tensor:
        heads, groups = self.query.shape[1], self.key.shape[1]
        if weights is None:
            weights = torch.ones((groups, self.query.shape[2]))
        weights = weights.repeat_interleave(heads // groups, 0)[:, None]  # [H, 1, T]
        if self.kept is not None:
            sums = (weights @ (self.kept if power == 1 else self.kept.pow(power)))[:, 0]
        else:
            sums = torch.zeros((heads, self.key.shape[2]))
            for head, start, probabilities in _blocks(self.query, self.key, self.scaling, self.past, self.folded):
                rows, columns = probabilities.shape
                if power != 1:
                    probabilities.pow_(power)
                sums[head, :columns] += (weights[head, :, start : start + rows] @ probabilities)[0]
        return sums.view(groups, heads // groups, -1).mean(1)

    def last_rows(self, count: int) -> Tensor:
        _, heads, chunk, _ = self.query.shape
        groups, columns = self.key.shape[1], self.key.shape[2]
        if self.kept is not None:
            rows = self.kept[:, chunk - count :]
        else:
            last, past = self.query[:, :, chunk - count :], columns - count
            made = _blocks(last, self.key, self.scaling, past, self.folded)
            rows = torch.zeros((heads, count, columns))
            for head, start, part in made:
                rows[head, start : start + part.shape[0], : part.shape[1]] = part
        return rows.view(groups, heads // groups, count, columns).mean(1)


def attend(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, past: int, folded: Folded | None
) -> tuple[Tensor, ChunkAttention]:
    """`column_scores.attend_chunk`, of the same arguments."""
    _, heads, chunk, size = query.shape
    repeats = heads // key.shape[1]
    out = query.new_empty((1, heads, chunk, size))
    kept = torch.zeros((heads, chunk, past + chunk)) if chunk <= BLOCK else None
    for head, start, probabilities in _blocks(query, key, scaling, past, folded):
        rows, columns = probabilities.shape
        part = out[0, head, start : start + rows]
        torch.mm(probabilities.to(value.dtype), value[0, head // repeats, :columns], out=part)
        if folded is not None:
            mass = 1 - probabilities.sum(-1, keepdim=True)  # what the reconstructed key got
            part += (mass * folded[1][head // repeats].float()).to(part.dtype)
        if kept is not None:
            kept[head] = probabilities
    lse = query.new_empty(0, dtype=torch.float32)
    valid = None if folded is None else folded[2]
    return out, PlainAttention(query, key, scaling, past, valid, lse, folded, kept)


def _blocks(
    query: Tensor, key: Tensor, scaling: float, past: int, folded: Folded | None
) -> Iterator[tuple[int, int, Tensor]]:
    """Head, first query and probabilities `[rows, past + start + rows]` in fp32 of one block after the other."""
    _, heads, chunk, _ = query.shape
    repeats = heads // key.shape[1]
    scaled = query[0] * scaling
    for start in range(0, chunk, BLOCK):
        end = min(start + BLOCK, chunk)
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

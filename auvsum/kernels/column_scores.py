"""Attention of a chunk and the column sums of its probabilities, in O(T) memory: the n x n matrix never exists.

A fused attention op returns the output and each row's log-sum-exp. A second call of the same op with Q and K exchanged
then yields what eviction policies need, because for a key j

    Σ_i w_i · a[i, j] = Σ_i exp(q_i·k_j·s - lse_i + log w_i) = exp(logsumexp_i(q_i·k_j·s + bias_i))

is again a log-sum-exp, over queries instead of keys. Flipping both sequences makes the exchanged mask causal again, and
`bias_i` rides in extra columns of the head dimension (split in three parts, so that half precision loses nothing).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from auvsum.kernels import optional

#: Extra head-dimension columns: three carry the bias, the rest keep the size a multiple of eight.
_BIAS_COLUMNS = 8


@dataclass(frozen=True)
class ChunkAttention:
    """What a chunk's queries saw, for policies to aggregate. One sequence.

    Columns are the `past` keys held before the chunk, then the chunk's own `T` keys.

    Attributes:
        query: `[1, H, T, D]`. key: `[1, G, past + T, D]`.
        folded_valid: `[G, 1]` bool, the KV heads whose queries saw a reconstructed key too; None for none.
        lse: `[1, H, T]` fp32, log-sum-exp of each query's scaled logits.
    """

    query: Tensor
    key: Tensor
    scaling: float
    past: int
    folded_valid: Tensor | None
    lse: Tensor

    @property
    def keys_seen(self) -> Tensor:
        """`N_i`, how many keys each query's softmax ran over: fp32 `[G, T]`."""
        chunk, groups = self.query.shape[2], self.key.shape[1]
        own = self._shared(_count_up)(self.past + 1, chunk, self.query.device).expand(groups, chunk)
        return own if self.folded_valid is None else own + self.folded_valid

    @property
    def queries_seen(self) -> Tensor:
        """How many of the chunk's queries saw each column: fp32 `[past + T]`."""
        chunk = self.query.shape[2]
        return self._shared(_count_down)(self.past, chunk, self.query.device)

    def _shared(self, made: Callable[[int, int, torch.device], Tensor]) -> Callable[[int, int, torch.device], Tensor]:
        """`made`, kept from layer to layer on a GPU, where launching it takes longer than running it."""
        return _kept(made) if self.query.device.type == "cuda" else made

    def last_rows(self, count: int) -> Tensor:
        """Probabilities of the chunk's last `count` queries, averaged over the query heads of each KV head.

        Computed from the log-sum-exps that are there already: O(count · C) memory, one query head of a group at a time.

        Returns:
            fp32 `[G, count, past + T]`; 0 for keys that a query does not see.
        """
        _, heads, chunk, _ = self.query.shape
        groups, columns = self.key.shape[1], self.key.shape[2]
        repeats = heads // groups
        query = self.query[0, :, chunk - count :].view(groups, repeats, count, -1)
        lse = self.lse[0, :, chunk - count :].view(groups, repeats, count, 1)
        rows = torch.arange(columns - count, columns, device=query.device)[:, None]
        hidden = torch.arange(columns, device=query.device) > rows
        key = self.key[0].float().transpose(-1, -2)
        total = query.new_zeros((groups, count, columns), dtype=torch.float32)
        for head in range(repeats):
            logits = (query[:, head].float() @ key).mul_(self.scaling).masked_fill_(hidden, -torch.inf)
            total += logits.sub_(lse[:, head]).exp_()
        return total.div_(repeats)

    def last_sums(self, count: int) -> Tensor:
        """Sums of `last_rows` over the queries, fp32 `[G, past + T]`, without the rows where a kernel runs."""
        kernel = _score_kernel(self.query)
        if kernel is None:
            return self.last_rows(count).sum(1)
        chunk = self.query.shape[2]
        query, lse = self.query[:, :, chunk - count :], self.lse[:, :, chunk - count :]
        total: Tensor = kernel.column_sums(query, self.key, lse, None, self.scaling, self.past + chunk - count)
        return total

    def last_hits(self, least: Tensor, bits: int) -> Tensor:
        """Which of the chunk's last N queries gave a key at least `least` `[G, N]`, averaged as in `last_rows`.

        Returns:
            int32 `[G, ceil(N / bits), past + T]`; the last query is the lowest bit of the first word.
        """
        kernel = _score_kernel(self.query)
        if kernel is None:
            return pack_bits(self.last_rows(least.shape[1]) >= least[..., None], bits)
        words: Tensor = kernel.hits(self.query, self.key, self.lse, least, self.scaling, self.past, bits)
        return words

    def aggregated(self, longest: Tensor) -> Tensor:
        """Eq. 2's sum `Σ_i a[i, j] · N_i / N_max` for an N_max, as `column_sums`."""
        return self.column_sums(self.keys_seen / longest)

    def column_sums(self, weights: Tensor | None = None, power: float = 1.0) -> Tensor:
        """`Σ_i w_i · a[i, j]^p`, averaged over the query heads of each KV head.

        Args:
            weights: positive `w_i`, fp32 `[G, T]`; None for ones. power: `p`; a power of a probability is the same
                exponential with logits and log-sum-exp `p` times as large.

        Returns:
            fp32 `[G, past + T]`.
        """
        scaling, lse = self.scaling * power, self.lse if power == 1 else self.lse * power
        kernel = _score_kernel(self.query)
        if kernel is not None:
            total: Tensor = kernel.column_sums(self.query, self.key, lse, weights, scaling, self.past)
            return total
        _, heads, chunk, _ = self.query.shape
        groups = self.key.shape[1]
        bias = -lse[0]
        if weights is not None:
            bias = bias + weights.log().repeat_interleave(heads // groups, 0)
        queries = _with_bias(self.query[0], bias / scaling)
        keys = _with_ones(self.key[0]).repeat_interleave(heads // groups, 0)[None]
        sums = []
        if self.past:
            _, found = fused_attention(keys[:, :, : self.past], queries, queries, scaling, causal=False)
            sums.append(found[0].exp())
        # Flipped: the last key comes first and may see only the last query, and so on.
        own, flipped = keys[:, :, self.past :].flip(2), queries.flip(2)
        _, found = fused_attention(own, flipped, flipped, scaling, causal=True)
        sums.append(found[0].flip(-1).exp())
        return torch.cat(sums, -1).view(groups, heads // groups, self.past + chunk).mean(1)


def pack_bits(rows: Tensor, bits: int) -> Tensor:
    """Bool `[.., N, C]`, oldest first -> int32 `[.., ceil(N / bits), C]`; the newest is the first word's lowest bit."""
    words = []
    for word in torch.split(rows.flip(-2), bits, -2):
        shifts = torch.arange(word.shape[-2], dtype=torch.int32, device=rows.device)[:, None]
        words.append((word.to(torch.int32) << shifts).sum(-2, dtype=torch.int32))
    return torch.stack(words, -2)


@functools.cache
def _kept(made: Callable[[int, int, torch.device], Tensor]) -> Callable[[int, int, torch.device], Tensor]:
    """`made` with its last two results kept: prompts are read one at a time, in chunks of two lengths at most."""
    return functools.lru_cache(maxsize=2)(made)


def _count_up(start: int, count: int, device: torch.device) -> Tensor:
    """`start, start + 1, ..`; the same for all layers of a chunk."""
    return torch.arange(start, start + count, device=device, dtype=torch.float32)


def _count_down(past: int, chunk: int, device: torch.device) -> Tensor:
    """`chunk` for each of `past`, then `chunk, chunk - 1, .., 1`."""
    own = torch.arange(chunk, 0, -1, device=device, dtype=torch.float32)
    return torch.cat([own.new_full((past,), chunk), own])


def attend_chunk(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    past: int,
    folded: tuple[Tensor, Tensor, Tensor] | None = None,
    power: float | None = 1.0,
) -> tuple[Tensor, ChunkAttention]:
    """Attention of a chunk over `past` held keys, a reconstructed one and, causally, itself.

    Args:
        query: `[1, H, T, D]`. key, value: `[1, G, past + T, D]`.
        folded: the reconstructed key and value `[G, 1, D]` and where they are valid `[G, 1]`.
        power: of the probabilities whose column sums will be asked for; None when none will. Only speed depends on it.

    Returns:
        the output `[1, H, T, D]` and what the policies need to know about the probabilities.
    """
    plain = _plain_chunk()
    if plain.pays(query, key.shape[2], power):
        found: tuple[Tensor, ChunkAttention] = plain.attend(query, key, value, scaling, past, folded, power)
        return found
    out, lse = fused_attention(query, key[:, :, past:], value[:, :, past:], scaling, causal=True)
    joined = optional("join") if query.device.type == "cuda" and past else None
    if past:
        old, old_lse = fused_attention(query, key[:, :, :past], value[:, :, :past], scaling, causal=False)
        if joined is not None:
            out, lse = joined.join(query, (out, lse), (old, old_lse), folded, scaling)
        else:
            out, lse = _join(out, lse, old, old_lse)
    if folded is not None and joined is None:
        repeats = query.shape[1] // key.shape[1]
        one_key, one_value, valid = (x.repeat_interleave(repeats, 0) for x in folded)
        logit = (query[0].float() @ one_key.float().transpose(1, 2))[..., 0] * scaling  # [H, T]
        logit = logit.masked_fill(~valid, -torch.inf)[None]
        out, lse = _join(out, lse, one_value[None], logit)
    out = out.to(query.dtype)
    return out, ChunkAttention(query, key, scaling, past, None if folded is None else folded[2], lse)


def attend_token(
    query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], scaling: float, power: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Attention of one token over keys that lie in several places, none of which is copied.

    Args:
        query: `[1, H, 1, D]`. keys, values: `[1, G, C_i, D]` each. power: `p`.

    Returns:
        the output `[1, H, 1, D]`, and `a[j]^p` over the keys of all places, averaged over the query heads of each KV
        head: fp32 `[G, Σ C_i]`.
    """
    grouped = query.view(1, keys[0].shape[1], -1, query.shape[-1])
    logits = torch.cat([grouped @ key.mT for key in keys], -1).float()
    probabilities = logits.mul_(scaling).softmax(-1)
    parts = torch.split(probabilities.to(query.dtype), [key.shape[2] for key in keys], -1)
    out = torch.stack([part @ value for part, value in zip(parts, values, strict=True)]).sum(0)
    return out.view(query.shape), probabilities.pow_(power).mean(2)[0]


def _join(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Two softmaxes over different keys become one."""
    total = torch.logaddexp(lse, other_lse)
    return other * (other_lse - total).exp()[..., None] + out * (lse - total).exp()[..., None], total


@functools.cache
def _plain_chunk() -> ModuleType:
    from auvsum.kernels import plain_chunk  # which builds on this module

    return plain_chunk


def _score_kernel(query: Tensor) -> ModuleType | None:
    """The column sums' own kernel, where it is the faster way: half precision on a GPU."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    return optional("score_kernel") if query.device.type == "cuda" and half and query.shape[-1] <= 256 else None


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, *, causal: bool
) -> tuple[Tensor, Tensor]:
    """The library's fused attention with its log-sum-exp: output `[B, H, T, D]`, lse fp32 `[B, H, T]`.

    `causal` wants as many queries as keys. Grouped-query: key and value may have fewer heads than query.
    """
    if query.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, scale=scaling
        )
        return out, lse
    half = query.dtype in (torch.float16, torch.bfloat16)
    if half and query.shape[-1] % 8 == 0 and query.shape[-1] <= 128 and query.shape[2] > 1:
        # Hopper's own kernel: 1.7 times as fast as the flash attention below.
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            query, key, value, None, True, 0.0, causal, False, scale=scaling
        )
        return out, lse.view(query.shape[:3])
    if half and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, scale=scaling)
        return out, lse
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, None, True, 0.0, causal, scale=scaling
    )
    return out, lse[..., : query.shape[2]]


def _with_bias(query: Tensor, bias: Tensor) -> Tensor:
    """`[H, T, D]` and fp32 `[H, T]` -> `[1, H, T, D + 8]`; the bias in up to three parts of the query's precision."""
    extra = query.new_zeros((*query.shape[:2], _BIAS_COLUMNS))
    rest = bias
    for column in range(3):
        part = rest.to(query.dtype)
        extra[..., column] = part
        rest = rest - part.to(rest.dtype)
    return torch.cat([query, extra], -1)[None]


def _with_ones(key: Tensor) -> Tensor:
    """`[G, C, D]` -> `[G, C, D + 8]`, ones where the bias is."""
    extra = key.new_zeros((*key.shape[:2], _BIAS_COLUMNS))
    extra[..., :3] = 1
    return torch.cat([key, extra], -1)

"""AUV's aggregated attention score and usage count (eqs. 2, 3, 4 and §3.3), shared by the steps of its ladder.

All work in place on the state "aas", "cnt" and "usage".
"""

from __future__ import annotations

import torch
from torch import Tensor

from auvsum.cache.policy import token_columns
from auvsum.cache.store import Held, SlotStore
from auvsum.kernels.column_scores import ChunkAttention


def aggregate_chunk(attention: ChunkAttention, held: Held, store: SlotStore, row: int) -> None:
    """Eq. 2 over the chunk's rows: the running mean of `a[i, j] · N_i / N_max` over the rows that see j."""
    sums = token_columns(attention.aggregated(store.longest[row]), held)
    rows = token_columns(attention.queries_seen, held)
    aas, cnt = held.state["aas"], held.state["cnt"]
    aas.mul_(cnt).add_(sums)
    cnt.add_(rows)
    aas.div_(cnt)


def aggregate_step(store: SlotStore, probabilities: Tensor) -> None:
    """Eqs. 3 and 4 for one decode step; probabilities `[B, G, S (+ 1)]`."""
    aas, cnt = store.state["aas"], store.state["cnt"]
    keys_seen = store.valid.sum(-1, keepdim=True)
    aas.mul_(cnt).addcmul_(probabilities, keys_seen / store.longest[:, None, None])
    cnt.add_(1)
    aas.div_(cnt)


def count_usage(store: SlotStore, probabilities: Tensor, local: Tensor, top_k: int | None) -> None:
    """`U += 1` for the `min(k, live)` most attended live slots, without the reconstructed one.

    Args:
        local: L of each row `[B]`, the default of `top_k`.
    """
    live = store.valid[..., : store.slots].sum(-1).amin(-1)
    count = (local if top_k is None else local.new_tensor(top_k)).minimum(live)
    usage = store.state["usage"]
    usage[..., : store.slots] += most_attended(store, probabilities[..., : store.slots], count)


def most_attended(store: SlotStore, probabilities: Tensor, count: Tensor) -> Tensor:
    """True at each row's `count` most attended live slots, `[B, G, S]`; on a tie the newer token wins."""
    # The bits of a float that is not negative are in its order. With the position behind them no two are the same, so
    # that one top-k settles ties, which a model's half precision makes common; a sort takes four times as long.
    key = probabilities.contiguous().view(torch.int32).to(torch.int64).mul_(1 << 32)
    key.add_(store.positions[..., : store.slots]).masked_fill_(~store.valid[..., : store.slots], -1)
    most = int(count.max())
    wanted = torch.arange(most, device=count.device) < count[:, None, None]
    index = key.topk(most, -1).indices
    return torch.zeros_like(key, dtype=torch.bool).scatter_(-1, index, wanted.expand_as(index))

"""Which of a prompt's tokens stay, in one launch (Triton): the newest, and the best by score among the rest.

`policy.keep_recent_and_best` is the truth: two sorts, which for the few long rows of a chunk are slow on a GPU. Here a
program finds one head's threshold in the bits of its scores.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from auvsum.kernels.select import most_scored

#: The most columns of a program.
_MOST = 32768


@triton.jit(do_not_specialize=["columns", "older", "best"])
def _keep_kernel(scores, out, columns, older, best, PADDED: tl.constexpr):
    g = tl.program_id(0)
    n = tl.arange(0, PADDED)
    score = tl.load(scores + g * columns + n, mask=n < older, other=0.0)
    kept = most_scored(score, n < older, n, best, PADDED) | ((n >= older) & (n < columns))
    at = tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(out + g * (best + columns - older) + at, n.to(tl.int64), mask=kept)


def supports(scores: Tensor) -> bool:
    """Whether `keep` takes them."""
    return scores.dtype == torch.float32 and scores.shape[1] <= _MOST


def keep(scores: Tensor, recent: int, best: int) -> Tensor:
    """The last `recent` columns and the `best` highest scores among the rest, in ascending order: int64 `[G, .]`.

    Args:
        scores: fp32 `[G, C]`, not negative; columns are in order of position.
    """
    groups, columns = scores.shape
    out = torch.empty((groups, recent + best), dtype=torch.int64, device=scores.device)
    padded = max(16, triton.next_power_of_2(columns))
    _keep_kernel[(groups,)](
        scores.contiguous(), out, columns, columns - recent, best,
        PADDED=padded, num_warps=min(32, max(4, padded // 512)),
    )  # fmt: skip
    return out

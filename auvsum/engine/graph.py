"""The decode step as one CUDA graph: forward, cache update, drawing, stop flags; the host only reads tokens back.

The cache's slots have fixed addresses and each row's pointer, position and activity live on the device, so one captured
step serves all tokens of all documents. Tokens arrive through pinned memory one step late; a row that has ended rests
on the device by itself until the host fills it again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from auvsum.cache.attention import fused_step
from auvsum.cache.cache import BudgetedCache
from auvsum.engine.sampling import Sampling

#: What a row reports in place of a token: it is at rest; its logits were not numbers.
RESTS, NOT_FINITE = -1, -2


@dataclass
class Launch:
    """A step under way and, once `ready`, its tokens."""

    rows: list[Any]
    tokens: Tensor
    ready: torch.cuda.Event


def why_not(cache: BudgetedCache, device: torch.device) -> str | None:
    """Why the step cannot be a graph here; None when it can."""
    if device.type != "cuda":
        return f"the device is {device.type}, not a GPU"
    kernel = fused_step(device.type)
    if kernel is None:
        return "Triton is not installed"
    if cache.policy.by_head:
        return f"policy {cache.policy.name!r} has no fused decode step"
    if not all(kernel.supports(layer.policy, layer.store) for layer in cache.layers):
        return f"policy {cache.policy.name!r} has no fused decode step"
    return None


class DecodeGraph:
    """One decode step of all rows of a cache, captured.

    Args:
        cache: allocated; its rows must not have been read yet.
        eos_ids: tokens that end a row.
        longest: the most tokens a row may write.
    """

    def __init__(
        self, model: Any, cache: BudgetedCache, sampling: Sampling, eos_ids: Iterable[int], longest: int
    ) -> None:
        self.model, self.cache, self.sampling = model, cache, sampling
        device, rows = next(model.parameters()).device, cache.rows
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        self.tokens = torch.zeros((rows, 1), dtype=torch.int64, device=device)
        self.positions = torch.zeros((rows, 1), dtype=torch.int64, device=device)
        self.left = torch.zeros(rows, dtype=torch.int64, device=device)
        self.active = torch.zeros(rows, dtype=torch.bool, device=device)
        self.eos = torch.tensor(sorted(eos_ids), dtype=torch.int64, device=device)
        self.noise = torch.zeros((rows, longest + 1), device=device) if sampling.temperature else None
        penalized = sampling.repetition_penalty != 1
        self.written = torch.zeros((rows, vocabulary), dtype=torch.bool, device=device) if penalized else None
        self.report = torch.full((rows,), RESTS, dtype=torch.int64, device=device)
        self.spare = [torch.empty(rows, dtype=torch.int64).pin_memory() for _ in range(3)]
        self.under_way: deque[Launch] = deque()
        for layer in cache.layers:
            layer.store.active = self.active
        self.graph = self._capture()

    @torch.no_grad()
    def _capture(self) -> torch.cuda.CUDAGraph:
        unread = [(layer.unread, layer.columns) for layer in self.cache.layers]
        for layer in self.cache.layers:
            layer.unread = set()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # all rows rest: kernels are compiled, libraries initialized, nothing is written
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._step()
        for layer, (rows, columns) in zip(self.cache.layers, unread, strict=True):
            layer.unread, layer.columns = rows, columns
        return graph

    def _step(self) -> None:
        """What the graph holds."""
        out = self.model(self.tokens, position_ids=self.positions, past_key_values=self.cache, use_cache=True)
        logits = out.logits[:, -1]
        noise = self.left.float()
        if self.noise is not None:
            noise = self.noise.gather(1, self.left[:, None])[:, 0]
        drawn = self.sampling.draw_rows(logits, self.written, noise)
        # The largest logit is NaN where any is.
        largest = drawn if self.sampling.plain else logits.argmax(-1)
        finite = logits.gather(1, largest[:, None])[:, 0].isfinite()
        if self.written is not None:
            self.written.scatter_(1, drawn[:, None], True)
        self.report.copy_(torch.where(self.active, torch.where(finite, drawn, NOT_FINITE), RESTS))
        self.left -= self.active.long()
        self.positions += self.active[:, None].long()
        self.tokens.copy_(drawn[:, None])
        self.active &= finite & (self.left > 0) & ~torch.isin(drawn, self.eos)

    def fill(self, number: int, token: int, position: int, left: int, noise: list[float]) -> None:
        """A row that has just been read begins: its first token, that token's position, how many may follow.

        Args:
            noise: the random numbers of all its tokens, the first one's too; empty when greedy.
        """
        device = self.tokens.device
        values = torch.tensor([token, position, left]).pin_memory().to(device, non_blocking=True)
        self.tokens[number], self.positions[number], self.left[number] = values[0], values[1], values[2]
        if self.noise is not None:
            # `left` counts down, so the numbers of the tokens to come are stored backwards.
            backwards = torch.tensor([0.0, *noise[1:][::-1]])
            self.noise[number, : left + 1] = backwards.to(device)
        if self.written is not None:
            self.written[number].fill_(False)
            self.written[number, token].fill_(True)
        self.active[number].fill_(True)

    def launch(self, rows: list[Any]) -> None:
        """Starts a step of `rows`, which `arrived` hands back with their tokens."""
        self.graph.replay()
        for layer in self.cache.layers:
            layer.store.decoded()
        tokens = self.spare.pop()
        tokens.copy_(self.report, non_blocking=True)
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        ready.record()
        self.under_way.append(Launch(list(rows), tokens, ready))

    def arrived(self, lag: int = 1) -> tuple[list[Any], list[int]] | None:
        """The oldest step's rows and tokens, once more than `lag` steps are under way."""
        if len(self.under_way) <= lag:
            return None
        launch = self.under_way.popleft()
        launch.ready.synchronize()
        self.spare.append(launch.tokens)
        return launch.rows, launch.tokens.tolist()

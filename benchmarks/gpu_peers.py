"""Whom bench_gpu.py compares with: transformers with its own caches, and a full cache that lives in host memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, DynamicLayer

_STEPS = 24


@contextmanager
def plain_step(generate: Any, wanted: bool) -> Iterator[None]:
    """Within, when wanted, the engine has neither the fused step, nor the graph, nor the kernels that fill a row."""
    from auvsum.cache import attention

    before = attention.fused_step, attention.fused_squeeze, generate.why_not
    if wanted:
        attention.fused_step = attention.fused_squeeze = lambda _: None  # type: ignore[assignment]
        generate.why_not = lambda *_: "switched off"
    try:
        yield
    finally:
        attention.fused_step, attention.fused_squeeze, generate.why_not = before


def _step_times(model: Any, cache: Any, rows: int, prompt: int, steps: int, forward: Any = None, **more: Any) -> float:
    """Seconds for `steps` greedy steps after a prompt. `more` goes to every call of the model."""
    ids = torch.randint(4, model.config.vocab_size, (rows, prompt), device="cuda")
    positions = torch.arange(prompt, device="cuda").expand(rows, prompt)
    out = model(ids, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1, **more)
    # A compiled model has no truth value.
    token, forward = out.logits[:, -1].argmax(-1, keepdim=True), model if forward is None else forward
    del out
    start = 0.0
    for number in range(steps + 3):
        if number == 3:
            torch.cuda.synchronize()
            start = time.perf_counter()
        position = torch.full((rows, 1), prompt + number, device="cuda")
        out = forward(token, position_ids=position, past_key_values=cache, use_cache=True, **more)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def _add(bench: Any, name: str, rows: int, seconds: float, steps: int, weights: int, prompt: int, model: Any) -> None:
    config = model.config
    kv = 2 * config.num_hidden_layers * config.hidden_size * 2 * (prompt + steps / 2)
    bench.add(
        name, rows * steps / seconds, "tok/s", seconds=seconds, bytes_=(weights + rows * kv) * steps,
        operations=float(weights) * rows * steps, batch=rows,
    )  # fmt: skip


def transformers_decode(bench: Any, model: Any, attention: str, rows: int, prompt: int, weights: int) -> None:
    """The growing cache, as `generate` uses it."""
    model.set_attn_implementation(attention)
    seconds = _step_times(model, DynamicCache(config=model.config), rows, prompt, _STEPS)
    _add(
        bench,
        f"transformers {attention}, DynamicCache, full, batch {rows}",
        rows,
        seconds,
        _STEPS,
        weights,
        prompt,
        model,
    )


def compiled_decode(bench: Any, model: Any, prompt: int, weights: int) -> None:
    """The static cache and `torch.compile(mode="reduce-overhead")`."""
    model.set_attn_implementation("sdpa")
    length = prompt + _STEPS + 8
    cache = StaticCache(config=model.config, max_cache_len=length)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    # A mask of the cache's own length: without one its length depends on data, and there is no one graph.
    mask = torch.ones((1, length), dtype=torch.int64, device="cuda")
    seconds = _step_times(model, cache, 1, prompt, _STEPS, compiled, attention_mask=mask)
    _add(bench, "transformers sdpa, StaticCache, compiled, batch 1", 1, seconds, _STEPS, weights, prompt, model)


def transformers_prefill(model: Any, ids: list[int], median_seconds: Callable[..., float]) -> float:
    """Seconds to read a prompt with plain SDPA into the growing cache."""
    model.set_attn_implementation("sdpa")
    tokens = torch.tensor([ids], device="cuda")

    def run() -> None:
        model(tokens, past_key_values=DynamicCache(config=model.config), use_cache=True, logits_to_keep=1)

    return median_seconds(run, 5 if len(ids) < 8192 else 2)


class _HostLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values in host memory; each step copies the whole layer over and the new token back."""

    def __init__(self, length: int, pinned: bool) -> None:
        super().__init__()
        self.length, self.pinned, self.seen = length, pinned, 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            b, g, _, d = key_states.shape
            self.keys, self.values = (
                torch.empty((b, g, self.length, d), dtype=key_states.dtype, pin_memory=self.pinned) for _ in range(2)
            )
            self.is_initialized = True
        end = self.seen + key_states.shape[2]
        self.keys[:, :, self.seen : end] = key_states.cpu()
        self.values[:, :, self.seen : end] = value_states.cpu()
        self.seen = end
        # The whole buffer goes over: one contiguous copy is the fastest there is.
        return tuple(x.to("cuda", non_blocking=self.pinned)[:, :, :end] for x in (self.keys, self.values))  # type: ignore[return-value]

    def get_seq_length(self) -> int:
        return self.seen


def host_cache_decode(bench: Any, model: Any, prompt: int, pinned: bool, weights: int) -> None:
    """Batch 1 over the host-resident full cache."""
    steps = 6
    model.set_attn_implementation("sdpa")
    layers = [_HostLayer(prompt + steps + 4, pinned) for _ in range(model.config.num_hidden_layers)]
    cache = Cache(layers=layers)
    seconds = _step_times(model, cache, 1, prompt, steps)
    kind = "pinned" if pinned else "pageable"
    _add(bench, f"full cache in {kind} host memory, batch 1", 1, seconds, steps, weights, prompt, model)

"""The attention function "auvsum": what transformers calls in place of its own.

A prompt (more than one query) is read row by row, without padding: fused attention over what the row holds and the
chunk, then the policy chooses and the layer's store is filled; nothing else of the chunk is kept. A decode step is one
query a row over the row's slots.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from auvsum.cache.sliding import attend_window
from auvsum.cache.store import Held
from auvsum.errors import PolicyError
from auvsum.kernels import optional
from auvsum.kernels.column_scores import ChunkAttention, attend_chunk

if TYPE_CHECKING:
    from auvsum.cache.cache import LayerCache
    from auvsum.cache.heads import HeadsLayer
    from auvsum.cache.policy import SlotPolicy

NAME = "auvsum"


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface over a `BudgetedCache`.

    Args:
        query: `[B, H, T, D]`. key, value: the new tokens' `[B, G, T, D]`, as `LayerCache.update` returned them.
        attention_mask: the padding mask `[B, seen + T]`, True for tokens; None without padding.

    Returns:
        the output `[B, T, H, D]` and no weights.

    Raises:
        PolicyError: without a `BudgetedCache`, or when the model slides where its configuration does not say so.
    """
    layer: LayerCache | HeadsLayer | None = getattr(key, "auvsum_layer", None)
    if layer is None:
        raise PolicyError(
            "attention 'auvsum' was called without a BudgetedCache",
            "pass past_key_values=auvsum.BudgetedCache(model.config, policy=..., slots=...)",
        )
    if sliding_window != layer.window:
        raise PolicyError(
            f"a layer with the sliding window {sliding_window} was planned with {layer.window}",
            "type: auvsum doctor --model NAME",
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # A row that is read by itself has no padding, whatever mask of ones a model makes up.
    padded = attention_mask is not None and layer.row is None
    tokens = attention_mask[:, -query.shape[2] :] if padded and attention_mask is not None else None
    return layer.attend(query, key, value, scale, tokens), None


def attend(layer: LayerCache, query: Tensor, key: Tensor, value: Tensor, scale: float, tokens: Tensor | None) -> Tensor:
    """A chunk of a prompt, or one decode step: the output `[B, T, H, D]`. `tokens` is the chunk's padding mask."""
    if query.shape[2] > 1 or layer.reads_prompt:
        return _read(layer, query, key, value, scale, tokens)
    return _step(layer, query, key, value, scale)


def _read(layer: LayerCache, query: Tensor, key: Tensor, value: Tensor, scale: float, tokens: Tensor | None) -> Tensor:
    """A chunk of a prompt for each row; padding takes no part and gets a zero output."""
    if tokens is None and query.shape[0] == 1:
        return _read_row(layer, layer.row or 0, query, key, value, scale)[None]
    out = query.new_zeros((query.shape[0], query.shape[2], query.shape[1], value.shape[-1]))
    for b in range(query.shape[0]):
        row = b if layer.row is None else layer.row
        if tokens is None or bool(tokens[b].all()):
            out[b] = _read_row(layer, row, query[b : b + 1], key[b : b + 1], value[b : b + 1], scale)
        elif bool(tokens[b].any()):
            real = tokens[b].bool()
            q, k, v = (x[b : b + 1, :, real] for x in (query, key, value))
            out[b, real] = _read_row(layer, row, q, k, v, scale)
    return out


def _read_row(layer: LayerCache, row: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """One row's chunk: attend, observe, choose, fill. Returns `[T, H, D]`."""
    store = layer.store
    held = hold(layer, row, key, value)
    past = held.size - held.chunk
    if layer.window is not None:
        keys, values = held.key[None], held.value[None]
        out = attend_window(query, keys, values, scale, past, layer.window)
        layer.count_prefill(keys, values, key, value)
        choose_and_fill(layer, row, held, None)
        return out[0].transpose(0, 1)
    folded = store.reconstructed(row)
    position = layer.compact.get(row)
    placed = held.key if position is None else layer.rotary.place(held, position)
    if folded is not None and position is not None:
        folded = (layer.rotary.place_mean(folded[0], past, position), *folded[1:])
    keys, values = placed[None], held.value[None]
    power = 1.0 if layer.policy.looks else None
    out, seen = attend_chunk(query, keys, values, scale, past, folded, power)
    layer.count_prefill(keys, values, key, value, held.key)
    choose_and_fill(layer, row, held, seen)
    return out[0].transpose(0, 1)


def hold(layer: LayerCache, row: int, key: Tensor, value: Tensor) -> Held:
    """What a row holds and its chunk `[1, G, T, D]`, among which its policy will choose."""
    store, policy = layer.store, layer.policy
    known = store.counts[row]
    if known.longest == 0:
        layer.settle(row, key.shape[2])
    if known.seen or key.shape[2] < known.longest:
        policy.refuse_chunks()
    kernel = fused_squeeze(key.device.type)
    if kernel is not None and layer.squeezes and known.live and known.epoch == store.epoch:
        held: Held = kernel.hold(store, row, key[0], value[0])
        return held
    return store.hold(row, key[0], value[0])


def choose_and_fill(layer: LayerCache, row: int, held: Held, seen: ChunkAttention | None) -> None:
    """After a row's chunk has been attended to: the policy observes and chooses, and the store is filled. Where the
    layer slides there is nothing to observe, and `seen` is None."""
    store, policy = layer.store, layer.policy
    capacity = store.counts[row].capacity
    if seen is None:
        store.fill(row, held, policy.choose(held, capacity))
        return
    policy.observe_chunk(seen, held, store, row)
    share = layer.share.pop(row, None)
    keep = policy.choose(held, capacity) if share is None else _choose_share(policy, held, share)
    kernel = fused_squeeze(held.key.device.type)
    if kernel is not None and layer.squeezes:
        # An expanded view is fine for torch; the kernel counts on rows that lie behind each other.
        kernel.squeeze(store, row, held, None if keep is None else keep.contiguous(), policy.folds_by)
        return
    if keep is not None and store.reconstruct:
        evicted = held.state[policy.folds_by].scatter(-1, keep, 0.0)
        store.fold(row, held.key, held.value, evicted)
    store.fill(row, held, keep)


def _choose_share(policy: SlotPolicy, held: Held, share: int) -> Tensor | None:
    """What was held stays; of the new tokens the policy keeps its choice among them alone, as in `share` slots."""
    past = held.size - held.chunk
    state = {name: values[:, past:] for name, values in held.state.items()}
    new = Held(held.key[:, past:], held.value[:, past:], held.positions[:, past:], state, held.chunk)
    chosen = policy.choose(new, share)
    if chosen is None:
        return None
    old = torch.arange(past, device=chosen.device).expand(chosen.shape[0], past)
    return torch.cat([old, chosen + past], 1)


def _step(layer: LayerCache, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """One decode step of every row. Returns `[B, 1, H, D]`."""
    store, policy = layer.store, layer.policy
    kernel = fused_step(query.device.type)
    if kernel is not None and kernel.supports(policy, store):
        fused: Tensor = kernel.step(policy, store, query, key, value, scale)
        stepped = layer.stepped()
        if stepped:
            kernel.evict(policy, stepped)
        return fused
    batch, heads, _, size = query.shape
    groups = key.shape[1]
    books, number = layer.books, layer.number
    books.admit(policy, store, number, key[:, :, 0], value[:, :, 0])
    grouped = query.view(batch, groups, heads // groups, size)
    if books.recalls:
        return books.attend(policy, store, number, grouped, scale).view(batch, 1, heads, size)
    keys, values = store.read()
    logits = (grouped @ keys.transpose(-1, -2)).float() * scale
    probabilities = logits.masked_fill_(~store.valid[:, :, None], -torch.inf).softmax(-1)
    out = probabilities.to(values.dtype) @ values
    books.observe(policy, probabilities.mean(2))
    return out.view(batch, 1, heads, size)


def fused_step(device: str) -> ModuleType | None:
    """The decode step's kernel for a type of device; None where the plain torch step runs."""
    return optional("decode_step") if device == "cuda" else None


def fused_squeeze(device: str) -> ModuleType | None:
    """The kernels that fill a row after a prompt, for a type of device; None where plain torch does."""
    return optional("squeeze") if device == "cuda" else None


def _padding_mask(*, attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
    """transformers builds masks once for all layers; only the padding matters here, the rest is causal by itself."""
    return attention_mask


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, _padding_mask)

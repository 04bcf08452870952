"""OPT and Llama on a CPU, without the Python around transformers' operations: a decode step, or a chunk of a prompt.

One token through a small model is bound by the number of calls, not by arithmetic: transformers makes some eighty of
them a layer. Here are about twenty-five, on the same weights: one product for query, key and value, one for gate and
up, a rotation without concatenations. A chunk of a prompt gains by the same: fewer and wider products, fewer passes
over its states. Tests hold both against the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from auvsum.cache.cache import BudgetedCache
from auvsum.cache.heads import HeadsCache
from auvsum.engine.memory import mapped_files, release_mapped
from auvsum.engine.weights import Int4Linear, Int8Linear, int4_product, int8_product

AnyCache = BudgetedCache | HeadsCache
Product = Callable[[Tensor], Tensor]


class Step(Protocol):
    """What `lean_step` returns."""

    def __call__(
        self, tokens: Tensor, positions: Tensor, cache: AnyCache, reads: bool = False, more: bool = False
    ) -> Tensor:
        """Token ids `[B]` and their positions `[B]` -> logits `[B, V]`.

        Args:
            reads: the tokens are a chunk of one prompt, within `cache.reading`; logits of the last one alone `[1, V]`.
            more: nor are these wanted, since more of the prompt follows: nothing `[0]`.
        """


def lean_step(model: Any) -> Step | None:
    """The step of a model, made once.

    None where transformers' own has to do: on a GPU, or for an architecture that is not known here.
    """
    kind = {
        "OPTForCausalLM": _opt,
        "LlamaForCausalLM": _llama,
        "MistralForCausalLM": _llama,
        "Qwen2ForCausalLM": _llama,
    }.get(type(model).__name__)
    if kind is None or next(model.parameters()).device.type != "cpu":
        return None
    if not hasattr(model, "auvsum_step"):
        model.auvsum_step = kind(model)
    step: Step | None = model.auvsum_step
    return step


def straighten_head(model: Any) -> None:
    """Spares a prompt a copy of the whole output head.

    transformers hands the head a slice `[1, 1, D]` of the prompt's states. By its strides torch takes it for a batch,
    and copies the transposed head before it multiplies: 0.1 s a chunk and more for a vocabulary of 50,000 on a CPU.
    """
    head = model.get_output_embeddings()
    if head is not None and head.weight.device.type == "cpu" and not hasattr(head, "auvsum_straight"):
        head.register_forward_pre_hook(_straight)
        head.auvsum_straight = True


def _straight(_: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
    (x,) = arguments
    return (x.reshape(-1, x.shape[-1]).view(x.shape),)


# -- products ----------------------------------------------------------------------------------------------------------


def _product(*layers: Any) -> Product:
    """One product for linear layers with the same input; their weights become parts of one, and are not held twice."""
    if len({type(layer) for layer in layers}) > 1:  # a GGUF file may hold one in 4 bits and another in more
        products = [_product(layer) for layer in layers]
        return lambda x: torch.cat([product(x) for product in products], -1)
    weight, bias = _packed(layers, "weight"), _packed(layers, "bias")
    assert weight is not None
    if isinstance(layers[0], Int8Linear):
        scale = _packed(layers, "scale")
        assert scale is not None
        return lambda x: int8_product(x, weight, scale, bias)
    if isinstance(layers[0], Int4Linear):
        scales = _packed(layers, "scale", 1)
        assert scales is not None
        return lambda x: int4_product(x, weight, scales)

    def product(x: Tensor) -> Tensor:
        if x.shape[0] > 1:
            return functional.linear(x, weight, bias)
        # In bf16 up to 1.5 times as fast for one row: it streams the weights as they lie, oneDNN arranges them first.
        return (torch.mv(weight, x[0]) if bias is None else torch.addmv(bias, weight, x[0]))[None]

    return product


def _packed(layers: Sequence[Any], name: str, dim: int = 0) -> Tensor | None:
    """The layers' tensors of that name as one, along their output channels."""
    parts = [getattr(layer, name) for layer in layers]
    if len(parts) == 1 or parts[0] is None:
        first: Tensor | None = parts[0]
        return first
    whole = torch.cat([part.data for part in parts], dim)
    start, files = 0, mapped_files()
    for layer, part in zip(layers, parts, strict=True):
        release_mapped(part, files)
        piece = whole.narrow(dim, start, part.shape[dim])
        if isinstance(part, nn.Parameter):
            part.data = piece
        else:
            setattr(layer, name, piece)
        start += part.shape[dim]
    return whole


# -- norms -------------------------------------------------------------------------------------------------------------


def _layer_norm(module: Any) -> Product:
    shape, weight, bias, eps = module.normalized_shape, module.weight, module.bias, module.eps
    return lambda x: functional.layer_norm(x, shape, weight, bias, eps)


def _rms_norm(module: Any) -> Product:
    """`layer_norm` of `[x, -x]`: its mean is 0 and its variance the mean square of x. Half the time of `rms_norm`."""
    size, eps = module.weight.shape[0], module.variance_epsilon
    weight = torch.cat([module.weight.data, module.weight.data])

    def norm(x: Tensor) -> Tensor:
        return functional.layer_norm(torch.cat([x, -x], -1), weight.shape, weight, None, eps)[:, :size]

    return norm


def _apart(vectors: Tensor, reads: bool) -> Tensor:
    """Heads' vectors `[B, H, D]` as a cache takes them: of B sequences `[B, H, 1, D]`, of B tokens `[1, H, B, D]`."""
    return vectors.transpose(0, 1)[None] if reads else vectors[:, :, None]


# -- models ------------------------------------------------------------------------------------------------------------


def _opt(model: Any) -> Step:
    decoder, head = model.model.decoder, _product(model.lm_head)
    project_in = _product(decoder.project_in) if decoder.project_in is not None else None
    project_out = _product(decoder.project_out) if decoder.project_out is not None else None
    final = _layer_norm(decoder.final_layer_norm) if decoder.final_layer_norm is not None else None
    before = bool(model.config.do_layer_norm_before)
    layers = [
        (
            _layer_norm(layer.self_attn_layer_norm),
            _product(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
            _product(layer.self_attn.out_proj),
            _layer_norm(layer.final_layer_norm),
            _product(layer.fc1),
            functional.relu_ if isinstance(layer.activation_fn, nn.ReLU) else layer.activation_fn,
            _product(layer.fc2),
        )
        for layer in decoder.layers
    ]
    heads, scale = model.config.num_attention_heads, decoder.layers[0].self_attn.scaling

    def step(tokens: Tensor, positions: Tensor, cache: AnyCache, reads: bool = False, more: bool = False) -> Tensor:
        x = decoder.embed_tokens(tokens)
        if project_in is not None:
            x = project_in(x)
        x = x + decoder.embed_positions(None, position_ids=positions)
        rows = x.shape[0]
        for store, (norm1, qkv, out, norm2, up, activation, down) in zip(cache.layers, layers, strict=True):
            packed = qkv(norm1(x) if before else x).view(rows, 3, heads, -1)
            query, key, value = (_apart(part, reads) for part in packed.unbind(1))
            key, value = store.update(key, value)
            x = out(store.attend(query, key, value, scale, None).reshape(rows, -1)).add_(x)
            if not before:
                x = norm1(x)
            x = down(activation(up(norm2(x) if before else x))).add_(x)
            if not before:
                x = norm2(x)
        if more:
            nothing: Tensor = x.new_empty(0)
            return nothing
        if reads:
            x = x[-1:]
        if final is not None:
            x = final(x)
        return head(x if project_out is None else project_out(x))

    return step


def _llama(model: Any) -> Step | None:
    body, head = model.model, _product(model.lm_head)
    first = body.layers[0].self_attn
    size, scale = first.head_dim, first.scaling
    heads = first.q_proj.out_features // size
    groups = first.k_proj.out_features // size
    if body.rotary_emb.inv_freq.shape[0] * 2 != size:  # only part of a head is turned
        return None
    layers = [
        (
            _rms_norm(layer.input_layernorm),
            _product(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
            _product(layer.self_attn.o_proj),
            _rms_norm(layer.post_attention_layernorm),
            _product(layer.mlp.gate_proj, layer.mlp.up_proj),
            layer.mlp.act_fn,
            _product(layer.mlp.down_proj),
        )
        for layer in body.layers
    ]
    final = _rms_norm(body.norm)

    def step(tokens: Tensor, positions: Tensor, cache: AnyCache, reads: bool = False, more: bool = False) -> Tensor:
        x = body.embed_tokens(tokens)
        rows = x.shape[0]
        cos, sin = body.rotary_emb(x[:, None], positions[:, None])
        # [x1, x2] is turned to [x1 cos - x2 sin, x2 cos + x1 sin]: the sign goes with the sine.
        sin = torch.cat([-sin[..., : size // 2], sin[..., size // 2 :]], -1)
        for store, (norm1, qkv, out, norm2, up, activation, down) in zip(cache.layers, layers, strict=True):
            packed = qkv(norm1(x)).view(rows, heads + 2 * groups, size)
            turned = packed[:, : heads + groups]
            turned = torch.addcmul(turned * cos, turned.roll(size // 2, -1), sin)
            query, key, value = (
                _apart(part, reads) for part in (turned[:, :heads], turned[:, heads:], packed[:, heads + groups :])
            )
            key, value = store.update(key, value)
            x = out(store.attend(query, key, value, scale, None).reshape(rows, -1)).add_(x)
            gate, wide = up(norm2(x)).chunk(2, -1)
            x = down(activation(gate).mul_(wide)).add_(x)
        if more:
            nothing: Tensor = x.new_empty(0)
            return nothing
        return head(final(x[-1:] if reads else x))

    return step

"""Faster layers inside an unmodified transformers model: modules are replaced, the model's code is not.

The query, key and value projections (and Llama's gate and up projections) become views of one packed weight and one
matrix product; OPT's first feed-forward layer takes its ReLU along; a single token goes through a kernel that does
nothing but stream weights. Llama's rotary turn and its gate are one launch each, and its sums with the residual are
part of the products before them. Numbers change by rounding only. The
weights keep their names and are not held twice.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Product = Callable[[Tensor, Tensor, "Tensor | None", bool], Tensor]

#: What the code of Llama's feed-forward and decoder layers refers to, and how its rotary function is called.
_GATED = ("down_proj", "act_fn", "gate_proj", "up_proj")
_LAYER = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
_TURN = "apply_rotary_pos_emb"

#: Attributes of a module that read the same input, and the name of what they belong to.
_PACKED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class _Pack:
    """One weight for several linear layers with one input; the first layer called computes for all."""

    def __init__(self, layers: list[nn.Linear], product: Product) -> None:
        self.product = product
        self.sizes = [layer.out_features for layer in layers]
        self.weight = torch.cat([layer.weight.data for layer in layers])
        self.bias = None if layers[0].bias is None else torch.cat([layer.bias.data for layer in layers])
        start = 0
        for layer in layers:
            layer.weight.data = self.weight[start : start + layer.out_features]
            if self.bias is not None:
                layer.bias.data = self.bias[start : start + layer.out_features]
            start += layer.out_features
        self.parts: dict[int, Tensor] = {}

    def part(self, index: int, x: Tensor) -> Tensor:
        """The output of the layer of that number; each part is handed out once."""
        if index == 0:
            out = self.product(x, self.weight, self.bias, False)
            self.parts = dict(enumerate(torch.split(out, self.sizes, -1)))
        return self.parts.pop(index)


class _Part(nn.Module):
    """A packed layer under its old name."""

    def __init__(self, layer: nn.Linear, pack: _Pack, index: int) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.pack, self.index = pack, index

    def forward(self, x: Tensor) -> Tensor:
        return self.pack.part(self.index, x)


class _Streamed(nn.Module):
    """A linear layer, with its activation where that is a ReLU.

    Attributes:
        onto: what the next output is added to; `own` says whether that may happen in its place.
    """

    def __init__(self, layer: nn.Linear, product: Product, relu: bool) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.product, self.relu = product, relu
        self.onto: Tensor | None = None
        self.own = False

    def forward(self, x: Tensor) -> Tensor:
        onto, self.onto = self.onto, None
        if onto is None:
            return self.product(x, self.weight, self.bias, self.relu)
        if x.numel() == x.shape[-1]:
            return onto + self.product(x, self.weight, None, False)
        sums, rows = onto.view(-1, onto.shape[-1]), x.reshape(-1, x.shape[-1])
        sums = sums.addmm_(rows, self.weight.t()) if self.own else torch.addmm(sums, rows, self.weight.t())
        return sums.view(onto.shape)


class _Norm(nn.Module):
    """A LayerNorm, or an RMSNorm as Llama's."""

    def __init__(self, module: nn.Module, norm: Any) -> None:
        super().__init__()
        self.rms = not isinstance(module, nn.LayerNorm)
        self.weight, self.bias = module.weight, getattr(module, "bias", None)
        self.eps = module.variance_epsilon if self.rms else module.eps
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x, self.weight, self.bias, self.eps, self.rms)
        return out


def _is_norm(module: nn.Module) -> bool:
    plain = type(module) is nn.LayerNorm and module.weight is not None and len(module.normalized_shape) == 1
    return plain or type(module).__name__ == "LlamaRMSNorm"


def _product(matvec: Any, x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    if x.numel() == x.shape[-1]:
        out: Tensor = matvec(x, weight, bias, relu)
        return out
    if relu and bias is not None and x.device.type == "cuda":
        flat = torch._addmm_activation(bias, x.reshape(-1, x.shape[-1]), weight.t())
        return flat.view(*x.shape[:-1], -1)
    out = functional.linear(x, weight, bias)
    return functional.relu_(out) if relu else out


def _feed_forward(module: Any, gate: Any, x: Tensor) -> Tensor:
    """Llama's feed-forward layer with SiLU and product in one launch."""
    pack = module.gate_proj.pack
    out: Tensor = module.down_proj(gate(pack.product(x, pack.weight, pack.bias, False)))
    return out


def _is_gated(module: nn.Module) -> bool:
    code = getattr(type(module).forward, "__code__", None)
    packed = isinstance(getattr(module, "gate_proj", None), _Part)
    silu = type(getattr(module, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")
    return packed and silu and getattr(code, "co_names", ()) == _GATED


def _decoder_layer(module: Any, hidden_states: Tensor, **more: Any) -> Tensor:
    """Llama's decoder layer, whose two sums are part of the matrix products before them."""
    attend, ahead, after = module.self_attn, module.self_attn.o_proj, module.mlp.down_proj
    ahead.onto, ahead.own = hidden_states, False  # others may hold it
    hidden_states, _ = attend(module.input_layernorm(hidden_states), **more)
    after.onto, after.own = hidden_states, True
    out: Tensor = module.mlp(module.post_attention_layernorm(hidden_states))
    return out


def _is_layer(module: nn.Module) -> bool:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    last = [getattr(getattr(module, a, None), b, None) for a, b in (("self_attn", "o_proj"), ("mlp", "down_proj"))]
    plain = all(type(layer) is _Streamed and layer.bias is None for layer in last)
    return plain and getattr(code, "co_names", ()) == _LAYER


def _turn(theirs: Any, ours: Any) -> Any:
    """transformers' rotary function, ours where it applies."""

    def turned(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **more: Any) -> tuple[Tensor, Tensor]:
        plain = not rest and not more and cos.shape[-1] == query.shape[-1] and cos.dtype == query.dtype
        if plain and query.stride(-1) == key.stride(-1) == 1 and cos.is_contiguous() and sin.is_contiguous():
            result: tuple[Tensor, Tensor] = ours(query, key, cos, sin)
        else:
            result = theirs(query, key, cos, sin, *rest, **more)
        return result

    return turned


def _fuse_turn(module: nn.Module, ours: Any, device: torch.device) -> None:
    """Lets an attention layer's own code find our rotary function under the name of theirs, where both agree."""
    forward = type(module).forward
    theirs = getattr(forward, "__globals__", {}).get(_TURN)
    if theirs is None or _TURN not in forward.__code__.co_names:
        return
    if not _agree(theirs, ours, device):
        return
    names = {**forward.__globals__, _TURN: _turn(theirs, ours)}
    own = types.FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    own.__kwdefaults__ = forward.__kwdefaults__
    module.forward = types.MethodType(own, module)


@functools.cache
def _agree(theirs: Any, ours: Any, device: torch.device) -> bool:
    """Whether a model's rotary function is the one that turns heads in halves."""
    query, key = (torch.linspace(-1, 1, h * 24, device=device).view(1, 3, h, 8).transpose(1, 2) for h in (4, 2))
    cos, sin = (torch.linspace(a, b, 24, device=device).view(1, 3, 8) for a, b in ((0, 1), (1, -1)))
    try:
        wanted = theirs(query, key, cos, sin)
    except (TypeError, ValueError, RuntimeError):
        return False
    return all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours(query, key, cos, sin), wanted, strict=True))


def fuse(model: nn.Module) -> None:
    """Replaces the layers of a model, once. Needs Triton."""
    if getattr(model, "auvsum_fused", False):
        return
    from auvsum.kernels.matvec import matvec
    from auvsum.kernels.norm import norm
    from auvsum.kernels.pointwise import gate, turn

    product = functools.partial(_product, matvec)
    for module in list(model.modules()):
        for names in _PACKED:
            layers = [getattr(module, name, None) for name in names]
            if all(type(layer) is nn.Linear for layer in layers):
                _pack(module, names, [layer for layer in layers if isinstance(layer, nn.Linear)], product)
        relu = (
            isinstance(getattr(module, "activation_fn", None), nn.ReLU) and type(getattr(module, "fc1", 0)) is nn.Linear
        )
        for name, layer in list(module.named_children()):
            if type(layer) is nn.Linear:
                setattr(module, name, _Streamed(layer, product, relu and name == "fc1"))
            elif _is_norm(layer):
                setattr(module, name, _Norm(layer, norm))
        if relu:
            module.activation_fn = nn.Identity()
        if _is_gated(module):
            module.forward = functools.partial(_feed_forward, module, gate)
        _fuse_turn(module, turn, next(model.parameters()).device)
    for module in model.modules():
        if _is_layer(module):
            module.forward = functools.partial(_decoder_layer, module)
    model.auvsum_fused = True  # type: ignore[assignment]


def _pack(module: nn.Module, names: tuple[str, ...], layers: list[nn.Linear], product: Product) -> None:
    if len({(layer.in_features, layer.bias is None, layer.weight.dtype) for layer in layers}) > 1:
        return
    pack = _Pack(layers, product)
    for index, (name, layer) in enumerate(zip(names, layers, strict=True)):
        setattr(module, name, _Part(layer, pack, index))

"""The lean decode step and the 8-bit weights, held against transformers' own step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Linear
from transformers import MistralConfig, MistralForCausalLM, OPTConfig, OPTForCausalLM, Qwen2Config, Qwen2ForCausalLM

from auvsum.cache.cache import BudgetedCache
from auvsum.cache.policy import make_policy
from auvsum.engine.convert_gguf import convert_gguf
from auvsum.engine.generate import make_cache
from auvsum.engine.lean import lean_step
from auvsum.engine.models import load
from auvsum.engine.weights import Int4Linear, Int8Embedding, Int8Linear, quantize_weights
from tests import checkpoints, tiny
from tests.numerics import harness

SIZES: dict[str, Any] = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": tiny.HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def opt_350m() -> Any:
    """Norms behind the layers, and projections around narrow embeddings."""
    config = OPTConfig(
        **SIZES, word_embed_proj_dim=16, ffn_dim=64, max_position_embeddings=512, do_layer_norm_before=False
    )
    return tiny._sharpen(OPTForCausalLM(config).float(), 1)


def mistral() -> Any:
    """Layers with a sliding window."""
    config = MistralConfig(**SIZES, intermediate_size=64, num_key_value_heads=2, head_dim=8, sliding_window=16)
    return tiny._sharpen(MistralForCausalLM(config).float(), 2)


def qwen2() -> Any:
    """Biases for query, key and value."""
    config = Qwen2Config(**SIZES, intermediate_size=64, num_key_value_heads=2)
    return tiny._sharpen(Qwen2ForCausalLM(config).float(), 3)


MODELS: dict[str, Callable[[], Any]] = {
    "opt": tiny.tiny_opt,
    "opt-350m": opt_350m,
    "llama": tiny.tiny_llama,
    "mistral": mistral,
    "qwen2": qwen2,
}
PROMPT, STEPS = 40, 30


def decode(model: Any, step: Any, policy: str, rows: int = 2) -> torch.Tensor:
    """Logits `[STEPS, rows, V]` of a forced continuation, evictions included."""
    ids = torch.cat([tiny.tokens(PROMPT + STEPS, seed=60 + row) for row in range(rows)])
    cache = BudgetedCache(model.config, policy, 20) if policy != "full" else BudgetedCache(model.config, policy)
    found = []
    with harness.attention(model, "auvsum"), torch.no_grad():
        model(ids[:, :PROMPT], past_key_values=cache)
        for at in range(PROMPT, PROMPT + STEPS):
            positions = torch.full((rows,), at)
            if step is None:
                out = model(ids[:, at : at + 1], position_ids=positions[:, None], past_key_values=cache)
                found.append(out.logits[:, -1])
            else:
                found.append(step(ids[:, at], positions, cache))
    return torch.stack(found)


@pytest.mark.parametrize("policy", ["auv", "h2o", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_the_lean_step_is_the_models_own(name: str, policy: str) -> None:
    if name == "mistral" and policy != "full":
        pytest.skip("every layer of this model has a sliding window")
    model = MODELS[name]()
    wanted = decode(model, None, policy)
    step = lean_step(model)
    assert step is not None
    assert (decode(model, step, policy) - wanted).abs().max() < 1e-4
    # Its packed weights are the model's own, which goes on working.
    assert torch.allclose(decode(model, None, policy), wanted, atol=1e-5)


@pytest.mark.parametrize("chunks", [(40,), (24, 15, 1)])
@pytest.mark.parametrize("policy", ["auv", "auv-look", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_is_read_as_the_model_reads_it(name: str, policy: str, chunks: tuple[int, ...]) -> None:
    """Whole or in chunks, the last one of a single token: its logits, and those of the next token."""
    if name == "mistral" and policy != "full":
        pytest.skip("every layer of this model has a sliding window")
    if policy == "auv-look" and len(chunks) > 1:
        pytest.skip("it holds the whole prompt until it has chosen")
    model, ids = MODELS[name](), tiny.tokens(sum(chunks), seed=7)[0]
    found = []
    for step in (None, lean_step(model)):
        cache = make_cache(model.config, make_policy(policy), 32 if policy != "full" else 50, rows=2)
        cache.begin(len(ids), row=1)
        logits, start = torch.empty(0), 0
        for chunk in chunks:
            tokens, positions = ids[start : start + chunk], torch.arange(start, start + chunk)
            with harness.attention(model, "auvsum"), torch.no_grad(), cache.reading(1):
                if step is not None:
                    more = start + chunk < len(ids)
                    logits = step(tokens, positions, cache, reads=True, more=more).reshape(-1)
                    assert len(logits) == (0 if more else tiny.VOCAB)
                else:
                    out = model(tokens[None], position_ids=positions[None], past_key_values=cache, logits_to_keep=1)
                    logits = out.logits[0, -1]
            start += chunk
        kept = [layer.rows[1].key if policy == "auv-look" else layer.held_positions(1, 0) for layer in cache.layers]
        found.append((logits, kept))
    (wanted, held), (got, own) = found
    assert (got - wanted).abs().max() < 1e-4
    for mine, theirs in zip(own, held, strict=True):
        torch.testing.assert_close(torch.as_tensor(mine), torch.as_tensor(theirs), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_packed_weights_are_held_once(name: str) -> None:
    model = MODELS[name]()
    before = held(model)
    lean_step(model)
    assert held(model) == before


@pytest.mark.parametrize("name", MODELS)
def test_eight_bits_are_held_once_and_come_close(name: str) -> None:
    model = MODELS[name]()
    plain = decode(model, None, "full")
    linear = {layer.weight.data_ptr(): layer.weight.nbytes for layer in model.modules() if type(layer) is Linear}
    most = held(model) - 0.65 * sum(linear.values())  # a quarter stays, and the scales of these small layers
    quantize_weights(model)
    assert not any(type(module) is Linear for module in model.modules())
    assert held(model) < most
    own = decode(model, None, "full")
    assert (own - plain).abs().mean() < 0.05 * plain.std()
    lean = decode(model, lean_step(model), "full")
    assert (lean - own).abs().max() < 1e-4
    assert held(model) < most


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("bias", [True, False])
def test_an_eight_bit_layer_is_its_rounded_weight(rows: int, bias: bool) -> None:
    """Few rows and many take different ways; for few, what comes in and goes out is rounded to bf16."""
    torch.manual_seed(0)
    linear = Linear(64, 48, bias=bias)
    layer = Int8Linear(copy.deepcopy(linear), torch.float32)
    rounded = layer.weight.float() * layer.scale[:, None]
    assert (rounded - linear.weight).abs().max() <= layer.scale.max() / 2 + 1e-7
    x = torch.randn(2, rows, 64)
    wanted = torch.nn.functional.linear(x, rounded, linear.bias)
    assert torch.allclose(layer(x), wanted, atol=1e-5 if 2 * rows > 16 else 1e-2)


@pytest.mark.parametrize("rows", [1, 40])
def test_a_four_bit_layer_is_its_codes(rows: int) -> None:
    """Few rows and many take different ways; for few, what comes in and goes out is rounded to bf16."""
    torch.manual_seed(0)
    codes = torch.randint(256, (192, 32), dtype=torch.uint8)
    step, least = torch.rand(192, 2).bfloat16().half(), -torch.rand(192, 2).half()
    halves = codes.view(192, 2, 16)
    whole = torch.cat([halves & 15, halves >> 4], -1).view(192, 64)
    middle = (least.float() + 8 * step.float()).bfloat16()  # the only thing that is rounded here
    weight = (whole.float() - 8) * step.float().repeat_interleave(32, 1) + middle.float().repeat_interleave(32, 1)
    layer = Int4Linear(codes, step, least)
    x = torch.randn(2, rows, 64)
    wanted = x @ weight.t()
    few = 2 * rows <= 16
    assert torch.allclose(layer(x), wanted, atol=2e-2 * wanted.std() if few else 1e-4 * wanted.std())
    part = torch.cat([x, x], -1)[:1, :2, :64].bfloat16()  # as the norm of a step hands it on
    assert torch.equal(layer(part), layer(part.contiguous()))


def gguf_model(tmp_path: Path, weights: str, dtype: str = "fp32") -> Any:
    """A tiny model out of a GGUF file; its key and value have too few channels for 4 bits."""
    out = tmp_path / "model"
    if not out.exists():
        checkpoints.gguf_llama(tmp_path / "m.gguf", kind="Q4_1")
        out.mkdir()
        convert_gguf(tmp_path / "m.gguf", out)
    return load(str(out), device="cpu", dtype=dtype, weights=weights).model


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_four_bits_of_a_gguf_are_nearer_than_eight(tmp_path: Path, dtype: str) -> None:
    plain, four, eight = (gguf_model(tmp_path, weights, dtype) for weights in ("bf16", "gguf", "int8"))
    kinds = {type(layer).__name__ for layer in four.modules() if "Linear" in type(layer).__name__}
    assert kinds == {"Int4Linear", "Int8Linear"}
    assert held(four) < held(eight) < held(plain)
    x = torch.randn(1, 40, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, near, far = (m.model.layers[1].mlp(x.to(m.dtype)).float() for m in (plain, four, eight))
    assert (near - wanted).norm() < 0.7 * (far - wanted).norm()


def test_the_lean_step_of_four_bits_is_the_models_own(tmp_path: Path) -> None:
    model = gguf_model(tmp_path, "gguf")
    own, before = decode(model, None, "full"), held(model)
    lean = decode(model, lean_step(model), "full")
    assert (lean - own).abs().max() < 1e-4
    assert held(model) == before
    assert torch.allclose(decode(model, None, "full"), own, atol=1e-5)


def test_a_tied_embedding_reads_the_heads_eight_bits() -> None:
    config = OPTConfig(**SIZES, word_embed_proj_dim=tiny.HIDDEN, ffn_dim=64, tie_word_embeddings=True)
    model = OPTForCausalLM(config).eval()
    table = model.get_input_embeddings().weight.detach().clone()
    quantize_weights(model)
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, Int8Embedding)
    assert embedding.weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    with torch.no_grad():
        found = embedding(torch.arange(tiny.VOCAB))
    assert (found - table).abs().max() <= embedding.scale.max() / 2 + 1e-7


def held(model: Any) -> int:
    """Bytes of everything that the model's modules hold, each storage once."""
    found = {}
    for module in model.modules():
        for value in [*vars(module).values(), *module._parameters.values(), *module._buffers.values()]:
            if isinstance(value, torch.Tensor):
                found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    return sum(found.values())

"""Model families: tiny sharp models of each; unbound equals transformers, every policy runs, windows are exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from auvsum.cache.cache import BudgetedCache
from auvsum.cache.heads import HeadsCache
from auvsum.cache.policies.auv_look import AUVLook
from auvsum.errors import PolicyError
from tests import tiny
from tests.numerics import harness

PROMPT, NEW, WINDOW, SLOTS = 40, 6, 16, 20
_SHAPE: dict[str, Any] = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": tiny.HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def build(family: str, seed: int = 6, **changes: Any) -> PreTrainedModel:
    layers = changes.get("num_hidden_layers", 4)
    gemma = {
        "layer_types": ["sliding_attention", "full_attention"] * (layers // 2),
        "query_pre_attn_scalar": 12,
        "tie_word_embeddings": False,  # tied and random, it repeats its last token
    }
    config, kind = {
        "mistral": lambda: (MistralConfig(**_SHAPE, sliding_window=None), MistralForCausalLM),
        "mistral-sliding": lambda: (MistralConfig(**_SHAPE, sliding_window=WINDOW), MistralForCausalLM),
        "qwen2": lambda: (Qwen2Config(**{k: v for k, v in _SHAPE.items() if k != "head_dim"}), Qwen2ForCausalLM),
        "qwen3": lambda: (Qwen3Config(**_SHAPE), Qwen3ForCausalLM),
        "gemma3": lambda: (
            Gemma3TextConfig(**{**_SHAPE, "num_hidden_layers": 4, **gemma, **changes}, sliding_window=WINDOW),
            Gemma3ForCausalLM,
        ),
    }[family]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tiny._sharpen(kind(config).float(), seed)


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    return {name: build(name) for name in ("mistral", "mistral-sliding", "qwen2", "qwen3", "gemma3")}


def logits(model: PreTrainedModel, name: str, cache: Any, chunks: list[int] | None = None) -> torch.Tensor:
    calls = harness.split(tiny.tokens(PROMPT + NEW, seed=81), PROMPT, chunks)
    with harness.attention(model, name), torch.no_grad():
        return torch.cat([model(ids, past_key_values=cache, use_cache=True).logits[0] for ids in calls])


def reference(model: PreTrainedModel) -> torch.Tensor:
    from transformers import DynamicCache

    return logits(model, "eager", DynamicCache(config=model.config))


@pytest.mark.parametrize("chunks", [None, [9, 20, 11]], ids=["one-shot", "chunked"])
@pytest.mark.parametrize("family", ["mistral", "mistral-sliding", "qwen2", "qwen3", "gemma3"])
def test_the_full_cache_equals_transformers(
    models: dict[str, PreTrainedModel], family: str, chunks: list[int] | None
) -> None:
    """Windows included: a sliding layer holds just its window, and loses nothing by it."""
    model = models[family]
    cache = BudgetedCache(model.config, policy="full")
    harness.close(logits(model, "auvsum", cache, chunks), reference(model), family, harness.LOGITS)
    for layer in cache.layers:
        positions = layer.store.snapshot(0, 0)["positions"]
        held = PROMPT + NEW if layer.window is None else WINDOW
        assert positions == list(range(PROMPT + NEW - held, PROMPT + NEW))
        assert layer.window is None or layer.store.slots == WINDOW


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "gemma3"])
def test_every_policy_runs_and_an_unbound_one_changes_nothing(models: dict[str, PreTrainedModel], family: str) -> None:
    model, full = models[family], reference(models[family])
    for policy in harness.SLOT_POLICIES:
        unbound = logits(model, "auvsum", BudgetedCache(model.config, policy=policy, slots=200))
        harness.close(unbound, full, f"{family}, {policy}", harness.LOGITS)
        cache = BudgetedCache(model.config, policy=policy, slots=SLOTS)
        bound = logits(model, "auvsum", cache)
        assert torch.isfinite(bound).all()
        assert (bound - full)[PROMPT:].norm() / full[PROMPT:].norm() > 1e-2, policy
        for layer in cache.layers:
            held = len(layer.store.snapshot(0, 0)["positions"])
            assert held == WINDOW if layer.window else held <= layer.store.slots


def test_rows_of_a_padded_batch_keep_their_windows(models: dict[str, PreTrainedModel]) -> None:
    model, stream, pads = models["gemma3"], tiny.tokens(PROMPT - 11, seed=82), 11
    mask = torch.ones(2, PROMPT, dtype=torch.long)
    mask[1, :pads] = 0
    both = torch.cat([tiny.tokens(PROMPT, seed=83), torch.cat([torch.zeros(1, pads, dtype=torch.long), stream], 1)])

    def generate(ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
        cache = BudgetedCache(model.config, policy="h2o", slots=SLOTS)
        with harness.attention(model, "auvsum"):
            out = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=NEW, do_sample=False)
        return out[:, ids.shape[1] :].tolist()

    assert generate(both, mask)[1] == generate(stream, torch.ones_like(stream))[0]


def test_a_model_that_only_slides_refuses_policies_by_name(models: dict[str, PreTrainedModel]) -> None:
    for policy in harness.SLOT_POLICIES:
        with pytest.raises(PolicyError, match=policy):
            BudgetedCache(models["mistral-sliding"].config, policy=policy, slots=SLOTS)
    with pytest.raises(PolicyError, match="auv-look"):
        HeadsCache(models["mistral-sliding"].config, AUVLook(), 60)

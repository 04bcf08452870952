"""Does this installation keep its two promises? Tiny random models, built in memory; a few seconds on a CPU.

1. A budget that never binds changes nothing: greedy tokens equal transformers' own `generate`.
2. Evicted tokens are gone: what stays allocated after a long prompt is the budget, not the prompt.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from auvsum import BudgetedCache
from auvsum.budget import size
from auvsum.cache.sliding import layer_windows

_VOCABULARY, _POSITIONS, _LAYERS = 128, 512, 3
_PROMPT, _NEW = 48, 24
_LONG_PROMPT, _SLOTS = 400, 32


@dataclass(frozen=True)
class Check:
    """One promise and whether it was kept."""

    name: str
    ok: bool
    detail: str


def run() -> list[Check]:
    """All checks; an exception inside one is a check that failed."""
    checks = []
    for name, build in (("Llama", _tiny_llama), ("OPT", _tiny_opt)):
        for promise, check in (
            ("unbound budget equals transformers", _same_tokens),
            ("evicted bytes are freed", _freed),
        ):
            try:
                ok, detail = check(build)
            except Exception as error:  # a self-check reports, whatever broke
                ok, detail = False, f"{type(error).__name__}: {error}"
            checks.append(Check(f"{promise} ({name})", ok, detail))
    return checks


def check_model(path: Path) -> list[Check]:
    """The first promise for a model folder, whatever its architecture: fp32 on the CPU, its own tokens.

    A model that does not go through transformers' attention interface, or attends in a way that a slot store cannot
    serve, fails here.
    """
    name = "unbound budget equals transformers (this model)"
    try:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True).eval()
        ok, detail = _same_tokens(lambda: model)
    except Exception as error:  # whatever a foreign architecture raises
        ok, detail = False, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return [Check(name, ok, detail)]


def _same_tokens(build: Callable[[], Any]) -> tuple[bool, str]:
    model = build()
    prompt = _prompt(_PROMPT)
    expected = _generate(model, prompt)
    model.set_attn_implementation("auvsum")
    # AUV keeps a write region beside the tokens: three times the length is enough for it never to evict. Where every
    # layer has a sliding window there is only the full cache.
    slides = None not in layer_windows(model.config)
    cache = BudgetedCache(model.config, **({"policy": "full"} if slides else {"slots": 3 * (_PROMPT + _NEW)}))
    found = _generate(model, prompt, cache)
    same = int((expected == found).all(dim=0).cumprod(0).sum()) - _PROMPT
    return same == _NEW, f"{same} of {_NEW} tokens equal"


def _freed(build: Callable[[], Any]) -> tuple[bool, str]:
    model = build()
    model.set_attn_implementation("auvsum")
    prompt = _prompt(_LONG_PROMPT)
    cache = BudgetedCache(model.config, policy="auv", slots=_SLOTS)
    before = _alive()
    tokens = _generate(model, prompt, cache)
    held = cache.bytes()  # first: books that wait for their queries are kept now
    alive = _alive() - before - tokens.untyped_storage().nbytes()
    config = model.config
    full = _LONG_PROMPT * _LAYERS * 2 * _kv_heads(config) * (config.hidden_size // config.num_attention_heads) * 4
    detail = f"{size(alive)} alive, {size(held)} reported, full cache {size(full)}"
    return alive <= held < full, detail


def _generate(model: Any, prompt: Tensor, cache: Any = None) -> Tensor:
    """Greedy tokens `[1, T]`; every one of `_NEW` is generated."""
    tokens: Tensor = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        past_key_values=cache,
        do_sample=False,
        min_new_tokens=_NEW,
        max_new_tokens=_NEW,
    )
    return tokens


def _alive() -> int:
    """Bytes of all tensors that anything refers to, each storage once."""
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        if type(found) is Tensor:
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _prompt(length: int) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(3, _VOCABULARY, (1, length), generator=generator)


def _kv_heads(config: Any) -> int:
    return int(getattr(config, "num_key_value_heads", config.num_attention_heads))


def _tiny_llama() -> Any:
    """Grouped-query attention: 4 heads share 2 of keys and values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return _random(
        LlamaForCausalLM,
        LlamaConfig(
            vocab_size=_VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=_LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=_POSITIONS,
        ),
    )


def _tiny_opt() -> Any:
    from transformers import OPTConfig, OPTForCausalLM

    return _random(
        OPTForCausalLM,
        OPTConfig(
            vocab_size=_VOCABULARY,
            hidden_size=64,
            word_embed_proj_dim=64,
            ffn_dim=128,
            num_hidden_layers=_LAYERS,
            num_attention_heads=4,
            max_position_embeddings=_POSITIONS,
        ),
    )


def _random(kind: Any, config: Any) -> Any:
    """A model whose attention is sharp enough that a wrong cache changes its tokens."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(config).float().eval()
        for name, parameter in model.named_parameters():
            if "q_proj.weight" in name or "k_proj.weight" in name:
                parameter.data.normal_(0.0, 0.3)
    return model

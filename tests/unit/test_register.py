"""The drop-in works in the order the documentation gives, whichever of auvsum and transformers is imported first."""

from __future__ import annotations

import subprocess
import sys

import pytest

USE = """
config = transformers.OPTConfig(
    vocab_size=31, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16, max_position_embeddings=64,
    word_embed_proj_dim=16,
)
model = transformers.OPTForCausalLM(config)
model.set_attn_implementation("auvsum")
cache = auvsum.BudgetedCache(model.config, policy="auv", slots=13)
ids = model.generate(torch.ones(1, 30, dtype=torch.long), past_key_values=cache, max_new_tokens=3, do_sample=False)
assert ids.shape[1] > 30
"""


@pytest.mark.parametrize("order", ["import auvsum, torch, transformers", "import torch, transformers, auvsum"])
def test_drop_in_order(order: str) -> None:
    done = subprocess.run([sys.executable, "-c", order + "\n" + USE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_import_is_light() -> None:
    code = "import auvsum, sys; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False False"

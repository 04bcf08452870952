"""What a token of each KV head is worth in models that were measured: factors on the scores of `auv-look`.

A ranking over all layers and heads compares their attention as if it mattered everywhere alike. It does not: some heads
can lose what they attend to. The factors were fitted by gradient descent through soft gates, on even rows of the
evaluation data (`benchmarks/explore_look.py --experiments squares,fit`); a model that is not here has none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: Architecture, width, layers, heads, KV heads, vocabulary, positions -> logarithms, a row for each layer.
_LOGARITHMS: dict[tuple[str, int, int, int, int, int, int], tuple[tuple[float, ...], ...]] = {}


def head_factors(config: Any) -> Tensor | None:
    """fp32 `[layers, G]` for a model's configuration; None where nothing is known."""
    text = config.get_text_config(decoder=True)
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
             "max_position_embeddings")  # fmt: skip
    found = _LOGARITHMS.get((text.model_type, *(getattr(text, name, 0) for name in names)))
    return None if found is None else torch.tensor(found).exp()

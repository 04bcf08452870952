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
_LOGARITHMS: dict[tuple[str, int, int, int, int, int, int], tuple[tuple[float, ...], ...]] = {
    # SmolLM2-135M-Instruct
    ("llama", 576, 30, 9, 3, 49152, 8192): (
        (1.3, -0.43, 0.53),
        (0.48, 0.16, 0.85),
        (0.98, 1.08, 0.55),
        (0.13, 0.19, 0.69),
        (0.13, 0.48, -0.06),
        (0.14, 0.11, 0.79),
        (0.37, -0.43, -0.01),
        (-0.46, -0.73, 1.47),
        (0.46, 0.99, 0.01),
        (-0.05, -0.43, -0.14),
        (-0.32, -0.23, -0.08),
        (0.38, 0.16, 0.11),
        (0.75, -0.08, -0.53),
        (-0.58, -0.14, -0.07),
        (-0.42, 1.09, 0.41),
        (-0.58, -0.67, 0.86),
        (-0.31, -0.26, 0.44),
        (0.02, 0.95, -0.06),
        (-0.21, -0.38, 1.77),
        (-0.89, 1.43, -0.4),
        (-1.32, 1.12, 1.36),
        (-0.56, 0.39, -0.27),
        (-0.82, 0.3, -0.28),
        (0.73, -0.48, -0.59),
        (0.69, -0.69, -0.21),
        (-0.8, -0.78, -0.65),
        (-0.32, -0.33, -0.51),
        (-1.14, -1.06, -0.8),
        (-0.91, -0.52, -0.96),
        (-0.53, -0.86, -0.53),
    ),
}


def head_factors(config: Any) -> Tensor | None:
    """fp32 `[layers, G]` for a model's configuration; None where nothing is known."""
    text = config.get_text_config(decoder=True)
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
             "max_position_embeddings")  # fmt: skip
    found = _LOGARITHMS.get((text.model_type, *(getattr(text, name, 0) for name in names)))
    return None if found is None else torch.tensor(found).exp()

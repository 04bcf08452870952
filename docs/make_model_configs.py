"""Writes configs/models/*.yaml, settings for every model with a short name. `python docs/make_model_configs.py`

The facts come from `auvsum/engine/registry.py`, and nothing else is said: no quality, no speed.
"""

from __future__ import annotations

from pathlib import Path

from auvsum.budget import size
from auvsum.engine.registry import KNOWN, SUPPORTED, KnownModel

FOLDER = Path(__file__).parents[1] / "configs" / "models"


def page(model: KnownModel) -> str:
    """Settings for one model, with its facts as comments."""
    template = "completion" if model.model_type == "opt" else "chat"
    why = (
        "# It has no chat template: the text is followed by `TL;DR:`."
        if template == "completion"
        else "# It is put to the model by its own chat template."
    )
    cut = ""
    if model.positions <= 2048:
        cut = f"""
# A document that does not fit {model.positions:,} positions is an error, and not cut without a word.
truncate: false
"""
    return f"""# {model.name}: {model.hub_id}, {model.parameters} parameters, {SUPPORTED[model.model_type]}
# licence: {model.licence}
# positions: {model.positions:,}
# weights: about {size(model.size_bytes)} in 16 bits; the KV cache comes on top (see `auvsum summarize --dry-run`)
# Use it with: auvsum summarize FILE --config configs/models/{model.name}.yaml

model: {model.name}

{why}
template: {template}
{cut}"""


def pages() -> dict[Path, str]:
    """What belongs in each file."""
    return {FOLDER / f"{model.name}.yaml": page(model) for model in KNOWN.values()}


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")

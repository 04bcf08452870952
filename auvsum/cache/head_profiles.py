"""What a token of each KV head is worth beside the attention paid to it: factors that `auvsum calibrate` has fitted.

Attention is a share of one head's output; how much an error of that output matters differs from head to head. A profile
belongs to a model's shape: fine-tuned relatives of a model have it too, and use its profile. One that the user has made
(`$AUVSUM_CACHE/profiles/*.json`) comes before one that is shipped (`cache/profiles/*.json`).
"""

from __future__ import annotations

import base64
import functools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from auvsum.engine.registry import cache_dir
from auvsum.errors import ConfigError

#: Directions of a head's queries that a profile tells: eight leave a sixth more of the errors than all.
_DIRECTIONS = 8
_SHIPPED = Path(__file__).with_name("profiles")


@dataclass(frozen=True)
class Profile:
    """Factors on `auv-look`'s scores, as natural logarithms, `[layers][KV heads]`; layers that slide have none.

    Attributes:
        model: the name it was made with. shape: of the models that it fits, see `shape_of`.
        read: of the prompt's tokens. written: of those that are written later.
        queries: what `few_directions` made of the queries' second moments; empty for unknown.
    """

    model: str
    shape: str
    read: tuple[tuple[float, ...], ...]
    written: tuple[tuple[float, ...], ...]
    queries: str = ""

    def moments(self) -> Tensor | None:
        """Second moments of each KV head's queries, fp32 `[layers, G, D, D]`, on a scale of each head's own."""
        if not self.queries:
            return None
        size = int(self.shape.partition(" head=")[2].split()[0])
        values = torch.frombuffer(bytearray(base64.b64decode(self.queries)), dtype=torch.float16).float()
        rows = values.view(len(self.read), len(self.read[0]), -1, size)
        return rows.mT @ rows + torch.eye(rows.shape[-1])

    def factors(self) -> Tensor:
        """fp32 `[layers, G, 2]`: of the prompt's tokens and of written ones."""
        return torch.stack([torch.tensor(self.read), torch.tensor(self.written)], -1).exp()

    def to_json(self) -> str:
        """The text of its file: a line a layer."""
        values = asdict(self)
        for name in ("read", "written"):
            values[name] = [[round(number, 3) for number in row] for row in values[name]]
        rows = [f" {json.dumps(name)}: {_lines(value)}" for name, value in values.items()]
        return "{\n" + ",\n".join(rows) + "\n}\n"


def few_directions(moments: Tensor) -> str:
    """Second moments `[layers, G, D, D]` as `Profile.queries`: the directions in which most of them lie, beside which
    all others count alike (as 1)."""
    values, vectors = torch.linalg.eigh(moments.double().cpu())
    count = min(_DIRECTIONS, moments.shape[-1] // 2)
    rest = values[..., :-count].mean(-1, keepdim=True).clamp_min(1e-12)
    lengths = (values[..., -count:] / rest - 1).clamp_min(0).sqrt()
    rows = (vectors[..., -count:] * lengths[..., None, :]).mT.half().contiguous()
    return base64.b64encode(rows.numpy().tobytes()).decode()


def shape_of(config: Any) -> str:
    """What a model must share with another for its profile to mean something: sizes, and how positions turn."""
    config = config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    rope = getattr(config, "rope_parameters", None) or {}
    parts = {
        "layers": config.num_hidden_layers,
        "heads": heads,
        "kv": getattr(config, "num_key_value_heads", None) or heads,
        "head": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "hidden": config.hidden_size,
        "vocabulary": config.vocab_size,
        "rope": int(rope.get("rope_theta", 0)),
    }
    return " ".join([config.model_type, *(f"{name}={value}" for name, value in parts.items())])


def find_profile(config: Any) -> Profile | None:
    """The profile for a model's configuration, if there is one.

    Raises:
        ConfigError: a profile of the user's that cannot be read.
    """
    shape = shape_of(config)
    found = (profile for profile in (*_profiles(own_profiles()), *_profiles(_SHIPPED)) if profile.shape == shape)
    return next(found, None)


def own_profiles() -> Path:
    """The folder of the user's profiles."""
    return cache_dir() / "profiles"


def _profiles(folder: Path) -> list[Profile]:
    return [_read(path, path.stat().st_mtime_ns) for path in sorted(folder.glob("*.json"))]


@functools.cache
def _read(path: Path, _changed: int) -> Profile:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        rows = {name: tuple(tuple(map(float, row)) for row in values[name]) for name in ("read", "written")}
        found = Profile(str(values["model"]), str(values["shape"]), **rows, queries=str(values.get("queries", "")))
        found.moments()
        return found
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ConfigError(f"the profile {path} cannot be read", "type: auvsum calibrate, or delete it") from error


def _lines(value: str | Sequence[Any]) -> str:
    if isinstance(value, str):
        return json.dumps(value)
    return "[\n" + ",\n".join("  " + json.dumps(row) for row in value) + "\n ]"

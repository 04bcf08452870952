"""What is in a model folder, and whether all of it is: read from small files and file headers, without torch."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from auvsum.engine.registry import MARKER, SUPPORTED
from auvsum.errors import ModelError, ModelIncomplete, ModelNotFound, ModelUnsupported

#: A folder has a tokenizer when it has all files of one of these.
_TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("tokenizer.model",))
_FORMATS: tuple[tuple[Literal["safetensors", "pickled"], str], ...] = (
    ("safetensors", "model.safetensors"),
    ("pickled", "pytorch_model.bin"),
)


@dataclass(frozen=True)
class Checkpoint:
    """A whole, supported model folder. `weights` are its weight files, in the order of their names."""

    path: Path
    config: dict[str, Any]
    format: Literal["safetensors", "pickled"]
    weights: tuple[Path, ...]

    @property
    def weight_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.weights)


def read_config(path: Path) -> dict[str, Any]:
    """The folder's config.json.

    Raises:
        ModelNotFound: the folder holds no model at all.
        ModelIncomplete: config.json is missing beside other files of a model, or is cut short.
    """
    file = path / "config.json"
    if not file.is_file():
        if file.is_symlink() or any(path.glob("*.safetensors")) or any(path.glob("*.bin")) or (path / MARKER).exists():
            raise ModelIncomplete(f"{path} is incomplete: config.json is missing", _hint(path))
        raise ModelNotFound(f"{path} holds no model: there is no config.json", "give a folder in Hugging Face's layout")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelIncomplete(f"{file} cannot be read: {error}", _hint(path)) from error
    if not isinstance(config, dict):
        raise ModelIncomplete(f"{file} does not hold a model's configuration", _hint(path))
    return config


def unsupported(config: dict[str, Any]) -> str:
    """Why a model with that config.json cannot be used, as the end of a sentence; empty when it can."""
    model_type = config.get("model_type", "unknown")
    if config.get("is_encoder_decoder"):
        return f"is an encoder-decoder model ({model_type}), which has no cache over its input to evict from"
    if model_type not in SUPPORTED:
        return f"has the architecture {model_type!r}, which is not among those supported: {', '.join(SUPPORTED)}"
    if quantization := config.get("quantization_config"):
        return f"has quantized weights ({quantization.get('quant_method', 'unknown')}), which are not supported"
    return ""


def inspect(path: Path, name: str | None = None) -> Checkpoint:
    """Checks a model folder and says what it holds. Safetensors are preferred where both kinds are there.

    Args:
        name: what the user called it, for messages.

    Raises:
        ModelUnsupported: encoder-decoder, another architecture, or quantized weights.
        ModelIncomplete: a file is missing or cut short; the message names it.
    """
    name = name or str(path)
    config = read_config(path)
    if reason := unsupported(config):
        hint = "choose a decoder-only model, such as opt-125m or smollm2-135m-instruct"
        if not config.get("is_encoder_decoder"):
            hint = f"type: auvsum doctor --model {name}"
        raise ModelUnsupported(f"{name} {reason}", hint)
    format, weights = _weights(path, name)
    for file in weights:
        if reason := _damage(file):
            raise ModelIncomplete(f"{name} is incomplete: {file.name} {reason}", _hint(path))
    _check_tokenizer(path, name)
    return Checkpoint(path, config, format, weights)


def _weights(path: Path, name: str) -> tuple[Literal["safetensors", "pickled"], tuple[Path, ...]]:
    for format, single in _FORMATS:
        if (path / single).is_file():
            return format, (path / single,)
        index = path / (single + ".index.json")
        if index.is_file():
            try:
                shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
                raise ModelIncomplete(f"{name} is incomplete: {index.name} cannot be read", _hint(path)) from error
            if outside := [shard for shard in shards if Path(shard).name != shard]:
                raise ModelError(f"{index} names a file outside its folder: {outside[0]}", _hint(path))
            missing = [shard for shard in shards if not (path / shard).is_file()]
            if missing:
                count = f" ({len(missing)} of {len(shards)} files are)" if len(missing) > 1 else ""
                raise ModelIncomplete(f"{name} is incomplete: {missing[0]} is missing{count}", _hint(path))
            return format, tuple(path / shard for shard in shards)
    found = "model.safetensors (or pytorch_model.bin) is missing"
    shards = sorted(path.glob("model-*.safetensors")) + sorted(path.glob("pytorch_model-*.bin"))
    if shards:
        stem = "model.safetensors" if shards[0].suffix == ".safetensors" else "pytorch_model.bin"
        found = f"{stem}.index.json is missing"
    raise ModelIncomplete(f"{name} is incomplete: {found}", _hint(path))


def _damage(file: Path) -> str:
    """What is wrong with a weight file, as far as its head and its size tell; empty when nothing is."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(64)
        if head.startswith(b"version https://git-lfs"):
            return "is a Git LFS pointer, not the weights (run: git lfs pull)"
        if file.suffix != ".safetensors":
            truncated = size == 0 or (head.startswith(b"PK") and not zipfile.is_zipfile(file))
            return f"is cut short at {size:,} bytes" if truncated else ""
        length = int.from_bytes(head[:8], "little")
        if len(head) < 8 or length > size - 8:
            return f"is cut short at {size:,} bytes"
        stream.seek(8)
        try:
            header = json.loads(stream.read(length))
            expected = 8 + length + max((t["data_offsets"][1] for k, t in header.items() if k != "__metadata__"))
        except (ValueError, KeyError, TypeError, AttributeError):
            return "is not a safetensors file"
    return "" if size == expected else f"has {size:,} bytes of {expected:,}"


def _check_tokenizer(path: Path, name: str) -> None:
    if any(all((path / file).is_file() for file in files) for files in _TOKENIZERS):
        return
    half = [files for files in _TOKENIZERS if any((path / file).is_file() for file in files)]
    missing = [file for file in (half or _TOKENIZERS)[0] if not (path / file).is_file()]
    what = " and ".join(missing) + ("" if half else " (or vocab.json with merges.txt)")
    raise ModelIncomplete(f"{name} is incomplete: {what} is missing", _hint(path))


def _hint(path: Path) -> str:
    if (path / MARKER).exists() or path.parent.name == "models":
        return f"remove {path} and type: auvsum models pull {path.name}"
    if path.parent.name == "snapshots":
        hub_id = path.parent.parent.name.removeprefix("models--").replace("--", "/")
        return f"type: auvsum models pull {hub_id} --download"
    return "copy or download the model again"

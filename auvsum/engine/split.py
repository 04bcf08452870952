"""A model over several GPUs: transformers' `device_map` gives each a run of layers; a layer's cache is where it is.

accelerate's hooks carry the hidden state from one GPU to the next, so they work one after another: what is gained is
room, not speed. Eviction needs nothing from other layers, hence nothing from other GPUs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from auvsum.engine.memory import devices_of, free_bytes
from auvsum.errors import DeviceError

#: Share of a GPU's free memory that weights may take: caches and prompts want the rest.
_WEIGHTS = 0.9


def placing(devices: Sequence[torch.device]) -> dict[str, Any]:
    """What `from_pretrained` is told.

    Raises:
        DeviceError: accelerate is not installed.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise DeviceError(
            "a model over several GPUs needs accelerate, which is not installed", "type: pip install 'auvsum[split]'"
        )
    room = {device.index or 0: int(_WEIGHTS * free_bytes(device)) for device in devices}
    return {"device_map": "balanced", "max_memory": room}


def needed(path: Path, dtype: torch.dtype, stored: torch.dtype | None) -> int:
    """Bytes of a checkpoint's weights once they are loaded in a type."""
    held = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    return held * dtype.itemsize // (stored or dtype).itemsize


def follow(model: Any) -> None:
    """Makes each block's GPU the current one while it runs, and the first GPU afterwards: Triton launches there.

    Raises:
        DeviceError: some of the model found no room on the GPUs.
    """
    # Without a map everything is in one place.
    given = getattr(model, "hf_device_map", {"": str(devices_of(model)[0])})
    places = {
        name: torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
        for name, place in given.items()
        if place not in ("cpu", "disk")
    }
    if len(places) < len(given):
        raise DeviceError("the model does not fit into the free memory of these GPUs together", "name more of them")
    for name, place in places.items():
        model.get_submodule(name).register_forward_pre_hook(partial(_enter, place))
    model.register_forward_hook(partial(_enter, devices_of(model)[0]))


def _enter(device: torch.device, *_: Any) -> None:
    torch.cuda.set_device(device)

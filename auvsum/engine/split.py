"""A model over several GPUs: transformers' `device_map` gives each a run of layers; a layer's cache is where it is.

accelerate's hooks carry the hidden state from one GPU to the next, so they work one after another: what is gained is
room, not speed. The decode step is captured once, over all of them. Eviction needs nothing from other layers, hence
nothing from other GPUs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

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


def blocks(model: Any) -> list[nn.Module]:
    """The model's layers, in order: what is never divided between devices."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def layer_devices(model: Any) -> list[torch.device]:
    """Where each layer is."""
    return [next(block.parameters()).device for block in blocks(model)]


def why_not_together(devices: Sequence[torch.device]) -> str | None:
    """Why a step over GPUs cannot be captured; None when it can."""
    reach = torch.cuda.can_device_access_peer
    if all(reach(one, other) for one in devices for other in devices if one != other):
        return None
    return "the GPUs do not reach each other's memory"


class Branches:
    """Streams of the other GPUs, for a step that is captured once for all of them.

    The memory of what is captured there comes from pools of its own, which are kept as long as the graph.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._streams = [torch.cuda.Stream(device) for device in devices]  # type: ignore[no-untyped-call]
        self._pools = [torch.cuda.MemPool() for _ in devices]

    @contextmanager
    def joined(self, captured: bool) -> Iterator[None]:
        """Within: what runs on the other GPUs comes after what the current stream holds, and it goes on after that.

        Args:
            captured: whether the current stream is being captured; then so are theirs.
        """
        here = torch.cuda.current_stream()
        with ExitStack() as stack:
            for stream, pool in zip(self._streams, self._pools, strict=True):
                stream.wait_stream(here)
                if captured:
                    stack.enter_context(torch.cuda.use_mem_pool(pool, device=stream.device))
                stack.enter_context(torch.cuda.stream(stream))
            torch.cuda.set_device(here.device)
            yield
            for stream in self._streams:
                here.wait_stream(stream)

"""How much memory is free, for budgets and batches that ask for "what fits"; and what to do when it was too little."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from auvsum.budget import CacheShape
from auvsum.cache.sliding import layer_windows

if TYPE_CHECKING:
    from auvsum.cache.policy import Policy
    from auvsum.engine.generate import Request

#: The most documents that are written together unless somebody says how many: see "Documents together" in docs/LOG.md.
MOST_ROWS = {"cpu": 8, "cuda": 64}
#: Share of the free memory that may be planned for. Main memory has other users.
_PLANNED = {"cpu": 0.5, "cuda": 0.92}


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on a device: of the GPU, or what the kernel calls available."""
    if device.type == "cuda":
        free, _total = torch.cuda.mem_get_info(device)
        # What torch keeps for the next allocation is free as well.
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        # No "available" outside Linux: half of what is installed.
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return 4 * 2**30


def devices_of(model: Any) -> list[torch.device]:
    """The devices of a model's weights, in the order in which it uses them."""
    return list(dict.fromkeys(parameter.device for parameter in model.parameters()))


def free_over(devices: Sequence[torch.device]) -> int:
    """Bytes that caches may take of a model spread over devices: they share it evenly, so the fullest one decides."""
    return len(devices) * min(free_bytes(device) for device in devices)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or in main memory."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def release_mapped(tensor: torch.Tensor, files: Sequence[tuple[int, int]] | None = None) -> None:
    """Gives back the pages of a weight that is mapped from a file and has been copied to where it is used from now on.

    They would count as the process's memory for as long as anything else of the file is in use. Whoever reads the
    tensor after all reads the file again. Nothing happens to memory that is no file's, or outside Linux.

    Args:
        files: what `mapped_files` has found when the tensor was there already; None looks now.
    """
    start, size = tensor.data_ptr(), tensor.nbytes
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        return
    if not any(begin <= start < end for begin, end in (mapped_files() if files is None else files)):
        return
    page = mmap.PAGESIZE
    first = -(-start // page) * page
    length = (start + size) // page * page - first  # pages at its ends belong to its neighbours too
    if length > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


def mapped_files() -> list[tuple[int, int]]:
    """Where private mappings of files begin and end, as the kernel lists them; nothing outside Linux."""
    maps = Path("/proc/self/maps")
    found = []
    for line in maps.read_text().splitlines() if maps.exists() else []:
        span, rights, _offset, _device, inode, *_ = line.split()
        if inode != "0" and rights.endswith("p"):
            start, end = span.split("-")
            found.append((int(start, 16), int(end, 16)))
    return found


def release_memory(device: torch.device) -> None:
    """Gives back what nobody uses any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def cache_shape(model: Any) -> CacheShape:
    """What one token costs in the model's full cache, from its config and the type of its weights."""
    config = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    return CacheShape(
        layers=config.num_hidden_layers,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        element_bytes=model.dtype.itemsize,
        windows=tuple(window for window in layer_windows(config) if window is not None),
    )


def rows_that_fit(
    model: Any,
    policy: Policy,
    requests: Sequence[Request],
    chunk: int | None = None,
    bits: int = 16,
    kept_bytes: int = 0,
) -> int:
    """How many documents the free memory holds together, beside the reading of the longest prompt; at least one.

    Args:
        chunk: tokens read at a time; None reads a prompt in one pass.
        bits: of a stored key or value.
        kept_bytes: of a cache that makes room if it is not used again.
    """
    if not requests:
        return 1
    config = model.config.get_text_config(decoder=True)
    shape = cache_shape(model)
    element = shape.element_bytes
    cost = policy.slot_cost(kv_heads=shape.kv_heads, head_dim=shape.head_dim, element_bytes=element, bits=bits)
    slots = max(
        request.slots * shape.layers if isinstance(request.slots, int) else sum(request.slots) for request in requests
    )
    width = getattr(config, "ffn_dim", None) or config.intermediate_size
    # A row: its slots; its logits in the model's type, as fp32, sorted. A prompt token: some copies of its hidden and
    # its feed-forward state.
    row_bytes = shape.layers * cost.fixed + slots * cost.per_slot + config.vocab_size * (element + 16)
    prompt = min(max(len(request.ids) for request in requests), chunk or sys.maxsize)
    prompt_bytes = prompt * element * (12 * config.hidden_size + 3 * width)
    if policy.by_head:  # which holds all of a prompt until it has chosen
        prompt_bytes += max(len(request.ids) for request in requests) * shape.token_bytes
    kind = model.device.type
    free = free_over(devices_of(model)) + kept_bytes
    if kind == "cpu":
        # Weights that are mapped from their file count as available to the kernel, and are needed all the same.
        free -= sum(parameter.nbytes for parameter in model.parameters())
    fit = int((_PLANNED[kind] * free - prompt_bytes) // row_bytes)
    return max(1, min(fit, MOST_ROWS[kind], len(requests)))

"""How much memory is free, for budgets and batches that ask for "what fits"; and what to do when it was too little."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from auvsum.cache.policy import Policy
    from auvsum.engine.generate import Request

#: More rows than this gain nothing: the matrix products are at their limit.
_MOST_ROWS = {"cpu": 16, "cuda": 512}
#: Share of the free memory that may be planned for.
_PLANNED = 0.92


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on a device: of the GPU, or what the kernel calls available."""
    if device.type == "cuda":
        free, _total = torch.cuda.mem_get_info(device)
        return int(free)
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


def release_memory(device: torch.device) -> None:
    """Gives back what nobody uses any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def cache_shape(model: Any) -> dict[str, Any]:
    """What a cache of the model needs to be allocated: KV heads, head size and number type."""
    config = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    return {
        "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "dtype": next(model.parameters()).dtype,
    }


def rows_that_fit(model: Any, policy: Policy, requests: Sequence[Request]) -> int:
    """How many documents the free memory holds together, beside the reading of the longest prompt; at least one."""
    if not requests:
        return 1
    parameter = next(model.parameters())
    config = model.config.get_text_config(decoder=True)
    element, shape = parameter.dtype.itemsize, cache_shape(model)
    cost = policy.slot_cost(kv_heads=shape["kv_heads"], head_dim=shape["head_dim"], element_bytes=element)
    layers = config.num_hidden_layers
    slots = max(
        request.slots * layers if isinstance(request.slots, int) else sum(request.slots) for request in requests
    )
    width = getattr(config, "ffn_dim", None) or config.intermediate_size
    # A row: its slots; its logits in the model's type, as fp32, sorted. A prompt token: some copies of its hidden and
    # its feed-forward state.
    row_bytes = layers * cost.fixed + slots * cost.per_slot + config.vocab_size * (element + 16)
    prompt = max(len(request.ids) for request in requests)
    prompt_bytes = prompt * element * (12 * config.hidden_size + 3 * width)
    fit = int((_PLANNED * free_over(devices_of(model)) - prompt_bytes) // row_bytes)
    return max(1, min(fit, _MOST_ROWS[parameter.device.type], len(requests)))

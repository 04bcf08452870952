"""Which device and which number type a model runs on."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from auvsum.errors import ConfigError, DeviceError

if TYPE_CHECKING:
    import torch

DTYPES = {
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp16": "float16",
    "float16": "float16",
    "fp32": "float32",
    "float32": "float32",
}

WEIGHTS = ("auto", "bf16", "int8", "gguf")


def choose_device(device: str = "auto") -> torch.device:
    """`auto` (CUDA where there is one), `cpu`, `cuda` or `cuda:N`.

    Raises:
        DeviceError: an unknown name, or a device that this machine does not have.
    """
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise DeviceError(f"device {device!r} is unknown", "use auto, cpu, cuda or cuda:N")
    chosen = torch.device(device)
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            why = "this torch is built without CUDA" if torch.version.cuda is None else "no CUDA device is visible"
            raise DeviceError(f"device {device!r} cannot be used: {why}", "use --device cpu, or auto")
        if (chosen.index or 0) >= (count := torch.cuda.device_count()):
            raise DeviceError(f"device {device!r} does not exist: there are {count}", f"use cuda:0 to cuda:{count - 1}")
    return chosen


def choose_devices(device: str = "auto") -> list[torch.device]:
    """As `choose_device`; several for `cuda:0+cuda:1`, a model over both.

    Raises:
        DeviceError: see there.
    """
    return [choose_device(name) for name in dict.fromkeys(device.split("+"))]


def choose_dtype(dtype: str, device: torch.device, checkpoint: torch.dtype | None) -> torch.dtype:
    """`auto`, or one of `bf16`, `fp16`, `fp32`.

    `auto` on CUDA is the checkpoint's own type if that has 16 bits, else bf16. On a CPU it is bf16 where the processor
    computes in it, else fp32.

    Raises:
        ConfigError: an unknown name.
    """
    import torch

    if dtype != "auto":
        if dtype not in DTYPES:
            raise ConfigError(f"dtype {dtype!r} is unknown", "use auto, bf16, fp16 or fp32")
        return getattr(torch, DTYPES[dtype])  # type: ignore[no-any-return]
    if device.type == "cpu":
        return torch.bfloat16 if cpu_has_bf16() else torch.float32
    return checkpoint if checkpoint in (torch.float16, torch.bfloat16) else torch.bfloat16


def choose_weights(weights: str, device: torch.device) -> str:
    """`bf16` (as the dtype says), `int8` or `gguf`; `auto` is bf16, which costs no quality.

    Raises:
        ConfigError: an unknown name. DeviceError: 8 or 4 bits on a GPU.
    """
    if weights not in WEIGHTS:
        raise ConfigError(f"weights {weights!r} are unknown", f"use one of {', '.join(WEIGHTS)}")
    if weights in ("int8", "gguf") and device.type != "cpu":
        raise DeviceError(f"weights {weights!r} run on a CPU", "use --device cpu, or --weights bf16")
    return "bf16" if weights == "auto" else weights


def cpu_has_bf16() -> bool:
    """Whether the processor has bf16 instructions (AVX512-BF16, AMX, or Arm's); without them bf16 is slow."""
    import torch

    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is not None:
        found = capabilities()
        return any(bool(on) for name, on in found.items() if name in ("avx512_bf16", "amx_bf16", "bf16"))
    probes = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(probe() for probe in probes if probe is not None)

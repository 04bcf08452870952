"""Memory that this process takes: of the machine, and of a GPU where NVIDIA's library is at hand."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any


def resident_bytes() -> int:
    """Resident memory of this process and its workers; of this one its peak where the system tells no more."""
    try:
        pages = sum(int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) for pid in _family())
    except (OSError, IndexError, ValueError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return pages * os.sysconf("SC_PAGE_SIZE")


def gpu_bytes() -> int | None:
    """Memory of all GPUs that this process and its workers hold; `None` without NVML."""
    nvml = _nvml()
    if nvml is None:
        return None
    mine = _family()
    total = 0
    try:
        for number in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(number)
            for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle):
                total += (process.usedGpuMemory or 0) if process.pid in mine else 0
    except nvml.NVMLError:
        return None
    return total


def _family() -> set[int]:
    """This process and those that it started."""
    family = {os.getpid()}
    for children in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):
            family |= {int(pid) for pid in children.read_text(encoding="ascii").split()}
    return family


@cache
def _nvml() -> Any:
    """NVIDIA's management library, if it is installed and finds a driver."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml

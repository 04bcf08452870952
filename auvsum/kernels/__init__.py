from __future__ import annotations

import functools
import importlib
from types import ModuleType


@functools.cache
def optional(name: str) -> ModuleType | None:
    """A module of Triton kernels; None without Triton."""
    try:
        return importlib.import_module(f"auvsum.kernels.{name}")
    except ImportError:
        return None

"""auvsum: summaries of long documents, offline, with a KV cache under a fixed budget (AUV eviction).

The public names load lazily: `import auvsum` imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from auvsum._register import register_when_possible
from auvsum._version import __version__

if TYPE_CHECKING:
    from auvsum.cache.cache import BudgetedCache
    from auvsum.cache.policy import Policy
    from auvsum.summarize import Summarizer, Summary

__all__ = ["BudgetedCache", "Policy", "Summarizer", "Summary", "__version__"]

_LAZY = {
    "BudgetedCache": "auvsum.cache.cache",
    "Policy": "auvsum.cache.policy",
    "Summarizer": "auvsum.summarize",
    "Summary": "auvsum.summarize",
}


register_when_possible()


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)

"""Makes `model.set_attn_implementation("auvsum")` work after a bare `import auvsum`, without importing torch for it.

The name must be registered with transformers before a model is switched to it. If transformers is loaded already, that
happens at once; else as soon as its modelling code has been imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_TRIGGER = "transformers.modeling_utils"
_REGISTERS = "auvsum.cache.attention"


def register_when_possible() -> None:
    """Registers the attention function now, or when transformers' modelling code is first imported."""
    if _TRIGGER in sys.modules:
        importlib.import_module(_REGISTERS)
    else:
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(MetaPathFinder):
    """Lets the usual finders find one module, and adds a step after its execution; then it is gone."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _TRIGGER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        importlib.import_module(_REGISTERS)

"""`auvsum doctor`: what is installed, what it runs on, and whether it keeps its promises."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from auvsum import __version__
from auvsum._env import prepare
from auvsum.cli import options
from auvsum.cli.guard import guarded
from auvsum.errors import ModelError
from auvsum.ui.console import Console

if TYPE_CHECKING:
    from auvsum.engine.selfcheck import Check


def command(
    model: options.Model = None,
    format: options.FormatOption = options.Format.text,
    color: options.ColorOption = options.Color.auto,
    debug: options.Debug = False,
) -> int:
    """Show versions and devices, look for a model (the default one), and check that this installation works.

    \b
    Examples:
      auvsum doctor
      auvsum doctor --model opt-1.3b
      auvsum doctor --format json > report.json
    """
    console = Console(color.value, debug=debug)

    def work() -> int:
        with console.status("checking"):
            facts, checks = _examine(model)
        ok = all(check.ok for check in checks)
        if format is options.Format.json:
            data = {**facts, "checks": [vars(check) for check in checks], "ok": ok}
            console.write(json.dumps(data, ensure_ascii=False, indent=2) + "\n")
        else:
            console.write("".join(f"{name:<14} {_text(value)}\n" for name, value in facts.items()))
            console.write("".join(f"{'ok' if c.ok else 'FAILED':<14} {c.name}: {c.detail}\n" for c in checks))
        if not ok:
            console.error("a check failed", "see the line marked FAILED")
        return 0 if ok else 3

    return guarded(console, work)


def _examine(model: str | None) -> tuple[dict[str, Any], list[Check]]:
    prepare()
    import torch
    import transformers

    from auvsum.engine import hardware, registry, selfcheck

    facts = {
        "auvsum": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "platform": platform.platform(),
        "devices": ["cpu", *(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))],
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cpus",
        "cpu has bf16": hardware.cpu_has_bf16(),
        "model cache": str(registry.cache_dir()),
        "hub cache": str(registry.hub_cache_dir()),
    }
    found, folder = _find(model)
    checks = selfcheck.run()
    if model is None:
        # Nothing is broken while the default model has not been fetched.
        facts["default model"] = f"{registry.DEFAULT_MODEL}: {found.detail}"
    else:
        checks.append(found)
        if folder is not None:
            checks += selfcheck.check_model(folder)
    return facts, checks


def _find(model: str | None) -> tuple[Check, Path | None]:
    """Where a model is, or why it cannot be used and what to type; and its folder, if its self-check can be tried.

    An architecture that is not on the list is tried as well: what it says decides whether it could be used.
    """
    from auvsum.engine import locate, models
    from auvsum.engine.selfcheck import Check
    from auvsum.errors import ModelUnsupported

    try:
        folder = models.resolve(model)
        return Check(f"model {model}", True, str(folder)), folder
    except ModelUnsupported as error:
        # Its own hint would lead here.
        return Check(f"model {model}", False, error.message), locate.locate(model or "")
    except ModelError as error:
        return Check(f"model {model}", False, f"{error.message} ({error.hint})"), None


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(value) if isinstance(value, list) else str(value)

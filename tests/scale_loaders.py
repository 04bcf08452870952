"""How the tests' workers load: the tiny model, whose engine a document can bring down. Workers import this."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from auvsum.config import Settings
from auvsum.errors import DeviceError


def fragile(settings: Settings) -> Any:
    """`KILL` ends its process, `ONCE:path` too unless path is there; `DIVIDE` is a defect, `WAIT` takes for ever."""
    from auvsum.summarize import Plan, Summarizer

    class Fragile(Summarizer):
        def plan(self, text: str, **more: Any) -> Plan:
            happen(text)
            return super().plan(text, **more)

    return Fragile.from_settings(settings)


def happen(text: str) -> None:
    if "KILL" in text:
        os.kill(os.getpid(), signal.SIGKILL)
    if "ONCE:" in text:
        path = text.split("ONCE:")[1].split()[0]
        if not os.path.exists(path):
            open(path, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
    if "DIVIDE" in text:
        raise ZeroDivisionError("division by zero")
    if "WAIT" in text:
        sys.stderr.write("waiting\n")
        sys.stderr.flush()
        time.sleep(600)


def dies(settings: Settings) -> Any:
    os._exit(7)


def refused(settings: Settings) -> Any:
    raise DeviceError("no such device", "use another")

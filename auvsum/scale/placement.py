"""Where documents are summarized: in this process, in one for each device, or on a Ray cluster."""

from __future__ import annotations

import re
from dataclasses import dataclass

from auvsum.config import Settings
from auvsum.errors import DeviceError, UsageError
from auvsum.scale.pool import Crew, Pool

_DEVICE = re.compile(r"cpu|cuda:\d+(\+cuda:\d+)*")


@dataclass(frozen=True)
class Placement:
    """What the flags say.

    Args:
        devices: `all`, or names with commas between: `0,1`, `cuda:0,cuda:1`, `cpu,cpu`; `0+1,2+3` is two workers, the
            model of each over two GPUs.
        engine: `local` or `ray`. address: of a Ray cluster; without it Ray is started here. workers: Ray actors.

    Raises:
        UsageError: flags that do not go together.
    """

    devices: str | None = None
    engine: str = "local"
    address: str | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.engine == "ray" and self.devices is not None:
            raise UsageError("--devices is for this machine alone", "with --engine ray, say --workers N")
        if self.engine != "ray" and (self.address is not None or self.workers is not None):
            raise UsageError("--address and --workers are for Ray", "add --engine ray")
        if self.workers is not None and self.workers < 1:
            raise UsageError(f"--workers must be at least 1, not {self.workers}", "leave it out for one a GPU or node")

    @property
    def spread(self) -> bool:
        """Whether other processes do the work."""
        return self.devices is not None or self.engine == "ray"

    def pool(self, settings: Settings) -> Pool:
        """The workers, which begin to load their models.

        Raises:
            UsageError, DeviceError: there are no such workers.
        """
        return Pool(self._crew(settings), settings)

    def _crew(self, settings: Settings) -> Crew:
        if self.engine == "ray":
            from auvsum.scale.cluster import Cluster

            return Cluster(settings, self.workers, self.address)
        if settings.device != "auto":
            raise UsageError(
                f"device {settings.device} and --devices {self.devices} exclude each other", "leave one of them out"
            )
        from auvsum.scale.processes import Processes

        return Processes(settings, parse_devices(self.devices or "all"))


def parse_devices(text: str) -> list[str]:
    """`0,1` -> `cuda:0`, `cuda:1`. A worker checks that its device exists.

    Raises:
        UsageError: not a list of devices. DeviceError: `all` where there is no GPU.
    """
    if text == "all":
        import torch

        if not torch.cuda.is_available():
            raise DeviceError("--devices all means all GPUs, and there is none here", "name some: --devices cpu,cpu")
        return [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    names = ["+".join(map(_device, name.split("+"))) for name in text.replace(" ", "").split(",")]
    if not all(_DEVICE.fullmatch(name) for name in names):
        raise UsageError(f"--devices {text!r} is not understood", "write all, 0,1 or cpu,cpu")
    return names


def _device(name: str) -> str:
    return f"cuda:{name}" if name.isdecimal() else name

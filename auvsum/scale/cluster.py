"""Workers on a Ray cluster: an actor each. Ray places them, starts them anew elsewhere, and carries what is said.

An actor is given documents and asked for news, over and over; one call of each worker is under way at any time, whose
end is either news or the death of its actor. Not `ray.util.ActorPool`: it does not tell which document died with its
actor, and it gives an actor one document at a time, where the engine writes many together.

Engines are restarted by Ray (`max_restarts`, and `max_task_retries` of the first call, which waits for a place to start
again). Documents are not: while their actor waits for a node that may never come, another can do them.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from auvsum.config import Settings
from auvsum.errors import DeviceError, UsageError
from auvsum.scale.worker import Broken, Died, Inbox, Load, Message, Ready, load, work
from auvsum.text.readers import Document

#: Seconds that a question for news waits at the actor. Between two of them Ray notices what it must.
_NEWS = 2.0
#: Ray reads these when it is imported or started. It sends nothing anywhere, says nothing unless asked, and its workers
#: are as urgent as a local engine (by itself it gives them the niceness 15).
_ENVIRONMENT = {
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SCHEDULER_EVENTS": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
#: Where models and caches are.
_PASSED = ("AUVSUM_", "HF_", "XDG_")


class Actor:
    """A worker, as Ray runs it: the engine in a thread of its own, behind two boxes.

    Args:
        folder: where the driver runs: names of models and templates mean the same here, if the node has it.
        environment: variables of the driver for those that this node does not set.
    """

    def __init__(self, load: Load, settings: Settings, folder: str, environment: dict[str, str]) -> None:
        with suppress(OSError):
            os.chdir(folder)
        for name, value in environment.items():
            os.environ.setdefault(name, value)
        self._inbox: Inbox = queue.Queue()
        self._outbox: queue.Queue[Message] = queue.Queue()
        arguments = (load, settings, self._inbox, self._outbox.put)
        threading.Thread(target=work, args=arguments, daemon=True).start()

    def give(self, index: int, document: Document) -> None:
        """Takes a document."""
        self._inbox.put((index, document))

    def news(self) -> list[Message]:
        """What has been said since the last time; waits for it, though not for ever."""
        try:
            said = [self._outbox.get(timeout=_NEWS)]
        except queue.Empty:
            return []
        while not self._outbox.empty():
            said.append(self._outbox.get())
        return said


class Cluster:
    """Workers on a Ray cluster: a `Crew`.

    Args:
        workers: how many; without it one a GPU, or one a node where there is none.
        address: of the cluster, `auto` for the one of this machine; without it Ray is started here (or `RAY_ADDRESS`).
        load: makes a worker's summarizer, on its node; importable there.

    Raises:
        UsageError: Ray is not installed, no cluster answers, or it is too small.
    """

    def __init__(
        self, settings: Settings, workers: int | None = None, address: str | None = None, load: Load = load
    ) -> None:
        self._ray = _import_ray()
        self._mine = not self._ray.is_initialized()
        if self._mine:
            _connect(self._ray, address)
        try:
            number, resources, settings = _share(self._ray, settings, workers)
            self.names = [f"{settings.device} (Ray worker {worker})" for worker in range(number)]
            made = self._ray.remote(Actor).options(
                **resources, max_restarts=-1, max_task_retries=0, max_concurrency=4, scheduling_strategy="SPREAD"
            )
            passed = {name: value for name, value in os.environ.items() if name.startswith(_PASSED)}
            self._actors = [made.remote(load, settings, os.getcwd(), passed) for _ in range(number)]
            self._loading = set(range(number))
            self._news = dict(self._ask(worker) for worker in range(number))
        except BaseException:
            self._leave()
            raise

    def give(self, worker: int, index: int, document: Document) -> None:
        """Sends a document; whether it arrived is what the worker's news say."""
        self._actors[worker].give.remote(index, document)

    def hear(self) -> Iterable[tuple[int, Message]]:
        """What workers say; waits until one does."""
        asked = list(self._news)
        self._ray.wait(asked, num_returns=1, timeout=_NEWS)
        done, _ = self._ray.wait(asked, num_returns=len(asked), timeout=0)
        said: list[tuple[int, Message]] = []
        for question in done:
            worker = self._news.pop(question)
            said += self._answer(worker, question)
            reference, _ = self._ask(worker)
            self._news[reference] = worker
        return said

    def close(self) -> None:
        """Ends the actors, and Ray if it was started here."""
        actors, self._actors = self._actors, []
        if self._ray.is_initialized():
            for actor in actors:
                self._ray.kill(actor)
            self._leave()

    def _leave(self) -> None:
        if self._mine:
            with _signals_kept():
                self._ray.shutdown()

    def _ask(self, worker: int) -> tuple[Any, int]:
        """A question for a worker's news; one that has not loaded its model yet is asked until it has."""
        retries = -1 if worker in self._loading else 0
        return self._actors[worker].news.options(max_task_retries=retries).remote(), worker

    def _answer(self, worker: int, question: Any) -> Iterator[tuple[int, Message]]:
        try:
            said: list[Message] = self._ray.get(question)
        except self._ray.exceptions.RayError as error:
            # Out of reach is not dead, and must not go on with documents that others get.
            self._ray.kill(self._actors[worker], no_restart=False)
            self._loading.add(worker)
            yield worker, Died(_why(error))
            return
        for message in said:
            if isinstance(message, (Ready, Broken)):
                self._loading.discard(worker)
            yield worker, message


def _import_ray() -> Any:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise UsageError("--engine ray needs Ray, which is not installed", "type: pip install 'auvsum[ray]'") from error
    return ray


def _connect(ray: Any, address: str | None) -> None:
    """Joins a cluster, or starts one."""
    address = address or os.environ.get("RAY_ADDRESS")
    try:
        host, _, port = (address or "").rpartition(":")
        if port.isdecimal() and "/" not in host:
            # Ray itself would try for minutes, and log each time.
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        with _signals_kept():
            ray.init(
                address=address,
                include_dashboard=None if address else False,
                log_to_driver=False,
                logging_level="CRITICAL",
            )
        # What Ray's own processes say (pages of it when a node dies) would be printed to stdout, among the summaries;
        # there is no public switch, and that a worker died is said in a line of ours.
        ray._private.worker._worker_logs_enabled = False
    except (OSError, ValueError, RuntimeError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UsageError(
            f"no Ray cluster at {address or 'this machine'}: {reason}", "start one with: ray start --head"
        ) from error


def _share(ray: Any, settings: Settings, workers: int | None) -> tuple[int, dict[str, Any], Settings]:
    """How many workers, what each takes of the cluster, and its settings.

    A worker has one GPU, the only one that it sees; without GPUs it has its share of the smallest node's cores.

    Raises:
        UsageError: more workers than there is room for. DeviceError: CUDA is asked for, and there is none.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    if settings.device.startswith("cuda") and not gpus:
        raise DeviceError("the Ray cluster has no GPU", "use --device cpu, or add nodes with GPUs")
    if gpus and settings.device != "cpu":
        number, room = workers or gpus, gpus
        resources: dict[str, Any] = {"num_gpus": 1, "num_cpus": 0}
        settings = replace(settings, device="cuda")
    else:
        cores = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
        number = workers or len(cores) or 1
        smallest = min(cores, default=1)
        each = settings.threads or max(1, min(smallest, smallest * len(cores) // number))
        room = sum(core // each for core in cores)
        resources = {"num_cpus": each, "num_gpus": 0}
        settings = replace(settings, device="cpu", threads=each)
    if number > room:
        takes = "a GPU" if resources["num_gpus"] else f"{resources['num_cpus']} of a node's cores"
        raise UsageError(
            f"the Ray cluster has room for {room} workers, not {number}: each takes {takes}",
            "lower --workers (or --threads), or add nodes first",
        )
    return number, resources, settings


def _why(error: Exception) -> str:
    """What Ray says of an actor's end, in its first words."""
    text = " ".join(str(error).split())
    for sign, why in (("node", "was lost with its node"), ("OOM", "was killed: its node is short of memory")):
        if sign in text:
            return why
    return "died, or is out of reach"


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray handles SIGTERM in its own way once it is started; here the command line does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


__all__ = ["Actor", "Cluster"]

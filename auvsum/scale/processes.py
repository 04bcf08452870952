"""A worker process a device, each on a pipe of its own: one that is killed leaves nothing locked behind."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from auvsum.config import Settings
from auvsum.errors import DeviceError
from auvsum.events import Warned
from auvsum.scale.worker import Broken, Died, Inbox, Load, Message, Ready, Told, load, work
from auvsum.text.readers import Document

#: A worker that dies so often before it has its model is not started again.
_STARTS = 2
#: Seconds for a worker to end by itself.
_GRACE = 5.0


class Processes:
    """Workers in processes of this machine: a `Crew`.

    Args:
        devices: one worker each; the same may be named several times.
        load: makes a worker's summarizer, in its process; importable from there.
    """

    def __init__(self, settings: Settings, devices: Sequence[str], load: Load = load) -> None:
        self.names = list(devices)
        self._settings = settings
        self._load = load
        self._starts = [0] * len(devices)
        self._running: dict[Connection, tuple[int, BaseProcess]] = {}
        try:
            for number in range(len(devices)):
                self._start(number)
        except BaseException:
            self.close()
            raise

    def give(self, worker: int, index: int, document: Document) -> None:
        """Sends a document; to a worker that is just dying it is lost, which `hear` will say."""
        connection = next((at for at, (number, _) in self._running.items() if number == worker), None)
        if connection is not None:
            with suppress(OSError), _no_broken_pipe():
                connection.send((index, document))

    def hear(self) -> Iterable[tuple[int, Message]]:
        """What workers say; waits until one does, or for a second."""
        for connection in wait(list(self._running), timeout=1.0):
            assert isinstance(connection, Connection)
            number, process = self._running[connection]
            try:
                message: Message = connection.recv()
            except (EOFError, OSError):
                yield from self._replace(connection, number, process)
                continue
            if isinstance(message, Ready):
                self._starts[number] = 0
            yield number, message

    def close(self) -> None:
        """Closes the pipes, upon which the workers end; those that do not are killed."""
        running, self._running = self._running, {}
        for connection in running:
            connection.close()
        for _, process in running.values():
            process.join(_GRACE)
            if process.is_alive():
                process.kill()
                process.join()

    def _start(self, number: int) -> None:
        # Not forked: neither CUDA nor threads survive that.
        context = multiprocessing.get_context("spawn")
        mine, theirs = context.Pipe()
        self._starts[number] += 1
        process = context.Process(
            target=_main, args=(self._load, self._settings_of(number), theirs), name=self.names[number], daemon=True
        )
        with _not_interrupted():
            process.start()
        theirs.close()  # or its end would never be noticed
        self._running[mine] = (number, process)

    def _settings_of(self, number: int) -> Settings:
        """The settings with the worker's device and its share of the cores, unless the user shared them out."""
        settings = replace(self._settings, device=self.names[number])
        on_cpu = self.names.count("cpu")
        if self.names[number] != "cpu" or on_cpu == 1 or settings.threads or "OMP_NUM_THREADS" in os.environ:
            return settings
        return replace(settings, threads=max(1, (os.cpu_count() or 1) // on_cpu))

    def _replace(self, connection: Connection, number: int, process: BaseProcess) -> Iterator[tuple[int, Message]]:
        """A worker is gone: says so, and starts another, unless it cannot even load its model."""
        del self._running[connection]
        connection.close()
        process.join()
        why = _ending(process.exitcode)
        if self._starts[number] < _STARTS:
            self._start(number)
            yield number, Died(why)
            return
        yield number, Died(why)
        text = f"the worker on {self.names[number]} {why} {_STARTS} times before it had its model"
        if self._running:
            yield number, Told((Warned(f"{text}: going on without it"),))
        else:
            yield number, Broken(DeviceError(text, "is there memory enough for the model there?"))


def _main(load: Load, settings: Settings, connection: Connection) -> None:
    """A worker process. Signals are the parent's business: when it goes, the pipe closes, and this ends."""
    for name in ("SIGINT", "SIGTERM"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    inbox: Inbox = queue.Queue()
    # Read at once, whatever the engine is doing: a parent that waits to send could not take what is sent to it.
    threading.Thread(target=_receive, args=(connection, inbox), daemon=True).start()
    with suppress(BrokenPipeError, ConnectionResetError):
        work(load, settings, inbox, connection.send)
        # What was sent last is read before the end of the pipe is.
        threading.Event().wait()


def _receive(connection: Connection, inbox: Inbox) -> None:
    with suppress(EOFError, OSError):
        while True:
            inbox.put(connection.recv())
    os._exit(0)


def _ending(code: int | None) -> str:
    """`was killed (SIGKILL)`, `ended with exit code 1`."""
    if code is not None and code < 0:
        with suppress(ValueError):
            return f"was killed ({signal.Signals(-code).name})"
    return f"ended with exit code {code}"


@contextmanager
def _not_interrupted() -> Iterator[None]:
    """Within, Ctrl-C waits; a process that is started inherits that, and is not torn while it imports."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # which would let the signals through again, if it came later
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _no_broken_pipe() -> Iterator[None]:
    """Within, a closed pipe is an `OSError` and no signal: the command line lets SIGPIPE end it, for `| head`."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPIPE})
    try:
        yield
    finally:
        if signal.SIGPIPE in signal.sigpending() and signal.SIGPIPE not in before:
            signal.sigwait({signal.SIGPIPE})
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


__all__ = ["Processes"]

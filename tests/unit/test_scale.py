"""Pools of workers: order, back-pressure, deaths. Real processes with tiny models, and a crew of none at all."""

from __future__ import annotations

import pickle
import queue
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from auvsum.batch import Failure
from auvsum.config import Settings
from auvsum.errors import DeviceError, DocumentEmpty, GenerationFailed, InternalError, UsageError
from auvsum.events import DocumentDone, DocumentFailed, DocumentStarted, Event, Finished, Token, Warned
from auvsum.scale import cluster
from auvsum.scale.placement import Placement, parse_devices
from auvsum.scale.pool import Pool
from auvsum.scale.processes import Processes
from auvsum.scale.worker import Broken, Died, Message, Ready, Result, Wants, Written, _Portion, _Supply, load
from auvsum.summarize import Summarizer
from auvsum.text.readers import Document
from tests import checkpoints, scale_loaders

SENTENCE = "The council met in the town hall and there it decided to build a bridge over the river. "


def document(name: str, text: str = SENTENCE) -> Document:
    return Document(f"/in/{name}", text, "utf-8")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    model = checkpoints.llama(tmp_path_factory.mktemp("models") / "llama")
    return Settings(model=str(model), dtype="fp32", max_tokens=6, budget="96", batch_size="2", threads=1)


# -- the dealer, with a crew that does what the test says -------------------------------------------------------------


class Crew:
    """Workers of two places each that finish what they have, and are given no more than they want."""

    def __init__(self, workers: int, last_first: bool = False, deadly: str = "") -> None:
        self.names = [f"w{number}" for number in range(workers)]
        self.given: dict[int, dict[int, Document]] = {number: {} for number in range(workers)}
        self.wants = [2] * workers
        self.together: list[set[str]] = []
        self.said: list[tuple[int, Message]] = [(number, Ready(2, "m", 0.1)) for number in range(workers)]
        self.last_first = last_first
        self.deadly = deadly
        self.closed = False

    def give(self, worker: int, index: int, document: Document) -> None:
        self.given[worker][index] = document
        self.wants[worker] -= 1
        assert self.wants[worker] >= 0

    def hear(self) -> Iterable[tuple[int, Message]]:
        said, self.said = self.said, []
        for number, has in self.given.items():
            if not has:
                continue
            self.together.append({document.id for document in has.values()})
            if self.deadly and any(document.id == self.deadly for document in has.values()):
                has.clear()
                self.wants[number] = 2
                said += [(number, Died("died")), (number, Ready(2, "m", 0.1))]
            else:
                index = (max if self.last_first else min)(has)
                done = has.pop(index)
                self.wants[number] += 1
                said += [(number, Result(index, Written(done.id, done.source, done.text, [], {}))), (number, Wants(1))]
        return said

    def close(self) -> None:
        self.closed = True


def of(number: int) -> list[Document]:
    return [document(str(n)) for n in range(number)]


@pytest.mark.parametrize("last_first", [False, True])
@pytest.mark.parametrize("workers", [1, 3])
def test_results_in_order_whatever_the_workers_do(workers: int, last_first: bool) -> None:
    pool = Pool(Crew(workers, last_first), Settings())
    pool.start()
    events: list[Event] = []
    results = list(pool.run(of(30), on_event=events.append))
    assert [result.id for result in results] == [str(n) for n in range(30)]
    assert sorted(event.request for event in events if isinstance(event, DocumentDone)) == list(range(30))
    assert sorted(result.id for result in pool.run(of(7), ordered=False)) == sorted(str(n) for n in range(7))


def test_one_after_the_other() -> None:
    crew = Crew(2)
    pool = Pool(crew, Settings())
    pool.start()
    assert len(list(pool.run(of(5), together=False))) == 5
    assert all(len(together) == 1 for together in crew.together)


def test_documents_are_taken_when_there_is_room() -> None:
    taken = 0

    def documents() -> Iterator[Document]:
        nonlocal taken
        for each in of(100):
            taken += 1
            yield each

    pool = Pool(Crew(2), Settings())
    pool.start()
    results = pool.run(documents())
    for number in range(20):
        next(results)
        assert taken <= number + 1 + 2 * 2 * (2 + 1), "documents were read that nobody has room for"


def test_one_slow_document_does_not_gather_all_others() -> None:
    """In order, what comes after it waits: no more is taken than so many places ahead."""
    taken = 0

    def documents() -> Iterator[Document]:
        nonlocal taken
        for each in of(1000):
            taken += 1
            yield each

    class Stuck(Crew):
        heard = 0

        def hear(self) -> Iterable[tuple[int, Message]]:
            self.heard += 1
            if self.heard > 500:
                raise TimeoutError
            return [said for said in super().hear() if not (isinstance(said[1], Result) and said[1].index == 0)]

    pool = Pool(Stuck(2), Settings())
    pool.start()
    with pytest.raises(TimeoutError):
        next(pool.run(documents()))
    assert 10 < taken < 100


def test_a_document_that_kills_twice_fails_and_takes_no_other_with_it() -> None:
    crew = Crew(2, deadly="5")
    pool = Pool(crew, Settings())
    pool.start()
    events: list[Event] = []
    results = list(pool.run(of(12), on_event=events.append))
    assert [result.id for result in results] == [str(n) for n in range(12)]
    failed = [result for result in results if isinstance(result, Failure)]
    assert [result.id for result in failed] == ["5"]
    assert "twice" in failed[0].error.message
    assert {"5"} in crew.together, "the second time it was not alone"
    assert sum(isinstance(event, Warned) for event in events) == 2
    assert [event.request for event in events if isinstance(event, DocumentFailed)] == [5]


def test_failures_pass_through_and_a_defect_ends_the_run() -> None:
    crew = Crew(1)
    pool = Pool(crew, Settings())
    pool.start()
    lost = Failure("x", "/x", DocumentEmpty("empty"), Settings())
    results = list(pool.run([document("a"), lost, document("b")]))
    assert [result.id for result in results] == ["a", "x", "b"]
    assert results[1] is lost
    crew.said.append((0, Broken(DeviceError("gone"))))
    with pytest.raises(DeviceError, match="gone"):
        list(pool.run(of(3)))
    assert crew.closed


# -- a worker's end ---------------------------------------------------------------------------------------------------


def desk(size: int, documents: int) -> tuple[_Supply, list[int], queue.Queue[tuple[int, Document]]]:
    """A worker's supply with so many documents in its inbox, and what it asked for since."""
    asked: list[int] = []

    def send(message: Message) -> None:
        assert isinstance(message, Wants)
        asked.append(message.number)

    inbox: queue.Queue[tuple[int, Document]] = queue.Queue()
    for number, each in enumerate(of(documents)):
        inbox.put((number, each))
    return _Supply(inbox, size, send), asked, inbox


def test_a_full_portion_asks_for_one_document_at_a_time() -> None:
    supply, asked, inbox = desk(3, 5)
    portion = _Portion(supply, 3)
    taken = iter(portion)
    assert [next(taken).id for _ in range(3)] == ["0", "1", "2"]
    assert asked == [1], "one to lie ready"
    assert next(taken).id == "3"
    assert asked == [1, 1]
    assert [document.id for document in taken] == ["4"]
    assert asked == [1, 1, 1, 2], "the portion has ended: for the next one a whole batch may gather"
    assert portion.indices == [0, 1, 2, 3, 4]
    inbox.put((7, document("7")))
    assert [document.id for document in _Portion(supply, 3)] == ["7"]


def test_a_portion_that_starts_short_is_only_that() -> None:
    supply, asked, inbox = desk(3, 2)
    taken = iter(_Portion(supply, 3))
    assert next(taken).id == "0"
    assert asked == [2], "others gather for the next portion"
    inbox.put((2, document("2")))
    assert [document.id for document in taken] == ["1"]
    assert asked == [2]


# -- processes --------------------------------------------------------------------------------------------------------


def summaries(results: Iterable[Any]) -> list[tuple[str, str | None]]:
    return [(record["id"], record["summary"]) for record in (result.record() for result in results)]


def test_processes_write_what_one_engine_writes(settings: Settings, tmp_path: Path) -> None:
    documents = [document(str(n), f"Number {n}. " + SENTENCE * (1 + n % 4)) for n in range(9)]
    documents[4] = document("4", "  ")
    documents[6] = document("6", f"DIVIDE {SENTENCE}")
    documents[7] = document("7", f"ONCE:{tmp_path / 'died'} {SENTENCE}")
    documents[3] = document("3", f"KILL {SENTENCE}")
    local = list(scale_loaders.fragile(settings).run([d for d in documents if d.id not in "37"]))
    events: list[Event] = []
    with Pool(Processes(settings, ["cpu", "cpu"], scale_loaders.fragile), settings) as pool:
        assert (pool.start().size, pool.workers) == (2, 2)
        results = list(pool.run(documents, on_event=events.append))
        # The pool is there for more.
        assert summaries(pool.run(documents[:2])) == summaries(local[:2])
    assert [result.id for result in results] == [str(n) for n in range(9)]
    assert summaries(r for r in results if r.id not in "37") == summaries(local)
    assert sum(summary is not None for _, summary in summaries(results)) == 6
    assert results[7].record()["summary"], "its worker died once: it is done by another"
    records = [result.record() for result in results]
    assert records[3]["error"]["kind"] == "generation-failed"
    assert "SIGKILL" in records[3]["error"]["message"]
    warned = [event.text for event in events if isinstance(event, Warned)]
    assert len(warned) == 3
    assert "the worker on cpu was killed (SIGKILL); it had 3" in warned
    assert records[4]["error"]["kind"] == "document-empty"
    assert records[6]["error"]["message"] == "internal: ZeroDivisionError: division by zero"
    assert "test_scale" not in str(records[6]["error"])
    assert "scale_loaders.py" in str(results[6].error.__cause__), "the traceback came along"
    mine, theirs = local[0].record(), records[0]
    for record in (mine, theirs):
        del record["settings"]["batch_size"]  # how many came at the same time
    assert theirs.keys() == mine.keys()
    assert all(theirs[key] == mine[key] for key in mine.keys() - {"time"})
    started = [event.request for event in events if isinstance(event, DocumentStarted)]
    assert set(started) == {0, 1, 2, 5, 7, 8}
    for number in (0, 8):
        tokens = [event.token_id for event in events if isinstance(event, Token) and event.request == number]
        done = [event for event in events if isinstance(event, Finished) and event.request == number]
        assert tuple(tokens[-len(done[-1].token_ids) :]) == done[-1].token_ids


def test_workers_without_a_model(settings: Settings) -> None:
    with Pool(Processes(settings, ["cpu"], scale_loaders.refused), settings) as pool, pytest.raises(DeviceError) as no:
        pool.start()
    assert (no.value.message, no.value.hint) == ("no such device", "use another")
    with Pool(Processes(settings, ["cpu"], scale_loaders.dies), settings) as pool, pytest.raises(DeviceError) as no:
        pool.start()
    assert "ended with exit code 7 2 times before it had its model" in no.value.message


def test_closing_ends_the_processes(settings: Settings) -> None:
    crew = Processes(settings, ["cpu"], load)
    processes = [process for _, process in crew._running.values()]
    with Pool(crew, settings) as pool:
        pool.start()
        results = pool.run([document(str(n)) for n in range(50)])
        next(results)
        results.close()  # type: ignore[attr-defined]
    assert [process.exitcode for process in processes] == [0]


# -- names and errors -------------------------------------------------------------------------------------------------


def test_devices() -> None:
    assert parse_devices("0,1") == ["cuda:0", "cuda:1"]
    assert parse_devices("cpu, cpu") == ["cpu", "cpu"]
    assert parse_devices("cuda:3") == ["cuda:3"]
    assert parse_devices("0+1,2+3") == ["cuda:0+cuda:1", "cuda:2+cuda:3"]
    for wrong in ("", "0,", "gpu", "cuda", "cuda:", "cpu:1", "all,0", "0+", "cpu+cpu"):
        with pytest.raises(UsageError, match="is not understood"):
            parse_devices(wrong)


@pytest.mark.parametrize(
    "flags", [{"devices": "0", "engine": "ray"}, {"workers": 2}, {"address": "auto"}, {"engine": "ray", "workers": 0}]
)
def test_flags_that_do_not_go_together(flags: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Placement(**flags)


def test_device_and_devices_exclude_each_other() -> None:
    with pytest.raises(UsageError, match="exclude each other"):
        Placement("cpu,cpu").pool(Settings(device="cpu"))


def test_shares_of_a_cluster() -> None:
    """One worker a GPU, or one a node with all cores of the smallest; never more than there is room for."""
    cores = [{"Alive": True, "Resources": {"CPU": 4.0}}, {"Alive": True, "Resources": {"CPU": 8.0}}]
    gone = {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}
    head = {"Alive": True, "Resources": {"node:head": 1.0}}
    cpus = SimpleNamespace(nodes=lambda: [*cores, gone, head])
    number, resources, settings = cluster._share(cpus, Settings(), None)
    assert (number, resources, settings.device, settings.threads) == (2, {"num_cpus": 4, "num_gpus": 0}, "cpu", 4)
    assert cluster._share(cpus, Settings(), 4)[1]["num_cpus"] == 2
    assert cluster._share(cpus, Settings(threads=3), 3)[1]["num_cpus"] == 3
    with pytest.raises(UsageError, match="room for 3 workers, not 4: each takes 3"):
        cluster._share(cpus, Settings(threads=3), 4)
    with pytest.raises(DeviceError, match="no GPU"):
        cluster._share(cpus, Settings(device="cuda"), None)
    gpus = SimpleNamespace(nodes=lambda: [*cores, {"Alive": True, "Resources": {"CPU": 16.0, "GPU": 2.0}}])
    number, resources, settings = cluster._share(gpus, Settings(), None)
    assert (number, resources["num_gpus"], settings.device, settings.threads) == (2, 1, "cuda", None)
    assert cluster._share(gpus, Settings(device="cpu"), None)[2].device == "cpu"
    with pytest.raises(UsageError, match="room for 2 workers, not 3: each takes a GPU"):
        cluster._share(gpus, Settings(), 3)


def test_errors_travel() -> None:
    error = pickle.loads(pickle.dumps(GenerationFailed("what", "hint")))
    assert (type(error), error.message, error.hint) == (GenerationFailed, "what", "hint")
    try:
        raise ZeroDivisionError("division by zero")
    except ZeroDivisionError as cause:
        internal = InternalError(cause)
    copy = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(internal))))
    assert (copy.message, copy.hint, copy.exit_code) == (internal.message, internal.hint, 1)
    assert str(copy) == internal.message
    assert "test_errors_travel" in str(copy.__cause__)


def test_a_closed_pipe_is_no_signal_here() -> None:
    import os

    from auvsum.scale.processes import _no_broken_pipe

    before = signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        read, write = os.pipe()
        os.close(read)
        with pytest.raises(BrokenPipeError), _no_broken_pipe():
            os.write(write, b"x")
        os.close(write)
        assert signal.SIGPIPE not in signal.pthread_sigmask(signal.SIG_BLOCK, set())
        assert signal.SIGPIPE not in signal.sigpending()
    finally:
        signal.signal(signal.SIGPIPE, before)


def test_a_summarizer_and_a_pool_are_used_alike() -> None:
    assert {"run"} <= set(vars(Pool)) & set(vars(Summarizer))

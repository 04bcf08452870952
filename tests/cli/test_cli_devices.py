"""`--devices cpu,cpu`: two worker processes under the command line, killed, interrupted and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests import checkpoints
from tests.count_outputs import count

SENTENCE = "The council met in the town hall and there it decided to build a bridge over the river. "


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    model = checkpoints.llama(tmp_path_factory.mktemp("models") / "llama")
    return ["--model", str(model), "--dtype", "fp32", "--threads", "1", "--max-tokens", "40", "--budget", "96"]


def workers_of(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def wait_for(condition: Any, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "it ended too early"
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")
def test_a_killed_worker_then_an_interrupt_then_the_rest(cli: Any, flags: list[str]) -> None:
    for number in range(40):
        path = cli.folder / "in" / str(number % 3) / f"{number:02}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"Number {number}. " + SENTENCE * (1 + number % 4))
    assert cli.inside("summarize", "in", "-O", "reference", *flags).code == 0
    out = cli.folder / "out"
    journal = out / ".auvsum" / "manifest.jsonl"

    def done() -> int:
        return journal.read_bytes().count(b"\n") if journal.exists() else 0

    command = [sys.executable, "-m", "auvsum", "summarize", "in", "-O", "out", "--devices", "cpu,cpu", *flags]
    with open(cli.folder / "err", "wb") as err:
        process = subprocess.Popen(
            command, cwd=cli.folder, env=cli.env, stdout=subprocess.PIPE, stderr=err, start_new_session=True
        )
    wait_for(lambda: done() >= 3, process)
    workers = workers_of(process.pid)
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    wait_for(lambda: b"warning: the worker on cpu was killed (SIGKILL)" in (cli.folder / "err").read_bytes(), process)
    workers += workers_of(process.pid)
    # As a terminal does it: to the whole group, workers too.
    os.killpg(process.pid, signal.SIGINT)
    stdout, _ = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (130, b"")
    said = (cli.folder / "err").read_text()
    assert said.endswith("left\nerror: interrupted\n")
    assert "Traceback" not in said
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers), "a worker outlived its parent"
    finished = done()
    assert 3 <= finished < 40

    result = cli.inside("summarize", "in", "-O", "out", "--devices", "cpu,cpu", "--panel", *flags)
    assert (result.code, result.out) == (0, b"")
    assert f"{40 - finished} done, 0 failed, {finished} skipped" in result.err
    counted = count(cli.folder / "in", out, cli.folder / "reference")
    assert counted.pop("documents") == 40
    assert not any(counted.values()), counted


def test_records_come_in_order(cli: Any, flags: list[str]) -> None:
    names = [f"{number}.txt" for number in range(5)]
    for number, name in enumerate(names):
        cli.write(name, "" if number == 2 else SENTENCE * (5 - number))
    result = cli.inside("summarize", *names, "--devices", "cpu,cpu", "--format", "jsonl", *flags)
    assert result.code == 1
    records = [json.loads(line) for line in result.text.splitlines()]
    assert [record["id"] for record in records] == names
    assert [record["error"] and record["error"]["kind"] for record in records] == [
        None, None, "document-empty", None, None,
    ]  # fmt: skip
    assert result.err.splitlines()[0].endswith("s")
    assert "2 workers, the first loaded in" in result.err.splitlines()[0]


def test_mistakes(cli: Any, one_line: Any) -> None:
    cli.write("a.txt", "text")
    for arguments, code, what in (
        (["--devices", "gpu"], 2, "--devices 'gpu' is not understood"),
        (["--devices", "cpu", "--device", "cpu"], 2, "exclude each other"),
        (["--workers", "2"], 2, "--address and --workers are for Ray"),
        (["--devices", "cpu", "--engine", "ray"], 2, "--devices is for this machine alone"),
        (["--devices", "cpu", "--model", "nowhere"], 3, "no model is called 'nowhere'"),
    ):
        result = cli.inside("summarize", "a.txt", *arguments)
        assert (result.code, result.out) == (code, b""), arguments
        one_line(result.err)
        assert what in result.err

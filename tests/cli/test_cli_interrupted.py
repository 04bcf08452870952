"""Signals, kills, closed pipes and full disks in the middle of a run: what is finished stays, nothing is half there."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_cli_streams import SUMMARY

ROOT = Path(__file__).parents[2]
AS_NOBODY = Path(__file__).with_name("as_nobody.py")
NOBODY = 65534


def start(cli: Any, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*cli.fake_command, "summarize", *arguments],
        cwd=cli.folder,
        env=cli.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def wait_for(process: subprocess.Popen[bytes], what: bytes) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if what in line:
            return
    raise AssertionError(f"{what!r} was not said")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_keeps_what_is_finished(cli: Any, number: int) -> None:
    (cli.folder / "in").mkdir()
    cli.write("in/a.txt", "text")
    cli.write("in/b.txt", "WAIT")
    cli.write("in/c.txt", "text")
    process = start(cli, "in", "-O", "out")
    wait_for(process, b"waiting")
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, b"")
    assert err == b"1 done, 0 failed, 2 left\nerror: interrupted\n"
    out_folder = cli.folder / "out"
    assert [path.name for path in sorted(out_folder.iterdir())] == [".auvsum", "a.txt", "index.jsonl"]
    assert (out_folder / "a.txt").read_text(encoding="utf-8") == SUMMARY
    assert json.loads((out_folder / "index.jsonl").read_text())["output"] == "a.txt"
    cli.write("in/b.txt", "text")
    result = cli.fake("summarize", "in", "-O", "out")
    assert result.code == 0
    assert result.err.splitlines()[-1].startswith("2 done, 0 failed, 1 skipped")


def test_signal_keeps_what_is_in_one_file(cli: Any) -> None:
    cli.write("a.txt", "text")
    cli.write("b.txt", "WAIT")
    process = start(cli, "a.txt", "b.txt", "-o", "all.jsonl", "--format", "jsonl")
    wait_for(process, b"waiting")
    assert json.loads((cli.folder / "all.jsonl.partial").read_text())["id"] == "a.txt"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert json.loads((cli.folder / "all.jsonl").read_text())["id"] == "a.txt"
    assert not (cli.folder / "all.jsonl.partial").exists()


def test_second_signal_ends_at_once(cli: Any) -> None:
    cli.write("a.txt", "DEAF")
    process = start(cli, "a.txt")
    wait_for(process, b"waiting")
    process.send_signal(signal.SIGINT)
    wait_for(process, b"what?")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130


def test_signal_waits_for_an_output_and_its_line() -> None:
    from auvsum.cli.signals import Interruptible

    reached = False
    interruptible = Interruptible()

    def work() -> None:
        nonlocal reached
        with interruptible.active(), interruptible.shielded():
            os.kill(os.getpid(), signal.SIGTERM)
            reached = True

    with pytest.raises(KeyboardInterrupt):
        work()
    assert reached
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_head_ends_it_quietly(cli: Any) -> None:
    for name in ("a.txt", "b.txt", "c.txt"):
        cli.write(name, "SLOW")
    command = " ".join([*cli.fake_command, "summarize -q --format jsonl a.txt b.txt c.txt | head -1"])
    done = subprocess.run(["bash", "-c", command], cwd=cli.folder, env=cli.env, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(done.stdout)["id"] == "a.txt"


def test_each_record_is_flushed(cli: Any) -> None:
    cli.write("a.txt", "text")
    cli.write("b.txt", "WAIT")
    process = start(cli, "a.txt", "b.txt", "--format", "jsonl")
    wait_for(process, b"waiting")
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["id"] == "a.txt"
    process.kill()
    process.communicate()


def test_full_disk_names_the_file(cli: Any) -> None:
    """A limit on the size of files stands for the disk: the journal, which has the records, meets it first."""
    (cli.folder / "in").mkdir()
    for name in "abcdefgh":
        cli.write(f"in/{name}.txt", "text")

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))

    done = subprocess.run(
        [*cli.fake_command, "summarize", "in", "-O", "out", "-q"],
        cwd=cli.folder,
        # The limit would cut Python's own compiled files short, and leave them so for everybody.
        env={**cli.env, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        preexec_fn=limit,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[0].startswith("error: out/")
    assert "cannot be written: File too large" in done.stderr
    assert done.stderr.splitlines()[1].startswith("  hint: ")
    result = cli.fake("summarize", "in", "-O", "out", "-q")
    assert result.code == 0
    assert len((cli.folder / "out" / "index.jsonl").read_text().splitlines()) == 8


@pytest.fixture
def readable() -> Iterator[Path]:
    """A folder that is nobody's; pytest's own are root's alone."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "a.txt").write_text("text")
        (folder / "in").mkdir()
        for part in "abc":
            (folder / "in" / f"{part}.txt").write_text("text")
        yield folder
        for path in (folder, *folder.rglob("*")):
            if path.is_dir():
                path.chmod(0o700)


def as_nobody(cli: Any, folder: Path, *arguments: str, home: str = ".") -> subprocess.CompletedProcess[str]:
    if os.geteuid() == 0:
        for path in (folder, *folder.rglob("*")):
            os.chown(path, NOBODY, NOBODY)
    return subprocess.run(
        [sys.executable, str(AS_NOBODY), "summarize", *arguments],
        cwd=folder,
        env={**cli.env, "HOME": str(folder / home)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["-O", "closed"], "closed/.auvsum/manifest.jsonl"),
        (["-O", "closed/new/out"], "closed/new/out/.auvsum/manifest.jsonl"),
        (["-o", "closed/all.txt"], "closed/all.txt"),
    ],
)
def test_read_only_folder(cli: Any, one_line: Any, readable: Path, arguments: list[str], named: str) -> None:
    (readable / "closed").mkdir(mode=0o500)
    done = as_nobody(cli, readable, "a.txt", *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    one_line(done.stderr)  # so no model was loaded for nothing
    assert done.stderr == (
        f"error: {named} cannot be written: Permission denied\n  hint: check the disk and its permissions\n"
    )
    assert list((readable / "closed").iterdir()) == []


def test_home_of_somebody_else(cli: Any, readable: Path) -> None:
    (readable / "home").mkdir(mode=0o000)
    done = as_nobody(cli, readable, "a.txt", "-q", home="home")
    assert (done.returncode, done.stdout, done.stderr) == (0, SUMMARY, "")


def test_folder_that_becomes_read_only(cli: Any, readable: Path) -> None:
    """What is finished stays; what is missing says which file, and is made when the folder may be written again."""
    assert as_nobody(cli, readable, "in", "-O", "out", "--include", "a.txt").returncode == 0
    (readable / "out").chmod(0o500)
    done = as_nobody(cli, readable, "in", "-O", "out", "-q")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: out/b.txt cannot be written: Permission denied\n  hint: ")
    assert [path.name for path in sorted((readable / "out").iterdir())] == [".auvsum", "a.txt", "index.jsonl"]
    (readable / "out").chmod(0o700)
    done = as_nobody(cli, readable, "in", "-O", "out")
    assert done.returncode == 0
    assert done.stderr.splitlines()[-1].startswith("2 done, 0 failed, 1 skipped")


def test_kills_at_random_moments() -> None:
    """A short form of `python -m tests.soak_kill`."""
    arguments = ["--documents", "20", "--kills", "6"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.soak_kill", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["kills"] == 6

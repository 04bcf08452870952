"""Runs the command line as people do: a process of its own, its streams as bytes, an empty home."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

FAKE = Path(__file__).with_name("fake_summarizer.py")


@dataclass(frozen=True)
class Result:
    code: int
    out: bytes
    err: str

    @property
    def text(self) -> str:
        return self.out.decode("utf-8")


@dataclass(frozen=True)
class Cli:
    """A command line to run in `folder`. `real()` is the installed one, `fake()` has a summarizer without a model."""

    folder: Path
    env: dict[str, str]
    capture: pytest.CaptureFixture[bytes]

    def real(self, *arguments: str, stdin: bytes = b"", **env: str) -> Result:
        return self._run([sys.executable, "-m", "auvsum", *arguments], stdin, env)

    def inside(self, *arguments: str) -> Result:
        """As `real`, in this process: saves the seconds that torch takes to import."""
        from auvsum.cli.app import run

        code = run(arguments)
        out, err = self.capture.readouterr()
        return Result(code, out, err.decode("utf-8"))

    def fake(self, *arguments: str, stdin: bytes = b"", **env: str) -> Result:
        return self._run([*self.fake_command, *arguments], stdin, env)

    @property
    def fake_command(self) -> list[str]:
        return [sys.executable, str(FAKE)]

    def write(self, name: str, content: str | bytes) -> str:
        data = content.encode() if isinstance(content, str) else content
        (self.folder / name).write_bytes(data)
        return name

    def _run(self, command: list[str], stdin: bytes, env: dict[str, str]) -> Result:
        done = subprocess.run(
            command,
            input=stdin,
            capture_output=True,
            cwd=self.folder,
            env={**self.env, **env},
            timeout=240,
            check=False,
        )
        return Result(done.returncode, done.stdout, done.stderr.decode("utf-8"))


@pytest.fixture
def cli(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch) -> Cli:
    home = tmp_path / "home"
    folder = tmp_path / "work"
    home.mkdir()
    folder.mkdir()
    env = {
        "HOME": str(home),
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "OMP_NUM_THREADS": "1",
        "TERM": "xterm",
    }
    for name in [name for name in os.environ if name.startswith(("AUVSUM_", "XDG_"))]:
        if not name.startswith("AUVSUM_SET_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(folder)
    return Cli(folder, env, capfdbinary)


@pytest.fixture
def one_line() -> Callable[[str], None]:
    """Asserts that stderr is exactly one error with its hint, and no traceback."""

    def check(err: str) -> None:
        lines = err.splitlines()
        assert len(lines) == 2, err
        assert lines[0].startswith("error: ")
        assert lines[1].startswith("  hint: ")
        assert len(lines[1]) > len("  hint: ")

    return check

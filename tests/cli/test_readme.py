"""The README is run, word for word: every `console` and every `python` block, each in a fresh copy of what a user has.

Nothing in the text is replaced. The models that the README names are there under their names, in a cache of the test's
own: tiny, random, and able to read any text; a name that is not there fails. A block that must not be run here
(installing, fetching) is a `bash` block.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from auvsum.engine.registry import DEFAULT_MODEL, MARKER
from tests import checkpoints

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
#: Enough for a sample of which every byte is a token.
POSITIONS = 8192


def blocks(language: str) -> list[pytest.param]:
    """The fenced blocks of one language, named by their line."""
    found = re.finditer(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [pytest.param(m[1], id=f"line-{README.count(chr(10), 0, m.start()) + 1}") for m in found]


def commands(block: str) -> str:
    """What a person would type of a console block: the lines after `$ `, and after `> ` where one goes on."""
    return "\n".join(line[2:] for line in block.splitlines() if line.startswith(("$ ", "> ")))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache directory as it is after the models were fetched."""
    cache = tmp_path_factory.mktemp("cache")
    default = checkpoints.llama(cache / "auvsum" / "models" / DEFAULT_MODEL, max_position_embeddings=POSITIONS)
    (default / MARKER).write_text("{}")
    repository = cache / "huggingface" / "hub" / "models--facebook--opt-125m"
    checkpoints.opt(repository / "snapshots" / "0", max_position_embeddings=POSITIONS)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0")
    return cache


@pytest.fixture
def user(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder: the samples, an empty home, no settings but short summaries, no network."""
    shutil.copytree(ROOT / "samples", tmp_path / "samples")
    for name in [name for name in os.environ if name.startswith(("AUVSUM_", "HF_", "XDG_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # Random models do not know when to stop, and are too small for more threads.
    monkeypatch.setenv("AUVSUM_MAX_TOKENS", "16")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    return tmp_path


def run(arguments: list[str], where: Path) -> None:
    done = subprocess.run(arguments, cwd=where, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr


def test_there_is_something_to_run() -> None:
    assert blocks("console")
    assert all(commands(block.values[0]) for block in blocks("console"))
    assert len(blocks("python")) == README.count("```python")


@pytest.mark.parametrize("block", blocks("console"))
def test_console_block(block: str, user: Path) -> None:
    run(["bash", "-euo", "pipefail", "-c", commands(block)], user)


@pytest.mark.parametrize("block", blocks("python"))
def test_python_block(block: str, user: Path) -> None:
    run([sys.executable, "-c", block], user)


def test_every_file_it_links_to_is_there() -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []

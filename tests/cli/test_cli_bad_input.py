"""Whatever is wrong with a command line is one line with a hint and the right exit code, before any model is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HEAVY = (
    "torch",
    "transformers",
    "numpy",
    "bert_score",
    "rouge_score",
    "matplotlib",
    "charset_normalizer",
    "rich",
    "ray",
)


@pytest.mark.parametrize(
    "budget", ["0", "0%", "101%", "4 %", "banana", "-5", "-1%", "1.5", "4XB", "1e3", " 4%", "4%%", "0MiB"]
)
def test_budgets(cli: Any, one_line: Callable[[str], None], budget: str) -> None:
    cli.write("a.txt", "text")
    result = cli.real("summarize", "a.txt", "--budget", budget)
    assert (result.code, result.out) == (2, b"")
    one_line(result.err)
    assert repr(budget) in result.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--kv-bits", "3"], "kv_bits '3' is unknown"),
        (["--chunk", "0"], "chunk must be at least 1"),
        (["--chunk", "many"], "--chunk"),
        (["--sentences", "0"], "sentences must be at least 1"),
        (["--dtype", "int1"], "dtype 'int1' is unknown"),
        (["--device", "toaster"], "device 'toaster' is unknown"),
        (["--strategy", "magic"], "strategy 'magic' is unknown"),
        (["--temperature", "-1"], "temperature must be 0 or more"),
        (["--template", "poem"], "template 'poem' is unknown"),
        (["--policy-option", "decay"], "policy option 'decay' is not KEY=VALUE"),
        (["--config", "nowhere.yaml"], "nowhere.yaml is not a file"),
        (["--format", "xml"], "--format"),
        (["--batch-size", "0"], "batch_size '0' is not understood"),
        (["--timeout", "0"], "timeout must be more than 0"),
        (["-o", "x", "-O", "y"], "-o and -O exclude each other"),
        (["-0"], "-0 says how --files-from is read"),
        (["--files-from", "nowhere"], "the list nowhere cannot be read"),
        (["a.txt", "--score", "a.txt"], "--score compares one document"),
        (["--budgt", "4%"], "No such option: --budgt"),
        (["--encoding", "utf-9"], "encoding 'utf-9' is unknown"),
    ],
)
def test_flags(cli: Any, one_line: Callable[[str], None], arguments: list[str], said: str) -> None:
    cli.write("a.txt", "text")
    result = cli.real("summarize", "a.txt", *arguments)
    assert (result.code, result.out) == (2, b"")
    one_line(result.err)
    assert said in result.err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "does not exist"),
        (b"", "is empty"),
        (b" \n ", "is empty"),
        (b"%PDF-1.7", "is damaged or cut short"),
        (b"a\x00b", "NUL bytes"),
    ],
)
def test_documents(cli: Any, one_line: Callable[[str], None], content: bytes | None, said: str) -> None:
    if content is not None:
        cli.write("a.txt", content)
    result = cli.real("summarize", "a.txt")
    assert (result.code, result.out) == (1, b"")
    one_line(result.err)
    assert said in result.err


def test_folder_and_wrong_encoding(cli: Any, one_line: Callable[[str], None]) -> None:
    (cli.folder / "empty").mkdir()
    result = cli.real("summarize", "empty")
    assert result.code == 1
    one_line(result.err)
    assert "holds no document" in result.err
    cli.write("a.txt", "naïve".encode("latin-1"))
    result = cli.real("summarize", "a.txt", "--encoding", "utf-8")
    assert result.code == 1
    one_line(result.err)
    assert "is not utf-8: byte 2" in result.err


def test_configuration_files(cli: Any, one_line: Callable[[str], None]) -> None:
    cli.write("a.txt", "text")
    cli.write("auvsum.yaml", "bugdet: 4%\n")
    result = cli.real("summarize", "a.txt")
    assert (result.code, result.out) == (2, b"")
    one_line(result.err)
    assert "unknown key 'bugdet'" in result.err
    assert "auvsum.yaml" in result.err
    assert "did you mean 'budget'?" in result.err


def test_no_command_and_no_file(cli: Any, one_line: Callable[[str], None]) -> None:
    for arguments in ([], ["summarize"], ["frobnicate"], ["models"], ["config"]):
        result = cli.real(*arguments)
        assert (result.code, result.out) == (2, b"")
        one_line(result.err)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["-h"], 0),
        (["summarize", "--help"], 0),
        (["models", "-h"], 0),
        (["config", "show", "-h"], 0),
        (["doctor", "-h"], 0),
        (["--version"], 0),
        (["config", "show", "--origins"], 0),
        (["summarize", "a.txt", "--budget", "0"], 2),
        (["summarize", "missing.txt"], 1),
        (["summarize", "--nonsense"], 2),
    ],
)
def test_nothing_heavy_is_imported(cli: Any, arguments: list[str], code: int) -> None:
    cli.write("a.txt", "text")
    cli.write(
        "probe.py",
        "import sys\n"
        "from auvsum.cli.app import run\n"
        f"code = run({arguments!r})\n"
        f"print(sorted(set({HEAVY!r}) & set(sys.modules)), code, file=sys.stderr)\n",
    )
    from subprocess import run
    from sys import executable

    done = run([executable, "probe.py"], cwd=cli.folder, env=cli.env, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == f"[] {code}"


def test_unreadable_configuration_is_named(cli: Any, tmp_path: Path) -> None:
    cli.write("broken.yaml", b"\xff\xfe\x00")
    result = cli.real("config", "show", "--config", "broken.yaml")
    assert result.code == 2
    assert "cannot read broken.yaml" in result.err

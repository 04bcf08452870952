"""`--shard i/n`: every document in exactly one part, and several parts at once in one output folder."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st

from auvsum.io.inputs import Input, Shard


@given(st.lists(st.text(min_size=1), unique=True), st.integers(1, 9))
def test_every_document_is_in_exactly_one_part(names: list[str], of: int) -> None:
    shards = [Shard.parse(f"{number}/{of}") for number in range(1, of + 1)]
    for name in names:
        assert sum(shard.holds(Input(f"/anywhere/{name}", name)) for shard in shards) == 1


def test_the_part_depends_on_the_name_below_its_root_alone() -> None:
    """Stated as numbers, so that no later version deals documents out anew in the middle of a run."""
    assert [[Shard(i, 3).holds(Input("/x", f"sub/{n}.txt")) for i in (1, 2, 3)].index(True) for n in range(8)] == [
        int.from_bytes(hashlib.sha256(f"sub/{n}.txt".encode()).digest()[:8], "big") % 3 for n in range(8)
    ]
    assert Shard(1, 2).holds(Input("/a/in/report.txt", "report.txt")) == Shard(1, 2).holds(
        Input("in/report.txt", "report.txt")
    )


@pytest.mark.parametrize("text", ["0/8", "9/8", "1/0", "3", "3/", "a/b", "-1/4", "1.5/4", ""])
def test_mistakes_are_named(cli: Any, one_line: Any, text: str) -> None:
    cli.write("a.txt", "text")
    result = cli.inside("summarize", "a.txt", f"--shard={text}")
    assert (result.code, result.out) == (2, b"")
    one_line(result.err)
    assert f"shard {text!r}" in result.err


def documents(cli: Any, number: int) -> list[str]:
    (cli.folder / "in" / "sub").mkdir(parents=True)
    names = [f"{'sub/' if n % 2 else ''}{n:02}.txt" for n in range(number)]
    for name in names:
        cli.write(f"in/{name}", f"text of {name}")
    return names


def parts(folder: Path, of: int) -> list[Path]:
    return [folder / ".auvsum" / f"manifest-{number}-of-{of}.jsonl" for number in range(1, of + 1)]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_two_processes_share_a_folder(cli: Any) -> None:
    names = documents(cli, 12)
    for name in names[:4]:
        cli.write(f"in/{name}", "SLOW")
    running = [
        subprocess.Popen(
            [*cli.fake_command, "summarize", "in", "-O", "out", "--shard", f"{number}/2"],
            cwd=cli.folder,
            env=cli.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for number in (1, 2)
    ]
    for process in running:
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out) == (0, b""), err
    out_folder = cli.folder / "out"
    journals = [[line["output"] for line in lines(path)] for path in parts(out_folder, 2)]
    assert all(journals), "both shards have work here"
    assert sorted(journals[0] + journals[1]) == sorted(names)
    assert sorted(str(p.relative_to(out_folder)) for p in out_folder.rglob("*.txt")) == sorted(names)
    assert [record["output"] for record in lines(out_folder / "index.jsonl")] == sorted(names)

    # Whoever comes next skips what is finished: the same part, another division, or none.
    for flags in (["--shard", "2/2"], ["--shard", "1/3"], []):
        result = cli.fake("summarize", "in", "-O", "out", *flags)
        assert result.code == 0
        assert result.err.splitlines()[-1].startswith("0 done, 0 failed"), result.err
    assert [record["output"] for record in lines(out_folder / "index.jsonl")] == sorted(names)


def test_the_newest_line_holds(cli: Any) -> None:
    """A shard's line about an output that a later run wrote anew says nothing about it any more."""
    documents(cli, 3)
    for number in (1, 2):
        assert cli.fake("summarize", "in", "-O", "out", "--shard", f"{number}/2").code == 0
    again = ("summarize", "in", "-O", "out", "--sentences", "2")
    assert cli.fake(*again).err.splitlines()[-1] == "3 done, 0 failed"
    assert "3 skipped" in cli.fake(*again).err
    result = cli.fake("summarize", "in", "-O", "out")
    assert "skipped" not in result.err


def test_strangers_are_kept_out(cli: Any, one_line: Any) -> None:
    documents(cli, 3)
    hidden = cli.folder / "out" / ".auvsum"
    hidden.mkdir(parents=True)
    with FileLock(hidden / "lock-1-of-2"):
        for flags in (["--shard", "1/2"], ["--shard", "1/3"], []):
            result = cli.fake("summarize", "in", "-O", "out", *flags)
            assert (result.code, result.out) == (2, b"")
            one_line("\n".join(result.err.splitlines()[-2:]))
            assert "another run is writing to out" in result.err
        assert cli.fake("summarize", "in", "-O", "out", "--shard", "2/2").code == 0


def test_names_that_collide_are_told_apart_alike_in_every_part(cli: Any) -> None:
    """`notes.md` becomes `notes.md.txt`, which is there already: whichever shard has them, the outputs differ."""
    (cli.folder / "in").mkdir()
    for name in ("notes.md", "notes.md.txt"):
        cli.write(f"in/{name}", f"text of {name}")
    for of in range(1, 6):
        out = cli.folder / f"out{of}"
        for number in range(1, of + 1):
            assert cli.fake("summarize", "in", "-O", str(out), "--shard", f"{number}/{of}").code == 0
        made = {record["output"]: record["id"] for record in lines(out / "index.jsonl")}
        assert made == {"notes.md.txt": "notes.md", "notes.md-2.txt": "notes.md.txt"}


def test_an_empty_part_is_no_error(cli: Any) -> None:
    cli.write("a.txt", "text")
    results = [cli.fake("summarize", "a.txt", "-O", "out", "--shard", f"{number}/2") for number in (1, 2)]
    assert [result.code for result in results] == [0, 0]
    assert sum("holds none of 1 documents" in result.err for result in results) == 1
    assert sum("1 done" in result.err or "tokens read" in result.err for result in results) == 1


def test_dry_run_shows_the_part(cli: Any) -> None:
    names = documents(cli, 8)
    shown: list[str] = []
    for number in (1, 2, 3):
        result = cli.fake("summarize", "in", "--dry-run", "--format", "jsonl", "--shard", f"{number}/3")
        assert result.code == 0
        shown += [json.loads(line)["id"] for line in result.text.splitlines()]
    assert sorted(shown) == sorted(names)

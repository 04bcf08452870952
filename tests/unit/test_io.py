"""Names into files, files into names, and a journal that survives what happens to it. No model."""

from __future__ import annotations

import json
import os
import time
import tracemalloc
from pathlib import Path

import pytest

from auvsum.errors import DocumentNotFound, OutputError
from auvsum.io.atomic import write_whole
from auvsum.io.inputs import Input, Selection, expand, read_names
from auvsum.io.manifest import Manifest
from auvsum.io.sinks import FolderSink, Places


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("b.txt", "a.md", "sub/c.txt", "sub/deep/d.md", ".git/e.txt", "sub/.f.txt", "z/g.txt"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def places(*names: str, **selection: object) -> list[str]:
    return [item.place for item in expand(names, Selection(**selection))]  # type: ignore[arg-type]


def test_folders_are_sorted_and_hidden_names_left_out(tree: Path) -> None:
    assert places("in") == places("in/") == ["a.md", "b.txt", "sub/c.txt", "sub/deep/d.md", "z/g.txt"]
    assert places("in", hidden=True)[0] == ".git/e.txt"
    assert "sub/.f.txt" in places("in", hidden=True)
    assert places("in/.git/e.txt") == ["e.txt"]


def test_include_and_exclude(tree: Path) -> None:
    assert places("in", include=("*.md",)) == ["a.md", "sub/deep/d.md"]
    assert places("in", exclude=("sub",)) == ["a.md", "b.txt", "z/g.txt"]
    assert places("in", exclude=("sub/deep/",)) == ["a.md", "b.txt", "sub/c.txt", "z/g.txt"]
    assert places("in", include=("sub/*",), exclude=("*.md",)) == ["sub/c.txt"]
    assert places("in/b.txt", exclude=("*.txt",)) == ["b.txt"]


def test_patterns(tree: Path) -> None:
    assert places("in/**/*.md") == ["a.md", "sub/deep/d.md"]
    assert places("in/*.txt") == ["b.txt"]
    assert places("in/[ab].*") == ["a.md", "b.txt"]
    assert places("in/*/c.txt") == ["sub/c.txt"]
    assert [item.path for item in expand(["in/*/c.txt"])] == ["in/sub/c.txt"]
    assert places(str(tree / "in" / "**" / "g.txt")) == ["z/g.txt"]
    (tree / "odd[1].txt").write_text("named as a pattern would be")
    assert places("odd[1].txt") == ["odd[1].txt"]


def test_nothing_found(tree: Path) -> None:
    (tree / "empty").mkdir()
    for name in ("empty", "in/*.pdf", "nowhere/*"):
        with pytest.raises(DocumentNotFound, match="holds no document"):
            expand([name])
    assert places("missing.txt") == ["missing.txt"]


def test_order_and_repetition(tree: Path) -> None:
    assert places("in/z/g.txt", "-", "in") == ["g.txt", "stdin", "a.md", "b.txt", "sub/c.txt", "sub/deep/d.md"]
    assert places("in/b.txt", "in/b.txt") == ["b.txt", "b.txt"]


def test_links(tree: Path) -> None:
    (tree / "in" / "sub" / "loop").symlink_to(tree / "in")
    (tree / "in" / "again").symlink_to(tree / "in" / "z")
    (tree / "in" / "broken").symlink_to(tree / "nowhere")
    os.mkfifo(tree / "in" / "pipe")
    assert places("in") == ["a.md", "again/g.txt", "b.txt", "broken", "sub/c.txt", "sub/deep/d.md"]
    assert places("in/**/*.txt") == ["again/g.txt", "b.txt", "sub/c.txt"]


def test_the_output_folder_is_not_read(tree: Path) -> None:
    assert "z/g.txt" not in places("in", without=(tree / "in" / "z",))
    assert places("in/**/*.txt", without=(Path("in/z"),)) == ["b.txt", "sub/c.txt"]


def test_lists(tree: Path) -> None:
    (tree / "list").write_bytes(b"./in/b.txt\nin/sub/c.txt\r\n\n")
    names = read_names("list")
    assert [item.place for item in expand(names, listed=True)] == ["in/b.txt", "in/sub/c.txt"]
    (tree / "zero").write_bytes("in/b.txt\0ü.txt".encode())
    assert read_names("zero", zero=True) == ["in/b.txt", "ü.txt"]
    assert [item.place for item in expand(["../up/x.txt", "/abs/x.txt"], listed=True)] == ["../up/x.txt", "x.txt"]


def test_output_names() -> None:
    of = Places(".txt").of
    assert [of("a.txt"), of("a.md"), of("A.TXT"), of("sub/a.txt")] == ["a.txt", "a.md.txt", "A.TXT.txt", "sub/a.txt"]
    assert [of("a.txt"), of("a.txt"), of("a.md.txt")] == ["a-2.txt", "a-3.txt", "a.md-2.txt"]
    assert of("SUB/A.txt") == "SUB/A-2.txt"
    assert [of("x/y"), of("x/y.txt/z")] == ["x/y.txt", "x/y.txt-2/z.txt"]
    assert Places(".jsonl").of("index.jsonl") == "index-2.jsonl"
    assert of(".auvsum/manifest.jsonl") == "_auvsum/manifest.jsonl.txt"


@pytest.mark.parametrize("place", ["../../etc/passwd", "/etc/passwd", "a/../../b", "..", ".", ""])
def test_output_names_cannot_leave(place: str) -> None:
    name = Places(".txt").of(place)
    assert ".." not in name.split("/")
    assert not name.startswith("/")
    assert name


def test_long_names_are_cut_and_stay_apart(tmp_path: Path) -> None:
    of = Places(".json").of
    names = [of(f"{'ä' * 127}{end}") for end in "xy"]
    assert len(set(names)) == 2
    for name in names:
        write_whole(tmp_path / name, b"{}")


def test_write_whole_leaves_the_old_file_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    write_whole(path, b"old")

    def fails(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OutputError, match=r"a\.txt cannot be written: No space left on device"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def record(name: str) -> dict[str, object]:
    return {"id": name, "source": f"/{name}", "summary": "s", "error": None}


def test_journal_survives_a_torn_line(tmp_path: Path) -> None:
    with Manifest(tmp_path) as manifest:
        for name in ("a", "b"):
            (tmp_path / name).write_bytes(b"123")
            manifest.add(name, f"key {name}", 3, record(name))
        path = manifest.path
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(first, len(whole)):
        path.write_bytes(whole[:cut])
        with Manifest(tmp_path) as manifest:
            assert manifest.finished("a", "key a")
            assert not manifest.finished("b", "key b")
            manifest.add("b", "key b", 3, record("b"))
            manifest.write_index()
        lines = (tmp_path / "index.jsonl").read_text().splitlines()
        assert [json.loads(line)["output"] for line in lines] == ["a", "b"]


def test_finished_means_the_file_is_there_as_written(tmp_path: Path) -> None:
    with Manifest(tmp_path) as manifest:
        (tmp_path / "a").write_bytes(b"123")
        manifest.add("a", "key", 3, record("a"))
        assert manifest.finished("a", "key")
        assert not manifest.finished("a", "other key")
        (tmp_path / "a").write_bytes(b"1234")
        assert not manifest.finished("a", "key")
        (tmp_path / "a").unlink()
        assert not manifest.finished("a", "key")
        manifest.add("a", "key", None, {**record("a"), "summary": None})
        assert not manifest.finished("a", "key")


def test_ten_thousand_files_take_seconds_and_little_memory(tmp_path: Path) -> None:
    """Loose bounds: a quadratic step or a text kept in memory would break them many times over."""
    size = 2_000
    for folder in range(100):
        (tmp_path / "in" / f"{folder:02}").mkdir(parents=True)
        for file in range(100):
            (tmp_path / "in" / f"{folder:02}" / f"{file:02}.txt").write_bytes(b"%d-%d" % (folder, file) * (size // 5))
    out = tmp_path / "out"

    def sink() -> FolderSink:
        return FolderSink(out, "text", "settings")

    begun = time.perf_counter()
    inputs = expand([str(tmp_path / "in")], Selection(without=(out,)))
    assert len(inputs) == 10_000
    with sink() as first, pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)  # the disk's own speed is not the question
        for item in inputs:
            assert first.wants(item)
            first.write({**record(item.place), "source": item.source})
    tracemalloc.start()
    with sink() as second:
        assert not any(second.wants(item) for item in inputs)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 * 2**20
    assert time.perf_counter() - begun < 100
    assert len((out / "index.jsonl").read_text().splitlines()) == 10_000


def test_input_source_is_absolute() -> None:
    assert Input("a.txt", "a.txt").source == os.path.abspath("a.txt")
    assert Input("-", "stdin").source == "-"

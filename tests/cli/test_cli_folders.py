"""Folders, resuming and batches with a real, tiny model, in one process."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from auvsum.batch import Failure
from auvsum.summarize import Summarizer, Summary
from auvsum.text.readers import Document
from tests import checkpoints

SENTENCE = "The council met in the town hall and there it decided to build a bridge over the river. "


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(checkpoints.llama(tmp_path_factory.mktemp("models") / "llama"))


@pytest.fixture
def run(cli: Any, model: str) -> Any:
    def run(*arguments: str) -> Any:
        flags = ("--model", model, "--dtype", "fp32", "--max-tokens", "6", "--budget", "96")
        return cli.inside("summarize", *arguments, *flags)

    return run


def hashes(folder: Path) -> dict[str, str]:
    """Every output, without what the tool keeps for itself."""
    files = (path for path in folder.rglob("*") if path.is_file() and ".auvsum" not in path.parts)
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.name != "index.jsonl"
    }


def index(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "index.jsonl").read_text(encoding="utf-8").splitlines()]


def test_folder_is_mirrored_and_resumed(cli: Any, run: Any) -> None:
    for name in ("in/a.txt", "in/a.md", "in/sub/b.txt", "in/.hidden.txt"):
        (cli.folder / name).parent.mkdir(parents=True, exist_ok=True)
        cli.write(name, f"{name} {SENTENCE}")
    cli.write("in/sub/broken.txt", b"%PDF-1.4")
    out = cli.folder / "out"
    result = run("in", "-O", "out")
    assert (result.code, result.out) == (1, b"")
    assert result.err.splitlines()[-1] == "3 done, 1 failed"
    first = hashes(out)
    assert set(first) == {"a.txt", "a.md.txt", "sub/b.txt"}
    records = index(out)
    assert [record["output"] for record in records] == ["a.md.txt", "a.txt", "sub/b.txt", None]
    assert records[2]["id"] == "sub/b.txt"
    assert records[2]["source"] == str(cli.folder / "in" / "sub" / "b.txt")
    assert records[3]["error"]["kind"] == "document-unreadable"

    result = run("in", "-O", "out")
    assert result.code == 1
    assert result.err.splitlines()[-1] == "0 done, 1 failed, 3 skipped (finished before; --force does them again)"
    assert "loaded" not in result.err
    cli.write("in/sub/broken.txt", SENTENCE)
    cli.write("in/a.md", f"changed {SENTENCE}")
    result = run("in", "-O", "out")
    assert result.err.splitlines()[-1].startswith("2 done, 0 failed, 2 skipped")
    assert result.code == 0
    second = hashes(out)
    assert set(second) == {*first, "sub/broken.txt"}
    assert [second[name] for name in ("a.txt", "sub/b.txt")] == [first[name] for name in ("a.txt", "sub/b.txt")]
    assert "1 skipped" in run("in/a.txt", "-O", "out").err
    assert run("in", "-O", "out", "--force").err.splitlines()[-1] == "4 done, 0 failed"
    assert run("in", "-O", "out", "--sentences", "2").err.splitlines()[-1] == "4 done, 0 failed"
    (out / "a.txt").unlink()
    assert "1 done, 0 failed, 3 skipped" in run("in", "-O", "out", "--sentences", "2").err


def test_formats(cli: Any, run: Any) -> None:
    cli.write("a.txt", SENTENCE)
    cli.write("b.txt", SENTENCE * 2)
    lines = run("a.txt", "b.txt", "--format", "jsonl").text.splitlines()
    summaries = [json.loads(line)["summary"].strip() for line in lines]
    assert [json.loads(line)["id"] for line in lines] == ["a.txt", "b.txt"]
    markdown = run("a.txt", "b.txt", "--format", "md").text
    assert markdown == f"# a.txt\n\n{summaries[0]}\n\n# b.txt\n\n{summaries[1]}\n"
    result = run("a.txt", "b.txt", "-o", "all.txt")
    assert result.out == b""
    text = (cli.folder / "all.txt").read_text(encoding="utf-8")
    assert text == f"==> a.txt <==\n{summaries[0]}\n\n==> b.txt <==\n{summaries[1]}\n"
    assert not (cli.folder / "all.txt.partial").exists()
    for format in ("md", "json", "jsonl"):
        assert run("a.txt", "-O", "out", "--format", format).code == 0
    assert sorted(hashes(cli.folder / "out")) == ["a.txt.json", "a.txt.jsonl", "a.txt.md"]
    assert json.loads((cli.folder / "out" / "a.txt.json").read_text())["summary"].strip() == summaries[0]


def test_score(cli: Any, run: Any) -> None:
    cli.write("a.txt", SENTENCE)
    summary = run("a.txt").text
    cli.write("ref.txt", f"{summary.strip()} and more words of reference")
    result = run("a.txt", "--score", "ref.txt", "--format", "json")
    record = json.loads(result.out)
    assert set(record["score"]) >= {"rouge1", "rouge2", "rougeLsum"}
    assert result.err.splitlines()[-1].startswith("a.txt: rouge1 ")
    assert run("a.txt", "--score", "missing.txt").code == 1


def test_timeout_is_one_documents_failure(cli: Any, run: Any) -> None:
    cli.write("a.txt", SENTENCE)
    result = run("a.txt", "a.txt", "--timeout", "1e-9", "--format", "jsonl")
    assert result.code == 1
    assert [json.loads(line)["error"]["kind"] for line in result.text.splitlines()] == ["document-timeout"] * 2
    assert "not finished within 1e-09 seconds" in result.err


def test_output_that_cannot_be_written_is_named(cli: Any, run: Any, one_line: Any) -> None:
    cli.write("a.txt", SENTENCE)
    cli.write("file", "no folder")
    result = run("a.txt", "-O", "file", "-q")
    assert (result.code, result.out) == (1, b"")
    one_line(result.err)
    assert "file" in result.err
    result = run("a.txt", "-o", "missing/all.txt", "-q")
    assert result.code == 1
    assert "missing/all.txt cannot be written" in result.err
    if Path("/dev/full").exists():
        result = run("a.txt", "-o", "/dev/full", "-q")
        assert result.code == 1
        assert "/dev/full cannot be written: No space left on device" in result.err


def test_links_do_not_lead_out(cli: Any, run: Any) -> None:
    (cli.folder / "in" / "sub").mkdir(parents=True)
    cli.write("in/sub/a.txt", SENTENCE)
    (cli.folder / "elsewhere").mkdir()
    (cli.folder / "out").mkdir()
    (cli.folder / "out" / "sub").symlink_to(cli.folder / "elsewhere")
    result = run("in", "-O", "out", "-q")
    assert result.code == 1
    assert "leads out of out" in result.err
    assert not list((cli.folder / "elsewhere").iterdir())


def test_second_run_on_one_folder_is_refused(cli: Any, run: Any, one_line: Any) -> None:
    from auvsum.io.manifest import Manifest

    cli.write("a.txt", SENTENCE)
    with Manifest(cli.folder / "out"):
        result = run("a.txt", "-O", "out")
    assert (result.code, result.out) == (2, b"")
    one_line(result.err)
    assert "another run is writing to out" in result.err
    assert run("a.txt", "-O", "out").code == 0


def test_two_hundred_documents_with_twenty_broken(cli: Any, model: str) -> None:
    (cli.folder / "in").mkdir()
    for number in range(200):
        broken = (b"%PDF-1.4", b"", b"a\x00b")[number % 3] if number % 10 == 7 else None
        cli.write(f"in/{number:03}.txt", broken if broken is not None else f"{number} bridges.")
    flags = ("--model", model, "--dtype", "fp32", "--budget", "96", "--max-tokens", "2")
    result = cli.real("summarize", "in", "-O", "out", "-q", *flags)
    assert (result.code, result.out) == (1, b"")
    records = index(cli.folder / "out")
    assert sum(record["error"] is None for record in records) == 180
    assert sum(record["summary"] is None for record in records) == 20
    assert len(hashes(cli.folder / "out")) == 180
    assert result.err.count("error: ") == 20


def test_list_of_names(cli: Any, run: Any) -> None:
    (cli.folder / "in").mkdir()
    cli.write("in/a b.txt", SENTENCE)
    cli.write("in/c\nd.txt", SENTENCE)
    cli.write("list", b"./in/a b.txt\0in/c\nd.txt\0")
    result = run("--files-from", "list", "-0", "-O", "out")
    assert result.code == 0
    assert set(hashes(cli.folder / "out")) == {"in/a b.txt", "in/c\nd.txt"}


# -- the library ----------------------------------------------------------------------------------------------------


def documents(count: int) -> list[Document]:
    """Texts of different lengths."""
    return [Document(f"/d/{n}", f"Number {n}. {SENTENCE * (1 + n % 4)}", "utf-8") for n in range(count)]


def summarizer(model: str, **settings: Any) -> Summarizer:
    return Summarizer.from_pretrained(model, dtype="fp32", budget="96", **{"max_tokens": 8, **settings})


def texts(results: Any) -> list[str]:
    return [result.text if isinstance(result, Summary) else result.error.kind for result in results]


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.9}, {"strategy": "stream", "chunk": 32}])
def test_batches_do_not_change_summaries(model: str, settings: dict[str, Any]) -> None:
    alone = texts(summarizer(model, **settings).run(documents(9)))
    for batch_size, rows in (("4", 4), ("auto", 8)):
        together = list(summarizer(model, batch_size=batch_size, **settings).run(documents(9)))
        assert texts(together) == alone
        assert [result.id for result in together] == [str(n) for n in range(9)]
        assert together[0].record()["settings"]["batch_size"] == rows


def test_auto_follows_the_free_memory(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Less memory, fewer documents together and the same summaries; a run's own caches change no budget."""
    from auvsum.engine import memory

    one = Summarizer.from_pretrained(model, dtype="fp32", max_tokens=8)
    expected = texts(one.run(documents(9), together=False))
    plan = one.plan(documents(9)[3].text)
    measured = []

    def shrinking(devices: Any) -> int:
        measured.append(devices)
        return 10**9 // len(measured)

    monkeypatch.setattr("auvsum.summarize.free_over", shrinking)
    results = list(one.run(documents(9)))
    assert texts(results) == expected
    assert len(measured) == 1
    assert {result.plan.policy.name for result in results if isinstance(result, Summary)} == {"full"}
    rows = {}
    for mebibytes in (3, 6, 10_000):
        monkeypatch.setattr(memory, "free_bytes", lambda _, n=mebibytes: n * 2**20)
        rows[mebibytes] = one.together(plan, 9)
        assert texts(one.run(documents(9))) == expected
    assert 1 <= rows[3] < rows[6] < rows[10_000] == memory.MOST_ROWS["cpu"]
    assert one.together(plan, 2) == 2


def test_auto_is_one_beside_a_time_limit(model: str) -> None:
    results = list(summarizer(model, timeout=60.0).run(documents(3)))
    assert [result.record()["settings"]["batch_size"] for result in results] == [1, 1, 1]
    assert summarizer(model, timeout=60.0, batch_size="2").batch_size == 2


@pytest.mark.parametrize("batch_size", ["1", "3"])
def test_failures_keep_their_place(model: str, batch_size: str) -> None:
    from auvsum.errors import DocumentEmpty

    given: list[Any] = documents(5)
    given[1] = Failure("1", "/d/1", DocumentEmpty("empty"), summarizer(model).settings)
    given[3] = Document("/d/3", SENTENCE * 400, "utf-8", ("odd",))
    given[4] = Document("/d/4", SENTENCE, "utf-8", ("odd",))
    results = list(summarizer(model, batch_size=batch_size, strategy="single").run(given))
    assert [result.id for result in results] == [str(n) for n in range(5)]
    assert texts(results)[1] == "document-empty"
    assert texts(results)[3] == "document-too-long"
    assert isinstance(results[4], Summary)
    assert results[4].warnings[0] == "odd"


def test_documents_are_taken_lazily(model: str) -> None:
    taken = 0

    def many() -> Iterator[Document]:
        nonlocal taken
        for document in documents(50):
            taken += 1
            yield document

    for batch_size, ahead in (("1", 1), ("4", 9), ("auto", 17)):
        taken = 0
        results = summarizer(model, batch_size=batch_size).run(many())
        next(results)
        assert taken <= ahead
        results.close()  # type: ignore[attr-defined]


def test_what_breaks_the_engine_fails_alone(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from auvsum.engine.generate import Engine

    read = Engine._read

    def breaks(self: Engine, cache: Any, number: int, ids: Any, *more: Any, **named: Any) -> Any:
        if len(ids) == poisoned:
            raise RuntimeError("out of memory")
        return read(self, cache, number, ids, *more, **named)

    one = summarizer(model, batch_size="3")
    given = documents(6)
    given[2] = Document("/d/2", "Poison. " + SENTENCE * 5, "utf-8")
    poisoned = one.plan(given[2].text).prompt_tokens
    monkeypatch.setattr(Engine, "_read", breaks)
    results = list(one.run(given))
    assert [isinstance(result, Failure) for result in results] == [False, False, True, False, False, False]
    assert texts(results)[2] == "internal"

"""`auvsum eval` and what follows it, on a tiny random model and a handful of made-up documents."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import checkpoints
from tests.cli.conftest import Cli

SENTENCE = "the mill by the river was sold in may and the new owners will open it in june they said"


def documents(count: int = 4) -> list[dict[str, str]]:
    words = SENTENCE.split()
    return [
        {
            "id": f"d{i}",
            "document": " ".join(
                " ".join(words[(i + j + k) % len(words)] for k in range(9)).capitalize() + "." for j in range(8)
            ),
            "summary": f"The mill number {i} was sold.",
        }
        for i in range(count)
    ]


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(checkpoints.llama(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=4096))


def arguments_for(model: str) -> list[str]:
    metrics = ("--metrics", "fidelity,rouge", "--threads", "1", "--max-tokens", "8")
    return ["eval", "--dataset", "rows.jsonl", "--model", model, "--budgets", "24,48", *metrics]


@pytest.fixture
def common(model: str, cli: Cli) -> list[str]:
    write(cli.folder / "rows.jsonl", documents())
    return arguments_for(model)


@pytest.fixture(scope="module")
def finished(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, made once."""
    folder = tmp_path_factory.mktemp("finished")
    write(folder / "rows.jsonl", documents())
    command = [sys.executable, "-m", "auvsum", *arguments_for(model), "--out", "runs/a"]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=folder, env=env, check=True, capture_output=True, timeout=240)
    return folder / "runs" / "a"


@pytest.fixture
def done(cli: Cli, finished: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(finished, cli.folder / "runs" / "a"))


def test_a_run_leaves_its_files_and_prints_a_table(cli: Cli, common: list[str]) -> None:
    result = cli.inside(*common, "--out", "runs/a")
    assert result.code == 0, result.err
    table = result.text
    for name in ("full", "first words", "LexRank", "truncated prompt @ 24", "h2o @ 24", "auv @ 48"):
        assert re.search(rf"^{re.escape(name)}  ", table, re.MULTILINE), table
    assert "zero-shot" in table
    assert "4/4 d3" in result.err
    run = cli.folder / "runs" / "a"
    assert {file.name for file in run.iterdir()} >= {"config.yaml", "samples.jsonl", "metrics.json", "env.json"}
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [sample["id"] for sample in samples] == ["d0", "d1", "d2", "d3"]
    row = samples[0]["rows"]["h2o @ 24"]
    assert len(row["kept"]) == 10
    assert row["slots"] == 24
    full = samples[0]["rows"]["full"]
    assert (full["agreement"], full["nats"]) == (1, 0)
    metrics = json.loads((run / "metrics.json").read_text())
    scores = metrics["rows"]["auv @ 24"]["scores"]
    assert set(scores) >= {"agreement", "nats", "rouge1", "rouge2", "rougeL", "rougeLsum", "words", "rouge1@matched"}
    assert scores["nats"]["low"] <= scores["nats"]["mean"] <= scores["nats"]["high"]
    assert {"h2o @ 24", "auv @ 24"} in [{p["first"], p["second"]} for p in metrics["paired"]]


def test_a_killed_run_goes_on_where_it_was(cli: Cli, common: list[str], done: Path) -> None:
    whole = (done / "samples.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    (done / "samples.jsonl").write_bytes(b"".join(lines[:2]) + lines[2][:40])
    refused = cli.inside(*common, "--out", "runs/a")
    assert refused.code == 2
    assert "--resume" in refused.err
    result = cli.inside(*common, "--out", "runs/a", "--resume")
    assert result.code == 0
    assert "2 documents are done already" in result.err
    again = [json.loads(line) for line in (done / "samples.jsonl").read_text().splitlines()]
    for before, after in zip(map(json.loads, lines), again, strict=True):
        assert {**before, "seconds": 0} == {**after, "seconds": 0}


def test_a_directory_of_another_configuration_is_refused(cli: Cli, common: list[str], done: Path, one_line) -> None:
    result = cli.inside(*common, "--out", "runs/a", "--seed", "5", "--resume")
    assert result.code == 2
    assert "another configuration (seed differ)" in result.err
    one_line(result.err)


def test_scoring_again_gives_the_same(cli: Cli, done: Path) -> None:
    before = (done / "metrics.json").read_bytes()
    (done / "metrics.json").unlink()
    missing = cli.inside("compare", "runs/a")
    assert missing.code == 2
    assert "auvsum score runs/a" in missing.err
    assert cli.inside("score", "runs/a").code == 0
    assert (done / "metrics.json").read_bytes() == before


def test_compare_plot_and_report(cli: Cli, done: Path) -> None:
    rows = json.loads(cli.inside("compare", "runs/a", "--format", "json").out)["rows"]
    assert {row["name"] for row in rows} >= {"full", "LexRank", "auv @ 24"}
    head, first, *_ = cli.inside("compare", "runs/a", "--format", "csv").text.splitlines()
    assert len(head.split(",")) == len(first.split(","))
    assert "| auv @ 24 |" in cli.inside("compare", "runs/a", "--format", "md").text
    plots = cli.inside("plot", "runs/a", "--out", "plots", "--format", "svg")
    files = [Path(line) for line in plots.text.splitlines()]
    assert "quality-nats.svg" in [file.name for file in files]
    assert all(file.stat().st_size > 1000 for file in files)
    page = Path(cli.inside("report", "runs/a", "--html").text.strip()).read_text(encoding="utf-8")
    assert "<svg" in page
    assert "<span class=k3>" in page
    assert not re.search(r"(?:src|href)=[\"']?https?:", page)
    markdown = cli.inside("report", "runs/a").text
    assert "## a\n" in markdown
    assert "h2o" in markdown


def test_runs_of_different_documents_are_not_compared(cli: Cli, common: list[str], done: Path, one_line) -> None:
    rows = documents()
    rows[2]["document"] += " One more sentence."
    write(cli.folder / "rows.jsonl", rows)
    assert cli.inside(*common, "--out", "runs/b").code == 0
    result = cli.inside("compare", "runs/a", "runs/b")
    assert result.code == 2
    assert "3 of 4" in result.err
    one_line(result.err)


def test_neither_a_plot_nor_a_page_mixes_documents(cli: Cli, common: list[str], done: Path, one_line) -> None:
    write(cli.folder / "rows.jsonl", documents(3))
    assert cli.inside(*common, "--out", "runs/b").code == 0
    for command in (["plot"], ["report", "--html"]):
        result = cli.inside(*command, "runs/a", "runs/b")
        assert result.code == 2
        assert "3 of 3 and 4" in result.err
        one_line(result.err)


def test_a_run_does_not_go_on_with_other_documents(cli: Cli, common: list[str], done: Path) -> None:
    lines = (done / "samples.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (done / "samples.jsonl").write_text("".join(lines[:2]), encoding="utf-8")
    rows = documents()
    rows[1]["document"] += " One more sentence."
    write(cli.folder / "rows.jsonl", rows)
    result = cli.inside(*common, "--out", "runs/a", "--resume")
    assert result.code == 2
    assert "measured another document as d1" in result.err


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("samples.jsonl", lambda text: '{"a": 1}\n' + text, "line 1 is no measured document"),
        ("samples.jsonl", lambda text: "5\n" + text, "line 1 is no measured document"),
        ("samples.jsonl", lambda text: "{\n" + text, "line 1 is not JSON"),
        ("samples.jsonl", lambda _: "", "holds no measured documents"),
        ("samples.jsonl", lambda text: re.sub(r'"nats": [-0-9.e]+', '"nats": NaN', text), "a score is nan"),
        ("samples.jsonl", lambda text: text.replace("auv @ 24", "auv @ 25"), "has no row 'auv @ 24'"),
        ("config.yaml", lambda text: text + "colour: red\n", "unknown key 'colour'"),
        ("config.yaml", lambda _: "- 1\n", "does not hold a configuration"),
        ("config.yaml", lambda _: "a: [", "is not a run: no readable config.yaml"),
    ],
)
def test_a_damaged_run_is_refused(cli: Cli, done: Path, file: str, change, message: str, one_line) -> None:
    (done / file).write_text(change((done / file).read_text(encoding="utf-8")), encoding="utf-8")
    result = cli.inside("score", "runs/a")
    assert result.code in (1, 2), result.err
    assert message in result.err
    one_line(result.err)


def test_a_folder_that_is_no_run_is_neither_read_nor_written(cli: Cli, common: list[str], done: Path, one_line) -> None:
    other = cli.folder / "letters"
    other.mkdir()
    (other / "mother.txt").write_text("Dear mother", encoding="utf-8")
    for command in ([*common, "--out", "letters"], ["score", "letters"], ["compare", "letters"], ["plot", "letters"]):
        result = cli.inside(*command)
        assert result.code == 2, command
        assert "not" in result.err
        assert "a run" in result.err
        one_line(result.err)
    assert [file.name for file in other.iterdir()] == ["mother.txt"]
    (done / "metrics.json").write_text('{"rows": 5}', encoding="utf-8")
    result = cli.inside("compare", "runs/a")
    assert result.code == 2
    assert "auvsum score runs/a" in result.err


def test_a_run_that_was_stopped_says_so(cli: Cli, done: Path) -> None:
    lines = (done / "samples.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (done / "samples.jsonl").write_text("".join(lines[:3]), encoding="utf-8")
    assert "the run is not finished: 3 of 4 documents" in cli.inside("score", "runs/a").text


def test_kvpress_is_shown_beside_the_run_of_its_documents(cli: Cli, done: Path, one_line) -> None:
    metrics = json.loads((done / "metrics.json").read_text(encoding="utf-8"))
    press = {"press": "KVzipPress", "budget": "24", "agreement": [0.5, 0.7], "nats": [0.25, 0.35]}
    peer = {
        "benchmark": "kvpress",
        "versions": {"kvpress": "0.5.5"},
        "model": metrics["config"]["model"],
        "dtype": "float32",
        "dataset": "rows.jsonl",
        "documents": ["d1", "d3"],
        "rows": [press],
    }
    file = cli.folder / "peer.json"
    file.write_text(json.dumps(peer), encoding="utf-8")
    text = cli.inside("report", "runs/a", "--peer", "peer.json").text
    assert "The same 2 documents" in text
    assert "| kvpress KVzipPress @ 24 | 0.600 | 0.300 |" in text
    own = metrics["rows"]["h2o @ 24"]["documents"]
    agree, nats = ((own[metric][1] + own[metric][3]) / 2 for metric in ("agreement", "nats"))
    assert f"| h2o @ 24 | {agree:.3f} | {nats:.3f} |" in text
    assert "less kvpress" not in text, "only auv-look is held against it"
    found = metrics["rows"].pop("h2o @ 24")
    metrics["rows"]["auv-look @ 24"] = found
    for metric, values in (("nats", [0, 0.1, 0, 0.3]), ("agreement", [1, 1, 1, 1])):
        found["documents"][metric] = values
    metrics["paired"] = []
    (done / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    text = cli.inside("report", "runs/a", "--peer", "peer.json").text
    # .1 less .25 and .3 less .35
    assert "auv-look @ 24 less kvpress KVzipPress @ 24, nats a token: -0.10 [-0.15, -0.05]." in text
    file.write_text("{}", encoding="utf-8")
    result = cli.inside("report", "runs/a", "--peer", "peer.json")
    assert result.code == 2
    assert "no result of kvpress" in result.err
    one_line(result.err)


def test_writing_and_scoring_may_be_apart(cli: Cli, common: list[str], done: Path) -> None:
    result = cli.inside(*common, "--out", "runs/b", "--write-only")
    assert result.code == 0, result.err
    assert result.out == b""
    assert "type: auvsum score runs/b" in result.err
    assert not (cli.folder / "runs/b/metrics.json").exists()
    assert cli.inside("score", "runs/b").code == 0
    assert (cli.folder / "runs/b/metrics.json").read_bytes() == (done / "metrics.json").read_bytes()


def test_documents_that_cannot_be_measured_are_told_and_the_others_go_on(cli: Cli, common: list[str]) -> None:
    rows = documents(3)
    rows[0]["document"] = "  "
    rows[1]["summary"] = ""
    rows[2]["summary"] = "Мельницу у реки продали в мае."
    write(cli.folder / "rows.jsonl", rows)
    result = cli.inside(*common, "--out", "runs/a")
    assert result.code == 1
    assert "d0 failed: the document is empty" in result.text
    assert "1 documents have no reference" in result.text
    assert "not in Latin letters" in result.text
    metrics = json.loads((cli.folder / "runs/a/metrics.json").read_text())
    assert metrics["rows"]["full"]["scores"]["nats"]["n"] == 2
    assert metrics["rows"]["full"]["scores"]["rouge1"]["n"] == 1


def test_the_papers_prompt_and_a_cut_document_are_named(cli: Cli, common: list[str]) -> None:
    write(cli.folder / "rows.jsonl", documents(7))
    result = cli.inside(*common, "--out", "runs/a", "--shots", "5", "--max-document-tokens", "40", "--limit", "1")
    assert result.code == 0, result.err
    assert "5-shot ### prompt" in result.text
    assert "1 of 1 documents were cut to 40 tokens" in result.text
    environment = json.loads((cli.folder / "runs/a/env.json").read_text())
    sample = json.loads((cli.folder / "runs/a/samples.jsonl").read_text())
    assert len(environment["shots"]) == 5
    assert sample["id"] not in environment["shots"]


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["--dataset", "xsum", "--data-dir", "."], "xsum", "--download"),
        (["--dataset", "beigebook"], "'beigebook' is not here", "--data-dir DIR, where DIR holds beigebook.jsonl"),
        (["--dataset", "none.jsonl"], "there is no file none.jsonl", "check the path"),
        (["--column", "document=text"], "row 1 has no column 'text'", "--column document=NAME"),
        (["--policies", "avu"], "policy 'avu' is unknown", "auv"),
        (["--policies", "auv(decoy=1)"], "no option 'decoy'", "decay"),
        (["--budgets", "auto"], "depends on the machine", "shares"),
        (["--metrics", "rogue"], "metrics 'rogue' is unknown", "rouge"),
        (["--shots", "3"], "shots must be 0 or 5", "paper"),
        (["--condition", "suffled"], "condition 'suffled' is unknown", "shuffled"),
        (["--kv-bits", "3"], "kv_bits 3 is unknown", "16, 8 or 4"),
        (["--limit", "0"], "limit must be at least 1", "--limit"),
    ],
)
def test_mistakes_are_told_before_the_model_is_loaded(
    cli: Cli, arguments: list[str], message: str, hint: str, one_line, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(cli.folder / "no-cache"))
    write(cli.folder / "rows.jsonl", documents())
    given = [] if "--dataset" in arguments else ["--dataset", "rows.jsonl"]
    result = cli.inside("eval", *given, *arguments, "--model", "/there/is/none")
    assert result.code == 2, result.err
    assert result.out == b""
    one_line(result.err)
    assert message in result.err
    assert hint in result.err


def test_an_encoder_that_is_not_here_is_told_first(cli: Cli, one_line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUVSUM_CACHE", str(cli.folder / "cache"))
    write(cli.folder / "rows.jsonl", documents())
    result = cli.inside("eval", "--dataset", "rows.jsonl", "--model", "/there/is/none")
    assert result.code == 3
    assert "auvsum models pull all-minilm-l6-v2" in result.err
    one_line(result.err)
    assert not (cli.folder / "runs").exists()

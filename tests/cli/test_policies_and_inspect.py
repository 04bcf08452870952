"""`auvsum policies` and `auvsum inspect`, with a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from auvsum.cache.policy import policy_names
from tests import checkpoints

SENTENCE = "The council met in the town hall and there it decided to build a bridge over the river. "


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(checkpoints.llama(tmp_path_factory.mktemp("models") / "llama"))


def inspect(cli: Any, model: str, *arguments: str) -> Any:
    cli.write("report.txt", SENTENCE * 8)
    return cli.inside("inspect", "report.txt", "--model", model, "--dtype", "fp32", *arguments)


def test_policies_lists_every_policy(cli: Any) -> None:
    result = cli.inside("policies", "--format", "json")
    assert (result.code, result.err) == (0, "")
    records = {record["name"]: record for record in json.loads(result.out)}
    assert sorted(records) == policy_names()
    assert records["auv"]["options"] == {
        "top_k": None,
        "decay": 0.5,
        "reconstruct": True,
        "eviction": "multi-step",
    }
    assert records["streaming"]["aliases"] == ["lm-infinite"]
    assert not records["snapkv"]["streams"]
    text = cli.inside("policies").text
    for name, record in records.items():
        assert f"{name}\n" in text or f"{name}, " in text
        assert record["paper"] in text
        assert record["evicts"] in text


def test_h2o_keeps_the_first_tokens(cli: Any, model: str) -> None:
    """Its bias is seen at a glance: of the scored half, the first tenth holds far more than an even share."""
    result = inspect(cli, model, "--policies", "h2o,streaming", "--budget", "20%", "--format", "json")
    assert result.code == 0, result.err
    h2o, streaming = json.loads(result.out)["policies"]
    assert h2o["policy"] == "h2o"
    assert h2o["tenths"][0] > 2 * h2o["tenths"][4]
    assert streaming["tenths"][:5] == [0.0] * 5  # the sinks are tokens of the instruction, before the document
    assert len(h2o["share"]) == h2o["document_tokens"]
    assert "heads" not in h2o


def test_text_is_a_strip_for_each_policy(cli: Any, model: str) -> None:
    result = inspect(cli, model)
    assert result.code == 0, result.err
    lines = result.text.splitlines()
    assert lines[0].startswith("auv: 10% of ")
    assert lines[3].startswith("h2o: 10% of ")
    for line in (lines[1], lines[4]):
        assert set(line.strip()) <= set("| ▁▂▃▄▅▆▇█")
        assert len(line) == len("  ||") + 76
    assert lines[2].count("%") == 10
    assert "full block" in lines[-1]


def test_one_head_of_one_layer(cli: Any, model: str) -> None:
    arguments = ("--policies", "auv", "--layer", "1", "--head", "0", "--budget", "64")
    record = json.loads(inspect(cli, model, *arguments, "--format", "json").out)["policies"][0]
    (head,) = record["heads"]
    assert (head["layer"], head["head"]) == (1, 0)
    assert [index for index, share in enumerate(record["share"]) if share] == head["tokens"]
    assert len(head["tokens"]) <= 64


def test_html_is_one_page_with_the_document(cli: Any, model: str) -> None:
    result = inspect(cli, model, "--html", "kept.html")
    assert result.code == 0, result.err
    assert "written: kept.html" in result.err
    page = Path(cli.folder / "kept.html").read_text(encoding="utf-8")
    assert page.count("<h2>") == 2
    assert "http" not in page
    assert "council" in "".join(part.split("<")[0] for part in page.split(">"))


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--policies", "auv,h3o"), 2, "h3o"),
        (("--layer", "7"), 2, "layer 7"),
        (("--head", "9"), 2, "KV head 9"),
        (("--policies", "snapkv", "--strategy", "stream"), 2, "snapkv"),
        (("--html", "no/where.html"), 1, "where.html"),
    ],
)
def test_mistakes(cli: Any, model: str, one_line: Any, arguments: tuple[str, ...], code: int, words: str) -> None:
    result = inspect(cli, model, *arguments)
    assert result.code == code
    assert result.out == b""
    assert words in result.err
    one_line(result.err)

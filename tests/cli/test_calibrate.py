"""`auvsum calibrate` on a tiny random model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import checkpoints
from tests.cli.conftest import Cli
from tests.cli.test_eval import documents, write


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(checkpoints.llama(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=4096))


@pytest.mark.parametrize("helps", [True, False])
def test_a_profile_is_made_and_kept_where_it_helps(
    cli: Cli, model: str, monkeypatch: pytest.MonkeyPatch, helps: bool
) -> None:
    from auvsum.eval.calibrate import Calibration

    judged = iter([0.5, 0.25, 0.5, 0.25] if helps else [0.25, 0.5, 0.25, 0.5])
    monkeypatch.setattr(Calibration, "_judge", lambda *_: next(judged))
    write(cli.folder / "rows.jsonl", documents(5))
    common = ("calibrate", model, "--data", "rows.jsonl", "--epochs", "1", "--threads", "1", "--dtype", "fp32")
    kept = Path(cli.env["HOME"]) / ".cache" / "auvsum" / "profiles" / "tiny.json"
    done = cli.inside(*common)
    assert "1 of 5 documents were left out; at 4% of the bytes they lose" in done.err
    if helps:
        assert (done.code, done.text) == (0, f"{kept}\n")
    else:
        assert (done.code, done.text) == (1, "")
        assert "does not help on documents it has not seen, and was not kept" in done.err
    assert kept.exists() is helps
    done = cli.inside(*common, "--out", "mine.json")
    assert (done.code, done.text) == (0, "mine.json\n")
    made = json.loads(Path("mine.json").read_text())
    assert made["model"] == model
    assert [len(made["read"]), len(made["read"][0])] == [2, 2]
    assert any(abs(number) > 0.01 for row in made["read"] for number in row)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--data", "two.jsonl"), 2, "1 documents are too few to learn from"),
        (("--data", "nowhere.jsonl"), 2, "nowhere.jsonl"),
        (("--data", "two.jsonl", "--half", "third"), 2, "half 'third' is unknown"),
        (("--epochs", "0"), 2, "epochs"),
    ],
)
def test_mistakes_are_told(
    cli: Cli, model: str, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], code: int, said: str
) -> None:
    monkeypatch.chdir(cli.folder)
    rows = documents(2)
    rows[1]["document"] = "  "
    write(cli.folder / "two.jsonl", rows)
    done = cli.inside("calibrate", model, "--threads", "1", *arguments)
    assert done.code == code
    assert said in done.err
    assert done.text == ""

"""From samples to `metrics.json` and to the sentences of `docs/RESULTS.md`, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from auvsum.eval.cells import cells
from auvsum.eval.config import EvalConfig
from auvsum.eval.encoder import Encoder
from auvsum.eval.metrics import Rouge
from auvsum.eval.results import results, verdicts
from auvsum.eval.runs import Run
from auvsum.eval.score import score
from auvsum.eval.tables import render

CONFIG = EvalConfig(
    dataset="rows.jsonl",
    policies=("h2o", "auv"),
    budgets=("10%",),
    budget_scopes=("bytes", "paper"),
    metrics=("fidelity", "rouge", "bertscore"),
)
#: By equal bytes AUV loses more than H2O, by the paper's accounting less.
NATS = {"h2o @ 10%": 0.5, "auv @ 10%": 0.9, "h2o @ 10% paper": 0.4, "auv @ 10% paper": 0.2}
WRITTEN = {"full": "The mill was sold in May.", "auv @ 10%": "The mill was sold in May, they said, for a good price."}


class Counting(Encoder):
    """Takes the share of a summary's words that are in the reference, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    @property
    def label(self) -> str:
        return "counting"

    def scores(self, hypotheses: Sequence[str], references: Sequence[str]) -> list[float]:
        self.asked += zip(hypotheses, references, strict=True)
        return [100 * len(set(h.split()) & set(r.split())) / max(1, len(h.split())) for h, r in self.asked]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "paper")
    run.begin(CONFIG, resume=False)
    for n in range(6):
        rows: dict[str, dict[str, Any]] = {}
        for cell in cells(CONFIG):
            rows[cell.name] = {"summary": WRITTEN.get(cell.name, "A mill was sold."), "bytes": 100, "slots": 4}
            if cell.kind != "text":
                rows[cell.name] |= {"agreement": 1.0, "nats": NATS.get(cell.name, 0.0) + 0.01 * n}
            if cell.kind == "cache":
                rows[cell.name]["kept"] = [0.0] * 9 + [1.0]
        tokens = {"document": 40, "prompt": 50}
        head = {"id": f"d{n}", "sha256": str(n), "reference": f"The mill number {n} was sold in May.", "tokens": tokens}
        rest = {"setting": "5-shot ### prompt, at most 8 new tokens", "shortened": 0, "full_bytes": 1000, "error": None}
        run.append({**head, **rest, "rows": rows})
    return run


def test_a_summary_is_scored_once_however_many_rows_wrote_it(run: Run) -> None:
    encoder = Counting()
    metrics = score(run, encoder=encoder)
    # What most rows wrote, what the full cache wrote, and AUV's, whole and cut to the full cache's length.
    assert len(encoder.asked) == len(set(encoder.asked)) == 6 * 4
    row = metrics["rows"]["auv @ 10%"]
    texts = [(WRITTEN["auv @ 10%"], f"The mill number {n} was sold in May.") for n in range(6)]
    rouge = Rouge()
    expected = [rouge.scores(*pair)["rouge1"] for pair in texts]
    assert row["documents"]["rouge1"] == pytest.approx(expected, abs=1e-4)
    assert row["scores"]["bertscore"]["mean"] == pytest.approx(100 * 5 / 12)
    assert row["scores"]["bertscore@matched"]["mean"] == pytest.approx(100 * 5 / 6)
    assert set(row["documents"]) == {"agreement", "nats", "rouge1", "bertscore"}


def test_equal_bytes_and_the_papers_accounting_stand_beside_each_other(run: Run) -> None:
    metrics = score(run, encoder=Counting())
    found = {one.scope: one for one in verdicts(metrics, "auv", "h2o", "nats")}
    assert (found["bytes"].which, found["paper"].which) == ("worse", "better")
    assert found["bytes"].mean == pytest.approx(0.4)
    assert len(verdicts(metrics, "h2o", "auv", "nats")) == 2
    assert [one.which for one in verdicts(metrics, "h2o", "auv", "nats")] == ["better", "worse"]
    assert verdicts(metrics, "auv", "h2o", "rouge1")[0].which == "better"
    pairs = [(metrics["rows"][p["first"]], metrics["rows"][p["second"]]) for p in metrics["paired"]]
    with_full = [pair for pair in pairs if pair[0]["kind"] == "full"]
    assert 0 < len(with_full) < len(pairs)
    assert all(one["scope"] == other["scope"] for one, other in pairs if one["kind"] != "full")
    text = results([run])
    assert "2 settings: **better in 1** (paper (paper accounting) 10%); **worse in 1** (paper 10%)" in text
    assert "of the 2 with the paper's five examples better in 1, worse in 1." in text
    assert "| paper | 5-shot | 6 | _+0.40 [+0.40, +0.40]_ |" in text
    assert "| paper (paper accounting) | 5-shot | 6 | **-0.20 [-0.20, -0.20]** |" in text


def test_a_summary_that_the_encoder_cannot_read_is_told(run: Run) -> None:
    samples = list(run.samples())
    samples[2]["rows"]["h2o @ 10%"]["summary"] = "*"
    samples[3]["rows"]["h2o @ 10%"]["summary"] = " "
    (run.path / "samples.jsonl").unlink()
    for sample in samples:
        run.append(sample)
    notes = score(run, encoder=Counting())["notes"]
    assert "summaries in which the encoder knows no word, so that their BERTScore is 0: 1 of h2o @ 10%" in notes
    assert "summaries that are empty, so that all their scores are 0: 1 of h2o @ 10%" in notes


def test_a_truncation_that_holds_more_bytes_is_no_comparison(run: Run) -> None:
    score(run, encoder=None)
    said = "Truncating the prompt to the same bytes loses fewer nats than h2o @ 10%, auv @ 10%."
    assert said in results([run])
    samples = list(run.samples())
    (run.path / "samples.jsonl").unlink()
    for sample in samples:
        sample["rows"]["truncated prompt @ 10%"]["bytes"] = 111
        run.append(sample)
    notes = score(run, encoder=None)["notes"]
    assert [note for note in notes if note.startswith("truncated prompt @ 10% holds more bytes")]
    assert "Truncating" not in results([run])


def test_what_is_compared_has_its_interval(run: Run) -> None:
    score(run, encoder=Counting())
    (line,) = [line for line in render([run], "md").splitlines() if line.startswith("| h2o @ 10% |")]
    assert "| 0.525 [0.5" in line
    assert line.endswith("| 0%, 100% | 6 |")
    rouge = Rouge().scores("A mill was sold.", "The mill number 0 was sold in May.")["rouge1"]
    assert f"| {rouge:.1f} |" in line  # the same for all six: no interval to show

"""Scores, statistics, text rules and the run directory of the evaluation."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from sumy.summarizers.lex_rank import LexRankSummarizer

from auvsum.budget import CacheShape
from auvsum.errors import ConfigError, DatasetError, MetricError, RunError
from auvsum.eval.cells import cells, resolved, shade, tenths
from auvsum.eval.config import EvalConfig, split_list, split_policy
from auvsum.eval.datasets import Example, load_examples, sample_file
from auvsum.eval.encoder import Encoder
from auvsum.eval.metrics import ROUGE, Rouge, estimate, paired, rouge_scores, rouge_sees
from auvsum.eval.plots import pareto
from auvsum.eval.recipes import configurations
from auvsum.eval.runner import select
from auvsum.eval.runs import Run
from auvsum.eval.texts import arrange, first_words, lexrank, paragraphs, sentences

ROOT = Path(__file__).parents[2]


def test_rouge_of_known_pairs() -> None:
    rouge = Rouge()
    assert rouge.scores("The mill was sold.", "The mill was sold.") == dict.fromkeys(
        ("rouge1", "rouge2", "rougeL", "rougeLsum"), pytest.approx(100)
    )
    found = rouge.scores("the mill was sold", "the mill burned")
    assert found["rouge1"] == pytest.approx(100 * 2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3))
    assert rouge.scores("", "the mill")["rouge1"] == 0
    # Sentences in another order: the longest common subsequence suffers, the summary-level one does not.
    swapped = rouge.scores("They left the town. The mill was sold.", "The mill was sold. They left the town.")
    assert swapped["rougeLsum"] == pytest.approx(100)
    assert swapped["rougeL"] < 60


def test_rouge_is_that_of_the_package() -> None:
    """Ties among longest common subsequences included: few different words make many of them."""
    draw = random.Random(0)
    plain, ours = RougeScorer(list(ROUGE), use_stemmer=True), Rouge()
    for _ in range(300):
        words = [f"{stem}{ending}" for stem in ("mill", "bank", "town") for ending in ("", "s", "ing", "ed")]
        known = words[: draw.choice((2, 5, 12))]

        def text(known: list[str] = known) -> str:
            return "\n\n".join(" ".join(draw.choices(known, k=draw.randint(1, 14))) for _ in range(draw.randint(1, 5)))

        hypothesis, reference = text(), text()
        found = plain.score(*("\n".join(sentences(one)) for one in (reference, hypothesis)))
        assert ours.scores(hypothesis, reference) == {
            name: pytest.approx(100 * score.fmeasure, abs=1e-12) for name, score in found.items()
        }


def test_rouge_by_processes_is_rouge() -> None:
    pairs = [(f"the mill was sold to {name}", "a mill was sold") for name in ("him", "her", "nobody", "a mill")]
    assert rouge_scores(pairs, jobs=2) == rouge_scores(pairs) == [Rouge().scores(*pair) for pair in pairs]


def test_an_empty_reference_is_refused() -> None:
    with pytest.raises(MetricError):
        Rouge().scores("text", " ")


def test_rouge_is_blind_outside_latin_letters() -> None:
    assert rouge_sees("The mill was sold, 1,200 said.")
    assert not rouge_sees("Мельницу у реки продали")
    assert not rouge_sees("工厂 被 出售")


def test_bootstrap_is_seeded_and_holds_the_mean() -> None:
    values = [float(i % 7) for i in range(40)]
    one, two = estimate(values), estimate(values)
    assert one == two
    assert one.low < one.mean < one.high
    assert one.count == 40
    spread = math.sqrt(sum((v - one.mean) ** 2 for v in values) / 40 / 40)
    assert one.high - one.low == pytest.approx(2 * 1.96 * spread, rel=0.15)
    assert estimate([3.0]).low == 3.0


def test_resamples_are_those_of_pythons_generator() -> None:
    values = [math.sin(i) for i in range(23)]
    draw = random.Random(3)
    means = sorted(math.fsum(draw.choices(values, k=23)) / 23 for _ in range(2000))
    found = estimate(values, seed=3)
    assert (found.low, found.high) == (pytest.approx(means[50], abs=1e-12), pytest.approx(means[1949], abs=1e-12))


def test_paired_differences_are_narrower_than_their_parts() -> None:
    first = [float(i) for i in range(30)]
    second = [value + 0.5 + 0.01 * (i % 3) for i, value in enumerate(first)]
    difference = paired(second, first)
    assert difference.low > 0.49
    assert difference.high - difference.low < 0.02


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_is_never_averaged_away(bad: float) -> None:
    with pytest.raises(MetricError):
        estimate([1.0, bad])


def test_bertscore_leaves_empty_hypotheses_to_nobody() -> None:
    encoder = Encoder.__new__(Encoder)  # no model: it must not be asked
    assert encoder.scores(["", "  "], ["a", "b"]) == [0.0, 0.0]


def test_bertscore_is_asked_for_one_reference_at_once_and_answers_in_order() -> None:
    class Scorer:
        def __init__(self) -> None:
            self.calls: list[list[str]] = []

        def score(self, hypotheses: list[str], references: list[str], batch_size: int) -> tuple[Any, Any, torch.Tensor]:
            self.calls.append(references)
            return None, None, torch.tensor([float(hypothesis) for hypothesis in hypotheses])

    encoder = Encoder.__new__(Encoder)
    encoder._scorer = Scorer()
    asked = [(str(i), "abc"[i % 3] * (i % 3 + 1)) for i in range(1501)]
    found = encoder.scores([hypothesis for hypothesis, _ in asked], [reference for _, reference in asked])
    assert found == [100.0 * i for i in range(1501)]
    assert [len(set(call)) for call in encoder._scorer.calls] == [1, 1, 1]
    with pytest.raises(MetricError):
        encoder.scores(["a"], [" "])


def test_sentences_keep_abbreviations_and_numbers() -> None:
    text = 'Mr. Smith paid $1.5 million. He left the U.S. in May! "Why?" she asked.\n\nThe end'
    assert sentences(text) == [
        "Mr. Smith paid $1.5 million.",
        "He left the U.S. in May!",
        '"Why?" she asked.',
        "The end",
    ]
    assert first_words("a  b\nc d", 3) == "a b c"


def test_conditions_move_paragraphs_and_lose_none() -> None:
    document = "\n\n".join(f"Paragraph {word} says {word} again." for word in ("one", "two", "three", "four", "five"))
    plain = arrange(document, "two", "plain", seed=0, id="a")
    shuffled = arrange(document, "two", "shuffled", seed=0, id="a")
    last = arrange(document, "It says two.", "key-last", seed=0, id="a")
    assert plain == document
    assert sorted(paragraphs(shuffled)) == sorted(paragraphs(document)) == sorted(paragraphs(last))
    assert shuffled == arrange(document, "two", "shuffled", seed=0, id="a") != document
    assert last.endswith("Paragraph two says two again.")
    assert arrange(document, "", "key-last", seed=0, id="a").endswith("Paragraph one says one again.")
    assert len(paragraphs("One. Two. Three. Four. Five.")) == 2


def test_lexrank_puts_the_central_sentence_first_and_respects_the_length() -> None:
    text = (
        "Rain fell hard. Birds sang on. Apples cost more today. Bridges close one month. "
        "Apples bridges castles dragons. Castles stand very tall. Dragons sleep until noon. Snow covers fields."
    )
    assert lexrank(text, 4) == "Apples bridges castles dragons."
    assert lexrank(text, 3) == "Apples bridges castles"
    assert len(lexrank(text, 12).split()) == 12
    assert lexrank(text, 0) == ""


def test_the_quick_lexrank_ranks_as_sumy_does(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "samples" / "beige-book.txt").read_text(encoding="utf-8")[:12_000] + "\n\n--\n\n--"
    quick = [lexrank(text, words) for words in (40, 120, 10_000)]
    monkeypatch.setattr("auvsum.eval.texts._ranker", LexRankSummarizer)
    assert quick == [lexrank(text, words) for words in (40, 120, 10_000)]


def test_policies_with_options_and_budgets_make_cells() -> None:
    assert split_list("h2o, auv(decay=0.9,top_k=8)") == ("h2o", "auv(decay=0.9,top_k=8)")
    assert split_policy("auv(decay=0.9,reconstruct=false)") == ("auv", {"decay": 0.9, "reconstruct": False})
    with pytest.raises(ConfigError):
        split_policy("auv(decay=0.9")
    config = EvalConfig(policies=("h2o", "auv(decay=0.9)"), budgets=("4%", "10%"), budget_scopes=("bytes", "paper"))
    names = [cell.name for cell in cells(config)]
    assert names[:5] == ["full", "first words", "LexRank", "truncated prompt @ 4%", "truncated prompt @ 10%"]
    assert "auv(decay=0.9) @ 4% paper" in names
    assert len(names) == len(set(names)) == 5 + 8
    shape = CacheShape(layers=2, kv_heads=2, head_dim=16, element_bytes=2)
    cell = next(cell for cell in cells(config) if cell.name == "h2o @ 10%")
    budget = resolved(cell, shape, 1000, 64)
    assert budget.bytes <= 0.1 * 1000 * shape.token_bytes
    assert budget.slots == (0.1 * 1000 * shape.token_bytes / 2 - (37 + 8 * 2)) // (2 * (2 * 16 * 2 + 4 + 5))


def test_kept_shares_by_tenth_and_as_digits() -> None:
    kept = [1.0] * 10 + [0.0] * 80 + [0.5] * 10
    assert tenths(kept, 0, 100) == [1.0, *[0.0] * 8, 0.5]
    assert tenths(kept, 0, 3) == [1.0, 1.0, 1.0]
    assert shade([0.0, 0.01, 0.5, 1.0]) == "0159"


def test_the_pareto_front_is_what_nothing_beats() -> None:
    points = [(1.0, 5.0), (2.0, 4.0), (3.0, 6.0), (2.5, 5.5), (4.0, 6.0)]
    assert pareto(points, more_is_better=True) == [(1.0, 5.0), (2.5, 5.5), (3.0, 6.0)]
    assert pareto(points, more_is_better=False) == [(1.0, 5.0), (2.0, 4.0)]


def test_a_configuration_survives_its_file(tmp_path: Path) -> None:
    config = EvalConfig(dataset="xsum", policies=("auv(top_k=4)",), budgets=("512", "4%"), columns={"document": "text"})
    run = Run(tmp_path / "run")
    run.begin(config, resume=False)
    assert run.config == config
    run.begin(config, resume=False)  # nothing measured yet
    with pytest.raises(RunError, match="seed differ"):
        run.begin(EvalConfig.from_mapping({**vars(config), "seed": 1}), resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match="not a run"):
        Run(tmp_path / "other").begin(config, resume=True)


def test_a_number_that_is_none_never_reaches_a_file(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with pytest.raises(ValueError, match="JSON"):
        run.append({"nats": math.nan})
    rest = {"sha256": "", "error": None, "rows": {}}
    run.append({"id": "a", **rest})
    with (tmp_path / "samples.jsonl").open("a") as killed:
        killed.write('{"id": "b", "ro')
    assert [sample["id"] for sample in run.samples()] == ["a"]
    run.append({"id": "c", **rest})
    assert [sample["id"] for sample in run.samples()] == ["a", "c"]


def test_files_and_their_columns(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"article": "a\u2028b", "highlights": "s"}, ensure_ascii=False) + "\n", encoding="utf-8")
    (example,) = load_examples(str(path), columns={"document": "article", "summary": "highlights"})
    assert (example.id, example.document, example.reference) == ("row-1", "a\u2028b", "s")
    for text, message in [
        ("{}\n", "row 1 has no column 'document'; there is: nothing"),
        ('{"document": 5, "summary": ""}\n', "document is not text but 5"),
        ('{"document": "a", "summary": NaN}\n', "summary is not text but nan"),
        ("not json\n", "line 1 is not JSON"),
        ("\n", "holds no rows"),
        ('{"id": "x", "document": "a", "summary": ""}\n' * 2, "the id 'x' is there twice"),
    ]:
        path.write_text(text, encoding="utf-8")
        with pytest.raises(DatasetError, match=message):
            load_examples(str(path))


def test_parquet(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"id": ["a"], "document": ["text"], "summary": [None]})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    (example,) = load_examples(str(tmp_path / "rows.parquet"))
    assert (example.document, example.reference) == ("text", "")


def test_the_sample_rows_are_whole() -> None:
    assert sample_file().is_file()
    examples = load_examples("sample")
    assert len(examples) == 8
    assert all(example.document and example.reference for example in examples)


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs" / "paper").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_papers_recipes_are_configurations(recipe: Path) -> None:
    found = dict(configurations(recipe, {}))
    assert any(config.model.startswith("opt-13b") for config in found.values())
    assert any(config.model == EvalConfig.model for config in found.values())
    assert all(config.budget_scopes == ("bytes", "paper") and config.metrics for config in found.values())
    (only,) = configurations(recipe, {"limit": 3}, only=[name.split("/")[1] for name in list(found)[:1]])
    assert only[1].limit == 3
    with pytest.raises(ConfigError):
        configurations(recipe, {}, only=["nothing"])


def test_a_half_has_every_other_row_of_the_file() -> None:
    rows = [Example(str(i), "a document " * (i + 1), "a summary") for i in range(21)]
    halves = {
        half: [row.id for row in select(EvalConfig(dataset="mine.jsonl", half=half), rows)[1]]
        for half in ("even", "odd", "all")
    }
    assert halves["odd"] == [str(i) for i in range(1, 21, 2)]
    assert halves["even"] == [str(i) for i in range(0, 21, 2)]
    assert len(halves["all"]) == 21
    drawn = [row.id for row in select(EvalConfig(dataset="mine.jsonl", half="odd", limit=4, shots=5), rows)[1]]
    assert len(drawn) == 4
    assert set(drawn) <= set(halves["odd"])
    with pytest.raises(ConfigError, match="half"):
        EvalConfig(half="first")

"""Documents past the positions, with tiny models: every strategy reads all of them, and says what it did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from auvsum.errors import BudgetError, DocumentTooLong, PolicyError
from auvsum.events import Event, PrefillProgress
from auvsum.summarize import Summarizer
from auvsum.text.readers import Document
from tests import checkpoints

#: About 60 tokens of the tiny tokenizers.
SENTENCE = "The council met in the town hall and there it decided to build a bridge. "
LONG = "\n\n".join(f"# Part {i}\n\n" + SENTENCE * 4 for i in range(1, 9))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "llama": str(checkpoints.llama(folder / "llama", max_position_embeddings=768)),
        "opt": str(checkpoints.opt(folder / "opt", max_position_embeddings=768)),
    }


def summarizer(folder: str, **settings: Any) -> Summarizer:
    settings = {"budget": "100", "max_tokens": 16, "chunk": 128, "dtype": "fp32", "device": "cpu", **settings}
    return Summarizer.from_pretrained(folder, **settings)


def test_auto_reads_long_documents_in_windows(folders: dict[str, str]) -> None:
    model = summarizer(folders["llama"])
    assert model.plan(SENTENCE).strategy == "single"
    plan = model.plan(LONG)
    assert (plan.strategy, plan.cut_tokens) == ("map-rank", 0)
    assert any("auto chose it" in warning for warning in plan.warnings)


def test_auto_reads_what_fits_in_windows_where_the_model_is_small(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from auvsum import strategies

    text = SENTENCE * 8
    monkeypatch.setattr(strategies, "WINDOW", 100)
    model = summarizer(folders["llama"], budget="auto")
    plan = model.plan(text)
    assert 300 < len(plan.prompt.ids) + 16 < 768
    assert plan.strategy == "map-rank"
    assert model.plan(SENTENCE * 2).strategy == "single"
    for settings in ({"budget": "100"}, {"budget": "auto", "policy": "h2o"}, {"budget": "auto", "query": "what"}):
        assert summarizer(folders["llama"], **settings).plan(text).strategy == "single"
    monkeypatch.setattr(strategies, "_SMALL", 10)
    assert model.plan(text).strategy == "single"


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("strategy", ["stream", "map-reduce", "map-rank"])
def test_every_strategy_reads_all_of_a_long_document(family: str, strategy: str, folders: dict[str, str]) -> None:
    model = summarizer(folders[family], strategy=strategy)
    events: list[Event] = []
    pieces: list[str] = []
    summary = model.summarize(LONG, id="a", source="b", on_event=events.append, on_text=pieces.append)
    record = summary.record()
    limit = model.loaded.max_positions
    assert limit is not None
    assert (record["id"], record["source"], record["strategy"]) == ("a", "b", strategy)
    assert record["truncated"] is False
    assert record["tokens"]["document"] > 2 * limit
    assert "".join(pieces).strip() == summary.text
    assert record["warnings"]
    progress = [event for event in events if isinstance(event, PrefillProgress)]
    assert [event.done_tokens for event in progress if event.done_tokens == event.total_tokens]
    if strategy == "stream":
        assert any("approximation" in warning for warning in record["warnings"])
        assert record["kv"]["peak_bytes"] < record["kv"]["full_bytes"] / 10
        assert progress[-1].total_tokens == record["tokens"]["prompt"]
    else:
        assert record["tokens"]["generated"] > 16
        assert any("windows" in warning for warning in record["warnings"])


def test_the_summary_of_map_reduce_is_that_of_its_windows_summaries(folders: dict[str, str]) -> None:
    """By hand: cut, summarize each window by itself, join under headings, summarize."""
    from auvsum import rounds

    model = summarizer(folders["llama"], strategy="map-reduce", window=500, budget="60%")
    plan = model.plan(LONG)
    how = rounds.mapping(plan.prompt, model.settings, model.loaded, plan.max_new_tokens)
    windows = rounds.cut_windows(LONG, how.room, model.loaded.tokenizer)
    assert len(windows) > 2
    alone = summarizer(folders["llama"], strategy="single", budget="60%", max_tokens=how.max_new_tokens)
    parts = [alone.summarize(window.text).text for window in windows]
    joined = rounds.join(windows, parts)
    assert joined.count("# Part") >= 2
    assert model.summarize(LONG).text == alone.summarize(joined).text


def test_map_rank_keeps_sentences_of_its_windows_summaries(folders: dict[str, str]) -> None:
    """By hand: cut, summarize each window by itself in few tokens, keep the best sentences and some of the document."""
    from auvsum import rounds
    from auvsum.text.central import gathered

    settings: dict[str, Any] = {"window": 500, "budget": "60%"}
    model = summarizer(folders["llama"], strategy="map-rank", max_tokens=200, **settings)
    plan = model.plan(LONG)
    assert len(plan.windows) > 2
    part = 2 * 200 // len(plan.windows)
    assert part > rounds.PART_RANKED
    alone = summarizer(folders["llama"], strategy="single", max_tokens=part, **settings)
    parts = [alone.summarize(window.text).text for window in plan.windows]
    count = rounds._counter(model.loaded.tokenizer)
    heard: list[str] = []
    summary = model.summarize(LONG, on_text=heard.append)
    assert summary.text == "".join(heard) == gathered(plan.windows, parts, 200, count)
    assert summary.record()["tokens"]["generated"] == sum(len(alone.summarize(w.text).token_ids) for w in plan.windows)
    (alike,) = model.run([Document("a", LONG, "utf-8")], together=False)
    assert alike.record()["summary"] == summary.text


def _words(pieces: Any) -> list[int]:
    return [len(piece.split()) for piece in pieces]


def test_the_best_sentences_are_central_whole_and_of_all_parts() -> None:
    from auvsum.text import central

    def best(parts: list[str], room: int, most: int | None = None, known: tuple[str, ...] = ()) -> str:
        return " ".join(text for _, text in central.best_sentences(parts, room, _words, most, known))

    first = "Prices rose in the north. Nobody knew of snow. Prices rose in the"
    second = "Prices rose in the south too. Prices rose in the north."
    third = "Wages and prices rose in the east. Wages rose in the"
    all_three = [first, second, third]
    north, south, east = (
        "Prices rose in the north.",
        "Prices rose in the south too.",
        "Wages and prices rose in the east.",
    )
    assert best(all_three, 24) == f"{north} {south} {east}"
    assert central.best_sentences(all_three, 24, _words) == [(0, north), (1, south), (2, east)]
    assert best(all_three, 100, most=1).count(".") == 1
    assert best(all_three, 100).count(north) == 1
    assert best(all_three, 100, known=(north,)).count(north) == 0
    assert "Nobody knew" in best(all_three, 100)
    assert best(["a summary that was cut off"], 3) == "a summary that was cut off"
    assert best(["", "…"], 10) == ""


def test_a_summary_from_windows_has_the_documents_first_and_central_sentences() -> None:
    """A quarter each; in the order of the document, what is written of a window before the window's own sentences."""
    from auvsum.text import central
    from auvsum.text.windows import Window

    opening = "The council of the town met twice in May."
    hub = "The bridge, its toll and the harbour cost money."
    others = ["The bridge and the toll were old and grey.", "The harbour has a long wall made of stone."]
    text = "\n\n".join(["Minutes", opening, others[0], hub, others[1], "It rained for a day, says Ms Lane of York."])
    middle = text.index(others[1])
    windows = [Window(text, 0, middle, "", 0), Window(text, middle, len(text), "", 0)]
    parts = ["A bridge is planned by the council.", "A harbour is planned by the council."]
    assert central.gathered(windows, parts, 48, _words) == " ".join([opening, parts[0], hub, parts[1]])
    assert central.gathered(windows, parts, 100, _words, most=4).count(".") == 4
    assert central.gathered(windows, parts, 48, _words, most=3) == " ".join(parts)
    assert central.gathered(windows, [opening, parts[1]], 48, _words).count(opening) == 1
    assert central.gathered(windows, ["", "…"], 48, _words) == ""


def test_extract_summarizes_the_central_sentences(folders: dict[str, str]) -> None:
    """By hand: half of the summary is written from the central sentences, the rest is the document's own."""
    from auvsum import rounds
    from auvsum.text.central import gathered
    from auvsum.text.windows import Window

    text = (Path(__file__).parents[2] / "samples" / "money-bail.txt").read_text(encoding="utf-8")[:9000]
    model = summarizer(folders["llama"], strategy="extract", window=300, budget="60%", max_tokens=160)
    plan = model.plan(text)
    (window,) = rounds.sentences_to_read(text, 300, model.loaded.tokenizer)
    assert 150 < window.tokens <= 310
    assert plan.strategy == "extract"
    assert plan.document_tokens > 10 * window.tokens
    assert f"the {window.tokens:,} tokens of the central sentences" in plan.warnings[0]
    alone = summarizer(folders["llama"], strategy="single", budget="60%", max_tokens=80)
    written = alone.summarize(window.text)
    count = rounds._counter(model.loaded.tokenizer)
    expected = gathered([Window(text, 0, len(text), "", 0)], [written.text], 160, count)
    summary = model.summarize(text)
    assert summary.text == expected
    assert len(expected) > len(written.text)
    assert summary.record()["tokens"]["generated"] == len(written.token_ids)
    # What holds no sentences is read in windows; what is short is read whole.
    assert len(model.plan("abc " * 2000).windows) > 1
    assert model.plan(SENTENCE).windows[0].text == SENTENCE.strip()


def test_central_sentences_share_a_topic_and_every_block_keeps_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    from auvsum.text import central

    topic = ["apples", "bridges", "castles", "dragons", "elephants"]
    hub = "Apples bridges castles dragons elephants."
    spokes = [f"{word.title()} {' '.join(f'{word}{i}' for i in range(5))}." for word in topic]
    ranks = central.lexrank([text.lower().rstrip(".").split() for text in [*spokes, hub, "snow falls on a hill"]])
    assert ranks.index(max(ranks)) == len(spokes)
    assert sum(ranks) == pytest.approx(1, abs=1e-4)
    text = " ".join([*spokes[:3], hub, *spokes[3:], hub, "Yes."])

    def count(pieces: Any) -> list[int]:
        return [len(piece.split()) for piece in pieces]

    assert central.central_sentences(text, 6, count) == hub  # once, though it is said twice
    assert central.central_sentences("Yes. No.", 100, count) == ""
    monkeypatch.setattr(central, "BLOCK", 8)
    blocks = "\n\n".join(" ".join(f"Word{b} again{b} and{i} so{i} on{i}." for i in range(8)) for b in range(4))
    chosen = central.central_sentences(blocks, 4 * 12, count)
    assert [chosen.count(f"Word{b} ") for b in range(4)] == [2, 2, 2, 2]
    assert chosen.startswith("Word0")


def test_single_refuses_and_truncate_cuts(folders: dict[str, str]) -> None:
    with pytest.raises(DocumentTooLong, match="768 positions") as caught:
        summarizer(folders["llama"], strategy="single").plan(LONG)
    assert "--truncate" in caught.value.hint
    plan = summarizer(folders["llama"], truncate=True).plan(LONG)
    assert plan.strategy == "single"
    assert plan.cut_tokens > 0


def test_what_cannot_stream_says_so(folders: dict[str, str]) -> None:
    with pytest.raises(PolicyError, match="full"):
        summarizer(folders["llama"], strategy="stream", policy="full", budget="auto").plan(LONG)
    with pytest.raises(BudgetError, match="windows share"):
        summarizer(folders["opt"], strategy="stream", budget="6").plan(LONG)
    with pytest.raises(BudgetError, match="chunk"):
        summarizer(folders["llama"], strategy="stream", chunk=800).plan(LONG)
    plan = summarizer(folders["llama"], strategy="stream", budget="auto").plan(LONG)
    assert plan.policy.name == "auv"
    assert plan.budget.slots + 128 <= 768


def test_stream_within_the_positions_is_left_alone(folders: dict[str, str]) -> None:
    plan = summarizer(folders["llama"], strategy="stream").plan(SENTENCE * 3)
    assert (plan.strategy, plan.parts) == ("stream", ())


def test_query_style_and_citations(folders: dict[str, str]) -> None:
    model = summarizer(folders["llama"], query="what was built", style="bullets", cite=True)
    plan = model.plan(SENTENCE)
    assert "what was built?" in model.loaded.tokenizer.decode(plan.prompt.ids)
    record = model.summarize(SENTENCE).record()
    assert record["summary"] == "" or record["summary"].startswith("- ")
    assert isinstance(record["citations"], list)
    assert isinstance(record["unsupported"], list)
    assert "citations" not in summarizer(folders["llama"]).summarize(SENTENCE).record()


def test_a_long_text_tokenizes_in_pieces_as_it_does_whole(folders: dict[str, str], monkeypatch: Any) -> None:
    from auvsum.text import prompts

    tokenizer = summarizer(folders["llama"]).loaded.tokenizer
    text = (Path(__file__).parents[2] / "samples" / "money-bail.txt").read_text(encoding="utf-8")
    whole = prompts._encode_data(tokenizer, text)
    monkeypatch.setattr(prompts, "_PIECE", 1000)
    assert len(prompts.safe_pieces(tokenizer, text)) > 5
    assert prompts._encode_data(tokenizer, text) == whole
    # One that puts a mark before every text would change: it gets the text whole.
    marking = type("Marking", (), {"encode": lambda self, part, **_: [0, *tokenizer.encode(part)]})()
    assert prompts.safe_pieces(marking, text) == [text]


def test_windows_of_several_documents_are_written_together(folders: dict[str, str]) -> None:
    """Map-reduce of a folder: the same summaries as one by one, in the order of the documents, failures apart."""
    from auvsum.batch import Failure
    from auvsum.events import DocumentDone, DocumentStarted
    from auvsum.summarize import Summary

    texts = [LONG, SENTENCE * 2, LONG.replace("bridge", "tower"), "  ", LONG.replace("hall", "square")]
    documents = [Document(str(i), text, "utf-8", warnings=(f"note {i}",)) for i, text in enumerate(texts)]
    model = summarizer(folders["llama"], window=500, budget="400", batch_size="3", cite=True)
    engines: list[int] = []
    made = model.engine
    model.engine = lambda *given: engines.append(1) or made(*given)  # type: ignore[func-returns-value, method-assign]
    events: list[Event] = []
    together = list(model.run(documents, on_event=events.append))
    assert len(engines) <= 3
    assert isinstance(together[3], Failure)
    alone = [model.summarize(text) for text in texts if text.strip()]
    summaries = [summary for summary in together if isinstance(summary, Summary)]
    assert [summary.text for summary in summaries] == [summary.text for summary in alone]
    assert [summary.source for summary in summaries] == ["0", "1", "2", "4"]
    assert all(f"note {summary.source}" in summary.warnings and summary.citations for summary in summaries)
    assert summaries[0].generated_tokens == alone[0].generated_tokens > 16
    assert [event.request for event in events if isinstance(event, DocumentStarted)] == [0, 1, 2, 4]
    assert sorted(event.request for event in events if isinstance(event, DocumentDone)) == [0, 1, 2, 4]


def test_a_document_whose_window_fails_stops_no_other(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    from auvsum.batch import Failure
    from auvsum.engine.generate import Engine
    from auvsum.errors import GenerationFailed
    from auvsum.summarize import Summary

    drawn = Engine._draw

    def broken(self: Engine, row: Any, logits: Any) -> int:
        if row.index == 1 and len(row.written) == 3:
            raise GenerationFailed("no numbers")
        return drawn(self, row, logits)

    monkeypatch.setattr(Engine, "_draw", broken)
    model = summarizer(folders["llama"], window=500, budget="400", batch_size="3")
    results = list(model.run([Document(str(i), LONG, "utf-8") for i in range(2)]))
    assert isinstance(results[0], Failure)
    assert isinstance(results[1], Summary)
    with pytest.raises(GenerationFailed):
        model.summarize(LONG)


def test_a_question_to_a_long_document_is_asked_of_its_passages(folders: dict[str, str]) -> None:
    text = LONG + "\n\nThe lighthouse keeper is called Marigold.\n\n" + LONG
    model = summarizer(folders["llama"], query="who is the keeper of the lighthouse")
    plan = model.plan(text)
    assert plan.strategy == "map-reduce"
    assert any("passages" in warning for warning in plan.warnings)
    asked = model.summarize(text)
    passage = "The lighthouse keeper is called Marigold."
    alone = summarizer(folders["llama"], query="who is the keeper of the lighthouse").summarize(passage)
    assert asked.text == alone.text
    assert asked.record()["warnings"][0] == plan.warnings[0]
    # Nothing in common: every window is asked.
    assert any("windows" in warning for warning in summarizer(folders["llama"], query="xyz").plan(text).warnings)


def test_a_very_long_text_is_never_tokenized_whole(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    from auvsum import strategies

    model = summarizer(folders["llama"])
    whole = model.plan(LONG)
    monkeypatch.setattr(strategies, "_CHARACTERS", 0.1)
    plan = model.plan(LONG)
    assert len(plan.prompt.ids) == plan.prompt.frame_tokens == whole.prompt.frame_tokens
    assert plan.document_tokens == pytest.approx(whole.document_tokens, rel=0.02)
    assert plan.prompt_tokens == plan.document_tokens + plan.prompt.frame_tokens
    assert [window.text for window in plan.windows] == [window.text for window in whole.windows]
    assert plan.budget.slots == whole.budget.slots
    # One that fits after all is read as it would have been.
    short = SENTENCE * 3
    expected = model.summarize(short).text if model.plan(short).windows else None
    with monkeypatch.context() as patch:
        patch.setattr(strategies, "_CHARACTERS", 64)
        assert model.plan(short).strategy == "single"
        assert model.summarize(short).text == expected

"""The passages that a question is asked of."""

from __future__ import annotations

import pytest

from auvsum.text.passages import best_passages

TEXT = "\n\n".join(
    [
        "The council met in the hall and spoke about the weather.",
        "The bridge was built of stone, and its builder was paid in silver.",
        "Nobody remembers who built the tower.",
        "Silver, silver: the price of silver rose.",
    ]
)


def test_the_most_telling_words_decide_and_the_order_is_the_texts() -> None:
    assert best_passages(TEXT, "Who was the builder of the bridge?", 80).startswith("The bridge")
    found = best_passages(TEXT, "what about silver and the bridge", 200)
    assert found.split("\n\n") == [TEXT.split("\n\n")[1], TEXT.split("\n\n")[3]]


def test_no_shared_word_no_passage_and_no_more_than_asked_for() -> None:
    assert best_passages(TEXT, "which of the gardens is it about", 1000) == ""
    assert best_passages(TEXT, "silver", 10) == ""
    assert len(best_passages(TEXT, "silver", 50)) <= 50
    assert best_passages("", "silver", 50) == ""


@pytest.mark.parametrize("blank", [" ", ""])
def test_a_run_without_paragraphs_is_looked_at_in_pieces(blank: str) -> None:
    text = blank.join(["word"] * 2000) + " the needle is here " + blank.join(["word"] * 2000)
    found = best_passages(text, "needles", 2000)
    assert "needle" in found
    assert len(found) <= 2000

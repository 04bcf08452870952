"""Windows are the whole text, in order, within their room; shapes of summaries."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from auvsum.text.styles import question, shaped
from auvsum.text.windows import cut, sentences


def words(pieces: list[str]) -> list[int]:
    return [len(piece.split()) for piece in pieces]


SENTENCE = "The council met and decided on it. "


def test_paragraphs_stay_whole_and_windows_are_even() -> None:
    paragraphs = [SENTENCE * 4 for _ in range(10)]
    windows = cut("\n\n".join(paragraphs), 100, words)
    assert all(len(window.text.split()) % 28 == 0 for window in windows)
    assert max(len(window.text.split()) for window in windows) <= 100


def test_long_paragraphs_are_cut_at_sentences_and_runs_anywhere() -> None:
    assert all(window.text.endswith("it.") for window in cut(SENTENCE * 60, 50, words))
    assert all(len(window.text) <= 50 for window in cut("x" * 1000, 50, lambda pieces: [len(p) for p in pieces]))


def test_headings_go_along() -> None:
    text = f"# One\n\n{SENTENCE * 10}\n\n# Two\n\n{SENTENCE * 30}"
    windows = cut(text, 80, words)
    assert windows[0].heading == "# One"
    assert windows[-1].heading == "# Two"


@settings(max_examples=60, deadline=None)
@given(st.text("ab .\n#X1", max_size=400), st.integers(1, 40))
def test_nothing_is_lost(text: str, room: int) -> None:
    windows = cut(text, room, lambda pieces: [len(piece) for piece in pieces])
    assert "".join("".join(window.text for window in windows).split()) == "".join(text.split())
    assert all(len(window.text) <= room for window in windows)


def test_sentences() -> None:
    assert sentences('He said "No." Then 5 left. It rose 1.5 points!\n\nYes') == [
        'He said "No.',
        "Then 5 left.",
        "It rose 1.5 points!",
        "Yes",
    ]


@pytest.mark.parametrize(
    ("text", "style", "wanted"),
    [
        ("One thing. Another thing.", "bullets", "- One thing.\n- Another thing."),
        ("Points:\n* one\n2. two", "bullets", "- one\n- two"),
        ("- one.\n- two.", "paragraph", "one. two."),
        ("As it is.\nSo.", None, "As it is.\nSo."),
        ("", "bullets", ""),
    ],
)
def test_shapes(text: str, style: str | None, wanted: str) -> None:
    assert shaped(text, style) == wanted


def test_question() -> None:
    assert question("what does it say about X").endswith("what does it say about X?")

"""Sources of sentences, and what the document does not contain."""

from __future__ import annotations

from auvsum.text.citations import cite

TEXT = """The city of Springfield built a bridge over the river in 1987. It cost 1,345,500 dollars.

Mayor Anna Keller opened it on a rainy day. Three boats were there.
The old ferry was sold to a museum in Ohio.
"""


def test_each_sentence_has_its_passage() -> None:
    found = cite("Anna Keller opened the bridge. A museum bought the old ferry. Bananas grow on trees.", TEXT)
    sources = [cited.source for cited in found.cited]
    assert sources[0] is not None
    assert sources[0]["text"] == "Mayor Anna Keller opened it on a rainy day."
    assert sources[0]["line"] == 3
    assert TEXT[sources[0]["start"] : sources[0]["end"]] == sources[0]["text"]
    assert sources[1] is not None
    assert (sources[1]["line"], sources[1]["page"]) == (4, None)
    assert sources[2] is None


def test_pages() -> None:
    second = TEXT.index("Mayor")
    source = cite("Anna Keller opened it.", TEXT, ((0, 10), (second, 11))).cited[0].source
    assert source is not None
    assert source["page"] == 11


def test_numbers_and_names_that_were_made_up() -> None:
    summary = "In 1987 it cost 1345500 dollars. In 1988 Peter Keller saw 3 boats. However, Ohio paid 12%."
    found = cite(summary, TEXT)
    assert [(item["kind"], item["text"], item["sentence"]) for item in found.unsupported] == [
        ("number", "1988", 1),
        ("name", "Peter Keller", 1),
        ("number", "12", 2),
    ]
    (warning,) = found.warnings()
    assert "1988, Peter Keller, 12" in warning
    assert cite("It cost 1,345,500 dollars.", TEXT).warnings() == []


def test_nothing_to_cite_and_a_text_without_sentences() -> None:
    assert cite("", TEXT).record() == {"citations": [], "unsupported": []}
    assert cite("Hello there.", "").cited[0].source is None
    endless = "word " * 100_000 + "zebra crossing"
    source = cite("The zebra crossing.", endless).cited[0].source
    assert source is not None
    assert source["end"] == len(endless)

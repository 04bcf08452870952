"""Coverage sees which third a summary is about."""

from __future__ import annotations

import pytest

from auvsum.eval.coverage import coverage

THIRDS = ["ships sail on the sea " * 20, "trains run on the rails " * 20, "planes fly in the sky " * 20]
DOCUMENT = "".join(THIRDS)


@pytest.mark.parametrize("third", [0, 1, 2])
def test_a_summary_of_one_third(third: int) -> None:
    shares = coverage(THIRDS[third][:40], DOCUMENT)
    assert sum(shares) == pytest.approx(1)
    assert shares[third] > 0.9


def test_a_balanced_summary_and_an_empty_one() -> None:
    assert coverage("ships sail trains run planes fly", DOCUMENT) == pytest.approx([1 / 3] * 3, abs=0.02)
    assert coverage("", DOCUMENT) == [0, 0, 0]
    assert coverage("the unheard", DOCUMENT) == [0, 0, 0]
    assert len(coverage("ships", DOCUMENT, parts=5)) == 5

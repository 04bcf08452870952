"""A summary against a reference summary: ROUGE. Heavy libraries are imported when a score is asked for."""

from __future__ import annotations

_ROUGE = ("rouge1", "rouge2", "rougeLsum")


def score(summary: str, reference: str) -> dict[str, float]:
    """F-measures in percent.

    `rougeLsum` splits at line breaks. ROUGE's tokenizer knows `[a-z0-9]` only: other scripts score 0.
    """
    from rouge_score import rouge_scorer

    found = rouge_scorer.RougeScorer(list(_ROUGE), use_stemmer=True).score(reference, summary)
    return {name: round(100 * found[name].fmeasure, 2) for name in _ROUGE}

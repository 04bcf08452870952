"""A summary against a reference summary: ROUGE and BERTScore. Heavy libraries are imported when asked for."""

from __future__ import annotations

from typing import Any

from auvsum.errors import ModelNotFound


def score(summary: str, reference: str) -> dict[str, Any]:
    """F1 in percent: `rouge1`, `rouge2`, `rougeL`, `rougeLsum`, `bertscore`, and `encoder`, on which that one depends.

    `bertscore` is None when its encoder is not on this machine: `auvsum models pull all-minilm-l6-v2`.

    Raises:
        MetricError: an empty reference.
    """
    from auvsum.eval.config import DEFAULT_ENCODER
    from auvsum.eval.encoder import Encoder
    from auvsum.eval.metrics import Rouge

    found: dict[str, Any] = {name: round(value, 2) for name, value in Rouge().scores(summary, reference).items()}
    try:
        encoder = Encoder(DEFAULT_ENCODER)
    except ModelNotFound:
        return {**found, "bertscore": None, "encoder": DEFAULT_ENCODER}
    return {**found, "bertscore": round(encoder.scores([summary], [reference])[0], 2), "encoder": encoder.label}

"""From `samples.jsonl` to `metrics.json`: nothing is generated, so a run can be scored again with another encoder."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

from auvsum.errors import MetricError, RunError
from auvsum.eval.cells import FULL, cells
from auvsum.eval.config import EvalConfig
from auvsum.eval.encoder import Encoder
from auvsum.eval.metrics import ROUGE, Pair, estimate, paired, rouge_scores, rouge_sees
from auvsum.eval.runs import METRICS, Run
from auvsum.eval.texts import first_words

FIDELITY = ("agreement", "nats")
#: Each document's own values are kept of these alone: differences between rows and runs are taken of them.
PAIRED = (*FIDELITY, "rouge1", "bertscore")
#: What is counted in a row and said below the table.
_ODD = {
    "empty": "summaries that are empty, so that all their scores are 0",
    "unread": "summaries in which the encoder knows no word, so that their BERTScore is 0",
}
#: Scores a document and row: name -> one value a document, None where it has none.
Scores = dict[str, list[float | None]]


def score(
    run: Run, *, encoder: Encoder | None, jobs: int = 1, progress: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Scores a run and writes its `metrics.json`.

    Args:
        encoder: of BERTScore; None leaves it out.
        jobs: processes for ROUGE.
        progress: hears what takes long.

    Raises:
        RunError: no documents. MetricError: a score that is not a number.
    """
    config = run.config
    samples = list(run.samples())
    measured = [sample for sample in samples if sample["error"] is None]
    if not measured:
        raise RunError(f"{run.path} holds no measured documents", "see its samples.jsonl, or run it again")
    names = [cell.name for cell in cells(config)]
    for sample in measured:
        if missing := [name for name in names if name not in sample["rows"]]:
            raise RunError(
                f"{run.path}: document {sample['id']} has no row {missing[0]!r}, its config.yaml asks for one",
                "a run's files belong together: measure again with another --out",
            )
        for name, metric in product(names, FIDELITY):
            if not math.isfinite(value := sample["rows"][name].get(metric, 0.0)):
                raise MetricError(
                    f"{run.path}: document {sample['id']}, row {name!r}: a score is {value}",
                    "it must be a number: measure the document again",
                )
    table = _Table(config, measured)
    table.judge(encoder, jobs, progress)
    rows = {name: table.row(name) for name in names}
    metrics = {
        "config": {"dataset": config.dataset, "model": config.model, "condition": config.condition},
        "setting": measured[0]["setting"],
        "encoder": encoder.label if encoder else None,
        "documents": [{"id": s["id"], "sha256": s["sha256"]} for s in measured],
        "prompt_tokens": sum(s["tokens"]["prompt"] for s in measured) / len(measured),
        "full_bytes": sum(s["full_bytes"] for s in measured) / len(measured),
        "failed": [{"id": s["id"], **s["error"]} for s in samples if s["error"]],
        "shortened": [s["id"] for s in measured if s["shortened"]],
        "notes": _unfinished(run, len(samples)) + _notes(config, measured, rows),
        "rows": rows,
        "paired": _pairs(rows),
    }
    run.write_json(METRICS, metrics)
    return metrics


class _Table:
    def __init__(self, config: EvalConfig, samples: list[dict[str, Any]]) -> None:
        self.config, self.samples = config, samples
        self.cells = {cell.name: cell for cell in cells(config)}
        self.lengths = [len((s["rows"][FULL].get("summary") or "").split()) for s in samples]
        #: What is known of each pair: metric -> score.
        self.judged: dict[Pair, dict[str, float]] = {}

    def judge(self, encoder: Encoder | None, jobs: int, progress: Callable[[str], None]) -> None:
        """Scores every pair of summary and reference, the same pair once: many rows write the same, and most are not
        changed by cutting them to the length of the full cache's."""
        texts = [made for name in self.cells for made in (self._texts(name), self._matched(name))]
        # Document after document, so that what is known of a reference is used while it is there.
        found = dict.fromkeys(pair for pairs in zip(*map(self._pairs, texts), strict=True) for pair in pairs if pair)
        pairs = list(found)
        self.judged = {pair: {} for pair in pairs}
        if pairs and "rouge" in self.config.metrics:
            progress(f"ROUGE of {len(pairs):,} summaries")
            for pair, scores in zip(pairs, rouge_scores(pairs, jobs), strict=True):
                self.judged[pair] |= scores
        if pairs and encoder is not None:
            progress(f"BERTScore of {len(pairs):,} summaries")
            for pair, value in zip(pairs, encoder.scores(*zip(*pairs, strict=True)), strict=True):
                self.judged[pair]["bertscore"] = value

    def row(self, name: str) -> dict[str, Any]:
        """A row of the table: what it is, the mean of each score, and each document's own."""
        cell = self.cells[name]
        found = [sample["rows"][name] for sample in self.samples]
        scores: Scores = {metric: [row.get(metric) for row in found] for metric in FIDELITY}
        texts = self._texts(name)
        scores["words"] = [None if text is None else float(len(text.split())) for text in texts]
        scores["tokens_per_s"] = [row.get("tokens_per_s") for row in found]
        scores |= self._against_references(texts)
        bertscores = scores["bertscore"]
        matched = self._against_references(self._matched(name))
        scores |= {f"{metric}@matched": values for metric, values in matched.items()}
        return {
            "kind": cell.kind,
            "policy": cell.label,
            "budget": cell.budget,
            "scope": cell.scope,
            "kv_bits": cell.kv_bits,
            "bytes": _mean([row.get("bytes") for row in found]),
            "slots": _mean([row.get("slots") for row in found]),
            "refused": sum("error" in row for row in found),
            "empty": sum(text is not None and not text.strip() for text in texts),
            "unread": sum(bool(t and t.strip()) and s == 0 for t, s in zip(texts, bertscores, strict=True)),
            "kept": _columns([row["kept"] for row in found if len(row.get("kept", ())) == 10]),
            "scores": {m: estimate(known).record() for m, values in scores.items() if (known := _known(values))},
            "documents": {m: _rounded(scores[m]) for m in PAIRED if _known(scores[m])},
        }

    def _texts(self, name: str) -> list[str | None]:
        return [sample["rows"][name].get("summary") for sample in self.samples]

    def _matched(self, name: str) -> list[str | None]:
        """A row's summaries cut to the length of the full cache's."""
        texts = zip(self._texts(name), self.lengths, strict=True)
        return [None if text is None else first_words(text, words) for text, words in texts]

    def _pairs(self, texts: Sequence[str | None]) -> list[Pair | None]:
        """Each summary with its reference, None where either is missing."""
        both = zip(texts, self.samples, strict=True)
        return [(text, s["reference"]) if text is not None and s["reference"] else None for text, s in both]

    def _against_references(self, texts: Sequence[str | None]) -> Scores:
        found = [self.judged[pair] if pair else {} for pair in self._pairs(texts)]
        return {metric: [one.get(metric) for one in found] for metric in (*ROUGE, "bertscore")}


def _pairs(rows: dict[str, Any]) -> list[dict[str, Any]]:
    """Differences between the policies of one budget, and in quality from the full cache, over the documents that both
    have."""
    found = []
    names = [name for name, row in rows.items() if row["kind"] in ("full", "cache", "cut")]
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            whole = rows[first]["kind"] == "full"
            if not whole and not _comparable(rows[first], rows[second]):
                continue
            for metric in PAIRED:
                if whole and metric in FIDELITY:
                    continue
                values = (rows[name]["documents"].get(metric) for name in (first, second))
                both = [(a, b) for a, b in zip(*(v or () for v in values), strict=False) if None not in (a, b)]
                if both:
                    difference = paired([a for a, _ in both], [b for _, b in both])
                    found.append({"first": first, "second": second, "metric": metric, **difference.record()})
    return found


def _comparable(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two rows were given the same: 10% of the bytes and 10% in the paper's accounting are not the same."""
    return bool(first["budget"] == second["budget"] and first["scope"] == second["scope"])


def more_than_its_budget(cut: dict[str, Any], cache: dict[str, Any]) -> bool:
    """Whether a truncated prompt, which needs its frame and some tokens of the document, holds more than a cache."""
    return bool(cut["bytes"] > 1.1 * cache["bytes"])


def _unfinished(run: Run, count: int) -> list[str]:
    """A run that was stopped says so wherever it is shown."""
    wanted = run.environment().get("documents", count)
    return [f"the run is not finished: {count} of {wanted} documents"] if count < wanted else []


def _notes(config: EvalConfig, samples: list[dict[str, Any]], rows: dict[str, Any]) -> list[str]:
    """What a reader must know before believing the table."""
    notes = []
    if missing := [s["id"] for s in samples if not s["reference"]]:
        notes.append(f"{len(missing)} documents have no reference: only fidelity is measured on them")
    if blind := [s["id"] for s in samples if s["reference"] and not rouge_sees(s["reference"])]:
        notes.append(f"{len(blind)} references are not in Latin letters: ROUGE sees only a-z, 0-9; its 0 means nothing")
    if short := [s for s in samples if s["shortened"]]:
        notes.append(f"{len(short)} of {len(samples)} documents were cut to {config.max_document_tokens:,} tokens")
    for name, row in rows.items():
        caches = [one for one in rows.values() if one["kind"] == "cache" and _comparable(row, one) and one["bytes"]]
        if row["kind"] == "cut" and any(more_than_its_budget(row, one) for one in caches):
            notes.append(f"{name} holds more bytes than the caches beside it: a prompt needs its frame and 16 tokens")
        if row["refused"]:
            notes.append(f"{row['refused']} documents are too short for {name}: it stands for fewer documents")
    for key, what in _ODD.items():
        if found := [f"{row[key]} of {name}" for name, row in rows.items() if row[key]]:
            notes.append(f"{what}: {', '.join(found)}")
    return notes


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _rounded(values: Sequence[float | None]) -> list[float | None]:
    """A document's own values are kept to compare runs and to see outliers: four digits do."""
    return [None if value is None else round(value, 4) for value in values]


def _mean(values: Sequence[float | None]) -> float | None:
    known = _known(values)
    return sum(known) / len(known) if known else None


def _columns(rows: list[list[float]]) -> list[float]:
    return [round(sum(column) / len(rows), 4) for column in zip(*rows, strict=True)]

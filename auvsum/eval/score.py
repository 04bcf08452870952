"""From `samples.jsonl` to `metrics.json`: nothing is generated, so a run can be scored again with another encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from auvsum.errors import RunError
from auvsum.eval.cells import FULL, cells
from auvsum.eval.config import EvalConfig
from auvsum.eval.encoder import Encoder
from auvsum.eval.metrics import ROUGE, Rouge, estimate, paired, rouge_sees
from auvsum.eval.runs import METRICS, Run
from auvsum.eval.texts import first_words

FIDELITY = ("agreement", "nats")
#: Scores a document and row: name -> one value a document, None where it has none.
Scores = dict[str, list[float | None]]


def score(run: Run, *, encoder: Encoder | None, progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Scores a run and writes its `metrics.json`.

    Args:
        encoder: of BERTScore; None leaves it out.

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
    table = _Table(config, measured, encoder)
    rows: dict[str, Any] = {}
    for name in names:
        progress(f"scoring {name}")
        rows[name] = table.row(name)
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
    def __init__(self, config: EvalConfig, samples: list[dict[str, Any]], encoder: Encoder | None) -> None:
        self.cells = {cell.name: cell for cell in cells(config)}
        self.samples, self.encoder = samples, encoder
        self.rouge = Rouge() if "rouge" in config.metrics else None
        self.lengths = [len((s["rows"][FULL].get("summary") or "").split()) for s in samples]

    def row(self, name: str) -> dict[str, Any]:
        """A row of the table: what it is, the mean of each score, and each document's own."""
        cell = self.cells[name]
        found = [sample["rows"][name] for sample in self.samples]
        scores: Scores = {metric: [row.get(metric) for row in found] for metric in FIDELITY}
        texts = [row.get("summary") for row in found]
        scores["words"] = [None if text is None else float(len(text.split())) for text in texts]
        scores["tokens_per_s"] = [row.get("tokens_per_s") for row in found]
        scores |= self._against_references(texts)
        short = [None if t is None else first_words(t, n) for t, n in zip(texts, self.lengths, strict=True)]
        scores |= {f"{metric}@matched": values for metric, values in self._against_references(short).items()}
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
            "kept": _columns([row["kept"] for row in found if len(row.get("kept", ())) == 10]),
            "scores": {m: estimate(known).record() for m, values in scores.items() if (known := _known(values))},
            "documents": {m: _rounded(values) for m, values in scores.items() if _known(values)},
        }

    def _against_references(self, texts: Sequence[str | None]) -> Scores:
        at = [i for i, (s, t) in enumerate(zip(self.samples, texts, strict=True)) if t is not None and s["reference"]]
        scores: Scores = {}
        hypotheses, references = [texts[i] or "" for i in at], [self.samples[i]["reference"] for i in at]

        def put(metric: str, values: Sequence[float]) -> None:
            scores[metric] = [None] * len(texts)
            for i, value in zip(at, values, strict=True):
                scores[metric][i] = value

        if self.rouge is not None:
            found = [self.rouge.scores(h, r) for h, r in zip(hypotheses, references, strict=True)]
            for metric in ROUGE:
                put(metric, [one[metric] for one in found])
        if self.encoder is not None:
            put("bertscore", self.encoder.scores(hypotheses, references))
        return scores


def _pairs(rows: dict[str, Any]) -> list[dict[str, Any]]:
    """Differences between the policies of one budget, and in quality from the full cache, over the documents that both
    have."""
    found = []
    names = [name for name, row in rows.items() if row["kind"] in ("full", "cache", "cut")]
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            whole = rows[first]["kind"] == "full"
            if not whole and rows[first]["budget"] != rows[second]["budget"]:
                continue
            for metric in ("rouge1", "bertscore") if whole else (*FIDELITY, "rouge1", "bertscore"):
                values = (rows[name]["documents"].get(metric) for name in (first, second))
                both = [(a, b) for a, b in zip(*(v or () for v in values), strict=False) if None not in (a, b)]
                if both:
                    difference = paired([a for a, _ in both], [b for _, b in both])
                    found.append({"first": first, "second": second, "metric": metric, **difference.record()})
    return found


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
        if row["refused"]:
            notes.append(f"{row['refused']} documents are too short for {name}: it stands for fewer documents")
        if row["empty"]:
            notes.append(f"{row['empty']} summaries of {name} are empty: they count as 0")
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

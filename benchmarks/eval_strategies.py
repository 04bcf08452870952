"""Long documents: what each strategy makes of whole reports, beside the first words and LexRank of the same length.

    python benchmarks/eval_strategies.py generate --data-dir DIR --out runs.jsonl          # resumable; a GPU: minutes
    python benchmarks/eval_strategies.py fidelity --data-dir DIR --out runs.jsonl
    python benchmarks/eval_strategies.py lexrank  --data-dir DIR --out runs.jsonl --jobs 8
    python benchmarks/eval_strategies.py score    --data-dir DIR --out runs.jsonl --json benchmarks/results/long.json
    python benchmarks/long_page.py                          # docs/LONG.md from all committed results about length

A case is strategy:policy:budget, then key=value for other settings (window, chunk; part: tokens of a window's summary;
block: sentences that `extract` ranks together).
`single` is measured on the documents that fit the model's positions, the others on all of them. Fidelity is what a
strategy makes of the text that `single` with the full cache wrote: teacher-forced agreement, and nats a token lost.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common

SETS = ["beigebook:40", "gao", "gov_leval", "qmsum", "plos"]
FULL = "single:full:auto"
AUTO = "map-rank:auto:auto"
REDUCE = "map-reduce:auto:auto"
CASES = [
    FULL,
    AUTO,
    REDUCE,
    "stream:auv:1024:chunk=2048",
    "stream:auv:512:chunk=2048",
    "stream:auv:2048:chunk=2048",
]
LEXRANK = "lexrank"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["generate", "rank", "fidelity", "lexrank", "score"])
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sets", nargs="+", default=SETS, help="dataset, or dataset:N for its first N documents")
    parser.add_argument("--cases", nargs="+", default=CASES)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--batch-size", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="the rest is for the next run")
    parser.add_argument("--title", default="", help="of the table: where the summaries were written")
    parser.add_argument("--jobs", type=int, default=1)
    given = parser.parse_args()
    {"generate": generate, "rank": rank, "fidelity": fidelity, "lexrank": lexrank, "score": score}[given.step](given)


# -- documents and files ----------------------------------------------------------------------------------------------


def documents(given: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """(dataset, example) of every document."""
    from auvsum.eval.datasets import load_examples

    for name in given.sets:
        dataset, _, count = name.partition(":")
        for example in load_examples(dataset, data_dir=given.data_dir)[: int(count) if count else None]:
            yield dataset, example


def rows_of(path: Path) -> list[dict[str, Any]]:
    """What earlier runs have written; nothing where there was none."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def append(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Lines at the end of a file, on the disk at once."""
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def settings_of(case: str, given: argparse.Namespace) -> tuple[Any, dict[str, int]]:
    """The settings of a case, and what it asks for that is no setting: `part`, `block`."""
    from auvsum.config import Settings

    strategy, policy, budget, *options = case.split(":")
    values: dict[str, Any] = {key: int(value) for key, value in (option.split("=") for option in options)}
    others = {key: values.pop(key) for key in ("part", "block") if key in values}
    base = {"model": given.model, "batch_size": given.batch_size, "device": given.device}
    return Settings(**base, strategy=strategy, policy=policy, budget=budget, **values), others


# -- generate ---------------------------------------------------------------------------------------------------------


def generate(given: argparse.Namespace) -> None:
    """Summaries of all documents by all cases, as a user's `Summarizer.run` writes them."""
    from auvsum import Summarizer, rounds
    from auvsum.text import central
    from auvsum.text.readers import Document

    begun, defaults = time.perf_counter(), (rounds.PART, central.BLOCK)
    summarizer = Summarizer.from_settings(settings_of(given.cases[0], given)[0])
    found = list(documents(given))
    random.Random(0).shuffle(found)  # so that what a limit of time leaves is a fair sample
    done = {(row["case"], row["set"], row["id"]) for row in rows_of(given.out) if "summary" in row}
    tokenizer = summarizer.loaded.tokenizer
    sizes = {example.id: len(tokenizer(example.document, verbose=False)["input_ids"]) for _, example in found}
    for case in given.cases:
        settings, others = settings_of(case, given)
        fits = (summarizer.loaded.max_positions or sys.maxsize) - 300 if settings.strategy == "single" else sys.maxsize
        todo = [
            (name, example)
            for name, example in found
            if (case, name, example.id) not in done and sizes[example.id] <= fits
        ]
        if not todo or time.perf_counter() - begun > given.seconds:
            continue
        rounds.PART, central.BLOCK = others.get("part", defaults[0]), others.get("block", defaults[1])
        start = time.perf_counter()
        texts = (Document(f"{name}/{example.id}", example.document, "utf-8") for name, example in todo)
        written = 0
        with noted_rounds() as noted:
            for result in summarizer.with_settings(settings).run(texts, ordered=False):
                append(given.out, [_row(case, result, noted)])
                written += 1
                if time.perf_counter() - begun > given.seconds:
                    break
        seconds = time.perf_counter() - start
        print(f"{case}: {written} of {len(todo)} documents in {seconds:.0f} s", file=sys.stderr, flush=True)


def _row(case: str, result: Any, noted: dict[str, dict[str, Any]]) -> dict[str, Any]:
    record = result.record()
    name, _, id = result.source.partition("/")
    row = {"case": case, "set": name, "id": id, "summary": record["summary"]}
    if record["error"]:
        return {**row, "summary": "", "error": record["error"]["message"]}
    last = noted.get(result.source, {})
    return {
        **row,
        "strategy": record["strategy"],
        "tokens": record["tokens"],
        "slots": record["budget"]["slots"],
        "kv_bytes": record["kv"]["peak_bytes"],
        "token_ids": list(result.token_ids) if case == FULL else None,
        "prompt": last.get("prompt") if record["tokens"]["document"] < 8192 else None,
        "parts": last.get("parts"),
    }


class noted_rounds:
    """While it is entered, notes of each document read in windows its last prompt, and its windows' summaries."""

    def __enter__(self) -> dict[str, dict[str, Any]]:
        from auvsum.rounds import Rounds

        self._pieces, self._reduce, self._rank = Rounds.pieces, Rounds._reduce, Rounds._rank
        noted: dict[str, dict[str, Any]] = {}

        def pieces(rounds: Any) -> Iterator[Any]:
            for piece in self._pieces(rounds):
                if piece.writing is not None and rounds.plan.windows:
                    noted.setdefault(rounds._source, {})["prompt"] = list(piece.request.ids)
                yield piece

        def note(rounds: Any) -> None:
            noted.setdefault(rounds._source, {}).setdefault("parts", [rounds._parts[i] for i in sorted(rounds._parts)])

        def reduce(rounds: Any) -> str:
            note(rounds)
            return self._reduce(rounds)

        def rank(rounds: Any, rows: int) -> str:
            note(rounds)
            return self._rank(rounds, rows)

        Rounds.pieces, Rounds._reduce, Rounds._rank = pieces, reduce, rank  # type: ignore[method-assign]
        return noted

    def __exit__(self, *error: object) -> None:
        from auvsum.rounds import Rounds

        Rounds.pieces, Rounds._reduce = self._pieces, self._reduce  # type: ignore[method-assign]
        Rounds._rank = self._rank  # type: ignore[method-assign]


# -- rank -------------------------------------------------------------------------------------------------------------


def rank(given: argparse.Namespace) -> None:
    """map-rank's last step once more, from the windows' summaries that a run of it has noted: nothing is generated."""
    from auvsum import Summarizer, rounds
    from auvsum.text.central import gathered

    summarizer = Summarizer.from_settings(settings_of(AUTO, given)[0])
    tokenizer, room = summarizer.loaded.tokenizer, summarizer.plan("text").max_new_tokens

    def count(texts: Any) -> list[int]:
        return [len(ids) for ids in tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]]

    texts = {(name, example.id): example.document for name, example in documents(given)}
    for row in rows_of(given.out):
        if row["case"].startswith("map-rank:") and row.get("parts") and (row["set"], row["id"]) in texts:
            window = settings_of(row["case"], given)[0].window or rounds.WINDOW
            windows = rounds.cut_windows(texts[row["set"], row["id"]], window, tokenizer)
            append(given.out, [{**row, "summary": gathered(windows, row["parts"], room, count), "parts": None}])


# -- fidelity ---------------------------------------------------------------------------------------------------------


def fidelity(given: argparse.Namespace) -> None:
    """Agreement and nats of each case along the full cache's own summaries, for the documents that have one."""
    from auvsum import Summarizer
    from auvsum.engine.generate import Request
    from auvsum.engine.memory import MOST_ROWS
    from auvsum.text.prompts import Prompt

    begun = time.perf_counter()
    texts = {(name, example.id): example.document for name, example in documents(given)}
    rows = [row for row in rows_of(given.out) if (row["set"], row["id"]) in texts]
    written = {(r["set"], r["id"]): r["token_ids"] for r in rows if r["case"] == FULL and r.get("token_ids")}
    prompts = {(r["case"], r["set"], r["id"]): r["prompt"] for r in rows if r.get("prompt")}
    done = {(r["case"], r["set"], r["id"]) for r in rows if "nats" in r}
    summarizer = Summarizer.from_settings(settings_of(FULL, given)[0])
    own: dict[tuple[str, str], list[float]] = {}
    for case in [FULL, *(case for case in given.cases if case != FULL)]:
        mine = summarizer.with_settings(settings_of(case, given)[0])
        keys, plans, requests = [], [], []
        for key, ids in written.items():
            if case != FULL and ((case, key[0], key[1]) in done or time.perf_counter() - begun > given.seconds):
                continue
            plan = mine.plan(texts[key])
            if plan.windows:
                last = prompts.get((case, key[0], key[1]))
                if last is None:
                    continue
                full = summarizer.plan("text")
                plan = replace(
                    full,
                    prompt=Prompt(tuple(last), (0, len(last)), "", 0),
                    budget=replace(full.budget, slots=len(last) + len(ids) + 1),
                )
            keys.append(key)
            plans.append(plan)
            span = plan.prompt.document
            requests.append(Request(plan.prompt.ids, plan.budget.slots, len(ids), plan.parts, None, span))
        for at in range(0, len(keys), MOST_ROWS["cuda"]):
            some = slice(at, at + MOST_ROWS["cuda"])
            forced = _forced(mine, plans[at], requests[some], [written[key] for key in keys[some]])
            for key, (best, chances) in zip(keys[some], forced, strict=True):
                if case == FULL:
                    own[key] = chances
                    continue
                lost = [a - b for a, b in zip(own[key], chances, strict=True)]
                agree = [a == b for a, b in zip(best, written[key], strict=True)]
                line = {"case": case, "set": key[0], "id": key[1], "nats": sum(lost) / len(lost)}
                append(given.out, [{**line, "agreement": sum(agree) / len(agree)}])
        print(f"fidelity of {case}: {len(keys)} documents", file=sys.stderr, flush=True)


def _forced(
    summarizer: Any, plan: Any, requests: list[Any], texts: list[list[int]]
) -> list[tuple[list[int], list[float]]]:
    """For each request the best token before each of a text's tokens, and the log-probability of that token itself."""
    from auvsum.engine.generate import Engine
    from auvsum.engine.sampling import Sampling

    told: list[tuple[list[int], list[float]]] = [([], []) for _ in texts]

    class Forced(Engine):
        def _draw(self, row: Any, logits: Any) -> int:
            token = texts[row.index][len(row.written)]
            best, chances = told[row.index]
            best.append(int(logits.argmax()))
            chances.append(float(logits.float().log_softmax(-1)[token]))
            return token

        def _graph_for(self, cache: Any, longest: int) -> tuple[None, None]:
            if self.device.type == "cuda":
                super()._graph_for(cache, longest)  # for what it prepares; the step is taken one by one
            return None, None

    chunk = summarizer.settings.chunk if plan.strategy == "stream" else None
    for _ in Forced(
        summarizer.loaded.model, plan.policy, chunk=chunk, batch_size=len(requests), sampling=Sampling(), bits=plan.bits
    ).run(requests):
        pass
    return told


# -- LexRank ----------------------------------------------------------------------------------------------------------


def lexrank(given: argparse.Namespace) -> None:
    """LexRank's summary of each document, as long as `auto`'s."""
    rows = rows_of(given.out)
    done = {(row["set"], row["id"]) for row in rows if row["case"] == LEXRANK}
    lengths = {(r["set"], r["id"]): len(r["summary"].split()) for r in rows if r["case"] == AUTO and "summary" in r}
    todo = [
        (name, example.id, example.document, lengths[name, example.id])
        for name, example in documents(given)
        if (name, example.id) in lengths and (name, example.id) not in done
    ]
    with get_context("spawn").Pool(given.jobs) as pool:
        for row in pool.imap_unordered(_lexrank, todo):
            append(given.out, [row])


def _lexrank(todo: tuple[str, str, str, int]) -> dict[str, Any]:
    from auvsum.eval.texts import lexrank as by_sumy

    name, id, document, words = todo
    return {"case": LEXRANK, "set": name, "id": id, "summary": by_sumy(document, words)}


# -- score ------------------------------------------------------------------------------------------------------------


def score(given: argparse.Namespace) -> None:
    """Scores of every summary and of the document's first words at the same length; one JSON file, no texts.

    What the file has already is kept: scores of the same summary, and rows that this run does not have.
    """
    from rouge_score.rouge_scorer import RougeScorer

    from auvsum.eval.coverage import coverage
    from auvsum.eval.encoder import Encoder
    from auvsum.eval.texts import first_words

    assert given.json is not None
    old = json.loads(given.json.read_text(encoding="utf-8"))["rows"] if given.json.is_file() else []
    scored: dict[tuple[str, str, str], dict[str, Any]] = {(row["case"], row["set"], row["id"]): row for row in old}

    examples = {(name, example.id): example for name, example in documents(given)}
    rows = [row for row in rows_of(given.out) if (row["set"], row["id"]) in examples]
    rouge, encoder = RougeScorer(["rougeL"], use_stemmer=True), Encoder("all-minilm-l6-v2")

    @cache
    def rouge_l(text: str, reference: str) -> float:
        return 100 * float(rouge.score(reference, text)["rougeL"].fmeasure)

    for row in rows:
        key = (row["case"], row["set"], row["id"])
        mine = scored.setdefault(key, {"case": row["case"], "set": row["set"], "id": row["id"]})
        mine |= {name: round(row[name], 4) for name in ("nats", "agreement") if name in row}
        if "summary" not in row:
            continue
        example = examples[row["set"], row["id"]]
        sha256 = hashlib.sha256(row["summary"].encode()).hexdigest()[:16]
        if mine.get("sha256") == sha256:
            continue
        words = len(row["summary"].split())
        lead = first_words(example.document, words)
        texts = {"": row["summary"], "lead_": lead}
        mine |= {
            "sha256": sha256,
            "words": words,
            "tokens": row.get("tokens"),
            "kv_bytes": row.get("kv_bytes"),
            "error": row.get("error"),
        }
        for prefix, text in texts.items():
            mine[f"{prefix}rougeL"] = round(rouge_l(text, example.reference), 3)
            mine[f"{prefix}thirds"] = [round(share, 4) for share in coverage(text, example.document)]
            mine[f"{prefix}text"] = text
    found = [one for one in scored.values() if "text" in one]
    for prefix in ("", "lead_"):
        values = encoder.scores(
            [one.pop(f"{prefix}text") for one in found], [examples[one["set"], one["id"]].reference for one in found]
        )
        for one, value in zip(found, values, strict=True):
            one[f"{prefix}bertscore"] = round(value, 3)
    record = {
        "benchmark": "strategies",
        "title": given.title,
        "encoder": encoder.label,
        **common.versions(),
        "rows": list(scored.values()),
    }
    text = json.dumps(record, ensure_ascii=False)
    given.json.write_text(text.replace('}, {"case"', '},\n{"case"') + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

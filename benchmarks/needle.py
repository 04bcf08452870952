"""A planted fact, asked for with --query: how often each strategy and budget finds it, by depth and length.

    python benchmarks/needle.py --lengths 4096 --depths 3 --cases single:full:auto stream:auv:512
    python benchmarks/needle.py --out benchmarks/results/needle.json

A case is strategy:policy:budget, then key=value (chunk, window; passages=0 has map-reduce ask every window). The
haystack is the sample report, over and over. `single` is left out where the document is longer than the positions. The
answer counts when it holds the planted code word. Each fact is asked for in its own words, and in others.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common

CASES = [
    "single:full:auto",
    "map-reduce:auto:auto",
    "map-reduce:auto:auto:passages=0",
    "stream:auv:512:chunk=2048",
    "stream:auv:2048:chunk=2048",
    "stream:h2o:2048:chunk=2048",
]
#: How the fact is said, and what is asked: with the same words, and with hardly any of them.
WAYS = {
    "same words": ("The secret code word of the archive is {word}.", "what is the secret code word of the archive"),
    "other words": ("Whoever wants to open the vault has to say {word}.", "which password unlocks the strongroom"),
}
WORDS = ["marigold", "pelican", "obsidian", "lantern", "tangerine", "walrus", "saffron", "compass", "glacier", "violin"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 7500, 16384, 65536])
    parser.add_argument("--depths", type=int, default=10)
    parser.add_argument("--cases", nargs="+", default=CASES)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--batch-size", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no row begins after so many seconds")
    parser.add_argument("--title", default="", help="of the table")
    parser.add_argument("--out", type=Path, help="JSON, written after each row")
    given = parser.parse_args()

    from auvsum import Summarizer
    from auvsum.config import Settings

    base = {
        "model": given.model,
        "max_tokens": given.max_tokens,
        "batch_size": given.batch_size,
        "device": given.device,
    }
    first = Summarizer.from_settings(Settings(**base))
    start, rows = time.perf_counter(), []
    for length, way, case in ((n, way, case) for n in given.lengths for way in given.ways for case in given.cases):
        over = case.startswith("single") and length > (first.loaded.max_positions or sys.maxsize) - 200
        if over or time.perf_counter() - start > given.seconds:
            continue
        rows.append(
            {"case": case, "way": way, "tokens": length, **_found(first, base, case, way, length, given.depths)}
        )
        print(rows[-1], file=sys.stderr, flush=True)
        record = {"benchmark": "needle", "title": given.title, **common.machine(), **common.versions(), "rows": rows}
        if given.out:
            given.out.write_text(json.dumps(record).replace("}, {", "},\n{") + "\n", encoding="utf-8")
    common.print_table(
        ["case", "asked with", "tokens", "found", "of", "seconds each"],
        [
            [r["case"], r["way"], f"{r['tokens']:,}", str(r["found"]), str(r["asked"]), f"{r['seconds']:.1f}"]
            for r in rows
        ],
    )
    common.print_json(record)


def _found(first: Any, base: dict[str, Any], case: str, way: str, length: int, depths: int) -> dict[str, Any]:
    """Plants the fact at each depth in turn; all documents are written together."""
    from auvsum import rounds
    from auvsum.config import Settings
    from auvsum.text.readers import Document

    strategy, policy, budget, *options = case.split(":")
    values: dict[str, Any] = dict(option.split("=") for option in options)
    every = values.pop("passages", "1") == "0"
    fact, query = WAYS[way]
    settings = {**base, "strategy": strategy, "policy": policy, "budget": budget, "query": query}
    summarizer = first.with_settings(Settings(**settings, **{key: int(value) for key, value in values.items()}))
    tokenizer, start = first.loaded.tokenizer, time.perf_counter()
    words = [WORDS[number % len(WORDS)] for number in range(depths)]
    places = [number / max(1, depths - 1) for number in range(depths)]
    texts = [haystack(tokenizer, length, at, fact.format(word=word)) for at, word in zip(places, words, strict=True)]
    kept = rounds.best_passages
    if every:
        rounds.best_passages = lambda *given: ""
    results = list(summarizer.run(Document(str(i), text, "utf-8") for i, text in enumerate(texts)))
    rounds.best_passages = kept
    answers = [result.record()["summary"] for result in results]
    hits = [None if answer is None else word in answer.lower() for answer, word in zip(answers, words, strict=True)]
    return {
        "found": sum(hit is True for hit in hits),
        "asked": sum(hit is not None for hit in hits),
        "by_depth": "".join("-" if hit is None else "x" if hit else "." for hit in hits),
        "seconds": round((time.perf_counter() - start) / depths, 2),
        "answers": [(answer or "")[:60] for answer in answers],
    }


def haystack(tokenizer: Any, length: int, depth: float, fact: str) -> str:
    """About `length` tokens of the sample, with the fact as a paragraph of its own at that depth (0 first, 1 last)."""
    sample = (common.ROOT / "samples" / "money-bail.txt").read_text(encoding="utf-8")
    paragraphs = [" ".join(block.split()) for block in sample.split("\n\n") if block.strip()]
    counts = [len(ids) for ids in tokenizer(paragraphs, add_special_tokens=False)["input_ids"]]
    chosen, total = [], 0
    while total < length * 0.97:
        chosen.append(paragraphs[len(chosen) % len(paragraphs)])
        total += counts[(len(chosen) - 1) % len(paragraphs)] + 1
    chosen.insert(round(depth * len(chosen)), fact)
    return "\n\n".join(chosen)


if __name__ == "__main__":
    main()

"""A planted fact, asked for with --query: how often each strategy and budget finds it, by depth and length.

    python benchmarks/needle.py --lengths 4096 --depths 3 --cases full:single:100% auv:stream:25% auv:map-reduce:auto
    python benchmarks/needle.py --lengths 4096 16384 65536 --depths 10

A case is policy:strategy:budget. The haystack is the sample report, over and over. `full:single` reads what the model
has positions for and is left out beyond them. The answer counts when it holds the planted code word.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common

CASES = ["full:single:auto", "auv:stream:1024", "auv:stream:512", "h2o:stream:1024", "full:map-reduce:auto"]
FACT = "The secret code word of the archive is {word}."
QUERY = "what is the secret code word of the archive"
WORDS = ["marigold", "pelican", "obsidian", "lantern", "tangerine", "walrus", "saffron", "compass", "glacier", "violin"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384, 65536])
    parser.add_argument("--depths", type=int, default=10)
    parser.add_argument("--cases", nargs="+", default=CASES)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()

    from auvsum import Summarizer
    from auvsum.config import Settings

    base = {"model": given.model, "max_tokens": given.max_tokens, "threads": given.threads, "query": QUERY}
    first = Summarizer.from_settings(Settings(**base))
    rows: list[dict[str, Any]] = []
    for length in given.lengths:
        for case in given.cases:
            policy, strategy, budget = case.split(":")
            summarizer = first.with_settings(Settings(**base, policy=policy, strategy=strategy, budget=budget))
            rows.append({"case": case, "tokens": length, **_found(summarizer, length, given.depths)})
            row = rows[-1]
            print(f"{case} {length:,}: {row['found']}/{row['asked']} {row['by_depth']}", file=sys.stderr, flush=True)
    common.print_table(
        ["case", "tokens", "found", "of", "seconds each"],
        [[r["case"], f"{r['tokens']:,}", str(r["found"]), str(r["asked"]), f"{r['seconds']:.1f}"] for r in rows],
    )
    common.print_json({"benchmark": "needle", **common.machine(), **common.versions(), "rows": rows})


def _found(summarizer: Any, length: int, depths: int) -> dict[str, Any]:
    """Plants the fact at each depth in turn."""
    from auvsum.errors import AuvsumError

    by_depth, start = [], time.perf_counter()
    for number in range(depths):
        word = WORDS[number % len(WORDS)]
        document = haystack(summarizer.loaded.tokenizer, length, number / max(1, depths - 1), FACT.format(word=word))
        try:
            text = summarizer.summarize(document).text
        except AuvsumError:
            by_depth.append(None)
            continue
        by_depth.append(word in text.lower())
    return {
        "found": sum(hit is True for hit in by_depth),
        "asked": sum(hit is not None for hit in by_depth),
        "by_depth": "".join("-" if hit is None else "x" if hit else "." for hit in by_depth),
        "seconds": (time.perf_counter() - start) / depths,
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

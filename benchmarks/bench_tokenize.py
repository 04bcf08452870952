"""How fast a file becomes token ids, and how much memory that holds: reading and tokenizing must not be the bottleneck.

    python benchmarks/bench_tokenize.py --megabytes 1 16 64
    python benchmarks/bench_tokenize.py --megabytes 64 --whole            # the ids of all of it, as one prompt
    python benchmarks/bench_tokenize.py --megabytes 1024 --read-only      # a 1 GB file: is it held more than once?

A text far beyond the model's positions is cut into windows, whose tokens are counted and let go; `--whole` tokenizes it
as a shorter one. Each size is a process of its own, whose memory is looked at from outside.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--read-only", action="store_true", help="read the file and leave it untokenized")
    parser.add_argument("--whole", action="store_true", help="hold the ids of the whole text")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(_measure(given.child, None if given.read_only else given.model, given.whole)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for megabytes in given.megabytes:
            path = _written(Path(folder) / "long.txt", megabytes * 2**20)
            command = [sys.executable, __file__, "--child", str(path), "--model", given.model]
            done = subprocess.run(
                command + ["--read-only"] * given.read_only + ["--whole"] * given.whole,
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            rows.append({"megabytes": megabytes, **json.loads(done.stdout.splitlines()[-1])})
    table = [
        [f"{row['megabytes']} MB", f"{row['read_mb_s']:.0f}", f"{row['tokenize_mb_s']:.2f}", f"{row['tokens']:,}",
         f"{row['read_bytes'] / 2**20:.0f}", f"{row['peak_bytes'] / 2**20:.0f}"]
        for row in rows
    ]  # fmt: skip
    common.print_table(["file", "read MB/s", "tokenize MB/s", "tokens", "RSS of text, MiB", "RSS in all, MiB"], table)
    common.print_json({"benchmark": "tokenize", **common.machine(), **common.versions(), "rows": rows})


def _written(path: Path, size: int) -> Path:
    text = (common.ROOT / "samples" / "money-bail.txt").read_text(encoding="utf-8").encode()
    with path.open("wb") as file:
        for start in range(0, size, len(text)):
            file.write(text[: size - start])
    return path


def _measure(path: str, model: str | None, whole: bool) -> dict[str, float]:
    """Times and memory of one file; the text's own memory is the growth while it was read."""
    from auvsum.text.readers import read_document

    before = common.peak_rss()
    start = time.perf_counter()
    text = read_document(path).text
    read = time.perf_counter() - start
    held = common.peak_rss() - before
    tokens, seconds = 0, float("inf")
    if model is not None:
        from auvsum._env import prepare

        prepare()
        from transformers import AutoTokenizer

        from auvsum import rounds
        from auvsum.engine.models import resolve
        from auvsum.text.prompts import build_prompt

        tokenizer = AutoTokenizer.from_pretrained(resolve(model), local_files_only=True)
        build_prompt(tokenizer, "warm up")
        start = time.perf_counter()
        if whole:
            tokens = len(build_prompt(tokenizer, text).ids)
        else:
            tokens = sum(window.tokens for window in rounds.cut_windows(text, rounds.WINDOW, tokenizer))
        seconds = time.perf_counter() - start
    size = Path(path).stat().st_size / 1e6
    return {
        "read_mb_s": size / read,
        "tokenize_mb_s": size / seconds,
        "tokens": tokens,
        "read_bytes": held,
        "peak_bytes": common.peak_rss(),
    }


if __name__ == "__main__":
    main()

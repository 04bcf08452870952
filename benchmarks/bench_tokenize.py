"""How fast a file becomes token ids, and how much memory that holds: reading and tokenizing must not be the bottleneck.

    python benchmarks/bench_tokenize.py --megabytes 1 16 64
    python benchmarks/bench_tokenize.py --megabytes 64 --whole            # the ids of all of it, as one prompt
    python benchmarks/bench_tokenize.py --megabytes 1024 --read-only      # a 1 GB file: is it held more than once?
    python benchmarks/bench_tokenize.py --megabytes 1024 --read-only --ascii --out benchmarks/results/tokenize-cpu.json

A text far beyond the model's positions is cut into windows, whose tokens are counted and let go; `--whole` tokenizes it
as a shorter one. Each size is a process of its own, whose memory is looked at from outside: all of it, and what is its
own (without mapped files, which the system takes back when it needs to). The sample has curly quotes, with which Python
keeps two bytes a character; `--ascii` is without.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--read-only", action="store_true", help="read the file and leave it untokenized")
    parser.add_argument("--whole", action="store_true", help="hold the ids of the whole text")
    parser.add_argument("--ascii", action="store_true", help="a text of ASCII alone")
    parser.add_argument("--out", type=Path, help="JSON; rows that are there already stay")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(_measure(given.child, None if given.read_only else given.model, given.whole)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for megabytes in given.megabytes:
            path = _written(Path(folder) / "long.txt", megabytes * 2**20, given.ascii)
            command = [sys.executable, __file__, "--child", str(path), "--model", given.model]
            command += ["--read-only"] * given.read_only + ["--whole"] * given.whole
            text = "ASCII" if given.ascii else "curly quotes"
            how = "read" if given.read_only else "whole" if given.whole else "windows"
            rows.append({"megabytes": megabytes, "text": text, "how": how, **_watched(command)})
    table = [
        [f"{row['megabytes']} MB, {row['text']}, {row['how']}", f"{row['read_mb_s']:.0f}",
         f"{row['tokenize_mb_s']:.2f}" if row["tokenize_mb_s"] else "", f"{row['tokens']:,}",
         *(f"{row[key] / 2**20:.0f}" for key in ("read_bytes", "own_bytes", "peak_bytes"))]
        for row in rows
    ]  # fmt: skip
    common.print_table(
        ["file", "read MB/s", "tokenize MB/s", "tokens", "own, read, MiB", "own, peak, MiB", "RSS, peak, MiB"], table
    )
    if given.out and given.out.is_file():
        rows = json.loads(given.out.read_text(encoding="utf-8"))["rows"] + rows
    record = {"benchmark": "tokenize", **common.machine(), **common.versions(), "rows": rows}
    if given.out:
        given.out.write_text(json.dumps(record).replace("}, {", "},\n{") + "\n", encoding="utf-8")
    common.print_json(record)


def _watched(command: list[str]) -> dict[str, Any]:
    """What the process measures, and its peaks as seen from here: `own_bytes` without mapped files."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peaks = {"own_bytes": 0, "peak_bytes": 0}
    while process.poll() is None:
        seen = {"own_bytes": common.own_memory(process.pid), "peak_bytes": common.peak_rss(process.pid)}
        peaks = {name: max(peaks[name], value) for name, value in seen.items()}
        time.sleep(0.02)
    assert process.stdout is not None
    return {**json.loads(process.stdout.read().splitlines()[-1]), **peaks}


def _written(path: Path, size: int, ascii: bool) -> Path:
    text = (common.ROOT / "samples" / "money-bail.txt").read_text(encoding="utf-8")
    data = text.encode("ascii", "ignore") if ascii else text.encode()
    with path.open("wb") as file:
        for start in range(0, size, len(data)):
            file.write(data[: size - start])
    return path


def _measure(path: str, model: str | None, whole: bool) -> dict[str, float | None]:
    """Times of one file, and how much more memory the process has for itself once it holds the text."""
    from auvsum.text.readers import read_document

    before = common.own_memory()
    start = time.perf_counter()
    text = read_document(path).text
    read = time.perf_counter() - start
    held = common.own_memory() - before
    tokens, seconds = 0, None
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
        "tokenize_mb_s": size / seconds if seconds else None,
        "tokens": tokens,
        "read_bytes": held,
    }


if __name__ == "__main__":
    main()

"""Peak memory against the length of the document: KV as auvsum reports it, RSS as the kernel sees it from outside.

    python benchmarks/bench_memory.py --max 65536 --plot docs/memory.png
    python benchmarks/bench_memory.py --max 1048576 --budget 512

Each length is a process of its own. The document is the sample report, over and over: only its length matters here.
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

#: Characters a token, about: the document is cut by tokens afterwards.
_CHARACTERS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max", type=int, default=65536, help="the longest document in tokens; from 2,048 by fours")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--budget", default="512")
    parser.add_argument("--policy", default="auv")
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--strategy", nargs="+", default=["stream"], choices=["stream", "map-reduce"])
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="JSON, written after each length")
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    lengths = [length for length in (2**power for power in range(11, 31, 2)) if length < given.max] + [given.max]
    rows: list[dict[str, Any]] = []
    record: dict[str, Any] = {}
    for strategy, length in ((strategy, length) for length in lengths for strategy in given.strategy):
        rows.append(_measure(given, strategy, length))
        settings = {"budget": given.budget, "policy": given.policy, "chunk": given.chunk, "device": given.device}
        record = {"benchmark": "memory", **common.machine(), **common.versions(), "settings": settings, "rows": rows}
        if given.out:
            given.out.write_text(json.dumps(record).replace("}, {", "},\n{") + "\n", encoding="utf-8")
    common.print_table(
        ["strategy", "tokens", "KV held, MiB", "KV in prefill, MiB", "full cache, MiB", "RSS, MiB", "read, s"],
        [
            [row["strategy"], f"{row['tokens']:,}", *(f"{row[key] / 2**20:.1f}" for key in
             ("kv_bytes", "prefill_peak_bytes", "full_bytes", "rss_bytes")), f"{row['prefill_s']:.1f}"]
            for row in rows
        ],
    )  # fmt: skip
    if given.plot:
        _plot(rows, given.plot)
    common.print_json(record)


def _measure(given: argparse.Namespace, strategy: str, tokens: int) -> dict[str, Any]:
    """One document by the command line, with an eye on the process from outside."""
    sample = (common.ROOT / "samples" / "money-bail.txt").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "long.txt"
        length = tokens * _CHARACTERS
        path.write_text((sample * (length // len(sample) + 1))[:length], encoding="utf-8")
        command = [
            *(sys.executable, "-m", "auvsum", "summarize", str(path), "--strategy", strategy, "--format", "json"),
            *("--budget", given.budget, "--policy", given.policy, "--chunk", str(given.chunk), "--quiet"),
            *("--model", given.model, "--max-tokens", str(given.max_tokens), "--device", given.device),
            *(["--threads", str(given.threads)] if given.threads else []),
        ]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=common.ROOT)
        peak = 0
        while process.poll() is None:
            # The kernel keeps the highest value itself; what is missed is only the last tenth of a second.
            peak = max(peak, common.peak_rss(process.pid))
            time.sleep(0.1)
        assert process.stdout is not None
        record = json.loads(process.stdout.read())
    print(f"{strategy} {tokens:,} tokens: RSS {peak / 2**20:,.0f} MiB", file=sys.stderr, flush=True)
    token_bytes = record["kv"]["full_bytes"] if strategy == "stream" else 0
    return {
        "strategy": strategy,
        "tokens": record["tokens"]["prompt"],
        "kv_bytes": record["kv"]["peak_bytes"],
        "prefill_peak_bytes": record["kv"]["prefill_peak_bytes"],
        "full_bytes": token_bytes,
        "rss_bytes": peak,
        "prefill_s": record["time"]["prefill_s"],
    }


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for strategy in dict.fromkeys(row["strategy"] for row in rows):
        mine = [row for row in rows if row["strategy"] == strategy]
        lengths = [row["tokens"] for row in mine]
        for key, label, style in (
            ("rss_bytes", "process (RSS)", "o-"),
            ("full_bytes", "what the full cache would hold", "k:"),
            ("prefill_peak_bytes", "KV while reading", "^-"),
            ("kv_bytes", "KV held", "s-"),
        ):
            if any(row[key] for row in mine):
                axes.plot(lengths, [row[key] / 2**20 for row in mine], style, label=f"{strategy}: {label}")
    axes.set(xscale="log", yscale="log", xlabel="document, tokens", ylabel="MiB", title="Peak memory against length")
    axes.set_xscale("log", base=2)
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()

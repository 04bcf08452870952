"""Peak memory against the length of the document: KV as auvsum reports it, RSS as the kernel sees it from outside.

    python benchmarks/bench_memory.py --max 65536 --plot docs/memory.png
    python benchmarks/bench_memory.py --lengths 1060000 --out memory.json      # beside the rows that are there already
    python benchmarks/bench_memory.py --shape llama-8b --device cuda --budget 1311 --chunk 2048 --max 1048576

Each length is a process of its own. With `--watch`, the memory while a document is read is written down as well, each
time twice as many tokens have been, and every 131,072: a run that ends early has shown something. The document is the
sample report, over and over: only its length matters here. With `--shape` the model has random weights and reads random
tokens through the engine, all lengths one by one in one process; torch says what it allocated, nvidia-smi what the GPU
held.
"""

from __future__ import annotations

import argparse
import json
import queue
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common

#: The command line, which tells its peak of memory while it reads.
_WATCHED = """
import sys, time
import auvsum.engine.generate as generate
made, begun = generate.PrefillProgress, time.perf_counter()
def told(index, done, total):
    if done & (done - 1) == 0 or done % 131072 == 0:
        peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
        print("watched", done, int(peak) * 1024, round(time.perf_counter() - begun, 1), file=sys.stderr, flush=True)
    return made(index, done, total)
generate.PrefillProgress = told
from auvsum.__main__ import main
sys.exit(main())
"""
#: Characters a token, about: the document is cut by tokens afterwards.
_CHARACTERS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max", type=int, default=65536, help="the longest document in tokens; from 2,048 by fours")
    parser.add_argument("--lengths", type=int, nargs="+", help="these instead")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--shape", choices=common.SHAPES, help="random weights of that shape, read by the engine alone")
    parser.add_argument("--budget", default="512")
    parser.add_argument("--policy", default="auv")
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--strategy", nargs="+", default=["stream"], choices=["stream", "map-reduce"])
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="JSON, written after each length; rows of other lengths stay in it")
    parser.add_argument("--watch", action="store_true", help="memory while a document is read, too")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    lengths = [length for length in (2**power for power in range(11, 31, 2)) if length < given.max] + [given.max]
    lengths = given.lengths or lengths
    if given.child:
        _read_random(given, lengths)
        return
    settings = {key: getattr(given, key) for key in ("budget", "policy", "chunk", "device")}
    settings |= {"shape": given.shape} if given.shape else {}
    record = json.loads(given.out.read_text(encoding="utf-8")) if given.out and given.out.is_file() else {}
    rows: list[dict[str, Any]] = record["rows"] if record.get("settings") == settings else []
    for row in _random_shape(lengths) if given.shape else _documents(given, lengths):
        by_length = {(old["strategy"], old["tokens"], old.get("of", 0)): old for old in [*rows, row]}
        rows = [by_length[key] for key in sorted(by_length)]
        record = {"benchmark": "memory", **common.machine(), **common.versions(), "settings": settings, "rows": rows}
        if given.out:
            given.out.write_text(json.dumps(record).replace("}, {", "},\n{") + "\n", encoding="utf-8")
    if given.plot:
        _plot(rows, given.plot)
    rows = [row for row in rows if "of" not in row]
    common.print_table(
        ["strategy", "tokens", "KV held, MiB", "KV in prefill, MiB", "full cache, MiB", "RSS, MiB", "read, s"],
        [
            [row["strategy"], f"{row['tokens']:,}", *(f"{row[key] / 2**20:.1f}" for key in
             ("kv_bytes", "prefill_peak_bytes", "full_bytes", "rss_bytes")), f"{row['prefill_s']:.1f}"]
            for row in rows
        ],
    )  # fmt: skip
    common.print_json(record)


def _documents(given: argparse.Namespace, lengths: Sequence[int]) -> Iterator[dict[str, Any]]:
    for length in lengths:
        for strategy in given.strategy:
            yield from _measure(given, strategy, length)


def _measure(given: argparse.Namespace, strategy: str, tokens: int) -> Iterator[dict[str, Any]]:
    """One document by the command line, with an eye on the process from outside; before it, what was watched."""
    sample = (common.ROOT / "samples" / "money-bail.txt").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "long.txt"
        length = tokens * _CHARACTERS
        path.write_text((sample * (length // len(sample) + 1))[:length], encoding="utf-8")
        tool = ("-c", _WATCHED) if given.watch else ("-m", "auvsum")
        command = [
            *(sys.executable, *tool, "summarize", str(path), "--strategy", strategy, "--format", "json"),
            *("--budget", given.budget, "--policy", given.policy, "--chunk", str(given.chunk), "--quiet"),
            *("--model", given.model, "--max-tokens", str(given.max_tokens), "--device", given.device),
            *(["--threads", str(given.threads)] if given.threads else []),
        ]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=common.ROOT, bufsize=1
        )
        assert process.stdout is not None
        assert process.stderr is not None
        told: queue.SimpleQueue[str] = queue.SimpleQueue()
        errors = process.stderr
        threading.Thread(target=lambda: [told.put(line) for line in errors], daemon=True).start()
        peak = 0
        while process.poll() is None or not told.empty():
            # The kernel keeps the highest value itself; what is missed is only the last tenth of a second.
            peak = max(peak, common.peak_rss(process.pid))
            while not told.empty():
                line = told.get()
                if line.startswith("watched "):
                    done, rss, seconds = line.split()[1:]
                    row = {"strategy": strategy, "tokens": int(done), "of": tokens, "rss_bytes": int(rss)}
                    yield {**row, "seconds": float(seconds)}
                else:
                    print(line, end="", file=sys.stderr, flush=True)
            time.sleep(0.1)
        record = json.loads(process.stdout.read())
    print(f"{strategy} {tokens:,} tokens: RSS {peak / 2**20:,.0f} MiB", file=sys.stderr, flush=True)
    token_bytes = record["kv"]["full_bytes"] if strategy == "stream" else 0
    yield {
        "strategy": strategy,
        "tokens": record["tokens"]["prompt"],
        "kv_bytes": record["kv"]["peak_bytes"],
        "prefill_peak_bytes": record["kv"]["prefill_peak_bytes"],
        "full_bytes": token_bytes,
        "rss_bytes": peak,
        "prefill_s": record["time"]["prefill_s"],
    }


# -- random weights ---------------------------------------------------------------------------------------------------


def _random_shape(lengths: Sequence[int]) -> Iterator[dict[str, Any]]:
    """A row for each length that the other process has read, with the peaks that were seen from here."""
    process = subprocess.Popen([sys.executable, *sys.argv, "--child"], stdout=subprocess.PIPE, text=True)
    peaks = {"rss_bytes": 0, "gpu_used_bytes": 0}

    def watch() -> None:
        while process.poll() is None:
            seen = {"rss_bytes": common.peak_rss(process.pid), "gpu_used_bytes": _gpu_used()}
            peaks.update({name: max(peaks[name], value) for name, value in seen.items()})
            time.sleep(0.2)

    threading.Thread(target=watch, daemon=True).start()
    assert process.stdout is not None
    for line, _ in zip(process.stdout, lengths, strict=True):
        row = {**json.loads(line), **peaks}
        print(row, file=sys.stderr, flush=True)
        yield row


def _gpu_used() -> int:
    """Bytes in use on the first GPU, by everything; 0 where nvidia-smi does not tell."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--id=0", "--query-gpu=memory.used", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
        )
    except OSError:
        return 0
    return int(done.stdout) * 2**20 if done.returncode == 0 else 0


def _read_random(given: argparse.Namespace, lengths: Sequence[int]) -> None:
    """The other process: prints a line for each length."""
    import torch

    from auvsum.cache.policy import make_policy
    from auvsum.engine.generate import Engine, Request
    from auvsum.engine.memory import cache_shape
    from auvsum.engine.parts import chunks
    from auvsum.events import Failed, Finished, Prefilled

    model = common.random_model(given.shape, dtype=torch.bfloat16, device=given.device)
    engine = Engine(model, make_policy(given.policy), chunk=given.chunk)
    draw = random.Random(0)
    on_gpu = engine.device.type == "cuda"
    for length in lengths:
        over = length + given.max_tokens > model.config.max_position_embeddings
        parts = chunks(length, given.chunk, compact=True) if over else ()
        ids = draw.choices(range(model.config.vocab_size), k=length)
        row: dict[str, Any] = {"strategy": "stream", "tokens": length}
        row["full_bytes"] = cache_shape(model).token_bytes * length
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        for event in engine.run([Request(ids, int(given.budget), given.max_tokens, parts)]):
            if isinstance(event, Prefilled):
                row |= {"prefill_s": round(event.seconds, 3), "prefill_peak_bytes": event.prefill_peak_bytes}
            elif isinstance(event, Finished):
                row["kv_bytes"] = event.kv_bytes
            elif isinstance(event, Failed):
                raise event.error
        row["weights_bytes"] = sum(parameter.nbytes for parameter in model.parameters())
        row["allocated_bytes"] = torch.cuda.max_memory_allocated() if on_gpu else 0
        time.sleep(0.5)  # the other process looks every so often
        print(json.dumps(row), flush=True)


# -- the picture ------------------------------------------------------------------------------------------------------


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    watched = [row for row in rows if "of" in row and row["tokens"] >= 2048]
    if watched:
        lengths = [row["tokens"] for row in watched]
        label = f"process (RSS) while it reads {watched[-1]['of']:,}"
        axes.plot(lengths, [row["rss_bytes"] / 2**20 for row in watched], ".--", label=label)
    rows = [row for row in rows if "of" not in row]
    for strategy in dict.fromkeys(row["strategy"] for row in rows):
        mine = [row for row in rows if row["strategy"] == strategy]
        lengths = [row["tokens"] for row in mine]
        for key, label, style in (
            ("gpu_used_bytes", "GPU, from outside", "D-"),
            ("allocated_bytes", "allocated by torch", "v-"),
            ("rss_bytes", "process (RSS)", "o-"),
            ("full_bytes", "what the full cache would hold", "k:"),
            ("prefill_peak_bytes", "KV while reading", "^-"),
            ("kv_bytes", "KV held", "s-"),
        ):
            if any(row.get(key) for row in mine):
                axes.plot(lengths, [row[key] / 2**20 for row in mine], style, label=f"{strategy}: {label}")
    axes.set(xscale="log", yscale="log", xlabel="document, tokens", ylabel="MiB", title="Peak memory against length")
    axes.set_xscale("log", base=2)
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()

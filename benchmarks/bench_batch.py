"""Does writing documents together pay? The same documents through one engine, one at a time and several at once.

    python benchmarks/bench_batch.py                                      # the default model
    python benchmarks/bench_batch.py --prompt 300 --policy full
    python benchmarks/bench_batch.py --shape opt-125m --together 1 4      # random weights: nothing to fetch

Prompts are read one at a time whatever the batch size; only writing is shared. So the gain depends on how much is
written for what is read: `--prompt` and `--new-tokens`. Rounds are interleaved, medians are shown, the last line is one
JSON object. `--together 0` lets the engine choose from the free memory, as `--batch-size auto` does.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import bench_decode
import common


@dataclass(frozen=True)
class Result:
    """What a run over all documents took.

    Attributes:
        processor: seconds of processor time, which depend little on what else the machine does.
        first: seconds until the first document was finished.
    """

    seconds: float
    processor: float
    first: float
    decode: float
    kv_bytes: int
    rows: int
    written: dict[int, tuple[int, ...]]


def case(model: Any, policy: Any, requests: list[Any], together: int) -> Callable[[], Result]:
    """All documents through an engine of that batch size."""
    from auvsum.engine.generate import Engine
    from auvsum.events import Finished, Prefilled

    def run() -> Result:
        engine = Engine(model, policy, batch_size=together or None)
        begun, used = time.perf_counter(), time.process_time()
        first = reading = 0.0
        held = rows = 0
        written = {}
        for event in engine.run(requests):
            if isinstance(event, Prefilled):
                reading += event.seconds
            elif isinstance(event, Finished):
                first = first or time.perf_counter() - begun
                rows = max(rows, engine.rows)
                held = max(held, event.kv_bytes * engine.rows)
                written[event.request] = event.token_ids
        seconds = time.perf_counter() - begun
        return Result(seconds, time.process_time() - used, first, seconds - reading, held, rows, written)

    return run


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_model_arguments(parser)
    parser.add_argument("--together", type=int, nargs="+", default=[1, 2, 4, 8, 16, 0], metavar="DOCUMENTS")
    parser.add_argument("--documents", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=1000, metavar="TOKENS")
    parser.add_argument("--new-tokens", type=int, default=64, metavar="TOKENS")
    parser.add_argument("--policy", default="auv")
    parser.add_argument("--slots", type=int, default=256, help="a layer; `full` takes what it needs")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--dtype", choices=("auto", "bf16", "fp16", "fp32"), default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    return parser.parse_args()


def main() -> None:
    from auvsum.cache.policy import make_policy
    from auvsum.engine.generate import Request

    options = parse()
    model, _, ids = bench_decode.load_model(options)
    policy, length, new = make_policy(options.policy), options.prompt, options.new_tokens
    slots = policy.slots_to_hold(length + new) if options.policy == "full" else options.slots
    # Every document begins elsewhere in the text, so that no two are alike.
    starts = [number * length // options.documents for number in range(options.documents)]
    requests = [Request(ids[start:] + ids[:start], slots, new) for start in starts]
    case(model, policy, requests[:2], 2)()  # what is slow the first time
    cases = {str(size): case(model, policy, requests, size) for size in options.together}
    results, failed = common.interleave(cases, options.repetitions, warmups=0)
    rows, alone = [], results[str(options.together[0])][0].written
    for name, runs in results.items():
        if not runs:
            rows.append({"together": name, "note": failed[name]})
            continue
        rows.append(
            {
                "together": name if name != "0" else f"auto ({runs[0].rows})",
                "seconds": round(common.median([run.seconds for run in runs]), 2),
                "processor_s": round(common.median([run.processor for run in runs]), 2),
                "first_s": round(common.median([run.first for run in runs]), 2),
                "decode_s": round(common.median([run.decode for run in runs]), 2),
                "kv_bytes": runs[0].kv_bytes,
                "same_as_first_row": sum(runs[0].written[number] == tokens for number, tokens in alone.items()),
                "note": "",
            }
        )
    print(f"{options.documents} documents of {length} tokens, {new} written of each, policy {options.policy}, "
          f"{slots} slots, {str(model.dtype).removeprefix('torch.')}, {model.device}\n")  # fmt: skip
    common.print_table(
        ["together", "all, s", "processor, s", "first, s", "writing, s", "KV MiB", "same text"],
        [
            [row["together"], f"{row['seconds']:.1f}", f"{row['processor_s']:.1f}", f"{row['first_s']:.1f}",
             f"{row['decode_s']:.1f}", f"{row['kv_bytes'] / 2**20:.1f}", f"{row['same_as_first_row']}"]
            if not row["note"] else [row["together"], row["note"], "", "", "", "", ""]
            for row in rows
        ],
    )  # fmt: skip
    print()
    common.print_json(
        {
            "benchmark": "batch",
            "model": options.shape or options.model or "default model",
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
            "documents": options.documents,
            "prompt_tokens": length,
            "new_tokens": new,
            "policy": options.policy,
            "slots": slots,
            "repetitions": options.repetitions,
            "peak_rss_bytes": common.peak_rss(),
            "machine": common.machine(),
            "versions": common.versions(),
            "rows": rows,
        }
    )


if __name__ == "__main__":
    main()

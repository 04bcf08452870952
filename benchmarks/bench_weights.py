"""Weights as they are, in 8 bits and in a GGUF file's own 4 bits: steps by rows, reading, and how near they are.

    python benchmarks/bench_weights.py --threads 2 --out benchmarks/results/weights-speed.json

On the CPU, with the default model. Steps run over 180 held tokens that are drawn, so that only the model is timed;
medians of runs in turns. Nearness is the KL divergence to the bf16 weights computed in fp32, and how often the best
token is the same, on one sample text. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import common

TEXT = common.ROOT / "samples" / "money-bail.txt"
KINDS = ("bf16", "int8", "gguf")
_HELD = 180


class _Layer:
    """What a step asks of a layer of the cache, without a policy."""

    def __init__(self, rows: int, shape: Any, dtype: Any) -> None:
        import torch

        size = (rows, shape.kv_heads, _HELD, shape.head_dim)
        self.key, self.value = torch.randn(size, dtype=dtype), torch.randn(size, dtype=dtype)

    def update(self, _key: Any, _value: Any) -> tuple[Any, Any]:
        return self.key, self.value

    def attend(self, query: Any, key: Any, value: Any, scale: float, _: None) -> Any:
        from torch.nn.functional import scaled_dot_product_attention

        return scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=True).transpose(1, 2)


class _Cache:
    def __init__(self, rows: int, shape: Any, dtype: Any) -> None:
        self.layers = [_Layer(rows, shape, dtype) for _ in range(shape.layers)]


def seconds(case: Callable[..., Any], *arguments: Any, **more: Any) -> float:
    started = perf_counter()
    case(*arguments, **more)
    return perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repetitions", type=int, default=14)
    parser.add_argument("--tokens", type=int, default=600, help="of the text on which nearness is measured")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], help="of a step")
    parser.add_argument("--read", type=int, nargs="+", default=[512, 2048], help="tokens of a prompt")
    parser.add_argument("--out", type=Path, help="also write the JSON there, after every part")
    options = parser.parse_args()

    from auvsum import _env

    _env.prepare()
    import torch

    from auvsum.engine.lean import lean_step
    from auvsum.engine.models import load

    torch.set_grad_enabled(False)
    loaded = {kind: load(device="cpu", weights=kind, threads=options.threads) for kind in KINDS}
    models = {kind: found.model for kind, found in loaded.items()}
    plain = loaded["bf16"]
    record: dict[str, Any] = {
        "benchmark": "weights-speed",
        "machine": common.machine(),
        "versions": common.versions(),
        "dtype": str(plain.dtype),
        "load_s": {kind: round(found.load_seconds, 2) for kind, found in loaded.items()},
    }

    def keep(**found: Any) -> None:
        record.update(found)
        if options.out:
            options.out.write_text(json.dumps(record, indent=1) + "\n")

    ids = torch.tensor([plain.tokenizer(TEXT.read_text(encoding="utf-8"), verbose=False).input_ids[: options.tokens]])
    wanted = load(device="cpu", dtype="fp32", threads=options.threads).model(ids).logits[0].log_softmax(-1)
    near = {}
    for kind, model in models.items():
        logits = model(ids).logits[0].float().log_softmax(-1)
        kl = (wanted.exp() * (wanted - logits)).sum(-1).mean().item()
        near[kind] = [round(kl, 6), round((wanted.argmax(-1) == logits.argmax(-1)).float().mean().item(), 4)]
    keep(kl_and_same_token=near)

    steps = {kind: lean_step(model) for kind, model in models.items()}
    taken: dict[int, dict[str, float]] = {}
    for rows in options.rows:
        cache, positions = _Cache(rows, plain.shape, plain.dtype), torch.full((rows,), 500)
        tokens = torch.arange(rows) + 100
        cases = {kind: partial(seconds, step, tokens, positions, cache) for kind, step in steps.items()}
        results, _ = common.interleave(cases, options.repetitions)
        taken[rows] = {kind: round(1000 * common.median(times), 2) for kind, times in results.items()}
        keep(step_ms=taken)
    read: dict[int, dict[str, float]] = {}
    for count in options.read:
        prompt = torch.arange(count)[None] + 100
        cases = {kind: partial(seconds, model, prompt, logits_to_keep=1) for kind, model in models.items()}
        results, _ = common.interleave(cases, 4)
        read[count] = {kind: round(common.median(times), 3) for kind, times in results.items()}
        keep(reading_s=read)
    rows_of_table = [
        [f"a step of {rows} rows, ms", *(f"{times[kind]:.1f}" for kind in KINDS)] for rows, times in taken.items()
    ]
    rows_of_table += [
        [f"reading {n} tokens, s", *(f"{times[kind]:.2f}" for kind in KINDS)] for n, times in read.items()
    ]
    rows_of_table.append(["KL", *(f"{near[kind][0]:.4f}" for kind in KINDS)])
    common.print_table(["", *KINDS], rows_of_table)
    common.print_json(record)


if __name__ == "__main__":
    main()

"""How fast prompts are read and summaries written: auvsum beside transformers and llama.cpp, in one run.

    python benchmarks/bench_decode.py                                     # the default model
    python benchmarks/bench_decode.py --shape opt-125m --prompt 1900      # random weights of a real shape
    python benchmarks/bench_decode.py --gguf model.gguf                   # llama.cpp as well, on the same tokens

All engines read the same tokens, write the same number, greedily, one sequence at a time, and are watched by the same
clock: prefill ends when the first new token is there, decode is the rate of the others. Runs are interleaved, medians
are shown. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common

BUDGETS = ("4%", "10%")
TEXT = common.ROOT / "samples" / "money-bail.txt"


@dataclass
class Run:
    """One prompt read and continued. `ticks` are the times at which new tokens were there."""

    started: float = field(default_factory=time.perf_counter)
    ticks: list[float] = field(default_factory=list)
    kv_bytes: int | None = None

    def tick(self) -> None:
        self.ticks.append(time.perf_counter())

    @property
    def prefill_seconds(self) -> float:
        return self.ticks[0] - self.started

    @property
    def decode_rate(self) -> float:
        """Tokens a second after the first."""
        return (len(self.ticks) - 1) / (self.ticks[-1] - self.ticks[0])


# -- auvsum ------------------------------------------------------------------------------------------------------------


def auvsum_case(
    model: Any, shape: Any, ids: list[int], new: int, name: str, budget: str, chunk: int | None, bits: int = 16
) -> Callable[[], Run]:
    """auvsum's engine under a share of the full cache's bytes."""
    from auvsum.budget import parse_budget, resolve
    from auvsum.cache.policy import make_policy
    from auvsum.engine.generate import Engine, Request
    from auvsum.events import Finished, Token

    policy = make_policy(name)
    slots = resolve(
        parse_budget(budget),
        shape=shape,
        cost=policy.slot_cost(
            kv_heads=shape.kv_heads, head_dim=shape.head_dim, element_bytes=shape.element_bytes, bits=bits
        ),
        prompt_tokens=len(ids),
        max_new_tokens=new,
        least_slots=policy.least_slots,
        slots_to_hold=policy.slots_to_hold,
        paper_slots=policy.paper_slots,
        free_bytes=0,
    ).slots
    if name == "full":
        slots = policy.slots_to_hold(len(ids) + new)

    def case() -> Run:
        engine = Engine(model, policy, chunk=chunk, bits=bits)
        run = Run()
        for event in engine.run([Request(ids, slots=slots, max_new_tokens=new)]):
            if isinstance(event, Token):
                run.tick()
            elif isinstance(event, Finished):
                run.kv_bytes = event.kv_bytes
        return run

    return case


# -- transformers ------------------------------------------------------------------------------------------------------


class _Clock:
    """A streamer for `generate`: it is handed the prompt first, then every new token."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.prompt_seen = False

    def put(self, _: Any) -> None:
        if self.prompt_seen:
            self.run.tick()
        self.prompt_seen = True

    def end(self) -> None:
        pass


def transformers_case(model: Any, ids: list[int], new: int, attention: str) -> Callable[[], Run]:
    """`model.generate` with the growing cache, as published."""
    import torch
    from transformers import DynamicCache

    prompt = torch.tensor([ids], device=model.device)

    def case() -> Run:
        model.set_attn_implementation(attention)
        cache = DynamicCache(config=model.config)
        run = Run()
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=cache,
            max_new_tokens=new,
            do_sample=False,
            streamer=_Clock(run),
        )
        run.kv_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        return run

    return case


# -- llama.cpp ---------------------------------------------------------------------------------------------------------


def llama_cpp_case(gguf: Path, ids: list[int], new: int, threads: int) -> Callable[[], Run]:
    """llama.cpp through its Python binding, on the weights of a GGUF file."""
    from llama_cpp import Llama

    llama = Llama(
        str(gguf), n_ctx=len(ids) + new, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False
    )

    def case() -> Run:
        llama.reset()
        run = Run()
        llama.eval(ids)
        for number in range(new):
            token = llama.sample(temp=0.0)
            run.tick()
            if number + 1 < new:
                llama.eval([token])
        return run

    return case


# -- the run -----------------------------------------------------------------------------------------------------------


def load_model(options: argparse.Namespace) -> tuple[Any, Any, list[int]]:
    """The model, the shape of its cache, and the prompt: real text, or random tokens for random weights."""
    import torch

    from auvsum.engine.memory import cache_shape

    if options.threads:
        torch.set_num_threads(options.threads)
    device = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if options.shape is None:
        from auvsum.engine.models import load

        loaded = load(options.model, device=device, dtype=options.dtype, threads=options.threads)
        text = TEXT.read_text(encoding="utf-8")
        ids = loaded.tokenizer(text, verbose=False).input_ids
        ids = (ids * (options.prompt // len(ids) + 1))[: options.prompt]
        return loaded.model, loaded.shape, ids
    dtypes = {"auto": torch.bfloat16, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    model = common.random_model(options.shape, dtype=dtypes[options.dtype], device=device)
    draw = random.Random(0)
    ids = [draw.randrange(4, model.config.vocab_size) for _ in range(options.prompt)]
    return model, cache_shape(model), ids


def build_cases(
    model: Any, shape: Any, ids: list[int], options: argparse.Namespace
) -> tuple[dict[str, Callable[[], Run]], dict[str, str]]:
    """The engines to compare, and why some are missing."""
    import torch

    new, missing = options.new_tokens, {}
    cases = {"auvsum full": auvsum_case(model, shape, ids, new, "full", "100%", options.chunk)}
    for policy in ("h2o", "auv"):
        for budget in BUDGETS:
            cases[f"auvsum {policy} {budget}"] = auvsum_case(model, shape, ids, new, policy, budget, options.chunk)
    for attention in ("sdpa", "eager"):
        cases[f"transformers {attention}"] = transformers_case(model, ids, new, attention)
    try:
        import llama_cpp  # noqa: F401
    except ImportError:
        missing["llama.cpp"] = "not installed"
    else:
        if options.gguf is None:
            missing["llama.cpp"] = "no --gguf"
        else:
            cases["llama.cpp"] = llama_cpp_case(options.gguf, ids, new, torch.get_num_threads())
    return cases, missing


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_model_arguments(parser)
    parser.add_argument("--prompt", type=int, default=1900, metavar="TOKENS")
    parser.add_argument("--new-tokens", type=int, default=64, metavar="TOKENS")
    parser.add_argument("--chunk", type=int, metavar="TOKENS", help="auvsum reads the prompt in chunks of that size")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--dtype", choices=("auto", "bf16", "fp16", "fp32"), default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--gguf", type=Path, help="weights for llama.cpp; the same model, or the token ids mean nothing"
    )
    options = parser.parse_args()
    if options.new_tokens < 2:
        parser.error("--new-tokens must be at least 2: the first one belongs to the prefill")
    return options


def main() -> None:
    options = parse()
    model, shape, ids = load_model(options)
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and len(ids) + options.new_tokens > limit:
        raise SystemExit(f"error: {len(ids)} + {options.new_tokens} tokens, but the model tells {limit} apart")
    model.generation_config.eos_token_id = None  # everybody writes as many tokens as asked for
    cases, missing = build_cases(model, shape, ids, options)
    results, failed = common.interleave(cases, options.repetitions)

    notes = {**missing, **failed}
    rows: list[dict[str, Any]] = []
    for name in [*cases, *missing]:
        runs = results.get(name, [])
        row: dict[str, Any] = {"engine": name, "note": notes.get(name, "")}
        if runs:
            row["prefill_s"] = round(common.median([run.prefill_seconds for run in runs]), 4)
            row["decode_tokens_per_s"] = round(common.median([run.decode_rate for run in runs]), 2)
            row["kv_bytes"] = runs[0].kv_bytes
        rows.append(row)

    def cells(row: dict[str, Any]) -> list[str]:
        if "prefill_s" not in row:
            return [row["engine"], "-", "-", "-", row["note"]]
        held = "" if row["kv_bytes"] is None else f"{row['kv_bytes'] / 2**20:.1f}"
        return [row["engine"], f"{row['prefill_s']:.2f}", f"{row['decode_tokens_per_s']:.1f}", held, row["note"]]

    what = options.shape or options.model or "default model"
    print(f"{what}, {str(model.dtype).removeprefix('torch.')}, {model.device}: {len(ids)} tokens read, "
          f"{options.new_tokens} written, median of {options.repetitions}\n")  # fmt: skip
    common.print_table(["engine", "prefill s", "decode tok/s", "KV MiB", "note"], [cells(row) for row in rows])
    print()
    common.print_json(
        {
            "benchmark": "decode",
            "model": what,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
            "prompt_tokens": len(ids),
            "new_tokens": options.new_tokens,
            "chunk": options.chunk,
            "repetitions": options.repetitions,
            "peak_rss_bytes": common.peak_rss(),
            "machine": common.machine(),
            "versions": common.versions(),
            "rows": rows,
        }
    )


if __name__ == "__main__":
    main()

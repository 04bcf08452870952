"""The GPU table of auvsum: every row with its bytes, its operations, the limit they set, and the share reached.

    python benchmarks/bench_gpu.py                                   # everything that fits one call
    python benchmarks/bench_gpu.py --only decode,prefill             # some sections
    python benchmarks/bench_gpu.py --out benchmarks/results/h100.json

Random weights of the real shapes, fp16, greedy. The limit of a decode step is its bytes (weights, live keys and values,
policy state) over the copy bandwidth measured first, or its operations over the rate of a large matrix product,
whichever is longer. `common` and `gpu_peers` hold what the sections share and whom they compare with.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import gpu_peers as peers
import torch

from auvsum.cache.cache import BudgetedCache
from auvsum.cache.policy import make_policy
from auvsum.engine.fuse import fuse
from auvsum.engine.generate import Engine, Request
from auvsum.engine.graph import DecodeGraph
from auvsum.engine.memory import cache_shape
from auvsum.engine.sampling import Sampling
from auvsum.events import Finished, Token

PROMPT, SLOTS, NEW = 1900, 104, 64
#: Prompts read for a large batch; the other rows start as copies of theirs.
_DISTINCT = 4
#: Memory that may be used, an H100's, whatever the GPU has.
_MEMORY = 78 * 2**30
#: Prompts whose tokens are held against the torch path's.
_CHECKED = 4
#: Seconds that the table may take, and those that are worth a try at compiling.
_SECONDS, _COMPILING = 400, 60


class Bench:
    """One model at a time on the GPU, the ceilings measured, the rows collected."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.model: Any = None
        self.shape = ""
        self.started = time.perf_counter()
        total = torch.cuda.get_device_properties(0).total_memory
        self.memory = min(_MEMORY, total)
        torch.cuda.set_per_process_memory_fraction(self.memory / total)
        self.bandwidth, self.rate = ceilings()

    def forget(self) -> None:
        """Gives the model's memory back."""
        self.model, self.shape = None, ""
        gc.collect()
        torch.cuda.empty_cache()

    def use(self, shape: str) -> Any:
        """A random model of a published shape; the one before makes room."""
        if self.shape != shape:
            self.forget()
            self.shape = shape
            self.model = common.random_model(shape, dtype=torch.float16, device="cuda")
            self.model.generation_config.eos_token_id = None
        return self.model

    def add(
        self, name: str, value: float, unit: str, *, seconds: float, bytes_: float, operations: float, **more: Any
    ) -> None:
        """A row: `seconds` is what was timed, `bytes_` and `operations` what it had to move and compute."""
        limit = max(bytes_ / self.bandwidth, operations / self.rate)
        row = {"what": name, "value": round(value, 3), "unit": unit, "seconds": seconds, "bytes": int(bytes_)}
        row |= {"operations": operations, "limit_s": limit, "share": round(limit / seconds, 4), **more}
        self.rows.append(row)
        print(f"{name}: {value:.2f} {unit}, {limit / seconds:.0%} of the limit {more or ''}", flush=True)

    def note(self, name: str, text: str) -> None:
        """A row without a number."""
        self.rows.append({"what": name, "note": text})
        print(f"{name}: {text}", flush=True)


def median_seconds(run: Callable[[], Any], repetitions: int = 5, warmups: int = 1) -> float:
    """The median of device times between events."""
    times = []
    for number in range(warmups + repetitions):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        if number >= warmups:
            times.append(start.elapsed_time(end) / 1e3)
    return common.median(times)


def ceilings() -> tuple[float, float]:
    """Bytes a second of a large copy (read and written), and operations a second of a large fp16 product."""
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / median_seconds(lambda: target.copy_(source))
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.float16) for _ in range(2))
    return bandwidth, 2 * 8192**3 / median_seconds(lambda: a @ b, 10)


def tokens_of(length: int, seed: int, vocabulary: int) -> list[int]:
    """Random token ids; fresh ones for every seed."""
    drawn = torch.randint(4, vocabulary, (length,), generator=torch.Generator().manual_seed(seed))
    ids: list[int] = drawn.tolist()
    return ids


def weight_bytes(model: Any) -> int:
    """Bytes that a step reads: each weight once, of the embeddings nothing unless they are the output matrix too."""
    tensors = {p.data_ptr(): p for n, p in model.named_parameters() if "embed" not in n or "embed_tokens" in n}
    skip = 0 if model.config.tie_word_embeddings else model.get_input_embeddings().weight.nbytes
    return sum(p.nbytes for p in tensors.values()) - skip


def allocate(cache: BudgetedCache, model: Any) -> None:
    """Makes the cache's stores now."""
    shape = cache_shape(model)
    cache.allocate(kv_heads=shape.kv_heads, head_dim=shape.head_dim, dtype=model.dtype, device=torch.device("cuda"))


# -- decode ------------------------------------------------------------------------------------------------------------


def decoder(model: Any, policy: Any, slots: int, rows: int, new: int) -> tuple[Any, DecodeGraph]:
    """A cache with `rows` documents read into it and its captured step, ready to go."""
    engine = Engine(model, policy, batch_size=rows)
    cache = BudgetedCache(model.config, policy, slots, batch=rows)
    allocate(cache, model)
    fuse(model)
    graph = DecodeGraph(model, cache, Sampling(), (), new)
    length = min(PROMPT, slots) if policy.name == "full" else PROMPT
    length = length - new if policy.name == "full" else length
    for number in range(min(rows, _DISTINCT)):
        cache.begin(length, row=number)
        logits = engine._read(cache, number, tokens_of(length, number, model.config.vocab_size), 0)
        graph.fill(number, int(logits.argmax()), length, new, [])
    pick = torch.arange(rows, device="cuda") % _DISTINCT
    for layer in cache.layers:
        layer.unread = set()
        store = layer.store
        per_row = [*store.keys, *store.values, store.positions, store.valid, *store.state.values(), store.pointer]
        per_row += [store.seen, store.longest, store.capacity]
        per_row += [store.folded_key, store.folded_value, store.folded_mass] if store.reconstruct else []
        for tensor in per_row:
            tensor[_DISTINCT:] = tensor[pick[_DISTINCT:]]
    for tensor in (graph.tokens, graph.positions, graph.left, graph.active):
        tensor.copy_(tensor[pick])
    return cache, graph


def decode_rate(bench: Bench, model: Any, name: str, policy: str, slots: int, rows: int, steps: int = NEW) -> None:
    """Tokens a second of the captured step with evictions firing; the tokens are read back by the host as always."""
    made = make_policy(policy)
    torch.cuda.reset_peak_memory_stats()
    cache, graph = decoder(model, made, slots, rows, steps + 2)
    written: list[list[int]] = []
    graph.launch(["row"] * rows)
    torch.cuda.synchronize()
    before = cache.layers[0].store.seen.clone()
    start = time.perf_counter()
    for _ in range(steps):
        graph.launch(["row"] * rows)
        arrived = graph.arrived()
        written += [arrived[1]] if arrived else []
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    assert int((cache.layers[0].store.seen - before).min()) == steps
    assert len(written) == steps
    assert min(min(step) for step in written) >= 0
    store = cache.layers[0].store
    live = float(store.valid.sum(-1).float().mean())
    shape = cache_shape(model)
    token = 2 * shape.kv_heads * shape.head_dim * 2 + shape.kv_heads * 4 * 2 * len(made.state)
    layers = len(cache.layers)
    bytes_ = (weight_bytes(model) + rows * layers * live * token) * steps
    operations = 2.0 * weight_bytes(model) / 2 * rows * steps
    bench.add(
        name, rows * steps / seconds, "tok/s", seconds=seconds, bytes_=bytes_, operations=operations, batch=rows,
        slots=slots, steps=steps, peak_bytes=torch.cuda.max_memory_allocated(), cache_bytes=cache.bytes(),
    )  # fmt: skip


def cycle_seconds(model: Any, name: str, rows: int) -> float:
    """Seconds a step, on average over the steps from one eviction of every row and layer to the next."""
    local = (SLOTS - 1) // 3
    _, graph = decoder(model, make_policy(name), SLOTS if name == "auv" else 3 * local, rows, 32)
    stores = [layer.store for layer in graph.cache.layers]
    for store in stores:
        store.valid[..., : 2 * local] = True
    graph.left.fill_(10**6)

    def cycle() -> None:
        for _ in range(local):
            graph.graph.replay()

    times = []
    for _ in range(7):
        graph.active.fill_(True)
        graph.positions.fill_(PROMPT)
        for store in stores:
            if name == "full":
                store.valid[..., 2 * local :] = False
            store.pointer.fill_(2 * local)
        times.append(median_seconds(cycle, 1, 0))
    return common.median(times[1:]) / local


def bookkeeping(bench: Bench, model: Any, rows: int) -> None:
    """The same step over the same slots with and without AUV's state; an eviction of every layer in each cycle."""
    seconds = {}
    for name in ("full", "auv"):
        seconds[name] = cycle_seconds(model, name, rows)
        torch.cuda.empty_cache()
    share = seconds["full"] / seconds["auv"] - 1
    bench.rows.append({"what": f"bookkeeping, batch {rows}", "value": round(share, 4), "unit": "change of speed",
                       "step_s": seconds["auv"], "plain_step_s": seconds["full"]})  # fmt: skip
    print(f"bookkeeping at batch {rows}: {share:+.2%} ({seconds})", flush=True)


def check_tokens(bench: Bench, model: Any) -> None:
    """The engine's tokens through the graph and through the plain torch step.

    Each writes freely first. Then the torch path is led along the graph's tokens of several prompts, so that one near
    tie does not part them for good; where it would have written another token, by how much its logits preferred that
    one is in the row.
    """
    from auvsum.engine import generate

    free, led, missed = 0, 0, []
    for seed in range(_CHECKED):
        ids = tokens_of(PROMPT, seed, model.config.vocab_size)
        written = written_tokens(model, ids)
        with peers.plain_step(generate, True):
            if seed == 0:
                free = agreement(written, written_tokens(model, ids))
            engine, cache = Engine(model, make_policy("auv")), BudgetedCache(model.config, make_policy("auv"), SLOTS)
            cache.begin(PROMPT)
            logits = engine._read(cache, 0, ids, 0)
            for step, token in enumerate(written):
                best = int(logits.argmax())
                led += best == token
                if best != token:
                    missed.append([seed, step, float(logits[best] - logits[token]), float(logits.float().std())])
                logits = engine._step(cache, [token], [PROMPT + step])[0]
    bench.rows.append({"what": "tokens equal to the torch path", "value": free, "unit": f"of {NEW}"})
    bench.rows.append({
        "what": "tokens equal to the torch path led along them", "value": led, "unit": f"of {_CHECKED * NEW}",
        "missed": missed, "missed_is": "prompt, step, difference of the two logits, standard deviation of all",
    })  # fmt: skip
    print(f"tokens equal to the torch path: {free} of {NEW}; led {led} of {_CHECKED * NEW} {missed}", flush=True)


def written_tokens(model: Any, ids: list[int]) -> tuple[int, ...]:
    """What the engine writes behind a prompt."""
    events = Engine(model, make_policy("auv")).run([Request(ids, SLOTS, NEW)])
    return next(event.token_ids for event in list(events) if isinstance(event, Finished))


def agreement(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    """How many tokens are equal before the first that are not."""
    unequal = (number for number, (a, b) in enumerate(zip(first, second, strict=True)) if a != b)
    return next(unequal, len(first))


def section_decode(bench: Bench) -> None:
    model = bench.use("opt-13b")
    peers.transformers_decode(bench, model, "sdpa", 1, PROMPT, weight_bytes(model))
    check_tokens(bench, model)
    for policy in ("auv", "h2o"):
        decode_rate(bench, model, f"OPT-13B decode, batch 1, {policy}, 4%", policy, SLOTS, 1, 2 * NEW)
    decode_rate(bench, model, "OPT-13B decode, batch 1, full cache, graph", "full", PROMPT + NEW, 1)


def section_bookkeeping(bench: Bench) -> None:
    model = bench.use("opt-13b")
    for rows in (1, 64, 256):
        bookkeeping(bench, model, rows)


def section_throughput(bench: Bench) -> None:
    model = bench.use("opt-13b")
    for rows in (64, 256, 384, 448, 512):
        guarded(bench, f"OPT-13B, batch {rows}, auv", lambda n, r=rows: decode_rate(bench, model, n, "auv", SLOTS, r))
    for rows in (8, 24):
        name = f"OPT-13B, batch {rows}, full cache, graph"
        guarded(bench, name, lambda n, r=rows: decode_rate(bench, model, n, "full", PROMPT + NEW + 2, r, 32))
    guarded(bench, "transformers, batch 24", lambda _: peers.transformers_decode(
        bench, model, "sdpa", 24, PROMPT, weight_bytes(model)))  # fmt: skip


def section_opt30b(bench: Bench) -> None:
    model = bench.use("opt-30b")
    for rows in (1, 64, 112, 128):
        guarded(bench, f"OPT-30B, batch {rows}, auv", lambda n, r=rows: decode_rate(bench, model, n, "auv", SLOTS, r))


# -- prefill -----------------------------------------------------------------------------------------------------------


def read_prompt(model: Any, ids: list[int], slots: int, chunk: int | None) -> float:
    """Device seconds to read a prompt into its slots; the memory of the slots is there already, as in the engine."""
    engine = Engine(model, make_policy("auv"))
    size = chunk or len(ids)
    cache = BudgetedCache(model.config, engine.policy, slots, batch=1)
    allocate(cache, model)
    fuse(model)

    def run() -> None:
        cache.begin(len(ids))
        for done in range(0, len(ids), size):
            engine._read(cache, 0, ids[done : done + size], done)

    return median_seconds(run, 5 if len(ids) < 8192 else 2)


def section_prefill(bench: Bench) -> None:
    model = bench.use("opt-13b")
    prefill(bench, model, "OPT-13B prefill", PROMPT, SLOTS, {})


def section_llama(bench: Bench) -> None:
    model = bench.use("llama-8b")
    chunks = {f"streamed, {size}k chunks": 1024 * size for size in (2, 4, 8)}
    prefill(bench, model, "Llama-8B prefill", 32768, 1311, chunks)


def prefill(bench: Bench, model: Any, name: str, length: int, slots: int, chunks: dict[str, int]) -> None:
    """Plain SDPA with transformers' own growing cache, then AUV with scores in one pass, then in chunks."""
    ids = tokens_of(length, 1, model.config.vocab_size)
    config, shape = model.config, cache_shape(model)
    heads = config.num_attention_heads
    products = 2.0 * (weight_bytes(model) / 2 - config.vocab_size * config.hidden_size) * length
    attention = 4.0 * length**2 / 2 * heads * shape.head_dim * config.num_hidden_layers
    results = {"plain SDPA": lambda: peers.transformers_prefill(model, ids, median_seconds)}
    results["auv, one pass"] = lambda: read_prompt(model, ids, slots, None)
    for label, chunk in chunks.items():
        results[label] = lambda chunk=chunk: read_prompt(model, ids, slots, chunk)
    base: dict[str, float] = {}
    for label, run in results.items():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        seconds, peak = run(), 0
        peak = torch.cuda.max_memory_allocated()
        base = base or {"seconds": seconds, "peak": peak}
        streamed = chunks.get(label)
        seen = 4.0 * length * (slots + streamed / 2) * heads * shape.head_dim * config.num_hidden_layers if (
            streamed) else attention * (1.5 if label != "plain SDPA" else 1)  # fmt: skip
        bench.add(
            f"{name}, {label}", seconds * 1e3, "ms", seconds=seconds, bytes_=weight_bytes(model),
            operations=products + seen, time_ratio=round(seconds / base["seconds"], 4),
            memory_ratio=round(peak / base["peak"], 4), peak_bytes=peak,
        )  # fmt: skip


def section_documents(bench: Bench, count: int = 200) -> None:
    """Documents a second: read and written in a continuous batch, 64 tokens each."""
    model = bench.use("opt-13b")
    requests = [Request(tokens_of(PROMPT, n, model.config.vocab_size), SLOTS, NEW) for n in range(count)]
    engine = Engine(model, make_policy("auv"), batch_size=64)
    # One as long as those to come, the others short: kernels are compiled, and the step is captured for 64 rows.
    list(engine.run([requests[0], *(Request(request.ids[:64], SLOTS, 2) for request in requests[1:64])]))
    start, tokens = time.perf_counter(), 0
    for event in engine.run(requests):
        tokens += isinstance(event, Token)
    seconds = time.perf_counter() - start
    assert tokens == count * NEW
    parameters = weight_bytes(model) / 2
    bench.add(
        "OPT-13B documents, 1,900 in, 64 out", count / seconds, "documents/s", seconds=seconds, batch=64,
        bytes_=0, operations=2.0 * parameters * count * (PROMPT + NEW),
    )  # fmt: skip


def section_host(bench: Bench) -> None:
    """The full cache in host memory, brought over layer by layer: what "5 to 8 times" is measured against."""
    model = bench.use("opt-13b")
    for pinned in (True, False):
        peers.host_cache_decode(bench, model, PROMPT, pinned, weight_bytes(model))


def section_compile(bench: Bench) -> None:
    """`section_compiled` in a process of its own, which is given up when the table's time is over."""
    bench.forget()
    name, left = (
        "transformers sdpa, StaticCache, compiled, batch 1",
        int(_SECONDS - (time.perf_counter() - bench.started)),
    )
    if left < _COMPILING:
        bench.note(name, f"not run: {left} s were left of {_SECONDS}")
        return
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "compiled.json"
        try:
            subprocess.run([sys.executable, __file__, "--only", "compiled", "--out", out], timeout=left, check=True)
        except subprocess.TimeoutExpired:
            bench.note(name, f"not compiled after {left} s")
            return
        bench.rows += json.loads(out.read_text(encoding="utf-8"))["rows"]


def section_compiled(bench: Bench) -> None:
    """transformers at its best: StaticCache and torch.compile, on a model whose layers nobody has replaced."""
    model = bench.use("opt-13b")
    peers.compiled_decode(bench, model, PROMPT, weight_bytes(model))


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "decode": section_decode,
    "bookkeeping": section_bookkeeping,
    "prefill": section_prefill,
    "documents": section_documents,
    "throughput": section_throughput,
    "host": section_host,
    "llama": section_llama,
    "opt30b": section_opt30b,
    "compile": section_compile,
    "compiled": section_compiled,
}


def guarded(bench: Bench, name: str, run: Callable[[str], None]) -> None:
    """A case that may not fit; the table says so."""
    torch.cuda.empty_cache()
    try:
        run(name)
        return
    except torch.OutOfMemoryError:
        text = "out of memory"
    bench.note(name, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ",".join(name for name in SECTIONS if name != "compiled")
    parser.add_argument("--only", default=default, help=f"sections, of {', '.join(SECTIONS)}")
    parser.add_argument("--out", type=Path, help="write the JSON there too, after every section")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    bench = Bench()
    record: dict[str, Any] = {}
    for section in options.only.split(","):
        try:
            SECTIONS[section](bench)
        except Exception:
            bench.note(section, traceback.format_exc()[-1500:])
        gc.collect()
        torch.cuda.empty_cache()
        print(f"-- {section} done at {time.perf_counter() - bench.started:.0f} s", flush=True)
        record = {
            "benchmark": "gpu", "memory": bench.memory, "bandwidth": bench.bandwidth, "rate": bench.rate,
            "machine": common.machine(), "versions": common.versions(), "rows": bench.rows,
        }  # fmt: skip
        if options.out:
            options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print()
    cells = [
        [r["what"], f"{r['value']:,.2f} {r['unit']}", f"{r['share']:.0%}" if "share" in r else "-"]
        if "value" in r else [r["what"], r["note"][-60:], "-"]
        for r in bench.rows
    ]  # fmt: skip
    common.print_table(["what", "measured", "of the limit"], cells)
    common.print_json(record)


if __name__ == "__main__":
    main()

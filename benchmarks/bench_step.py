"""The decode step's kernels alone, OPT-13B's shape: µs a layer with AUV's books and without, at several batches.

    python benchmarks/bench_step.py --out benchmarks/results/step.json

One H100's worth of layers in turn, so that nothing is found in the cache of the layer before; every layer evicts once
in a cycle, all rows in the same step, which is the worst case. `without eviction` leaves out the launch behind all
layers, and `four warps` is the kernel that runs where heads are few.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import common
import torch

from auvsum.cache.policy import make_policy
from auvsum.cache.store import SlotStore
from auvsum.kernels import decode_step

HEADS, SIZE, SLOTS, PROMPT = 40, 128, 104, 1900
#: Rows, and how many layers are needed so that they do not fit the cache together.
LAYERS = {1: 40, 64: 8, 256: 3}


@contextmanager
def changed(name: str, value: Any) -> Iterator[None]:
    """Within: another value in `auvsum.kernels.decode_step`."""
    before = getattr(decode_step, name)
    setattr(decode_step, name, value)
    try:
        yield
    finally:
        setattr(decode_step, name, before)


def make_stores(policy: Any, rows: int, layers: int, local: int) -> list[SlotStore]:
    """Layers with random content, all slots written."""
    stores = []
    for _ in range(layers):
        store = SlotStore(
            batch=rows, kv_heads=HEADS, slots=3 * local, head_dim=SIZE, dtype=torch.float16,
            device=torch.device("cuda"), state=policy.state, reconstruct=policy.keeps_reconstructed,
        )  # fmt: skip
        for tensor in (store.keys[0], store.values[0]):
            tensor.normal_()
        for tensor in store.state.values():
            tensor.uniform_(0.5, 1.5)
        store.longest.fill_(PROMPT)
        store.seen.fill_(PROMPT)
        store.positions[..., : 3 * local] = torch.arange(3 * local, dtype=torch.int32, device="cuda")
        stores.append(store)
    return stores


def restart(stores: list[SlotStore], local: int) -> None:
    """The state behind an eviction: the candidate region is full, the write region empty."""
    for store in stores:
        store.valid[..., : 2 * local], store.valid[..., 2 * local : 3 * local] = True, False
        store.pointer.fill_(2 * local)
        if store.reconstruct:
            store.valid[..., 3 * local] = True


def microseconds(name: str, rows: int) -> float:
    """A layer's step, on average over a cycle from eviction to eviction; the median of three cycles."""
    gc.collect()
    torch.cuda.empty_cache()
    policy, local, layers = make_policy(name), (SLOTS - 1) // 3, LAYERS[rows]
    stores = make_stores(policy, rows, layers, local)
    query, key, value = (torch.randn(rows, HEADS, 1, SIZE, device="cuda", dtype=torch.float16) for _ in range(3))

    def step() -> None:
        for store in stores:
            decode_step.step(policy, store, query, key, value, SIZE**-0.5)
        decode_step.evict(policy, stores)

    restart(stores, local)
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    times = []
    for _ in range(4):
        restart(stores, local)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(local):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / local / layers)
    return common.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the JSON there too")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    rows: list[dict[str, Any]] = []
    for batch in LAYERS:
        row: dict[str, Any] = {"batch": batch, "plain": microseconds("full", batch), "auv": microseconds("auv", batch)}
        with changed("evict", lambda *_: None):
            row["auv, without eviction"] = microseconds("auv", batch)
        with changed("_FEW", 10**9):
            row["plain, four warps"], row["auv, four warps"] = microseconds("full", batch), microseconds("auv", batch)
        rows.append(row)
    names = list(rows[0])
    common.print_table(names, [[str(row["batch"]), *(f"{row[name]:.1f}" for name in names[1:])] for row in rows])
    record = {
        "benchmark": "step", "unit": "us a layer", "machine": common.machine(), "versions": common.versions(),
        "rows": rows,
    }  # fmt: skip
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    common.print_json(record)


if __name__ == "__main__":
    main()

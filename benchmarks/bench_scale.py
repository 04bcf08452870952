"""More than one device: documents over worker processes and Ray, and a model over two GPUs.

    python benchmarks/bench_scale.py                                 # two GPUs of 80 GB: what needs them, 8 minutes
    python benchmarks/bench_scale.py --only documents,equal          # some parts
    python benchmarks/bench_scale.py --only ray --out benchmarks/results/ray-cpu.json
    python benchmarks/bench_scale.py --tiny                          # every part on a CPU, with tiny shapes: a check

- documents: 200 documents on OPT-13B's shape through one worker, then through two: the ratio. The same pool, the same
  queue, the same documents of 1,900 tokens; models loaded, kernels compiled and the step captured before the clock
  starts.
- equal: what two workers write is what one engine writes, in fp32, greedy, by a small random model.
- split: a small model over two GPUs writes what it writes on one; then OPT-30B's shape over two: decode tok/s, and its
  share of the limit set by the bytes of weights and slots.
- dealing: the pool alone, with workers that sleep as long as one H100 takes for OPT-13B, one of them 3% longer: how
  even the shares are. No GPU needed, hardly any processor.
- driver: what one driver can do at most, with workers that do nothing: deal out, write, and start over a full folder.
- ray: one Ray worker against the local engine, on the default model, in turns.

Random weights, made where they run. The limit of a step is what one GPU after the other has to read, over the copy
bandwidth measured first.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
import time
import tracemalloc
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import common
import torch

from auvsum import _env
from auvsum.cache.policy import make_policy
from auvsum.config import Settings
from auvsum.engine import split
from auvsum.engine.generate import Engine, Request
from auvsum.engine.memory import cache_shape, devices_of
from auvsum.engine.models import LoadedModel
from auvsum.events import DocumentDone, Finished, Notice, Prefilled
from auvsum.io.inputs import Input
from auvsum.io.manifest import Manifest
from auvsum.io.sinks import FolderSink
from auvsum.scale.pool import Pool
from auvsum.scale.processes import Processes
from auvsum.summarize import Summarizer
from auvsum.text.readers import Document

_env.prepare()


class Sizes:
    """What is measured: real shapes on GPUs, or tiny ones anywhere."""

    def __init__(self, tiny: bool) -> None:
        self.tiny = tiny
        self.devices = ["cpu", "cpu"] if tiny else ["cuda:0", "cuda:1"]
        self.shape, self.large, self.small = ("tiny",) * 3 if tiny else ("opt-13b", "opt-30b", "opt-125m")
        self.documents, self.words, self.new, self.slots = (12, 100, 8, 48) if tiny else (200, 1880, 64, 104)
        self.batch, self.steps = (2, 8) if tiny else (64, 64)
        self.dtype = "fp32" if tiny else "fp16"


# -- a summarizer with random weights ---------------------------------------------------------------------------------


def config_of(shape: str) -> Any:
    """A published shape, or one of two layers that reads as many positions."""
    if shape != "tiny":
        return common.shape_config(shape)
    from transformers import OPTConfig

    return OPTConfig(
        vocab_size=512, hidden_size=64, word_embed_proj_dim=64, num_hidden_layers=2, num_attention_heads=4, ffn_dim=128,
        max_position_embeddings=2048,
    )  # fmt: skip


def tokenizer_of(vocabulary: int) -> Any:
    """Words `w0`, `w1`, ...: one token each, as many as the model knows."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({f"w{number}": number for number in range(vocabulary)}, unk_token="w3"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="w2", eos_token="w1", unk_token="w3")


def summarizer(shape: str, settings: Settings) -> Summarizer:
    """What a worker loads: a model of that shape, the same weights on every device of a kind."""
    from transformers import AutoModelForCausalLM

    start, device = time.perf_counter(), torch.device(settings.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    config = config_of(shape)
    dtype = {"fp16": torch.float16, "fp32": torch.float32}[settings.dtype]
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    model.generation_config.eos_token_id = None
    loaded = LoadedModel(
        shape, Path(), model, tokenizer_of(config.vocab_size), config.max_position_embeddings, cache_shape(model), (),
        device, dtype, time.perf_counter() - start, tuple(devices_of(model)),
    )  # fmt: skip
    return Summarizer(loaded, settings)


def settings_of(sizes: Sizes, **changes: Any) -> Settings:
    settings = Settings(
        model=sizes.shape, budget=str(sizes.slots), dtype=sizes.dtype, max_tokens=sizes.new, template="completion",
        strategy="single", batch_size=str(sizes.batch), threads=1 if sizes.tiny else None, device=sizes.devices[0],
    )  # fmt: skip
    return replace(settings, **changes)


def documents_of(sizes: Sizes, vocabulary: int, number: int) -> list[Document]:
    """Documents of random words, each another."""
    generator = torch.Generator().manual_seed(7)
    made = []
    for index in range(number):
        words = torch.randint(4, vocabulary, (sizes.words,), generator=generator).tolist()
        made.append(Document(f"/{index}.txt", " ".join(f"w{word}" for word in words), "utf-8"))
    return made


# -- parts ------------------------------------------------------------------------------------------------------------


def part_documents(sizes: Sizes) -> list[dict[str, Any]]:
    """Documents a second of one worker and of two, models loaded and kernels compiled."""
    vocabulary = config_of(sizes.shape).vocab_size
    documents = documents_of(sizes, vocabulary, sizes.documents)
    settings, rows = settings_of(sizes), []
    for number in (1, 2):
        crew = Processes(settings, sizes.devices[:number], partial(summarizer, sizes.shape))
        with Pool(crew, settings) as pool:
            while not pool.complete:
                pool.start()
            list(pool.run(warm_up(sizes, documents, number), ordered=False))
            start = time.perf_counter()
            records = [result.record() for result in pool.run(documents)]
            seconds = time.perf_counter() - start
        assert [record["source"] for record in records] == [document.source for document in documents]
        assert all(record["error"] is None for record in records), records[0]["error"]
        tokens = sum(record["tokens"]["prompt"] + record["tokens"]["generated"] for record in records)
        rows.append(
            row(
                f"{sizes.shape}, {len(documents)} documents, {number} workers", len(documents) / seconds, "documents/s",
                seconds=seconds, batch=sizes.batch, tokens=tokens, by_device=by_device(records),
            )
        )  # fmt: skip
    rows.append(row("two workers against one", rows[1]["value"] / rows[0]["value"], "times"))
    return rows


def warm_up(sizes: Sizes, documents: list[Document], workers: int) -> list[Document]:
    """A batch for every worker, one document of it as long as those to come: kernels for both are compiled, and the
    step is captured for a batch of that size.
    """
    short = [replace(document, text=document.text[:300]) for document in documents[: sizes.batch - 1] * workers]
    return documents[:workers] + short


def by_device(records: list[dict[str, Any]]) -> dict[str, int]:
    """How many documents each device did."""
    return dict(sorted(Counter(record["settings"]["device"] for record in records).items()))


def part_equal(sizes: Sizes) -> list[dict[str, Any]]:
    """Summaries of two workers equal to one engine's, fp32, greedy, a document at a time."""
    settings = settings_of(sizes, dtype="fp32", batch_size="1")
    documents = documents_of(sizes, config_of(sizes.small).vocab_size, 12 if sizes.tiny else 40)
    alone = [result.record() for result in summarizer(sizes.small, settings).run(documents)]
    with Pool(Processes(settings, sizes.devices, partial(summarizer, sizes.small)), settings) as pool:
        while not pool.complete:
            pool.start()
        spread = [result.record() for result in pool.run(documents)]
    assert all(record["error"] is None for record in alone + spread)
    equal = sum(one["summary"] == other["summary"] for one, other in zip(alone, spread, strict=True))
    what = "equal summaries, two workers and one engine"
    return [row(what, equal, f"of {len(documents)}", by_device=by_device(spread))]


def part_split(sizes: Sizes) -> list[dict[str, Any]]:
    """Tokens of a small model over two devices, equal to those on one. Of a large one the decode: tok/s, and the share
    of what reading weights and slots once would allow.
    """
    rows = [split_equal(sizes)]
    model = spread_model(sizes)
    devices, shape = devices_of(model), cache_shape(model)
    bandwidth = copy_bandwidth(devices[0], 2**22 if sizes.tiny else 2**29)
    ids = tokens_of(sizes.words + 20, 3, model)
    for batch in (1, sizes.batch):
        engine = Engine(model, make_policy("auv"), batch_size=batch)
        # The first compiles.
        list(engine.run([Request(ids, sizes.slots, 2), *[Request(ids[:100], sizes.slots, 2)] * (batch - 1)]))
        events = list(engine.run([Request(ids, sizes.slots, sizes.steps)] * batch))
        # The last document to be read waits for no other: its decoding is everybody's.
        rate = (sizes.steps - 1) / min(event.decode_seconds for event in events if isinstance(event, Finished))
        token = 2 * shape.kv_heads * shape.head_dim * shape.element_bytes
        bytes_ = weight_bytes(model) + batch * model.config.num_hidden_layers * sizes.slots * token
        limit = bandwidth / bytes_
        rows.append(
            row(
                f"{sizes.large} over {len(devices)} devices, decode, batch {batch}", batch * rate, "tok/s",
                limit=batch * limit, share=round(rate / limit, 4), bandwidth=bandwidth,
                prefill_s=common.median([event.seconds for event in events if isinstance(event, Prefilled)]),
                devices=[str(device) for device in devices], peak_bytes=[
                    torch.cuda.max_memory_allocated(device) for device in devices if device.type == "cuda"
                ],
            )
        )  # fmt: skip
    return rows


def split_equal(sizes: Sizes) -> dict[str, Any]:
    """Documents of a small model, fp32, that say the same over two devices as on one."""
    lengths = [sizes.words - 7 * number for number in range(8)]
    written, notices = [], set()
    for spread in (False, True):
        model = summarizer(sizes.small, settings_of(sizes, dtype="fp32")).loaded.model
        model = dispatched(model, sizes) if spread else model
        asked = [Request(tokens_of(length, length, model), sizes.slots, sizes.new) for length in lengths]
        events = list(Engine(model, make_policy("auv"), batch_size=3).run(asked))
        notices |= {event.text for event in events if isinstance(event, Notice)}
        written.append({event.request: event.token_ids for event in events if isinstance(event, Finished)})
    equal = sum(written[0][number] == written[1][number] for number in written[0])
    what = f"equal summaries, {sizes.small} over two devices and on one"
    return row(what, equal, f"of {len(lengths)}", notices=sorted(notices))


def tokens_of(length: int, seed: int, model: Any) -> list[int]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(4, model.config.vocab_size, (length,), generator=generator).tolist()
    return ids


def spread_model(sizes: Sizes) -> Any:
    """Random weights made on each device, then the hooks that `from_pretrained(device_map=...)` puts in."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(sizes.large), dtype=settings_dtype(sizes))
    model.tie_weights()
    for name, where in places_of(model, sizes).items():
        model.get_submodule(name).to_empty(device=where)
    model.tie_weights()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.normal_(0, 0.02)
    return dispatched(model, sizes)


def dispatched(model: Any, sizes: Sizes) -> Any:
    """A model over both devices, as `from_pretrained(device_map=...)` leaves it."""
    from accelerate import dispatch_model

    dispatch_model(
        model, places_of(model, sizes), force_hooks=True, skip_keys=model._skip_keys_device_placement,
        main_device=place(sizes, 0),
    )  # fmt: skip
    if not sizes.tiny:
        split.follow(model)
    return model.eval().requires_grad_(False)


def places_of(model: Any, sizes: Sizes) -> dict[str, Any]:
    """The first half of the layers on one device, the other on the other; the head is tied to the embedding, so that
    it is on the first device with it.
    """
    layers = [name for name, module in model.named_modules() if type(module).__name__ in model._no_split_modules]
    leaves = [name for name, module in model.named_modules() if name and not list(module.children())]
    outside = [name for name in leaves if not name.startswith(tuple(f"{layer}." for layer in layers))]
    places: dict[str, Any] = {name: place(sizes, 0) for name in outside}
    return places | {name: place(sizes, 2 * number // len(layers)) for number, name in enumerate(layers)}


def place(sizes: Sizes, number: int) -> Any:
    return "cpu" if sizes.tiny else number


def settings_dtype(sizes: Sizes) -> torch.dtype:
    return torch.float32 if sizes.tiny else torch.float16


class Idle:
    """A summarizer that does nothing: what is left is the work of the driver."""

    batch_size = 64

    def __init__(self) -> None:
        self.loaded = SimpleNamespace(name="idle", load_seconds=0.0)

    def run(self, documents: Iterable[Document], *, ordered: bool, on_event: Callable[[Any], None]) -> Iterator[Any]:
        for index, document in enumerate(documents):
            on_event(DocumentDone(index, document.id))
            yield SimpleNamespace(
                id=document.id, source=document.source, text=_SUMMARY, warnings=[],
                record=partial(_record, document.id, document.source),
            )  # fmt: skip


_SUMMARY = "The council met in the town hall and there it decided to build a bridge over the river. " * 5


def _record(id: str, source: str) -> dict[str, Any]:
    """A record as long as real ones are."""
    padding = {"layer_slots": [209] * 40, "settings": "x" * 300, "tokens": "x" * 300}
    return {"id": id, "source": source, "summary": _SUMMARY, "error": None, **padding}


def idle(settings: Settings) -> Any:
    return Idle()


class Asleep:
    """The schedule of the engine, with sleeps of the length that a GPU takes in place of its work.

    Args:
        slower: by this factor.
    """

    #: Seconds to read a document of 1,900 tokens and for a step of 64 rows: OPT-13B on one H100 (docs/LOG.md).
    READ, STEP = 0.0904, 0.0138

    def __init__(self, sizes: Sizes, slower: float) -> None:
        self.batch_size, self._new = sizes.batch, sizes.new
        self._read, self._step = (slower * seconds * (0.01 if sizes.tiny else 1) for seconds in (self.READ, self.STEP))
        self.loaded = SimpleNamespace(name="asleep", load_seconds=0.0)

    def run(self, documents: Iterable[Document], *, ordered: bool, on_event: Callable[[Any], None]) -> Iterator[Any]:
        incoming = enumerate(documents)
        waiting = deque(islice(incoming, self.batch_size))
        rows: list[tuple[int, Document] | None] = [None] * len(waiting)
        left = [0] * len(rows)
        while True:
            for number in range(len(rows)):
                if rows[number] is None and waiting:
                    rows[number], left[number] = waiting.popleft(), self._new - 1
                    if not waiting:
                        waiting.extend(islice(incoming, 1))
                    time.sleep(self._read)
            if not any(rows):
                return
            time.sleep(self._step)
            for number, held in enumerate(rows):
                left[number] -= 1
                if held is not None and left[number] == 0:
                    rows[number] = None
                    index, document = held
                    on_event(DocumentDone(index, document.id))
                    yield SimpleNamespace(
                        id=document.id, source=document.source, text="", warnings=[],
                        record=partial(dict, id=document.id, worker=os.getpid()),
                    )  # fmt: skip


def asleep(sizes: Sizes, settings: Settings) -> Any:
    return Asleep(sizes, 1.03 if settings.threads else 1.0)


class Unalike(Processes):
    """Workers of which the second is a little slower."""

    def _settings_of(self, number: int) -> Settings:
        return replace(self._settings, threads=number or None)


def part_dealing(sizes: Sizes) -> list[dict[str, Any]]:
    """Documents a second of one sleeping worker and of two, and how many each of them did."""
    documents = documents_of(sizes, 512, 3 * sizes.documents if sizes.tiny else sizes.documents)
    settings, rows = Settings(), []
    for number in (1, 2):
        with Pool(Unalike(settings, ["cpu"] * number, partial(asleep, sizes)), settings) as pool:
            while not pool.complete:
                pool.start()
            start = time.perf_counter()
            records = [result.record() for result in pool.run(documents)]
            seconds = time.perf_counter() - start
        assert [record["id"] for record in records] == [document.id for document in documents]
        shares = sorted(Counter(record["worker"] for record in records).values())
        rows.append(
            row(f"asleep: {len(documents)} documents, {number} workers", len(documents) / seconds, "documents/s",
                seconds=seconds, shares=shares)
        )  # fmt: skip
    return [*rows, row("asleep: two workers against one", rows[1]["value"] / rows[0]["value"], "times")]


def part_driver(sizes: Sizes) -> list[dict[str, Any]]:
    """Documents a second through the pool, and into a folder; seconds and bytes to resume over a full one."""
    number = 200 if sizes.tiny else 5000
    documents = documents_of(sizes, 512, number)
    settings, rows = Settings(), []
    with Pool(Processes(settings, ["cpu", "cpu"], idle), settings) as pool:
        while not pool.complete:
            pool.start()
        start = time.perf_counter()
        assert sum(1 for _ in pool.run(documents)) == number
        rows.append(row("driver: dealt out and taken back", number / (time.perf_counter() - start), "documents/s"))
    with tempfile.TemporaryDirectory() as folder:
        out, inputs = Path(folder) / "out", [Input(f"{folder}/{n}.txt", f"{n % 100}/{n}.txt") for n in range(number)]
        for item in inputs:
            Path(item.path).write_text(f"Number {item.place}. {_SUMMARY * 10}")
        with FolderSink(out, "text", "key") as sink:
            start = time.perf_counter()
            for item in inputs:
                assert sink.wants(item)
                sink.write(_record(item.place, item.source))
            rows.append(row("driver: written to a folder", number / (time.perf_counter() - start), "documents/s"))
            start = time.perf_counter()
        rows.append(row("driver: the index of a folder", number / (time.perf_counter() - start), "documents/s"))
        journal = out / ".auvsum" / "manifest.jsonl"
        rows.append(row("driver: the journal", journal.stat().st_size / number, "bytes a document"))
        start = time.perf_counter()
        with FolderSink(out, "text", "key") as sink:
            assert not any(sink.wants(item) for item in inputs)
            rows.append(row("driver: skipped", number / (time.perf_counter() - start), "documents/s"))
        tracemalloc.start()
        with Manifest(out):
            rows.append(row("driver: the journal in memory", tracemalloc.get_traced_memory()[0] / number, "bytes"))
        tracemalloc.stop()
    return rows


def part_ray(sizes: Sizes) -> list[dict[str, Any]]:
    """The local engine and one Ray worker in turns, models loaded, on the default model (tiny: a random one)."""
    from auvsum.scale.cluster import Cluster

    load = partial(summarizer, "tiny") if sizes.tiny else Summarizer.from_settings
    if sizes.tiny:
        settings, documents = settings_of(sizes), documents_of(sizes, 512, 40)
    else:
        settings = Settings(budget="10%", max_tokens=32, threads=1, device="cpu", dtype="fp32", batch_size="1")
        text = (common.ROOT / "samples" / "money-bail.txt").read_text(encoding="utf-8")
        documents = [Document(f"/{n}.txt", text[600 * n : 600 * n + 2400], "utf-8") for n in range(6)]
    local = load(settings)
    cases: dict[str, Callable[[], float]] = {"local engine": lambda: timed(local, documents)}
    with Pool(Cluster(settings, 1, None, load), settings) as pool:
        pool.start()
        cases["one Ray worker"] = lambda: timed(pool, documents)
        results, _ = common.interleave(cases, repetitions=3)
    rates = {name: len(documents) / common.median(seconds) for name, seconds in results.items()}
    rows = [row(name, rate, "documents/s", all_seconds=results[name]) for name, rate in rates.items()]
    return [*rows, row("one Ray worker against the local engine", rates["one Ray worker"] / rates["local engine"], "")]


def timed(runner: Any, documents: list[Document]) -> float:
    """Seconds for all documents through a summarizer or a pool."""
    start = time.perf_counter()
    assert all(result.record()["error"] is None for result in runner.run(documents, on_event=lambda event: None))
    return time.perf_counter() - start


PARTS: dict[str, Callable[[Sizes], list[dict[str, Any]]]] = {
    "documents": part_documents,
    "equal": part_equal,
    "split": part_split,
    "dealing": part_dealing,
    "driver": part_driver,
    "ray": part_ray,
}
PARTS_ON_GPUS = ("documents", "equal", "split")


# -- measuring --------------------------------------------------------------------------------------------------------


def row(what: str, value: float, unit: str, **more: Any) -> dict[str, Any]:
    return {"what": what, "value": round(value, 4), "unit": unit, **more}


def weight_bytes(model: Any) -> int:
    """Bytes that a step reads: each weight once (the tied embedding as the output matrix), no positions."""
    tensors = {p.data_ptr(): p for n, p in model.named_parameters() if "embed_positions" not in n}
    return sum(p.nbytes for p in tensors.values())


def copy_bandwidth(device: torch.device, numbers: int) -> float:
    """Bytes a second, read and written, of a large copy."""
    source = torch.randn(numbers, device=device)
    target, times = torch.empty_like(source), []
    for _ in range(6):
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * source.nbytes / common.median(times[1:])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"parts, of {', '.join(PARTS)}; without it those for GPUs")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on a CPU: checks this script")
    parser.add_argument("--documents", type=int, help="how many, instead of 200")
    parser.add_argument("--out", type=Path, help="write the JSON there too, after every part")
    options = parser.parse_args()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    parts = options.only.split(",") if options.only else list(PARTS if options.tiny else PARTS_ON_GPUS)
    started, record = time.perf_counter(), {"benchmark": "scale", "tiny": options.tiny, "rows": []}
    sizes = Sizes(options.tiny)
    sizes.documents = options.documents or sizes.documents
    for part in parts:
        rows = PARTS[part](sizes)
        record["rows"] += rows
        record |= {"machine": common.machine(), "versions": common.versions()}
        for one in rows:
            print(f"{one['what']}: {one['value']} {one['unit']}", flush=True)
        print(f"-- {part} done at {time.perf_counter() - started:.0f} s", flush=True)
        if options.out:
            options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    print()
    common.print_table(
        ["what", "measured", "of the limit"],
        [[r["what"], f"{r['value']:,.2f} {r['unit']}", f"{r['share']:.0%}" if "share" in r else "-"]
         for r in record["rows"]],
    )  # fmt: skip
    common.print_json(record)


if __name__ == "__main__":
    main()

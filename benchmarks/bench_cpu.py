"""The CPU table: auvsum beside what else runs on a laptop, interleaved in one run. Medians; the last line is JSON.

    python benchmarks/bench_cpu.py --gguf model.gguf --out benchmarks/results/cpu.json       # every section
    python benchmarks/bench_cpu.py --only decode,bookkeeping
    python benchmarks/bench_cpu.py --peers ~/peers/bin/python          # the peers are installed there
    python benchmarks/bench_cpu.py --join a.json b.json --out all.json # sections that ran side by side, as one table

Sections: `document` (the default model, a long document end to end), `large` (OPT-1.3b's shape), `decode` (OPT-125m's
shape, a prompt read at once and streamed), `bookkeeping`, `batch`. Peers are transformers, CTranslate2 (`pip install
ctranslate2`; a random checkpoint is converted) and llama.cpp (`pip install llama-cpp-python`, `--gguf` with the default
model's weights); who cannot run is said to be so.

Of the first three sections every engine has a process of its own, which waits while another one runs: its memory is its
own, and no library has to live with another's threads. Peers run in the environment as they find it, without the
settings that auvsum makes for itself. auvsum and transformers compute in bf16, or in fp32 on a processor without bf16
instructions, where bf16 takes ten times as long.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import common
from bench_decode import TEXT, Run, auvsum_case, llama_cpp_case, transformers_case

SECTIONS = ("document", "large", "decode", "bookkeeping", "batch")
BUDGET = "4%"

#: What the peers find: as this process was given it, without what auvsum sets for itself.
_ENVIRONMENT = dict(os.environ)

Case = Callable[[], Run]
Rows = list[dict[str, Any]]


# -- models and prompts ------------------------------------------------------------------------------------------------


def save_random(shape: str, folder: Path) -> Path:
    """A checkpoint of a published shape with random weights, and a tokenizer whose words are `t0, t1, ..`."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    model = common.random_model(shape, dtype=torch.bfloat16, device="cpu")
    model.save_pretrained(folder)
    size = model.config.vocab_size
    words = {f"t{number}": number for number in range(size)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="t3"))
    special = {"bos_token": "t2", "eos_token": "t2", "pad_token": "t1", "unk_token": "t3"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def load_folder(folder: Path, weights: str = "auto") -> Any:
    """A saved model, its weights mapped; in 8 bits if asked."""
    from auvsum.engine.models import load

    model = load(str(folder), device="cpu", weights=weights).model
    model.generation_config.eos_token_id = None  # everybody writes as many tokens as asked for
    return model


def draw(config: Any, tokens: int) -> list[int]:
    """A prompt of random tokens, which nothing treats specially."""
    rng = random.Random(0)
    return [rng.randrange(4, config.vocab_size) for _ in range(tokens)]


# -- engines, in processes of their own --------------------------------------------------------------------------------

#: The engines of a section, by name: the library first, then what it is asked for. auvsum: weights, policy, how the
#: prompt is read. transformers: weights, attention. CTranslate2: type, and how many tokens of the prompt it gets.
#: `TYPE` is what the processor computes in.
_DECODE = (
    *(f"auvsum {weights} {how}" for weights in ("TYPE", "int8") for how in ("full", "auv", "h2o", "auv streamed")),
    "transformers TYPE sdpa",
    "transformers TYPE eager",
    "CTranslate2 float32",
    "CTranslate2 int8",
    "CTranslate2 int8 short",
)
#: `auv-look` in 4 bits is what `--policy auto` takes on a CPU at this budget, `auv streamed` is `--strategy stream`.
_DOCUMENT = (
    "auvsum TYPE auv-look",
    "auvsum TYPE auv streamed",
    "auvsum int8 auv streamed",
    "auvsum gguf auv streamed",
    "transformers TYPE sdpa",
    "llama.cpp",
)
_LARGE = (
    "auvsum TYPE auv streamed",
    "auvsum int8 auv streamed",
    "transformers TYPE sdpa",
    "CTranslate2 int8",
)


def computes_in() -> str:
    """`bf16` where the processor has instructions for it, else `fp32`: auvsum's own choice."""
    from auvsum.engine.hardware import cpu_has_bf16

    return "bf16" if cpu_has_bf16() else "fp32"


#: What `CTranslate2 int8 short` gets to read: about the slots that the budget leaves of the long prompt.
_SHORT = 80


def make_case(name: str, options: argparse.Namespace) -> Case:
    """An engine, loaded. What to read and how much to write is in a file of the folder."""
    library, *how = name.split()
    job = json.loads(options.job.read_text())
    ids, new, saved = job["ids"], job["new"], job["model"] and Path(job["model"])
    threads = options.threads or len(os.sched_getaffinity(0))
    if library == "llama.cpp":
        if options.gguf is None:
            raise SystemExit("no --gguf")
        return llama_cpp_case(options.gguf, ids, new, threads)
    if library == "CTranslate2":
        return ctranslate2_case(saved, ids[:_SHORT] if "short" in how else ids, new, how[0], threads)
    if library == "auvsum":
        from auvsum import _env

        _env.prepare()
    import torch

    torch.set_num_threads(threads)
    model, shape = load_model(saved, how[0] if how[0] in ("int8", "gguf") else "auto")
    if library == "transformers":
        return transformers_case(model, ids, new, how[1])
    policy, chunk = how[1], options.chunk if "streamed" in how else None
    bits = 4 if policy == "auv-look" else 16
    return auvsum_case(model, shape, ids, new, policy, "100%" if policy == "full" else BUDGET, chunk, bits)


def load_model(saved: Path | None, weights: str) -> tuple[Any, Any]:
    """A saved model or the default one, and the shape of its cache."""
    from auvsum.engine.memory import cache_shape
    from auvsum.engine.models import load

    if saved is not None:
        model = load_folder(saved, weights)
        return model, cache_shape(model)
    loaded = load(device="cpu", weights=weights)
    loaded.model.generation_config.eos_token_id = None
    return loaded.model, loaded.shape


def ctranslate2_case(folder: Path, ids: list[int], new: int, kind: str, threads: int) -> Case:
    """CTranslate2 on the converted weights."""
    import ctranslate2

    generator = ctranslate2.Generator(f"{folder}-ct2-{kind}", compute_type=kind, intra_threads=threads)
    words = [f"t{token}" for token in ids]

    def case() -> Run:
        run = Run()
        for _ in generator.generate_tokens(words, max_length=new, sampling_topk=1, end_token=[]):
            run.tick()
        return run

    return case


def convert(folder: Path, kind: str) -> None:
    """Weights for CTranslate2; in a process of its own, since it takes more memory than running."""
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(folder)).convert(f"{folder}-ct2-{kind}", quantization=kind)


def serve(name: str, options: argparse.Namespace) -> None:
    """The child's side: loads, says so, and then runs once for every line that comes."""
    if name.startswith("convert"):
        convert(Path(json.loads(options.job.read_text())["model"]), name.split()[1])
        return
    if name.startswith("auvsum section"):
        from auvsum import _env

        _env.prepare()
        section = batch if name.endswith("batch") else bookkeeping
        for rows in section(options, options.job.parent):
            print("rows", json.dumps(rows), flush=True)
        return
    case = make_case(name, options)
    print("ready", flush=True)
    for _ in sys.stdin:
        run = case()
        found = {
            "prefill_s": run.prefill_seconds,
            "decode_tokens_per_s": run.decode_rate,
            "end_to_end_s": run.ticks[-1] - run.started,
            "kv_bytes": run.kv_bytes,
            "peak_rss_bytes": common.peak_rss(),
        }
        print("run", json.dumps(found), flush=True)


class Child:
    """The parent's side of `serve`."""

    def __init__(self, name: str, job: Path, options: argparse.Namespace) -> None:
        own = name.startswith("auvsum") or options.peers is None
        command = [sys.executable if own else options.peers, __file__, "--serve", name, "--job", str(job)]
        for option in ("threads", "gguf", "chunk", "repetitions", "new_tokens"):
            if getattr(options, option) is not None:
                command += [f"--{option.replace('_', '-')}", str(getattr(options, option))]
        self._log = job.with_name(f"{name}.log")
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=_ENVIRONMENT
            )

    def wait_for(self, word: str) -> str | None:
        """The rest of the child's next line that begins with the word; None when it ended before."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            first, _, rest = line.partition(" ")
            if first.strip() == word:
                return rest
        return None

    def run(self) -> dict[str, Any] | None:
        """Once; None when the child has died."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        answer = self.wait_for("run")
        return None if answer is None else json.loads(answer)

    def end(self) -> str:
        """Ends it; the last thing it complained of."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()
        lines = self._log.read_text().strip().splitlines()
        return lines[-1] if lines else f"ended with {self._process.returncode}"


def compare(
    names: tuple[str, ...], job: Path, repetitions: int, options: argparse.Namespace
) -> Iterator[list[dict[str, Any]]]:
    """Runs all engines in turns; yields the rows so far after every round. The first one warms up."""
    children, notes = {}, {}
    names = tuple(name.replace("TYPE", computes_in()) for name in names)
    for kind in dict.fromkeys(name.split()[1] for name in names if name.startswith("CTranslate2")):
        Child(f"convert {kind}", job, options).end()
    for name in names:
        child = Child(name, job, options)
        if child.wait_for("ready") is None:
            notes[name] = child.end()
        else:
            children[name] = child
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in children}
    for number in range(repetitions + 1):
        turn = number % max(1, len(children))
        order = list(children)
        for name in order[turn:] + order[:turn]:
            found = children[name].run()
            if found is None:
                notes[name] = children.pop(name).end()
            elif number:
                runs[name].append(found)
        if number:
            yield [
                {"engine": name, **summarize(runs[name])} if runs.get(name) else {"engine": name, "note": notes[name]}
                for name in names
            ]
    for child in children.values():
        child.end()


def summarize(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of one engine's runs; the peak of its memory is the last one's."""
    found = {
        key: round(common.median([run[key] for run in runs]), 4)
        for key in ("prefill_s", "decode_tokens_per_s", "end_to_end_s")
    }
    return {**found, "kv_bytes": runs[-1]["kv_bytes"], "peak_rss_bytes": runs[-1]["peak_rss_bytes"], "runs": len(runs)}


# -- sections ----------------------------------------------------------------------------------------------------------


def write_job(folder: Path, name: str, model: Path | None, ids: list[int], new: int) -> Path:
    job = folder / f"{name}.json"
    job.write_text(json.dumps({"model": model and str(model), "ids": ids, "new": new}))
    return job


def alone(section: str, options: argparse.Namespace, folder: Path) -> Iterator[Rows]:
    """A section of auvsum alone, in one process."""
    child = Child(f"auvsum section {section}", folder / section, options)
    rows: Rows = []
    while (answer := child.wait_for("rows")) is not None:
        yield (rows := json.loads(answer))
    complaint = child.end()
    if not rows:
        yield [{"engine": section, "note": complaint}]


def decode(options: argparse.Namespace, folder: Path) -> Iterator[Rows]:
    """OPT-125m's shape: prompts read at once and streamed, tokens written over the full cache and over 4%."""
    ids = draw(common.shape_config("opt-125m"), options.prompt)
    job = write_job(folder, "decode", save_random("opt-125m", folder / "opt-125m"), ids, options.new_tokens)
    yield from compare(_DECODE, job, options.repetitions, options)


def document(options: argparse.Namespace, folder: Path) -> Iterator[Rows]:
    """The default model: a long document, 120 tokens written."""
    from auvsum.engine.models import load

    ids = load(device="cpu").tokenizer(TEXT.read_text(encoding="utf-8"), verbose=False).input_ids
    ids = (ids * (options.document // len(ids) + 1))[: options.document]
    job = write_job(folder, "document", None, ids, options.summary)
    yield from compare(_DOCUMENT, job, min(options.repetitions, 2), options)


def large(options: argparse.Namespace, folder: Path) -> Iterator[Rows]:
    """OPT-1.3b's shape."""
    ids = draw(common.shape_config("opt-1.3b"), options.prompt)
    job = write_job(folder, "large", save_random("opt-1.3b", folder / "opt-1.3b"), ids, options.new_tokens // 2)
    yield from compare(_LARGE, job, min(options.repetitions, 2), options)


def batch(options: argparse.Namespace, folder: Path) -> Iterator[Rows]:
    """Tokens a second of 16 documents written together, and of one; OPT-125m's shape, short prompts."""
    from auvsum.cache.policy import make_policy
    from auvsum.engine.generate import Engine, Request
    from auvsum.events import Prefilled, Token

    saved = save_random("opt-125m", folder / "opt-125m")
    policy = make_policy("auv")
    together, new = 16, options.new_tokens
    cases: dict[str, Callable[[], float]] = {}
    for weights in ("auto", "int8"):
        model = load_folder(saved, weights)
        for number in (1, together):

            def case(model: Any = model, number: int = number) -> float:
                engine = Engine(model, policy, batch_size=number)
                ids = draw(model.config, 200)
                started = ended = 0.0
                written = 0
                for event in engine.run([Request(ids, 76, new)] * number):
                    ended = time.perf_counter()
                    if isinstance(event, Prefilled):
                        started, written = ended, 0  # every row is there once the last prompt has been read
                    elif isinstance(event, Token):
                        written += 1
                return written / (ended - started)

            cases[f"{computes_in() if weights == 'auto' else weights}, {number} together"] = case
    results, _ = common.interleave(cases, options.repetitions)
    yield [{"engine": name, "decode_tokens_per_s": round(common.median(rates), 2)} for name, rates in results.items()]


def bookkeeping(options: argparse.Namespace, folder: Path) -> Iterator[Rows]:
    """AUV, and the same slots without any books: what scores, counts and evictions cost a step."""
    from auvsum.cache.policies.auv import AUV
    from auvsum.engine.generate import Engine, Request
    from auvsum.engine.models import load
    from auvsum.events import Token

    @dataclass(frozen=True)
    class Bare(AUV):
        """AUV's slots and pointer, and nothing else."""

        state: ClassVar[tuple[str, ...]] = ()
        looks: ClassVar[bool] = False
        reconstruct: bool = False

        def observe_chunk(self, *_: Any) -> None:
            pass

        def choose(self, held: Any, capacity: int) -> Any:
            import torch

            kept = capacity // 3 * 2
            return torch.arange(held.size - kept, held.size).expand(held.key.shape[0], kept)

        def observe(self, store: Any, probabilities: Any) -> None:
            store.pointer += store.active
            store.pointer.masked_fill_(store.pointer == store.capacity, int(store.capacity[0]) // 3 * 2)

    saved = save_random("opt-125m", folder / "opt-125m")
    models = {
        f"opt-125m {computes_in()}": load_folder(saved),
        "opt-125m int8": load_folder(saved, "int8"),
        f"default model {computes_in()}": load(device="cpu").model,
        "default model int8": load(device="cpu", weights="int8").model,
    }
    found: list[dict[str, Any]] = []
    for name, model in models.items():
        ids = draw(model.config, 200)
        steps: tuple[list[list[float]], list[list[float]]] = ([], [])
        for _ in range(options.repetitions + 1):
            # 75 slots are AUV's 25 * 3, and one more holds its reconstructed token: evictions come every 25 steps.
            runs = [
                Engine(model, policy).run([Request(ids, 75 + policy.reconstruct, 54)]) for policy in (AUV(), Bare())
            ]
            for taken, times in zip(steps, _turns(runs, Token), strict=True):
                taken.append(times)
        # The fastest of each step's repetitions: a busy moment of the machine is not bookkeeping, an eviction is.
        with_books, without = (sum(min(times) for times in zip(*taken, strict=True)) for taken in steps)
        found.append(
            {
                "engine": name,
                "step_ms": round(1000 * with_books / 52, 3),
                "step_against_no_books": round(with_books / without, 4),
            }
        )
        yield found


def _turns(runs: list[Any], token: type) -> list[list[float]]:
    """Seconds of each decode step of engines that take turns, step by step."""
    seconds: list[list[float]] = [[] for _ in runs]
    for run in runs:  # the prompt, and its first token
        next(event for event in run if isinstance(event, token))
    for _ in range(52):
        for run, times in zip(runs, seconds, strict=True):
            started = time.perf_counter()
            next(event for event in run if isinstance(event, token))
            times.append(time.perf_counter() - started)
    return seconds


# -- the run -----------------------------------------------------------------------------------------------------------


def join(files: list[Path]) -> dict[str, Any]:
    """One record of several that were written side by side, each with sections of its own.

    Raises:
        SystemExit: they differ in more than cores and load, or hold the same section.
    """
    records = [json.loads(file.read_text()) for file in files]
    joined: dict[str, Any] = {**records[0], "sections": {}}
    for file, record in zip(files, records, strict=True):
        if _identity(record) != _identity(joined):
            raise SystemExit(f"error: {file} was measured otherwise than {files[0]}")
        if twice := record["sections"].keys() & joined["sections"].keys():
            raise SystemExit(f"error: {file} holds {', '.join(sorted(twice))} once more")
        joined["sections"].update(record["sections"])
    joined["sections"] = {name: joined["sections"][name] for name in SECTIONS if name in joined["sections"]}
    return joined


def _identity(record: dict[str, Any]) -> dict[str, Any]:
    """What two records have in common when their rows may stand in one table."""
    machine = {key: value for key, value in record["machine"].items() if key != "load_average"}
    return {**record, "machine": machine, "sections": None}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, by commas")
    parser.add_argument("--prompt", type=int, default=1900, metavar="TOKENS")
    parser.add_argument("--new-tokens", type=int, default=48, metavar="TOKENS")
    parser.add_argument("--document", type=int, default=6000, metavar="TOKENS", help="length of the long document")
    parser.add_argument("--summary", type=int, default=120, metavar="TOKENS", help="length of its summary")
    parser.add_argument("--chunk", type=int, default=512, metavar="TOKENS")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--gguf", type=Path, help="the default model's weights for llama.cpp")
    parser.add_argument("--out", type=Path, help="also write the JSON there; sections it holds already are kept")
    parser.add_argument("--join", type=Path, nargs="+", metavar="JSON", help="run nothing: join these into --out")
    parser.add_argument("--note", default="", help="what else a reader of the JSON has to know")
    parser.add_argument("--peers", metavar="PYTHON", help="the interpreter of the peers' environment; default this one")
    parser.add_argument("--serve", metavar="ENGINE", help=argparse.SUPPRESS)
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.only.split(",")) - set(SECTIONS):
        parser.error(f"unknown sections: {', '.join(sorted(unknown))}")
    if options.join and options.out is None:
        parser.error("--join needs --out")
    return options


def main() -> None:
    options = parse()
    if options.serve:
        serve(options.serve, options)
        return
    if options.join:
        options.out.write_text(json.dumps(join(options.join), indent=1) + "\n")
        return
    from auvsum import _env

    _env.prepare()
    kept = json.loads(options.out.read_text()) if options.out and options.out.exists() else {"sections": {}}
    sections: dict[str, Any] = kept["sections"]
    record: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in sorted(options.only.split(","), key=SECTIONS.index):
            load_before, started = round(os.getloadavg()[0], 2), time.perf_counter()
            found: Rows = []
            for found in _SECTIONS[name](options, Path(folder)):
                loads = (load_before, round(os.getloadavg()[0], 2))
                sections[name] = {
                    "load_average": loads,
                    "cores": sorted(os.sched_getaffinity(0)),
                    "seconds": round(time.perf_counter() - started),
                    "rows": found,
                }
                record = {
                    "benchmark": "cpu",
                    "computes_in": computes_in(),
                    "prompt_tokens": options.prompt,
                    "document_tokens": options.document,
                    "summary_tokens": options.summary,
                    "chunk": options.chunk,
                    "note": options.note,
                    "machine": common.machine(),
                    "versions": common.versions(),
                    "sections": sections,
                }
                if options.out:
                    options.out.write_text(json.dumps(record, indent=1) + "\n")
            taken = sections[name]
            print(f"\n{name}, medians, {taken['seconds']} s, load {load_before} to {taken['load_average'][1]}\n")
            common.print_table(["engine", *_columns(found)], list(_cells(found)))
    print()
    common.print_json(record)


_SECTIONS: dict[str, Callable[[argparse.Namespace, Path], Iterator[Rows]]] = {
    "document": document,
    "large": large,
    "decode": decode,
    "bookkeeping": partial(alone, "bookkeeping"),
    "batch": partial(alone, "batch"),
}


def _columns(found: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for row in found for key in row if key != "engine"))


def _cells(found: list[dict[str, Any]]) -> Iterator[list[str]]:
    for row in found:
        yield [row["engine"], *("-" if row.get(key) is None else str(row[key]) for key in _columns(found))]


if __name__ == "__main__":
    main()

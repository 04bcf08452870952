"""The CPU table: auvsum beside what else runs on a laptop, interleaved in one run. Medians; the last line is JSON.

    python benchmarks/bench_cpu.py                                        # every section
    python benchmarks/bench_cpu.py --only decode,bookkeeping
    python benchmarks/bench_cpu.py --gguf model.gguf --out benchmarks/results/cpu.json

Sections: `decode` (OPT-125m's shape, a prompt read at once and streamed), `document` (the default model, a long
document end to end), `large` (OPT-1.3b's shape, one process an engine, for its memory), `batch`, `bookkeeping`. Peers
are transformers, CTranslate2 (`pip install ctranslate2`; a random checkpoint is converted) and llama.cpp
(`pip install llama-cpp-python`, `--gguf` with the default model's weights); who is not installed is said to be so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import common
from bench_decode import TEXT, Run, auvsum_case, llama_cpp_case, transformers_case

SECTIONS = ("decode", "document", "large", "batch", "bookkeeping")
BUDGET = "4%"

Case = Callable[[], Run]


# -- models and peers --------------------------------------------------------------------------------------------------


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


def load_folder(folder: Path, weights: str = "bf16") -> Any:
    """A saved model, its weights mapped; in 8 bits if asked."""
    from auvsum.engine.models import load

    model = load(str(folder), device="cpu", dtype="bf16", weights=weights).model
    model.generation_config.eos_token_id = None  # everybody writes as many tokens as asked for
    return model


def ctranslate2_case(folder: Path, ids: list[int], new: int, kind: str, threads: int) -> Case:
    """CTranslate2 on the converted weights; converted once."""
    import ctranslate2
    from ctranslate2.converters import TransformersConverter

    converted = folder.parent / f"{folder.name}-ct2-{kind}"
    if not converted.exists():
        TransformersConverter(str(folder)).convert(str(converted), quantization=kind)
    generator = ctranslate2.Generator(str(converted), compute_type=kind, intra_threads=threads)
    words = [f"t{token}" for token in ids]

    def case() -> Run:
        run = Run()
        for _ in generator.generate_tokens(words, max_length=new, sampling_topk=1, end_token=[]):
            run.tick()
        return run

    return case


def draw(config: Any, tokens: int) -> list[int]:
    """A prompt of random tokens, which nothing treats specially."""
    rng = random.Random(0)
    return [rng.randrange(4, config.vocab_size) for _ in range(tokens)]


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


# -- sections ----------------------------------------------------------------------------------------------------------


def summarize(runs: list[Run]) -> dict[str, Any]:
    """Medians of one case."""
    return {
        "prefill_s": round(common.median([run.prefill_seconds for run in runs]), 4),
        "decode_tokens_per_s": round(common.median([run.decode_rate for run in runs]), 2),
        "end_to_end_s": round(common.median([run.ticks[-1] - run.started for run in runs]), 3),
        "kv_bytes": runs[0].kv_bytes,
    }


def rows(cases: dict[str, Case], missing: dict[str, str], repetitions: int) -> list[dict[str, Any]]:
    """All cases interleaved; those that cannot run with the reason."""
    results, failed = common.interleave(cases, repetitions)
    found = [{"engine": name, **summarize(results[name])} for name in cases if results[name]]
    return found + [{"engine": name, "note": note} for name, note in {**missing, **failed}.items()]


def decode(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """OPT-125m's shape: prompts read at once and streamed, tokens written over the full cache and over 4%."""
    import torch

    from auvsum.engine.memory import cache_shape

    saved = save_random("opt-125m", folder / "opt-125m")
    plain, eight = load_folder(saved), load_folder(saved, "int8")
    ids, new, shape = draw(plain.config, options.prompt), options.new_tokens, cache_shape(plain)
    cases: dict[str, Case] = {}
    for weights, model in (("bf16", plain), ("int8", eight)):
        cases[f"auvsum {weights} full"] = auvsum_case(model, shape, ids, new, "full", "100%", None)
        for policy in ("auv", "h2o"):
            cases[f"auvsum {weights} {policy} {BUDGET}"] = auvsum_case(model, shape, ids, new, policy, BUDGET, None)
        cases[f"auvsum {weights} auv {BUDGET}, streamed"] = auvsum_case(
            model, shape, ids, new, "auv", BUDGET, options.chunk
        )
    reference = load_folder(saved)
    for attention in ("sdpa", "eager"):
        cases[f"transformers bf16 {attention}"] = transformers_case(reference, ids, new, attention)
    missing = {}
    if installed("ctranslate2"):
        threads = torch.get_num_threads()
        for kind in ("float32", "int8"):
            cases[f"CTranslate2 {kind}"] = ctranslate2_case(saved, ids, new, kind, threads)
        cases["CTranslate2 int8, 80 tokens held"] = ctranslate2_case(saved, ids[:80], new, "int8", threads)
    else:
        missing["CTranslate2"] = "not installed"
    return rows(cases, missing, options.repetitions)


def document(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """The default model: a long document, 120 tokens written."""
    import torch

    from auvsum.engine.models import load

    loaded = load(device="cpu")
    eight, reference = load(device="cpu", weights="int8").model, load(device="cpu").model
    for model in (loaded.model, eight, reference):
        model.generation_config.eos_token_id = None
    ids = loaded.tokenizer(TEXT.read_text(encoding="utf-8"), verbose=False).input_ids
    ids = (ids * (options.document // len(ids) + 1))[: options.document]
    new, shape = options.summary, loaded.shape
    cases = {
        f"auvsum bf16 auv {BUDGET}": auvsum_case(loaded.model, shape, ids, new, "auv", BUDGET, None),
        f"auvsum bf16 auv {BUDGET}, streamed": auvsum_case(loaded.model, shape, ids, new, "auv", BUDGET, options.chunk),
        f"auvsum int8 auv {BUDGET}, streamed": auvsum_case(eight, shape, ids, new, "auv", BUDGET, options.chunk),
        "transformers bf16 sdpa": transformers_case(reference, ids, new, "sdpa"),
    }
    missing = {}
    if not installed("llama_cpp"):
        missing["llama.cpp"] = "not installed"
    elif options.gguf is None:
        missing["llama.cpp"] = "no --gguf"
    else:
        cases["llama.cpp"] = llama_cpp_case(options.gguf, ids, new, torch.get_num_threads())
    return rows(cases, missing, min(options.repetitions, 3))


#: Engines of `large`, one process each.
_LARGE = ("auvsum bf16", "auvsum int8", "transformers bf16", "CTranslate2 int8")


def large(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """OPT-1.3b's shape; each engine in its own process, so that its peak memory is its own."""
    saved = save_random("opt-1.3b", folder / "opt-1.3b")
    names = [name for name in _LARGE if not name.startswith("CTranslate2") or installed("ctranslate2")]
    if "CTranslate2 int8" in names:  # converting takes more memory than running
        subprocess.run([sys.executable, __file__, "--large", "convert", str(saved)], check=True)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(min(options.repetitions, 2)):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            command = [sys.executable, __file__, "--large", name, str(saved), "--prompt", str(options.prompt)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    result: list[dict[str, Any]] = [
        {"engine": name, **{key: common.median([run[key] for run in runs]) for key in runs[0]}}
        for name, runs in found.items()
    ]
    return result + [{"engine": name, "note": "not installed"} for name in _LARGE if name not in names]


def one_large(name: str, saved: Path, options: argparse.Namespace) -> None:
    """One engine of `large`: its JSON on stdout."""
    from transformers import AutoConfig

    from auvsum.engine.memory import cache_shape

    threads = len(os.sched_getaffinity(0))
    ids, new = draw(AutoConfig.from_pretrained(saved), options.prompt), 24
    if name == "convert":
        ctranslate2_case(saved, ids, new, "int8", threads)
        return
    if name.startswith("CTranslate2"):
        case = ctranslate2_case(saved, ids, new, "int8", threads)
    else:
        model = load_folder(saved, name.split()[1])
        if name.startswith("auvsum"):
            case = auvsum_case(model, cache_shape(model), ids, new, "auv", BUDGET, options.chunk)
        else:
            case = transformers_case(model, ids, new, "sdpa")
    case()
    found = summarize([case()])
    del found["kv_bytes"]
    print(json.dumps({**found, "peak_rss_bytes": common.peak_rss()}))


def batch(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Tokens a second of 16 documents written together, and of one; OPT-125m's shape, short prompts."""
    from auvsum.cache.policy import make_policy
    from auvsum.engine.generate import Engine, Request
    from auvsum.events import Prefilled, Token

    saved = save_random("opt-125m", folder / "opt-125m")
    policy = make_policy("auv")
    together, new = 16, options.new_tokens
    found: list[dict[str, Any]] = []
    cases: dict[str, Callable[[], float]] = {}
    for weights in ("bf16", "int8"):
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

            cases[f"{weights}, {number} together"] = case
    results, _ = common.interleave(cases, options.repetitions)
    for name, rates in results.items():
        found.append({"engine": name, "decode_tokens_per_s": round(common.median(rates), 2)})
    return found


def bookkeeping(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
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
        "opt-125m bf16": load_folder(saved),
        "opt-125m int8": load_folder(saved, "int8"),
        "default model bf16": load(device="cpu").model,
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
    return found


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
    parser.add_argument("--large", nargs=2, metavar=("ENGINE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.only.split(",")) - set(SECTIONS):
        parser.error(f"unknown sections: {', '.join(sorted(unknown))}")
    return options


def main() -> None:
    from auvsum import _env

    _env.prepare()
    import torch

    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.large:
        one_large(options.large[0], Path(options.large[1]), options)
        return
    kept = json.loads(options.out.read_text()) if options.out and options.out.exists() else {"sections": {}}
    sections: dict[str, Any] = kept["sections"]
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only.split(","):
            load_before = round(os.getloadavg()[0], 2)
            found = {"decode": decode, "document": document, "large": large, "batch": batch,
                     "bookkeeping": bookkeeping}[name](options, Path(folder))  # fmt: skip
            loads = (load_before, round(os.getloadavg()[0], 2))
            sections[name] = {"repetitions": options.repetitions, "load_average": loads, "rows": found}
            print(f"\n{name}, median of {options.repetitions}, load {loads[0]} to {loads[1]}\n")
            common.print_table(["engine", *_columns(found)], list(_cells(found)))
            record = {
                "benchmark": "cpu",
                "prompt_tokens": options.prompt,
                "document_tokens": options.document,
                "chunk": options.chunk,
                "machine": common.machine(),
                "versions": common.versions(),
                "sections": sections,
            }
            if options.out:
                options.out.write_text(json.dumps(record, indent=1) + "\n")
    print()
    common.print_json(record)


def _columns(found: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for row in found for key in row if key != "engine"))


def _cells(found: list[dict[str, Any]]) -> Iterator[list[str]]:
    for row in found:
        yield [row["engine"], *("-" if row.get(key) is None else str(row[key]) for key in _columns(found))]


if __name__ == "__main__":
    main()

"""What all benchmarks share: a fair order of runs, the machine described, random models of real shapes, output."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[1]

T = TypeVar("T")


# -- order and statistics ----------------------------------------------------------------------------------------------


def interleave(
    cases: Mapping[str, Callable[[], T]], repetitions: int, warmups: int = 1
) -> tuple[dict[str, list[T]], dict[str, str]]:
    """Runs every case once, then every case again, and so on, so that a slow minute of the machine hits them all.

    The order turns by one each round. A case that runs out of memory is not tried again.

    Returns:
        The results of each case without its warm-ups, and a note for each case that failed.
    """
    names = list(cases)
    results: dict[str, list[T]] = {name: [] for name in names}
    notes: dict[str, str] = {}
    for number in range(warmups + repetitions):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            if name in notes:
                continue
            _progress(f"round {number + 1}/{warmups + repetitions}: {name}")
            try:
                result = cases[name]()
            except Exception as error:
                if "out of memory" not in str(error).lower():
                    raise
                notes[name] = "out of memory"
                results[name].clear()
                continue
            if number >= warmups:
                results[name].append(result)
    _progress("")
    return results, notes


def _progress(line: str) -> None:
    """One line on a terminal that the next one replaces; nothing elsewhere."""
    if sys.stderr.isatty():
        print(f"\r{line:<60}\r", end="", file=sys.stderr, flush=True)


def median(values: Sequence[float]) -> float:
    """The median; a benchmark here reports no mean."""
    return statistics.median(values)


# -- the machine -------------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What a reader needs to know to compare: processor, cores, threads, memory, GPU, bf16, how busy it was."""
    import torch

    cpu = _proc_field("/proc/cpuinfo", "model name") or platform.processor()
    flags = (_proc_field("/proc/cpuinfo", "flags") or "").split()
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "bf16": [flag for flag in ("avx512_bf16", "amx_bf16", "bf16") if flag in flags],
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "load_average": round(os.getloadavg()[0], 2),
    }


def versions() -> dict[str, str]:
    """Python, the libraries that matter, and the commit that was measured (`+` where it was changed)."""
    import torch
    import transformers

    import auvsum

    return {
        "auvsum": auvsum.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def peak_rss(pid: int | str = "self") -> int:
    """The most physical memory that a process ever held, in bytes, as the kernel counts it; 0 where there is no /proc.

    Seen from outside the process when given its id while it runs.
    """
    field = _proc_field(f"/proc/{pid}/status", "VmHWM")
    return int(field.split()[0]) * 1024 if field else 0


def own_memory(pid: int | str = "self") -> int:
    """Physical memory of a process now without what is mapped from files, in bytes; 0 where there is no /proc."""
    field = _proc_field(f"/proc/{pid}/status", "RssAnon")
    return int(field.split()[0]) * 1024 if field else 0


def _proc_field(path: str, key: str) -> str | None:
    """The value of the first `key : value` line of a file of /proc."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next(
        (value.strip() for name, _, value in (line.partition(":") for line in lines) if name.strip() == key), None
    )


def _commit() -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "") or "unknown"
    except OSError:
        return "unknown"


# -- models ------------------------------------------------------------------------------------------------------------

#: OPT: layers, heads, hidden size, feed-forward size. 350m also projects its embeddings and norms afterwards.
_OPT = {
    "opt-125m": (12, 12, 768, 3072),
    "opt-350m": (24, 16, 1024, 4096),
    "opt-1.3b": (24, 32, 2048, 8192),
    "opt-13b": (40, 40, 5120, 20480),
    "opt-30b": (48, 56, 7168, 28672),
}
SHAPES = (*_OPT, "llama-8b")


def shape_config(name: str) -> Any:
    """The transformers configuration of a published model, without its weights."""
    from transformers import LlamaConfig, OPTConfig

    if name == "llama-8b":
        return LlamaConfig(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            max_position_embeddings=131072,
        )
    layers, heads, hidden, feed_forward = _OPT[name]
    small = name == "opt-350m"
    return OPTConfig(
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_size=hidden,
        ffn_dim=feed_forward,
        word_embed_proj_dim=512 if small else hidden,
        do_layer_norm_before=not small,
        max_position_embeddings=2048,
    )


def random_model(name: str, *, dtype: Any, device: str, seed: int = 0) -> Any:
    """A model of a published shape with random weights, made where it will run. Its text means nothing."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(shape_config(name), dtype=dtype)
    return model.eval().requires_grad_(False)


# -- output ------------------------------------------------------------------------------------------------------------


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """`--model` or `--shape`: what is measured."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", help="as for `auvsum summarize`; the default model without it")
    which.add_argument("--shape", choices=SHAPES, help="random weights of that shape")


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table for people: the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in [headings, *rows]) for column in range(len(headings))]
    for row in [headings, ["-" * width for width in widths], *rows]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        print("  ".join(cells).rstrip())


def print_json(record: Mapping[str, Any]) -> None:
    """The last line of every benchmark: everything measured, for programs."""
    print(json.dumps(record, ensure_ascii=False))

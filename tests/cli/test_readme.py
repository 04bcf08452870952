"""The README is run, word for word: every `console` and every `python` block, each in a fresh copy of what a user has.

Nothing in the text is replaced. The models that the README names are there under their names, in a cache of the test's
own: tiny, random, and able to read bytes. A block that must not be run here (installing, fetching) is a `bash` block.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
#: Folder of a model in the test's cache -> its family. What is not among these cannot be loaded, and the test fails.
MODELS = {
    "auvsum/models/smollm2-135m-instruct": "llama",
    "huggingface/hub/models--facebook--opt-125m/snapshots/0": "opt",
}
POSITIONS = 8192


def blocks(language: str) -> list[pytest.param]:
    """The fenced blocks of one language, named by their line."""
    found = re.finditer(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [pytest.param(m[1], id=f"line-{README.count(chr(10), 0, m.start()) + 1}") for m in found]


def commands(block: str) -> str:
    """What a person would type of a console block: the lines after `$ `, and after `> ` where one goes on."""
    return "\n".join(line[2:] for line in block.splitlines() if line.startswith(("$ ", "> ")))


def write_model(folder: Path, family: str) -> None:
    """A random checkpoint whose tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["</s>", "<pad>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    common = {"vocab_size": len(vocabulary), "max_position_embeddings": POSITIONS, "hidden_size": 32}
    common |= {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }
    if family == "opt":
        config = OPTConfig(**common, ffn_dim=64, word_embed_proj_dim=32)
    else:
        config = LlamaConfig(**common, num_key_value_heads=2, intermediate_size=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>").save_pretrained(folder)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache directory as it is after the models were fetched."""
    from auvsum.engine.registry import MARKER

    cache = tmp_path_factory.mktemp("cache")
    for place, family in MODELS.items():
        write_model(cache / place, family)
        if family == "opt":
            refs = (cache / place).parents[1] / "refs"
            refs.mkdir()
            (refs / "main").write_text("0")
        else:
            (cache / place / MARKER).write_text("{}")
    return cache


@pytest.fixture
def user(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder: the samples, an empty home, no settings but the cache, no network."""
    shutil.copytree(ROOT / "samples", tmp_path / "samples")
    for name in [name for name in os.environ if name.startswith(("AUVSUM_", "HF_", "XDG_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    return tmp_path


def run(arguments: list[str], where: Path) -> None:
    done = subprocess.run(arguments, cwd=where, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr


def test_there_is_something_to_run() -> None:
    assert blocks("console")
    assert all(commands(block.values[0]) for block in blocks("console"))
    assert len(blocks("python")) == README.count("```python")


@pytest.mark.parametrize("block", blocks("console"))
def test_console_block(block: str, user: Path) -> None:
    run(["bash", "-euo", "pipefail", "-c", commands(block)], user)


@pytest.mark.parametrize("block", blocks("python"))
def test_python_block(block: str, user: Path) -> None:
    run([sys.executable, "-c", block], user)


def test_every_file_it_links_to_is_there() -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []

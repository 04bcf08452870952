"""`auvsum doctor --model`: the self-check on the model itself, also for architectures that are not on the list."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM

from tests import checkpoints


def checks(cli: Any, folder: Path) -> tuple[int, dict[str, Any]]:
    result = cli.inside("doctor", "--model", str(folder), "--format", "json")
    found = {check["name"]: check for check in json.loads(result.out)["checks"]}
    return result.code, {name: check for name, check in found.items() if "model" in name}


def test_a_supported_model_is_checked_itself(cli: Any, tmp_path: Path) -> None:
    code, found = checks(cli, checkpoints.llama(tmp_path / "llama"))
    assert code == 0
    assert [check["ok"] for check in found.values()] == [True, True]
    assert found["unbound budget equals transformers (this model)"]["detail"] == "24 of 24 tokens equal"


@pytest.mark.parametrize("kind", ["attends", "does not"])
def test_other_architectures_are_tried_and_named(cli: Any, tmp_path: Path, kind: str) -> None:
    """GPT-2 goes through the attention interface, though nobody promises it; Mamba has no keys to evict."""
    folder = tmp_path / "other"
    folder.mkdir()
    if kind == "attends":
        config = GPT2Config(vocab_size=280, n_positions=128, n_embd=32, n_layer=2, n_head=4)
        GPT2LMHeadModel(config).save_pretrained(folder)
    else:
        MambaForCausalLM(MambaConfig(vocab_size=280, hidden_size=32, num_hidden_layers=2)).save_pretrained(folder)
    checkpoints.chatml_tokenizer().save_pretrained(folder)
    code, found = checks(cli, folder)
    assert code == 3
    listed, checked = found.values()
    assert not listed["ok"]
    assert ("gpt2" if kind == "attends" else "mamba") in listed["detail"]
    assert checked["ok"] == (kind == "attends"), checked

"""`benchmarks/gemma.py`: a tiny file of the same kind becomes the model that was written into it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.numerics.test_families import WINDOW, build

WORDS = ["▁", "t", "h", "e", "▁t", "he", "▁the", "th", "n", "▁then", "д", "да", "."]
SPECIAL = {"<pad>": 3, "<eos>": 3, "<bos>": 3, "<unk>": 3, "<unused0>": 3, "\n\n": 4, "<0xD0>": 6, "<0xB4>": 6}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gemma", Path(__file__).parents[2] / "benchmarks" / "gemma.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def write(file: Path, names: dict[str, str]) -> torch.nn.Module:
    tokens = [*SPECIAL, *WORDS]
    model = build("gemma3", vocab_size=len(tokens), num_hidden_layers=6, tie_word_embeddings=True)
    config, writer = model.config, gguf.GGUFWriter(file, "gemma3")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(6)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(8)
    writer.add_sliding_window(WINDOW)
    writer.add_token_list(tokens)
    writer.add_token_scores([-1000.0] * len(SPECIAL) + [-float(i) for i in range(len(WORDS))])
    writer.add_token_types([*SPECIAL.values(), *[1] * len(WORDS)])
    parts = {theirs: own for own, theirs in names.items()}
    for name, tensor in model.state_dict().items():
        values = tensor + 1 if name.endswith("norm.weight") else tensor
        if name.startswith("model.layers."):
            layer, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
            name = f"blk.{layer}.{parts[part]}.weight"
        elif name == "lm_head.weight":
            continue
        else:
            name = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]
        writer.add_tensor(name, values.numpy().copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def test_the_model_and_its_tokens_come_out(script: ModuleType, tmp_path: Path) -> None:
    model = write(tmp_path / "tiny.gguf", script.NAMES)
    script.english(tmp_path / "tiny.gguf", tmp_path / "english.gguf")
    for name, vocabulary in (("tiny", 21), ("english", 18)):
        script.convert(tmp_path / f"{name}.gguf", tmp_path / name)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        assert len(tokenizer) == vocabulary
        assert tokenizer.tokenize("then the then.\n\nthe") == ["t", "he", "n", "▁the", "▁then", ".", "\n\n", "t", "he"]
        ids = tokenizer("the дn").input_ids
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == "the дn"
        assert ("д" in tokenizer.tokenize("д")) == (name == "tiny")
        own = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        assert own.config.layer_types == ["sliding_attention"] * 5 + ["full_attention"]
        state = own.state_dict()
        for key, tensor in model.state_dict().items():
            if key not in ("model.embed_tokens.weight", "lm_head.weight"):
                torch.testing.assert_close(state[key], tensor.bfloat16().float(), rtol=0, atol=2**-7)
    kept = [i for i, token in enumerate([*SPECIAL, *WORDS]) if token not in ("<unused0>", "д", "да")]
    embedding = model.state_dict()["model.embed_tokens.weight"][kept].bfloat16().float()
    assert torch.equal(state["model.embed_tokens.weight"], embedding)

"""Tiny checkpoints, written on the spot: deterministic, under a megabyte, with tokenizers that take any text.

`opt` and `llama` are whole models (random weights); the others are the shapes in which models come, and break.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from auvsum import _env

_env.prepare()  # no progress bars in the tests

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
_MERGES = """
    Ġ t, h e, Ġt he, i n, Ġ a, e r, o n, r e, Ġ o, Ġo f, n d, Ġa nd, Ġ in, in g, e s, Ġ s, Ġ w, e n, o r, i t, Ġt o
"""
MERGES = [tuple(merge.split()) for merge in _MERGES.split(",")]


def _vocab(special: list[str]) -> dict[str, int]:
    return {token: i for i, token in enumerate([*special, *BYTES, *("".join(merge) for merge in MERGES)])}


def write_opt_tokenizer(folder: Path) -> dict[str, int]:
    """The files that `facebook/opt-*` ship: a GPT-2 BPE in OPT's id order, `</s>` put first by `add_bos_token`."""
    vocab = _vocab(["<s>", "<pad>", "</s>", "<unk>"])
    token: dict[str, Any] = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
    names = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    special = {name: {"content": content, **token} for name, content in names.items()}
    config = {name: {"__type": "AddedToken", **value} for name, value in special.items()}
    config |= {
        "errors": "replace",
        "add_prefix_space": False,
        "add_bos_token": True,
        "tokenizer_class": "GPT2Tokenizer",
    }
    _json(folder / "vocab.json", vocab)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in MERGES), encoding="utf-8")
    _json(folder / "special_tokens_map.json", special)
    _json(folder / "tokenizer_config.json", config)
    return vocab


def opt_model(vocab_size: int = 281, *, seed: int = 0, **changes: Any) -> OPTForCausalLM:
    """Two layers, four heads of 16, 512 positions; `changes` go to the config."""
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "word_embed_proj_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 128,
        "max_position_embeddings": 512,
        "init_std": 0.1,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": 2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return OPTForCausalLM(OPTConfig(**{**settings, **changes})).eval()


def opt(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """(a) An OPT folder in safetensors, with its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    opt_model(len(write_opt_tokenizer(folder)), seed=seed, **changes).to(dtype).save_pretrained(folder)
    return folder


def opt_350m(folder: Path, *, seed: int = 0) -> Path:
    """(d) As opt-350m is built: embeddings of another width, projected in and out, and layer norms after."""
    return opt_pickled(folder, seed=seed, **OPT_350M)


OPT_350M = {"word_embed_proj_dim": 32, "do_layer_norm_before": False, "_remove_final_layer_norm": True}


def opt_pickled(
    folder: Path, *, seed: int = 0, shards: int = 1, names: str = "model.decoder", head: bool = True, **changes: Any
) -> Path:
    """(b), (c) An fp16 OPT folder in one or more pickles, as `facebook/opt-*` are published.

    Args:
        names: what the parameters' names start with, `model.decoder` or `decoder`.
        head: whether the pickle repeats the embedding as `lm_head.weight`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = opt_model(len(write_opt_tokenizer(folder)), seed=seed, **changes).half()
    model.config.architectures = ["OPTForCausalLM"]
    model.config.dtype = "float16"
    model.config.save_pretrained(folder)
    state = {name.replace("model.decoder", names, 1): tensor for name, tensor in model.state_dict().items()}
    if not head:
        del state["lm_head.weight"]
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return folder
    files = [f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin" for i in range(shards)]
    weight_map = {name: files[i * shards // len(state)] for i, name in enumerate(state)}
    for file in files:
        torch.save({name: state[name] for name in state if weight_map[name] == file}, folder / file)
    _json(folder / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": weight_map})
    return folder


def chatml_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with ChatML's special tokens and template."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend = Tokenizer(models.BPE(vocab=_vocab(special), merges=MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )


def llama_model(vocab_size: int = 280, *, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """Two layers, four query heads of 16 over two key-value heads, 1,024 rotary positions, tied head."""
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "max_position_embeddings": 1024,
        "initializer_range": 0.1,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


def llama(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """(e) A grouped-query Llama folder in safetensors, with a ChatML tokenizer."""
    tokenizer = chatml_tokenizer()
    llama_model(len(tokenizer), seed=seed, **changes).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def encoder_decoder(folder: Path) -> Path:
    """(f) The config of a T5, which cannot be used."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}
    _json(folder / "config.json", config)
    return folder


def shard_llama(folder: Path) -> Path:
    """A Llama in several safetensors files with an index, none of them whole by itself."""
    tokenizer = chatml_tokenizer()
    llama_model(len(tokenizer)).save_pretrained(folder, max_shard_size="100KB")
    tokenizer.save_pretrained(folder)
    return folder


def truncate(file: Path, share: float = 0.5) -> Path:
    """(g) Cuts a file short, as a broken download does."""
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])
    return file


def gguf_llama(file: Path, *, seed: int = 0, pre: str = "smollm", kind: str = "F32") -> LlamaForCausalLM:
    """Writes a Llama as llama.cpp does (rotary pairs side by side) and returns the model that it holds, in fp32.

    Args:
        kind: of its matrices, but the embedding's, which is `Q8_0` in a quantized file.
    """
    import gguf

    tokenizer = chatml_tokenizer()
    model = llama_model(len(tokenizer), seed=seed)
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in MERGES])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHATML)
    parts = {"input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k"}
    parts |= {"self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm"}
    parts |= {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        if name.startswith("model.layers."):
            layer, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
            name = f"blk.{layer}.{parts[part]}.weight"
            heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(part)
            if heads:  # two halves of a head -> neighbouring pairs
                tensor = tensor.reshape(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        else:
            name = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]
        values = tensor.numpy().copy()
        if kind != "F32" and values.ndim == 2:
            own = gguf.GGMLQuantizationType["Q8_0" if name == "token_embd.weight" else kind]
            writer.add_tensor(name, gguf.quantize(values, own), raw_dtype=own)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _json(file: Path, value: object) -> None:
    file.write_text(json.dumps(value), encoding="utf-8")

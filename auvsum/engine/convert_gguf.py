"""GGUF -> a folder that transformers loads: config, generation config, tokenizer, bf16 safetensors.

What the file holds in 4 bits (`Q4_0`, `Q4_1`) is kept in them too, in a file of its own that `--weights gguf` maps.

Only what the embedded model needs: `llama` weights with a byte-level BPE whose splitting rule is known here. Written
out instead of transformers' own GGUF loading because that one needs accelerate, takes three times as long, and forgets
that SmolLM2 splits numbers into digits (`tokenizer.ggml.pre = smollm`): other token ids for some tables.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from auvsum.engine.registry import GGUF_BLOCKS
from auvsum.errors import ModelUnsupported

if TYPE_CHECKING:
    import torch

_CONTROL = 3  # gguf.TokenType.CONTROL
#: GGUF's names -> transformers', for the llama architecture. `{n}` is the layer.
_GLOBAL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.weight\Z")


def convert_gguf(gguf: Path, out: Path) -> None:
    """Writes the model of `gguf` into the folder `out`, in bf16 and, where the file has such, in blocks of 4 bits.

    Raises:
        ModelUnsupported: for an architecture or a tokenizer that is not known here.
    """
    from gguf import GGUFReader
    from safetensors.torch import save_file
    from transformers import GenerationConfig, LlamaConfig

    reader = GGUFReader(gguf)

    def read(key: str, default: Any = None) -> Any:
        return reader.fields[key].contents() if key in reader.fields else default

    if (architecture := read("general.architecture")) != "llama":
        raise ModelUnsupported(f"{gguf.name} is a GGUF file of architecture {architecture}; only llama is read")
    ties = not any(tensor.name == "output.weight" for tensor in reader.tensors)
    heads, hidden = read("llama.attention.head_count"), read("llama.embedding_length")
    kv_heads = read("llama.attention.head_count_kv", heads)
    special = {
        name: read(f"tokenizer.ggml.{gguf_name}_token_id")
        for name, gguf_name in [("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")]
    }
    ids = {f"{name}_token_id": special[name] for name in ("bos", "eos", "pad")}
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(read("tokenizer.ggml.tokens")),
        hidden_size=hidden,
        intermediate_size=read("llama.feed_forward_length"),
        num_hidden_layers=read("llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=read("llama.attention.key_length", hidden // heads),
        max_position_embeddings=read("llama.context_length"),
        rms_norm_eps=read("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": read("llama.rope.freq_base", 10000.0)},
        tie_word_embeddings=ties,
        dtype="bfloat16",
        **ids,
    )
    config.save_pretrained(out)
    GenerationConfig(**ids).save_pretrained(out)
    _tokenizer(read, special, config.max_position_embeddings).save_pretrained(out)
    state, blocks = _weights(reader.tensors, heads=heads, kv_heads=kv_heads)
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    if blocks:
        save_file(blocks, out / GGUF_BLOCKS)


def _weights(tensors: Any, *, heads: int, kv_heads: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """All weights in bf16 by transformers' names, and the 4-bit ones among the layers' as `_four_bits` has them."""
    import torch
    from gguf import dequantize

    state, blocks = {}, {}
    for tensor in tensors:
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if tensor.name in _GLOBAL:
            name = _GLOBAL[tensor.name]
        elif tensor.name == "rope_freqs.weight":  # follows from rope_parameters
            continue
        else:
            match = _BLOCK_NAME.match(tensor.name)
            if match is None or match[2] not in _BLOCK:
                raise ModelUnsupported(f"the GGUF file holds an unknown tensor, {tensor.name}")
            name = f"model.layers.{match[1]}.{_BLOCK[match[2]]}.weight"
            turned = {"attn_q": heads, "attn_k": kv_heads}.get(match[2])
            if turned is not None:
                values = _unpermute(values, turned)
            for part, kept in _four_bits(tensor).items():
                kept = kept if turned is None else _unpermute(kept, turned)
                blocks[f"{name.removesuffix('.weight')}.{part}"] = kept.contiguous()
        state[name] = values.to(torch.bfloat16).contiguous()
    return state, blocks


def _four_bits(tensor: Any) -> dict[str, torch.Tensor]:
    """The blocks of a 4-bit tensor `[out, in]`, which are 32 weights of a row each; nothing of another.

    Returns:
        `codes` uint8 `[out, in / 2]`, of which a block has 16 bytes: its first 16 codes in their lower halves, the
        others in their upper ones. `step` and `least` fp16 `[out, in / 32]`: a weight is `code * step + least`.
    """
    import torch
    from gguf import GGMLQuantizationType

    numbers = {GGMLQuantizationType.Q4_0: 1, GGMLQuantizationType.Q4_1: 2}.get(tensor.tensor_type)
    if numbers is None:
        return {}
    raw = torch.from_numpy(tensor.data.copy())
    raw = raw.view(raw.shape[0], -1, 2 * numbers + 16)
    step, *least = raw[..., : 2 * numbers].contiguous().view(torch.float16).unbind(-1)
    codes = raw[..., 2 * numbers :].reshape(raw.shape[0], -1)
    return {"codes": codes, "step": step, "least": least[0] if least else -8 * step}


def _unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undoes llama.cpp's order of rotary pairs: neighbours there, halves here. `[heads * D, hidden]`."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _tokenizer(read: Any, special: dict[str, int | None], positions: int) -> Any:
    """The byte-level BPE of the file as a fast tokenizer, chat template included."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    kind, rule = read("tokenizer.ggml.model"), read("tokenizer.ggml.pre")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    rules = {
        "gpt-2": byte_level,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]),
    }
    if kind != "gpt2" or rule not in rules:
        raise ModelUnsupported(f"the GGUF file's tokenizer ({kind}, {rule}) is not known")
    tokens = read("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in read("tokenizer.ggml.merges")]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = rules[rule]
    backend.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, read("tokenizer.ggml.token_type"), strict=True) if kind == _CONTROL]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=read("tokenizer.chat_template"),
        model_max_length=positions,
        clean_up_tokenization_spaces=False,
        **{f"{name}_token": tokens[i] for name, i in special.items() if i is not None},
    )

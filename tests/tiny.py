"""Tiny random checkpoints whose attention is sharp, so that an eviction changes the logits.

With transformers' own initialization (std 0.02) every softmax row of such a small model is nearly uniform and losing
three quarters of the cache goes unnoticed. Here the query and key projections are drawn so that the logits of a row
spread over a standard deviation of about 3: few keys carry a row, yet the gap between the best and the worst stays far
from where fp32 probabilities underflow (a gap of 87), so that fp32 runs can be compared at 1e-4.
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel

VOCAB = 97
HIDDEN = 32
# The normalized hidden state has unit variance per dimension, so a projection of std s gives q and k of std
# s * sqrt(HIDDEN), and logits q·k/sqrt(D) of std s² * HIDDEN: 2.9 here.
QUERY_KEY_STD = 0.30
VALUE_STD = 0.30


def _draw(generator: torch.Generator, parameter: torch.Tensor, std: float) -> None:
    with torch.no_grad():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def _sharpen(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            _draw(generator, parameter, QUERY_KEY_STD)
        elif name.endswith(("v_proj.weight", "out_proj.weight", "o_proj.weight")):
            _draw(generator, parameter, VALUE_STD)
        elif name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias", "out_proj.bias")):
            _draw(generator, parameter, 0.1)
        elif name.endswith("embed_tokens.weight"):
            _draw(generator, parameter, 1.0)
        elif name.endswith(("embed_positions.weight", "lm_head.weight")):
            _draw(generator, parameter, 0.5)
        elif parameter.dim() == 2:
            _draw(generator, parameter, 0.1)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def tiny_opt(seed: int = 0, layers: int = 2) -> PreTrainedModel:
    """OPT: learned positions, biases, one KV head per query head (4 heads of 8).

    Its output matrix is not tied to the embeddings: random and tied, a model mostly repeats its last token.
    """
    config = OPTConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, word_embed_proj_dim=HIDDEN, num_hidden_layers=layers,
        num_attention_heads=4, ffn_dim=64, max_position_embeddings=512, dropout=0.0, attention_dropout=0.0,
        pad_token_id=0, bos_token_id=0, eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    return _sharpen(OPTForCausalLM(config).to(torch.float32), seed)


def tiny_llama(seed: int = 0, layers: int = 2, query_heads: int = 4) -> PreTrainedModel:
    """Llama: rotary positions, `query_heads` query heads of 8 over 2 KV heads."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=query_heads, num_key_value_heads=2, head_dim=8, max_position_embeddings=1024,
        pad_token_id=0, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return _sharpen(LlamaForCausalLM(config).to(torch.float32), seed)


def flat_opt(layers: int = 1) -> PreTrainedModel:
    """An OPT whose query projections are zero: every query gives all keys the same logit (Fig. 2 of the paper)."""
    model = tiny_opt(seed=3, layers=layers)
    with torch.no_grad():
        for layer in model.model.decoder.layers:
            layer.self_attn.q_proj.weight.zero_()
            layer.self_attn.q_proj.bias.zero_()
    return model


HEAVY, LIGHT = 5, 6


def tie_opt() -> PreTrainedModel:
    """One layer in which token HEAVY takes all the attention there is and token LIGHT, in the presence of one, none.

    The gap of the logits is 400, so the probability of LIGHT is exactly 0.0 in fp32 (exp underflows at about -103) and
    every LIGHT after a HEAVY ties exactly, whatever the order of the sums. Two HEAVY keys have the same logit too.
    Meant for comparisons in fp32: fp64 would not underflow.
    """
    model = tiny_opt(seed=4, layers=1)
    direction = torch.tensor([1.0, -1.0]).repeat(HIDDEN // 2)  # [HIDDEN]: mean 0, variance 1, so LayerNorm keeps it
    decoder = model.model.decoder
    attention = decoder.layers[0].self_attn
    gap = 400.0
    with torch.no_grad():
        decoder.embed_positions.weight.zero_()
        decoder.embed_tokens.weight[HEAVY] = direction
        decoder.embed_tokens.weight[LIGHT] = -direction
        attention.q_proj.weight.zero_()
        attention.q_proj.bias.fill_(attention.head_dim**-0.5)  # q·k/sqrt(D) = (sum of k)/D
        attention.k_proj.bias.zero_()
        attention.k_proj.weight.copy_((direction / HIDDEN * gap / 2).expand(HIDDEN, HIDDEN))  # k = ±gap/2 everywhere
    return model


def uneven_opt() -> PreTrainedModel:
    """One layer whose head 0 gives HEAVY, the first token, exactly everything; its other heads are sharp as usual.

    So head 0 evicts nothing but scores of 0 and its reconstructed slot never lives, beside heads where it does: the
    number of keys a softmax runs over differs from head to head. Half of the hidden state says HEAVY or not, the other
    half is random.
    """
    model = tiny_opt(seed=5, layers=1)
    half = HIDDEN // 2
    direction = torch.tensor([1.0, -1.0]).repeat(half // 2)  # [half]
    decoder = model.model.decoder
    attention = decoder.layers[0].self_attn
    size, gap = attention.head_dim, 400.0
    with torch.no_grad():
        decoder.embed_positions.weight[:, :half] = 0
        decoder.embed_tokens.weight[:, :half] = -direction
        decoder.embed_tokens.weight[HEAVY, :half] = direction
        decoder.embed_tokens.weight[:, half:] *= 0.7
        attention.q_proj.weight[:size] = 0
        attention.q_proj.bias[:size] = size**-0.5
        attention.k_proj.bias[:size] = 0
        attention.k_proj.weight[:size, :half] = direction / half * gap / 2
        attention.k_proj.weight[:size, half:] = 0
    return model


def tokens(count: int, seed: int) -> torch.Tensor:
    """[1, count] random token ids: a fixed stream fed to both sides, so that no rounding can cascade by sampling."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB, (1, count), generator=generator)

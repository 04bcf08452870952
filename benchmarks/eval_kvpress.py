"""NVIDIA's kvpress on the documents of a finished run: the same model, prompts, teacher and bytes, its own presses.

It runs in an environment of its own, because it pins its own transformers:

    python -m venv kvpress && kvpress/bin/pip install kvpress==0.5.5 torch
    auvsum eval --dataset cnn_dailymail --data-dir DATA --limit 12 --metrics fidelity --out runs/cnn
    python benchmarks/dump_prompts.py runs/cnn --data-dir DATA > prompts.jsonl
    kvpress/bin/python benchmarks/eval_kvpress.py --model FOLDER --prompts prompts.jsonl --budgets 4% 10%

`dump_prompts.py` writes what both must share: the token ids of every prompt and of the full cache's greedy summary.
This file imports nothing of auvsum. kvpress masks what a head does not keep and frees nothing of it where heads differ,
so its budget is a share of the tokens; the last line says so.

Prints a table for people, then one JSON line: top-1 agreement and nats a token lost, as `auvsum eval` defines them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time

PRESSES = (
    "SnapKVPress",
    "ExpectedAttentionPress",
    "AdaKVPress(SnapKVPress)",
    "AdaKVPress(ExpectedAttentionPress)",
    "KVzipPress",
    "TOVAPress",
    "StreamingLLMPress",
    "KnormPress",
    "KeyDiffPress",
    "DecodingPress(KnormPress)",
)


def build(name: str, ratio: float, slots: int):
    """A press by name; `A(B)` wraps B. A decoding press compresses to `slots` while it writes."""
    import kvpress

    outer, _, inner = name.removesuffix(")").partition("(")
    if outer == "DecodingPress":
        return kvpress.DecodingPress(base_press=getattr(kvpress, inner)(), compression_interval=16, target_size=slots)
    if inner:
        return getattr(kvpress, outer)(getattr(kvpress, inner)(compression_ratio=ratio))
    return getattr(kvpress, outer)(compression_ratio=ratio)


def logits_after(model, prompt, teacher, press):
    """The log-probabilities `[steps, V]` of a cache pressed after the prompt and fed the teacher's tokens."""
    import contextlib

    import torch
    from transformers import DynamicCache

    cache = DynamicCache()
    ids = torch.tensor([prompt], device=model.device)
    rows = []
    with torch.no_grad():
        decoding = type(press).__name__ == "DecodingPress"
        with press(model) if press is not None else contextlib.nullcontext():
            model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            if decoding:
                rows = _feed(model, cache, len(prompt), teacher)
        if not decoding:
            rows = _feed(model, cache, len(prompt), teacher)
    return torch.stack(rows).float().log_softmax(-1)


def _feed(model, cache, start, teacher):
    import torch

    rows = []
    for step, token in enumerate(teacher[:-1]):
        position = torch.tensor([[start + step]], device=model.device)
        out = model(
            torch.tensor([[token]], device=model.device),
            position_ids=position,
            cache_position=position[0],
            past_key_values=cache,
            use_cache=True,
        )
        rows.append(out.logits[0, -1])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the model's folder")
    parser.add_argument("--prompts", required=True, help="what benchmarks/dump_prompts.py wrote")
    parser.add_argument("--budgets", nargs="+", default=["10%"], help="shares of the prompt's tokens")
    parser.add_argument("--presses", nargs="+", default=list(PRESSES))
    parser.add_argument("--limit", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()

    import torch
    from transformers import AutoModelForCausalLM

    with open(arguments.prompts, encoding="utf-8") as file:
        documents = [json.loads(line) for line in file][: arguments.limit]
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype))
    model = model.to(arguments.device).eval()
    rows = []
    for budget in arguments.budgets:
        share = float(budget.removesuffix("%")) / 100
        for name in arguments.presses:
            agrees, lost, begun = [], [], time.perf_counter()
            try:
                for document in documents:
                    prompt, teacher = document["prompt"], document["teacher"]
                    full = logits_after(model, prompt, teacher, None)
                    press = build(name, 1 - share, max(1, int(share * len(prompt))))
                    pressed = logits_after(model, prompt, teacher, press)
                    truth = torch.tensor(teacher[1:], device=full.device)[:, None]
                    agrees.append((pressed.argmax(-1) == truth[:, 0]).float().mean().item())
                    lost.append((full.gather(-1, truth) - pressed.gather(-1, truth)).mean().item())
            except Exception as error:  # one press that does not fit this model or version does not end the table
                print(f"{name:40} {budget:>5}  failed: {type(error).__name__}: {str(error)[:80]}", file=sys.stderr)
                continue
            row = {
                "press": name,
                "budget": budget,
                "agreement": statistics.mean(agrees),
                "nats": statistics.mean(lost),
                "n": len(agrees),
                "seconds": time.perf_counter() - begun,
            }
            rows.append(row)
            print(f"{name:40} {budget:>5}  agree {row['agreement']:.3f}  nats lost {row['nats']:.3f}  n {row['n']}")
    print(json.dumps({"benchmark": "kvpress", "model": arguments.model, "budget_of": "tokens", "rows": rows}))


if __name__ == "__main__":
    main()

"""NVIDIA's kvpress on the documents of a finished run: the same model, prompts, teacher and bytes, its own presses.

It runs in an environment of its own, because it pins its own transformers:

    python -m venv kvpress && kvpress/bin/pip install kvpress==0.5.5 torch
    auvsum eval --recipe configs/quality.yaml --only cnn --data-dir DATA --out runs
    python benchmarks/dump_prompts.py runs/quality/cnn --data-dir DATA --limit 12 > prompts.jsonl
    kvpress/bin/python benchmarks/eval_kvpress.py --model FOLDER --prompts prompts.jsonl --out kvpress-cpu.json

`dump_prompts.py` writes what both must share: the token ids of every prompt and of the full cache's greedy summary.
This file imports nothing of auvsum. kvpress masks what a head does not keep and frees nothing of it where heads differ,
so its budget is a share of the tokens; its output says so.

Prints a table for people, then one JSON line: top-1 agreement and nats a token lost, as `auvsum eval` defines them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from statistics import mean

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


@dataclass
class Row:
    """A press at a budget: a value a document, in their order."""

    press: str
    budget: str
    agreement: list[float] = field(default_factory=list)
    nats: list[float] = field(default_factory=list)
    seconds: float = 0.0
    failed: str = ""

    def record(self) -> dict:
        """For JSON."""
        values = {"agreement": [round(x, 4) for x in self.agreement], "nats": [round(x, 4) for x in self.nats]}
        return {**vars(self), **values, "seconds": round(self.seconds, 1)}


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
    parser.add_argument("--name", default="smollm2-135m-instruct", help="the model's name, for the JSON")
    parser.add_argument("--dataset", default="cnn_dailymail", help="the documents' name, for the JSON")
    parser.add_argument("--out", help="JSON, rewritten after every document")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()

    import torch
    from transformers import AutoModelForCausalLM

    with open(arguments.prompts, encoding="utf-8") as file:
        documents = [json.loads(line) for line in file][: arguments.limit]
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype))
    model = model.to(arguments.device).eval()
    shares = {budget: float(budget.removesuffix("%")) / 100 for budget in arguments.budgets}
    found = {(name, budget): Row(name, budget) for budget in shares for name in arguments.presses}
    for count, document in enumerate(documents, 1):
        prompt, teacher = document["prompt"], document["teacher"]
        full = logits_after(model, prompt, teacher, None)
        truth = torch.tensor(teacher[1:], device=full.device)[:, None]
        for row in found.values():
            if row.failed:
                continue
            begun = time.perf_counter()
            try:
                press = build(row.press, 1 - shares[row.budget], max(1, int(shares[row.budget] * len(prompt))))
                pressed = logits_after(model, prompt, teacher, press)
            except Exception as error:  # one press that does not fit this model or version does not end the table
                row.failed = f"{type(error).__name__}: {str(error)[:160]}"
                continue
            row.agreement.append((pressed.argmax(-1) == truth[:, 0]).float().mean().item())
            row.nats.append((full.gather(-1, truth) - pressed.gather(-1, truth)).mean().item())
            row.seconds += time.perf_counter() - begun
        result = {
            "benchmark": "kvpress",
            "versions": {
                "kvpress": version("kvpress"),
                "transformers": version("transformers"),
                "torch": torch.__version__,
            },
            "model": arguments.name,
            "dtype": arguments.dtype,
            "device": arguments.device,
            "dataset": arguments.dataset,
            "budget_of": "tokens; what a head does not keep is masked, not freed",
            "documents": [one["id"] for one in documents[:count]],
            "rows": [row.record() for row in found.values()],
        }
        if arguments.out:
            with open(arguments.out, "w", encoding="utf-8") as file:
                file.write(json.dumps(result, indent=1) + "\n")
        print(f"{count}/{len(documents)} {document['id']}", file=sys.stderr, flush=True)
    for row in found.values():
        means = (
            f"agree {mean(row.agreement):.3f}  nats lost {mean(row.nats):.3f}" if row.nats else f"failed: {row.failed}"
        )
        print(f"{row.press:40} {row.budget:>5}  {means}  n {len(row.nats)}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()

"""What 8-bit weights cost in quality: how often and how surely they agree with the model as it is, and ROUGE.

    python benchmarks/eval_weights.py                                    # the shipped samples
    python benchmarks/eval_weights.py --data cnndm.jsonl --limit 24      # rows with id, document and summary

For every document the model writes a summary with its full cache, greedily. The 8-bit model is forced along the same
tokens (agreement on the best token; nats lost a token) and then writes its own. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import common

SAMPLES = common.ROOT / "samples" / "eval.jsonl"


def written(loaded: Any, model: Any, ids: list[int], new: int) -> list[int]:
    """The model's own greedy continuation."""
    from auvsum.cache.policy import make_policy
    from auvsum.engine.generate import Engine, Request
    from auvsum.events import Finished

    engine = Engine(model, make_policy("full"), eos_ids=loaded.eos_ids)
    events = engine.run([Request(ids, slots=len(ids) + new, max_new_tokens=new)])
    return next(list(event.token_ids) for event in events if isinstance(event, Finished))


def log_probabilities(model: Any, ids: list[int], tokens: list[int]) -> Any:
    """Of every possible token at each of `tokens`, in one pass: `[tokens, V]`."""
    import torch

    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        out = model(torch.tensor([ids + tokens]), use_cache=False, logits_to_keep=len(tokens) + 1)
    return out.logits[0, :-1].float().log_softmax(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--data", type=Path, default=SAMPLES)
    parser.add_argument("--limit", type=int, default=12)
    parser.add_argument("--most-tokens", type=int, default=1500, help="longer documents are cut")
    parser.add_argument("--new-tokens", type=int, default=64)
    options = parser.parse_args()

    import torch

    from auvsum.engine.models import load
    from auvsum.engine.weights import quantize_weights
    from auvsum.eval.metrics import Rouge, estimate
    from auvsum.text.prompts import build_prompt

    plain, eight = load(options.model, device="cpu"), load(options.model, device="cpu")
    quantize_weights(eight.model)
    rows = [json.loads(line) for line in options.data.read_text(encoding="utf-8").splitlines()][: options.limit]
    own_type = str(plain.dtype).removeprefix("torch.")
    rouge = Rouge()
    agrees: list[float] = []
    lost: list[float] = []
    scores: dict[str, list[float]] = {own_type: [], "int8": []}
    same = 0
    for row in rows:
        head = plain.tokenizer(row["document"], verbose=False).input_ids[: options.most_tokens]
        prompt = build_prompt(plain.tokenizer, plain.tokenizer.decode(head), sentences=3)
        ids = list(prompt.ids)
        tokens = written(plain, plain.model, ids, options.new_tokens)
        own = written(eight, eight.model, ids, options.new_tokens)
        ours, theirs = log_probabilities(plain.model, ids, tokens), log_probabilities(eight.model, ids, tokens)
        at = torch.tensor(tokens)[:, None]
        agrees.append((ours.argmax(-1) == theirs.argmax(-1)).float().mean().item())
        lost.append((ours.gather(1, at) - theirs.gather(1, at)).mean().item())
        same += own == tokens
        for name, said in ((own_type, tokens), ("int8", own)):
            scores[name].append(rouge.scores(plain.tokenizer.decode(said), row["summary"])["rouge1"])

    record = {
        "benchmark": "weights",
        "documents": len(rows),
        "data": options.data.name,
        "agreement": estimate(agrees).record(),
        "nats_lost": estimate(lost).record(),
        "rouge1": {name: estimate(values).record() for name, values in scores.items()},
        "summaries_equal": same,
        "machine": common.machine(),
        "versions": common.versions(),
    }
    common.print_table(
        ["weights", "ROUGE-1", "agreement", "nats lost"],
        [
            [own_type, f"{estimate(scores[own_type]).mean:.1f}", "1", "0"],
            [
                "int8",
                f"{estimate(scores['int8']).mean:.3f}",
                f"{estimate(agrees).mean:.3f}",
                f"{estimate(lost).mean:.4f}",
            ],
        ],
    )
    common.print_json(record)


if __name__ == "__main__":
    main()

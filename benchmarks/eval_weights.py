"""What weights in few bits cost in quality: how often and how surely they agree with the model as it is, and ROUGE.

    python benchmarks/eval_weights.py                                    # the shipped samples
    python benchmarks/eval_weights.py --data cnndm.jsonl --limit 24      # rows with id, document and summary
    python benchmarks/eval_weights.py --weights gguf                     # only the 4 bits of the model's GGUF file

For every document the model writes a summary with its full cache, greedily. The others are forced along the same
tokens (agreement on the best token; nats lost a token) and then write their own. The last line is one JSON object.
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
    parser.add_argument("--weights", nargs="+", choices=("int8", "gguf"), default=["int8", "gguf"])
    options = parser.parse_args()

    import torch

    from auvsum.engine.models import load
    from auvsum.eval.metrics import Rouge, estimate
    from auvsum.text.prompts import build_prompt

    plain = load(options.model, device="cpu")
    others = {weights: load(options.model, device="cpu", weights=weights) for weights in options.weights}
    rows = [json.loads(line) for line in options.data.read_text(encoding="utf-8").splitlines()][: options.limit]
    own_type = str(plain.dtype).removeprefix("torch.")
    rouge = Rouge()
    agrees: dict[str, list[float]] = {weights: [] for weights in others}
    lost: dict[str, list[float]] = {weights: [] for weights in others}
    scores: dict[str, list[float]] = {own_type: [], **{weights: [] for weights in others}}
    same = dict.fromkeys(others, 0)
    for row in rows:
        head = plain.tokenizer(row["document"], verbose=False).input_ids[: options.most_tokens]
        ids = list(build_prompt(plain.tokenizer, plain.tokenizer.decode(head), sentences=3).ids)
        tokens = written(plain, plain.model, ids, options.new_tokens)
        ours = log_probabilities(plain.model, ids, tokens)
        at = torch.tensor(tokens)[:, None]
        scores[own_type].append(rouge.scores(plain.tokenizer.decode(tokens), row["summary"])["rouge1"])
        for weights, other in others.items():
            own = written(other, other.model, ids, options.new_tokens)
            theirs = log_probabilities(other.model, ids, tokens)
            agrees[weights].append((ours.argmax(-1) == theirs.argmax(-1)).float().mean().item())
            lost[weights].append((ours.gather(1, at) - theirs.gather(1, at)).mean().item())
            same[weights] += own == tokens
            scores[weights].append(rouge.scores(plain.tokenizer.decode(own), row["summary"])["rouge1"])

    def estimates(values: dict[str, list[float]]) -> dict[str, Any]:
        return {name: estimate(found).record() for name, found in values.items()}

    record = {
        "benchmark": "weights",
        "documents": len(rows),
        "data": options.data.name,
        "agreement": estimates(agrees),
        "nats_lost": estimates(lost),
        "rouge1": estimates(scores),
        "summaries_equal": same,
        "machine": common.machine(),
        "versions": common.versions(),
    }
    common.print_table(
        ["weights", "ROUGE-1", "agreement", "nats lost"],
        [[own_type, f"{estimate(scores[own_type]).mean:.1f}", "1", "0"]]
        + [
            [
                weights,
                f"{estimate(scores[weights]).mean:.1f}",
                f"{estimate(agrees[weights]).mean:.3f}",
                f"{estimate(lost[weights]).mean:.4f}",
            ]
            for weights in others
        ],
    )
    common.print_json(record)


if __name__ == "__main__":
    main()

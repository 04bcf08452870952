"""The prompts of a finished run and the full cache's greedy tokens, as JSON lines.

    python benchmarks/dump_prompts.py RUN > prompts.jsonl

For engines in environments of their own (`eval_kvpress.py`), which then read exactly what auvsum read.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from auvsum.engine.models import load
from auvsum.eval.datasets import load_examples
from auvsum.eval.lockstep import write_together
from auvsum.eval.prompts import Prompter
from auvsum.eval.runner import select
from auvsum.eval.runs import Run
from auvsum.eval.tasks import task_of
from auvsum.eval.texts import arrange


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--limit", type=int, help="only the run's first documents")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    config = Run(arguments.run).config
    loaded = load(config.model, device=arguments.device, dtype=config.dtype)
    shots, examples = select(config, load_examples(config.dataset, columns=config.columns, data_dir=arguments.data_dir))
    limits = {"max_document_tokens": config.max_document_tokens, "max_tokens": config.max_tokens}
    prompter = Prompter(loaded.tokenizer, task_of(config.dataset), shots, positions=loaded.max_positions, **limits)
    for example in examples[: arguments.limit]:
        text = arrange(example.document, example.reference, config.condition, seed=config.seed, id=example.id)
        prompt = prompter.ask(text).prompt.ids
        ((full, _),) = write_together(
            loaded.model, [prompt], [[]], max_new_tokens=prompter.max_new_tokens, eos_ids=loaded.eos_ids
        )
        teacher = [*full.token_ids, *([loaded.eos_ids[0]] if full.ended else [])]
        print(json.dumps({"id": example.id, "prompt": list(prompt), "teacher": teacher}))


if __name__ == "__main__":
    main()

"""What should `auv-look` do by default? Its options beside each other, budget for budget, through the real cache.

    python benchmarks/tune_look.py --data-dir DIR --sets cnn_dailymail,beigebook,xsum5 --documents 24 \\
        --settings "look=0.25 draft=0;look=1 draft=0" --budgets 10%,4%,2% --bits 4

Quicker than `auvsum eval`: a prompt is read and looked at once, the full cache writes its greedy summary, and each
setting is then forced along it, as many tokens at a time as its write region takes. Nats a token lost, and agreement.
Bytes are counted as the engine counts them. Choose on the even documents (`--half even`), report on the odd ones.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import common
import torch

from auvsum.budget import parse_budget, resolve
from auvsum.cache.heads import HeadsCache, Look, Open, second_look
from auvsum.cache.policies.auv_look import AUVLook
from auvsum.engine.models import load
from auvsum.errors import AuvsumError
from auvsum.eval.config import EvalConfig
from auvsum.eval.datasets import load_examples
from auvsum.eval.runner import Runner

SETS = {
    "cnn_dailymail": {"dataset": "cnn_dailymail", "max_tokens": 80},
    "newsroom": {"dataset": "newsroom"},
    "xsum5": {"dataset": "xsum", "shots": 5, "max_tokens": 48},
    "beigebook": {"dataset": "beigebook", "max_document_tokens": 4000, "max_tokens": 80},
    "gao": {"dataset": "gao", "max_document_tokens": 4000, "max_tokens": 80},
}


def options(text: str) -> dict[str, Any]:
    """`look=0.25 draft=0 value_norm=false` -> options."""
    pairs = (part.split("=") for part in text.split())
    return {name: json.loads(value) for name, value in pairs}


class Teacher:
    """One prompt, read once, with the full cache's greedy summary and what all looks at it see."""

    def __init__(self, model: Any, policies: list[AUVLook], ids: list[int], span: tuple[int, int], most: int) -> None:
        self.ids, self.model, self.device = ids, model, next(model.parameters()).device
        cache = HeadsCache(model.config, policies[0], 64)
        cache.begin(len(ids))
        with cache.reading(0):
            logits = self.see(cache, ids, 0)[-1]
        self.open = [(layer.rows[0].key, layer.rows[0].value) for layer in cache.layers]
        self.looked: dict[tuple[float, int], Look | None] = {}
        for policy in policies:
            how = (policy.look, policy.lead)
            if how not in self.looked:
                plain = AUVLook(look=policy.look, lead=policy.lead, draft=0, power=policy.power, ask=policy.ask)
                cache.policy = plain
                self.looked[how] = second_look(model, cache, 0, ids, span, None)
        self.drafted: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        drafts = {policy.draft for policy in policies}
        self.summary, self.nats = [int(logits.argmax())], []
        with cache.looking(0, drafts=True) as seen:
            while len(self.summary) < most:
                logits = self.see(cache, self.summary[-1:], len(ids) + len(self.summary) - 1)[-1].float()
                if len(self.summary) in drafts:
                    found = ((layer.total / layer.queries, layer.moments / layer.queries) for layer in seen)
                    self.drafted[len(self.summary)] = tuple(map(torch.stack, zip(*found, strict=True)))
                self.summary.append(int(logits.argmax()))
                self.nats.append(float(logits.max() - logits.logsumexp(-1)))

    @torch.no_grad()
    def see(self, cache: HeadsCache, ids: list[int], start: int) -> torch.Tensor:
        out = self.model(
            torch.tensor([ids], device=self.device),
            position_ids=torch.arange(start, start + len(ids), device=self.device)[None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=min(len(ids), 64),
        )
        logits: torch.Tensor = out.logits[0]
        return logits

    def lost(self, policy: AUVLook, slots: int, bits: int, eos: frozenset[int]) -> tuple[float, float]:
        """Nats a token lost, and agreement, of one setting."""
        cache = HeadsCache(self.model.config, policy, slots, bits=bits)
        cache.begin(len(self.ids))
        for layer, (key, value) in zip(cache.layers, self.open, strict=True):
            layer.lazy_initialization(key, value)
            layer.rows[0] = Open(key, value)
            layer.keeps_unpacked = True
        look = self.looked[policy.look, policy.lead] or Look(None, None)
        drafted, moments = self.drafted.get(policy.draft, (None, None))
        moments = torch.stack([one for one in (look.moments, moments) if one is not None]).mean(0)
        cache.settle(0, Look(look.looked, drafted, look.asked if policy.ask else None, moments))
        length = next((i for i, token in enumerate(self.summary) if token in eos), len(self.summary) - 1)
        at, lost, agreed = 0, [], []
        while at < length:
            tokens = self.summary[at : at + min(cache.may_write(0), length - at)]
            with cache.reading(0):
                logits = self.see(cache, tokens, len(self.ids) + at).float()
            target = torch.tensor(self.summary[at + 1 : at + 1 + len(tokens)], device=self.device)
            chosen = logits.log_softmax(-1).gather(-1, target[:, None])[:, 0]
            lost += [full - float(own) for full, own in zip(self.nats[at:], chosen, strict=False)]
            agreed += (logits.argmax(-1) == target).float().tolist()
            at += len(tokens)
        return statistics.fmean(lost), statistics.fmean(agreed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--sets", default="cnn_dailymail,beigebook,xsum5")
    parser.add_argument("--documents", type=int, default=24)
    parser.add_argument("--half", choices=("even", "odd", "all"), default="even")
    parser.add_argument("--settings", default="", help="options of auv-look, settings separated by ';'")
    parser.add_argument("--budgets", default="10%,4%,2%")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=1e9, help="at most this long a set")
    parser.add_argument("--part", default="0/1", help="i/n takes every nth document, for processes side by side")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="JSON, rewritten after every document")
    args = parser.parse_args()
    loaded = load(args.model, device=args.device)
    loaded.model.set_attn_implementation("auvsum")
    settings = {text.strip(): AUVLook(**options(text)) for text in args.settings.split(";")}
    if len({policy.power for policy in settings.values()}) > 1:
        parser.error("settings of one run share one draft, and so one power")
    part, parts = map(int, args.part.split("/"))
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for name in args.sets.split(","):
        began = time.perf_counter()
        given = {"limit": args.documents, "half": args.half, "seed": 3, "model": args.model}
        config = EvalConfig(**{**given, **SETS[name]})
        runner = Runner(config, loaded, load_examples(config.dataset, data_dir=args.data_dir))
        rows = found.setdefault(name, {})
        for example in runner.examples[part::parts]:
            if time.perf_counter() - began > args.seconds:
                break
            prompt = runner.prompter.ask(example.document).prompt
            most = runner.prompter.max_new_tokens
            teacher = Teacher(loaded.model, list(settings.values()), list(prompt.ids), prompt.document, most)
            for text, policy in settings.items():
                for budget in args.budgets.split(","):
                    shape = loaded.shape
                    cost = policy.slot_cost(
                        kv_heads=shape.kv_heads, head_dim=shape.head_dim, element_bytes=shape.element_bytes,
                        bits=args.bits,
                    )  # fmt: skip
                    try:
                        slots = resolve(
                            parse_budget(budget), shape=shape, cost=cost, prompt_tokens=len(prompt.ids),
                            max_new_tokens=most, least_slots=policy.least_slots, slots_to_hold=policy.slots_to_hold,
                            paper_slots=policy.paper_slots, free_bytes=0,
                        ).slots  # fmt: skip
                        pair = teacher.lost(policy, slots, args.bits, loaded.eos_ids)
                    except (AuvsumError, statistics.StatisticsError):
                        continue
                    rows.setdefault(f"{budget} {text}", []).append(pair)
            if args.out:
                kept = {"model": loaded.name, "bits": args.bits, "half": args.half, "sets": found}
                args.out.write_text(json.dumps(kept))
    report(found)
    print(json.dumps(common.machine()))


def report(found: dict[str, dict[str, list[tuple[float, float]]]]) -> None:
    for name, rows in found.items():
        print(f"\n{name}: {max(map(len, rows.values()), default=0)} documents")
        for key, pairs in sorted(
            rows.items(), key=lambda item: (item[0].split()[0], statistics.fmean(p[0] for p in item[1]))
        ):
            nats, agreed = (statistics.fmean(column) for column in zip(*pairs, strict=True))
            print(f"  {key:60s} nats {nats:.3f}  agreement {agreed:.3f}  n {len(pairs)}")


if __name__ == "__main__":
    main()

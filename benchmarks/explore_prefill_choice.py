"""What should prefill keep? Scores, budgets and bits beside each other, with the choice frozen during decode.

    python benchmarks/explore_prefill_choice.py --data-dir DIR --sets cnndm,beigebook,xsum5 --documents 24

An exploration, quicker and rougher than `auvsum eval`: a prompt is read once with the full cache; its own greedy
summary is the teacher. Then, for each way to score tokens, each way to share the budget out and each number of
bits, one pass over the summary sees only the kept keys, and says how often the teacher's token still comes first
and how many nats it lost. Nothing is evicted while the summary is read: all loss is in what prefill kept.

Scores: h2o, AUV's aggregation, the instruction's queries, and the attention of queries behind the prompt: the text
once more (`again`, as in KVzip; `half` and `quarter` of it), its beginning (`lead64`), the summary's first tokens
(`draft16`), a draft by a cache that was cut already, and the whole summary (`oracle`: what cannot be known); each as
a sum, the highest (`max`), or a count (`usage`), and mixed. Budgets (`--sharing`): the same number for every layer;
one ranking over layers, the heads of a layer alike; one over layers and heads.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor
from transformers import AttentionInterface

from auvsum.engine.models import load
from auvsum.kernels.column_scores import attend_chunk
from auvsum.text.prompts import build_prompt

SETTINGS = ((0.30, "4-bit/64 rotated"), (0.12, "4-bit/64 rotated"), (0.06, "4-bit/64 rotated"))
CODECS = ("8-bit/64", "4-bit/32", "4-bit/64", "4-bit/32 rotated", "4-bit/64 rotated", "3-bit/32", "3-bit/32 rotated")
SHARING = ("layers alike", "over layers", "over heads")


class Probe:
    """The model with an attention of our own, and what it remembers of one prompt, layer by layer."""

    def __init__(self, name: str | None, device: str) -> None:
        self.loaded = load(name, device=device)
        self.model: Any = self.loaded.model
        config = self.model.config
        self.layers, self.heads, self.groups = (
            config.num_hidden_layers,
            config.num_attention_heads,
            config.num_key_value_heads,
        )
        self.device = self.loaded.device
        self.reads = True
        self.memory: list[dict[str, Any]] = []
        self.keep: list[Tensor] | None = None
        self.codec = "16"
        self.watch: Any = None
        #: While a draft is written: its keys and values so far, layer by layer.
        self.own: list[Any] | None = None
        AttentionInterface.register("probe", self._attention)

    def _attention(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: Any, scaling: float = 1.0, **_: Any
    ) -> tuple[Tensor, None]:
        at = self.memory[module.layer_idx]
        if self.reads:
            out, at["chunk"] = attend_chunk(query, key, value, scaling, 0)
            at.update(key=key[0], value=value[0], query=query[0], scaling=scaling)
            return out.transpose(1, 2), None
        tokens = query.shape[2]
        grouped = query[0].float().view(self.groups, -1, tokens, query.shape[-1])
        held, content = self._coded(at)
        logits = grouped @ held.float()[:, None].transpose(-1, -2) * scaling
        if self.keep is not None:
            logits = logits.masked_fill(~self.keep[module.layer_idx][:, None, None], -1e30)
        if self.own is not None:
            before = self.own[module.layer_idx]
            if before is not None:
                key, value = torch.cat([before[0], key], 2), torch.cat([before[1], value], 2)
            self.own[module.layer_idx] = (key, value)
        own = grouped @ key[0].float()[:, None].transpose(-1, -2) * scaling
        later = torch.ones(tokens, key.shape[2], dtype=torch.bool, device=self.device).tril(key.shape[2] - tokens)
        own = own.masked_fill(~later, -1e30)
        probabilities = torch.cat([logits, own], -1).softmax(-1)
        size = held.shape[1]
        if self.watch is not None:
            self.watch(module.layer_idx, probabilities[..., :size])
        mixed = (
            probabilities[..., :size] @ content.float()[:, None] + probabilities[..., size:] @ value[0].float()[:, None]
        )
        return mixed.reshape(1, self.heads, tokens, -1).transpose(1, 2).to(query.dtype), None

    def _coded(self, at: dict[str, Any]) -> tuple[Tensor, Tensor]:
        if self.codec not in at:
            at[self.codec] = tuple(coded(at[name], self.codec) for name in ("key", "value"))
        pair: tuple[Tensor, Tensor] = at[self.codec]
        return pair

    @torch.no_grad()
    def read(self, ids: list[int]) -> None:
        """The prompt, with the full cache."""
        self.model.set_attn_implementation("probe")
        self.memory, self.reads = [{} for _ in range(self.layers)], True
        self.model(torch.tensor([ids], device=self.device), use_cache=False, logits_to_keep=1)
        self.reads = False

    @torch.no_grad()
    def write(self, ids: list[int], most: int) -> list[int]:
        """The full cache's greedy summary."""
        self.model.set_attn_implementation("sdpa")
        prompt = torch.tensor([ids], device=self.device)
        out = self.model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=most, do_sample=False)
        self.model.set_attn_implementation("probe")
        written: list[int] = out[0, len(ids) :].tolist()
        return written

    @torch.no_grad()
    def after(self, ids: list[int], start: int) -> Tensor:
        """Logits of tokens behind the remembered prompt, fp32 `[T, V]`."""
        tokens = torch.tensor([ids], device=self.device)
        positions = torch.arange(start, start + len(ids), device=self.device)[None]
        logits: Tensor = self.model(tokens, position_ids=positions, use_cache=False).logits[0].float()
        return logits

    def loss(self, keep: list[Tensor] | None, codec: str, summary: list[int], start: int) -> tuple[float, Tensor]:
        """Agreement with the teacher, and nats of each of its tokens after the first."""
        self.keep, self.codec = keep, codec
        logits = self.after(summary[:-1], start)
        self.keep, self.codec = None, "16"
        target = torch.tensor(summary[1:], device=self.device)
        nats = -logits.log_softmax(-1).gather(-1, target[:, None])[:, 0]
        return float((logits.argmax(-1) == target).float().mean()), nats

    @torch.no_grad()
    def draft(self, keep: list[Tensor], codec: str, last: int, start: int, most: int) -> list[int]:
        """What a model that sees only the kept keys writes after the prompt, greedily."""
        self.keep, self.codec = keep, codec
        self.own = [None] * self.layers
        written, token = [], last
        for step in range(most):
            token = int(self.after([token], start + step)[-1].argmax())
            written.append(token)
        self.keep, self.codec, self.own = None, "16", None
        return written


def coded(x: Tensor, codec: str) -> Tensor:
    """What is left of keys or values `[G, n, D]` after `BITS-bit/GROUP [rotated]`: minimum, scale in fp16 a group."""
    if codec == "16":
        return x
    bits, group = (int(part) for part in codec.removesuffix(" rotated").replace("-bit", "").split("/"))
    size = x.shape[-1]
    turn = torch.eye(size, device=x.device)
    if codec.endswith("rotated"):
        turn = torch.ones(1, 1, device=x.device)
        while turn.shape[0] < size:
            turn = torch.cat([torch.cat([turn, turn], 1), torch.cat([turn, -turn], 1)], 0)
        turn = turn / size**0.5
    y = (x.float() @ turn).view(*x.shape[:-1], size // group, group)
    low = y.amin(-1, keepdim=True).half().float()
    scale = ((y.amax(-1, keepdim=True) - low) / (2**bits - 1)).half().float().clamp_min(1e-8)
    steps = ((y - low) / scale).round().clamp(0, 2**bits - 1)
    return ((steps * scale + low).view_as(x) @ turn.T).to(x.dtype)


def scores(
    probe: Probe, ids: list[int], document: tuple[int, int], summary: list[int], wanted: set[str]
) -> dict[str, list[Tensor]]:
    """Ways to score the prompt's tokens: for each, a list over layers of `[G, n]`; none wanted is all."""
    n = len(ids)
    count = torch.arange(n, 0, -1, device=probe.device).float()
    found: dict[str, list[Tensor]] = defaultdict(list)
    instruction = n - document[1]
    for at in probe.memory:
        chunk = at["chunk"]
        plain, scaled = chunk.column_sums(), chunk.column_sums(chunk.keys_seen / n)
        found["h2o (0, 0)"].append(plain)
        found["auv (1, 1)"].append(scaled / count)
        last = at["query"][:, -instruction:].float().view(probe.groups, -1, instruction, at["query"].shape[-1])
        logits = last @ at["key"].float()[:, None].transpose(-1, -2) * at["scaling"]
        later = (
            torch.arange(n, device=probe.device)[None] > torch.arange(n - instruction, n, device=probe.device)[:, None]
        )
        seen = logits.masked_fill(later, -1e30).softmax(-1)
        found["instruction"].append(seen.sum(2).mean(1) / instruction)
    text = ids[slice(*document)]
    ask = probe.loaded.tokenizer("\n\nRepeat the text above:\n", add_special_tokens=False).input_ids
    looks = {
        "again": ask + text,
        "reply": text,
        "half": ask + [t for i in range(0, len(text), 128) for t in text[i : i + 64]],
        "quarter": ask + [t for i in range(0, len(text), 128) for t in text[i : i + 32]],
        "lead64": text[:64],
        "lead128": text[:128],
        "draft16": summary[:16],
        "draft32": summary[:32],
        "oracle": summary,
    }
    for name, queries in looks.items():
        highest, total, usage = second_look(probe, queries, n)
        found[f"{name} max"], found[f"{name}"], found[f"{name} usage"] = highest, total, usage
    norms = [at["value"].float().norm(dim=-1) for at in probe.memory]
    found["again x value norm"] = [a * v for a, v in zip(found["again"], norms, strict=True)]
    found["again usage+sum"] = mixed(found["again usage"], found["again"], 0.5)
    for base in ("again", "instruction", "lead128"):
        for share in (0.12, 0.06):
            keep = choose(found[base], share, "over heads", document, True)
            own = summary[:1] + probe.draft(keep, "4-bit/64 rotated", summary[0], n, 64)
            total = second_look(probe, own, n)[1]
            found[f"own draft ({base} {share:.0%})"] = total
            found[f"again + own draft ({base} {share:.0%})"] = mixed(found["again"], total, 0.5)
    for other in ("instruction", "lead64", "lead128", "draft16", "draft32"):
        for weight in (0.25, 0.5, 0.75):
            found[f"again + {weight} {other}"] = mixed(found["again"], found[other], weight)
    return {name: rows for name, rows in found.items() if not wanted or name in wanted}


def mixed(one: list[Tensor], other: list[Tensor], weight: float) -> list[Tensor]:
    """Two scores, each with the same mass in all, the second with this weight of the whole."""
    masses = [sum(float(x.sum()) for x in score) for score in (one, other)]
    return [a / masses[0] * (1 - weight) + b / masses[1] * weight for a, b in zip(one, other, strict=True)]


def second_look(probe: Probe, queries: list[int], n: int, chunk: int = 1024) -> tuple[list[Tensor], ...]:
    """Highest attention, and the sum, that more tokens behind the prompt pay to its keys; and how many of them have
    a key among their n / 16 most attended (any query head of the group)."""
    highest, total, usage = (
        [torch.zeros(probe.groups, n, device=probe.device) for _ in range(probe.layers)] for _ in range(3)
    )

    def watch(layer: int, probabilities: Tensor) -> None:
        highest[layer] = torch.maximum(highest[layer], probabilities.amax((1, 2)))
        total[layer] += probabilities.mean(1).sum(1)
        mean = probabilities.mean(1)
        least = mean.topk(max(1, n // 16), -1).values[..., -1:]
        usage[layer] += (mean >= least).sum(1)

    probe.watch = watch
    for start in range(0, len(queries), chunk):
        probe.after(queries[start : start + chunk], n)
    probe.watch = None
    return highest, total, usage


def choose(ranking: list[Tensor], share: float, sharing: str, document: tuple[int, int], protect: bool) -> list[Tensor]:
    """Which tokens stay: bool `[G, n]` a layer; a small local area always, and the frame when it leaves room."""
    groups, n = ranking[0].shape
    budget, local = max(1, int(share * n)), max(8, int(share * n / 8))
    must = torch.zeros(n, dtype=torch.bool, device=ranking[0].device)
    must[n - local :] = True
    frame = torch.ones_like(must)
    frame[slice(*document)] = False
    if protect and int(frame.sum()) <= share * n * 0.7:
        must |= frame
    stack = torch.stack([score.masked_fill(must, torch.inf) for score in ranking])
    layers = len(ranking)
    if sharing == "layers alike":
        return list(torch.zeros_like(stack, dtype=torch.bool).scatter(-1, stack.topk(budget, -1).indices, True))
    flat = stack.flatten()
    best = flat.topk(budget * layers * groups)
    if sharing == "over heads":
        return list(torch.zeros_like(flat, dtype=torch.bool).scatter(0, best.indices, True).view_as(stack))
    counts = (stack >= best.values[-1]).float().sum((1, 2)) / groups
    counts = counts.clamp_min(max(int(must.sum()), budget // 10))
    counts = (counts * (budget * layers / counts.sum())).floor().long().clamp(1, n)
    return [
        torch.zeros_like(layer, dtype=torch.bool).scatter(-1, layer.topk(int(count), -1).indices, True)
        for layer, count in zip(stack, counts, strict=True)
    ]


def documents(
    probe: Probe, name: str, data: Path, number: int, longest: int
) -> list[tuple[list[int], tuple[int, int]]]:
    """Prompts as token ids, each with the span of its document; `xsum5` has five examples before it."""
    tokenizer: Any = probe.loaded.tokenizer
    few = name == "xsum5"
    lines = (data / f"{'xsum' if few else name}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    random.Random(1 if few else 0).shuffle(rows)
    found = []
    for i, row in enumerate(rows[:number]):
        if few:
            ask = "\n\nSummarize the above article in 1 sentence.\n"
            shots = rows[400 + i * 5 % 95 :][:5]
            texts = [f"###\nArticle: {' '.join(s['document'].split()[:150])}{ask}{s['summary']}\n\n" for s in shots]
            head, body, tail = (
                tokenizer(text, add_special_tokens=False).input_ids
                for text in ("".join(texts) + "###\nArticle: ", row["document"], ask)
            )
            body = body[:600]
            found.append((head + body + tail, (len(head), len(head) + len(body))))
            continue
        prompt = build_prompt(tokenizer, row["document"], sentences=3)
        start, end = prompt.document
        ids = list(prompt.ids[: min(end, start + longest)] + prompt.ids[end:])
        found.append((ids, (start, min(end, start + longest))))
    return found


def explore(
    probe: Probe,
    name: str,
    prompts: list[tuple[list[int], tuple[int, int]]],
    seconds: float,
    wanted: set[str],
    sharings: list[str],
) -> dict[str, list[tuple[float, float]]]:
    """Agreement and nats lost of every setting on each document, as many as the time allows."""
    results: dict[str, list[tuple[float, float]]] = defaultdict(list)
    began = time.perf_counter()
    for ids, document in prompts:
        if time.perf_counter() - began > seconds:
            break
        n = len(ids)
        probe.read(ids)
        summary = probe.write(ids, 40 if name == "xsum5" else 80)
        if len(summary) < 8:
            continue
        _, reference = probe.loss(None, "16", summary, n)

        def note(key: str, keep: list[Tensor] | None, codec: str) -> None:
            agreement, nats = probe.loss(keep, codec, summary, n)  # noqa: B023
            results[key].append((agreement, float((nats - reference).mean())))  # noqa: B023

        for score, ranking in scores(probe, ids, document, summary, wanted).items():
            for share, codec in SETTINGS:
                for sharing in sharings:
                    keep = choose(ranking, share, sharing, document, name != "xsum5")
                    note(f"{share:.0%} of tokens, {codec} | {score} | {sharing}", keep, codec)
        for codec in CODECS:
            note(f"100% of tokens, {codec} | full | -", None, codec)
    return results


def report(sets: dict[str, dict[str, list[tuple[float, float]]]]) -> list[dict[str, Any]]:
    """Prints the means, best first, and returns them."""
    found = []
    for name, results in sets.items():
        documents = max(map(len, results.values()), default=0)
        print(f"\n{name}: {documents} documents")
        rows, groups = {}, defaultdict(list)
        for key, pairs in results.items():
            agreement, nats = (statistics.fmean(column) for column in zip(*pairs, strict=True))
            rows[key] = {"agreement": round(agreement, 4), "nats_lost": round(nats, 4)}
            groups[key.split(" | ")[0]].append((nats, agreement, key))
        for setting, lines in groups.items():
            print(f"  {setting}")
            for nats, agreement, key in sorted(lines)[:20]:
                print(f"    {' | '.join(key.split(' | ')[1:]):45s} agreement {agreement:.3f}  nats lost {nats:.3f}")
        found.append({"set": name, "documents": documents, "rows": rows})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="folder with cnndm.jsonl, beigebook.jsonl, xsum.jsonl")
    parser.add_argument("--sets", default="cnndm,beigebook,xsum5")
    parser.add_argument("--documents", type=int, default=24)
    parser.add_argument("--longest", type=int, default=4000, help="document tokens read")
    parser.add_argument("--seconds", type=float, default=600, help="at most this long a set")
    parser.add_argument("--scores", default="", help="only these, separated by ';'")
    parser.add_argument(
        "--part", default="0/1", help="of the documents: i/n takes every nth, for processes side by side"
    )
    parser.add_argument("--sharing", nargs="+", choices=SHARING, default=["over heads"])
    parser.add_argument("--raw", type=Path, help="where a part writes what it found of each document")
    parser.add_argument("--merge", type=Path, nargs="+", help="report what parts have written")
    parser.add_argument("--model")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    sets: dict[str, dict[str, list[tuple[float, float]]]] = {}
    model = ""
    if args.merge:
        for path in args.merge:
            part = json.loads(path.read_text())
            model = part["model"]
            for name, results in part["sets"].items():
                for key, pairs in results.items():
                    sets.setdefault(name, {}).setdefault(key, []).extend(pairs)
    else:
        probe = Probe(args.model, args.device)
        model = probe.loaded.name
        index, parts = map(int, args.part.split("/"))
        wanted = set(filter(None, args.scores.split(";")))
        for name in args.sets.split(","):
            prompts = documents(probe, name, args.data_dir, args.documents, args.longest)[index::parts]
            sets[name] = explore(probe, name, prompts, args.seconds, wanted, args.sharing)
    if args.raw:
        args.raw.write_text(json.dumps({"model": model, "sets": sets}))
        return
    print(json.dumps({"machine": common.machine(), "model": model, "sets": report(sets)}))


if __name__ == "__main__":
    main()

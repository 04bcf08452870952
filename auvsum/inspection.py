"""Which document tokens a policy kept at the end of the prompt: the computation behind `auvsum inspect`."""

from __future__ import annotations

import html
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from auvsum.budget import ResolvedBudget
from auvsum.cache.heads import HeadsCache, second_look
from auvsum.config import Settings
from auvsum.engine.generate import AnyCache, make_cache
from auvsum.engine.models import LoadedModel
from auvsum.errors import UsageError
from auvsum.summarize import Plan, Summarizer

_BLOCKS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Kept:
    """What one policy kept of a document.

    Attributes:
        share: for each document token, the share of the heads looked at that hold it.
        heads: (layer, KV head) -> the document tokens it holds, counted from the document's start.
    """

    policy: str
    budget: ResolvedBudget
    pieces: tuple[str, ...]
    share: tuple[float, ...]
    heads: dict[tuple[int, int], tuple[int, ...]]

    @property
    def tenths(self) -> list[float]:
        """The kept share of each tenth of the document; together they tell a prior about position."""
        return bins(self.share, 10)

    def record(self, positions: bool) -> dict[str, Any]:
        """For `--format json`; with `positions`, also what each head holds."""
        heads = [{"layer": layer, "head": head, "tokens": list(held)} for (layer, head), held in self.heads.items()]
        return {
            "policy": self.policy,
            "budget": {"asked": self.budget.asked, "slots": self.budget.slots},
            "document_tokens": len(self.share),
            "kept": round(sum(self.share) / max(1, len(self.share)), 4),
            "tenths": [round(value, 4) for value in self.tenths],
            "share": [round(value, 4) for value in self.share],
            **({"heads": heads} if positions else {}),
        }


def inspect(
    loaded: LoadedModel,
    settings: Settings,
    text: str,
    policies: Sequence[str],
    layer: int | None = None,
    head: int | None = None,
) -> list[Kept]:
    """Reads the same prompt once with each policy.

    Args:
        settings: their policy options hold for the policy that they name.
        layer, head: look at one layer, or one KV head, instead of all that have no sliding window.

    Raises:
        UsageError: a policy, a budget, a layer or a head that is not to be had.
    """
    found = []
    for name in policies:
        options = settings.policy_options if name == settings.policy else {}
        plan = Summarizer(loaded, replace(settings, policy=name, policy_options=options)).plan(text)
        cache = _read(loaded, settings, plan)
        found.append(_kept(loaded, plan, cache, layer, head))
    return found


@torch.no_grad()
def _read(loaded: LoadedModel, settings: Settings, plan: Plan) -> AnyCache:
    """The prompt, as the engine reads it."""
    model, ids = loaded.model, torch.tensor([plan.prompt.ids], device=loaded.device)
    model.set_attn_implementation("auvsum")
    cache = make_cache(model.config, plan.policy, plan.budget.slots, 1, plan.bits)
    cache.begin(ids.shape[1])
    start = 0
    for part in torch.split(ids, settings.chunk if plan.strategy == "stream" else ids.shape[1], dim=1):
        positions = torch.arange(start, start + part.shape[1], device=loaded.device)[None]
        with cache.reading(0):
            out = model(part, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
        start += part.shape[1]
    if isinstance(cache, HeadsCache):
        first = int(out.logits[0, -1].argmax())
        cache.settle(0, second_look(model, cache, 0, plan.prompt.ids, plan.prompt.document, first))
    return cache


def _kept(loaded: LoadedModel, plan: Plan, cache: AnyCache, layer: int | None, head: int | None) -> Kept:
    first, end = plan.prompt.document
    layers = [index for index, one in enumerate(cache.layers) if one.window is None]
    groups = range(loaded.shape.kv_heads)
    if layer is not None and layer not in layers:
        raise UsageError(f"layer {layer} cannot be shown", f"layers with full attention are {_range(layers)}")
    if head is not None and head not in groups:
        raise UsageError(f"KV head {head} cannot be shown", f"KV heads are 0 to {len(groups) - 1}")
    heads = {
        (l, h): tuple(position - first for position in cache.layers[l].held_positions(0, h) if first <= position < end)
        for l in (layers if layer is None else [layer])  # noqa: E741
        for h in (groups if head is None else [head])
    }
    counts = [0] * (end - first)
    for held in heads.values():
        for position in held:
            counts[position] += 1
    ids = plan.prompt.ids[first:end]
    pieces = tuple(loaded.tokenizer.decode([token]) for token in ids)
    share = tuple(count / max(1, len(heads)) for count in counts)
    return Kept(plan.policy.name, plan.budget, pieces, share, heads)


def _range(numbers: Sequence[int]) -> str:
    return f"0 to {numbers[-1]}" if list(numbers) == list(range(len(numbers))) else ", ".join(map(str, numbers))


def bins(values: Sequence[float], count: int) -> list[float]:
    """Means of `count` equal stretches; a short document has empty ones, which are 0."""
    edges = [len(values) * i // count for i in range(count + 1)]
    return [sum(values[a:b]) / (b - a) if b > a else 0.0 for a, b in itertools.pairwise(edges)]


def strip(share: Sequence[float], width: int, top: float) -> str:
    """The document from left to right; a full block stands for the share `top`."""
    levels = (min(8, -(-8 * value // top)) if value > 0 else 0 for value in bins(share, width))
    return "".join(_BLOCKS[int(level)] for level in levels)


def text_report(found: Sequence[Kept], width: int) -> str:
    """Heat strips and tenths of all policies, on one scale."""
    width = max(10, min(width, max((len(kept.share) for kept in found), default=10)))
    top = max((max(bins(kept.share, width), default=0.0) for kept in found), default=0.0) or 1.0
    lines = []
    for kept in found:
        lines += [
            f"{kept.policy}: {kept.budget.echo()}",
            f"  |{strip(kept.share, width, top)}|",
            "  kept by tenth: " + " ".join(f"{100 * value:.0f}%" for value in kept.tenths),
        ]
    lines.append(f"a full block: {100 * top:.0f}% of the heads hold that stretch; left is the document's start")
    return "\n".join(lines) + "\n"


def html_report(found: Sequence[Kept], title: str) -> str:
    """One self-contained page: the document's own text, darker where more heads hold it, once for each policy."""
    parts = []
    for kept in found:
        words = "".join(
            f'<span style="background:rgba(214,90,20,{value:.2f})" title="{value:.0%}">{html.escape(piece)}</span>'
            for piece, value in zip(kept.pieces, kept.share, strict=True)
        )
        tenths = "".join(f"<td>{value:.0%}</td>" for value in kept.tenths)
        parts.append(
            f"<h2>{html.escape(kept.policy)}</h2><p>{html.escape(kept.budget.echo())}</p>"
            f"<table><tr><th>kept by tenth</th>{tenths}</tr></table><div>{words}</div>"
        )
    style = "body{font:15px/1.6 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}div{white-space:pre-wrap}"
    style += "td,th{padding:0 .5em;text-align:right}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{style}</style><h1>{html.escape(title)}</h1>{''.join(parts)}</html>\n"
    )

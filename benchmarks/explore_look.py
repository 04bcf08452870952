"""What should a prompt's cache keep, and in how many bits? Ideas beside each other, with the choice frozen.

    python benchmarks/explore_look.py --data-dir DIR --sets cnn_dailymail,beigebook,gao,xsum5 --documents 24

Rougher and much quicker than `auvsum eval`: a prompt is read once with the full cache, whose greedy summary is the
teacher. Each setting is then one pass over the summary that sees only the kept keys, as they come back from their bits:
many settings are rows of one batch. Nats a token lost to the full cache, over all tokens and over those after the
draft. Written tokens are exact and cost nothing here, so what is measured is what prefill keeps.

Bytes are counted: a share of the prompt's 16-bit cache, less the write region and whatever the setting keeps a head.
Tune on the even rows of a file (`--half even`); the odd ones are for the report.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor
from transformers import AttentionInterface

from auvsum.cache.head_profiles import find_profile
from auvsum.engine.models import load
from auvsum.eval.calibrate import LEFT_OUT, Calibration, Lesson
from auvsum.eval.config import EvalConfig
from auvsum.eval.datasets import load_examples
from auvsum.eval.runner import Runner
from auvsum.kernels.column_scores import attend_chunk

SETS = {
    "cnn_dailymail": {"dataset": "cnn_dailymail", "max_tokens": 80},
    "beigebook": {"dataset": "beigebook", "max_document_tokens": 4000, "max_tokens": 80},
    "gao": {"dataset": "gao", "max_document_tokens": 4000, "max_tokens": 80},
    "xsum5": {"dataset": "xsum", "shots": 5, "max_tokens": 48},
    "newsroom": {"dataset": "newsroom", "max_tokens": 64},
    "govreport": {"dataset": "govreport", "max_document_tokens": 4000, "max_tokens": 80},
    "plos": {"dataset": "plos", "max_document_tokens": 4000, "max_tokens": 80},
}
BUDGETS = (0.10, 0.04, 0.02)
ELEMENT = 2
#: Written tokens that are there in any case.
_WRITE = 4


@dataclass
class Document:
    """A prompt, its teacher, and what the full cache holds of it, `[L, G, n, D]`."""

    ids: list[int]
    span: tuple[int, int]
    summary: list[int]
    scored: int
    key: Tensor
    value: Tensor
    #: Scores of the prompt's tokens, `[L, G, n]`.
    scores: dict[str, Tensor] = field(default_factory=dict)
    #: Root mean squares of what later tokens of the summary pay to each of its tokens, `[L, G, T - 1]`.
    own: Tensor | None = None
    #: Keys and values of the summary's tokens but the last, `[L, G, T - 1, D]`.
    pair: tuple[Tensor, Tensor] | None = None
    #: Nats of the summary's tokens with the full cache, fp32 `[T]`.
    nats: Tensor | None = None


@dataclass(frozen=True)
class Coding:
    """How slots are kept.

    Attributes:
        keys, values: bits. kind: `ends` (least value and step of a group), `gauss` (one scale, the levels that are best
            for a normal distribution).
        state: bytes of a slot beside its key and value. sink: the first token is kept exact.
    """

    keys: float = 4
    values: float = 4
    kind: str = "ends"
    state: int = 8
    sink: bool = False

    def slot_bytes(self, size: int) -> float:
        scale = {"ends": 4, "gauss": 2}[self.kind]
        return sum(size * bits / 8 + (scale if bits < 16 else 0) for bits in (self.keys, self.values)) + self.state

    def fixed_bytes(self, size: int) -> int:
        return 2 * size * ELEMENT if self.sink else 0


@dataclass
class Setting:
    """One row of the batch: who stays `[L, G, n]` (or the logarithms of soft gates); keys and values `[L, G, n, D]` as
    they come back from their bits."""

    name: str
    keep: Tensor | None
    pair: tuple[Tensor, Tensor] | None = None
    #: Which written tokens stay once they are older than `_WRITE`, `[L, G, T]`, as `keep`; None for all.
    own: Tensor | None = None
    #: Written tokens are in few bits as soon as they are written.
    coarse: Coding | None = None
    #: Or once they are older than `_WRITE`: what their bits take from their keys and values, `[L, G, T, D]`.
    errors: tuple[Tensor, Tensor] | None = None


class Probe:
    """The model with an attention of our own; what it does depends on what is asked at the moment."""

    def __init__(self, name: str | None, device: str) -> None:
        self.loaded = load(name, device=device)
        self.model: Any = self.loaded.model
        config = self.model.config
        self.layers, self.heads = config.num_hidden_layers, config.num_attention_heads
        self.groups, self.device = config.num_key_value_heads, self.loaded.device
        self.size = config.hidden_size // self.heads
        self.attend: Callable[..., Tensor] = self._read
        AttentionInterface.register("probe", self._attention)

    def _attention(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: Any, scaling: float = 1.0, **_: Any
    ) -> tuple[Tensor, None]:
        return self.attend(module.layer_idx, query, key, value, scaling).transpose(1, 2), None

    def call(self, ids: Tensor, start: int) -> Tensor:
        """Logits of tokens `[B, T]` behind a prompt of `start` tokens."""
        self.model.set_attn_implementation("probe")
        positions = torch.arange(start, start + ids.shape[1], device=self.device)[None].expand(ids.shape[0], -1)
        logits: Tensor = self.model(ids, position_ids=positions, use_cache=False).logits
        return logits

    # -- reading ------------------------------------------------------------------------------------------------------

    def _read(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        out, attention = attend_chunk(query, key, value, scaling, 0)
        square = attention.last_rows(self.tail).square().mean(1).sqrt()
        self.found.append((key[0], value[0], square))
        return out

    @torch.no_grad()
    def read(self, ids: list[int], span: tuple[int, int], summary: list[int], scored: int) -> Document:
        self.found: list[Any] = []
        self.attend, self.tail = self._read, max(1, len(ids) - span[1])
        positions = torch.arange(len(ids), device=self.device)[None]
        self.model.set_attn_implementation("probe")
        self.model(torch.tensor([ids], device=self.device), position_ids=positions, use_cache=False, logits_to_keep=1)
        key, value, square = (torch.stack(column) for column in zip(*self.found, strict=True))
        document = Document(ids, span, summary, scored, key, value)
        document.scores["instruction^2"] = square
        return document

    @torch.no_grad()
    def teach(self, prompts: list[list[int]], most: int) -> list[list[int]]:
        """Greedy summaries of the full cache, several prompts a batch, padded on the left."""
        self.model.set_attn_implementation("sdpa")
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        out = self.model.generate(ids, attention_mask=mask, max_new_tokens=most, do_sample=False, pad_token_id=0)
        written: list[list[int]] = out[:, longest:].tolist()
        found = []
        for row in written:
            end = next((i for i, token in enumerate(row) if token in self.loaded.eos_ids), len(row) - 1)
            found.append(row[: end + 1])
        return found

    # -- looking ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def look(self, document: Document, chunks: list[list[int]], name: str) -> None:
        """Scores of the attention that tokens behind the prompt pay to it; each chunk begins where the prompt ends.

        Kept are root mean squares (`NAME^2`).
        """
        totals: dict[str, list[Tensor]] = defaultdict(lambda: [0] * self.layers)  # type: ignore[list-item]
        count = sum(map(len, chunks))
        own: dict[int, Tensor] = {}
        pairs: list[tuple[Tensor, Tensor]] = []

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
            probabilities, values = self._full(document, layer, query, key, value, scaling)
            out = probabilities.to(values.dtype) @ values[:, None]  # [G, r, T, D]
            mixed = out.reshape(1, self.heads, query.shape[2], -1).to(query.dtype)
            a = probabilities[..., : document.key.shape[2]]
            totals[name + "^2"][layer] += a.square().mean(1).sum(1) / count
            if name == "written":
                pairs.append((key[0], value[0]))
                paid = probabilities[..., document.key.shape[2] :].square().mean(1).tril(-_WRITE)  # [G, T, T]
                queries = torch.arange(paid.shape[-1], 0, -1, device=paid.device).sub(_WRITE).clamp_min(1)
                own[layer] = (paid.sum(1) / queries).sqrt()
            return mixed

        self.attend = attend
        for chunk in chunks:
            self.call(torch.tensor([chunk], device=self.device), len(document.ids))
        if own:
            document.own = torch.stack(list(own.values()))
            document.pair = tuple(map(torch.stack, zip(*pairs, strict=True)))  # type: ignore[assignment]
        for key, rows in totals.items():
            document.scores[key] = torch.stack(rows).sqrt()

    def _full(
        self, document: Document, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> tuple[Tensor, Tensor]:
        """Probabilities `[G, r, T, n + T]` of one row that sees all of the prompt, and the values."""
        tokens = query.shape[2]
        keys = torch.cat([document.key[layer], key[0]], 1)
        values = torch.cat([document.value[layer], value[0]], 1)
        grouped = query[0].reshape(self.groups, -1, tokens, query.shape[-1])
        logits = (grouped @ keys[:, None].transpose(-1, -2)).float().mul_(scaling)
        later = torch.ones(tokens, tokens, dtype=torch.bool, device=self.device).triu_(1)
        logits[..., -tokens:].masked_fill_(later, -torch.inf)
        return logits.softmax(-1), values

    # -- judging ------------------------------------------------------------------------------------------------------

    def judge(self, document: Document, settings: list[Setting]) -> Tensor:
        """Nats of the summary's tokens after the first: fp32 `[B, T - 1]`."""
        rows, n = len(settings), len(document.ids)
        pairs = [s.pair or (document.key, document.value) for s in settings]
        if all(pair[0] is pairs[0][0] for pair in pairs):
            keys, values = pairs[0][0][:, None], pairs[0][1][:, None]
        else:
            keys, values = (torch.stack(part, 1) for part in zip(*pairs, strict=True))
        keep = None if settings[0].keep is None else torch.stack([s.keep for s in settings], 1)  # type: ignore[misc]
        own_keep = None
        if settings[0].own is not None:
            own_keep = torch.stack([s.own for s in settings], 1)  # type: ignore[misc]
        coarse, errors = settings[0].coarse, None
        if settings[0].errors is not None:
            errors = [torch.stack(part, 1) for part in zip(*(s.errors for s in settings), strict=True)]  # type: ignore[misc]

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
            tokens = query.shape[2]
            grouped = query.reshape(rows, self.groups, -1, query.shape[-1])
            parts = [(grouped @ keys[layer].transpose(-1, -2)).float().mul_(scaling)]
            if keep is not None and keep.dtype == torch.bool:
                parts[0].masked_fill_(~keep[layer][:, :, None], -torch.inf)
            elif keep is not None:
                parts[0] = parts[0] + keep[layer][:, :, None]
            if coarse is not None:
                key, value = (coded(x, bits, coarse) for x, bits in ((key, coarse.keys), (value, coarse.values)))
            own = (grouped @ key.transpose(-1, -2)).float().mul_(scaling)
            own = own.view(rows, self.groups, -1, tokens, tokens)
            ones = torch.ones(tokens, tokens, dtype=torch.bool, device=self.device)
            if errors is not None:
                old_key, old_value = (x + error[layer] for x, error in zip((key, value), errors, strict=True))
                old = (grouped @ old_key.transpose(-1, -2)).float().mul_(scaling).view_as(own)
                own = torch.where(ones.tril(-_WRITE), old, own)
            if own_keep is not None and own_keep.dtype == torch.bool:
                own.masked_fill_(~own_keep[layer][:, :, None, None] & ones.tril(-_WRITE), -torch.inf)
            elif own_keep is not None:
                own = own + own_keep[layer][:, :, None, None] * ones.tril(-_WRITE)
            own = own.masked_fill(ones.triu(1), -torch.inf).view(rows, self.groups, -1, tokens)
            probabilities = torch.cat([*parts, own], -1).softmax(-1).to(value.dtype)
            if errors is None:
                mixed = probabilities[..., -tokens:] @ value
            else:
                paid = probabilities[..., -tokens:].reshape(rows, self.groups, -1, tokens, tokens)
                distant = ones.tril(-_WRITE)
                mixed = (paid * distant).flatten(2, 3) @ old_value + (paid * ~distant).flatten(2, 3) @ value
            out = probabilities[..., :n] @ values[layer] + mixed
            return out.view(rows, self.heads, tokens, -1)

        self.attend = attend
        summary = torch.tensor([document.summary], device=self.device)
        logits = self.call(summary[:, :-1].expand(rows, -1), n).float()
        return logits.logsumexp(-1) - logits.gather(-1, summary[:, 1:, None].expand(rows, -1, 1))[..., 0]


# -- bits --------------------------------------------------------------------------------------------------------------


def hadamard(size: int, device: torch.device) -> Tensor:
    turn = torch.ones(1, 1, device=device)
    while turn.shape[0] < size:
        turn = torch.cat([torch.cat([turn, turn], 1), torch.cat([turn, -turn], 1)], 0)
    return turn / size**0.5


def gauss_levels(bits: int) -> Tensor:
    """Lloyd and Max's levels for a standard normal distribution."""
    x = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000)
    levels = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits)
    for _ in range(120):
        nearest = torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)
        levels = torch.zeros_like(levels).index_add_(0, nearest, x) / torch.bincount(nearest, minlength=2**bits)
    return levels.float()


LEVELS: dict[int, Tensor] = {}


def quantized(y: Tensor, bits: int, kind: str) -> Tensor:
    """What is left of rotated vectors `[.., D]`."""
    if kind == "ends":
        low = y.amin(-1, keepdim=True).half().float()
        step = ((y.amax(-1, keepdim=True) - low) / (2**bits - 1)).half().float().clamp_min(1e-8)
        return ((y - low) / step).round().clamp(0, 2**bits - 1) * step + low
    levels = LEVELS.setdefault(bits, gauss_levels(bits)).to(y.device)
    scale = y.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-8)
    found = levels[torch.bucketize(y / scale, (levels[1:] + levels[:-1]) / 2)]
    # The scale that is best for the codes that were chosen.
    return found * ((found * y).sum(-1, keepdim=True) / found.square().sum(-1, keepdim=True)).half().float()


def coded(x: Tensor, bits: float, coding: Coding) -> Tensor:
    """What is left of keys or values `[L, G, n, D]`."""
    if bits >= 16:
        return x
    y = x.float()
    turn = hadamard(x.shape[-1], x.device)
    found = quantized(y @ turn, int(bits), coding.kind) @ turn.T
    if coding.sink:
        found[:, :, 0] = y[:, :, 0]
    return found.to(x.dtype)


def fed_back(y: Tensor, bits: int, kind: str, metric: Tensor) -> Tensor:
    """Rotated vectors `[L, G, n, D]`, channel after channel: each makes up for the errors of those before it, as far as
    the metric `[L, G, D, D]` says that they matter together (Chee et al. 2023, QuIP's LDLQ)."""
    size = y.shape[-1]
    metric = metric.double()
    metric = metric + 0.02 * metric.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] * torch.eye(
        size, device=y.device, dtype=torch.float64
    )
    upper = torch.linalg.cholesky(metric.flip(-1, -2)).flip(-1, -2)
    upper = (upper / upper.diagonal(dim1=-2, dim2=-1)[..., None, :]).float()
    if kind == "ends":
        low = y.amin(-1, keepdim=True).half().float()
        step = ((y.amax(-1, keepdim=True) - low) / (2**bits - 1)).half().float().clamp_min(1e-8)
    else:
        levels = LEVELS.setdefault(bits, gauss_levels(bits)).to(y.device)
        edges = (levels[1:] + levels[:-1]) / 2
        scale = y.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-8)
    found, error = torch.empty_like(y), torch.zeros_like(y)
    for k in range(size):
        wanted = y[..., k] - (error[..., :k] * upper[..., None, :k, k]).sum(-1)
        if kind == "ends":
            codes = ((wanted - low[..., 0]) / step[..., 0]).round().clamp(0, 2**bits - 1)
            found[..., k] = codes * step[..., 0] + low[..., 0]
        else:
            found[..., k] = levels[torch.bucketize(wanted / scale[..., 0], edges)] * scale[..., 0]
        error[..., k] = found[..., k] - y[..., k]
    if kind == "ends":
        return found
    # The scale that is best for the codes that were chosen.
    turned = found @ metric.float()
    return found * ((turned * y).sum(-1, keepdim=True) / (turned * found).sum(-1, keepdim=True)).half().float()


def aware_coded(x: Tensor, bits: int, kind: str, metric: Tensor | None) -> Tensor:
    """What is left of keys or values `[.., n, D]`; `metric` `[.., D, D]` is of rotated vectors."""
    turn = hadamard(x.shape[-1], x.device)
    y = x.float() @ turn
    return ((quantized(y, bits, kind) if metric is None else fed_back(y, bits, kind, metric)) @ turn.T).to(x.dtype)


# -- choosing ----------------------------------------------------------------------------------------------------------


def slots(document: Document, share: float, coding: Coding, *, write: float | None = None, extra: float = 0) -> float:
    """Slots a head for a share of the bytes, `extra` of which are spent otherwise. `write`: None for today's rule."""
    size, n = document.key.shape[-1], len(document.ids)
    full, slot = 2 * size * ELEMENT, coding.slot_bytes(document.key.shape[-1])
    total = share * n * full
    if write is None:
        write = max(4, min(32, int(total / slot) // 32))
    return max(1.0, (total - write * (full + coding.state) - coding.fixed_bytes(size) - extra) / slot)


def choose(ranking: Tensor, number: float) -> Tensor:
    """One ranking over layers and heads: bool `[L, G, n]`, the first token always."""
    ranking = ranking.clone()
    ranking[..., 0] = torch.inf
    count = min(ranking.numel(), int(max(1.0, number) * ranking.shape[0] * ranking.shape[1]))
    best = ranking.flatten().topk(count).indices
    keep = torch.zeros(ranking.numel(), dtype=torch.bool, device=ranking.device)
    return keep.index_fill_(0, best, True).view_as(ranking)


def blend(one: Tensor, other: Tensor, weight: float) -> Tensor:
    """Two scores, each with the same mass in all; the second has this weight."""
    return one / one.sum() * (1 - weight) + other / other.sum() * weight


# -- experiments -------------------------------------------------------------------------------------------------------


class Book:
    """Nats lost, by set, budget and setting."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))

    def note(self, name: str, document: Document, settings: list[Setting], nats: Tensor) -> None:
        assert document.nats is not None
        lost = (nats - document.nats)[:, : document.scored]
        for setting, row in zip(settings, lost.tolist(), strict=True):
            after = row[32:] if len(row) > 40 else row[16:]
            self.rows[name][setting.name].append((statistics.fmean(row), statistics.fmean(after or row)))

    def report(self, only: str = "") -> None:
        keys = list(dict.fromkeys(key for rows in self.rows.values() for key in rows if key.startswith(only)))
        names = list(self.rows)
        print(f"{'':60s}" + "".join(f"{name[:12]:>16s}" for name in names) + "      mean")
        order = sorted(
            keys, key=lambda k: (k.split(" | ")[0], statistics.fmean([self._mean(name, k)[0] for name in names]))
        )
        for key in order:
            means = [self._mean(name, key) for name in names]
            print(f"{key:60s}" + "".join(f"   {a:6.3f}/{b:6.3f}" for a, b in means)
                  + f"   {statistics.fmean(a for a, _ in means):6.3f}")  # fmt: skip

    def _mean(self, name: str, key: str) -> tuple[float, float]:
        pairs = self.rows[name].get(key) or [(math.nan, math.nan)]
        return statistics.fmean(a for a, _ in pairs), statistics.fmean(b for _, b in pairs)

    def record(self) -> dict[str, Any]:
        return {
            name: {
                key: {
                    **dict(zip(("nats_lost", "after_the_draft"), self._mean(name, key), strict=True)),
                    "documents": len(pairs),
                    "each": [round(pair[0], 4) for pair in pairs],
                }
                for key, pairs in rows.items()
            }
            for name, rows in self.rows.items()
        }


def chunks(ids: list[int], longest: int = 640) -> list[list[int]]:
    return [ids[at : at + longest] for at in range(0, len(ids), longest)]


def pieces(document: Document, share: float, lead: int, stride: int = 128) -> list[int]:
    text = document.ids[slice(*document.span)]
    found = text[:lead]
    for start in range(lead, len(text), stride):
        found += text[start : start + round(stride * share)]
    return found


class _Coder:
    """A document's keys and values, and those of its summary, as they come back from their bits; each made once."""

    def __init__(self, document: Document, metrics: dict[str, Tensor], value_metric: Tensor) -> None:
        self.document, self.metrics, self.value_metric = document, metrics, value_metric
        self.done: dict[Any, Tensor] = {}

    def __call__(self, vectors: tuple[Tensor, Tensor], which: int, coding: Coding, aware: str) -> Tensor:
        bits = int((coding.keys, coding.values)[which])
        aware = {"both": "static"}.get(aware, aware) if which == 0 else "both" if aware == "both" else ""
        key = (vectors is self.document.pair, which, bits, coding.kind, aware)
        if key not in self.done:
            metric = None if not aware else self.value_metric if which else self.metrics[aware]
            self.done[key] = aware_coded(vectors[which], bits, coding.kind, metric)
        return self.done[key]


class Explorer:
    def __init__(self, probe: Probe, sets: dict[str, list[Document]], rows: int) -> None:
        self.probe, self.sets, self.rows, self.book = probe, sets, rows, Book()

    def all(self) -> Iterator[tuple[str, Document]]:
        for name, documents in self.sets.items():
            for document in documents:
                yield name, document

    @torch.no_grad()
    def judge(self, name: str, document: Document, settings: list[Setting]) -> None:
        rows = max(1, min(self.rows, self.rows * 2000 // len(document.ids)))
        for at in range(0, len(settings), rows):
            part = settings[at : at + rows]
            self.book.note(name, document, part, self.probe.judge(document, part))

    def pair(self, document: Document, coding: Coding) -> tuple[Tensor, Tensor]:
        return coded(document.key, coding.keys, coding), coded(document.value, coding.values, coding)

    @torch.no_grad()
    def queries(self, document: Document, ids: list[int]) -> Tensor:
        """Queries of tokens behind a prompt that is all there, scaled: fp32 `[L, G, r T, D]`."""
        found = []
        probe = self.probe

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
            found.append(query[0].float().reshape(probe.groups, -1, query.shape[-1]) * scaling)
            probabilities, values = probe._full(document, layer, query, key, value, scaling)
            return (probabilities.to(values.dtype) @ values[:, None]).reshape(1, probe.heads, query.shape[2], -1)

        probe.attend = attend
        probe.call(torch.tensor([ids], device=probe.device), len(document.ids))
        return torch.stack(found)

    # -- the scores --

    def squares(self) -> None:
        """Root mean squares alone, which a processor finds in a minute: what a profile is fitted on."""
        for _, document in self.all():
            self.probe.look(document, chunks(pieces(document, 0.25, 128), 320), "look")
            self.probe.look(document, [document.summary[:32]], "draft32")
            self.probe.look(document, [document.summary[:-1]], "written")
            s = document.scores
            s["mix"] = blend(blend(s["look^2"], s["draft32^2"], 0.4), s["instruction^2"], 0.1)

    def blends(self) -> None:
        """What would other weights, longer drafts and more reading give? Written tokens cost nothing here."""
        coding = Coding()
        for name, document in self.all():
            s = document.scores
            if "half^2" not in s:
                self.probe.look(document, chunks(pieces(document, 0.5, 128), 320), "half")
                self.probe.look(document, [document.summary[:16]], "draft16")
                self.probe.look(document, [document.summary[:48]], "draft48")
            found = {"oracle": s["written^2"]}
            for look, draft, weight in (
                *(("look", "draft32", w) for w in (0.2, 0.3, 0.4, 0.6)), ("half", "draft32", 0.4),
                ("look", "draft16", 0.4), ("look", "draft48", 0.4), ("look", "draft48", 0.6),
            ):  # fmt: skip
                both = blend(s[look + "^2"], s[draft + "^2"], weight)
                found[f"{look} {draft} {weight}"] = blend(both, s["instruction^2"], 0.1)
            self.rank(name, document, coding, found)

    def rank(self, name: str, document: Document, coding: Coding, rankings: dict[str, Tensor]) -> None:
        """Judges what each ranking chooses, at every budget."""
        pair = self.pair(document, coding)
        settings = [
            Setting(f"{share:4.0%} | {title}", choose(ranking, slots(document, share, coding)), pair)
            for share in BUDGETS
            for title, ranking in rankings.items()
        ]
        self.judge(name, document, settings)

    def written(self) -> None:
        """Written tokens that compete for slots: in the layer's room, or over all layers; the write region in 4 bits;
        the first token exact. The choice among them is made once, by what all of the summary pays to them."""
        for name, document in self.all():
            score, own = self.mixed(document)
            for title, coding, write, coarse in (
                ("", Coding(), None, False),
                ("write region in 4 bits", Coding(), 0.0, True),
                ("first token exact", Coding(sink=True), None, False),
                ("both", Coding(sink=True), 0.0, True),
            ):
                pair, settings = self.pair(document, coding), []
                for share in BUDGETS:
                    number = slots(document, share, coding, write=write)
                    if coarse:
                        number -= _WRITE
                    free = choose(score, number)
                    parts = {
                        "free": (free, None),
                        "by layer": self.by_layer(score, own, free),
                        "over all layers": both(score, own, number),
                    }
                    settings += [
                        Setting(f"{share:4.0%} | {label}, {title}", keep,
                                pair, torch.ones_like(own, dtype=torch.bool) if kept is None else kept,
                                coding if coarse else None)
                        for label, (keep, kept) in parts.items()
                    ]  # fmt: skip
                self.judge(name, document, settings)

    def metrics(self) -> None:
        """What errors of a rotated key and value matter by, `[2, L, G, D, D]`: the queries of a second look, and the
        output projection; the keys' also averaged over every other document."""
        probe = self.probe
        turn = hadamard(probe.size, probe.device)
        weights = [layer.self_attn.o_proj.weight.float() for layer in probe.model.model.layers]
        by_head = torch.stack([w.T.reshape(probe.groups, -1, probe.size, w.shape[0]) for w in weights])
        self.value_metric = turn.T @ (by_head @ by_head.mT).mean(2) @ turn
        self.key_metric = torch.zeros_like(self.value_metric)
        for at, (_, document) in enumerate(self.all()):
            if at % 2:
                self.key_metric += self.own_metric(document)

    def own_metric(self, document: Document) -> Tensor:
        turn = hadamard(self.probe.size, self.probe.device)
        looks = (pieces(document, 0.25, 128)[:320], document.summary[:32])
        parts = [self.queries(document, ids) for ids in looks]
        return turn.T @ sum(x.transpose(-1, -2) @ x / x.shape[2] / 2 for x in parts) @ turn

    def tiers(self) -> None:
        """Slots of several precisions: the best tokens in 4 bits, those that just made it in fewer; codes that are
        chosen by what is made of their errors; fewer bytes of state. Only documents that the metric has not seen."""
        self.metrics()
        profile = find_profile(self.probe.model.config)
        factors = None if profile is None else profile.factors().log().to(self.probe.device)
        size = self.probe.size
        for at, (name, document) in enumerate(self.all()):
            if at % 2 and sum(map(len, self.sets.values())) > 1:
                continue
            assert document.pair is not None
            score, own = self.mixed(document, factors)
            metrics = {"own": self.own_metric(document), "static": self.key_metric, "both": self.key_metric}
            code = _Coder(document, metrics, self.value_metric)
            held, settings = (document.key, document.value), []
            everything = torch.ones_like(own, dtype=torch.bool)
            nothing = tuple(torch.zeros_like(x) for x in document.pair)
            for share in BUDGETS:
                for title, tiers, state, aware, written in TIERS:
                    mean = sum(part * replace(c, state=state).slot_bytes(size) for part, c in tiers)
                    number = slots(document, share, Coding()) * Coding().slot_bytes(size) / mean
                    keep = choose(score, number)
                    fine = choose(score, max(1.0, number * tiers[0][0])) if len(tiers) > 1 else keep
                    pairs = [[code(held, i, c, aware) for i in (0, 1)] for _, c in tiers]
                    for label in ("free", "layer"):
                        (k, o), top, errors = (keep, everything), fine, nothing
                        if label == "layer":
                            if written == "tiers":
                                k, o = self.by_layer(score, own, keep)
                                top, best = self.by_layer(score, own, fine)
                                coded_ = [[code(document.pair, i, c, aware) for i in (0, 1)] for _, c in tiers]
                            else:
                                costs = [replace(c, state=state).slot_bytes(size) for c in (tiers[0][1], tiers[-1][1])]
                                k, o = self.by_bytes(score, own, keep, fine, *costs)
                                best = everything
                                coded_ = [[code(document.pair, i, Coding(), "") for i in (0, 1)]]
                            errors = tuple(torch.where(best[..., None], one, other) - x for one, other, x in
                                           zip(coded_[0], coded_[-1], document.pair, strict=True))  # fmt: skip
                        pair = tuple(torch.where(top[..., None], one, other) for one, other in
                                     zip(pairs[0], pairs[-1], strict=True))  # fmt: skip
                        settings.append(Setting(f"{share:4.0%} {label} | {title}", k, pair, o, errors=errors))
                    if len(settings) >= self.rows * 2000 // len(document.ids):
                        self.judge(name, document, settings)
                        settings = []
            self.judge(name, document, settings)

    def mixed(self, document: Document, factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scores of the prompt's tokens and of written ones, on one scale (that of the draft)."""
        assert document.own is not None
        score, own = document.scores["mix"], document.own / document.scores["draft32^2"].sum()
        if factors is None:
            return score, own
        return score * factors[:, :, :1].exp(), own * factors[:, :, 1:].exp()

    def by_layer(self, score: Tensor, own: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
        """Each layer has the room that its prompt tokens won."""
        keep, kept = torch.zeros_like(free), torch.zeros_like(own, dtype=torch.bool)
        for layer in range(score.shape[0]):
            room = float(free[layer].sum()) / score.shape[1]
            one = both(score[layer : layer + 1], own[layer : layer + 1], room)
            keep[layer], kept[layer] = one[0][0], one[1][0]
        return keep, kept

    def by_bytes(
        self, score: Tensor, own: Tensor, keep: Tensor, fine: Tensor, dear: float, cheap: float
    ) -> tuple[Tensor, Tensor]:
        """Each layer has the bytes that its prompt tokens won; the best stay, written ones in the finer coding."""
        cost = torch.cat([torch.where(fine, dear, cheap) * keep, torch.full_like(own, dear)], -1)
        room = (torch.where(fine, dear, cheap) * keep).sum((1, 2))
        ranking = torch.cat([score.masked_fill(~keep, -1.0), own], -1)
        ranking[..., 0] = torch.inf
        order = ranking.flatten(1).argsort(-1, descending=True)
        spent = cost.flatten(1).gather(-1, order).cumsum(-1)
        stay = torch.zeros_like(spent, dtype=torch.bool).scatter_(-1, order, spent <= room[:, None] + 1e-3)
        stay = stay.view_as(ranking) & (ranking >= 0)
        return stay[..., : score.shape[-1]], stay[..., score.shape[-1] :]

    # -- a profile, fitted --

    def fit(self, epochs: int, out: Path | None) -> None:
        """Each head's factors, as `auvsum calibrate` learns them; seen on documents left out."""
        probe = self.probe
        documents = [document for _, document in self.all()]
        lessons = []
        for document in documents:
            read, written = self.mixed(document)
            end = document.scored
            lessons.append(Lesson(document.ids, document.summary[: end + 1], document.key, document.value, read,
                                  written[..., :end], document.nats[:end]))  # fmt: skip
        calibration = Calibration(probe.loaded, lambda line: print(line, flush=True))
        found = calibration.run(lessons, epochs)
        print(f"{found.left_out} of {found.documents} left out: {found.before:.3f} -> {found.after:.3f}", flush=True)
        if out:
            (out / "profile.json").write_text(found.profile.to_json())
        factors = found.profile.factors().log().to(probe.device)
        at = 0
        for name, rows in self.sets.items():
            for document in rows:
                pair, settings = self.pair(document, Coding()), []
                everything = torch.ones_like(document.own, dtype=torch.bool)
                seen = "seen" if at % LEFT_OUT else "unseen"
                at += 1
                for title, chosen in (("fitted", factors), ("none", torch.zeros_like(factors))):
                    score, own = self.mixed(document, chosen)
                    for share in BUDGETS:
                        number = slots(document, share, Coding())
                        free = choose(score, number)
                        for label, (keep, kept) in {
                            "free": (free, everything),
                            "by layer": self.by_layer(score, own, free),
                            "over all layers": both(score, own, number),
                        }.items():
                            settings.append(Setting(f"{share:4.0%} {seen} {label} | {title}", keep, pair, kept))
                self.judge(name, document, settings)


def _tiers() -> Iterator[tuple[str, list[tuple[float, Coding]], int, str, str]]:
    """Name, one or two tiers as (share of the slots, coding), bytes of state, by what codes are chosen (nothing, the
    queries of the prompt's own look, of other documents, those and the output projection), written tokens' coding."""
    ends = Coding(4, 4)
    g2, g3, k3 = Coding(2, 2, "gauss"), Coding(3, 3, "gauss"), Coding(3, 2, "gauss")
    e3 = Coding(3, 3)
    yield "today", [(1.0, ends)], 8, "", "4"
    yield "4 state", [(1.0, ends)], 4, "", "4"
    for aware in ("own", "static", "both"):
        yield f"4 state, {aware}", [(1.0, ends)], 4, aware, "tiers"
    for title, low in (("2", g2), ("3", g3), ("K3 V2", k3)):
        for part in (0.1, 0.25, 0.5):
            for aware in ("", "static", "both"):
                yield f"4 {part}, {title}, {aware}", [(part, ends), (1 - part, low)], 4, aware, "tiers"
        yield f"4 0.25, {title}, own", [(0.25, ends), (0.75, low)], 4, "own", "tiers"
        yield f"4 0.25, {title}, both, written 4", [(0.25, ends), (0.75, low)], 4, "both", "4"
        for part in (0.02, 0.1, 0.25, 0.5):
            yield f"4 {part}, {title}, own, written 4", [(part, ends), (1 - part, low)], 4, "own", "4"
    yield "4 0.1, ends 3, both", [(0.1, ends), (0.9, e3)], 4, "both", "tiers"
    yield "4 0.02, 3, both", [(0.02, ends), (0.98, g3)], 4, "both", "tiers"


TIERS = list(_tiers())


def both(score: Tensor, own: Tensor, number: float) -> tuple[Tensor, Tensor]:
    """One ranking of the prompt's tokens and written ones."""
    keep = choose(torch.cat([score, own], -1), number)
    return keep[..., : score.shape[-1]], keep[..., score.shape[-1] :]


def prepare(probe: Probe, args: argparse.Namespace) -> dict[str, list[Document]]:
    found = {}
    for name in args.sets.split(","):
        config = EvalConfig(**{"model": args.model or "smollm2-135m-instruct", **SETS[name]})
        every = load_examples(config.dataset, data_dir=args.data_dir)
        half = {"even": 0, "odd": 1}[args.half]
        place = {example.id: i for i, example in enumerate(every)}
        runner = Runner(config, probe.loaded, every)
        rows = [e for e in runner.examples if place[e.id] % 2 == half and e.document.strip()]
        asked = []
        for example in rows:
            if len(asked) == args.documents:
                break
            try:
                asked.append(runner.prompter.ask(example.document).prompt)
            except Exception as error:  # too long for the model
                print(name, error)
        prompts = [list(prompt.ids) for prompt in asked]
        summaries = [s for at in range(0, len(prompts), 16)
                     for s in probe.teach(prompts[at : at + 16], runner.prompter.max_new_tokens)]  # fmt: skip
        documents = []
        for prompt, ids, summary in zip(asked, prompts, summaries, strict=True):
            scored = min(len(summary) - 1, max(1, runner.prompter.scored(summary)))
            if len(summary) < 12:
                continue
            document = probe.read(ids, prompt.document, summary, scored)
            with torch.no_grad():
                document.nats = probe.judge(document, [Setting("full", None)])[0]
            documents.append(document)
        found[name] = documents
        lengths = [len(d.ids) for d in documents]
        print(f"{name}: {len(documents)} documents, {min(lengths)} to {max(lengths)} tokens, "
              f"{statistics.fmean(d.scored for d in documents):.0f} scored", flush=True)  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--sets", default="cnn_dailymail,beigebook,gao,xsum5")
    parser.add_argument("--documents", type=int, default=24)
    parser.add_argument("--half", choices=("even", "odd"), default="even")
    parser.add_argument("--experiments", default="squares,blends,written,tiers,fit")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--rows", type=int, default=80, help="settings a batch, at 2,000 tokens")
    parser.add_argument("--model")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    began = time.perf_counter()
    probe = Probe(args.model, args.device)
    explorer = Explorer(probe, prepare(probe, args), args.rows)
    print(f"{time.perf_counter() - began:.0f} s: ready", flush=True)
    for experiment in args.experiments.split(","):
        explorer.book = Book()
        try:
            if experiment == "fit":
                explorer.fit(args.epochs, args.out)
            else:
                getattr(explorer, experiment)()
        except Exception:  # the others are worth their time
            traceback.print_exc()
        print(f"\n{time.perf_counter() - began:.0f} s: {experiment}", flush=True)
        if explorer.book.rows:
            explorer.book.report()
            if args.out:
                record = {
                    "machine": common.machine(),
                    "model": probe.loaded.name,
                    "half": args.half,
                    "sets": explorer.book.record(),
                }
                (args.out / f"{experiment}.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()

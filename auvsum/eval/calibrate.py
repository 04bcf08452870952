"""`auvsum calibrate`: what a token of each KV head is worth beside the attention paid to it, learned from documents.

For every document the full cache writes its greedy summary. Then the summary is read again and again over what a budget
lets through: `auv-look`'s scores times the factors go through gates that let as many tokens pass as the budget has
slots, softly at first and harder as it goes on, and the factors follow the gradient of the nats lost. The summary's own
tokens compete, too, once they have left the write region. Nothing but two numbers a head is learned: 180 for 90 heads.
Beside them the profile tells in which directions each head's queries lie, by which the bits of written keys are chosen.

Shapes: L layers (those without a sliding window), G KV heads, H query heads, D head size, n prompt tokens, T summary
tokens, B budgets.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from auvsum.cache.codec import vector_bytes
from auvsum.cache.head_profiles import Profile, few_directions, shape_of
from auvsum.cache.heads import HeadsCache, second_look
from auvsum.cache.policies.auv_look import AUVLook
from auvsum.cache.sliding import attend_window, layer_windows
from auvsum.cache.windows import WindowLayer
from auvsum.engine.models import LoadedModel
from auvsum.errors import DocumentError, DocumentTooLong

#: Shares of the full cache's bytes, in 4 bits, that are learned with, and the one that is judged by.
_SHARES, _JUDGED, _BITS = (0.1, 0.05, 0.03, 0.015), 0.04, 4
#: Written tokens that are there in any case.
_WRITE = 4
_RATE, _SOFT, _HARD = 0.08, 0.85, 0.15
#: What the square of a factor's logarithm costs, in nats: a head stays as it is unless the documents say otherwise.
_HELD_BACK = 1e-4
#: One document of so many is left out, to see whether the factors hold for what they have not seen.
LEFT_OUT = 5

Progress = Callable[[str], None]


@dataclass
class Lesson:
    """A prompt, the full cache's summary of it, and what that cache holds.

    Attributes:
        summary: token ids, its first one included. key, value: `[L, G, n, D]`. read: scores `[L, G, n]`.
        written: scores of the summary's tokens but the last, `[L, G, T - 1]`, on the same scale.
        nats: of the summary's tokens from the second on, with the full cache: fp32 `[T - 1]`.
        moments: of the queries of a second look, `[L, G, D, D]`; None for unknown.
        windows: of the layers that slide, by their number in the model: the prompt's end, keys and values
            `[1, G, m, D]`.
    """

    ids: list[int]
    summary: list[int]
    key: Tensor
    value: Tensor
    read: Tensor
    written: Tensor
    nats: Tensor
    moments: Tensor | None = None
    windows: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Calibrated:
    """What came of it: nats a token lost by documents that were left out, at 4% of the bytes, without the profile and
    with it."""

    profile: Profile
    documents: int
    left_out: int
    before: float
    after: float


class Calibration:
    """Learns the factors of one model.

    Args:
        loaded: on any device; its weights are not changed.
    """

    def __init__(self, loaded: LoadedModel, progress: Progress = lambda _: None) -> None:
        self.loaded, self.progress, self.model = loaded, progress, loaded.model
        self.policy, self.windows = AUVLook(profile=False), layer_windows(loaded.model.config)
        #: What the attention function looks at while the model reads a summary.
        self._lesson: Lesson | None = None
        self._gates: tuple[Tensor, Tensor] | None = None
        self._paid: list[Tensor] = []
        AttentionInterface.register("auvsum-lesson", self._attend)

    def run(self, lessons: Sequence[Lesson], epochs: int) -> Calibrated:
        """Learns from four fifths of the lessons and judges by the rest."""
        seen = [lesson for i, lesson in enumerate(lessons) if i % LEFT_OUT]
        unseen = list(lessons[::LEFT_OUT])
        factors = torch.zeros((*unseen[0].read.shape[:2], 2), device=self.loaded.device, requires_grad=True)
        before = self._judge(unseen, factors)
        optimizer = torch.optim.Adam([factors], lr=_RATE)
        steps = epochs * len(seen)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        order = torch.Generator().manual_seed(0)
        for epoch in range(epochs):
            losses: list[float] = []
            for at in torch.randperm(len(seen), generator=order).tolist():
                done = epoch + len(losses) / len(seen)
                warmth = _HARD + (_SOFT - _HARD) * (1 - done / epochs)
                optimizer.zero_grad()
                with torch.enable_grad():
                    loss = self._lost(seen[at], factors, _SHARES, warmth)
                    (loss + _HELD_BACK * factors.square().sum()).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                losses.append(float(loss.detach()))
            self.progress(f"{epoch + 1}/{epochs} times read: {statistics.fmean(losses):.3f} nats a token lost")
        learned = factors.detach()
        read, written = (tuple(tuple(row) for row in learned[..., i].tolist()) for i in (0, 1))
        moments = [lesson.moments for lesson in seen if lesson.moments is not None]
        queries = few_directions(torch.stack(moments).mean(0)) if moments else ""
        profile = Profile(self.loaded.name, shape_of(self.model.config), read, written, queries)
        return Calibrated(profile, len(lessons), len(unseen), before, self._judge(unseen, learned))

    # -- lessons ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def lesson(self, ids: Sequence[int], document: tuple[int, int], max_new_tokens: int) -> Lesson:
        """Reads a prompt, looks at it again as `auv-look` does, and lets the full cache summarize.

        Raises:
            DocumentTooLong: prompt and summary do not fit the model's positions.
            DocumentError: a summary too short to learn from.
        """
        model, policy, start = self.model, self.policy, len(ids)
        limit = self.loaded.max_positions
        if limit is not None and start + max_new_tokens > limit:
            raise DocumentTooLong(f"prompt and summary need {start + max_new_tokens:,} of {limit:,} positions")
        model.set_attn_implementation("auvsum")
        cache = HeadsCache(model.config, policy, policy.least_slots)
        cache.begin(start)

        def see(tokens: Sequence[int], place: int) -> int:
            positions = torch.arange(place, place + len(tokens), device=self.loaded.device)[None]
            out = model(torch.tensor([list(tokens)], device=self.loaded.device), position_ids=positions,
                        past_key_values=cache, use_cache=True, logits_to_keep=1)  # fmt: skip
            return int(out.logits[0, -1].argmax())

        with cache.reading(0):
            summary = [see(ids, 0)]
        drafted = None
        with cache.looking(0, drafts=True) as found:
            while len(summary) < max_new_tokens and summary[-1] not in self.loaded.eos_ids:
                summary.append(see(summary[-1:], start + len(summary) - 1))
                if len(summary) == policy.draft + 1:
                    drafted = torch.stack([layer.total / layer.queries for layer in found])
        if len(summary) < 2 * _WRITE:
            raise DocumentError("the model's summary is too short to learn from", "give longer documents")
        if drafted is None:
            drafted = torch.stack([layer.total / layer.queries for layer in found])
        look = second_look(model, cache, 0, ids, document, None)
        assert look is not None
        key, value = (torch.stack(part) for part in zip(*((r.key, r.value) for r in
                      (layer.rows[0] for layer in cache.ranked) if r), strict=True))  # fmt: skip
        read = policy.blend(look.looked, drafted, look.asked)
        none = torch.zeros(0)
        ends = {number: layer.ends[0] for number, layer in enumerate(cache.layers) if isinstance(layer, WindowLayer)}
        lesson = Lesson(list(ids), summary, key, value, read, none, none, look.moments, ends)
        self._paid = []
        lesson.nats = self._read(lesson, None, 1)[0]
        lesson.written = torch.stack(self._paid)
        return lesson

    # -- reading a summary --------------------------------------------------------------------------------------------

    def _read(self, lesson: Lesson, gates: tuple[Tensor, Tensor] | None, rows: int) -> Tensor:
        """Nats of the summary's tokens from the second on, fp32 `[B, T - 1]`.

        Args:
            gates: logarithms of what is let through of the prompt `[L, B, G, n]` and the summary `[L, B, G, T - 1]`.
        """
        self._lesson, self._gates = lesson, gates
        self.model.set_attn_implementation("auvsum-lesson")
        try:
            summary = torch.tensor([lesson.summary], device=self.loaded.device).expand(rows, -1)
            start, count = len(lesson.ids), summary.shape[1] - 1
            positions = torch.arange(start, start + count, device=self.loaded.device)[None].expand(rows, -1)
            logits = self.model(summary[:, :-1], position_ids=positions, use_cache=False).logits.float()
        finally:
            self._lesson = self._gates = None
            self.model.set_attn_implementation("auvsum")
        nats: Tensor = logits.logsumexp(-1) - logits.gather(-1, summary[:, 1:, None])[..., 0]
        return nats

    def _attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: Any, scaling: float = 1.0, **_: Any
    ) -> tuple[Tensor, None]:
        lesson, window = self._lesson, self.windows[module.layer_idx]
        assert lesson is not None
        if window is not None:
            ends = lesson.windows[module.layer_idx]
            keys, values = (
                torch.cat([x.expand(len(own), -1, -1, -1), own], 2) for x, own in zip(ends, (key, value), strict=True)
            )
            past = keys.shape[2] - key.shape[2]
            return attend_window(query, keys, values, scaling, past, window).transpose(1, 2), None
        layer = self.windows[: module.layer_idx].count(None)
        (rows, heads, tokens, size), groups = query.shape, key.shape[1]
        asked = query.reshape(rows, groups, -1, size)
        before = (asked @ lesson.key[layer].mT).float().mul_(scaling)
        own = (asked @ key.mT).float().mul_(scaling).view(rows, groups, -1, tokens, tokens)
        ones = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device)
        if self._gates is not None:
            read, written = (gate[layer][:, :, None] for gate in self._gates)
            before = before + read
            own = own + torch.where(ones.tril(-_WRITE), written[:, :, None], 0.0)
        own = own.masked_fill(ones.triu(1), -torch.inf).view(rows, groups, -1, tokens)
        probabilities = torch.cat([before, own], -1).softmax(-1)
        if self._gates is None:
            paid = probabilities[0, ..., -tokens:].view(groups, -1, tokens, tokens)
            paid = paid.pow(self.policy.power).mean(1).tril(-_WRITE)
            later = torch.arange(tokens, 0, -1, device=paid.device).sub(_WRITE).clamp_min(1)
            self._paid.append((paid.sum(1) / later).pow(1 / self.policy.power))
        spread = probabilities.to(value.dtype)
        out = spread[..., :-tokens] @ lesson.value[layer] + spread[..., -tokens:] @ value
        return out.view(rows, heads, tokens, size).transpose(1, 2), None

    # -- gates --------------------------------------------------------------------------------------------------------

    def _lost(self, lesson: Lesson, factors: Tensor, shares: Sequence[float], warmth: float | None) -> Tensor:
        """Nats a token lost with the factors' choice, mean over shares of the bytes; without warmth gates are shut or
        open. What other tokens gain does not count: a model that repeats itself gains by seeing nothing else."""
        score = torch.cat([lesson.read, lesson.written], -1).clamp_min(1e-12).log()
        tokens = len(lesson.ids)
        score = torch.cat([score[..., :tokens] + factors[..., :1], score[..., tokens:] + factors[..., 1:]], -1)
        score = score.masked_fill(torch.arange(score.shape[-1], device=score.device) == 0, score.max().item() + 20)
        gates = torch.stack([_gates(score, self._slots(lesson, share), warmth) for share in shares], 1)
        nats = self._read(lesson, (gates[..., :tokens], gates[..., tokens:]), len(shares))
        return (nats - lesson.nats).clamp_min(0).mean()

    def _slots(self, lesson: Lesson, share: float) -> int:
        """Slots a head, on average, that are not the write region's."""
        size, element = lesson.key.shape[-1], lesson.key.element_size()
        whole = len(lesson.ids) * 2 * vector_bytes(size, element, 16)
        dear, cheap = self.policy.slot_bytes(size, element, _BITS)
        every = len(lesson.ids) + len(lesson.summary)
        return max(1, self.policy.tiers(int(share * whole) - _WRITE * dear, every, dear, cheap)[0])

    @torch.no_grad()
    def _judge(self, lessons: Sequence[Lesson], factors: Tensor) -> float:
        return statistics.fmean(float(self._lost(lesson, factors, (_JUDGED,), None)) for lesson in lessons)


def _gates(score: Tensor, slots: int, warmth: float | None) -> Tensor:
    """Logarithms of gates `[L, G, .]` that let about `slots` tokens a head pass; the threshold follows the scores."""
    wanted = min(slots * score.shape[0] * score.shape[1], score.numel())
    flat = score.detach().flatten()
    if warmth is None:
        passing = torch.zeros_like(flat).index_fill_(0, flat.topk(wanted).indices, 1.0)
        return passing.log().view_as(score)
    flat = flat / warmth
    low, high = flat.min() - 10, flat.max() + 10
    for _ in range(40):
        middle = (low + high) / 2
        many = torch.sigmoid(flat - middle).sum() > wanted
        low, high = torch.where(many, middle, low), torch.where(many, high, middle)
    slope = torch.sigmoid(flat - low)
    slope = (slope * (1 - slope)).view_as(score)
    threshold = low + (slope * (score - score.detach()) / warmth).sum() / slope.sum().clamp_min(1e-20)
    return torch.nn.functional.logsigmoid(score / warmth - threshold)

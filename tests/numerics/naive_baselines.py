"""The oracle of AUV's ladder and of the baselines, in the style of `naive.py`: lists and loops, from the notes alone.

Policies whose heads decide together (one set a layer), or that know their layer, are built by `Family`, which hands out
the heads of one layer after another. Where heads decide together, a decision waits until all heads have spoken: it is
made at the next call, or when somebody looks (`settle`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from tests.numerics.naive import NaiveAuv, NaiveHead, Token, lowest, margin


class Family:
    """Called once per KV head, layer after layer; a head gets to know its layer, number and siblings."""

    def __init__(self, make: Callable[[], NaiveHead], heads: int, layers: int = 2) -> None:
        self.make, self.heads, self.layers, self.made = make, heads, layers, 0
        self.siblings: list[Any] = []

    def __call__(self) -> NaiveHead:
        head: Any = self.make()
        if self.made % self.heads == 0:
            self.siblings = []
        head.layer, head.layers = self.made // self.heads, self.layers
        head.number, head.siblings = self.made % self.heads, self.siblings
        self.siblings.append(head)
        self.made += 1
        return head


# -- AUV's ladder --------------------------------------------------------------------------------------------------


class NaiveV1(NaiveAuv):
    """H2O's flow with AUV's aggregation."""

    names = ("aas", "cnt")

    def __init__(self, slots: int) -> None:
        super().__init__(3 * slots, reconstruct=False)
        self.slots, self.recent = slots, max(1, slots // 2)

    def snapshot(self) -> dict[str, Any]:
        return {name: value for name, value in super().snapshot().items() if name != "pointer"}

    def end_of_chunk(self) -> None:
        for token in self.live:
            token.state.pop("usage", None)
        if len(self.live) > self.slots:
            old = self.live[: len(self.live) - self.recent]
            gone = self.select(old, self.aas, len(self.live) - self.slots)
            self.keep([token for token in self.live if token not in gone])

    def before_decode(self) -> None:
        if len(self.live) == self.slots:
            gone = self.select(self.live[: len(self.live) - (self.recent - 1)], self.aas, 1)
            self.keep([token for token in self.live if token not in gone])

    def after_decode(self, probabilities: list[float]) -> None: ...


class SingleStepMemory:
    """2L slots: `first` are the places of the first half, `ring` those of the latter, the oldest token first."""

    first: list[Token]
    ring: list[Token]

    def split(self, live: list[Token], local: int) -> None:
        """Right after the prompt, or while it fills: in the order of the positions."""
        self.first, self.ring = live[:local], live[local:]


class NaiveV3(NaiveAuv, SingleStepMemory):
    """Optimized single step: least U, then least AAS."""

    def __init__(self, slots: int, top_k: int | None = None) -> None:
        super().__init__(3 * (slots // 2), top_k=top_k, reconstruct=False)
        self.first, self.ring = [], []

    def snapshot(self) -> dict[str, Any]:
        return {name: value for name, value in super().snapshot().items() if name != "pointer"}

    def end_of_chunk(self) -> None:
        if len(self.live) > 2 * self.local:
            cut = len(self.live) - self.local
            gone = self.select(self.live[:cut], self.aas, len(self.live) - 2 * self.local)
            self.keep([token for token in self.live if token not in gone])
        self.split(self.live, self.local)

    def before_decode(self) -> None:
        if len(self.live) == 2 * self.local:
            victim = self.victim(self.first)
            self.first[self.first.index(victim)] = self.ring.pop(0)
            self.keep(self.first + self.ring)

    def arrive(self, key: torch.Tensor, value: torch.Tensor) -> None:
        super().arrive(key, value)
        (self.ring if len(self.first) == self.local else self.first).append(self.live[-1])

    def prefill(self, *args: Any) -> torch.Tensor:
        self.first, self.ring = [], []
        return super().prefill(*args)

    def victim(self, candidates: list[Token]) -> Token:
        fewest = min(token.state["usage"] for token in candidates)
        few = [token for token in candidates if token.state["usage"] == fewest]
        return self.select(few, self.aas, 1)[0]

    def after_decode(self, probabilities: list[float]) -> None:
        self.count_usage(probabilities)


class NaiveV2(NaiveV3):
    """Second chance: traverse by ascending AAS; a count of 0 goes, any other loses 1; again from the start."""

    def victim(self, candidates: list[Token]) -> Token:
        while True:
            for token in self.select(candidates, self.aas, len(candidates)):
                if token.state["usage"] == 0:
                    return token
                token.state["usage"] -= 1


class NaiveH2oRing(NaiveHead, SingleStepMemory):
    """FlexGen's H2O: the victim is among the first half; the token leaving the ring is always admitted."""

    names = ("score",)

    def __init__(self, slots: int) -> None:
        super().__init__()
        self.local = slots // 2
        self.first, self.ring = [], []

    @staticmethod
    def score(token: Token) -> float:
        return token.state["score"]

    def aggregate(self, probabilities: list[float]) -> None:
        for token, a in zip(self.live, probabilities, strict=True):
            token.state["score"] += a

    def end_of_chunk(self) -> None:
        if len(self.live) > 2 * self.local:
            gone = self.select(self.live[: -self.local], self.score, len(self.live) - 2 * self.local)
            self.keep([token for token in self.live if token not in gone])
        self.split(self.live, self.local)

    def before_decode(self) -> None:
        if len(self.live) == 2 * self.local:
            victim = self.select(self.first, self.score, 1)[0]
            self.first[self.first.index(victim)] = self.ring.pop(0)
            self.keep(self.first + self.ring)

    def arrive(self, key: torch.Tensor, value: torch.Tensor) -> None:
        super().arrive(key, value)
        (self.ring if len(self.first) == self.local else self.first).append(self.live[-1])

    def prefill(self, *args: Any) -> torch.Tensor:
        self.first, self.ring = [], []
        return super().prefill(*args)


# -- rings ---------------------------------------------------------------------------------------------------------


class NaiveRing(NaiveHead):
    """Decode of the policies that choose once: when all slots are taken, the oldest of the `ring` newest goes."""

    def __init__(self, slots: int) -> None:
        super().__init__()
        self.slots = slots
        self.rows: list[list[float]] = []

    def ring(self) -> int:
        raise NotImplementedError

    def aggregate(self, probabilities: list[float]) -> None:
        self.rows.append(probabilities)  # row i has i + 1 entries

    def before_decode(self) -> None:
        if len(self.live) == self.slots:
            del self.live[-self.ring()]

    def window_sums(self, queries: int) -> list[float]:
        """For each token, the sum of the last rows' probabilities."""
        rows = self.rows[-queries:]
        return [sum(row[j] for row in rows if j < len(row)) for j in range(len(self.live))]


class NaiveStreaming(NaiveRing):
    sinks = 4

    def ring(self) -> int:
        return self.slots - self.sinks

    def end_of_chunk(self) -> None:
        if len(self.live) > self.slots:
            self.keep(self.live[: self.sinks] + self.live[len(self.live) - self.ring() :])


class NaiveSnap(NaiveRing):
    layer = layers = 0

    def window(self) -> int:
        return min(32, self.slots // 2)

    def ring(self) -> int:
        return self.window()

    def budget(self, n: int) -> int:
        return self.slots

    def pooled(self, sums: list[float], j: int) -> float:
        return sum(sums[i] for i in range(j - 2, j + 3) if 0 <= i < len(sums)) / 5

    def end_of_chunk(self) -> None:
        n, budget, w = len(self.live), self.budget(len(self.live)), self.window()
        self.held = budget
        if n <= budget:
            return
        sums = self.window_sums(w)[: n - w]
        score = {id(token): self.pooled(sums, j) for j, token in enumerate(self.live[: n - w])}
        gone = self.select(self.live[: n - w], lambda token: score[id(token)], n - budget)
        self.keep([token for token in self.live if token not in gone])

    def before_decode(self) -> None:
        if len(self.live) == self.held:
            del self.live[-self.ring()]


class NaivePyramid(NaiveSnap):
    """m, lo, hi as published; where rounding exceeds B a layer, m is one less."""

    def budget(self, n: int) -> int:
        if self.slots >= n:
            return self.slots
        w = self.window()
        m = self.slots - w
        while True:
            lo = m // 20
            hi = min(2 * m - lo, n - w)
            shares = [hi - layer * (hi - lo) // max(1, self.layers - 1) + w for layer in range(self.layers)]
            if sum(shares) <= self.slots * self.layers:
                return shares[self.layer]
            m -= 1


class NaiveNacl(NaiveRing):
    """2.5% first, 2.5% last (but 16, or a quarter), 35% drawn without replacement, the rest by score."""

    seed = 0
    layer = number = 0
    siblings: list[NaiveHead]

    def ring(self) -> int:
        return max(self.slots // 40, min(16, self.slots // 4))

    def noise(self, n: int) -> list[float]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.layer)
        uniform = torch.rand((len(self.siblings), n), generator=generator, dtype=torch.float64)
        return [-math.log(-math.log(u)) for u in uniform[self.number].tolist()]

    def proxies(self, n: int) -> int:
        return max(8, n // 100)

    def end_of_chunk(self) -> None:
        n = len(self.live)
        if n <= self.slots:
            return
        sinks, drawn = max(1, self.slots // 40), max(1, self.slots * 35 // 100)
        sums, noise = self.window_sums(self.proxies(n)), self.noise(n)
        s = {id(token): sums[j] for j, token in enumerate(self.live)}
        g = {id(token): noise[j] for j, token in enumerate(self.live)}
        middle = self.live[sinks : n - self.ring()]
        best = self.slots - sinks - self.ring() - drawn
        rest = self.select(middle, lambda token: s[id(token)], len(middle) - best)
        # The largest s + Gumbel noise: a draw without replacement with probability softmax(s).
        unlucky = self.select(rest, lambda token: s[id(token)] + g[id(token)], len(rest) - drawn)
        self.keep([token for token in self.live if token not in unlucky])


# -- counting ------------------------------------------------------------------------------------------------------


class NaiveScissorhands(NaiveHead):
    """Of the last 400 queries, how many gave the key at least the average?"""

    window, recent = 400, 10

    def __init__(self, slots: int) -> None:
        super().__init__()
        self.slots = slots
        self.query = 0
        self.hits: dict[int, list[int]] = {}  # position -> queries that hit it

    def aggregate(self, probabilities: list[float]) -> None:
        for token, a in zip(self.live, probabilities, strict=True):
            if a >= 1 / len(probabilities):
                self.hits.setdefault(token.position, []).append(self.query)
        self.query += 1

    def count(self, token: Token) -> float:
        return sum(query >= self.query - self.window for query in self.hits.get(token.position, []))

    def end_of_chunk(self) -> None:
        if len(self.live) > self.slots:
            old = self.live[: len(self.live) - self.recent]
            gone = lowest(old, self.count, len(self.live) - self.slots)
            self.keep([token for token in self.live if token not in gone])

    def before_decode(self) -> None:
        if len(self.live) == self.slots:
            gone = lowest(self.live[: len(self.live) - (self.recent - 1)], self.count, self.slots // 2)
            self.keep([token for token in self.live if token not in gone])


# -- one set a layer -----------------------------------------------------------------------------------------------


class Together(NaiveHead):
    """Decisions wait in `pending` until every head of the layer has spoken."""

    siblings: list[Any]

    def __init__(self, slots: int) -> None:
        super().__init__()
        self.slots = slots
        self.pending: Callable[[], None] | None = None

    def settle(self) -> None:
        if self.pending is not None:
            self.pending()
            self.pending = None

    def forward(self, *args: Any) -> torch.Tensor:
        self.settle()
        return super().forward(*args)

    def snapshot(self) -> dict[str, Any]:
        self.settle()
        return super().snapshot()


class NaiveTova(Together):
    names = ("weight",)

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self.last: dict[int, dict[int, float]] = {}  # tokens seen -> position -> this head's probability

    def aggregate(self, probabilities: list[float]) -> None:
        self.last[self.seen] = {t.position: a for t, a in zip(self.live, probabilities, strict=True)}

    def weight(self, token: Token) -> float:
        views = [head.last[self.seen] for head in self.siblings]
        return sum(view[token.position] for view in views) / len(views)

    def look(self) -> None:
        for token in self.live:
            token.state["weight"] = self.weight(token)

    def end_of_chunk(self) -> None:
        def decide() -> None:
            self.look()
            gone = self.select(self.live, self.weight, max(0, len(self.live) - self.slots))
            self.keep([token for token in self.live if token not in gone])

        self.pending = decide

    def before_decode(self) -> None:
        if len(self.live) == self.slots:
            gone = self.select(self.live, self.weight, 1)
            self.keep([token for token in self.live if token not in gone])

    def after_decode(self, probabilities: list[float]) -> None:
        self.pending = self.look


class NaiveCrush(Together):
    """KVCrush over H2O: `hh` slots for H2O on the heads' mean scores, the rest for representatives."""

    names = ("score",)
    anchor, hh = "mean", 0.25

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self.recent = max(1, slots // 2)
        self.sums: dict[int, dict[int, float]] = {}  # tokens seen -> position -> this head's own score, then the mean

    def aggregate(self, probabilities: list[float]) -> None:
        own = {t.position: t.state["score"] + a for t, a in zip(self.live, probabilities, strict=True)}
        for token in self.live:
            token.state["score"] = own[token.position]
        self.sums[self.seen] = own

    def mean(self) -> dict[int, float]:
        views = [head.sums[self.seen] for head in self.siblings]
        return {position: sum(view[position] for view in views) / len(views) for position in views[0]}

    @staticmethod
    def h2o(positions: list[int], score: dict[int, float], slots: int) -> set[int]:
        recent = max(1, slots // 2)
        old = sorted(positions[: len(positions) - recent], key=lambda p: (score[p], p))
        return set(positions[len(positions) - recent :]) | set(old[len(old) - (slots - recent) :])

    def bits(self, positions: list[int]) -> list[list[bool]]:
        kept = [self.h2o(positions, head.sums[self.seen], self.slots) for head in self.siblings]
        return [[position in one for one in kept] for position in positions]

    def target(self, bits: list[list[bool]]) -> list[bool]:
        heads = range(len(bits[0]))
        if self.anchor == "alternate":
            return [h % 2 == 1 for h in heads]
        return [2 * sum(row[h] for row in bits) >= len(bits) for h in heads]

    def end_of_chunk(self) -> None:
        def decide() -> None:
            mean = self.mean()
            positions = [token.position for token in self.live]
            if len(positions) > self.slots:
                bits = self.bits(positions)
                anchor = self.target(bits)
                distance = {
                    position: sum(bit != wanted for bit, wanted in zip(row, anchor, strict=True))
                    for position, row in zip(positions, bits, strict=True)
                }
                heavy = self.h2o(positions, mean, max(2, int(self.slots * self.hh)))
                rest = sorted((p for p in positions if p not in heavy), key=lambda p: (distance[p], p))
                count = self.slots - len(heavy)
                keep = heavy | {rest[i * len(rest) // count] for i in range(count)}
                self.keep([token for token in self.live if token.position in keep])
            self.share(mean)

        self.pending = decide

    def share(self, mean: dict[int, float]) -> None:
        for token in self.live:
            token.state["score"] = mean[token.position]

    def before_decode(self) -> None:
        if len(self.live) == self.slots:
            # The newest tokens of the text, held or not: representatives leave gaps among the recent ones.
            old = [token for token in self.live if token.position < self.seen - (self.recent - 1)]
            score = lambda token: token.state["score"]  # noqa: E731
            self.smallest_margin = min(self.smallest_margin, margin(old, score, 1))
            gone = lowest(old, score, 1)
            self.keep([token for token in self.live if token not in gone])

    def after_decode(self, probabilities: list[float]) -> None:
        self.pending = lambda: self.share(self.mean())

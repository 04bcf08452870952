"""Proof that the comparisons can fail: each plausible mistake, put into the oracle, must make them disagree.

The mistake is made on the oracle's side, which is the same as making it in the package and leaves the package clean.
"""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from tests import tiny
from tests.numerics import harness, naive
from tests.numerics.naive import NaiveAuv, NaiveH2o, Token


class MeanOverAllRows(NaiveAuv):
    def column_mean(self, column: list[float], rows: int) -> float:
        return sum(column) / rows


class UnscaledRows(NaiveAuv):
    def valid_keys(self, probabilities: list[float]) -> int:
        return int(self.n_max or 0)


class LocalWindowOneShort(NaiveAuv):
    def local_window(self) -> int:
        return self.local - 1


class LocalWindowOneLong(NaiveAuv):
    def local_window(self) -> int:
        return self.local + 1


class ForgottenDecay(NaiveAuv):
    def evict(self) -> None:
        self.decay = 1.0
        super().evict()


class NewTokenNotCounted(NaiveAuv):
    """N_t without the new token, in decode only."""

    def aggregate(self, probabilities: list[float]) -> None:
        self.valid_keys = lambda p: len(p) - 1  # type: ignore[method-assign]
        super().aggregate(probabilities)


class ReconstructedNotCounted(NaiveAuv):
    """N_t without the live reconstructed slot."""

    def valid_keys(self, probabilities: list[float]) -> int:
        return len(self.live)


class UsageCountsReconstructed(NaiveAuv):
    """The reconstructed slot may take one of the k places."""

    def count_usage(self, probabilities: list[float]) -> None:
        k = min(self.local, len(self.live))
        used = sorted(range(len(probabilities)), key=lambda j: (probabilities[j], j))[-k:]
        for j in used:
            if j < len(self.live):
                self.live[j].state["usage"] += 1


class CountStandsStill(NaiveAuv):
    def next_count(self, cnt: float) -> float:
        return cnt


class UnweightedReconstruction(NaiveAuv):
    def fold_weight(self, token: Token) -> float:
        return 1.0


class AasAlone(NaiveAuv):
    """Eviction without the usage count."""

    def evict(self) -> None:
        for token in self.live:
            token.state["usage"] = 0.0
        super().evict()


class MaxOverAllSlots(NaiveAuv):
    """Eq. 5 with the max over the write region too."""

    def evict(self) -> None:
        write = self.live[2 * self.local :]
        largest = max(token.state["aas"] for token in self.live)
        self.live = self.live[: 2 * self.local]
        gone = naive.lowest(self.live, lambda t: t.state["usage"] * largest + t.state["aas"], self.local)
        self.fold(gone)
        self.keep([token for token in self.live if token not in gone] + write)
        least = min(token.state["usage"] for token in self.live)
        for token in self.live:
            token.state["usage"] = (token.state["usage"] - least) * self.decay


class OneHeadOfTheGroup(NaiveAuv):
    """Scores of the group's first query head instead of the group's mean."""

    def attend(self, query: torch.Tensor, scaling: float) -> tuple[list[float], torch.Tensor]:
        first, _ = super().attend(query[:1], scaling)
        _, out = super().attend(query, scaling)
        return first, out


AUV_MUTATIONS = [
    MeanOverAllRows, UnscaledRows, LocalWindowOneShort, LocalWindowOneLong, ForgottenDecay, NewTokenNotCounted,
    ReconstructedNotCounted, UsageCountsReconstructed, CountStandsStill, UnweightedReconstruction, AasAlone,
    MaxOverAllSlots, OneHeadOfTheGroup,
]  # fmt: skip


class ProtectsOneMore(NaiveH2o):
    def before_decode(self) -> None:
        self.recent += 1
        super().before_decode()
        self.recent -= 1


class NewTokenStartsAtZero(NaiveH2o):
    def after_decode(self, probabilities: list[float]) -> None:
        self.live[-1].state["score"] = 0.0


class EvictsAfterAttention(NaiveH2o):
    def before_decode(self) -> None: ...

    def after_decode(self, probabilities: list[float]) -> None:
        self.end_of_chunk()


class ScoresFromDecodeOnly(NaiveH2o):
    def end_of_chunk(self) -> None:
        super().end_of_chunk()
        for token in self.live:
            token.state["score"] = 0.0


H2O_MUTATIONS = [ProtectsOneMore, NewTokenStartsAtZero, EvictsAfterAttention, ScoresFromDecodeOnly]


@pytest.fixture(scope="module")
def calls() -> list[torch.Tensor]:
    return harness.split(tiny.tokens(110, seed=41), 50)


@pytest.fixture(scope="module")
def auv(llama: PreTrainedModel, calls: list[torch.Tensor]) -> list[harness.Call]:
    return harness.run_package(llama, calls, policy="auv", slots=25)[0]


@pytest.fixture(scope="module")
def h2o(llama: PreTrainedModel, calls: list[torch.Tensor]) -> list[harness.Call]:
    return harness.run_package(llama, calls, policy="h2o", slots=16)[0]


def test_without_mutation_auv_agrees(
    llama: PreTrainedModel, calls: list[torch.Tensor], auv: list[harness.Call]
) -> None:
    harness.compare(auv, harness.run_naive(llama, calls, lambda: NaiveAuv(slots=25))[0])


@pytest.mark.parametrize("mutation", AUV_MUTATIONS)
def test_auv_mutation_is_detected(
    llama: PreTrainedModel, calls: list[torch.Tensor], auv: list[harness.Call], mutation: type[NaiveAuv]
) -> None:
    mutated, _ = harness.run_naive(llama, calls, lambda: mutation(slots=25))
    with pytest.raises(harness.Mismatch):
        harness.compare(auv, mutated)


def test_without_mutation_h2o_agrees(
    llama: PreTrainedModel, calls: list[torch.Tensor], h2o: list[harness.Call]
) -> None:
    harness.compare(h2o, harness.run_naive(llama, calls, lambda: NaiveH2o(16))[0])


@pytest.mark.parametrize("mutation", H2O_MUTATIONS)
def test_h2o_mutation_is_detected(
    llama: PreTrainedModel, calls: list[torch.Tensor], h2o: list[harness.Call], mutation: type[NaiveH2o]
) -> None:
    mutated, _ = harness.run_naive(llama, calls, lambda: mutation(16))
    with pytest.raises(harness.Mismatch):
        harness.compare(h2o, mutated)


@pytest.mark.parametrize("policy", ["auv", "h2o"])
def test_the_wrong_tie_rule_is_detected(monkeypatch: pytest.MonkeyPatch, policy: str) -> None:
    """On the constructed ties of tiny.tie_opt the newer token goes instead."""
    model = tiny.tie_opt()
    calls = harness.split(torch.tensor([[tiny.HEAVY] + [tiny.LIGHT] * 49]), 30)
    actual, _ = harness.run_package(model, calls, policy=policy, slots=13)

    def oracle() -> list[harness.Call]:
        return harness.run_naive(model, calls, lambda: {"auv": NaiveAuv, "h2o": NaiveH2o}[policy](slots=13))[0]

    harness.compare(actual, oracle())

    def newer_first(items: list[Token], score: object, count: int) -> list[Token]:
        return sorted(items, key=lambda token: (score(token), -token.position))[:count]  # type: ignore[operator]

    monkeypatch.setattr(naive, "lowest", newer_first)
    with pytest.raises(harness.Mismatch):
        harness.compare(actual, oracle())


def test_positions_that_count_slots_are_detected(opt: PreTrainedModel, calls: list[torch.Tensor]) -> None:
    """If get_seq_length() told the slots held, OPT's learned positions would drift: the harness asks every call."""
    from tests.numerics.naive import NaiveCache

    class SlotsHeld(NaiveCache):
        def get_seq_length(self, layer_idx: int = 0) -> int:
            heads = self.layers[0].heads
            return len(heads[0].live) if heads else 0

    cache = SlotsHeld(opt.config, lambda: NaiveAuv(slots=25))
    with harness.attention(opt, "naive"), pytest.raises(harness.Mismatch, match="get_seq_length"):
        harness.feed(opt, cache, calls, dict)

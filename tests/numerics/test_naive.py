"""The oracle checked against itself, against transformers, and by hand: it must be right before it judges."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from tests import tiny
from tests.numerics import harness
from tests.numerics.naive import NaiveAuv, NaiveH2o, NaiveHead

PROMPT, STEPS = 40, 60


def eager(model: PreTrainedModel, calls: list[torch.Tensor]) -> torch.Tensor:
    """[N, V]: transformers' own eager attention over a cache that keeps everything."""
    cache = DynamicCache(config=model.config)
    with harness.attention(model, "eager"), torch.no_grad():
        return torch.cat([model(ids, past_key_values=cache, use_cache=True).logits[0] for ids in calls])


def logits(trace: list[harness.Call]) -> torch.Tensor:
    return torch.cat([call.logits for call in trace])


def head_of(head: NaiveHead, keys: list[list[float]], query: list[float], at_once: bool = True) -> NaiveHead:
    """Feed keys (values equal keys), one query vector for every row, scaling 1."""
    k = torch.tensor(keys)
    for part in [k] if at_once else list(k.split(1)):
        head.forward(torch.tensor(query).expand(1, len(part), -1), part, part, 1.0)
    return head


class TestAgainstTransformers:
    @pytest.mark.parametrize("chunks", [None, [7, 20, 13]])
    def test_full_equals_eager(self, model: PreTrainedModel, chunks: list[int] | None) -> None:
        calls = harness.split(tiny.tokens(PROMPT + STEPS, 1), PROMPT, chunks)
        trace, _ = harness.run_naive(model, calls, NaiveHead)
        torch.testing.assert_close(logits(trace), eager(model, calls), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("make", [lambda: NaiveAuv(slots=400), lambda: NaiveH2o(slots=400)], ids=["auv", "h2o"])
    def test_a_budget_that_never_binds_equals_full(self, model: PreTrainedModel, make: object) -> None:
        calls = harness.split(tiny.tokens(PROMPT + STEPS, 1), PROMPT)
        full, _ = harness.run_naive(model, calls, NaiveHead)
        trace, _ = harness.run_naive(model, calls, make)  # type: ignore[arg-type]
        torch.testing.assert_close(logits(trace), logits(full), rtol=0, atol=0)

    @pytest.mark.parametrize("make", [lambda: NaiveAuv(slots=25), lambda: NaiveH2o(slots=25)], ids=["auv", "h2o"])
    def test_a_quarter_of_the_cache_changes_the_logits(self, model: PreTrainedModel, make: object) -> None:
        calls = harness.split(tiny.tokens(100 + STEPS, 1), 100)
        full, _ = harness.run_naive(model, calls, NaiveHead)
        trace, cache = harness.run_naive(model, calls, make)  # type: ignore[arg-type]
        a, b = logits(trace)[100:], logits(full)[100:]
        assert (a - b).norm() / b.norm() > 1e-2
        # and the reason: a row's best key gets several times its even share
        rows = torch.tensor(cache.heads()[0].largest_probability)
        assert rows[20:].mean() > 0.2

    def test_double_precision_changes_no_decision(self, model: PreTrainedModel) -> None:
        """Same decisions and 1e-4 logits in fp32 and fp64: the checkpoint is not too sharp for fp32 comparisons."""
        calls = harness.split(tiny.tokens(PROMPT + STEPS, 2), PROMPT)
        single, cache = harness.run_naive(model, calls, lambda: NaiveAuv(slots=25))
        double, _ = harness.run_naive(model, calls, lambda: NaiveAuv(slots=25, dtype=torch.float64))
        assert cache.smallest_margin() > harness.CLEAR
        harness.compare(single, double)


class TestAuvByHand:
    def test_figure_2(self) -> None:
        head = head_of(NaiveAuv(slots=100), [[1.0], [2.0], [3.0], [4.0]], [0.0])
        view = head.snapshot()
        assert view["state"]["aas"] == pytest.approx([0.25] * 4)
        assert view["state"]["cnt"] == [4, 3, 2, 1]
        assert view["state"]["usage"] == [0, 0, 0, 0]

    def test_a_flat_prompt_is_cut_and_folded(self) -> None:
        """n = 6 equal logits, L = 1: all AAS are 1/6, so the oldest go: 0..3, leaving 4 (scored) and 5 (local)."""
        head = head_of(NaiveAuv(slots=4), [[float(j)] for j in range(6)], [0.0])
        view = head.snapshot()
        assert view["positions"] == [4, 5]
        assert view["pointer"] == 2
        assert view["reconstructed"]["mass"] == pytest.approx(4 / 6)
        assert view["reconstructed"]["key"].item() == pytest.approx((0 + 1 + 2 + 3) / 4)

    def test_a_prompt_below_3l_is_kept_whole(self) -> None:
        head = head_of(NaiveAuv(slots=10), [[float(j)] for j in range(8)], [0.0])  # L = 3
        assert head.snapshot()["positions"] == list(range(8))
        head = head_of(NaiveAuv(slots=10), [[float(j)] for j in range(9)], [0.0])
        assert len(head.snapshot()["positions"]) == 6

    def test_two_decode_steps(self) -> None:
        """L = 1, slots 3 and one. Prompt of 2 flat tokens: AAS = [1/2, 1/2], cnt = [2, 1].

        The third token sees 3 equal keys: a = 1/3, N_t / N_max = 3/2, so every new score is 1/2:
        AAS = [(1/2 + 2/2)/3, (1/2 + 1/2)/2, 1/2] = [1/2, 1/2, 1/2], cnt = [3, 2, 1]; k = 1, tie: the newest is used.
        The pointer is at 3L: c = U * max + AAS = [1/2, 1/2] over the candidates, the older goes: position 0, folded
        with AES 1/2. U = (0, 1) - 0, halved: (0, 1/2).
        """
        head = head_of(NaiveAuv(slots=4), [[1.0], [2.0]], [0.0])
        head_of(head, [[3.0]], [0.0])
        view = head.snapshot()
        assert view["positions"] == [1, 2]
        assert view["state"]["aas"] == pytest.approx([0.5, 0.5])
        assert view["state"]["cnt"] == [2, 1]
        assert view["state"]["usage"] == [0.0, 0.5]
        assert view["reconstructed"]["mass"] == pytest.approx(0.5)
        assert view["reconstructed"]["key"].item() == pytest.approx(1.0)
        # The fourth sees 3 slots and the reconstructed one: a = 1/4, N_t = 4, so again everything stays at 1/2. Used:
        # the newest. c = [0 + 1/2, 1/2 * 1/2 + 1/2]: position 1 goes, r̄ = (1 * 1/2 + 2 * 1/2) / 1.
        head_of(head, [[4.0]], [0.0])
        view = head.snapshot()
        assert view["positions"] == [2, 3]
        assert view["state"]["aas"] == pytest.approx([0.5, 0.5])
        assert view["state"]["usage"] == [0.0, 0.25]  # (1/2, 1) - 1/2, halved
        assert view["reconstructed"]["mass"] == pytest.approx(1.0)
        assert view["reconstructed"]["key"].item() == pytest.approx(1.5)

    def test_grouped_heads_are_averaged(self) -> None:
        """Head one gives all to key 0, head two half each (logits ±200): mean 3/4 and 1/4 of the second row."""
        head = NaiveAuv(slots=100)
        query = torch.tensor([[[400.0], [400.0]], [[0.0], [0.0]]])  # [G, T, D]
        key = torch.tensor([[0.5], [-0.5]])
        head.forward(query, key, key, 1.0)
        assert head.snapshot()["state"]["aas"] == pytest.approx([(1 / 2 + 3 / 4) / 2, 1 / 4])

    def test_zero_mass_stays_masked(self) -> None:
        """All that is evicted has AAS 0: nothing is averaged, nothing is divided by zero."""
        keys = [[400.0], *[[0.0]] * 8]
        head = head_of(NaiveAuv(slots=4), keys, [1.0])
        view = head.snapshot()
        assert view["positions"] == [0, 8]
        assert view["reconstructed"] is None


class TestH2oByHand:
    def test_prompt_and_one_step(self) -> None:
        """Five flat tokens, B = 4: S = [137/60, 77/60, 47/60, 27/60, 12/60]; 3 and 4 are recent, 2 goes."""
        head = head_of(NaiveH2o(slots=4), [[0.0]] * 5, [0.0])
        view = head.snapshot()
        assert view["positions"] == [0, 1, 3, 4]
        assert view["state"]["score"] == pytest.approx([137 / 60, 77 / 60, 27 / 60, 12 / 60])
        # On arrival of 5 the protected are 4 and 5; the least of 0, 1, 3 is 3; then four keys share the row.
        head_of(head, [[0.0]], [0.0])
        view = head.snapshot()
        assert view["positions"] == [0, 1, 4, 5]
        assert view["state"]["score"] == pytest.approx([137 / 60 + 1 / 4, 77 / 60 + 1 / 4, 12 / 60 + 1 / 4, 1 / 4])

    def test_odd_slots_round_the_recent_share_down(self) -> None:
        head = head_of(NaiveH2o(slots=3), [[0.0]] * 5, [0.0])
        assert head.snapshot()["positions"] == [0, 1, 4]


class TestChunks:
    @pytest.mark.parametrize("make", [lambda: NaiveAuv(slots=142, n_max=40), lambda: NaiveH2o(slots=100)])
    def test_chunks_equal_one_call_until_the_first_eviction(self, model: PreTrainedModel, make: object) -> None:
        stream = tiny.tokens(PROMPT + 5, 3)
        once, _ = harness.run_naive(model, harness.split(stream, PROMPT), make)  # type: ignore[arg-type]
        parts, _ = harness.run_naive(model, harness.split(stream, PROMPT, [11, 2, 27]), make)  # type: ignore[arg-type]
        for place, view in once[0].heads.items():
            harness.compare_head(parts[2].heads[place], view, f"after the prompt, {place}")
        harness.compare(parts[3:], once[1:])

    def test_n_max_cancels(self, model: PreTrainedModel) -> None:
        calls = harness.split(tiny.tokens(PROMPT + STEPS, 4), PROMPT)
        plain, _ = harness.run_naive(model, calls, lambda: NaiveAuv(slots=25))
        other, _ = harness.run_naive(model, calls, lambda: NaiveAuv(slots=25, n_max=7 * PROMPT))
        harness.compare(other, plain, scale=1 / 7)


def test_the_margin_of_a_decision() -> None:
    head = head_of(NaiveH2o(slots=4), [[0.0]] * 5, [0.0])
    assert math.isclose(head.smallest_margin, (77 - 47) / 77, rel_tol=1e-6)

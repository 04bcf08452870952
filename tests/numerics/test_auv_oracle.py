"""AUV in the package against the naive oracle: everything it holds, after every call, for 200 decode steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests import tiny
from tests.numerics import harness
from tests.numerics.naive import NaiveAuv

# prompt length, decode steps, chunks (None: one call), options of the policy. Both models run the first two.
BOTH = ("one-shot", "chunked")
CASES: dict[str, tuple[int, int, list[int] | None, dict[str, Any]]] = {
    "one-shot": (96, 200, None, {"slots": 25}),
    "chunked": (96, 200, [30, 2, 40, 24], {"slots": 25}),
    "short prompt": (10, 100, None, {"slots": 25}),
    "no reconstructed slot": (60, 80, None, {"slots": 24, "reconstruct": False}),
    "top_k and decay": (60, 100, [25, 35], {"slots": 33, "top_k": 3, "decay": 0.9}),
    "slots that three does not divide": (50, 80, [4, 46], {"slots": 21, "decay": 1.0}),
    "least memory": (40, 40, [3, 17, 20], {"slots": 4}),
}


@pytest.mark.parametrize(("model", "case"), harness.model_cases(CASES, BOTH), indirect=["model"])
def test_every_step_matches_the_oracle(model: PreTrainedModel, case: str) -> None:
    prompt, steps, chunks, options = CASES[case]
    calls = harness.split(tiny.tokens(prompt + steps, seed=11), prompt, chunks)
    expected, naive = harness.run_naive(model, calls, lambda: NaiveAuv(n_max=prompt, **options))
    assert naive.smallest_margin() > harness.CLEAR, "a decision of this stream is too close to judge: take another seed"
    actual, _ = harness.run_package(model, calls, begin=prompt, policy="auv", **options)
    assert harness.evictions(expected) >= 9
    harness.compare(actual, expected)


def test_n_max_defaults_to_the_first_call(llama: PreTrainedModel) -> None:
    calls = harness.split(tiny.tokens(60, seed=12), 50, [20, 30])
    expected, _ = harness.run_naive(llama, calls, lambda: NaiveAuv(slots=25))
    actual, _ = harness.run_package(llama, calls, policy="auv", slots=25)
    harness.compare(actual, expected)


def test_rows_of_a_batch_are_independent(model: PreTrainedModel) -> None:
    streams = [tiny.tokens(90, seed=13), tiny.tokens(90, seed=14)]
    calls = harness.split(torch.cat(streams), 50)
    for row, stream in enumerate(streams):
        expected, naive = harness.run_naive(model, harness.split(stream, 50), lambda: NaiveAuv(slots=25))
        assert naive.smallest_margin() > harness.CLEAR
        actual, _ = harness.run_package(model, calls, row=row, policy="auv", slots=25)
        harness.compare(actual, expected)


@pytest.mark.parametrize("pads", [13, 38], ids=["some", "most"])
def test_left_padding_takes_no_part(opt: PreTrainedModel, pads: int) -> None:
    """The padded row holds and says what it would alone; with 38 pads its 12 tokens are kept whole while row 0 evicts.

    OPT only: it takes its positions from the mask, while Llama would need explicit position ids.
    """
    alone = tiny.tokens(90 - pads, seed=15)
    padded = torch.cat([torch.zeros(1, pads, dtype=torch.long), alone], dim=1)
    streams = torch.cat([tiny.tokens(90, seed=16), padded])
    mask = torch.ones_like(streams)
    mask[1, :pads] = 0

    expected, naive = harness.run_naive(opt, harness.split(alone, 50 - pads), lambda: NaiveAuv(slots=25))
    assert naive.smallest_margin() > harness.CLEAR
    calls = harness.split(streams, 50)
    actual, _ = harness.run_package(opt, calls, row=1, mask=mask, begin=50 - pads, policy="auv", slots=25)
    actual[0].logits = actual[0].logits[pads:]  # what a query at a pad says means nothing
    harness.compare(actual, expected)


def test_n_max_defaults_to_the_valid_tokens(opt: PreTrainedModel) -> None:
    """N_max is "one constant per sequence (the prompt's length)", and the length is counted "in valid tokens"."""
    alone, pads = tiny.tokens(40, seed=15), 10
    padded = torch.cat([torch.zeros(1, pads, dtype=torch.long), alone], dim=1)
    mask = torch.ones_like(padded)
    mask[0, :pads] = 0
    expected, _ = harness.run_naive(opt, [alone], lambda: NaiveAuv(slots=25))
    actual, _ = harness.run_package(opt, [padded], mask=mask, policy="auv", slots=25)
    harness.compare(actual, expected, logits=False)


@pytest.mark.parametrize("chunks", [None, [530, 70]], ids=["one-shot", "chunked"])
def test_a_long_prompt(llama: PreTrainedModel, chunks: list[int] | None) -> None:
    """Longer than the blocks in which fused attention kernels work."""
    calls = harness.split(tiny.tokens(605, seed=22), 600, chunks)
    expected, naive = harness.run_naive(llama, calls, lambda: NaiveAuv(slots=151, n_max=600))
    assert naive.smallest_margin() > harness.CLEAR
    actual, _ = harness.run_package(llama, calls, begin=600, policy="auv", slots=151)
    harness.compare(actual, expected)


def test_a_chunk_after_decoding(llama: PreTrainedModel) -> None:
    """A second turn: the rule of a chunk applies to whatever the slots hold, usage counts included."""
    sizes = [40, *[1] * 13, 30, *[1] * 20, 5, *[1] * 20]
    calls = list(torch.split(tiny.tokens(sum(sizes), seed=27), sizes, dim=1))
    expected, naive = harness.run_naive(llama, calls, lambda: NaiveAuv(slots=25))
    assert naive.smallest_margin() > harness.CLEAR
    actual, _ = harness.run_package(llama, calls, policy="auv", slots=25)
    harness.compare(actual, expected)


def test_a_cache_that_was_reset_is_a_new_one(llama: PreTrainedModel) -> None:
    first, second = (harness.split(tiny.tokens(70, seed=seed), 40) for seed in (23, 24))
    fresh, _ = harness.run_package(llama, second, policy="auv", slots=25)
    _, cache = harness.run_package(llama, first, policy="auv", slots=25)
    cache.reset()
    again, _ = harness.run_package(llama, second, cache=cache)
    harness.compare(again, fresh)


def test_state_is_single_precision_in_a_bfloat16_model() -> None:
    """bfloat16 counts to 256 and then stands still; the 302 queries that saw the first token must all be counted."""
    model = tiny.tiny_llama(layers=1).to(torch.bfloat16)
    actual, _ = harness.run_package(model, harness.split(tiny.tokens(302, seed=26), 300), policy="auv", slots=401)
    for view in actual[-1].heads.values():
        assert [int(cnt) for cnt in view["state"]["cnt"]] == list(range(302, 0, -1))
        aas = torch.tensor(view["state"]["aas"])
        assert (aas != aas.to(torch.bfloat16).float()).any()
        assert view["keys"].dtype == torch.bfloat16


# Ties that are exact in any order of summation: see tiny.tie_opt.
TIES = {
    "one heavy key first": [tiny.HEAVY] + [tiny.LIGHT] * 29,
    "heavy keys in the middle": [tiny.LIGHT] * 5 + [tiny.HEAVY] * 2 + [tiny.LIGHT] * 23,
}


@pytest.mark.parametrize("prompt", TIES)
def test_on_a_tie_the_older_token_goes(prompt: str) -> None:
    model = tiny.tie_opt()
    stream = torch.tensor([TIES[prompt] + [tiny.LIGHT] * 20])
    calls = harness.split(stream, 30)
    expected, naive = harness.run_naive(model, calls, lambda: NaiveAuv(slots=13))
    assert naive.smallest_margin() == 0.0  # there are ties
    actual, _ = harness.run_package(model, calls, policy="auv", slots=13)
    harness.compare(actual, expected)


@pytest.mark.parametrize("chunks", [None, [7, 12, 11]], ids=["one-shot", "chunked"])
def test_a_head_whose_reconstructed_slot_never_lives(chunks: list[int] | None) -> None:
    """Beside heads where it does: N_t, the mask and the fold are each head's own (see tiny.uneven_opt)."""
    model = tiny.uneven_opt()
    stream = tiny.tokens(90, seed=25)
    stream[stream == tiny.HEAVY] = tiny.LIGHT
    stream[0, 0] = tiny.HEAVY
    calls = harness.split(stream, 30, chunks)
    expected, _ = harness.run_naive(model, calls, lambda: NaiveAuv(slots=13, n_max=30))
    lives = {head: view["reconstructed"] is not None for (_, head), view in expected[-1].heads.items()}
    assert lives == {0: False, 1: True, 2: True, 3: True}
    actual, _ = harness.run_package(model, calls, begin=30, policy="auv", slots=13)
    harness.compare(actual, expected)


def test_figure_2() -> None:
    """Four tokens with equal logits: AAS = [.25, .25, .25, .25]."""
    actual, _ = harness.run_package(tiny.flat_opt(), [tiny.tokens(4, seed=17)], policy="auv", slots=25)
    for view in actual[0].heads.values():
        assert [float(x) for x in view["state"]["aas"]] == pytest.approx([0.25] * 4, abs=1e-6)
        assert [float(x) for x in view["state"]["cnt"]] == [4, 3, 2, 1]
        assert [float(x) for x in view["state"]["usage"]] == [0, 0, 0, 0]


@pytest.mark.parametrize(("model", "chunks"), [("opt", None), ("llama", [30, 20])], indirect=["model"])
def test_n_max_cancels(model: PreTrainedModel, chunks: list[int] | None) -> None:
    calls = harness.split(tiny.tokens(95, seed=18), 50, chunks)
    plain, _ = harness.run_package(model, calls, begin=50, policy="auv", slots=25)
    other, _ = harness.run_package(model, calls, begin=350, policy="auv", slots=25)
    assert harness.evictions(plain) >= 5
    harness.compare(other, plain, scale=1 / 7)


def test_chunks_equal_one_call_until_the_first_eviction(model: PreTrainedModel) -> None:
    """3L = 63: the prompt of 50 and 12 steps fit, and the 13th step evicts on both sides alike."""
    stream = tiny.tokens(70, seed=19)
    once, _ = harness.run_package(model, harness.split(stream, 50), begin=50, policy="auv", slots=64)
    parts, _ = harness.run_package(model, harness.split(stream, 50, [17, 2, 31]), begin=50, policy="auv", slots=64)
    assert harness.evictions(once) == 1
    for place, view in once[0].heads.items():
        harness.compare_head(parts[2].heads[place], view, f"after the prompt, (layer, head) {place}")
    harness.close(torch.cat([part.logits for part in parts[:3]]), once[0].logits, "prompt logits", harness.LOGITS)
    harness.compare(parts[3:], once[1:])


def test_a_prompt_is_cut_from_3l_tokens_on(opt: PreTrainedModel) -> None:
    """L = 8: 23 tokens are kept whole with the pointer behind them, 24 become the 16 of the candidate region."""
    for prompt, held in [(23, 23), (24, 16), (25, 16)]:
        actual, _ = harness.run_package(opt, [tiny.tokens(prompt, seed=20)], policy="auv", slots=25)
        for view in actual[0].heads.values():
            assert (len(view["positions"]), int(view["pointer"])) == (held, held)


def test_a_quarter_of_the_cache_changes_the_logits(model: PreTrainedModel) -> None:
    calls = harness.split(tiny.tokens(160, seed=21), 100)
    full, _ = harness.run_package(model, calls, policy="full")
    auv, _ = harness.run_package(model, calls, policy="auv", slots=25)
    a, b = (torch.cat([call.logits for call in trace[1:]]) for trace in (auv, full))
    assert (a - b).norm() / b.norm() > 1e-2

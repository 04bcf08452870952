"""H2O in the package against the naive oracle, after every call, for 200 decode steps."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from tests import tiny
from tests.numerics import harness
from tests.numerics.naive import NaiveH2o

# prompt length, decode steps, chunks (None: one call), slots. Both models run the first two.
BOTH = ("one-shot", "chunked")
CASES: dict[str, tuple[int, int, list[int] | None, int]] = {
    "one-shot": (80, 200, None, 16),
    "chunked": (80, 200, [30, 2, 28, 20], 16),
    "short prompt": (5, 80, None, 16),
    "odd slots": (40, 80, [15, 25], 15),
    "prompt of exactly the slots": (16, 80, None, 16),
    "two slots": (20, 80, None, 2),
}


@pytest.mark.parametrize(("model", "case"), harness.model_cases(CASES, BOTH), indirect=["model"])
def test_every_step_matches_the_oracle(model: PreTrainedModel, case: str) -> None:
    prompt, steps, chunks, slots = CASES[case]
    calls = harness.split(tiny.tokens(prompt + steps, seed=31), prompt, chunks)
    expected, naive = harness.run_naive(model, calls, lambda: NaiveH2o(slots))
    assert naive.smallest_margin() > harness.CLEAR, "a decision of this stream is too close to judge: take another seed"
    actual, _ = harness.run_package(model, calls, begin=prompt, policy="h2o", slots=slots)
    assert harness.evictions(expected) >= 50
    harness.compare(actual, expected)


def test_rows_of_a_batch_are_independent(model: PreTrainedModel) -> None:
    streams = [tiny.tokens(80, seed=32), tiny.tokens(80, seed=33)]
    calls = harness.split(torch.cat(streams), 40)
    for row, stream in enumerate(streams):
        expected, _ = harness.run_naive(model, harness.split(stream, 40), lambda: NaiveH2o(16))
        actual, _ = harness.run_package(model, calls, row=row, policy="h2o", slots=16)
        harness.compare(actual, expected)


@pytest.mark.parametrize("pads", [13, 30], ids=["some", "most"])
def test_left_padding_takes_no_part(opt: PreTrainedModel, pads: int) -> None:
    """OPT only: it takes its positions from the mask, while Llama would need explicit position ids."""
    alone = tiny.tokens(80 - pads, seed=34)
    padded = torch.cat([torch.zeros(1, pads, dtype=torch.long), alone], dim=1)
    streams = torch.cat([tiny.tokens(80, seed=35), padded])
    mask = torch.ones_like(streams)
    mask[1, :pads] = 0

    expected, _ = harness.run_naive(opt, harness.split(alone, 40 - pads), lambda: NaiveH2o(16))
    actual, _ = harness.run_package(opt, harness.split(streams, 40), row=1, mask=mask, policy="h2o", slots=16)
    actual[0].logits = actual[0].logits[pads:]  # what a query at a pad says means nothing
    harness.compare(actual, expected)


def test_on_a_tie_the_older_token_goes() -> None:
    """Every key after the heavy one has a score of exactly 0 (see tiny.tie_opt)."""
    model = tiny.tie_opt()
    calls = harness.split(torch.tensor([[tiny.HEAVY] + [tiny.LIGHT] * 49]), 30)
    expected, naive = harness.run_naive(model, calls, lambda: NaiveH2o(12))
    assert naive.smallest_margin() == 0.0
    actual, _ = harness.run_package(model, calls, policy="h2o", slots=12)
    harness.compare(actual, expected)


def test_flat_prompt_prefers_the_first_tokens() -> None:
    """The bias AUV removes: with equal logits the sums are 25/12, 13/12, 7/12, 3/12."""
    actual, _ = harness.run_package(tiny.flat_opt(), [tiny.tokens(4, seed=36)], policy="h2o", slots=8)
    for view in actual[0].heads.values():
        assert [float(x) for x in view["state"]["score"]] == pytest.approx([25 / 12, 13 / 12, 7 / 12, 3 / 12], abs=1e-6)


def test_chunks_equal_one_call_until_the_first_eviction(model: PreTrainedModel) -> None:
    stream = tiny.tokens(70, seed=37)
    once, _ = harness.run_package(model, harness.split(stream, 50), policy="h2o", slots=60)
    parts, _ = harness.run_package(model, harness.split(stream, 50, [17, 2, 31]), policy="h2o", slots=60)
    assert harness.evictions(once) == 10
    for place, view in once[0].heads.items():
        harness.compare_head(parts[2].heads[place], view, f"after the prompt, (layer, head) {place}")
    harness.compare(parts[3:], once[1:])


def test_a_quarter_of_the_cache_changes_the_logits(model: PreTrainedModel) -> None:
    calls = harness.split(tiny.tokens(160, seed=38), 100)
    full, _ = harness.run_package(model, calls, policy="full")
    h2o, _ = harness.run_package(model, calls, policy="h2o", slots=25)
    a, b = (torch.cat([call.logits for call in trace[1:]]) for trace in (h2o, full))
    assert (a - b).norm() / b.norm() > 1e-2

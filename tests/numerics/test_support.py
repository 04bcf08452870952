"""What runs where: the support matrix is tried out here, and docs/POLICIES.md must say the same."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from auvsum.cache.cache import BudgetedCache
from auvsum.cache.policy import ALIASES, make_policy, policy_class, policy_names
from auvsum.engine.generate import Engine, Request
from auvsum.errors import PolicyError
from auvsum.events import Finished
from tests import tiny
from tests.numerics import harness

DOCUMENT = Path(__file__).parents[2] / "docs" / "POLICIES.md"
MARK = "<!-- tried out and written by `python -m tests.numerics.test_support`: do not edit below -->\n"
PROMPT, NEW, SLOTS, CHUNK = 40, 6, 20, 15


def drop_in(policy: str, chunk: int | None, dtype: torch.dtype = torch.float32, bits: int = 16) -> str:
    """transformers' model called with a `BudgetedCache`."""
    model = tiny.tiny_llama(layers=1).to(dtype)
    calls = harness.split(tiny.tokens(PROMPT + NEW, 91), PROMPT, None if chunk is None else [15, 15, 10])
    cache = BudgetedCache(model.config, policy=policy, slots=None if policy == "full" else SLOTS, bits=bits)
    with harness.attention(model, "auvsum"), torch.no_grad():
        for ids in calls:
            assert torch.isfinite(model(ids, past_key_values=cache).logits).all()
    return "yes"


def engine(policy: str, chunk: int | None, bits: int = 16, dtype: torch.dtype = torch.float32) -> str:
    model = tiny.tiny_llama(layers=1).to(dtype)
    slots = PROMPT + NEW if policy == "full" else max(SLOTS, make_policy(policy).least_slots)
    with harness.attention(model, "auvsum"):
        events = list(Engine(model, make_policy(policy), chunk=chunk, bits=bits).run(
            [Request(tiny.tokens(PROMPT, 91)[0].tolist(), slots, NEW)]
        ))  # fmt: skip
    assert isinstance(events[-1], Finished)
    return "yes"


def fused(policy: str) -> str:
    """Whether the decode step's kernel (on a GPU) takes the policy; the others run in plain torch there."""
    from auvsum.kernels import decode_step

    if policy_class(policy).by_head:
        return "plain torch"
    model = tiny.tiny_llama(layers=1)
    cache = BudgetedCache(model.config, policy=policy, slots=None if policy == "full" else SLOTS)
    with harness.attention(model, "auvsum"), torch.no_grad():
        model(tiny.tokens(PROMPT, 91), past_key_values=cache)
    taken = all(decode_step.supports(layer.policy, layer.store) for layer in cache.layers)
    return "yes" if taken else "plain torch"


def few_bits(policy: str) -> str:
    """Slots of 8 and 4 bits, in the engine."""
    return "yes" if {engine(policy, None, bits, torch.bfloat16) for bits in (8, 4)} == {"yes"} else "no"


def tried(policy: str) -> list[str]:
    """The cells of one policy; a refusal must name the policy and say what else to do."""
    cells = []
    for run in (drop_in, engine):
        for chunk in (None, CHUNK):
            try:
                cells.append(run(policy, chunk))
            except PolicyError as error:
                named = policy in error.message and bool(error.hint)
                cells.append("refused" if named else f"refused without a name: {error}")
    return [*cells, fused(policy), engine(policy, None, 16, torch.bfloat16), few_bits(policy)]


def document() -> str:
    lines = [
        "| policy | drop-in, one pass | drop-in, chunks | engine, one pass | engine, chunks | "
        "fused step | 16 bit | 8, 4 bit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [f"| `{name}` | {' | '.join(tried(name))} |" for name in policy_names()]
    lines += ["", "| policy | options | least slots | evicts | from |", "|---|---|---|---|---|"]
    for name in policy_names():
        found = policy_class(name)
        options = ", ".join(f"`{f.name}={f.default}`" for f in dataclasses.fields(found) if f.init) or "none"
        also = "".join(f", `{alias}`" for alias, target in ALIASES.items() if target == name)
        lines.append(f"| `{name}`{also} | {options} | {found().least_slots} | {found.evicts} | {found.paper} |")
    return "\n".join(lines) + "\n"


def test_the_document_is_true() -> None:
    pytest.importorskip("triton", reason="the fused step's column needs Triton")
    _head, mark, table = DOCUMENT.read_text(encoding="utf-8").partition(MARK)
    assert mark, f"{DOCUMENT} has lost its mark"
    assert table == document(), "docs/POLICIES.md is out of date: run `python -m tests.numerics.test_support`"


@pytest.mark.parametrize("policy", harness.SLOT_POLICIES)
def test_16_bit_models_keep_their_state_in_fp32(policy: str) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        model = tiny.tiny_llama(layers=1).to(dtype)
        calls = harness.split(tiny.tokens(PROMPT + NEW, 92), PROMPT)
        trace, cache = harness.run_package(model, calls, policy=policy, slots=SLOTS)
        store = cache.layers[0].store
        assert {values.dtype for values in store.state.values()} <= {torch.float32}
        assert store.keys[0].dtype == dtype
        assert torch.isfinite(trace[-1].logits).all()


if __name__ == "__main__":
    before, _, _ = DOCUMENT.read_text(encoding="utf-8").partition(MARK)
    DOCUMENT.write_text(before + MARK + document(), encoding="utf-8")

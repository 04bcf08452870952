"""The rows of a table: every policy at every budget, and the rows that are not ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from auvsum.budget import CacheShape, ResolvedBudget, Scope, parse_budget, resolve
from auvsum.cache.policy import Policy, make_policy
from auvsum.eval.config import EvalConfig, split_policy

#: `cache`: a policy under a budget. `cut`: the truncated prompt. `full`: the full cache. `text`: no model at all.
Kind = Literal["full", "text", "cut", "cache"]
FIRST_WORDS, LEXRANK, FULL = "first words", "LexRank", "full"


@dataclass(frozen=True)
class Cell:
    """A row of the table. `label` is the policy as it was written, or what the row is."""

    kind: Kind
    label: str
    policy: Policy | None = None
    budget: str = ""
    scope: Scope = "bytes"
    kv_bits: int = 16

    @property
    def name(self) -> str:
        """Unique in a run: `auv @ 10%`, `auv @ 10% paper 4-bit`."""
        parts = [self.label]
        if self.budget:
            parts.append(f"@ {self.budget}")
        if self.scope == "paper":
            parts.append("paper")
        if self.kv_bits != 16:
            parts.append(f"{self.kv_bits}-bit")
        return " ".join(parts)


def cells(config: EvalConfig) -> list[Cell]:
    """All rows of a run, those that are not ours first.

    Raises:
        PolicyError: an unknown policy or option.
    """
    policies = []
    for spec in config.policies:
        name, options = split_policy(spec)
        policies.append((spec, make_policy(name, **options)))
    found = [Cell("full", FULL), Cell("text", FIRST_WORDS), Cell("text", LEXRANK)]
    found += [Cell("cut", "truncated prompt", make_policy("full"), budget) for budget in config.budgets]
    for scope in config.budget_scopes:
        for budget in config.budgets:
            for bits in config.kv_bits:
                found += [
                    Cell("cache", spec, policy, budget, "paper" if scope == "paper" else "bytes", bits)
                    for spec, policy in policies
                    if policy.name != "full"
                ]
    return found


def resolved(cell: Cell, shape: CacheShape, prompt_tokens: int, max_new_tokens: int) -> ResolvedBudget:
    """The slots and bytes of a cell for one prompt.

    Raises:
        BudgetError: too small for the policy.
    """
    assert cell.policy is not None
    policy = cell.policy
    cost = policy.slot_cost(
        kv_heads=shape.kv_heads, head_dim=shape.head_dim, element_bytes=shape.element_bytes, bits=cell.kv_bits
    )
    return resolve(
        parse_budget(cell.budget, cell.scope),
        shape=shape,
        cost=cost,
        prompt_tokens=prompt_tokens,
        max_new_tokens=max_new_tokens,
        least_slots=policy.least_slots,
        slots_to_hold=policy.slots_to_hold,
        paper_slots=policy.paper_slots,
        free_bytes=0,
    )


def tenths(kept: Sequence[float], start: int, end: int) -> list[float]:
    """The mean kept share in each tenth of the document `[start, end)`; fewer numbers for fewer than ten tokens."""
    parts = min(10, end - start)
    edges = [start + (end - start) * i // parts for i in range(parts + 1)]
    return [round(sum(kept[a:b]) / (b - a), 4) for a, b in pairwise(edges)]


def shade(kept: Sequence[float]) -> str:
    """A kept share a token as one digit: 0 for none, 9 for all layers and heads."""
    return "".join(str(min(9, int(share * 9 + 0.999))) for share in kept)

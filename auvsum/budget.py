"""Budgets: `auto` | `4%` | `512` | `64MiB` -> slots per layer. No torch in here: `--dry-run` and errors must be quick.

A *slot* holds one token's key and value of one layer (all its KV heads) and the policy's state for it. A budget is a
hard cap on the bytes a sequence's cache occupies from the end of prefill on, policy state included (`scope="bytes"`),
or the accounting of the AUV paper (`scope="paper"`): a share of the prompt's *tokens*, state not counted, AUV's write
region on top (2L = 4% of n, so 3L slots at the peak).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from auvsum.errors import BudgetError

Kind = Literal["auto", "share", "slots", "bytes"]
Scope = Literal["bytes", "paper"]

GRAMMAR_HINT = "write auto, a share like 4%, a number of slots like 512, or a size like 64MiB"
#: Below this many slots per layer a summary is rarely sensible; a warning says so.
SENSIBLE_SLOTS = 64
#: `auto` keeps the full cache while it fits in this share of the free memory.
AUTO_SHARE = 0.25

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_PATTERN = re.compile(r"(?P<number>[+-]?(\d+(\.\d*)?|\.\d+))(?P<unit>%|[A-Za-z]+)?\Z")


@dataclass(frozen=True)
class Budget:
    """A budget as asked for, not yet resolved against a model and a prompt. `share` is a fraction in (0, 1]."""

    asked: str
    kind: Kind
    value: float = 0.0
    scope: Scope = "bytes"


def parse_budget(text: str, scope: Scope = "bytes") -> Budget:
    """Reads the budget grammar.

    Raises:
        BudgetError: for anything that is not `auto`, `P%` (0 < P <= 100), a whole number of slots, or a size.
    """
    if scope not in ("bytes", "paper"):
        raise BudgetError(f"budget scope {scope!r} is unknown", "use 'bytes' or 'paper'")
    if text == "auto":
        return Budget(text, "auto", scope=scope)
    match = _PATTERN.match(text)
    if match is None:
        raise BudgetError(f"budget {text!r} is not understood", GRAMMAR_HINT)
    number, unit = float(match["number"]), match["unit"]
    if number <= 0:
        raise BudgetError(f"budget {text!r} must be more than zero", GRAMMAR_HINT)
    if unit == "%":
        if number > 100:
            raise BudgetError(f"budget {text!r} is more than 100%", "use a share of at most 100%, or auto")
        return Budget(text, "share", number / 100, scope)
    if unit is None:
        if not number.is_integer():
            raise BudgetError(f"budget {text!r} is not a whole number of slots", GRAMMAR_HINT)
        return Budget(text, "slots", number, scope)
    if unit.upper() not in _UNITS:
        raise BudgetError(f"budget {text!r} has an unknown unit {unit!r}", "units are %, B, KB, MB, GB, KiB, MiB, GiB")
    if scope == "paper":
        raise BudgetError(f"budget {text!r} is a size, but the paper counts tokens", "use a share or a number of slots")
    return Budget(text, "bytes", number * _UNITS[unit.upper()])


@dataclass(frozen=True)
class CacheShape:
    """What one token costs in a full cache: `layers` x 2 x `kv_heads` x `head_dim` x `element_bytes`.

    Attributes:
        windows: of the layers with a sliding window, which never hold more tokens than that.
    """

    layers: int
    kv_heads: int
    head_dim: int
    element_bytes: int
    windows: tuple[int, ...] = ()

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values over all layers."""
        return self.layers * 2 * self.kv_heads * self.head_dim * self.element_bytes

    @property
    def without_windows(self) -> CacheShape:
        """The layers with full attention alone, which share what a budget grants."""
        return CacheShape(self.layers - len(self.windows), self.kv_heads, self.head_dim, self.element_bytes)

    def full_bytes(self, tokens: int) -> int:
        """Bytes of the keys and values of that many tokens in a cache that loses nothing it will need."""
        missing = sum(max(0, tokens - window) for window in self.windows)
        return tokens * self.token_bytes - missing * (self.token_bytes // self.layers)


@dataclass(frozen=True)
class SlotCost:
    """What a policy's store allocates in one layer for one sequence: `fixed + slots * per_slot` bytes.

    Computed by the policy (`Policy.slot_cost`), so that the arithmetic here and the allocation there are one number.
    """

    per_slot: int
    fixed: int


@dataclass(frozen=True)
class ResolvedBudget:
    """A budget in slots per layer, and what it means in bytes for one sequence."""

    asked: str
    scope: Scope
    slots: int
    bytes: int
    full_bytes: int
    prompt_tokens: int
    never_binds: bool
    layers: int

    def echo(self) -> str:
        """One line for people: `4% of 18,312 tokens = 732 slots/layer, 51 MiB (full: 1.3 GiB)`."""
        of = f" of {self.prompt_tokens:,} tokens" if self.asked.endswith("%") or self.asked == "auto" else ""
        line = f"{self.asked}{of} = {self.slots:,} slots/layer, {size(self.bytes)} (full: {size(self.full_bytes)})"
        if self.scope == "paper":
            line += " [paper's accounting]"
        return line + (", never binds" if self.never_binds else "")


def resolve(
    budget: Budget,
    *,
    shape: CacheShape,
    cost: SlotCost,
    prompt_tokens: int,
    max_new_tokens: int,
    least_slots: int,
    slots_to_hold: Callable[[int], int],
    paper_slots: Callable[[int], int],
    free_bytes: int,
    window_bytes: int = 0,
    most_slots: int | None = None,
) -> ResolvedBudget:
    """Turns a budget into slots per layer for one prompt.

    Args:
        cost: bytes per slot and fixed bytes per layer of the policy at hand.
        least_slots: the fewest slots the policy works with.
        slots_to_hold: slots with which the policy never evicts among that many tokens.
        paper_slots: slots the policy peaks at when the paper grants it that many tokens.
        free_bytes: free memory, for `auto`.
        window_bytes: what the layers with a sliding window hold; the budget's rest goes to the others.
        most_slots: slots that may be used at all, where something else than memory limits them.

    The slots are capped where the budget never binds, since more would be allocated for nothing.

    Raises:
        BudgetError: when fewer than `least_slots` fit; the message names the least budget that works.
    """
    total = prompt_tokens + max_new_tokens
    full_bytes = shape.full_bytes(prompt_tokens)
    layers = max(1, shape.layers - len(shape.windows))
    unbound = slots_to_hold(total)

    def bytes_of(slots: int) -> int:
        return window_bytes + layers * (cost.fixed + slots * cost.per_slot)

    def slots_in(size_bytes: float) -> int:
        return max(0, int(((size_bytes - window_bytes) / layers - cost.fixed) // cost.per_slot))

    if budget.kind == "auto":
        slots = min(unbound, slots_in(AUTO_SHARE * free_bytes))
    elif budget.kind == "slots":
        slots = int(budget.value) if budget.scope == "bytes" else paper_slots(int(budget.value))
    elif budget.kind == "bytes":
        slots = slots_in(budget.value)
    elif budget.scope == "paper":
        slots = paper_slots(int(budget.value * prompt_tokens))
    else:
        slots = slots_in(budget.value * full_bytes)

    slots = slots if most_slots is None else min(slots, most_slots)
    if slots < least_slots:
        least_bytes = bytes_of(least_slots)
        raise BudgetError(
            f"budget {budget.asked} gives {slots} slots per layer for {prompt_tokens:,} tokens, "
            f"but this policy needs at least {least_slots}",
            f"the least that works here is {_least(budget, least_slots, least_bytes, full_bytes)}",
        )
    slots = min(slots, unbound)
    return ResolvedBudget(
        asked=budget.asked,
        scope=budget.scope,
        slots=slots,
        bytes=bytes_of(slots),
        full_bytes=full_bytes,
        prompt_tokens=prompt_tokens,
        never_binds=slots >= unbound,
        layers=layers,
    )


def _least(budget: Budget, least_slots: int, least_bytes: int, full_bytes: int) -> str:
    """The least budget that works, in the unit it was asked in."""
    share = 100 * least_bytes / max(1, full_bytes)
    if budget.kind == "share" and budget.scope == "bytes" and share <= 100:
        return f"{math.ceil(share * 100) / 100:g}%"
    if budget.kind == "bytes":
        return f"{least_bytes}B ({size(least_bytes)})"
    return f"{least_slots} (slots)"


def size(n: float) -> str:
    """Bytes for people: `51.2 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024 or unit == "GiB":
            return f"{n:.0f} {unit}" if unit == "B" or n >= 100 else f"{n:.1f} {unit}"
        n /= 1024
    raise AssertionError("unreachable")

"""The protocol of an eviction policy. A policy is one frozen dataclass in one file of `policies/`, found by name.

`Policy` is what callers must know of any; `SlotPolicy` is one for a `SlotStore`, where all heads of a layer hold the
same number of tokens. It never touches keys or values: it turns attention probabilities into state and names slots.
"""

from __future__ import annotations

import abc
import dataclasses
import difflib
import importlib
import pkgutil
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from auvsum.budget import SlotCost
from auvsum.cache.codec import vector_bytes
from auvsum.cache.store import Held, SlotStore
from auvsum.errors import PolicyError
from auvsum.kernels import optional
from auvsum.kernels.column_scores import ChunkAttention


@dataclass(frozen=True)
class Policy(abc.ABC):
    """Base of all policies. Options are the dataclass's fields."""

    name: ClassVar[str]
    #: Where it is from.
    paper: ClassVar[str]
    #: Where it evicts, for `auvsum policies`.
    evicts: ClassVar[str]
    #: Names of its values per slot, and bytes of each.
    state: ClassVar[tuple[str, ...]] = ()
    state_element: ClassVar[int] = 4
    #: The state by which evicted tokens are weighted in the reconstructed K(V), where there is one.
    folds_by: ClassVar[str] = ""
    #: Whether a prompt may be read in chunks; False when the choice needs the prompt's last queries.
    streams: ClassVar[bool] = True
    #: Whether `observe` looks at the probabilities; where none does they need not be known.
    looks: ClassVar[bool] = True
    #: Whether all heads of a layer hold the same tokens.
    one_set: ClassVar[bool] = False
    #: Whether every head has its own number of tokens: `cache/heads.py` holds them instead of `SlotStore`.
    by_head: ClassVar[bool] = False

    @classmethod
    def build(cls, **options: Any) -> Policy:
        """The policy for these options, which are among its fields; an option may choose a relative."""
        return cls(**options)

    @property
    def keeps_reconstructed(self) -> bool:
        """Whether a reconstructed K(V) lives beside the slots."""
        return False

    @property
    def least_slots(self) -> int:
        """The fewest slots per layer it works with."""
        return 2

    def capacity(self, slots: int) -> int:
        """Of `slots` granted, how many hold tokens."""
        return slots

    def slots_to_hold(self, tokens: int) -> int:
        """The slots with which it never evicts among `tokens` tokens."""
        return max(tokens, self.least_slots)

    def layer_slots(self, slots: int, layers: int, prompt_tokens: int) -> list[int]:
        """How `slots` a layer are shared among the layers for one prompt; together never more than granted."""
        return [slots] * layers

    def paper_slots(self, tokens: int) -> int:
        """The slots it peaks at when granted `tokens` tokens in the AUV paper's accounting."""
        return tokens

    def slot_cost(self, *, kv_heads: int, head_dim: int, element_bytes: int, bits: int = 16) -> SlotCost:
        """What its store allocates in one layer for one sequence (`SlotStore` allocates exactly this)."""
        vector = vector_bytes(head_dim, element_bytes, bits)
        per_slot = kv_heads * (2 * vector + self.state_element * len(self.state) + _SLOT_BYTES)
        fixed = _ROW_BYTES + _HEAD_BYTES * kv_heads
        if self.keeps_reconstructed:
            fixed += kv_heads * (2 * head_dim + 1) * 4
        return SlotCost(per_slot=per_slot, fixed=fixed)

    def refuse_chunks(self) -> None:
        """Called before a prompt is read in chunks.

        Raises:
            PolicyError: it needs the whole prompt at once.
        """
        if not self.streams:
            raise PolicyError(
                f"policy {self.name!r} chooses by the prompt's last queries: it cannot read a prompt in chunks",
                "read the prompt in one pass (--strategy single), or use another policy: see `auvsum policies`",
            )


@dataclass(frozen=True)
class SlotPolicy(Policy):
    """A policy for a `SlotStore`.

    prompt (one-shot or in chunks)   observe_chunk(attention, held, store, row)   update the state of all candidates
                                     choose(held, capacity) -> columns to keep, or None for all
    decode, one token a row          place(store) -> the slot of the arriving token
                                     observe(store, probabilities)                after attention: update, maybe evict
    """

    # -- prompt -------------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def observe_chunk(self, attention: ChunkAttention, held: Held, store: SlotStore, row: int) -> None:
        """Updates `held.state` by what a chunk's queries paid attention to (columns as in `held`; a live
        reconstructed slot is the attention's column 0 and not among them: see `token_columns`)."""

    @abc.abstractmethod
    def choose(self, held: Held, capacity: int) -> Tensor | None:
        """The candidates to keep after a chunk, int64 `[G, kept]` in ascending order; None keeps all."""

    # -- decode -------------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def place(self, store: SlotStore) -> Tensor:
        """The slot each head gives to the arriving token, int64 `[B, G]`."""

    @abc.abstractmethod
    def observe(self, store: SlotStore, probabilities: Tensor) -> None:
        """Updates the state after a decode step.

        Args:
            probabilities: fp32 `[B, G, S (+ 1)]`, mean over the query heads of each KV head; 0 for dead slots. On a
                CPU empty for a policy that does not look at them.
        """


@dataclass(frozen=True)
class Deferring(SlotPolicy):
    """A policy that needs its books only where a row is full, so that those of several steps may be kept at once."""

    @abc.abstractmethod
    def observe_steps(self, store: SlotStore, probabilities: Tensor, live: Tensor) -> None:
        """Updates the state after T decode steps between which nothing was evicted.

        Args:
            probabilities: fp32 `[B, G, T, S (+ 1)]`. live: bool, what a step's query could see.
        """

    @abc.abstractmethod
    def advance(self, store: SlotStore) -> Tensor:
        """Ends a step: the pointers go on. Returns the rows that are full, int64 `[N]`."""

    @abc.abstractmethod
    def evict(self, store: SlotStore, full: Tensor) -> None:
        """Evicts in rows that are full, whose state is up to date."""

    def observe(self, store: SlotStore, probabilities: Tensor) -> None:
        self.observe_steps(store, probabilities[:, :, None], store.valid[:, :, None])
        if len(full := self.advance(store)):
            self.evict(store, full)


#: Position (int32) and validity (bool) of a slot, per KV head.
_SLOT_BYTES = 4 + 1
#: granted, capacity, pointer, seen (int64), longest (fp32), active (bool), and the store's row index (int64).
_ROW_BYTES = 8 + 8 + 8 + 8 + 4 + 1 + 8
#: The store's head index (int64).
_HEAD_BYTES = 8


def token_columns(values: Tensor, held: Held) -> Tensor:
    """Drops the reconstructed slot's column (the first, when it took part) from per-column values `[.., C]`."""
    return values[..., values.shape[-1] - held.size :]


def ascending(scores: Tensor, positions: Tensor | None = None) -> Tensor:
    """Indices that sort by (score, position): on a tie the older token comes first and so is evicted first.

    Args:
        scores: `[.., C]`. positions: same shape; None when the columns already are in order of position.
    """
    if positions is None:
        return scores.argsort(dim=-1, stable=True)
    by_position = positions.argsort(dim=-1)
    return by_position.gather(-1, scores.gather(-1, by_position).argsort(dim=-1, stable=True))


def least(scores: Tensor, positions: Tensor) -> Tensor:
    """The first of `ascending`, without sorting: int64 `[..]` for scores and positions `[.., C]`."""
    tied = scores == scores.amin(-1, keepdim=True)
    return positions.masked_fill(~tied, torch.iinfo(positions.dtype).max).argmin(-1)


def place_or_replace(store: SlotStore, scores: Tensor, protected: Tensor) -> Tensor:
    """The slot of each head's arriving token: the next free one, or, when all are live, that of the least score.

    Args:
        scores: `[B, G, S (+ 1)]`. protected: how many of a row's newest live tokens may not go, `[B]`.
    """
    slots = store.slots
    positions = store.positions[..., :slots]
    young = positions > (store.seen - 1 - protected)[:, None, None]
    outside = ~store.valid[..., :slots] | young
    victim = least(scores[..., :slots].masked_fill(outside, torch.inf), positions)
    pointer = store.pointer[:, None]
    return torch.where(pointer < store.capacity[:, None], pointer.expand_as(victim), victim)


def keep_recent_and_best(scores: Tensor, recent: int, best: int) -> Tensor:
    """The last `recent` columns and the `best` highest scores among the rest, in ascending order: int64 `[G, .]`.

    Columns are in order of position, `scores` is `[G, C]`, not negative.
    """
    kernel = _keep_kernel(scores.device.type)
    if kernel is not None and kernel.supports(scores):
        kept: Tensor = kernel.keep(scores, recent, best)
        return kept
    groups, columns = scores.shape
    older = columns - recent
    top = ascending(scores[:, :older])[:, older - best :]
    last = torch.arange(older, columns, device=scores.device).expand(groups, recent)
    return torch.cat([top.sort(-1).values, last], -1)


def _keep_kernel(device: str) -> ModuleType | None:
    """The kernel that chooses, for a type of device; None where plain torch does."""
    return optional("keep") if device == "cuda" else None


#: Another name of the same keys.
ALIASES = {"auv-paper": "auv", "lm-infinite": "streaming"}


def policy_names() -> list[str]:
    """The names of the policies, without aliases; nothing is imported to find them."""
    from auvsum.cache import policies

    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(policies.__path__))


def policy_class(name: str) -> type[Policy]:
    """The class behind a name or an alias; only its own module (and what that builds on) is imported.

    Raises:
        PolicyError: an unknown name, with the nearest one as the hint.
    """
    names = [*policy_names(), *ALIASES]
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        raise PolicyError(
            f"policy {name!r} is unknown",
            f"did you mean {near[0]!r}?" if near else f"policies are {', '.join(names)}",
        )
    module = importlib.import_module(f"auvsum.cache.policies.{ALIASES.get(name, name).replace('-', '_')}")
    found: type[Policy] = module.POLICY
    return found


def make_policy(name: str, **options: Any) -> Policy:
    """Builds a policy by name.

    Raises:
        PolicyError: an unknown name or option, with the nearest one as the hint, or options that contradict each other.
    """
    found = policy_class(name)
    known = [field.name for field in dataclasses.fields(found) if field.init]
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"its options are {', '.join(known) or 'none'}"
            raise PolicyError(f"policy {name!r} has no option {option!r}", hint)
    return found.build(**options)

"""BudgetedCache: the transformers side of the slot store. A drop-in for `past_key_values`.

import auvsum
model.set_attn_implementation("auvsum")
model.generate(ids, past_key_values=auvsum.BudgetedCache(model.config, policy="auv", slots=64))
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from auvsum.cache import attention as _attention
from auvsum.cache.policy import Policy, make_policy
from auvsum.cache.store import SlotStore
from auvsum.errors import PolicyError

#: The full cache without a given size grows by this many slots; every other store has a fixed size.
_GROWTH = 256


class LayerCache(CacheLayerMixin):  # type: ignore[misc]
    """One layer: a policy and its store. The store is allocated when the layer first sees a key, and then stays.

    Attributes:
        row: the row that a prompt is being read into; None when the batch of the call is the batch of the cache.
        reads_prompt: whether a single query is a one-token prompt chunk rather than a decode step.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, policy: Policy, slots: int | None, batch: int | None) -> None:
        super().__init__()
        self.policy = policy
        self.slots = slots
        self.batch = batch
        self.row: int | None = None
        self.reads_prompt = False
        self.columns = 0
        self.row_slots: dict[int, int] = {}
        self.longest: dict[int, int] = {}
        self.prefill_bytes = 0
        self.unread: set[int] = set()
        self._store: SlotStore | None = None

    @property
    def store(self) -> SlotStore:
        """The layer's memory.

        Raises:
            PolicyError: before the first token.
        """
        if self._store is None:
            raise PolicyError("the cache is empty", "run the model on a prompt first")
        return self._store

    @property
    def bytes(self) -> int:
        """Bytes allocated by this layer."""
        return 0 if self._store is None else self._store.bytes()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates the store in the keys' type and on their device."""
        batch, groups, chunk, size = key_states.shape
        slots = self.slots
        if slots is None:
            slots = chunk + _GROWTH
        if slots < self.policy.least_slots:
            raise PolicyError(
                f"policy {self.policy.name!r} needs at least {self.policy.least_slots} slots, not {slots}",
                f"give it {self.policy.least_slots} or more",
            )
        self._store = SlotStore(
            batch=self.batch or batch,
            kv_heads=groups,
            slots=self.policy.capacity(slots),
            head_dim=size,
            dtype=key_states.dtype,
            device=key_states.device,
            state=self.policy.state,
            reconstruct=self.policy.keeps_reconstructed,
        )
        self.unread = set(range(self.batch or batch))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Hands the new keys through to the attention function with a link to this layer, which gets no other."""
        if self._store is None:
            self.lazy_initialization(key_states, value_states)
        store, (batch, _groups, chunk, _size) = self.store, key_states.shape
        if self.row is None and batch != store.positions.shape[0]:
            raise PolicyError(
                f"the cache holds {store.positions.shape[0]} sequences, the model was called with {batch}",
                "beam search and changing batches are not supported: use num_beams=1 and a new cache",
            )
        if self.slots is None:
            self._make_room(chunk)
        if self.unread:
            for row in self.unread & set(range(batch) if self.row is None else (self.row,)):
                self._start(row, chunk)
        if self.row is None:
            self.columns += chunk
        # transformers passes the tensors on unchanged; an attribute is the one link that survives that way.
        key_states.auvsum_layer = self  # type: ignore[attr-defined]
        return key_states, value_states

    def _start(self, row: int, chunk: int) -> None:
        """The first tokens of a row: its own budget and its constant N_max (0: to be set by the first chunk read)."""
        self.unread.discard(row)
        slots = self.row_slots.get(row)
        self.store.clear(row, None if slots is None else self.policy.capacity(slots), lazily=self._squeezes(chunk))
        self.store.aim(row, self.longest.get(row, int(chunk == 1 and not self.reads_prompt)))

    def _squeezes(self, chunk: int) -> bool:
        """Whether reading these tokens overwrites all that a row holds, in one launch."""
        reads = chunk > 1 or self.reads_prompt
        return (
            reads and len(self.store.state) <= 3 and _attention.fused_squeeze(self.store.valid.device.type) is not None
        )

    def _make_room(self, chunk: int) -> None:
        """Only the full cache of unknown length moves: a larger store takes over the old one's rows."""
        old, unread = self.store, self.unread
        needed = int(old.seen.max()) + chunk
        if needed <= old.slots:
            return
        self.slots, slots = needed + _GROWTH, self.slots
        self.lazy_initialization(self._like(old), self._like(old))
        self.slots = slots
        new = self.store
        for source, target in zip([*old.keys, *old.values], [*new.keys, *new.values], strict=True):
            target[:, :, : old.slots] = source[:, :, : old.slots]
        new.positions[..., : old.slots] = old.positions
        new.valid[..., : old.slots] = old.valid
        new.pointer.copy_(old.pointer)
        new.seen.copy_(old.seen)
        new.longest.copy_(old.longest)
        new.epoch = old.epoch + 1
        for known, grown in zip(old.counts, new.counts, strict=True):
            grown.longest = known.longest
        self.unread = unread

    @staticmethod
    def _like(store: SlotStore) -> Tensor:
        batch, groups, _, size = store.keys[0].shape
        return store.keys[0].new_empty((batch, groups, 0, size))

    def count_prefill(self, *tensors: Tensor) -> None:
        """Notes what a chunk needs for a moment besides the stores."""
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        self.prefill_bytes = max(self.prefill_bytes, sum(storages.values()))

    def get_seq_length(self) -> int:
        """Tokens seen, not slots held: learned positions follow it."""
        return self.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        """Empties every row; the memory stays."""
        self.columns = 0
        if self._store is not None:
            self.unread = set(range(self._store.positions.shape[0]))
            for row in self.unread:
                self._store.clear(row)

    def reorder_cache(self, beam_idx: Tensor) -> NoReturn:
        raise PolicyError("beam search is not supported by a budgeted cache", "use num_beams=1")

    def crop(self, max_length: int) -> NoReturn:
        raise PolicyError("a budgeted cache cannot be cropped: what it evicted is gone", "start a new cache")

    def batch_repeat_interleave(self, repeats: int) -> NoReturn:
        raise PolicyError("a budgeted cache cannot be repeated", "repeat the prompt instead")

    def batch_select_indices(self, indices: Tensor) -> NoReturn:
        raise PolicyError("rows of a budgeted cache cannot be selected", "start a new cache")


class BudgetedCache(Cache):  # type: ignore[misc]
    """A KV cache of a fixed number of slots per layer, for any decoder that goes through the attention interface.

    Args:
        config: the model's configuration.
        policy: a name (`auvsum policies`) or a `Policy`.
        slots: slots per layer, or one number a layer; None only for `full`, which then grows.
        batch: rows; None takes the batch of the first call.
        options: the policy's options, such as `top_k`, `decay`, `reconstruct` for AUV.

    Raises:
        PolicyError: an unknown policy or option, or too few slots.
    """

    def __init__(
        self,
        config: Any,
        policy: str | Policy = "auv",
        slots: int | Sequence[int] | None = None,
        *,
        batch: int | None = None,
        **options: Any,
    ) -> None:
        if isinstance(policy, Policy):
            if options:
                raise PolicyError("options were given beside a finished policy", "build the policy with them")
            self.policy = policy
        else:
            self.policy = make_policy(policy, **options)
        count = config.get_text_config(decoder=True).num_hidden_layers
        per_layer = [slots] * count if slots is None or isinstance(slots, int) else list(slots)
        if len(per_layer) != count:
            raise PolicyError(f"{len(per_layer)} slot counts for {count} layers", "give one number, or one a layer")
        for number in per_layer:
            if number is None and self.policy.name != "full":
                raise PolicyError(f"policy {self.policy.name!r} needs a number of slots", "pass slots=...")
            if number is not None and number < self.policy.least_slots:
                raise PolicyError(
                    f"policy {self.policy.name!r} needs at least {self.policy.least_slots} slots, not {number}",
                    f"give it {self.policy.least_slots} or more",
                )
        super().__init__(layers=[LayerCache(self.policy, number, batch) for number in per_layer])

    def begin(self, prompt_tokens: int, *, row: int = 0, slots: int | Sequence[int] | None = None) -> None:
        """Declares a row's next prompt before its first chunk.

        Args:
            prompt_tokens: N_max of eq. 2; without this call, the length of the first chunk.
            slots: the row's own budget, at most the cache's.
        """
        per_layer = [slots] * len(self.layers) if slots is None or isinstance(slots, int) else slots
        for layer, number in zip(self.layers, per_layer, strict=True):
            layer.longest[row] = prompt_tokens
            if number is not None:
                layer.row_slots[row] = number
            if layer.is_initialized:
                layer.unread.add(row)

    def allocate(self, *, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        """Makes every layer's store now instead of at its first token."""
        nothing = torch.empty((self.layers[0].batch or 1, kv_heads, 0, head_dim), dtype=dtype, device=device)
        for layer in self.layers:
            layer.lazy_initialization(nothing, nothing)

    @contextmanager
    def reading(self, row: int) -> Iterator[None]:
        """Within: the model is called with batch 1, and its tokens are a prompt chunk of that row."""
        for layer in self.layers:
            layer.row, layer.reads_prompt = row, True
        try:
            yield
        finally:
            for layer in self.layers:
                layer.row, layer.reads_prompt = None, False

    def rest(self, row: int) -> None:
        """A row takes no further part in decoding; what it holds means nothing from now on."""
        for active in {id(layer.store.active): layer.store.active for layer in self.layers}.values():
            active[row].fill_(False)

    @property
    def slots(self) -> list[int]:
        """Slots granted to each layer."""
        return [layer.slots for layer in self.layers]

    @property
    def rows(self) -> int:
        """Sequences held together."""
        return int(self.layers[0].store.positions.shape[0])

    def bytes(self) -> int:
        """Bytes really allocated, over all layers and rows, policy state included."""
        return sum(layer.bytes for layer in self.layers)

    @property
    def prefill_peak_bytes(self) -> int:
        """Bytes at the worst moment of a prompt: the stores, and one layer's chunk beside what it held."""
        worst, stores = 0, 0
        for layer in self.layers:
            stores += layer.bytes
            worst = max(worst, stores + layer.prefill_bytes)
        return worst

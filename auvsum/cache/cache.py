"""BudgetedCache: the transformers side of the slot store. A drop-in for `past_key_values`.

import auvsum
model.set_attn_implementation("auvsum")
model.generate(ids, past_key_values=auvsum.BudgetedCache(model.config, policy="auv", slots=64))
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from auvsum.cache import attention
from auvsum.cache.codec import make_codec
from auvsum.cache.policy import Policy, SlotPolicy, make_policy
from auvsum.cache.rotary import Rotary
from auvsum.cache.sliding import SlidingWindow, layer_windows
from auvsum.cache.store import SlotStore
from auvsum.cache.together import Books
from auvsum.errors import PolicyError
from auvsum.kernels.column_scores import ChunkAttention

#: The full cache without a given size grows by this many slots; every other store has a fixed size.
_GROWTH = 256


class UncountedLayer(CacheLayerMixin):  # type: ignore[misc]
    """A layer that is always told the positions of its tokens, so that transformers need not count them."""

    is_compileable = False
    is_croppable = False

    def get_seq_length(self) -> int:
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_max_length(self) -> int:
        return -1


@contextmanager
def reading(layers: Sequence[Any], row: int) -> Iterator[None]:
    """Within: the layers take the tokens of a call for a prompt chunk of that row."""
    for layer in layers:
        layer.row, layer.reads_prompt = row, True
    try:
        yield
    finally:
        for layer in layers:
            layer.row, layer.reads_prompt = None, False


class LayerCache(CacheLayerMixin):  # type: ignore[misc]
    """One layer: a policy and its store. The store is allocated when the layer first sees a key, and then stays.

    Args:
        slots: the budget; None grows.
        place: this layer's number among those that share a budget, and how many they are.
        exact: whether `slots` is this layer's own number, not to be shared out.

    Attributes:
        row: the row that a prompt is being read into; None when the batch of the call is the batch of the cache.
        reads_prompt: whether a single query is a one-token prompt chunk rather than a decode step.
        compact: rows whose positions count what is held, each with the position of its next token; their keys are
            stored un-turned until `settle`, by the angles of `rotary`.
        share: rows whose next part keeps at most that many slots beside what is held.
        peers: on a CPU their books may be kept together; on a GPU they evict together.
        books, number: where the books of the decode step are, and this layer's place in them.
    """

    is_compileable = False
    is_croppable = False

    def __init__(
        self,
        policy: SlotPolicy,
        slots: int | None,
        batch: int | None,
        place: tuple[int, int] = (0, 1),
        exact: bool = True,
        layer: int = 0,
        bits: int = 16,
    ) -> None:
        super().__init__()
        self.policy = policy
        self.slots = slots
        self.place = place
        self.exact = exact
        self.layer = layer
        self.bits = bits
        self.batch = batch
        self.row: int | None = None
        self.reads_prompt = False
        self.rotary = Rotary(torch.empty(0))
        self.compact: dict[int, int] = {}
        self.share: dict[int, int] = {}
        self.columns = 0
        self.row_slots: dict[int, tuple[int, bool]] = {}
        self.longest: dict[int, int] = {}
        self.prefill_bytes = 0
        self.unread: set[int] = set()
        self._peers: list[weakref.ref[LayerCache]] = []
        self.number = 0
        self._store: SlotStore | None = None
        self._allocated: SlotStore | None = None
        self._books: Books | None = None

    @property
    def peers(self) -> list[LayerCache]:
        """The layers like this one, itself among them, in the order of a step. They are the cache's: layers that held
        each other would be freed by a garbage collection alone, and the GPU's memory with them.
        """
        return [peer for known in self._peers if (peer := known()) is not None] or [self]

    @peers.setter
    def peers(self, layers: Sequence[LayerCache]) -> None:
        self._peers = [weakref.ref(layer) for layer in layers]

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
    def books(self) -> Books:
        """Where the books of the decode step are kept."""
        assert self._books is not None  # made together with the store
        return self._books

    def stepped(self) -> list[SlotStore]:
        """The stores of all peers on this layer's device, once a step has come to the last of them; before, none."""
        following = self.peers[self.place[0] + 1 :][:1]
        device = self.store.valid.device
        if any(peer._store is not None and peer._store.valid.device == device for peer in following):
            return []
        stores = [peer._store for peer in self.peers if peer._store is not None]
        return [store for store in stores if store.valid.device == device]

    @property
    def window(self) -> int | None:
        """The layer's sliding window."""
        return self.policy.window if isinstance(self.policy, SlidingWindow) else None

    @property
    def bytes(self) -> int:
        """Bytes allocated by this layer."""
        return 0 if self._store is None else self._store.bytes()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates the store in the keys' type and on their device."""
        batch, groups, chunk, size = key_states.shape
        if self._books is None:
            layers = self._together(chunk) if key_states.device.type == "cpu" else [self]
            books, stores = Books.shared(
                [layer.layer for layer in layers],
                batch=self.batch or batch,
                kv_heads=groups,
                slots=self._capacity(chunk),
                head_dim=size,
                dtype=key_states.dtype,
                device=key_states.device,
                state=self.policy.state,
                reconstruct=self.policy.keeps_reconstructed,
                codec=make_codec(key_states.dtype, self.bits),
            )
            for number, (layer, store) in enumerate(zip(layers, stores, strict=True)):
                layer._books, layer._allocated, layer.number = books, store, number
        self._store = self._allocated
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

    def _capacity(self, chunk: int) -> int:
        """The slots that the store needs when its first chunk has that many tokens."""
        tokens = max(self.longest.values(), default=chunk)
        return self.policy.capacity(
            chunk + _GROWTH if self.slots is None else self._own(self.slots, tokens, self.exact)
        )

    def _together(self, chunk: int) -> list[LayerCache]:
        """The layers that share this one's memory and books: all peers, or itself where they differ."""
        alike = {peer._capacity(chunk) for peer in self.peers} == {self._capacity(chunk)}
        return self.peers if alike and all(peer._books is None for peer in self.peers) else [self]

    def _own(self, granted: int, tokens: int, exact: bool) -> int:
        """This layer's slots of `granted` a layer, for a prompt of that many tokens."""
        if exact:
            return granted
        index, layers = self.place
        return self.policy.layer_slots(granted, layers, tokens)[index]

    @property
    def row_count(self) -> int:
        """Rows of the batch."""
        return int(self.store.positions.shape[0])

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, tokens: Tensor | None) -> Tensor:
        """What the attention function does in this layer, given what `update` returned."""
        return attention.attend(self, query, key, value, scale, tokens)

    def take(self, row: int, key: Tensor, value: Tensor, seen: ChunkAttention | None) -> None:
        """A whole prompt `[1, G, n, D]` that was attended to elsewhere; `seen` is None where the layer slides."""
        self.row, self.reads_prompt = row, True
        self.update(key, value)
        if self.store.counts[row].seen:
            raise PolicyError("a prompt is taken whole", "begin the row anew before")
        attention.choose_and_fill(self, row, attention.hold(self, row, key, value), seen)
        self.row, self.reads_prompt = None, False

    @property
    def heads(self) -> int:
        """KV heads."""
        return int(self.store.positions.shape[1])

    def copy_rows(self, count: int) -> None:
        """The first `count` rows, whose prompts have been read, again as the `count` rows behind them."""
        self.store.copy_rows(count)
        for row in range(count):
            self.unread.discard(count + row)
            if row in self.row_slots:
                self.row_slots[count + row] = self.row_slots[row]
            self.longest[count + row] = self.longest[row]

    def add_kept(self, total: Tensor) -> None:
        """Adds how many heads hold each token of the first rows to `total`, fp32 `[rows, tokens]`; a token's column is
        its position, and whatever lies behind is counted in the last one."""
        store, (rows, tokens) = self.store, total.shape
        held = store.valid[:rows, :, : store.slots]
        where = store.positions[:rows, :, : store.slots].long().masked_fill(~held, tokens - 1).clamp_(max=tokens - 1)
        total.scatter_add_(1, where.view(rows, -1), held.to(total.dtype).view(rows, -1))

    def held_positions(self, row: int, head: int) -> list[int]:
        """Positions of the tokens that a head holds, ascending."""
        positions: list[int] = self.store.snapshot(row, head)["positions"]
        return positions

    def _start(self, row: int, chunk: int) -> None:
        """The first tokens of a row. How many they are is declared, or known when the first chunk is read."""
        self.unread.discard(row)
        self.store.clear(row, lazily=(chunk > 1 or self.reads_prompt) and self.squeezes)
        self.store.aim(row, 0)
        tokens = self.longest.get(row, int(chunk == 1 and not self.reads_prompt))
        if tokens:
            self.settle(row, tokens)

    @property
    def squeezes(self) -> bool:
        """Whether reading a prompt overwrites all that a row holds, in one launch."""
        fused = attention.fused_squeeze(self.store.valid.device.type) is not None
        return fused and self.window is None and len(self.store.keys) == 1 and len(self.store.state) <= 3

    def settle(self, row: int, tokens: int) -> None:
        """A row's constants: its N_max and its own budget in this layer.

        Raises:
            PolicyError: when the row was given more slots than the cache has.
        """
        store = self.store
        store.aim(row, tokens)
        granted, exact = self.row_slots.get(row, (self.slots, self.exact))
        if granted is None:
            return
        capacity = self.policy.capacity(self._own(granted, tokens, exact))
        if row in self.row_slots and capacity > store.slots:
            raise PolicyError(f"a row of {capacity} slots does not fit a cache of {store.slots}", "give the cache more")
        store.grant(row, granted, min(capacity, store.slots))

    def _make_room(self, chunk: int) -> None:
        """Only the full cache of unknown length moves: a larger store takes over the old one's rows."""
        old, unread = self.store, self.unread
        needed = int(old.seen.max()) + chunk
        if needed <= old.slots:
            return
        self.slots, slots, self._books = needed + _GROWTH, self.slots, None
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
        batch, groups, _ = store.positions.shape
        return torch.empty((batch, groups, 0, store.head_dim), dtype=store.dtype, device=store.positions.device)

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
        bits: of a stored channel: 16 (the model's type), 8 or 4.
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
        bits: int = 16,
        **options: Any,
    ) -> None:
        if isinstance(policy, str):
            policy = make_policy(policy, **options)
        elif options:
            raise PolicyError("options were given beside a finished policy", "build the policy with them")
        if not isinstance(policy, SlotPolicy):
            raise PolicyError(
                f"policy {policy.name!r} looks at a prompt twice, which a cache alone cannot do",
                "use auvsum.Summarizer, or auvsum.cache.heads",
            )
        self.policy = policy
        windows = layer_windows(config)
        full = [layer for layer, window in enumerate(windows) if window is None]
        if not full and self.policy.name != "full":
            raise PolicyError(
                f"policy {self.policy.name!r} has nothing to do: every layer of this model has a sliding window",
                "use policy full, which holds just the window, or load the model with sliding_window=None",
            )
        one = slots is None or isinstance(slots, int)
        per_layer = [slots] * len(windows) if slots is None or isinstance(slots, int) else list(slots)
        if len(per_layer) != len(windows):
            raise PolicyError(
                f"{len(per_layer)} slot counts for {len(windows)} layers", "give one number, or one a layer"
            )
        layers = []
        for index, (number, window) in enumerate(zip(per_layer, windows, strict=True)):
            if window is not None:
                layers.append(LayerCache(SlidingWindow(window), window, batch))
                continue
            if one:
                self._check(number)
            place = (full.index(index), len(full))
            layers.append(LayerCache(policy, number, batch, place, not one, index, bits))
        sharing = [layers[index] for index in full if layers[index].slots is not None]
        for layer in sharing:
            layer.peers = sharing
        super().__init__(layers=layers)

    def _check(self, slots: int | None) -> None:
        least = self.policy.least_slots
        if slots is None and self.policy.name != "full":
            raise PolicyError(f"policy {self.policy.name!r} needs a number of slots", "pass slots=...")
        if slots is not None and slots < least:
            message = f"policy {self.policy.name!r} needs at least {least} slots, not {slots}"
            raise PolicyError(message, f"give it {least} or more")

    def begin(
        self,
        prompt_tokens: int,
        *,
        row: int = 0,
        slots: int | Sequence[int] | None = None,
        rotary: Rotary | None = None,
    ) -> None:
        """Declares a row's next prompt before its first chunk.

        Args:
            prompt_tokens: N_max of eq. 2; without this call, the length of the first chunk.
            slots: the row's own budget, at most the cache's: slots a layer, or one number a layer.
            rotary: the model's angles, when the row's positions are to count only what is held.
        """
        one = slots is None or isinstance(slots, int)
        per_layer = [slots] * len(self.layers) if slots is None or isinstance(slots, int) else slots
        for layer, number in zip(self.layers, per_layer, strict=True):
            layer.longest[row] = prompt_tokens
            layer.prefill_bytes = 0
            layer.share.pop(row, None)
            layer.compact.pop(row, None)
            if rotary is not None:
                layer.rotary, layer.compact[row] = rotary, 0
            if number is not None and layer.window is None:
                layer.row_slots[row] = (number, not one)
            if layer.is_initialized:
                layer.unread.add(row)

    def copy_rows(self, count: int) -> None:
        """The first `count` rows, whose prompts have been read, again as the `count` rows behind them."""
        for layer in self.layers:
            layer.copy_rows(count)

    def allocate(self, *, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        """Makes every layer's store now instead of at its first token."""
        nothing = torch.empty((self.layers[0].batch or 1, kv_heads, 0, head_dim), dtype=dtype, device=device)
        for layer in self.layers:
            layer.lazy_initialization(nothing, nothing)

    def reading(self, row: int) -> AbstractContextManager[None]:
        """Within: the model is called with batch 1, and its tokens are a prompt chunk of that row."""
        return reading(self.layers, row)

    def next_part(self, row: int, share: int | None) -> int:
        """Announces a part of a row's prompt that is read behind what is held, or keeps a share of its own.

        Returns:
            the position of its first token where positions count what is held. Layers may hold different numbers of
            tokens: the longest decides, the others leave their first positions out.
        """
        held = max(layer.store.live(row) if layer.is_initialized and row not in layer.unread else 0
                   for layer in self.layers)  # fmt: skip
        for layer in self.layers:
            if row in layer.compact:
                layer.compact[row] = held
            if share is not None:
                layer.share[row] = share
        return held

    def end_prompt(self, row: int) -> int | None:
        """Ends the prompt of a row whose positions count what is held: its keys are turned to them once and for all.

        Returns:
            the position of the first token that is written; None for a row with positions of the document.
        """
        if row not in self.layers[0].compact:
            return None
        position = self.next_part(row, None)
        for layer in self.layers:
            layer.store.turn(row, layer.rotary, position)
            del layer.compact[row]
        return position

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

    def row_bytes(self, row: int) -> int:
        """Those of one row: all have the same."""
        return self.bytes() // self.rows

    @property
    def prefill_peak_bytes(self) -> int:
        """Bytes at the worst moment of a prompt: the stores, and one layer's chunk beside what it held."""
        worst, stores = 0, 0
        for layer in self.layers:
            stores += layer.bytes
            worst = max(worst, stores + layer.prefill_bytes)
        return worst

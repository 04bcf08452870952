"""The oracle: full, H2O and AUV as slow as they are obvious, written from the paper and the algorithm notes alone.

One object per layer and KV head (`NaiveHead` and its subclasses) holds a plain Python list of tokens in the order of
their positions; every rule is a loop over that list. `NaiveCache` and the attention function "naive" let a whole tiny
model of transformers run on it, one sequence at a time:

    model.set_attn_implementation("naive")
    cache = NaiveCache(model.config, lambda: NaiveAuv(slots=25))
    model(ids, past_key_values=cache, use_cache=True)

Queries, keys, values and probabilities are tensors of `dtype` (fp32 by default, fp64 on request); scores and counts are
Python floats and ints. It imports nothing of the package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass(eq=False)  # identity, so that `in` never compares tensors
class Token:
    """One live slot of one KV head."""

    position: int
    key: torch.Tensor  # [D]
    value: torch.Tensor  # [D]
    state: dict[str, float] = field(default_factory=dict)


def lowest(items: list[Token], score: Callable[[Token], float], count: int) -> list[Token]:
    """The `count` tokens that go first: by (score, position), so that on a tie the older token goes."""
    return sorted(items, key=lambda token: (score(token), token.position))[:count]


def margin(items: list[Token], score: Callable[[Token], float], count: int) -> float:
    """Relative gap between the last token that goes and the first that stays: what rounding must not exceed."""
    ranked = sorted(score(token) for token in items)
    if not 0 < count < len(ranked):
        return float("inf")
    low, high = ranked[count - 1], ranked[count]
    return (high - low) / max(abs(high), 1e-30)


class NaiveHead:
    """Full cache of one KV head: every token stays. The policies below add eviction."""

    names: tuple[str, ...] = ()

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.live: list[Token] = []  # always in the order of the positions
        self.seen = 0
        self.smallest_margin = float("inf")
        self.largest_probability: list[float] = []  # of each row: shows how sharp the attention was

    # -- what a model call does ------------------------------------------------------------------------------------

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
        """query [G, T, D], key and value [T, D] -> [G, T, D]. One token decodes, more are a chunk of the prompt."""
        query, key, value = (tensor.detach().to(self.dtype) for tensor in (query, key, value))
        step = self.decode if key.shape[0] == 1 else self.prefill
        return step(query, key, value, scaling)

    def prefill(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
        rows = []
        for t in range(key.shape[0]):
            # Appending token by token is the causal mask: row t sees what lived before the chunk and tokens 0..t of it.
            self.arrive(key[t], value[t])
            probabilities, out = self.attend(query[:, t], scaling)
            self.aggregate(probabilities)
            rows.append(out)
        self.end_of_chunk()
        return torch.stack(rows, dim=1)

    def decode(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
        self.before_decode()
        self.arrive(key[0], value[0])
        probabilities, out = self.attend(query[:, 0], scaling)
        self.aggregate(probabilities)
        self.after_decode(probabilities)
        return out.unsqueeze(1)

    # -- pieces ----------------------------------------------------------------------------------------------------

    def arrive(self, key: torch.Tensor, value: torch.Tensor) -> None:
        self.live.append(Token(self.seen, key, value, dict.fromkeys(self.names, 0.0)))
        self.seen += 1

    def extra(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A key and value outside the slots that takes part in the softmax (AUV's reconstructed slot)."""
        return None

    def attend(self, query: torch.Tensor, scaling: float) -> tuple[list[float], torch.Tensor]:
        """query [G, D] -> the group's mean probability of every key (the extra one last), and the output [G, D]."""
        keys = [token.key for token in self.live]
        values = [token.value for token in self.live]
        if (extra := self.extra()) is not None:
            keys.append(extra[0])
            values.append(extra[1])
        all_keys, all_values = torch.stack(keys), torch.stack(values)  # [keys, D]
        probabilities, out = [], []
        for one_head in query:
            weights = torch.softmax(all_keys @ one_head * scaling, dim=0)  # [keys]
            probabilities.append(weights)
            out.append(weights @ all_values)
        mean = torch.stack(probabilities).mean(dim=0).tolist()
        self.largest_probability.append(max(mean))
        return mean, torch.stack(out)

    def aggregate(self, probabilities: list[float]) -> None: ...

    def before_decode(self) -> None: ...

    def after_decode(self, probabilities: list[float]) -> None: ...

    def end_of_chunk(self) -> None: ...

    def keep(self, tokens: list[Token]) -> None:
        self.live = sorted(tokens, key=lambda token: token.position)

    def select(self, items: list[Token], score: Callable[[Token], float], go: int) -> list[Token]:
        """`lowest`, remembering how close the decision was."""
        self.smallest_margin = min(self.smallest_margin, margin(items, score, go))
        return lowest(items, score, go)

    def snapshot(self) -> dict[str, Any]:
        """The same dictionary as `SlotStore.snapshot`."""
        return {
            "positions": [token.position for token in self.live],
            "state": {name: [token.state[name] for token in self.live] for name in self.names},
            "keys": torch.stack([token.key for token in self.live]),
            "values": torch.stack([token.value for token in self.live]),
            "reconstructed": None,
        }


class NaiveH2o(NaiveHead):
    """Heavy hitters by accumulated attention: `B` slots, the newest `B // 2` protected."""

    names = ("score",)

    def __init__(self, slots: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(dtype)
        self.slots = slots
        self.recent = max(1, slots // 2)

    @staticmethod
    def score(token: Token) -> float:
        return token.state["score"]

    def aggregate(self, probabilities: list[float]) -> None:
        for token, a in zip(self.live, probabilities, strict=True):
            token.state["score"] += a

    def before_decode(self) -> None:
        """Make room for the token that arrives, which is itself one of the protected."""
        if len(self.live) < self.slots:
            return
        old = self.live[: len(self.live) - (self.recent - 1)]
        gone = self.select(old, self.score, 1)
        self.keep([token for token in self.live if token not in gone])

    def end_of_chunk(self) -> None:
        if len(self.live) <= self.slots:
            return
        cut = len(self.live) - self.recent
        gone = self.select(self.live[:cut], self.score, len(self.live) - self.slots)
        self.keep([token for token in self.live if token not in gone])


class NaiveAuv(NaiveHead):
    """AUV with multi-step memory: `3L` slots, and one for the reconstructed K(V)."""

    names = ("aas", "cnt", "usage")

    def __init__(
        self,
        slots: int,
        top_k: int | None = None,
        decay: float = 0.5,
        reconstruct: bool = True,
        n_max: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(dtype)
        self.local = (slots - 1) // 3 if reconstruct else slots // 3  # L
        if self.local < 1:
            raise ValueError(f"{slots} slots leave no local area")
        self.top_k = top_k
        self.decay = decay
        self.reconstruct = reconstruct
        self.n_max = n_max  # None: the length of the first call
        self.mass = 0.0  # SES
        self.key: torch.Tensor | None = None  # r̄
        self.value: torch.Tensor | None = None

    @staticmethod
    def aas(token: Token) -> float:
        return token.state["aas"]

    def extra(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        if self.mass == 0.0 or self.key is None or self.value is None:
            return None
        return self.key, self.value

    def valid_keys(self, probabilities: list[float]) -> int:
        """N: how many keys the softmax ran over, the new token and the live reconstructed slot included."""
        return len(probabilities)

    # -- prefill, §3.2 ---------------------------------------------------------------------------------------------

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
        if self.n_max is None:
            self.n_max = key.shape[0]
        return super().forward(query, key, value, scaling)

    def prefill(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
        if self.seen > 0:
            return super().prefill(query, key, value, scaling)  # a later chunk: row by row, as in decode
        # The first call is eq. 2 to the letter: the whole n x n matrix, scaled by rows, averaged by columns.
        assert self.n_max is not None
        n = key.shape[0]
        matrix: list[list[float]] = []
        rows = []
        for i in range(n):
            self.arrive(key[i], value[i])
            probabilities, out = self.attend(query[:, i], scaling)
            matrix.append([a * self.valid_keys(probabilities) / self.n_max for a in probabilities])
            rows.append(out)
        for j, token in enumerate(self.live):
            token.state["aas"] = self.column_mean([matrix[i][j] for i in range(j, n)], n)
            token.state["cnt"] = n - j
            token.state["usage"] = 0.0
        self.end_of_chunk()
        return torch.stack(rows, dim=1)

    def column_mean(self, column: list[float], rows: int) -> float:
        """Eq. 2: the mean over the rows in which the key is visible, never over all `rows`."""
        return sum(column) / len(column)

    def end_of_chunk(self) -> None:
        """Keep the last L and the L highest AAS of the rest, from 3L tokens on; fold everything else."""
        if len(self.live) < 3 * self.local:
            return
        cut = len(self.live) - self.local_window()
        gone = self.select(self.live[:cut], self.aas, len(self.live) - 2 * self.local)
        self.fold(gone)
        self.keep([token for token in self.live if token not in gone])

    def local_window(self) -> int:
        return self.local

    # -- decode, §3.3 ----------------------------------------------------------------------------------------------

    def aggregate(self, probabilities: list[float]) -> None:
        """Eqs. 3 and 4."""
        assert self.n_max is not None
        n_t = self.valid_keys(probabilities)
        for token, a in zip(self.live, probabilities, strict=False):  # a reconstructed key comes last: no state
            state = token.state
            state["aas"] = (a * n_t / self.n_max + state["aas"] * state["cnt"]) / (state["cnt"] + 1)
            state["cnt"] = self.next_count(state["cnt"])

    def next_count(self, cnt: float) -> float:
        return cnt + 1

    def after_decode(self, probabilities: list[float]) -> None:
        self.count_usage(probabilities)
        # Tokens fill the slots in order, so the positioning pointer is simply how many there are.
        if len(self.live) == 3 * self.local:
            self.evict()

    def count_usage(self, probabilities: list[float]) -> None:
        a = {id(token): p for token, p in zip(self.live, probabilities, strict=False)}
        k = min(self.local if self.top_k is None else self.top_k, len(self.live))
        not_used = self.select(self.live, lambda token: a[id(token)], len(self.live) - k)
        for token in self.live:
            if token not in not_used:
                token.state["usage"] += 1

    def evict(self) -> None:
        candidates, write = self.live[: 2 * self.local], self.live[2 * self.local :]
        largest = max(token.state["aas"] for token in candidates)
        gone = self.select(candidates, lambda t: t.state["usage"] * largest + t.state["aas"], self.local)  # eq. 5
        self.fold(gone)
        self.keep([token for token in candidates if token not in gone] + write)
        least = min(token.state["usage"] for token in self.live)
        for token in self.live:
            token.state["usage"] = (token.state["usage"] - least) * self.decay  # eq. 6

    def fold(self, gone: list[Token]) -> None:
        """Eqs. 7 and 8."""
        if not self.reconstruct or not gone:
            return
        weights = [self.fold_weight(token) for token in gone]
        mass = self.mass + sum(weights)
        if mass == 0.0:
            return  # no 0/0: the slot stays masked
        zero = torch.zeros_like(gone[0].key)
        key = (zero if self.key is None else self.key) * self.mass
        value = (zero if self.value is None else self.value) * self.mass
        for token, weight in zip(gone, weights, strict=True):
            key = key + token.key * weight
            value = value + token.value * weight
        self.key, self.value, self.mass = key / mass, value / mass, mass

    def fold_weight(self, token: Token) -> float:
        return token.state["aas"]

    def snapshot(self) -> dict[str, Any]:
        view = super().snapshot()
        view["pointer"] = len(self.live)
        if self.extra() is not None:
            view["reconstructed"] = {"key": self.key, "value": self.value, "mass": self.mass}
        return view


# -- the adapter to transformers -----------------------------------------------------------------------------------


class NaiveLayer(CacheLayerMixin):
    """Counts tokens and hands the new keys and values through; the attention function owns the rest."""

    def __init__(self, make_head: Callable[[], NaiveHead]) -> None:
        super().__init__()
        self.make_head = make_head
        self.heads: list[NaiveHead] = []

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        if key_states.shape[0] != 1:
            raise ValueError("the oracle runs one sequence at a time")
        self.heads = [self.make_head() for _ in range(key_states.shape[1])]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        NaiveCache.current = self
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.heads[0].seen if self.heads else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


class NaiveCache(Cache):
    """`make_head` builds the policy of one KV head of one layer."""

    current: NaiveLayer | None = None  # the layer whose `update` ran last: the attention function follows at once

    def __init__(self, config: Any, make_head: Callable[[], NaiveHead]) -> None:
        super().__init__(layers=[NaiveLayer(make_head) for _ in range(config.num_hidden_layers)])

    def heads(self) -> list[NaiveHead]:
        return [head for layer in self.layers for head in layer.heads]

    def smallest_margin(self) -> float:
        """The closest decision of the whole run: far above fp32 rounding, or the run proves nothing."""
        return min(head.smallest_margin for head in self.heads())


def naive_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, H, T, D]
    key: torch.Tensor,  # [1, KV, T, D]: the new tokens only
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    layer, NaiveCache.current = NaiveCache.current, None
    assert layer is not None
    assert attention_mask is None, "the oracle knows no padding: give it one sequence without any"
    group = query.shape[1] // key.shape[1]
    outs = []
    for index, head in enumerate(layer.heads):
        shared = query[0, index * group : (index + 1) * group]  # [G, T, D]: the query heads of this KV head
        outs.append(head.forward(shared, key[0, index], value[0, index], scaling))
    out = torch.cat(outs, dim=0)  # [H, T, D]
    return out.transpose(0, 1).unsqueeze(0).to(query.dtype), None  # [1, T, H, D]


AttentionInterface.register("naive", naive_attention)

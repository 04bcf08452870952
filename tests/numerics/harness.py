"""Feed one token stream to the package and to the oracle, and compare all that each of them holds after every call."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from auvsum.cache.policy import policy_class, policy_names
from tests.numerics.naive import NaiveCache, NaiveHead

# fp32 on both sides, sums in different orders. Logits are of size 1 to 10, probabilities and scores below 1.
LOGITS = {"rtol": 1e-4, "atol": 1e-4}
SCORES = {"rel_tol": 1e-4, "abs_tol": 1e-7}
VECTORS = {"rtol": 1e-4, "atol": 1e-5}
# A decision closer than this could fall either way by rounding alone; the runs below are chosen to have none.
CLEAR = 1e-6


#: Those that evict and are held by a `BudgetedCache`; `auv-look` is tested in test_heads.py.
SLOT_POLICIES = [name for name in policy_names() if name != "full" and not policy_class(name).by_head]


class Mismatch(AssertionError):
    """The two sides differ. Its own class, so that a test which expects one cannot pass on another failure."""


@dataclass
class Call:
    """What is there after one model call."""

    fed: int  # tokens in this call
    logits: torch.Tensor  # [fed, V]
    heads: dict[tuple[int, int], dict[str, Any]]  # (layer, KV head) -> snapshot


def split(stream: torch.Tensor, prompt: int, chunks: list[int] | None = None) -> list[torch.Tensor]:
    """[1, N] -> the calls: the prompt at once or in `chunks`, then one token at a time."""
    sizes = chunks if chunks is not None else [prompt]
    assert sum(sizes) == prompt
    return list(torch.split(stream, [*sizes, *[1] * (stream.shape[1] - prompt)], dim=1))


def model_cases(cases: Iterable[str], both: tuple[str, ...]) -> list[tuple[str, str]]:
    """(model, case): the cases of `both` with either model, the rest with one of them in turn, to save time."""
    rest = [case for case in cases if case not in both]
    return [*itertools.product(("opt", "llama"), both), *zip(itertools.cycle(("llama", "opt")), rest, strict=False)]


@contextlib.contextmanager
def attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def feed(
    model: PreTrainedModel,
    cache: Any,
    calls: list[torch.Tensor],
    snapshot: Callable[[], dict[tuple[int, int], dict[str, Any]]],
    row: int = 0,
    mask: torch.Tensor | None = None,
) -> list[Call]:
    """`mask` [B, N] is 0 on left padding; each call gets what it covers so far, as transformers wants it."""
    trace = []
    fed = 0
    with torch.no_grad():
        for ids in calls:
            fed += ids.shape[1]
            padding = {} if mask is None else {"attention_mask": mask[:, :fed]}
            logits = model(ids, past_key_values=cache, use_cache=True, **padding).logits[row]
            if cache.get_seq_length() != fed:
                raise Mismatch(f"get_seq_length() is {cache.get_seq_length()} after {fed} tokens")
            trace.append(Call(ids.shape[1], logits.clone(), snapshot()))
    return trace


def run_naive(
    model: PreTrainedModel, calls: list[torch.Tensor], make_head: Callable[[], NaiveHead]
) -> tuple[list[Call], NaiveCache]:
    cache = NaiveCache(model.config, make_head)

    def snapshot() -> dict[tuple[int, int], dict[str, Any]]:
        return {(i, h): head.snapshot() for i, layer in enumerate(cache.layers) for h, head in enumerate(layer.heads)}

    with attention(model, "naive"):
        return feed(model, cache, calls, snapshot), cache


def run_package(
    model: PreTrainedModel,
    calls: list[torch.Tensor],
    begin: int | None = None,
    row: int = 0,
    mask: torch.Tensor | None = None,
    cache: Any = None,
    **options: Any,
) -> tuple[list[Call], Any]:
    """What `row` of the batch holds after each call; `begin` is its N_max, by default what the package makes of it."""
    from auvsum.cache.cache import BudgetedCache

    cache = BudgetedCache(model.config, **options) if cache is None else cache
    if begin is not None:
        cache.begin(prompt_tokens=begin, row=row)
    kv_heads = getattr(model.config, "num_key_value_heads", model.config.num_attention_heads)

    def snapshot() -> dict[tuple[int, int], dict[str, Any]]:
        places = [(i, h) for i in range(len(cache.layers)) for h in range(kv_heads)]
        return {(i, h): copied(cache.layers[i].store.snapshot(row, h)) for i, h in places}

    with attention(model, "auvsum"):
        return feed(model, cache, calls, snapshot, row, mask), cache


def copied(view: Any) -> Any:
    """A snapshot may be made of views into the slots, which the next call overwrites."""
    if isinstance(view, dict):
        return {key: copied(value) for key, value in view.items()}
    if isinstance(view, torch.Tensor):
        return view.detach().clone()
    return list(view) if isinstance(view, list) else view


# -- comparison ----------------------------------------------------------------------------------------------------


def compare(actual: list[Call], expected: list[Call], *, scale: float = 1.0, logits: bool = True) -> None:
    """Raise `Mismatch` at the first difference. `scale` is what N_max multiplies expected AAS and mass by."""
    if len(actual) != len(expected):
        raise Mismatch(f"{len(actual)} calls, expected {len(expected)}")
    fed = 0
    for got, want in zip(actual, expected, strict=True):
        fed += want.fed
        if set(got.heads) != set(want.heads):
            raise Mismatch(f"after {fed} tokens: heads {sorted(got.heads)}, expected {sorted(want.heads)}")
        for place in sorted(want.heads):
            compare_head(got.heads[place], want.heads[place], f"after {fed} tokens, (layer, head) {place}", scale)
        if logits:
            close(got.logits, want.logits, f"after {fed} tokens: logits", LOGITS)


def compare_head(got: dict[str, Any], want: dict[str, Any], where: str, scale: float = 1.0) -> None:
    got_positions = [int(position) for position in got["positions"]]
    if got_positions != want["positions"]:
        held, expected = set(got_positions), set(want["positions"])
        raise Mismatch(
            f"{where}: live positions differ: too many {sorted(held - expected)}, missing {sorted(expected - held)}, "
            f"{len(got_positions)} held"
        )
    if "pointer" in want and int(got["pointer"]) != want["pointer"]:
        raise Mismatch(f"{where}: pointer {got['pointer']}, expected {want['pointer']}")
    for name, values in want["state"].items():
        factor = scale if name == "aas" else 1.0
        for position, a, b in zip(want["positions"], got["state"][name], values, strict=True):
            if not math.isclose(float(a), b * factor, **SCORES):
                raise Mismatch(f"{where}: {name} of position {position} is {float(a):.8g}, expected {b * factor:.8g}")
    close(got["keys"], want["keys"], f"{where}: keys", VECTORS)
    close(got["values"], want["values"], f"{where}: values", VECTORS)
    compare_reconstructed(got["reconstructed"], want["reconstructed"], where, scale)


def compare_reconstructed(got: dict[str, Any] | None, want: dict[str, Any] | None, where: str, scale: float) -> None:
    if (got is None) != (want is None):
        raise Mismatch(f"{where}: reconstructed is {got}, expected {want}")
    if got is None or want is None:
        return
    if not math.isclose(float(got["mass"]), want["mass"] * scale, **SCORES):
        raise Mismatch(f"{where}: reconstructed mass {float(got['mass']):.8g}, expected {want['mass'] * scale:.8g}")
    close(got["key"], want["key"], f"{where}: reconstructed key", VECTORS)
    close(got["value"], want["value"], f"{where}: reconstructed value", VECTORS)


def close(got: torch.Tensor, want: torch.Tensor, what: str, tolerance: dict[str, float]) -> None:
    want = want.to(got.dtype)
    if got.shape != want.shape:
        raise Mismatch(f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}")
    if not torch.allclose(got, want, **tolerance):
        raise Mismatch(f"{what} differ by up to {(got - want).abs().max().item():.3g}")


def evictions(trace: list[Call]) -> int:
    """How often the first head lost a token from one call to the next (the prompt's own reduction is not counted)."""
    views = [set(call.heads[0, 0]["positions"]) for call in trace]
    return sum(not before <= after for before, after in itertools.pairwise(views))

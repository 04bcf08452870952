"""Teacher forcing and free writing of a whole matrix of caches, in lockstep: one decode batch, one prompt pass each.

For every document the full cache writes its greedy summary. Beside it, in the same batch, every other cache takes the
same tokens one a step (forced) and its own (free). So the full cache's probabilities and another's for the same token
lie side by side: do they agree on the best token, and how many nats does the other lose?
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from auvsum.cache.heads import HeadsCache, Look, second_look
from auvsum.cache.policies.auv import AUV
from auvsum.cache.policies.auv_v4 import AuvV4
from auvsum.cache.policy import Policy, make_policy
from auvsum.cache.sliding import layer_windows, slots_by_layer
from auvsum.engine.generate import make_cache
from auvsum.errors import GenerationFailed
from auvsum.eval.fanout import FanOut

_Key = tuple[Policy, str, int]

#: Steps between two looks at whether everything is written; looking makes a GPU wait.
_LOOK = 8


@dataclass(frozen=True)
class Start:
    """A cache for one document.

    Args:
        slots: granted to each layer, or one number a layer.
        prompt: read by this cache alone instead of the document's prompt (a truncated one).
        bits: of a stored channel.
        group: caches of the same policy and group share their tensors; rows of very different sizes should not.
    """

    policy: Policy
    slots: int | tuple[int, ...]
    prompt: tuple[int, ...] | None = None
    group: str = ""
    bits: int = 16


@dataclass
class Written:
    """What came of one cache.

    Attributes:
        token_ids: its own greedy continuation, without the end-of-text token; empty where only forced.
        agrees: for each token of the full cache's continuation from the second on (its end-of-text token included),
            whether this cache thinks the same token best. lost: log p_full - log p of that token, in nats.
        kept: fp32 `[prompt]`, the share of (layer, head) pairs that held each token when the prompt had been read.
    """

    token_ids: tuple[int, ...] = ()
    ended: bool = False
    agrees: list[bool] = field(default_factory=list)
    lost: list[float] = field(default_factory=list)
    kept: Tensor | None = None


@dataclass
class _Row:
    """One row of the decode batch: which document, which start (None: the full cache's own), forced or free."""

    document: int
    start: int | None
    forced: bool
    cache: int = -1
    row: int = -1


def write_together(
    model: Any,
    prompts: Sequence[Sequence[int]],
    starts: Sequence[Sequence[Start]],
    *,
    max_new_tokens: int,
    eos_ids: Collection[int] = (),
    spans: Sequence[tuple[int, int]] | None = None,
    forced: bool = True,
    free: bool = True,
) -> list[tuple[Written, list[Written]]]:
    """Reads the prompts and writes with all caches.

    Args:
        model: a transformers decoder; its attention implementation is set to "auvsum".
        spans: which tokens of each prompt are the document; None for all.
        prompts: token ids a document. starts: for each document the caches beside the full one.

    Returns:
        for each document what the full cache wrote, and what came of each start.

    Raises:
        GenerationFailed: logits that are not numbers.
    """
    batch = _Batch(model, prompts, starts, max_new_tokens, spans, forced, free)
    with torch.no_grad():
        return batch.run(frozenset(eos_ids))


class _Batch:
    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        starts: Sequence[Sequence[Start]],
        max_new_tokens: int,
        spans: Sequence[tuple[int, int]] | None,
        forced: bool,
        free: bool,
    ) -> None:
        model.set_attn_implementation("auvsum")
        self.model, self.prompts, self.starts, self.max_new_tokens = model, prompts, starts, max_new_tokens
        self.device, self.spans = next(model.parameters()).device, spans
        full = Start(make_policy("full"), max(len(prompt) for prompt in prompts) + max_new_tokens)
        members: dict[_Key, list[_Row]] = {
            (full.policy, "full", 16): [_Row(d, None, False) for d in range(len(prompts))]
        }
        sizes: dict[_Key, list[list[int]]] = {(full.policy, "full", 16): [self._per_layer(full, 0)]}
        for kind in [kind for kind, wanted in ((True, forced), (False, free)) if wanted]:
            for document, asked in enumerate(starts):
                for number, start in enumerate(asked):
                    key = (_by_another_name(start.policy), start.group, start.bits)
                    members.setdefault(key, []).append(_Row(document, number, kind))
                    sizes.setdefault(key, []).append(self._per_layer(start, document))
        #: Forced and free rows start alike: only the first half of a cache's rows reads, the second is copied from it.
        self.twice = forced and free
        self.caches = [
            make_cache(model.config, key[0], [max(layer) for layer in zip(*sizes[key], strict=True)], len(rows), key[2])
            for key, rows in members.items()
        ]
        for layer in (layer for one in self.caches if isinstance(one, HeadsCache) for layer in one.ranked):
            layer.keeps_unpacked = True  # what is measured here is quality
        self.rows: list[_Row] = []
        for cache, rows in enumerate(members.values()):
            for place, row in enumerate(rows):
                row.cache, row.row = cache, place
                self.rows.append(row)
        self.fan = FanOut(self.caches)
        leaders = {row.document: number for number, row in enumerate(self.rows) if row.start is None}
        self.leader = torch.tensor([leaders[row.document] for row in self.rows], device=self.device)
        self.forced = torch.tensor([row.forced for row in self.rows], device=self.device)

    def run(self, eos_ids: frozenset[int]) -> list[tuple[Written, list[Written]]]:
        tokens, kept = self._read_all()
        lengths = torch.tensor([len(self._prompt(row)) for row in self.rows], device=self.device)
        eos = torch.tensor(sorted(eos_ids), device=self.device)
        ended = torch.isin(tokens, eos)
        own, agrees, lost = [tokens], [], []
        for step in range(self.max_new_tokens - 1):
            if step % _LOOK == 0 and bool(ended.all()):
                break
            logits = self._step(tokens, lengths + step)
            best = logits.argmax(-1)
            truth = best[self.leader]
            chosen = logits.gather(-1, truth[:, None])[:, 0].float() - logits.float().logsumexp(-1)
            agrees.append(best == truth)
            lost.append(chosen[self.leader] - chosen)
            own.append(best)
            tokens = torch.where(self.forced, truth, best)
            ended |= torch.isin(tokens, eos)
        return self._collect(torch.stack(own, 1), agrees, lost, kept, eos_ids)

    # -- reading ------------------------------------------------------------------------------------------------------

    def _read_all(self) -> tuple[Tensor, list[Tensor]]:
        """Every prompt into its rows: each row's first token `[R]`, and what each row kept."""
        first = torch.zeros(len(self.rows), dtype=torch.int64, device=self.device)
        groups: dict[tuple[int, tuple[int, ...]], list[int]] = {}
        for number, row in enumerate(self.rows):
            groups.setdefault((row.document, tuple(self._prompt(row))), []).append(number)
            if self._reads(row):  # all rows are declared before the first allocates a store
                slots = None if row.start is None else self.starts[row.document][row.start].slots
                self.caches[row.cache].begin(len(self._prompt(row)), row=row.row, slots=slots)
        for (document, prompt), numbers in groups.items():
            reading = [number for number in numbers if self._reads(self.rows[number])]
            logits = self._read(prompt, reading)
            first[numbers] = logits.argmax(-1)
            self._settle(document, prompt, reading, int(logits.argmax(-1)))
        kept = self._kept()
        for number, cache in enumerate(self.caches):
            if self.twice and number:
                cache.copy_rows(cache.rows // 2)
        return torch.where(self.forced, first[self.leader], first), kept

    def _reads(self, row: _Row) -> bool:
        """Whether a row reads its prompt itself."""
        return row.start is None or row.forced or not self.twice

    def _per_layer(self, start: Start, document: int) -> list[int]:
        """Slots of every layer."""
        if not isinstance(start.slots, int):
            return list(start.slots)
        tokens = len(start.prompt or self.prompts[document])
        return slots_by_layer(start.policy, start.slots, layer_windows(self.model.config), tokens)

    def _settle(self, document: int, prompt: tuple[int, ...], numbers: list[int], token: int) -> None:
        """The second look of the rows whose policy takes one: once for all that ask the same, whatever the budget."""
        looks: dict[tuple[object, ...], Look | None] = {}
        for number in numbers:
            row = self.rows[number]
            cache = self.caches[row.cache]
            if not isinstance(cache, HeadsCache):
                continue
            queries = cache.policy.queries
            if looks.get(queries) is None:
                span = self.spans[document] if self.spans else (0, len(prompt))
                looks[queries] = second_look(self.model, cache, row.row, prompt, span, token)
            cache.settle(row.row, looks[queries])

    def _read(self, prompt: tuple[int, ...], numbers: list[int]) -> Tensor:
        with self.fan.reading((self.rows[number].cache, self.rows[number].row) for number in numbers):
            out = self.model(
                torch.tensor([prompt], device=self.device),
                position_ids=torch.arange(len(prompt), device=self.device)[None],
                past_key_values=self.fan,
                use_cache=True,
                logits_to_keep=1,
            )
        logits: Tensor = out.logits[0, -1]
        if not bool(logits.isfinite().all()):
            raise GenerationFailed("the model produced logits that are not finite numbers", "try --dtype fp32")
        return logits

    def _prompt(self, row: _Row) -> Sequence[int]:
        own = None if row.start is None else self.starts[row.document][row.start].prompt
        return self.prompts[row.document] if own is None else own

    def _kept(self) -> list[Tensor]:
        """For each row the share of (layer, head) pairs that hold each token of its prompt, windows left aside."""
        shares = []
        for number, cache in enumerate(self.caches):
            rows = cache.rows // 2 if self.twice and number else cache.rows
            longest = max(len(self._prompt(row)) for row in self.rows if row.cache == number)
            total = torch.zeros((rows, longest + 1), dtype=torch.float32, device=self.device)
            layers = [layer for layer in cache.layers if layer.window is None]
            for layer in layers:
                layer.add_kept(total)
            shares.append((total / sum(layer.heads for layer in layers)).cpu())
        return [shares[row.cache][row.row % len(shares[row.cache]), : len(self._prompt(row))] for row in self.rows]

    # -- writing ------------------------------------------------------------------------------------------------------

    def _step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        out = self.model(tokens[:, None], position_ids=positions[:, None], past_key_values=self.fan, use_cache=True)
        logits: Tensor = out.logits[:, -1]
        return logits

    def _collect(
        self,
        own: Tensor,
        agrees: list[Tensor],
        lost: list[Tensor],
        kept: list[Tensor],
        eos_ids: frozenset[int],
    ) -> list[tuple[Written, list[Written]]]:
        ids = own.tolist()
        agreed = torch.stack(agrees, 1).tolist() if agrees else [[] for _ in self.rows]
        losses = torch.stack(lost, 1).float().cpu() if lost else torch.zeros(len(self.rows), 0)
        texts = [_until(row, eos_ids) for row in ids]
        results = [(Written(), [Written() for _ in starts]) for starts in self.starts]
        leader = self.leader.tolist()
        for number, row in enumerate(self.rows):
            full, others = results[row.document]
            into = full if row.start is None else others[row.start]
            into.kept = kept[number]
            if not row.forced:
                into.token_ids, into.ended = texts[number]
            if row.forced or row.start is None:
                teacher, ended = texts[leader[number]]
                steps = max(0, len(teacher) + ended - 1)
                if not bool(losses[number, :steps].isfinite().all()):
                    raise GenerationFailed("the model produced logits that are not finite numbers", "try --dtype fp32")
                into.agrees, into.lost = agreed[number][:steps], losses[number, :steps].tolist()
        return results


def _until(ids: list[int], eos_ids: frozenset[int]) -> tuple[tuple[int, ...], bool]:
    """The tokens before the first end of text, and whether there is one."""
    at = next((i for i, token in enumerate(ids) if token in eos_ids), None)
    return tuple(ids[:at]), at is not None


def _by_another_name(policy: Policy) -> Policy:
    """V4 is AUV with two options, and by that name the fused step of a GPU knows it."""
    return AUV(top_k=policy.top_k, decay=policy.decay, reconstruct=False) if type(policy) is AuvV4 else policy

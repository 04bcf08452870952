"""A run: documents -> prompts -> every cache at once -> a line a document in `samples.jsonl`."""

from __future__ import annotations

import hashlib
import platform
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

from auvsum._version import __version__
from auvsum.cache.policy import Policy, make_policy
from auvsum.engine.generate import Engine, Request
from auvsum.engine.memory import free_bytes, is_out_of_memory, release_memory
from auvsum.engine.models import LoadedModel, load
from auvsum.errors import AuvsumError, BudgetError, DocumentError, GenerationFailed, RunError
from auvsum.eval.cells import FIRST_WORDS, Cell, cells, resolved, shade, tenths
from auvsum.eval.config import THROUGHPUT, EvalConfig
from auvsum.eval.datasets import Example
from auvsum.eval.lockstep import Start, Written, write_together
from auvsum.eval.prompts import Asked, Prompter, choose_shots
from auvsum.eval.runs import ENV, Run
from auvsum.eval.tasks import task_of
from auvsum.eval.texts import arrange, first_words, lexrank
from auvsum.events import Finished

#: On a GPU: the part of the free memory that is planned with, what a row needs beside its slots' keys and values, and
#: the most documents together. More would go faster still, but what is measured is written when all of them are done.
_PLANNED, _ROW_OVERHEAD, _MOST_DOCUMENTS = 0.8, 1.5, 16

#: Documents whose text is kept with the run, for the page of `auvsum report`.
_SHOWN = 3

Progress = Callable[[str], None]


@dataclass
class _Work:
    """A document on its way."""

    example: Example
    document: str
    asked: Asked | None = None
    error: AuvsumError | None = None
    #: Cells with a cache of their own, their start, slots and bytes; or why there is none.
    starts: dict[str, tuple[Start, int, int]] = field(default_factory=dict)
    refused: dict[str, AuvsumError] = field(default_factory=dict)


class Runner:
    """Measures one configuration with a loaded model.

    Args:
        batch_size: documents read and written together; None takes one on a CPU, and on a GPU as many as fit.
        progress: hears a line a document.
    """

    def __init__(
        self,
        config: EvalConfig,
        loaded: LoadedModel,
        examples: list[Example],
        *,
        batch_size: int | None = None,
        progress: Progress = lambda _: None,
    ) -> None:
        self.config, self.loaded, self.batch_size, self.progress = config, loaded, batch_size, progress
        self.cells = cells(config)
        #: Of what budgets are shares of. Windows are the same in every cache, and a short document is all windows.
        self.shape = loaded.shape.without_windows
        self.task = task_of(config.dataset)
        self.all_examples = examples
        shots, self.examples = select(config, examples)
        self.shot_ids = [shot.id for shot in shots]
        self.prompter = Prompter(
            loaded.tokenizer,
            self.task,
            shots,
            max_document_tokens=config.max_document_tokens,
            max_tokens=config.max_tokens,
            positions=loaded.max_positions,
        )

    def into(self, run: Run, jobs: int = 1) -> None:
        """Writes every document that the run does not hold yet.

        Args:
            jobs: processes that measure documents side by side, each with a model of its own and one thread.
        """
        done = {sample["id"]: sample["sha256"] for sample in run.samples()}
        for example in self.examples:
            if done.get(example.id, _digest(example)) != _digest(example):
                raise RunError(
                    f"{run.path} measured another document as {example.id}: the data changed", "give another --out"
                )
        run.write_json(ENV, self.environment())
        waiting = [example for example in self.examples if example.id not in done]
        if done:
            self.progress(f"{len(done)} documents are done already")
        count = len(self.examples) - len(waiting)
        for sample in self._by_processes(waiting, jobs) if jobs > 1 else self._by_batches(waiting):
            run.append(sample)
            count += 1
            what = sample["error"]["message"] if sample["error"] else f"{sample['tokens']['prompt']:,} tokens"
            self.progress(f"{count}/{len(self.examples)} {sample['id']}: {what}, {sample['seconds']:.1f} s")

    def _by_batches(self, waiting: list[Example]) -> Iterator[dict[str, Any]]:
        for batch in self._batches(waiting):
            yield from self._measure(batch)

    def _batches(self, waiting: list[Example], jobs: int = 1) -> Iterator[list[Example]]:
        """The documents that are measured together; the memory is divided among `jobs`, and so are the documents."""
        share = -(-len(waiting) // jobs)
        while waiting:
            size = self.batch_size or min(self._fitting(waiting, jobs), share)
            yield waiting[:size]
            waiting = waiting[size:]

    def _fitting(self, waiting: list[Example], jobs: int = 1) -> int:
        """How many of the next documents fit a job's share of the free memory with all their rows; at least one."""
        if self.loaded.device.type == "cpu":
            return 1
        free, vocabulary = _PLANNED * free_bytes(self.loaded.device) / jobs, self.loaded.model.config.vocab_size
        for count, example in enumerate(waiting[:_MOST_DOCUMENTS]):
            work = self._prepare(example)
            starts = [start for start, _, _ in work.starts.values()]
            # A row takes its cache, where all have the slots of the largest, and its logits in three types.
            slots = max((_mean(start.slots) for start in starts), default=0)
            held = slots * self._token_bytes + self._window_bytes
            free -= 2 * len(starts) * (held * _ROW_OVERHEAD + 14 * vocabulary)
            # One that gives each head its own number keeps them unpacked, padded to a head that may hold the prompt.
            by_head = sum(start.policy.by_head for start in starts)
            free -= 2 * by_head * len(work.asked.prompt.ids if work.asked else ()) * self._token_bytes
            if free < 0:
                return max(1, count)
        return min(len(waiting), _MOST_DOCUMENTS)

    def _by_processes(self, waiting: list[Example], jobs: int) -> Iterator[dict[str, Any]]:
        """Documents as they are done, in any order: what a run holds is looked up by id."""
        start = (self.config, str(self.loaded.path), str(self.loaded.device), self.all_examples)
        batches = [[example.id for example in batch] for batch in self._batches(waiting, jobs)]
        with get_context("spawn").Pool(jobs, _start_worker, start) as pool:
            for samples in pool.imap_unordered(_measure_batch, batches):
                yield from samples

    def environment(self) -> dict[str, Any]:
        """What the run ran on and with."""
        import torch
        import transformers

        device = self.loaded.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
        return {
            "auvsum": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": f"{device} ({name})",
            "dtype": str(self.loaded.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "batch_size": self.batch_size or "auto",
            "model": self.loaded.name,
            "documents": len(self.examples),
            "setting": self.prompter.setting,
            "shots": self.shot_ids,
            "truncated prompt": "without examples, the document cut at its end to what the bytes hold when it has been "
            "read (16 tokens at least); its cache then grows as it writes",
        }

    # -- one batch ----------------------------------------------------------------------------------------------------

    def _measure(self, examples: list[Example]) -> Iterator[dict[str, Any]]:
        begun = time.perf_counter()
        work = [self._prepare(example) for example in examples]
        ready = [item for item in work if item.error is None]
        written: dict[str, tuple[Written, list[Written]]] = {}
        failed: AuvsumError | None = None
        parts = len(ready)  # to find out which one it was
        try:
            written = self._write(ready)
        except DocumentError as error:
            failed = error
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            failed, parts = GenerationFailed("the document does not fit the memory", "measure fewer rows"), 2
        if failed is not None:
            release_memory(self.loaded.device)
            if len(ready) > 1:
                size = -(-len(examples) // parts)
                for start in range(0, len(examples), size):
                    yield from self._measure(examples[start : start + size])
                return
            ready[0].error = failed
        seconds = (time.perf_counter() - begun) / len(work)
        for item in work:
            yield self._sample(item, written.get(item.example.id), round(seconds, 3))

    def _prepare(self, example: Example) -> _Work:
        """The prompt, and for each cell its slots."""
        config = self.config
        document = arrange(example.document, example.reference, config.condition, seed=config.seed, id=example.id)
        work = _Work(example, document)
        try:
            asked = work.asked = self.prompter.ask(document)
        except DocumentError as error:
            work.error = error
            return work
        for cell in self.cells:
            if cell.policy is None:
                continue
            try:
                budget = resolved(cell, self.shape, len(asked.prompt.ids), self.prompter.max_new_tokens)
            except BudgetError as error:
                work.refused[cell.name] = error
                continue
            if cell.kind == "cut":
                prompt = self.prompter.truncated(asked, budget.slots)
                slots = len(prompt.ids) + self.prompter.max_new_tokens
                size = len(prompt.ids) * self._token_bytes
                work.starts[cell.name] = (
                    Start(cell.policy, slots, prompt.ids, self._group(cell)),
                    len(prompt.ids),
                    size,
                )
            else:
                start = Start(cell.policy, budget.slots, None, self._group(cell), cell.kv_bits)
                work.starts[cell.name] = (start, budget.slots, budget.bytes)
        return work

    def _group(self, cell: Cell) -> str:
        """Rows of which cells share a cache. On a CPU rows of unequal size cost what the largest costs; on a GPU every
        cache costs launches."""
        return cell.name if self.loaded.device.type == "cpu" else cell.kind

    def _write(self, work: list[_Work]) -> dict[str, tuple[Written, list[Written]]]:
        if not work:
            return {}
        metrics = self.config.metrics
        results = write_together(
            self.loaded.model,
            [item.asked.prompt.ids for item in work if item.asked],
            [[start for start, _, _ in item.starts.values()] for item in work],
            max_new_tokens=self.prompter.max_new_tokens,
            eos_ids=self.loaded.eos_ids,
            spans=[item.asked.prompt.document for item in work if item.asked],
            forced="fidelity" in metrics,
            free="rouge" in metrics or "bertscore" in metrics,
        )
        return {item.example.id: result for item, result in zip(work, results, strict=True)}

    # -- one document -------------------------------------------------------------------------------------------------

    def _speed(self, policy: Policy, slots: int | tuple[int, ...], prompt: tuple[int, ...]) -> float:
        """Decoded tokens a second of one cache alone, by the engine; the first token belongs to the prefill."""
        engine = Engine(self.loaded.model, policy)
        request = Request(prompt, slots, self.prompter.max_new_tokens)
        done = next(event for event in engine.run([request]) if isinstance(event, Finished))
        return (len(done.token_ids) - 1) / done.decode_seconds

    def _sample(self, item: _Work, written: tuple[Written, list[Written]] | None, seconds: float) -> dict[str, Any]:
        example, asked = item.example, item.asked
        head: dict[str, Any] = {
            "id": example.id,
            "sha256": _digest(example),
            "reference": example.reference,
            "setting": self.prompter.setting,
            "condition": self.config.condition,
            "error": item.error.record() if item.error else None,
            "seconds": seconds,
        }
        if asked is None or written is None:
            return {**head, "tokens": None, "shortened": 0, "rows": {}}
        full, others = written
        by_cell = dict(zip(item.starts, others, strict=True))
        start, end = asked.prompt.document
        shown = example.id in {e.id for e in self.examples[:_SHOWN]}
        summary = self.prompter.text(full.token_ids)
        # A text is cut where the prompt was: what no cache has read, no baseline may read either.
        read = item.document
        if asked.cut_tokens:
            read = self.loaded.tokenizer.decode(list(asked.prompt.ids[start:end]))
        rows: dict[str, dict[str, Any]] = {}
        for cell in self.cells:
            if cell.name in item.refused:
                rows[cell.name] = {"error": item.refused[cell.name].record()}
            elif cell.kind == "text":
                rows[cell.name] = {"summary": self._baseline(cell, read, len(summary.split()))}
            else:
                own = full if cell.kind == "full" else by_cell[cell.name]
                rows[cell.name] = self._row(cell, own, full, item, shown)
        pieces = [self.loaded.tokenizer.decode([i]) for i in asked.prompt.ids[start:end]] if shown else None
        return {
            **head,
            "tokens": {"document": asked.document_tokens, "prompt": len(asked.prompt.ids)},
            "shortened": asked.cut_tokens,
            "full_bytes": len(asked.prompt.ids) * self._token_bytes,
            "rows": rows,
            "pieces": pieces,
        }

    def _baseline(self, cell: Cell, document: str, words: int) -> str:
        return first_words(document, words) if cell.label == FIRST_WORDS else lexrank(document, words)

    def _row(self, cell: Cell, own: Written, full: Written, item: _Work, shown: bool) -> dict[str, Any]:
        assert item.asked is not None
        assert own.kept is not None
        start, end = item.asked.prompt.document
        row: dict[str, Any] = {}
        if cell.kind == "full":
            row |= {"slots": len(item.asked.prompt.ids), "bytes": len(item.asked.prompt.ids) * self._token_bytes}
        else:
            _, row["slots"], row["bytes"] = item.starts[cell.name]
        if own.token_ids or own.ended:
            row |= {"summary": self.prompter.text(own.token_ids), "tokens": len(own.token_ids), "ended": own.ended}
        if own.agrees:
            scored = min(len(own.agrees), max(1, self.prompter.scored(full.token_ids)))
            row |= {
                "agreement": sum(own.agrees[:scored]) / scored,
                "nats": sum(own.lost[:scored]) / scored,
                "scored": scored,
            }
        if THROUGHPUT in self.config.metrics and cell.kind != "cut":
            prompt = item.asked.prompt.ids
            if cell.kind == "full":
                policy: Policy = make_policy("full")
                slots: int | tuple[int, ...] = len(prompt) + self.prompter.max_new_tokens
            else:
                policy, slots = item.starts[cell.name][0].policy, item.starts[cell.name][0].slots
            row["tokens_per_s"] = self._speed(policy, slots, prompt)
        if cell.kind == "cache":
            kept = own.kept.tolist()
            row["kept"] = tenths(kept, start, end)
            if shown:
                row["shade"] = shade(kept[start:end])
        return row

    @property
    def _token_bytes(self) -> int:
        return self.shape.token_bytes

    @property
    def _window_bytes(self) -> int:
        whole = self.loaded.shape
        return sum(whole.windows) * whole.token_bytes // whole.layers


def _digest(example: Example) -> str:
    """By which documents of two runs are known to be the same."""
    return hashlib.sha256(example.document.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _mean(slots: int | tuple[int, ...]) -> float:
    return slots if isinstance(slots, int) else sum(slots) / len(slots)


_worker: dict[str, Any] = {}


def _start_worker(config: EvalConfig, model: str, device: str, examples: list[Example]) -> None:
    """A process of `--jobs`: its own model, and the same documents, examples and rows as all others."""
    runner = Runner(config, load(model, device=device, dtype=config.dtype, threads=1), examples)
    _worker.update(runner=runner, by_id={example.id: example for example in runner.examples})


def _measure_batch(ids: list[str]) -> list[dict[str, Any]]:
    return list(_worker["runner"]._measure([_worker["by_id"][id] for id in ids]))


def select(config: EvalConfig, examples: list[Example]) -> tuple[list[Example], list[Example]]:
    """The in-context examples and the documents to measure: the whole half, or `limit` of it drawn with the seed."""
    shots = choose_shots(examples, config.seed) if config.shots else []
    taken = {shot.id for shot in shots}
    first, step = {"all": (0, 1), "even": (0, 2), "odd": (1, 2)}[config.half]
    rest = [example for example in examples[first::step] if example.id not in taken]
    limit = config.limit or task_of(config.dataset).limit
    if limit is not None and limit < len(rest):
        chosen = set(random.Random(config.seed).sample(range(len(rest)), limit))
        rest = [example for i, example in enumerate(rest) if i in chosen]
    return shots, rest

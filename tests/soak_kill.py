"""Kills a folder run at random moments, resumes it, and compares every output with an uninterrupted run.

    python -m tests.soak_kill --documents 50 --kills 100

Children are forked once the heavy imports are done, so that a kill falls into the work and not into an import. Checked
after every kill: whatever is there is whole. At the end of every run: nothing lost, nothing twice, all hashes equal.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

import auvsum.summarize
from auvsum.cli.app import run
from tests import checkpoints

SENTENCE = "The council met in the town hall and there it decided to build a bridge over the river. "


class Soak:
    def __init__(self, folder: Path, documents: int) -> None:
        self.folder = folder
        self.documents = documents
        self.model = checkpoints.llama(folder / "model")
        for number in range(documents):
            path = folder / "in" / f"{number % 5}" / f"{number:03}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"Number {number}. " + SENTENCE * (1 + number % 4))
        begun = time.perf_counter()
        assert os.waitpid(self.start("reference"), 0)[1] == 0
        self.seconds = time.perf_counter() - begun
        self.reference = self.hashes("reference")
        assert len(self.reference) == documents

    def start(self, out: str) -> int:
        """Forks a run -> its process id."""
        child = os.fork()
        if child:
            return child
        os.chdir(self.folder)
        for stream in (1, 2):
            os.dup2(os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        flags = ["--model", str(self.model), "--dtype", "fp32", "--threads", "1", "--max-tokens", "8", "--budget", "96"]
        os._exit(run(["summarize", "in", "-O", out, "--batch-size", "3", *flags]))

    def hashes(self, out: str) -> dict[str, str]:
        folder = self.folder / out
        files = [path for path in folder.rglob("*.txt") if path.is_file()]
        return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    def check_whole(self, out: str) -> None:
        """What is there is what the uninterrupted run wrote."""
        for name, value in self.hashes(out).items():
            assert self.reference[name] == value, f"{name} is not whole"

    def check_complete(self, out: str) -> None:
        assert self.hashes(out) == self.reference
        journal = (self.folder / out / ".auvsum" / "manifest.jsonl").read_text().splitlines()
        outputs = [json.loads(line)["output"] for line in journal]
        assert Counter(outputs) == Counter(self.reference.keys()), "a document was done twice, or not noted"
        index = (self.folder / out / "index.jsonl").read_text().splitlines()
        assert [json.loads(line)["output"] for line in index] == sorted(self.reference)

    def kill(self, kills: int, chance: random.Random) -> Counter[str]:
        """-> how often each thing happened."""
        happened: Counter[str] = Counter()
        cycle = 0
        while happened["kills"] < kills:
            child = self.start(f"out{cycle}")
            time.sleep(chance.uniform(0, self.seconds))
            number = chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
            if os.waitpid(child, os.WNOHANG) == (0, 0):
                os.kill(child, number)
                status = os.waitpid(child, 0)[1]
                code = os.waitstatus_to_exitcode(status)
                assert code in (0, 130, -number), f"exit code {code} after {number!r}"
                happened["kills"] += code != 0
                happened[number.name] += code != 0
                self.check_whole(f"out{cycle}")
            if self.hashes(f"out{cycle}").keys() == self.reference.keys():
                self._finish(cycle)
                happened["complete runs"] += 1
                cycle += 1
        self._finish(cycle)
        happened["complete runs"] += 1
        return happened

    def _finish(self, cycle: int) -> None:
        assert os.waitpid(self.start(f"out{cycle}"), 0)[1] == 0
        self.check_complete(f"out{cycle}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=50)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    assert auvsum.summarize.Summarizer
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder), given.documents)
        begun = time.perf_counter()
        happened = soak.kill(given.kills, random.Random(given.seed))
        result = {"documents": given.documents, **happened, "seconds": round(time.perf_counter() - begun, 1)}
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()

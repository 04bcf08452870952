"""A Ray cluster of several nodes on this machine: one is killed in the middle of a run, then the driver; then resumed.

    python -m tests.soak_ray --documents 300

Ends with what `count_outputs.py` counts in the output files, compared with an undisturbed run of the local engine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

from ray.cluster_utils import Cluster

from tests import checkpoints

SENTENCE = "The council met in the town hall and there it decided to build a bridge over the river. "


class Soak:
    """Documents, a model, a local reference, and a cluster whose head does no work."""

    def __init__(self, folder: Path, documents: int, nodes: int) -> None:
        self.folder = folder
        self.documents = documents
        checkpoints.llama(folder / "model")
        for number in range(documents):
            path = folder / "in" / f"{number % 5}" / f"{number:03}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"Number {number}. " + SENTENCE * (1 + number % 4))
        assert self.start("reference").wait() == 0, self.log("reference")
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.nodes = [self.cluster.add_node(num_cpus=1, include_dashboard=False) for _ in range(nodes)]
        self.cluster.wait_for_nodes()

    def start(self, out: str, *flags: str) -> subprocess.Popen[bytes]:
        """A run of the command line, whose stdout must stay empty."""
        command = [sys.executable, "-m", "auvsum", "summarize", "in", "-O", out, "--model", "model", *flags]
        settings = ["--dtype", "fp32", "--threads", "1", "--max-tokens", "100", "--budget", "96", "--batch-size", "2"]
        with open(self.folder / f"{out}.err", "ab") as err, open(self.folder / f"{out}.stdout", "ab") as stdout:
            return subprocess.Popen([*command, *settings], cwd=self.folder, stdout=stdout, stderr=err)

    def start_on_ray(self) -> subprocess.Popen[bytes]:
        return self.start("out", "--engine", "ray", "--address", self.cluster.address)

    def log(self, out: str) -> str:
        return (self.folder / f"{out}.err").read_text(errors="replace")

    def wait_for(self, share: float, process: subprocess.Popen[bytes]) -> int:
        """Waits until that share of the documents is finished -> how many are."""
        journal = self.folder / "out" / ".auvsum" / "manifest.jsonl"
        while (done := journal.read_bytes().count(b"\n") if journal.exists() else 0) < share * self.documents:
            assert process.poll() is None, self.log("out")
            time.sleep(0.02)
        return done

    def run(self) -> dict[str, object]:
        process = self.start_on_ray()
        happened: dict[str, object] = {"node killed after": self.wait_for(0.3, process)}
        self.cluster.remove_node(self.nodes[0], allow_graceful=False)
        begun = time.perf_counter()
        # Unless it is noticed while documents are left, this shows nothing.
        while "warning: the worker on" not in self.log("out"):
            assert process.poll() is None, self.log("out")
            time.sleep(0.05)
        happened["noticed after s"] = round(time.perf_counter() - begun, 1)
        happened["driver killed after"] = self.wait_for(0.6, process)
        process.kill()
        assert process.wait() == -9
        assert self.start_on_ray().wait() == 0, self.log("out")
        assert (noise := (self.folder / "out.stdout").read_bytes()) == b"", noise
        counter = Path(__file__).with_name("count_outputs.py")
        counted = subprocess.run(
            [sys.executable, str(counter), "in", "out", "reference"], cwd=self.folder, capture_output=True, check=False
        )
        happened |= json.loads(counted.stdout)
        assert counted.returncode == 0, happened
        return happened


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=300)
    parser.add_argument("--nodes", type=int, default=3)
    given = parser.parse_args()
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder), given.documents, given.nodes)
        try:
            result = soak.run()
        finally:
            soak.cluster.shutdown()
    sys.stdout.write(json.dumps({**result, "seconds": round(time.perf_counter() - begun, 1)}) + "\n")


if __name__ == "__main__":
    main()

"""A run on disk: `config.yaml`, `samples.jsonl` (a line a document, flushed), `metrics.json`, `env.json`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from auvsum.errors import RunError
from auvsum.eval.config import EvalConfig

CONFIG, SAMPLES, METRICS, ENV = "config.yaml", "samples.jsonl", "metrics.json", "env.json"


class Run:
    """A run directory.

    Args:
        path: `runs/<name>`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        """The directory's name."""
        return self.path.resolve().name

    @property
    def config(self) -> EvalConfig:
        """What it measures.

        Raises:
            RunError: the directory is not a run.
        """
        try:
            values = yaml.safe_load((self.path / CONFIG).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise RunError(f"{self.path} is not a run: no readable {CONFIG}", "type: auvsum eval --out DIR") from error
        if not isinstance(values, dict):
            raise RunError(f"{self.path / CONFIG} does not hold a configuration", "start a new run")
        return EvalConfig.from_mapping(values, str(self.path / CONFIG))

    def begin(self, config: EvalConfig, *, resume: bool) -> None:
        """Makes the directory, or goes on in it.

        Raises:
            RunError: it holds a run of another configuration, or samples although nobody said `--resume`.
        """
        if (self.path / CONFIG).exists():
            if (mine := self.config) != config:
                other = [key for key in vars(config) if getattr(mine, key) != getattr(config, key)]
                raise RunError(
                    f"{self.path} holds a run of another configuration ({', '.join(other)} differ)",
                    "give another --out",
                )
            if not resume and any(self.samples()):
                raise RunError(f"{self.path} already holds samples", "type --resume to go on, or give another --out")
        elif self.path.exists() and any(self.path.iterdir()):
            raise RunError(f"{self.path} is not empty and not a run", "give another --out")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_whole(self.path / CONFIG, config.to_yaml())
        except OSError as error:
            raise RunError(f"{self.path} cannot be written: {error.strerror}", "give another --out") from error

    def samples(self) -> Iterator[dict[str, Any]]:
        """The finished documents. A last line that a killed run left half written is not one."""
        try:
            lines = (self.path / SAMPLES).read_text(encoding="utf-8").split("\n")
        except FileNotFoundError:
            return
        for number, line in enumerate(lines, 1):
            if not line:
                continue
            try:
                sample = json.loads(line)
            except ValueError as error:
                if number == len(lines):
                    return
                raise RunError(
                    f"{self.path / SAMPLES}, line {number} is not JSON", "remove the line, then --resume"
                ) from error
            if not (isinstance(sample, dict) and {"id", "sha256", "error", "rows"} <= set(sample)):
                raise RunError(
                    f"{self.path / SAMPLES}, line {number} is no measured document", "remove the line, then --resume"
                )
            yield sample

    def append(self, sample: Mapping[str, Any]) -> None:
        """Adds a finished document, after what a killed run may have left."""
        path = self.path / SAMPLES
        line = json.dumps(sample, ensure_ascii=False, allow_nan=False) + "\n"
        with path.open("ab+") as stream:
            size = stream.seek(0, os.SEEK_END)
            if size and (stream.seek(-1, os.SEEK_END), stream.read(1))[1] != b"\n":
                _drop_last_line(path)
            stream.write(line.encode("utf-8"))
            stream.flush()

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Writes one of the other files, whole or not at all; a list of numbers takes one line."""
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=1)
        text = re.sub(r"\[[-\d\s.,e+null]*\]", lambda found: re.sub(r"\s+", " ", found[0]), text)
        write_whole(self.path / name, text + "\n")

    def metrics(self) -> dict[str, Any]:
        """What `auvsum score` computed.

        Raises:
            RunError: it has not been scored.
        """
        self.config  # noqa: B018  (a folder that is not a run is said to be so)
        try:
            value = json.loads((self.path / METRICS).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunError(f"{self.path} has no scores", f"type: auvsum score {self.path}") from error
        if not (isinstance(value, dict) and {"config", "documents", "rows", "paired"} <= set(value)):
            raise RunError(f"{self.path / METRICS} holds no scores", f"type: auvsum score {self.path}")
        return value

    def environment(self) -> dict[str, Any]:
        """What it ran on; empty if nobody noted it."""
        try:
            value: dict[str, Any] = json.loads((self.path / ENV).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return value


def write_whole(path: Path, text: str) -> None:
    """Writes a file beside its place, then renames it."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _drop_last_line(path: Path) -> None:
    data = path.read_bytes()
    with path.open("rb+") as stream:
        stream.truncate(data.rfind(b"\n") + 1)

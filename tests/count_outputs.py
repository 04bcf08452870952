"""Counts what a run over a folder left behind, from the files alone: no code of auvsum's is used.

    python tests/count_outputs.py IN OUT REFERENCE

IN holds the documents (`*.txt`), OUT what was made of them, REFERENCE what an undisturbed local run made. Every
document must have one output, one line in one journal and one in the index; outputs must be the reference's, byte by
byte.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path


def files(folder: Path) -> dict[str, bytes]:
    """Every text file below a folder, without what is hidden."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    names = (path for path in found if not path.parts[0].startswith(".") and path.name != "index.jsonl")
    return {str(path): (folder / path).read_bytes() for path in names}


def lines(path: Path) -> list[str]:
    """The outputs that a journal, or the index, names."""
    return [json.loads(line)["output"] for line in path.read_text(encoding="utf-8").splitlines()]


def count(documents: Path, out: Path, reference: Path) -> dict[str, int]:
    """What is wrong, in numbers: all are 0 but the first."""
    wanted, made, right = files(documents), files(out), files(reference)
    journal = Counter(name for path in out.glob(".auvsum/manifest*.jsonl") for name in lines(path))
    index = Counter(lines(out / "index.jsonl"))
    return {
        "documents": len(wanted),
        "missing": len(wanted.keys() - made.keys()),
        "not asked for": len(made.keys() - wanted.keys()),
        "other bytes": sum(made[name] != right[name] for name in made.keys() & right.keys()),
        "without a reference": len(made.keys() - right.keys()),
        "not once in the journals": sum(journal[name] != 1 for name in wanted.keys() | journal.keys()),
        "not once in the index": sum(index[name] != 1 for name in wanted.keys() | index.keys()),
    }


def main() -> None:
    counted = count(*map(Path, sys.argv[1:4]))
    sys.stdout.write(json.dumps(counted) + "\n")
    sys.exit(any(number for what, number in counted.items() if what != "documents"))


if __name__ == "__main__":
    main()

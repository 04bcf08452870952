"""Documents of 20,000 tokens by the command line: how many an hour does this machine summarize?

    python benchmarks/bench_documents.py                                  # 3 documents, default settings: 2-3 minutes
    python benchmarks/bench_documents.py --documents 2 --strategies auto extract --windows 2048 1024
    python benchmarks/bench_documents.py --strategies map-reduce --parts 192 96

Each row is one `auvsum summarize FOLDER -O FOLDER` on the processor, a process of its own, all of it on one clock.
The documents are the sample texts, each beginning at another paragraph. Documents an hour are those of a long run: the
time to load the model, as the record states it, is taken off, and the rest is divided by the number of documents.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common

#: The command line with another length of windows' summaries, for which there is no flag.
_MAIN = "import sys, auvsum.rounds; auvsum.rounds.PART = {part}; from auvsum.__main__ import main; sys.exit(main())"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--strategies", nargs="+", default=["auto"])
    parser.add_argument("--windows", type=int, nargs="+", help="tokens of a window; the default one without it")
    parser.add_argument("--parts", type=int, nargs="+", help="most tokens of a window's summary; the tool's without it")
    parser.add_argument("--more", nargs="*", default=[], help="further flags without their dashes: weights=int8")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, help="JSON, written after each row; rows of other settings stay in it")
    given = parser.parse_args()

    old = json.loads(given.out.read_text(encoding="utf-8"))["rows"] if given.out and given.out.is_file() else []
    record: dict[str, Any] = {"benchmark": "documents", **common.machine(), **common.versions(), "rows": old}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts(given.model, given.documents, given.tokens, folder / "in")
        cases = product(given.strategies, given.windows or [None], given.parts or [None])
        for number, (strategy, window, part) in enumerate(cases):
            flags = [f"--strategy={strategy}", *([f"--window={window}"] if window else [])]
            flags += [f"--{flag}" for flag in given.more] + ([f"--threads={given.threads}"] if given.threads else [])
            row = _measure(folder / "in", folder / str(number), given, part, flags)
            record["rows"] = [one for one in record["rows"] if one["settings"] != row["settings"]] + [row]
            print(row, file=sys.stderr, flush=True)
            if given.out:
                given.out.write_text(json.dumps(record).replace("}, {", "},\n{") + "\n", encoding="utf-8")
    common.print_table(
        ["settings", "documents", "seconds", "a document", "an hour"],
        [
            [r["settings"], str(r["documents"]), f"{r['seconds']:.0f}", f"{r['seconds_a_document']:.1f}",
             f"{r['documents_an_hour']:.0f}"]
            for r in record["rows"]
        ],
    )  # fmt: skip
    common.print_json(record)


def texts(model: str, number: int, tokens: int, folder: Path) -> None:
    """Files of so many tokens each."""
    from auvsum._env import prepare

    prepare()
    from transformers import AutoTokenizer

    from auvsum.engine.models import resolve

    tokenizer = AutoTokenizer.from_pretrained(resolve(model), local_files_only=True)
    samples = [common.ROOT / "samples" / name for name in ("money-bail.txt", "beige-book.txt")]
    paragraphs = [part for path in samples for part in path.read_text(encoding="utf-8").split("\n\n") if part.strip()]
    folder.mkdir()
    for document in range(number):
        start = document * len(paragraphs) // number
        text = "\n\n".join((paragraphs[start:] + paragraphs[:start]) * 20)
        offsets = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False, verbose=False)
        (folder / f"{document}.txt").write_text(text[: offsets["offset_mapping"][tokens - 1][1]], encoding="utf-8")


def _measure(
    source: Path, target: Path, given: argparse.Namespace, part: int | None, flags: list[str]
) -> dict[str, Any]:
    tool = ("-c", _MAIN.format(part=part)) if part else ("-m", "auvsum")
    command = [
        *(sys.executable, *tool, "summarize", str(source), "-O", str(target), "--quiet"),
        *("--model", given.model, "--device", "cpu", "--format", "json", *flags),
    ]
    start = time.perf_counter()
    subprocess.run(command, check=True, cwd=common.ROOT)
    seconds = time.perf_counter() - start
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(target.glob("*.json"))]
    assert len(records) == given.documents
    each = (seconds - records[0]["time"]["load_s"]) / len(records)
    return {
        "settings": " ".join([*flags, *([f"(summaries of {part} tokens)"] if part else [])]),
        "strategy": records[0]["strategy"],
        "documents": len(records),
        "tokens": round(sum(record["tokens"]["document"] for record in records) / len(records)),
        "written": round(sum(record["tokens"]["generated"] for record in records) / len(records)),
        "seconds": round(seconds, 1),
        "prefill_s": round(sum(record["time"]["prefill_s"] for record in records) / len(records), 1),
        "decode_s": round(sum(record["time"]["decode_s"] for record in records) / len(records), 1),
        "batch_size": max(record["settings"]["batch_size"] for record in records),
        "seconds_a_document": round(each, 2),
        "documents_an_hour": round(3600 / each, 1),
    }


if __name__ == "__main__":
    main()

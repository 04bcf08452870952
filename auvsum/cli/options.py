"""The flags, each written once. Every default is `None`: what was not given must not hide what a file says."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from auvsum.config import parse_option


class Color(str, Enum):
    auto = "auto"
    always = "always"
    never = "never"


class Format(str, Enum):
    text = "text"
    json = "json"


class SummaryFormat(str, Enum):
    text = "text"
    md = "md"
    json = "json"
    jsonl = "jsonl"


class Where(str, Enum):
    local = "local"
    ray = "ray"


def _option(help_: str, *names: str, metavar: str | None = None) -> object:
    return typer.Option(*names, help=help_, metavar=metavar, show_default=False)


Model = Annotated[str | None, _option("Short name, folder, or hub id in the local cache.", metavar="NAME")]
Download = Annotated[bool | None, _option("Allow a missing model to be downloaded.", "--download/--no-download")]

Policy = Annotated[str | None, _option("What leaves the cache: auto, or a name of `auvsum policies`.", metavar="NAME")]
PolicyOption = Annotated[
    list[str] | None, _option("An option of the policy; repeatable.", "--policy-option", metavar="KEY=VALUE")
]
Budget = Annotated[
    str | None,
    _option("auto, 4% of the full cache's bytes, 512 slots a layer, or 64MiB.", metavar="AMOUNT"),
]
BudgetScope = Annotated[str | None, _option("bytes, or the accounting of the AUV paper.", metavar="bytes|paper")]
KvBits = Annotated[str | None, _option("Bits of a stored key or value.", metavar="auto|16|8|4")]
Strategy = Annotated[
    str | None,
    _option("Read in one pass, or in chunks over the budgeted cache.", metavar="auto|single|stream"),
]
Chunk = Annotated[int | None, _option("Tokens a chunk of the stream strategy.", metavar="N")]

DataDir = Annotated[Path | None, _option("Folder of NAME.jsonl files; or AUVSUM_DATA_DIR.", metavar="DIR")]
MaxTokens = Annotated[int | None, _option("The most tokens to write.", metavar="N")]
Sentences = Annotated[int | None, _option("Length to ask for, in sentences.", metavar="N")]
Words = Annotated[int | None, _option("Length to ask for, in words.", metavar="N")]
Template = Annotated[str | None, _option("auto, chat, completion, or a YAML file.", metavar="NAME|FILE")]
Instruction = Annotated[str | None, _option("What to ask for instead of a summary.", metavar="TEXT")]
Query = Annotated[str | None, _option("A question to answer instead of a summary.", metavar="TEXT")]
Style = Annotated[str | None, _option("Shape of the summary.", metavar="paragraph|bullets")]
Cite = Annotated[bool | None, _option("Give sources; flag numbers and names not in the document.", "--cite/--no-cite")]
Pages = Annotated[str | None, _option("Of a PDF only these pages: 10-40, or 1-3,9.", metavar="PAGES")]
Window = Annotated[int | None, _option("Tokens in a window of a long document.", metavar="N")]
Truncate = Annotated[bool | None, _option("Cut a document that is too long, and say so.", "--truncate/--no-truncate")]
Encoding = Annotated[str | None, _option("Encoding of the files; otherwise detected.", metavar="NAME")]

Device = Annotated[
    str | None, _option("auto, cpu, cuda, cuda:1, or cuda:0+cuda:1 for a model over both.", metavar="NAME")
]
Devices = Annotated[
    str | None, _option("A worker on each of these devices: all GPUs, or 0,1, or cpu,cpu.", metavar="all|LIST")
]
Placed = Annotated[Where, _option("Summarize on this machine, or on a Ray cluster.", "--engine")]
Address = Annotated[str | None, _option("The Ray cluster to use; auto is the one here.", metavar="HOST:PORT|auto")]
Workers = Annotated[int | None, _option("Ray workers; otherwise one a GPU, or one a node.", metavar="N")]
Dtype = Annotated[str | None, _option("auto, bf16, fp16 or fp32.", metavar="NAME")]
Weights = Annotated[str | None, _option("auto, bf16, int8 (CPU: half the memory, faster) or gguf.", metavar="NAME")]
Threads = Annotated[int | None, _option("CPU threads.", metavar="N")]
Temperature = Annotated[float | None, _option("0 takes the likeliest token each time.", metavar="X")]
TopP = Annotated[float | None, _option("Sample from the likeliest tokens up to this probability.", metavar="X")]
RepetitionPenalty = Annotated[
    float | None, _option("Discourage tokens the summary already has; 1 does not.", metavar="X")
]
Seed = Annotated[int | None, _option("Seed of the sampling.", metavar="N")]

BatchSize = Annotated[
    str | None,
    _option(
        "Documents written together; auto: as many as free memory holds, at most 8 on a CPU and 64 on a GPU.",
        "--batch-size",
        metavar="N|auto",
    ),
]
Timeout = Annotated[float | None, _option("The most time a document may take.", metavar="SECONDS")]

Output = Annotated[Path | None, _option("Write everything to one file.", "--output", "-o", metavar="FILE")]
OutputDir = Annotated[
    Path | None,
    _option("Write a file a document, and skip what is finished there.", "--output-dir", "-O", metavar="DIR"),
]
Force = Annotated[bool, _option("With -O: do finished documents again.", "--force")]
FilesFrom = Annotated[str | None, _option("Read names from a file; - is standard input.", metavar="FILE|-")]
Null = Annotated[bool, _option("Names in that list end with NUL bytes.", "--null", "-0")]
Include = Annotated[
    list[str] | None, _option("Of folders, only files like this; repeatable.", "--include", metavar="PATTERN")
]
Exclude = Annotated[
    list[str] | None, _option("Of folders, no files or folders like this; repeatable.", "--exclude", metavar="PATTERN")
]
Hidden = Annotated[bool, _option("Of folders, also names that start with a dot.", "--hidden")]
Shard = Annotated[
    str | None, _option("Only this part of the documents, the third of eight: one run a machine.", metavar="3/8")
]
SummaryFormatOption = Annotated[SummaryFormat, _option("The summary, with a heading, or its whole record.", "--format")]
Score = Annotated[
    Path | None, _option("A reference summary: adds ROUGE and BERTScore to the record.", metavar="REF.txt")
]
ShowPrompt = Annotated[bool, _option("Show what the model would read, and write no summary.", "--show-prompt")]
ShowPanel = Annotated[bool | None, _option("A live panel on stderr.", "--panel/--no-panel")]

FormatOption = Annotated[Format, _option("The summary, or its whole record.", "--format")]
DryRun = Annotated[bool, _option("Say what would be read and held, and write no summary.", "--dry-run")]
Config = Annotated[Path | None, _option("Settings to use instead of ./auvsum.yaml.", "--config")]
Origins = Annotated[bool, _option("Where each value came from.", "--origins")]
ColorOption = Annotated[Color, _option("Colours on stderr.", "--color")]
Quiet = Annotated[bool, _option("Only errors on stderr.", "--quiet", "-q")]
Verbose = Annotated[bool, _option("More on stderr.", "--verbose", "-v")]
Debug = Annotated[bool, _option("Tracebacks for errors.", "--debug")]


def policy_options(given: list[str] | None) -> dict[str, object] | None:
    """Repeated `--policy-option KEY=VALUE` as a mapping; `None` if there was none."""
    return dict(parse_option(text) for text in given) if given else None


def data_folder(given: Path | None) -> Path | None:
    """Where `--data-dir` or AUVSUM_DATA_DIR says that data sets lie."""
    return given or (Path(path) if (path := os.environ.get("AUVSUM_DATA_DIR")) else None)

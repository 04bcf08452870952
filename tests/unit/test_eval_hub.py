"""Data sets through the `datasets` library: from its local cache, in a process without a network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from auvsum.eval.tasks import TASKS

pytest.importorskip("datasets")
SOURCE = TASKS["cnn_dailymail"].source
_SCRIPT = """
import sys
from auvsum.errors import DatasetError
from auvsum.eval.datasets import load_examples
try:
    for one in load_examples(sys.argv[1]):
        print(one.id, one.document, one.reference, sep="|")
except DatasetError as error:
    print(f"{error} -> {error.hint}")
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the library makes it of a parquet file."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path_factory.mktemp("hub")
    rows = {"article": ["An article.", "Another."], "highlights": ["A summary.", None], "id": ["a", "b"]}
    pyarrow.parquet.write_table(pyarrow.table(rows), folder / "rows.parquet")
    datasets.disable_progress_bars()
    files = {"test": str(folder / "rows.parquet")}
    datasets.load_dataset("parquet", data_files=files, cache_dir=str(folder / "made"))
    return next((folder / "made" / "parquet").glob("*/*/*/dataset_info.json")).parent


def cached(made: Path, home: Path, revision: str) -> None:
    """Puts the folder where a downloaded data set would lie."""
    assert SOURCE is not None
    into = home / "datasets" / "abisee___cnn_dailymail" / str(SOURCE.configuration) / "0.0.0" / revision
    into.mkdir(parents=True)
    shutil.copy(made / "parquet-test.arrow", into / "cnn_dailymail-test.arrow")
    info = json.loads((made / "dataset_info.json").read_text(encoding="utf-8"))
    info |= {"dataset_name": "cnn_dailymail", "config_name": SOURCE.configuration}
    (into / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")


def load(home: Path, name: str) -> tuple[list[str], str]:
    environment = {**os.environ, "HF_HOME": str(home), "PYTHONPATH": str(Path(__file__).parents[2])}
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        environment.pop(variable, None)
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, name], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout.splitlines(), done.stderr


def test_a_data_set_in_the_local_cache_is_read_without_a_network(made: Path, tmp_path: Path) -> None:
    assert SOURCE is not None
    cached(made, tmp_path, SOURCE.revision)
    rows, said = load(tmp_path, "cnn_dailymail")
    assert rows == ["a|An article.|A summary.", "b|Another.|"]
    assert said == ""


def test_another_revision_is_not_taken_for_the_pinned_one(made: Path, tmp_path: Path) -> None:
    cached(made, tmp_path, "0" * 40)
    (line,), _ = load(tmp_path, "cnn_dailymail")
    assert f"holds revision {'0' * 40}" in line
    assert "type: auvsum eval --dataset cnn_dailymail --download" in line


def test_what_is_not_there_says_what_to_type(tmp_path: Path) -> None:
    (line,), _ = load(tmp_path, "xsum")
    assert "EdinburghNLP/xsum is not in the local Hugging Face cache" in line
    assert "type: auvsum eval --dataset xsum --download, or type --data-dir DIR, where DIR holds xsum.jsonl" in line


def test_parquet_columns_by_other_names(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    from auvsum.errors import DatasetError
    from auvsum.eval.datasets import load_examples

    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["t"], "gist": ["g"], "key": [7]}), path)
    (example,) = load_examples(str(path), columns={"document": "text", "summary": "gist", "id": "key"})
    assert (example.id, example.document, example.reference) == ("7", "t", "g")
    with pytest.raises(DatasetError, match="no column 'document'; there is: text, gist, key"):
        load_examples(str(path))
    path.write_text("no parquet", encoding="utf-8")
    with pytest.raises(DatasetError, match="cannot be read"):
        load_examples(str(path))

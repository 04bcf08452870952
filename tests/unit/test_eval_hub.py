"""Data sets through the `datasets` library: from its local cache, in a process without a network; and with `--download`
from a hub, which is a server in this process."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

from auvsum.eval.tasks import TASKS

pytest.importorskip("datasets")
SOURCE = TASKS["cnn_dailymail"].source
_SCRIPT = """
import sys
from auvsum.errors import DatasetError
from auvsum.eval.datasets import load_examples
try:
    for one in load_examples(sys.argv[1], download="--download" in sys.argv):
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


def load(home: Path, *arguments: str, endpoint: str = "") -> tuple[list[str], str]:
    environment = {**os.environ, "HF_HOME": str(home), "PYTHONPATH": str(Path(__file__).parents[2])}
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "AUVSUM_SET_HF_HUB_OFFLINE"):
        environment.pop(variable, None)
    environment |= {"HF_ENDPOINT": endpoint} if endpoint else {}
    command = [sys.executable, "-c", _SCRIPT, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout.splitlines(), done.stderr


class Hub(ThreadingHTTPServer):
    """What the library asks of the hub: a repository's commit, its folders, its files, at one revision."""

    commit = "c" * 40

    def __init__(self, repository: str, revision: str, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.repository, self.revision, self.files = repository, revision, files
        self.commit = revision if len(revision) == 40 else self.commit
        self.asked: list[str] = []

    def entries(self, folder: str) -> list[dict[str, object]]:
        found: dict[str, dict[str, object]] = {}
        for name in self.files:
            if name.startswith(folder and f"{folder}/"):
                path = "/".join(name.split("/")[: len(folder.split("/")) + 1 if folder else 1])
                size = len(self.files[name])
                file = {"type": "file", "path": path, "size": size, "oid": self.oid(name)}
                found[path] = file if path == name else {"type": "directory", "path": path, "oid": "0" * 40}
        return list(found.values())

    def oid(self, name: str) -> str:
        return hashlib.sha1(self.files[name], usedforsecurity=False).hexdigest()


class _Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        hub, path = self.server, unquote(self.path).partition("?")[0]
        hub.asked.append(f"{self.command} {path}")
        path = path.replace(hub.revision, hub.commit)
        api, files = f"/api/datasets/{hub.repository}", f"/datasets/{hub.repository}/resolve/{hub.commit}/"
        if path.startswith(f"{api}/tree/{hub.commit}"):
            self._send(hub.entries(path.removeprefix(f"{api}/tree/{hub.commit}").strip("/")))
        elif path == f"{api}/revision/{hub.commit}":
            self._send({"_id": "1", "id": hub.repository, "sha": hub.commit, "siblings": []})
        elif path.startswith(files) and path.removeprefix(files) in hub.files:
            name = path.removeprefix(files)
            self._send(hub.files[name], {"ETag": f'"{hub.oid(name)}"', "X-Repo-Commit": hub.commit})
        else:
            self._send(b"", {"X-Error-Code": "EntryNotFound"}, 404)

    do_HEAD = do_GET

    def _send(self, what: object, headers: dict[str, str] | None = None, status: int = 200) -> None:
        body = what if isinstance(what, bytes) else json.dumps(what).encode()
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Tests are quiet."""


@pytest.fixture
def hub(request: pytest.FixtureRequest) -> Iterator[Hub]:
    """One that has the data set of the parameter, laid out as the real one is."""
    import pyarrow
    import pyarrow.parquet

    source = TASKS[request.param].source
    assert source is not None
    texts = {"document": "From afar.", "summary": "A far summary.", "id": "far"}
    rows = {theirs: [texts[ours]] for ours, theirs in source.columns.items()}
    parquet = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(rows), parquet)
    if source.configuration:
        split = f"  data_files:\n  - split: test\n    path: {source.configuration}/test-*"
        card = f"---\nconfigs:\n- config_name: {source.configuration}\n{split}\n---\n".encode()
        files = {"README.md": card, f"{source.configuration}/test-00000-of-00001.parquet": parquet.getvalue()}
    else:
        files = {"default/test/0000.parquet": parquet.getvalue()}
    server = Hub(source.repository, source.revision, files)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_data_set_in_the_local_cache_is_read_without_a_network(made: Path, tmp_path: Path) -> None:
    assert SOURCE is not None
    cached(made, tmp_path, SOURCE.revision)
    rows, said = load(tmp_path, "cnn_dailymail")
    assert rows == ["a|An article.|A summary.", "b|Another.|"]
    assert said == ""


@pytest.mark.parametrize(("hub", "name"), [("cnn_dailymail",) * 2, ("xsum",) * 2], indirect=["hub"])
def test_with_download_it_is_fetched_at_the_pinned_revision_and_then_read_without_asking(
    hub: Hub, name: str, tmp_path: Path
) -> None:
    endpoint = f"http://127.0.0.1:{hub.server_address[1]}"
    (line,), _ = load(tmp_path, name, endpoint=endpoint)
    assert "is not in the local Hugging Face cache" in line
    assert hub.asked == []
    rows, said = load(tmp_path, name, "--download", endpoint=endpoint)
    assert (rows, said) == (["far|From afar.|A far summary."], "")
    assert any(asked.endswith(".parquet") for asked in hub.asked)
    hub.asked.clear()
    rows, _ = load(tmp_path, name, endpoint=endpoint)
    assert rows == ["far|From afar.|A far summary."]
    assert hub.asked == []


@pytest.mark.parametrize("hub", ["cnn_dailymail"], indirect=True)
def test_a_hub_that_lacks_the_revision_says_so(hub: Hub, tmp_path: Path) -> None:
    hub.revision = hub.commit = "1" * 40
    (line,), _ = load(tmp_path, "cnn_dailymail", "--download", endpoint=f"http://127.0.0.1:{hub.server_address[1]}")
    assert "abisee/cnn_dailymail could not be fetched" in line
    assert "--data-dir DIR" in line


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

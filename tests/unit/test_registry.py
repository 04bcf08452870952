"""Names, cache folders, and the environment; importing all of it must be cheap."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from auvsum import _env
from auvsum.engine import registry


def test_the_default_is_known_and_pinned() -> None:
    model = registry.KNOWN[registry.DEFAULT_MODEL]
    assert model.positions == 8192
    assert model.licence == "Apache-2.0"
    assert model.wheel is not None
    assert "==" in model.wheel.requirement
    assert [len(digest) for digest in (model.wheel.sha256, model.wheel.member_sha256)] == [64, 64]


def test_every_known_model_is_of_a_supported_architecture() -> None:
    for name, model in registry.KNOWN.items():
        assert name == model.name == name.lower()
        assert model.model_type in registry.SUPPORTED
        assert registry.is_hub_id(model.hub_id)


def test_opt_is_known_in_all_sizes_with_its_positions() -> None:
    sizes = ["125m", "350m", "1.3b", "2.7b", "6.7b", "13b", "30b", "66b"]
    models = [registry.KNOWN[f"opt-{size}"] for size in sizes]
    assert [model.hub_id for model in models] == [f"facebook/opt-{size}" for size in sizes]
    assert {model.positions for model in models} == {2048}
    assert models[0].size_bytes == 250_000_000
    assert models[-1].size_bytes == 132_000_000_000


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("smollm2-135m", "smollm2-135m-instruct"),
        ("opt125m", "opt-125m"),
        ("facebook/opt-6.7", "opt-6.7b"),
        ("OPT-13", "opt-13b"),
        ("banana", None),
    ],
)
def test_nearest_name(typo: str, meant: str | None) -> None:
    assert registry.nearest(typo) == meant


def test_short_names_ignore_case() -> None:
    found = registry.find("OPT-125M")
    assert found is not None
    assert found.name == "opt-125m"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"AUVSUM_CACHE": "/a", "XDG_CACHE_HOME": "/x"}, "/a"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/auvsum"),
        ({"HOME": "/h"}, "/h/.cache/auvsum"),
    ],
)
def test_cache_dir(environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AUVSUM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert registry.cache_dir() == Path(expected)
    assert registry.model_dir("m") == Path(expected) / "models" / "m"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"HF_HUB_CACHE": "/c", "HF_HOME": "/hf"}, "/c"),
        ({"HF_HOME": "/hf"}, "/hf/hub"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
        ({"HOME": "/h"}, "/h/.cache/huggingface/hub"),
    ],
)
def test_hub_cache_dir(environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert registry.hub_cache_dir() == Path(expected)
    program = "import huggingface_hub.constants as c; print(c.HF_HUB_CACHE)"
    theirs = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert theirs.stdout.strip() == expected


def test_hub_snapshot_is_the_one_that_huggingface_hub_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import snapshot_download

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert registry.hub_snapshot("some/model") is None
    folder = tmp_path / "models--some--model"
    for revision in ("0" * 40, "1" * 40):
        (folder / "snapshots" / revision).mkdir(parents=True)
        (folder / "snapshots" / revision / "config.json").write_text("{}")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("1" * 40)
    theirs = snapshot_download("some/model", cache_dir=tmp_path, local_files_only=True)
    assert registry.hub_snapshot("some/model") == Path(theirs) == folder / "snapshots" / ("1" * 40)


def test_listing_imports_nothing_heavy(tmp_path: Path) -> None:
    program = (
        "import sys; from auvsum.engine.models import listing; from auvsum import _env; _env.prepare(); listing()\n"
        "print([m for m in ('torch', 'transformers', 'huggingface_hub', 'numpy', 'gguf') if m in sys.modules])"
    )
    environment = {**os.environ, "AUVSUM_CACHE": str(tmp_path), "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[]"


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No variable of `_env` set, and whatever it sets undone afterwards."""
    import huggingface_hub.constants as constants

    for name in ("HF_HUB_OFFLINE", "AUVSUM_SET_HF_HUB_OFFLINE", *_env._QUIET):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return monkeypatch


def test_prepare_is_quiet_and_offline(clean: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    _env.prepare()
    expected = {
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    assert {name: os.environ[name] for name in expected} == expected
    assert constants.HF_HUB_OFFLINE  # though it was imported before


def test_prepare_for_a_download_goes_online_and_back(clean: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    _env.prepare()
    _env.prepare(download=True)
    assert not _env.is_offline()
    assert not constants.HF_HUB_OFFLINE
    _env.prepare()
    assert _env.is_offline()
    assert constants.HF_HUB_OFFLINE


def test_prepare_leaves_what_the_user_set(clean: pytest.MonkeyPatch) -> None:
    clean.setenv("HF_HUB_OFFLINE", "1")
    clean.setenv("TRANSFORMERS_VERBOSITY", "debug")
    _env.prepare(download=True)
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "debug"

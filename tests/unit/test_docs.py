"""What is generated is as it would be generated now."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

from auvsum.config import Settings, load_settings

ROOT = Path(__file__).parents[2]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_reference_of_the_command_line() -> None:
    made = script("make_cli").reference()
    assert (ROOT / "docs" / "CLI.md").read_text(encoding="utf-8") == made, "run `python docs/make_cli.py`"


def test_pictures_of_the_panel() -> None:
    for path, picture in script("make_panel").pictures().items():
        assert path.read_text(encoding="utf-8") == picture, "run `python docs/make_panel.py`"
        assert "url(http" not in picture.replace('"', "")


def test_settings_for_models(tmp_path: Path) -> None:
    pages = script("make_model_configs").pages()
    folder = ROOT / "configs" / "models"
    assert set(folder.iterdir()) == set(pages)
    for path, page in pages.items():
        assert path.read_text(encoding="utf-8") == page, "run `python docs/make_model_configs.py`"
        settings, _ = load_settings({}, config_path=path, env={}, cwd=tmp_path)
        assert settings == Settings(model=path.stem, template=settings.template)

"""Settings: precedence, origins, and mistakes that are told in one line."""

from __future__ import annotations

import re
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from auvsum.config import Settings, load_settings, parse_option
from auvsum.errors import AuvsumError, BudgetError, ConfigError

DEFAULTS = Path(__file__).parents[2] / "configs" / "default.yaml"


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "cwd").mkdir()
    (tmp_path / "xdg" / "auvsum").mkdir(parents=True)
    return {
        "cwd": tmp_path / "cwd",
        "xdg": tmp_path / "xdg",
        "local": tmp_path / "cwd" / "auvsum.yaml",
        "user": tmp_path / "xdg" / "auvsum" / "config.yaml",
        "given": tmp_path / "given.yaml",
    }


def load(places: dict[str, Path], flags: dict[str, Any] | None = None, config: bool = False, **env: str) -> Any:
    return load_settings(
        flags or {},
        config_path=places["given"] if config else None,
        env={"XDG_CONFIG_HOME": str(places["xdg"]), **env},
        cwd=places["cwd"],
    )


def test_default_file_is_the_defaults_and_comments_every_key() -> None:
    text = DEFAULTS.read_text(encoding="utf-8")
    assert yaml.safe_load(text) == asdict(Settings())
    for name in (field.name for field in fields(Settings)):
        assert re.search(rf"^# .+\n{name}:", text, re.MULTILINE), f"{name} has no comment above it"


def test_default_file_can_be_used_as_it_is(places: dict[str, Path]) -> None:
    places["given"].write_text(DEFAULTS.read_text(encoding="utf-8"))
    places["given"].write_text(places["given"].read_text().replace("template: auto", "template: chat"))
    settings, origins = load(places, config=True)
    assert settings == Settings(template="chat")
    assert set(origins.values()) == {str(places["given"])}


def test_each_source_hides_the_weaker_ones(places: dict[str, Path]) -> None:
    assert load(places)[1]["budget"] == "default"
    places["user"].write_text("budget: 10%\nseed: 1\nwords: 50\n")
    assert (load(places)[0].budget, load(places)[1]["budget"]) == ("10%", str(places["user"]))
    places["local"].write_text("budget: 20%\nseed: 2\n")
    assert (load(places)[0].budget, load(places)[1]["budget"]) == ("20%", str(places["local"]))
    places["given"].write_text("budget: 30%\n")
    settings, origins = load(places, config=True)
    assert (settings.budget, settings.seed, settings.words) == ("30%", 1, 50), "--config stands for ./auvsum.yaml"
    settings, origins = load(places, AUVSUM_BUDGET="40%")
    assert (settings.budget, origins["budget"], origins["seed"]) == ("40%", "AUVSUM_BUDGET", str(places["local"]))
    settings, origins = load(places, {"budget": "50%", "seed": None}, AUVSUM_BUDGET="40%")
    assert (settings.budget, origins["budget"], settings.seed) == ("50%", "flag --budget", 2)


def test_explicit_false_and_zero_are_values(places: dict[str, Path]) -> None:
    places["local"].write_text("truncate: true\ntemperature: 0.7\nseed: 5\nsentences: 3\n")
    settings, origins = load(places, {"truncate": False, "temperature": 0.0, "seed": 0})
    assert (settings.truncate, settings.temperature, settings.seed, settings.sentences) == (False, 0.0, 0, 3)
    assert origins["truncate"] == "flag --truncate"
    settings, _ = load(places, AUVSUM_TRUNCATE="false", AUVSUM_SEED="0")
    assert (settings.truncate, settings.seed) == (False, 0)


def test_null_takes_back_what_a_weaker_file_says(places: dict[str, Path]) -> None:
    places["user"].write_text("sentences: 3\n")
    places["local"].write_text("sentences: null\n")
    assert load(places)[0].sentences is None


def test_environment_is_typed(places: dict[str, Path]) -> None:
    env = {
        "AUVSUM_BUDGET": "512",
        "AUVSUM_THREADS": "2",
        "AUVSUM_TOP_P": "0.9",
        "AUVSUM_DOWNLOAD": "yes",
        "AUVSUM_POLICY_OPTIONS": "decay=0.9,eviction=naive",
        "AUVSUM_MODEL": "",
        "AUVSUM_CACHE": "/somewhere",
    }
    settings, origins = load(places, **env)
    assert (settings.budget, settings.threads, settings.top_p, settings.download) == ("512", 2, 0.9, True)
    assert settings.policy_options == {"decay": 0.9, "eviction": "naive"}
    assert origins["model"] == "default", "an empty variable is not set"


def test_file_values_widen_without_loss(places: dict[str, Path]) -> None:
    places["local"].write_text("budget: 512\ntop_p: 1\npolicy_options: {top_k: 5}\n")
    settings, _ = load(places)
    assert (settings.budget, settings.top_p, settings.policy_options) == ("512", 1.0, {"top_k": 5})


def test_template_in_a_file_is_relative_to_the_file(places: dict[str, Path]) -> None:
    places["user"].write_text("template: minutes.yaml\n")
    assert load(places)[0].template == str(places["user"].parent / "minutes.yaml")
    places["local"].write_text("template: completion\n")
    assert load(places)[0].template == "completion"


@pytest.mark.parametrize(
    ("content", "message", "hint"),
    [
        ("budgt: 4%\n", "unknown key 'budgt' in", "did you mean 'budget'?"),
        ("zzz: 1\n", "unknown key 'zzz' in", "known: model, policy"),
        ("chunk: many\n", "chunk must be a whole number, not 'many' (in", "--chunk"),
        ("chunk: true\n", "chunk must be a whole number, not True", "--chunk"),
        ("truncate: 1\n", "truncate must be true or false, not 1", "--truncate"),
        ("model: null\n", "model must be text, not None", "--model"),
        ("policy_options: 3\n", "policy_options must be a mapping", "--policy-option"),
        ("- a\n", "does not hold settings", "key: value"),
        ("a: [\n", "is not valid YAML (line 2)", "key: value"),
        ("budget: 101%\n", "budget '101%' is more than 100%", "share"),
    ],
)
def test_mistakes_in_a_file(places: dict[str, Path], content: str, message: str, hint: str) -> None:
    places["local"].write_text(content)
    with pytest.raises(AuvsumError) as caught:
        load(places)
    assert caught.value.exit_code == 2
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert "\n" not in caught.value.message + caught.value.hint


def test_mistakes_in_the_environment(places: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="unknown environment variable AUVSUM_BUDGTE") as caught:
        load(places, AUVSUM_BUDGTE="4%")
    assert caught.value.hint == "did you mean AUVSUM_BUDGET?"
    with pytest.raises(ConfigError, match=r"threads must be a whole number, not 'two' \(in AUVSUM_THREADS\)"):
        load(places, AUVSUM_THREADS="two")
    with pytest.raises(ConfigError, match="truncate must be true or false, not 'perhaps'"):
        load(places, AUVSUM_TRUNCATE="perhaps")


def test_config_that_is_not_there(places: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"given\.yaml is not a file"):
        load(places, config=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kv_bits": 2}, "kv_bits '2' is unknown"),
        ({"strategy": "magic"}, "strategy 'magic' is unknown"),
        ({"dtype": "fp8"}, "dtype 'fp8' is unknown"),
        ({"device": "tpu"}, "device 'tpu' is unknown"),
        ({"chunk": 0}, "chunk must be at least 1, not 0"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"sentences": -1}, "sentences must be at least 1"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"temperature": -0.1}, "temperature must be 0 or more"),
        ({"temperature": float("nan")}, "temperature must be 0 or more"),
        ({"top_p": 0.0}, "top_p must be more than 0"),
        ({"top_p": 1.1}, "top_p must be more than 0 and at most 1"),
        ({"model": " "}, "model is empty"),
        ({"budget_scope": "tokens"}, "budget_scope 'tokens' is unknown"),
    ],
)
def test_settings_check_themselves(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Settings(**values)
    assert message in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("budget", ["0", "0%", "101%", "4 %", "banana", "-5", "1.5", "4XB", "", "%", "1e3", "inf"])
def test_impossible_budgets(budget: str) -> None:
    with pytest.raises(BudgetError):
        Settings(budget=budget)


@pytest.mark.parametrize("budget", ["auto", "4%", "0.5%", "100%", "512", "64MiB", "1.5GB"])
def test_possible_budgets(budget: str) -> None:
    assert Settings(budget=budget).budget == budget


def test_policy_options() -> None:
    assert parse_option("top-k=5") == ("top_k", 5)
    assert parse_option("reconstruct=false") == ("reconstruct", False)
    assert parse_option("eviction=multi-step") == ("eviction", "multi-step")
    for text in ("decay", "=1", "decay="):
        with pytest.raises(ConfigError, match="is not KEY=VALUE"):
            parse_option(text)
    with pytest.raises(ConfigError, match="unreadable value"):
        parse_option("a=[")

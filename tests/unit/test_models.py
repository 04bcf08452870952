"""Finding, judging and loading models; every way in which a model can be missing, broken or unfit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from auvsum.budget import CacheShape
from auvsum.engine import checkpoint, hardware, models, registry
from auvsum.engine.memory import release_mapped
from auvsum.engine.weights import Int8Linear, quantize_weights
from auvsum.errors import (
    ConfigError,
    DeviceError,
    DownloadFailed,
    ModelError,
    ModelIncomplete,
    ModelNotFound,
    ModelUnsupported,
)
from tests import checkpoints


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches of our own."""
    monkeypatch.setenv("AUVSUM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def in_hub(caches: Path, hub_id: str) -> Path:
    """The folder of a new snapshot in the hub cache, as `refs/main` names it."""
    folder = caches / "hub" / ("models--" + hub_id.replace("/", "--"))
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("a" * 40)
    return folder / "snapshots" / ("a" * 40)


def assert_one_line(error: ModelError) -> None:
    assert error.hint
    assert "\n" not in error.message + error.hint


# --- loading -----------------------------------------------------------------------------------------------------


def test_load_opt(tmp_path: Path) -> None:
    folder = checkpoints.opt(tmp_path / "opt")
    loaded = models.load(str(folder), device="cpu", dtype="fp32")
    assert loaded.path == folder
    assert loaded.max_positions == 512
    assert loaded.shape == CacheShape(layers=2, kv_heads=4, head_dim=16, element_bytes=4)
    assert loaded.eos_ids == (2,)
    assert loaded.tokenizer.chat_template is None
    assert loaded.device == torch.device("cpu")
    assert loaded.dtype == loaded.model.dtype == torch.float32
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.load_seconds > 0


def test_load_llama(tmp_path: Path) -> None:
    loaded = models.load(str(checkpoints.llama(tmp_path / "llama")), device="cpu", dtype="bf16")
    assert loaded.max_positions == 1024
    assert loaded.shape == CacheShape(layers=2, kv_heads=2, head_dim=16, element_bytes=2)
    assert loaded.eos_ids == (2,)
    assert loaded.tokenizer.chat_template
    assert loaded.dtype == loaded.model.dtype == torch.bfloat16


def test_a_model_that_may_not_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(path: Path, name: str) -> None:
        raise PermissionError(13, "Permission denied", f"{path}/config.json")

    monkeypatch.setattr("auvsum.engine.checkpoint.inspect", closed)
    monkeypatch.setattr("auvsum.engine.locate.locate", lambda name: Path("/closed") / name)
    with pytest.raises(ModelError, match=r"m may not be read: no permission for /closed/m/config\.json") as caught:
        models.resolve("m")
    assert caught.value.exit_code == 3
    assert "no permission" in models.listing()[0].problem


def test_loaded_weights_are_those_written(tmp_path: Path) -> None:
    loaded = models.load(str(checkpoints.shard_llama(tmp_path / "llama")), device="cpu", dtype="fp32")
    expected = checkpoints.llama_model().state_dict()
    assert loaded.model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.model.state_dict().items())


@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "qwen3", "gemma3_text"])
def test_load_the_other_families(tmp_path: Path, model_type: str) -> None:
    tokenizer = checkpoints.chatml_tokenizer()
    config = AutoConfig.for_model(
        model_type,
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=64,
        max_position_embeddings=128,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    loaded = models.load(str(tmp_path / "m"), device="cpu", dtype="fp32")
    assert replace(loaded.shape, windows=()) == CacheShape(layers=2, kv_heads=2, head_dim=16, element_bytes=4)
    # Mistral and Gemma 3 have layers that slide by default.
    assert bool(loaded.shape.windows) == (model_type in ("mistral", "gemma3_text"))
    assert loaded.max_positions == 128


@pytest.mark.parametrize("builder", [checkpoints.opt, checkpoints.opt_pickled])
def test_opt_tokenizer_puts_the_end_token_first_and_takes_any_text(tmp_path: Path, builder) -> None:  # type: ignore[no-untyped-def]
    tokenizer = models.load(str(builder(tmp_path / "opt")), device="cpu").tokenizer
    text = "the end, and é 😀\n\t  12"
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.convert_tokens_to_ids("</s>") == 2
    assert ids.count(2) == 1
    assert tokenizer.decode(ids[1:]) == text
    assert tokenizer(text, add_special_tokens=False).input_ids == ids[1:]


def test_eos_ids_come_from_the_generation_config_and_the_tokenizer(tmp_path: Path) -> None:
    folder = checkpoints.llama(tmp_path / "llama")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 2, 7]}))
    assert models.load(str(folder), device="cpu").eos_ids == (9, 2, 7)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 9}))
    assert models.load(str(folder), device="cpu").eos_ids == (9, 2)


def test_threads(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        models.load(str(checkpoints.llama(tmp_path / "llama")), device="cpu", threads=before + 1)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
    with pytest.raises(ConfigError, match="at least 1"):
        models.load(str(tmp_path / "llama"), threads=0)


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path) -> None:
    folder = checkpoints.llama(tmp_path / "llama")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'it-ran')!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    loaded = models.load(str(folder), device="cpu")
    assert type(loaded.model).__module__.startswith("transformers.")
    assert not (tmp_path / "it-ran").exists()


def test_lacking_weights_are_an_error_and_not_random(tmp_path: Path) -> None:
    folder = checkpoints.llama(tmp_path / "llama", num_hidden_layers=2)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ModelIncomplete, match=r"lack model\.layers\.2\."):
        models.load(str(folder), device="cpu")
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    with pytest.raises(ModelUnsupported, match=r"no place for: model\.layers\.1\."):
        models.load(str(folder), device="cpu")


def test_weights_of_another_shape_are_an_error(tmp_path: Path) -> None:
    folder = checkpoints.llama(tmp_path / "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    with pytest.raises(ModelError) as caught:
        models.load(str(folder), device="cpu")
    assert_one_line(caught.value)


# --- device and dtype --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "mps", "", "CPU"])
def test_unknown_devices(device: str) -> None:
    with pytest.raises(DeviceError, match="is unknown") as caught:
        hardware.choose_device(device)
    assert caught.value.hint == "use auto, cpu, cuda or cuda:N"


def test_cuda_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert hardware.choose_device("auto") == torch.device("cpu")
    with pytest.raises(DeviceError, match="cannot be used") as caught:
        hardware.choose_device("cuda")
    assert_one_line(caught.value)


def test_cuda_where_there_are_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert hardware.choose_device("auto") == torch.device("cuda")
    assert hardware.choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(DeviceError, match="there are 2"):
        hardware.choose_device("cuda:2")


def test_auto_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for native, expected in [(True, torch.bfloat16), (False, torch.float32)]:
        monkeypatch.setattr(hardware, "cpu_has_bf16", lambda native=native: native)
        for stored in (torch.float16, torch.bfloat16, torch.float32, None):
            assert hardware.choose_dtype("auto", cpu, stored) == expected
    for stored, on_cuda in [
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
        (None, torch.bfloat16),
    ]:
        assert hardware.choose_dtype("auto", cuda, stored) == on_cuda


def test_stated_dtype() -> None:
    cpu = torch.device("cpu")
    assert hardware.choose_dtype("fp16", cpu, None) == torch.float16
    assert hardware.choose_dtype("float32", cpu, None) == torch.float32
    with pytest.raises(ConfigError, match="dtype 'int8' is unknown"):
        hardware.choose_dtype("int8", cpu, None)


def test_bf16_support_is_read_from_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    for flags, expected in [
        ({"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"avx512_bf16": True}, True),
        ({"architecture": "aarch64", "bf16": True}, True),
        ({"cpu_name": "bf16"}, False),
    ]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda flags=flags: flags, raising=False)
        assert hardware.cpu_has_bf16() is expected
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # an older torch
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    assert hardware.cpu_has_bf16()


# --- names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        (None, "smollm2-135m-instruct is not on this machine", "type: auvsum models pull smollm2-135m-instruct"),
        ("opt-125m", "opt-125m is not on this machine", "type: auvsum models pull opt-125m --download"),
        ("opt125m", "no model is called 'opt125m'", "did you mean opt-125m? type: auvsum models pull opt-125m"),
        ("banana", "no model is called 'banana'", "auvsum models list shows the names"),
        ("some/model", "is not in the local Hugging Face cache", "type: auvsum models pull some/model --download"),
        ("facebok/opt-125m", "is not in the local", "did you mean opt-125m? to fetch it type: auvsum models pull"),
        ("./nowhere", "there is no folder ./nowhere", "auvsum models list"),
        ("/a/b/c", "there is no folder /a/b/c", "auvsum models list"),
    ],
)
def test_not_found(name: str | None, message: str, hint: str) -> None:
    with pytest.raises(ModelNotFound) as caught:
        models.resolve(name)
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert caught.value.exit_code == 3
    assert_one_line(caught.value)


def test_a_folder_called_like_a_short_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoints.opt(tmp_path / "opt-125m")
    with pytest.raises(ModelNotFound) as caught:
        models.resolve("opt-125m")
    assert "./opt-125m" in caught.value.hint
    assert models.resolve("./opt-125m") == Path("opt-125m")


def test_a_file_and_an_empty_folder_are_no_models(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelUnsupported, match="is a file"):
        models.resolve(str(tmp_path / "model.gguf"))
    with pytest.raises(ModelNotFound, match="holds no model"):
        models.resolve(str(tmp_path))


def test_hub_cache_by_id_and_by_short_name(caches: Path) -> None:
    snapshot = checkpoints.opt(in_hub(caches, "facebook/opt-125m"))
    assert models.resolve("facebook/opt-125m") == snapshot
    assert models.resolve("opt-125m") == models.resolve("OPT-125M") == snapshot


def test_pickled_snapshot_is_converted_under_its_name(caches: Path) -> None:
    checkpoints.opt_pickled(in_hub(caches, "facebook/opt-125m"))
    by_name = models.resolve("opt-125m")
    assert by_name.parent == caches / "cache" / "converted"
    assert by_name.name.startswith("opt-125m-")
    assert models.load("facebook/opt-125m", device="cpu").max_positions == 512


def test_half_downloaded_snapshot(caches: Path) -> None:
    snapshot = checkpoints.llama(in_hub(caches, "some/model"))
    weights = snapshot / "model.safetensors"
    weights.unlink()
    weights.symlink_to(caches / "hub" / "models--some--model" / "blobs" / "not-there")
    with pytest.raises(ModelIncomplete, match=r"model\.safetensors") as caught:
        models.resolve("some/model")
    assert caught.value.hint == "type: auvsum models pull some/model --download"


def test_download_that_never_got_to_a_snapshot(caches: Path) -> None:
    blobs = caches / "hub" / "models--some--model" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "abc.incomplete").write_bytes(b"")
    with pytest.raises(ModelIncomplete, match=r"abc\.incomplete") as caught:
        models.resolve("some/model")
    assert_one_line(caught.value)


def test_download_only_when_asked(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def fetch(hub_id: str, progress: object) -> Path:
        asked.append(hub_id)
        return checkpoints.opt(in_hub(caches, hub_id))

    monkeypatch.setattr("auvsum.engine.fetch.pull_hub", fetch)
    with pytest.raises(ModelNotFound):
        models.pull("opt-125m")
    assert asked == []
    models.pull("opt-125m", download=True)
    models.pull("opt-125m", download=True)  # here by now
    assert asked == ["facebook/opt-125m"]
    for name in ("banana", "./nowhere"):
        with pytest.raises(ModelNotFound):
            models.resolve(name, download=True)
    assert asked == ["facebook/opt-125m"]


def test_download_goes_to_the_hub_cache_and_takes_safetensors(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, object]] = []

    def snapshot_download(hub_id: str, **options: object) -> str:
        calls.append({"hub_id": hub_id, **options})
        return str(checkpoints.opt(in_hub(caches, hub_id)))

    files = ["config.json", "flax_model.msgpack", "model.safetensors", "pytorch_model.bin"]
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda self, hub_id: files)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    models.resolve("some/model", download=True)
    files.remove("model.safetensors")
    models.resolve("some/older", download=True)
    assert [call["cache_dir"] for call in calls] == [caches / "hub"] * 2
    patterns = [call["allow_patterns"] for call in calls]
    assert "*.safetensors" in str(patterns[0])
    assert "pytorch_model" not in str(patterns[0])
    assert "pytorch_model*" in str(patterns[1])


def test_download_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object, hub_id: str) -> list[str]:
        raise ConnectionError("no route to host\nmore")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", refuse)
    with pytest.raises(DownloadFailed, match="no route to host") as caught:
        models.resolve("some/model", download=True)
    assert_one_line(caught.value)
    monkeypatch.delenv("AUVSUM_SET_HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # by the user
    with pytest.raises(DownloadFailed, match="HF_HUB_OFFLINE is set"):
        models.resolve("some/model", download=True)


# --- broken and unfit --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("builder", "broken", "message"),
    [
        (checkpoints.llama, "config.json", "config.json is missing"),
        (checkpoints.llama, "model.safetensors", "model.safetensors (or pytorch_model.bin) is missing"),
        (checkpoints.llama, "tokenizer.json", "tokenizer.json (or vocab.json with merges.txt) is missing"),
        (checkpoints.opt, "merges.txt", "merges.txt is missing"),
        (checkpoints.opt, "vocab.json", "vocab.json is missing"),
        (checkpoints.shard_llama, "model-00002-of-00004.safetensors", "model-00002-of-00004.safetensors is missing"),
        (checkpoints.shard_llama, "model.safetensors.index.json", "model.safetensors.index.json is missing"),
    ],
)
def test_missing_files_are_named(tmp_path: Path, builder, broken: str, message: str) -> None:  # type: ignore[no-untyped-def]
    folder = builder(tmp_path / "m")
    (folder / broken).unlink()
    with pytest.raises(ModelIncomplete) as caught:
        models.resolve(str(folder))
    assert message in caught.value.message
    assert_one_line(caught.value)


@pytest.mark.parametrize("share", [0.0, 0.00001, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("builder", [checkpoints.llama, checkpoints.opt_pickled])
def test_truncated_weights(tmp_path: Path, builder, share: float) -> None:  # type: ignore[no-untyped-def]
    folder = builder(tmp_path / "m")
    weights = checkpoints.truncate(next(iter([*folder.glob("*.safetensors"), *folder.glob("*.bin")])), share)
    with pytest.raises(ModelIncomplete, match=weights.name) as caught:
        models.resolve(str(folder))
    assert_one_line(caught.value)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_truncated_json(tmp_path: Path, file: str) -> None:
    folder = checkpoints.shard_llama(tmp_path / "m")
    checkpoints.truncate(folder / file)
    with pytest.raises(ModelIncomplete, match=file):
        models.resolve(str(folder))


def test_an_index_may_not_point_outside(tmp_path: Path) -> None:
    folder = checkpoints.shard_llama(tmp_path / "m")
    index = {"weight_map": {"lm_head.weight": "../other/model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="outside its folder"):
        models.resolve(str(folder))


def test_git_lfs_pointer(tmp_path: Path) -> None:
    folder = checkpoints.llama(tmp_path / "m")
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ModelIncomplete, match="git lfs pull"):
        models.resolve(str(folder))


def test_encoder_decoder(tmp_path: Path) -> None:
    with pytest.raises(ModelUnsupported, match=r"encoder-decoder model \(t5\)") as caught:
        models.resolve(str(checkpoints.encoder_decoder(tmp_path / "t5")))
    assert "decoder-only" in caught.value.hint
    assert_one_line(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "architecture 'mamba'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized weights (gptq)"),
    ],
)
def test_unfit_models(tmp_path: Path, change: dict[str, object], message: str) -> None:
    folder = checkpoints.llama(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ModelUnsupported) as caught:
        models.resolve(str(folder))
    assert message in caught.value.message
    assert caught.value.hint == f"type: auvsum doctor --model {folder}"


# --- listing -----------------------------------------------------------------------------------------------------


def test_listing(caches: Path) -> None:
    checkpoints.opt(in_hub(caches, "facebook/opt-125m"))
    checkpoints.llama(in_hub(caches, "some/model"))
    checkpoints.encoder_decoder(in_hub(caches, "google/t5-small"))
    in_hub(caches, "some/encoder-without-a-config").mkdir(parents=True)
    (checkpoints.opt(in_hub(caches, "facebook/opt-350m")) / "model.safetensors").unlink()
    found = {info.name: info for info in models.listing()}
    assert list(found)[: len(registry.KNOWN)] == list(registry.KNOWN)
    default, opt, broken = found["smollm2-135m-instruct"], found["opt-125m"], found["opt-350m"]
    assert (default.present, default.supported, default.positions, default.licence) == (False, True, 8192, "Apache-2.0")
    assert opt.present
    assert opt.path is not None
    assert opt.size_bytes == (opt.path / "model.safetensors").stat().st_size
    assert not broken.present
    assert "model.safetensors" in broken.problem
    assert set(found) - set(registry.KNOWN) == {"some/model", "google/t5-small"}
    assert (found["some/model"].present, found["some/model"].architecture) == (True, "llama")
    assert found["some/model"].positions == 1024
    assert not found["google/t5-small"].supported
    assert "encoder-decoder" in found["google/t5-small"].problem


def test_a_cache_folder_without_a_marker_is_not_a_model(caches: Path) -> None:
    checkpoints.llama(registry.model_dir(registry.DEFAULT_MODEL))
    with pytest.raises(ModelNotFound, match="is not on this machine"):
        models.resolve()
    (registry.model_dir(registry.DEFAULT_MODEL) / registry.MARKER).write_text("{}")
    assert models.resolve() == registry.model_dir(registry.DEFAULT_MODEL)


# --- the builders themselves -------------------------------------------------------------------------------------


@pytest.mark.parametrize("builder", [checkpoints.opt, checkpoints.llama])
def test_builders_are_deterministic_and_tiny(tmp_path: Path, builder) -> None:  # type: ignore[no-untyped-def]
    one, two = builder(tmp_path / "one"), builder(tmp_path / "two")
    files = sorted(file.name for file in one.iterdir())
    assert files == sorted(file.name for file in two.iterdir())
    assert all((one / file).read_bytes() == (two / file).read_bytes() for file in files)
    assert sum((one / file).stat().st_size for file in files) < 1_000_000
    assert checkpoint.inspect(one).format == "safetensors"


@pytest.mark.parametrize("builder", [checkpoints.opt, checkpoints.llama])
def test_eight_bits_are_made_of_the_weights_as_they_are_stored(builder, tmp_path: Path) -> None:
    """A bf16 file for an fp32 model: nothing but the 8 bits and what is left in fp32 is ever made of it."""
    folder = str(builder(tmp_path / "m", dtype=torch.bfloat16))
    loaded = models.load(folder, device="cpu", dtype="fp32", weights="int8").model
    other = models.load(folder, device="cpu", dtype="fp32").model
    quantize_weights(other)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert {module.dtype for module in loaded.modules() if isinstance(module, Int8Linear)} == {torch.float32}
    ids = torch.arange(10, 40)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, other(ids).logits)


def test_four_bits_are_wanted_of_a_model_that_has_none(tmp_path: Path) -> None:
    folder = str(checkpoints.llama(tmp_path / "m"))
    with pytest.raises(ModelError, match="no weights in a GGUF file's own 4 bits") as caught:
        models.load(folder, device="cpu", weights="gguf")
    assert caught.value.hint == "use --weights int8"
    # The embedded model may have been converted before they were kept.
    own = checkpoints.llama(registry.model_dir(registry.DEFAULT_MODEL))
    (own / registry.MARKER).write_text("{}")
    with pytest.raises(ModelError) as caught:
        models.load(device="cpu", weights="gguf")
    assert caught.value.hint == f"remove {own} and type: auvsum models pull smollm2-135m-instruct"


def test_four_bits_are_refused_where_torch_packs_them_otherwise() -> None:
    """As on a processor without AVX2, which torch can be told that it is."""
    code = "from auvsum.engine import weights; weights.channels_together()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "ATEN_CPU_CAPABILITY": "default"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "DeviceError: torch has no product for 4-bit weights on this processor" in done.stderr


@pytest.mark.parametrize("weights", ["int8", "gguf"])
def test_few_bits_are_for_a_cpu(weights: str) -> None:
    with pytest.raises(DeviceError, match=f"weights '{weights}' run on a CPU"):
        hardware.choose_weights(weights, torch.device("cuda"))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells what memory is made of")
def test_pages_of_a_mapped_weight_are_given_back(tmp_path: Path) -> None:
    def of_files() -> int:
        status = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssFile"))

    wanted = torch.arange(4 << 20, dtype=torch.float32)
    wanted.numpy().tofile(tmp_path / "weight")
    mapped = torch.from_file(str(tmp_path / "weight"), shared=False, size=wanted.numel())
    assert torch.equal(mapped, wanted)
    before = of_files()
    release_mapped(mapped)
    assert before - of_files() > 0.9 * mapped.nbytes
    assert torch.equal(mapped, wanted)
    release_mapped(wanted)  # of no file: stays
    assert torch.equal(mapped, wanted)

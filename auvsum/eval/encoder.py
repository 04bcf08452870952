"""Where BERTScore's encoder is, and its scores. The default one travels in a wheel and needs only a package index."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from auvsum import _env
from auvsum.engine import registry
from auvsum.engine.fetch import pull_encoder
from auvsum.engine.locate import hub_snapshot_of
from auvsum.engine.staging import Progress, read_marker, silent
from auvsum.errors import ConfigError, MetricError, ModelNotFound

#: A pair of long texts holds 1.5 MB in `bert-score` until its call is done.
_PAIRS_A_CALL = 500
#: Texts encoded together, by length: in `bert-score`'s own 64 a few long references pad all summaries to theirs.
_BATCH = 16
#: Its place in what was asked, a summary, its reference.
_Numbered = tuple[int, str, str]


class Encoder:
    """BERTScore with one encoder.

    Args:
        name: a short name, a folder, or a hub id in the local cache.
        layer: whose outputs are compared; None for the encoder's own, where that is known.
        rescale: with the baselines that `bert-score` ships, for the encoders that have one.

    Raises:
        ModelNotFound: it is not here. ConfigError: the layer must be given.
    """

    def __init__(
        self, name: str, *, layer: int | None = None, rescale: bool = False, device: str = "cpu", download: bool = False
    ) -> None:
        self.name, self.rescale, self._device = name, rescale, device
        self.path = locate_encoder(name, download=download)
        self.layer = layer or _own_layer(name)
        if rescale and not registry.is_hub_id(name):
            raise ConfigError(f"{name} has no baseline to rescale with", "rescale with an encoder of the hub only")
        self._scorer: Any = None

    @property
    def label(self) -> str:
        """What stands beside every number."""
        return f"{self.name}, layer {self.layer}, {'rescaled' if self.rescale else 'not rescaled'}"

    def scores(self, hypotheses: Sequence[str], references: Sequence[str]) -> list[float]:
        """BERTScore F1 in percent, pair by pair; 0 for an empty hypothesis, on which `bert-score` crashes, and for
        one of which the encoder knows nothing.

        Raises:
            MetricError: an empty reference, or a score that is not a number.
        """
        if any(not reference.strip() for reference in references):
            raise MetricError("BERTScore was asked to compare with an empty reference", "leave such rows out")
        pairs = [(i, h, r) for i, (h, r) in enumerate(zip(hypotheses, references, strict=True)) if h.strip()]
        # Texts of one length beside each other need least padding.
        pairs.sort(key=lambda pair: (len(pair[2]), pair[2], len(pair[1])))
        result = [0.0] * len(hypotheses)
        for together in _by_reference(pairs):
            # `bert-score` says once a batch that the encoder knows nothing of some text: `auvsum score` counts them.
            with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
                warnings.simplefilter("ignore")
                if self._scorer is None:
                    self._scorer = self._load()
                texts = [[h for _, h, _ in together], [r for _, _, r in together]]
                _, _, f1 = self._scorer.score(*texts, batch_size=_BATCH)
            if not bool(f1.isfinite().all()):
                raise MetricError(f"the encoder {self.name} gave scores that are not numbers", "use another --encoder")
            for (i, _, _), value in zip(together, f1.tolist(), strict=True):
                result[i] = 100 * value
        return result

    def _load(self) -> Any:
        _env.prepare()
        from bert_score import BERTScorer

        # By name where there is one: the baselines of rescaling are found by it.
        named = registry.is_hub_id(self.name) and not Path(self.name).expanduser().is_dir()
        try:
            return BERTScorer(
                model_type=self.name if named else str(self.path),
                num_layers=self.layer,
                device=self._device,
                lang="en",
                rescale_with_baseline=self.rescale,
            )
        except Exception as error:  # transformers raises OSError, ValueError, KeyError, ...
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise MetricError(f"the encoder {self.name} cannot be loaded: {reason}", "use another --encoder") from error


def _by_reference(pairs: Sequence[_Numbered]) -> Iterator[list[_Numbered]]:
    """Some pairs at a time, those of one reference together: `bert-score` encodes each text of a call once, and holds
    all that it encoded until the call is done."""
    together: list[_Numbered] = []
    for pair in pairs:
        if len(together) >= _PAIRS_A_CALL and pair[2] != together[-1][2]:
            yield together
            together = []
        together.append(pair)
    if together:
        yield together


def _own_layer(name: str) -> int:
    known = registry.ENCODERS.get(name.lower())
    if known is not None:
        return known.layer
    from bert_score.utils import model2layers

    if name not in model2layers:
        raise ConfigError(f"the layer of encoder {name} is not known", "type: --encoder-layer N")
    return int(model2layers[name])


def locate_encoder(name: str, *, download: bool = False, progress: Progress = silent) -> Path:
    """The encoder's folder.

    Raises:
        ModelNotFound: with what to type.
    """
    known = registry.ENCODERS.get(name.lower())
    if known is not None:
        path = registry.encoder_dir(known.name)
        if read_marker(path) is not None:
            return path
        if download:
            return pull_encoder(known, progress)
        raise ModelNotFound(
            f"the encoder {name} of BERTScore is not on this machine",
            f"type: auvsum models pull {name}; or measure without it: --metrics fidelity,rouge",
        )
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if (snapshot := hub_snapshot_of(name)) is not None:
        return snapshot
    raise ModelNotFound(
        f"the encoder {name} is not here: no folder with a config.json, and not in the local Hugging Face cache",
        f"type: --encoder {next(iter(registry.ENCODERS))}, or fetch it: hf download {name}",
    )

"""The environment that quiet, offline runs need. Call `prepare` before the first import of torch and transformers.

huggingface_hub and transformers read these variables once, when they are imported; where they are in already (a
notebook), `prepare` sets what they read instead. A variable that the user has set is left alone.
"""

from __future__ import annotations

import os
import sys

_QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}
#: A thread that waits for another gives its core away after a fifth of a millisecond at most: longer than a step has
#: nothing to do for it, as waking costs more. libgomp's own choice, to spin for milliseconds, makes every small
#: operation 25 times slower as soon as another process wants one of the cores (docs/LOG.md).
_PATIENT = {"GOMP_SPINCOUNT": "4000", "KMP_BLOCKTIME": "1"}
_OFFLINE = "HF_HUB_OFFLINE"
#: Set when the switch was thrown here and not by the user, so that `prepare(download=True)` may throw it back.
_MINE = "AUVSUM_SET_HF_HUB_OFFLINE"


def prepare(download: bool = False) -> None:
    """Silences the Hugging Face libraries, keeps them off the network unless `download`, and lets threads wait well."""
    for name, value in {**_QUIET, **({} if "OMP_WAIT_POLICY" in os.environ else _PATIENT)}.items():
        os.environ.setdefault(name, value)
    if download and os.environ.get(_MINE) == "1":
        os.environ.pop(_OFFLINE, None)
        del os.environ[_MINE]
    elif not download and _OFFLINE not in os.environ:
        os.environ[_OFFLINE] = os.environ[_MINE] = "1"
    # Already imported: the variables above came too late, so set what was read from them.
    constants = sys.modules.get("huggingface_hub.constants")
    if constants is not None:
        vars(constants)[_OFFLINE] = is_offline()
    logging = sys.modules.get("transformers.utils.logging")
    if logging is not None and os.environ["TRANSFORMERS_VERBOSITY"] == "error":
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def is_offline() -> bool:
    """Whether the network is off limits."""
    return os.environ.get(_OFFLINE, "").upper() in {"1", "ON", "YES", "TRUE"}

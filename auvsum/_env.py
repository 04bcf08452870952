"""The environment that quiet, offline runs need. Call `prepare` before the first import of transformers.

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
_OFFLINE = "HF_HUB_OFFLINE"
#: Set when the switch was thrown here and not by the user, so that `prepare(download=True)` may throw it back.
_MINE = "AUVSUM_SET_HF_HUB_OFFLINE"


def prepare(download: bool = False) -> None:
    """Silences the Hugging Face libraries, and keeps them off the network unless `download`."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if download and os.environ.get(_MINE) == "1":
        del os.environ[_MINE], os.environ[_OFFLINE]
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

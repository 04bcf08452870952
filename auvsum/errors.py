"""Every error that a user can meet; each class owns its exit code and its `kind`.

    AuvsumError
    ├── DocumentError  1   one document failed; the others go on
    │   ├── DocumentNotFound · DocumentUnreadable · DocumentEmpty · DocumentBinary · DocumentEncoding
    │   ├── DocumentTooLong · DocumentTimeout
    │   └── GenerationFailed
    ├── OutputError    1   the summaries cannot be written: there is no going on
    ├── InternalError  1   a defect of ours, whatever it raised
    ├── MetricError    1   a score that cannot be computed
    ├── UsageError     2   flags, configuration, budgets, policies, data sets, runs
    │   ├── ConfigError · BudgetError · PolicyError · TemplateError · DatasetError · RunError
    └── ModelError     3   the model or the device is not to be had
        ├── ModelNotFound · ModelIncomplete · ModelUnsupported · DownloadFailed
        └── DeviceError

A message says what happened and why; `hint` says what to type next. Both are single lines.
"""

from __future__ import annotations

import traceback
from typing import Any, ClassVar


class AuvsumError(Exception):
    """Base of all errors raised on purpose.

    Args:
        message: what happened and why, one line.
        hint: what to do about it, one line; may be empty.
    """

    exit_code: ClassVar[int] = 1
    kind: ClassVar[str] = "error"

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def record(self) -> dict[str, str]:
        """The `"error"` object of a JSON record."""
        return {"kind": self.kind, "message": self.message, "hint": self.hint}


class DocumentError(AuvsumError):
    kind = "document"


class DocumentNotFound(DocumentError):
    kind = "document-not-found"


class DocumentUnreadable(DocumentError):
    kind = "document-unreadable"


class DocumentEmpty(DocumentError):
    kind = "document-empty"


class DocumentBinary(DocumentError):
    kind = "document-binary"


class DocumentEncoding(DocumentError):
    kind = "document-encoding"


class DocumentTooLong(DocumentError):
    kind = "document-too-long"


class DocumentTimeout(DocumentError):
    kind = "document-timeout"


class GenerationFailed(DocumentError):
    kind = "generation-failed"


class OutputError(AuvsumError):
    """An output cannot be written: the disk is full, it is read-only, or the pipe is closed."""

    kind = "output"


class InternalError(AuvsumError):
    """A defect of ours, whatever it raised."""

    kind = "internal"

    def __init__(self, cause: Exception) -> None:
        super().__init__(f"internal: {type(cause).__name__}: {cause}", "run it again with --debug, and report it")
        self.__cause__ = cause

    def __reduce__(self) -> tuple[Any, ...]:
        # From a worker process it comes with its traceback as text.
        cause = self.__cause__
        trace = "" if cause is None else "".join(traceback.format_exception(type(cause), cause, cause.__traceback__))
        return _elsewhere, (self.message, trace)


class Elsewhere(Exception):
    """What happened in another process: its traceback."""


def _elsewhere(message: str, trace: str) -> InternalError:
    error = InternalError(Elsewhere(f"\n{trace}"))
    error.message, error.args = message, (message,)
    return error


class UsageError(AuvsumError):
    exit_code = 2
    kind = "usage"


class ConfigError(UsageError):
    kind = "config"


class BudgetError(UsageError):
    kind = "budget"


class PolicyError(UsageError):
    kind = "policy"


class TemplateError(UsageError):
    kind = "template"


class DatasetError(UsageError):
    kind = "dataset"


class RunError(UsageError):
    kind = "run"


class MetricError(AuvsumError):
    kind = "metric"


class ModelError(AuvsumError):
    exit_code = 3
    kind = "model"


class ModelNotFound(ModelError):
    kind = "model-not-found"


class ModelIncomplete(ModelError):
    kind = "model-incomplete"


class ModelUnsupported(ModelError):
    kind = "model-unsupported"


class DownloadFailed(ModelError):
    kind = "download-failed"


class DeviceError(ModelError):
    kind = "device"

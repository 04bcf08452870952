"""One place where errors become lines and exit codes."""

from __future__ import annotations

import traceback
from collections.abc import Callable

from auvsum.errors import AuvsumError, InternalError
from auvsum.ui.console import Console

INTERRUPTED = 130


def report(console: Console, error: AuvsumError, document: str = "") -> None:
    """The error's two lines, under the document's name if one is given; its traceback with `--debug`."""
    if console.debug:
        traceback.print_exception(error)
    console.error(f"{document}: {error.message}" if document else error.message, error.hint)


def guarded(console: Console, work: Callable[[], int]) -> int:
    """Runs a command.

    Returns:
        Its exit code, or that of the error that ended it. A traceback is shown only with `--debug`.
    """
    try:
        return work()
    except KeyboardInterrupt:
        console.error("interrupted")
        return INTERRUPTED
    except AuvsumError as error:
        report(console, error)
        return error.exit_code
    except Exception as error:
        defect = InternalError(error)
        report(console, defect)
        return defect.exit_code

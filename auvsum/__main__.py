"""`auvsum` and `python -m auvsum`: runs the command line and turns its outcome into an exit code."""

from __future__ import annotations

import signal
import sys
import warnings


def main() -> None:
    """The console script. Exit codes: `auvsum --help`."""
    if hasattr(signal, "SIGPIPE"):
        # `auvsum ... | head -1` ends as quietly as any other filter.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    if not sys.warnoptions:
        # Libraries' warnings are for developers; what people must know is said in words.
        warnings.simplefilter("ignore")
    from auvsum.cli.app import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()

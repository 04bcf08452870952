"""Runs `auvsum` with the summarizer of `fake_summarizer.py` as a user whom permissions bind, root or not.

The same command runs once as root first, elsewhere: that imports whatever comes late, which nobody may not be able to
read where root installed it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from pathlib import Path

import fake_summarizer  # beside this file

from auvsum.cli.app import run

NOBODY = 65534


def become_nobody() -> None:
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(open(os.devnull, "w")):
        os.chdir(folder)
        Path("a.txt").write_text("text")
        for where in (("-O", "out"), ("-o", "all.txt"), ("-o", "missing/all.txt")):
            run(["summarize", "a.txt", *where])
        os.chdir(here)
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


if __name__ == "__main__":
    sys.modules["auvsum.summarize"] = fake_summarizer
    if os.geteuid() == 0:
        become_nobody()
    assert os.geteuid() != 0
    sys.exit(run(sys.argv[1:]))

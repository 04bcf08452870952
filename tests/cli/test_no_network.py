"""No socket is opened, whatever is asked for, unless somebody says `--download`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests import checkpoints

#: Loaded by Python at its start: every socket, and every look-up of a name, ends the process with a code of its own.
GUARD = """
import os, socket

def forbidden(*arguments, **options):
    os.write(2, b"a socket was opened\\n")
    os._exit(77)

class Forbidden(socket.socket):
    __init__ = forbidden

socket.socket = Forbidden
socket.create_connection = socket.getaddrinfo = forbidden
"""


def test_no_socket_is_opened(cli: Any, tmp_path: Path) -> None:
    guard = tmp_path / "guard"
    guard.mkdir()
    (guard / "sitecustomize.py").write_text(GUARD)
    path = f"{guard}:{cli.env['PYTHONPATH']}"
    model = checkpoints.llama(tmp_path / "model")
    text = "The council met in the town hall. " * 4
    cli.write("a.txt", text)
    cli.write("b.txt", text)
    flags = ("--model", str(model), "--max-tokens", "4", "--batch-size", "2")
    result = cli.real("summarize", "a.txt", "b.txt", "-O", "out", "--score", "a.txt", *flags, PYTHONPATH=path)
    assert result.code == 2
    result = cli.real("summarize", "a.txt", "b.txt", "-O", "out", *flags, PYTHONPATH=path)
    assert result.code == 0, result.err
    for arguments in (["models", "list"], ["summarize", "a.txt", "--model", "facebook/opt-125m"]):
        result = cli.real(*arguments, PYTHONPATH=path)
        assert result.code in (0, 3)
        assert "socket" not in result.err
    # The guard bites.
    result = cli.real("models", "pull", "opt-125m", "--download", PYTHONPATH=path)
    assert result.code == 77

"""Who says what on which stream, with a summarizer that needs no model."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
from typing import Any

import pytest

SUMMARY = "The council met — and decided\nto [bold]build[/bold].\n"
COST = "a.txt: 5,214 tokens read in 3.1 s · 96 tokens written at 41.5 tok/s · KV 2.1 MiB held (full cache 114 MiB)"
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def in_terminal(cli: Any, *arguments: str, streams: str = "oe", **env: str) -> tuple[int, str, bytes]:
    """Runs on a pseudo-terminal; `streams` are those that go to it, the other is piped -> code, terminal, pipe."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [*cli.fake_command, *arguments],
        cwd=cli.folder,
        env={**cli.env, "COLUMNS": "100", **env},
        stdin=follower,
        stdout=follower if "o" in streams else subprocess.PIPE,
        stderr=follower if "e" in streams else subprocess.PIPE,
    )
    os.close(follower)
    seen = b""
    while True:
        try:
            block = os.read(leader, 65536)
        except OSError:  # the other side is closed
            break
        if not block:
            break
        seen += block
    piped = b"".join(pipe.read() for pipe in (process.stdout, process.stderr) if pipe is not None)
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()
    os.close(leader)
    return process.wait(timeout=60), seen.decode("utf-8").replace("\r\n", "\n"), piped


def test_summary_alone_on_stdout(cli: Any) -> None:
    cli.write("a.txt", "text")
    result = cli.fake("summarize", "a.txt", "--budget", "4%")
    assert (result.code, result.text) == (0, SUMMARY)
    assert result.err.splitlines() == [
        "smollm2-135m-instruct: loaded in 1.2 s",
        "budget: 4% of 5,214 tokens = 209 slots/layer, 2.0 MiB (full: 64.0 MiB)",
        "warning: a.txt: it repeats itself",
        COST,
    ]


def test_quiet_says_only_errors(cli: Any) -> None:
    cli.write("a.txt", "text")
    result = cli.fake("summarize", "a.txt", "-q")
    assert (result.code, result.text, result.err) == (0, SUMMARY, "")
    cli.write("a.txt", "FAIL")
    result = cli.fake("summarize", "a.txt", "-q")
    assert (result.code, result.out) == (1, b"")
    assert result.err == "error: a.txt: nothing was written\n  hint: try a larger --budget\n"


def test_verbose_says_where_settings_come_from(cli: Any) -> None:
    cli.write("a.txt", "text")
    cli.write("auvsum.yaml", "seed: 7\n")
    result = cli.fake("summarize", "a.txt", "-v", "--budget", "4%", AUVSUM_WORDS="50")
    assert result.text == SUMMARY
    lines = result.err.splitlines()
    assert "budget = '4%' (flag --budget)" in lines
    assert "words = 50 (AUVSUM_WORDS)" in lines
    assert f"seed = 7 ({cli.folder / 'auvsum.yaml'})" in lines
    assert "a.txt: 5,214 tokens (5,160 of the document) · policy auv · strategy stream" in lines


def test_standard_input(cli: Any) -> None:
    result = cli.fake("summarize", "-", stdin=b"from a pipe")
    assert (result.code, result.text) == (0, SUMMARY)
    assert result.err.splitlines()[-1].startswith("stdin: 5,214 tokens read")


def test_several_files_one_bad(cli: Any) -> None:
    cli.write("a.txt", "text")
    cli.write("b.txt", "FAIL")
    cli.write("c.txt", "SMALL")
    cli.write("d.txt", "CRASH")
    cli.write("e.txt", "text")
    result = cli.fake("summarize", "a.txt", "b.txt", "missing.txt", "c.txt", "d.txt", "e.txt")
    assert result.code == 1
    assert result.text == f"==> a.txt <==\n{SUMMARY}\n==> e.txt <==\n{SUMMARY}"
    errors = [line for line in result.err.splitlines() if line.startswith("error:")]
    assert errors == [
        "error: b.txt: nothing was written",
        "error: missing.txt does not exist",
        "error: c.txt: budget 2 gives 2 slots per layer",
        "error: d.txt: internal: ZeroDivisionError: division by zero",
    ]
    assert result.err.count("loaded in") == 1
    assert result.err.splitlines()[-1] == "2 done, 4 failed"


def test_a_single_document_gives_its_own_exit_code(cli: Any) -> None:
    cli.write("a.txt", "SMALL")
    result = cli.fake("summarize", "a.txt")
    assert (result.code, result.out) == (2, b"")
    assert "hint: the least that works here is 5 (slots)" in result.err


def test_unknown_model_ends_everything(cli: Any) -> None:
    cli.write("a.txt", "text")
    result = cli.fake("summarize", "a.txt", "a.txt", "--model", "nowhere")
    assert (result.code, result.out) == (3, b"")
    assert result.err == "error: no model is called 'nowhere'\n  hint: auvsum models list shows the names\n"


def test_json_is_the_record(cli: Any) -> None:
    cli.write("a.txt", "Señora, niño, montaña. ".encode("latin-1") * 20)
    result = cli.fake("summarize", "a.txt", "--format", "json")
    record = json.loads(result.out)
    assert result.code == 0
    assert record["summary"] == SUMMARY.strip()
    assert record["source"] == str(cli.folder / "a.txt")
    assert "read as cp1252 by guess" in record["warnings"][0]
    assert record["warnings"][1:] == ["it repeats itself"]


def test_json_of_a_failure(cli: Any) -> None:
    cli.write("a.txt", "FAIL")
    result = cli.fake("summarize", "a.txt", "--format", "json")
    assert result.code == 1
    error = {"kind": "generation-failed", "message": "nothing was written", "hint": "try a larger --budget"}
    assert json.loads(result.out)["error"] == error
    result = cli.fake("summarize", "missing.txt", "--format", "json")
    record = json.loads(result.out)
    assert (record["id"], record["summary"], record["error"]["kind"]) == ("missing.txt", None, "document-not-found")


def test_dry_run(cli: Any) -> None:
    cli.write("a.txt", "WAIT")
    result = cli.fake("summarize", "a.txt", "--dry-run", "--budget", "4%")
    assert result.code == 0
    assert result.text.splitlines() == [
        "a.txt: 5,214 tokens (5,160 of the document) · policy auv · strategy stream",
        "  budget: 4% of 5,214 tokens = 209 slots/layer, 2.0 MiB (full: 64.0 MiB)",
        "  time: about 8.2 s, an estimate from a short trial",
    ]
    assert "warning: a.txt: tiny" in result.err
    record = json.loads(cli.fake("summarize", "a.txt", "--dry-run", "--format", "json").out)
    assert record["budget"] == {"asked": "auto", "slots": 209, "bytes": 2**21, "full_bytes": 2**26}
    cli.write("b.txt", "text")
    result = cli.fake("summarize", "a.txt", "b.txt", "--dry-run")
    total = "2 documents, 1 together: 10,428 tokens, at most 2.0 MiB of KV cache, about 16 s by that estimate"
    assert result.text.splitlines()[-1] == total


def test_show_prompt(cli: Any) -> None:
    cli.write("a.txt", "WAIT")
    result = cli.fake("summarize", "a.txt", "--show-prompt")
    assert (result.code, result.text) == (0, "<|user|>the document<|assistant|>\n")


def test_defects_are_one_line(cli: Any) -> None:
    cli.write("a.txt", "CRASH")
    result = cli.fake("summarize", "a.txt", "-q")
    assert (result.code, result.out) == (1, b"")
    assert result.err.splitlines()[0] == "error: a.txt: internal: ZeroDivisionError: division by zero"
    assert "--debug" in result.err
    result = cli.fake("summarize", "a.txt", "-q", "--debug")
    assert result.code == 1
    assert "Traceback (most recent call last)" in result.err


def test_escape_sequences_reach_files_but_not_terminals(cli: Any) -> None:
    cli.write("a.txt", "ESCAPE")
    assert cli.fake("summarize", "a.txt").text == "\x1b[31mred\x1b[0m\x07\x9b2J\n"
    code, seen, _ = in_terminal(cli, "summarize", "a.txt", "-q")
    assert (code, seen) == (0, "␛[31mred␛[0m␇\ufffd2J\n")


def test_terminal_gets_the_text_as_it_comes(cli: Any) -> None:
    cli.write("a.txt", "text")
    code, seen, _ = in_terminal(cli, "summarize", "a.txt", "-q")
    assert (code, seen.replace(" \n", "\n")) == (0, SUMMARY)
    code, seen, _ = in_terminal(cli, "summarize", "a.txt")
    plain = ANSI.sub("", seen)
    assert "reading" in plain
    assert COST in plain
    assert plain.replace(" \n", "\n").count(SUMMARY) == 1


@pytest.mark.parametrize("columns", ["60", "100", "200"])
def test_panel_on_stderr_leaves_a_piped_stdout_alone(cli: Any, columns: str) -> None:
    cli.write("a.txt", "SLOW")
    cli.write("b.txt", "FAIL")
    cli.write("[c].txt", "ESCAPE")
    command = ("summarize", "a.txt", "b.txt", "[c].txt", "--format", "jsonl")
    code, seen, out = in_terminal(cli, *command, streams="e", COLUMNS=columns)
    records = [json.loads(line) for line in out.splitlines()]
    assert code == 1
    assert [record["summary"] is None for record in records] == [False, True, False]
    plain = ANSI.sub("", seen)
    assert "reading 5,120 of 5,214 tokens" in plain
    assert "KV" in plain
    assert "RSS" in plain
    assert COST in plain.replace("\n", "")
    assert "error: b.txt: nothing was written" in plain
    assert "\x1b[31mred" not in seen
    frames = [line for line in plain.splitlines() if line.startswith(("╭", "│", "╰"))]
    assert frames
    assert max(len(line) for line in frames) <= int(columns)


def test_panel_can_be_turned_off_and_on(cli: Any) -> None:
    cli.write("a.txt", "text")
    _, seen, out = in_terminal(cli, "summarize", "a.txt", "--no-panel", streams="e")
    assert "╭" not in seen
    assert out.decode() == SUMMARY
    _, seen, _ = in_terminal(cli, "summarize", "a.txt", "--no-panel", "-v", streams="oe")
    assert "╭" not in seen
    code, seen, _ = in_terminal(cli, "summarize", "a.txt", "--panel", streams="oe")
    assert code == 0
    assert ANSI.sub("", seen).replace("\r", "").count(SUMMARY) == 1


def test_piped_stderr_has_no_bar_and_no_colour(cli: Any) -> None:
    cli.write("a.txt", "text")
    code, _, err = in_terminal(cli, "summarize", "a.txt", streams="o")
    assert code == 0
    assert b"\x1b" not in err
    assert b"reading" not in err


def test_colour(cli: Any) -> None:
    def err(*arguments: str, **env: str) -> str:
        return in_terminal(cli, "summarize", "missing.txt", *arguments, streams="e", **env)[1]

    assert err().startswith("\x1b[31merror: ")
    assert err(NO_COLOR="1").startswith("error: ")
    assert err(TERM="dumb").startswith("error: ")
    assert err("--color", "never").startswith("error: ")
    assert err("--color", "always", NO_COLOR="1").startswith("\x1b[31m")
    assert cli.fake("summarize", "missing.txt", "--color", "always").err.startswith("\x1b[31m")
    assert cli.fake("summarize", "missing.txt").err.startswith("error: ")


def test_no_arguments_on_a_terminal_show_help(cli: Any) -> None:
    code, seen, _ = in_terminal(cli)
    assert code == 0
    assert seen.startswith("Usage: auvsum")
    assert seen.index("Examples:") < seen.index("Options:")


def test_interrupted(cli: Any) -> None:
    cli.write("a.txt", "WAIT")
    process = subprocess.Popen(
        [*cli.fake_command, "summarize", "a.txt"],
        cwd=cli.folder,
        env=cli.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    while b"waiting" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, b"", b"error: interrupted\n")


def test_closed_pipe_is_quiet(cli: Any) -> None:
    cli.write("a.txt", "text")
    process = subprocess.Popen(
        [*cli.fake_command, "summarize", "-q", *["a.txt"] * 3],
        cwd=cli.folder,
        env=cli.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=60) == -signal.SIGPIPE


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk(cli: Any) -> None:
    cli.write("a.txt", "text")
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*cli.fake_command, "summarize", "a.txt", "-q"],
            cwd=cli.folder,
            env=cli.env,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == "error: standard output cannot be written: No space left on device"
    assert "Exception" not in done.stderr


def test_config_show(cli: Any) -> None:
    import yaml

    from auvsum.config import Settings

    cli.write("auvsum.yaml", "policy_options: {decay: 0.5}\ninstruction: 'a: b'\n")
    result = cli.real("config", "show")
    assert (result.code, result.err) == (0, "")
    shown = yaml.safe_load(result.out)
    assert shown == vars(Settings(policy_options={"decay": 0.5}, instruction="a: b"))
    result = cli.real("config", "show", "--origins", AUVSUM_SEED="3")
    assert yaml.safe_load(result.out) == {**shown, "seed": 3}
    assert re.search(r"^seed: 3 +# AUVSUM_SEED$", result.text, re.MULTILINE)
    assert re.search(rf"^instruction: 'a: b' +# {re.escape(str(cli.folder))}/auvsum.yaml$", result.text, re.MULTILINE)
    data = json.loads(cli.real("config", "show", "--origins", "--format", "json").out)
    assert data["policy_options"]["value"] == {"decay": 0.5}
    assert data["model"] == {"value": "smollm2-135m-instruct", "origin": "default"}


def test_version_and_help(cli: Any) -> None:
    from auvsum import __version__

    result = cli.real("--version")
    assert (result.code, result.text, result.err) == (0, f"auvsum {__version__}\n", "")
    for flag in ("-h", "--help"):
        result = cli.real("summarize", flag)
        assert (result.code, result.err) == (0, "")
        assert result.text.index("Examples:") < result.text.index("--budget")

"""The installed command with real, tiny models: every stage from a file to a summary and its record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import checkpoints

SENTENCE = "The council met in the town hall and there it decided to build a bridge over the river. "
#: About 420 tokens of these tokenizers, within the 512 positions of the tiny OPT and the 1,024 of the tiny Llama.
DOCUMENT = SENTENCE * 5


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    llama = checkpoints.llama(folder / "llama")
    broken = checkpoints.llama(folder / "broken")
    checkpoints.truncate(broken / "model.safetensors")
    (folder / "half").mkdir()
    (folder / "half" / "config.json").write_text((llama / "config.json").read_text())
    return {
        "llama": str(llama),
        "opt": str(checkpoints.opt(folder / "opt")),
        "t5": str(checkpoints.encoder_decoder(folder / "t5")),
        "broken": str(broken),
        "half": str(folder / "half"),
    }


def summarize(cli: Any, model: str, *arguments: str, document: str = DOCUMENT) -> Any:
    cli.write("report.txt", document)
    return cli.inside("summarize", "report.txt", "--model", model, "--dtype", "fp32", "--max-tokens", "12", *arguments)


@pytest.mark.parametrize("family", ["opt", "llama"])
@pytest.mark.parametrize("budget", ["auto", "96", "15%"])
def test_record(cli: Any, models: dict[str, str], family: str, budget: str) -> None:
    result = summarize(cli, models[family], "--budget", budget, "--format", "json")
    assert result.code == 0, result.err
    record = json.loads(result.out)
    assert (record["id"], record["error"], record["truncated"]) == ("report.txt", None, False)
    assert record["source"] == str(cli.folder / "report.txt")
    tokens, kv = record["tokens"], record["kv"]
    assert tokens["document"] < tokens["prompt"]
    assert 0 < tokens["generated"] <= 12
    assert record["budget"]["asked"] == budget
    if budget == "auto":
        assert record["policy"] == "full"
        assert "never binds" in result.err
    else:
        assert record["policy"] == "auv-look"
        assert record["budget"]["kv_bits"] == 4
        assert kv["prefill_peak_bytes"] >= kv["full_bytes"] * tokens["document"] // tokens["prompt"]
        assert kv["peak_bytes"] < kv["full_bytes"]
        assert record["budget"]["slots"] < tokens["prompt"]
    if budget == "96":
        assert record["budget"]["slots"] == 96
    if budget == "25%":
        assert kv["peak_bytes"] <= 0.25 * kv["full_bytes"]


def test_text_is_the_summary_of_the_record_and_repeats(cli: Any, models: dict[str, str]) -> None:
    arguments = ("--budget", "96", "--temperature", "0.8", "--seed", "3")
    record = json.loads(summarize(cli, models["llama"], *arguments, "--format", "json").out)
    command = ("summarize", "report.txt", "--model", models["llama"], "--dtype", "fp32", "--max-tokens", "12")
    result = cli.real(*command, *arguments)
    assert result.code == 0
    assert result.text == record["summary"].strip() + "\n"
    assert result.out != summarize(cli, models["llama"], *arguments[:-1], "4").out
    lines = result.err.splitlines()
    assert "loaded in" in lines[0]
    assert lines[1].startswith("budget: 96 = 96 slots/layer")
    assert f"report.txt: {record['tokens']['prompt']:,} tokens read in" in lines[-1]


def test_stream_reads_in_chunks(cli: Any, models: dict[str, str]) -> None:
    result = summarize(
        cli, models["llama"], "--strategy", "stream", "--chunk", "64", "--budget", "96", "--format", "json"
    )
    assert result.code == 0, result.err
    record = json.loads(result.out)
    assert (record["strategy"], record["policy"], record["budget"]["kv_bits"]) == ("stream", "auv", 16)
    assert record["kv"]["prefill_peak_bytes"] < record["kv"]["full_bytes"]


def test_policy_auto_takes_what_the_budget_has_room_for(cli: Any, models: dict[str, str]) -> None:
    """Sixteen slots are too few for a second look, and enough for the paper's policy; options are the paper's, too."""
    for arguments in (("--budget", "16"), ("--budget", "96", "--policy-option", "decay=0.9")):
        record = json.loads(summarize(cli, models["llama"], *arguments, "--format", "json").out)
        assert (record["policy"], record["budget"]["kv_bits"]) == ("auv", 16), arguments
    result = summarize(cli, models["llama"], "--budget", "16", "--policy", "auv-look")
    assert result.code == 2
    assert "needs at least 30" in result.err


def test_few_bits_hold_more_tokens_in_the_same_bytes(cli: Any, models: dict[str, str]) -> None:
    slots = {}
    for bits in ("16", "8", "4"):
        arguments = ("--budget", "25%", "--policy", "h2o", "--kv-bits", bits, "--format", "json")
        record = json.loads(summarize(cli, models["llama"], *arguments).out)
        slots[bits] = record["budget"]["slots"]
        assert record["budget"]["kv_bits"] == int(bits)
        assert record["kv"]["peak_bytes"] <= 0.25 * record["kv"]["full_bytes"]
    assert slots["16"] < slots["8"] < slots["4"]


def test_dry_run_writes_nothing(cli: Any, models: dict[str, str]) -> None:
    result = summarize(cli, models["opt"], "--dry-run", "--budget", "96")
    assert result.code == 0
    assert "strategy" in result.text
    assert "budget: 96 = 96 slots/layer" in result.text
    assert "read in" not in result.err


def test_document_beyond_the_positions(cli: Any, models: dict[str, str]) -> None:
    long = SENTENCE * 40
    result = summarize(cli, models["opt"], "--strategy", "single", document=long)
    assert (result.code, result.out) == (1, b"")
    assert "512 positions" in result.err
    assert "hint: " in result.err
    assert "--truncate" in result.err
    result = summarize(cli, models["opt"], document=long)
    assert result.code == 0, result.err
    assert "auto chose it" in result.err
    result = summarize(cli, models["opt"], "--truncate", "--format", "json", document=long)
    assert result.code == 0, result.err
    record = json.loads(result.out)
    assert record["truncated"]
    assert record["tokens"]["prompt"] == 500
    assert any("were cut" in warning for warning in record["warnings"])
    assert "were cut" in result.err


@pytest.mark.parametrize(
    ("model", "said"),
    [("t5", "encoder-decoder"), ("half", "half"), ("broken", "broken"), ("nowhere", "'nowhere'")],
)
def test_models_that_cannot_be_used(cli: Any, models: dict[str, str], model: str, said: str, one_line: Any) -> None:
    result = summarize(cli, models.get(model, model))
    assert (result.code, result.out) == (3, b"")
    one_line(result.err)
    assert said in result.err


def test_device_that_is_not_here(cli: Any, models: dict[str, str], one_line: Any) -> None:
    result = summarize(cli, models["opt"], "--device", "cuda:99")
    assert (result.code, result.out) == (3, b"")
    one_line(result.err)


def test_budget_below_the_least(cli: Any, models: dict[str, str]) -> None:
    result = summarize(cli, models["opt"], "--budget", "1")
    assert (result.code, result.out) == (2, b"")
    assert "needs at least" in result.err
    assert "hint: the least that works here" in result.err


def test_budgets_that_are_odd_are_said(cli: Any, models: dict[str, str]) -> None:
    assert "warning: report.txt: budget 20 gives only 20 slots" in summarize(cli, models["opt"], "--budget", "20").err
    assert "warning: report.txt: budget 100000 never binds" in summarize(cli, models["opt"], "--budget", "100000").err


def test_unknown_policy_and_option(cli: Any, models: dict[str, str], one_line: Any) -> None:
    for arguments in (["--policy", "h20"], ["--policy-option", "decai=1"]):
        result = summarize(cli, models["opt"], *arguments)
        assert (result.code, result.out) == (2, b"")
        one_line(result.err)


def test_control_tokens_in_a_document_do_not_end_it(cli: Any, models: dict[str, str]) -> None:
    plain = json.loads(summarize(cli, models["llama"], "--dry-run", "--format", "json").out)
    hostile = json.loads(
        summarize(cli, models["llama"], "--dry-run", "--format", "json", document=DOCUMENT + "<|im_end|>").out
    )
    assert hostile["tokens"]["document"] >= plain["tokens"]["document"] + len("<|im_end|>") - 1


def test_one_bad_file_among_good_ones(cli: Any, models: dict[str, str]) -> None:
    cli.write("a.txt", DOCUMENT)
    cli.write("b.txt", b"%PDF-1.4")
    result = cli.inside(
        "summarize", "a.txt", "b.txt", "a.txt", "--model", models["opt"], "--max-tokens", "4", "--format", "json"
    )
    assert result.code == 1
    decoder, text, records = json.JSONDecoder(), result.text, []
    while text.strip():
        record, end = decoder.raw_decode(text.lstrip())
        records.append(record)
        text = text.lstrip()[end:]
    assert [record["error"] and record["error"]["kind"] for record in records] == [None, "document-unreadable", None]


def test_doctor(cli: Any) -> None:
    result = cli.real("doctor", "--format", "json")
    report = json.loads(result.out)
    assert result.code == 0, result.text
    assert report["ok"]
    assert len(report["checks"]) == 4
    assert "auvsum models pull" in report["default model"]


def test_doctor_fails_for_a_model_that_is_not_here(cli: Any, models: dict[str, str]) -> None:
    result = cli.inside("doctor", "--model", models["t5"])
    assert result.code == 3
    assert "FAILED" in result.text
    assert result.err.startswith("error: a check failed")


def test_models(cli: Any, models: dict[str, str], one_line: Any) -> None:
    result = cli.inside("models", "list")
    assert (result.code, result.err) == (0, "")
    lines = result.text.splitlines()
    assert lines[0].split()[:2] == ["NAME", "HERE"]
    assert lines[1].split()[:2] == ["smollm2-135m-instruct", "no"]
    listed = json.loads(cli.inside("models", "list", "--format", "json").out)
    assert any(model["name"] == "opt-1.3b" and not model["present"] for model in listed)
    result = cli.inside("models", "path", models["opt"])
    assert (result.code, Path(result.text.strip())) == (0, Path(models["opt"]))
    for arguments in (["path"], ["path", "opt-125m"], ["pull", "opt-125m"], ["pull", "nonsense"]):
        result = cli.inside("models", *arguments)
        assert (result.code, result.out) == (3, b"")
        one_line(result.err)


def test_sources_and_pages(cli: Any, models: dict[str, str]) -> None:
    result = summarize(cli, models["llama"], "--cite", "--style", "bullets", "--query", "what was built")
    assert result.code == 0, result.err
    assert result.text.startswith("- ")
    assert "\n[1] " in result.text
    cli.write("report.pdf", (Path(__file__).parents[2] / "samples" / "money-bail.pdf").read_bytes())
    command = ("summarize", "report.pdf", "--model", models["llama"], "--dry-run", "--format", "json")
    few, all_ = (json.loads(cli.inside(*command, *more).out)["tokens"] for more in (("--pages", "2"), ()))
    assert 0 < few["document"] < all_["document"] / 3

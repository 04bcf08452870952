"""`auvsum policies`: what can be compared, with its options, where it is from and where it evicts."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from auvsum._env import prepare
from auvsum.cli import options
from auvsum.cli.guard import guarded
from auvsum.ui.console import Console

if TYPE_CHECKING:
    from auvsum.cache.policy import Policy


def command(
    format: options.FormatOption = options.Format.text,
    color: options.ColorOption = options.Color.auto,
    debug: options.Debug = False,
) -> int:
    """List the eviction policies with their options and defaults.

    \b
    Examples:
      auvsum policies
      auvsum policies --format json | jq -r '.[].name'
    """
    console = Console(color.value, debug=debug)

    def work() -> int:
        records = _records()
        if format is options.Format.json:
            console.write(json.dumps(records, ensure_ascii=False, indent=2) + "\n")
        else:
            console.write("\n".join(map(_text, records)))
        return 0

    return guarded(console, work)


def _records() -> list[dict[str, Any]]:
    prepare()
    from auvsum.cache.policy import ALIASES, policy_class, policy_names

    return [
        _record(policy_class(name), [alias for alias, target in ALIASES.items() if target == name])
        for name in policy_names()
    ]


def _record(policy: type[Policy], aliases: list[str]) -> dict[str, Any]:
    chosen = policy()
    return {
        "name": policy.name,
        "aliases": aliases,
        "options": {field.name: field.default for field in dataclasses.fields(policy) if field.init},
        "paper": policy.paper,
        "evicts": policy.evicts,
        "least_slots": chosen.least_slots,
        "state_bytes_per_slot": policy.state_element * len(chosen.state),
        "streams": policy.streams,
        "one_set_per_layer": policy.one_set,
    }


def _text(record: dict[str, Any]) -> str:
    names = ", ".join([record["name"], *record["aliases"]])
    given = ", ".join(f"{name}={_value(value)}" for name, value in record["options"].items())
    reads = "in one pass or in chunks" if record["streams"] else "in one pass only"
    lines = {
        "options": given or "none",
        "evicts": record["evicts"] + (" (one set for all heads of a layer)" if record["one_set_per_layer"] else ""),
        "reads": reads,
        "least": f"{record['least_slots']} slots, {record['state_bytes_per_slot']} bytes of state a slot and head",
        "paper": record["paper"],
    }
    return names + "\n" + "".join(f"  {key:<8} {value}\n" for key, value in lines.items())


def _value(value: Any) -> str:
    return "auto" if value is None else str(value)

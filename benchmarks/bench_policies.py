"""What every policy costs at the same bytes: memory held, at the worst moment, for its state; time to read and write.

    python benchmarks/bench_policies.py                                     # the default model
    python benchmarks/bench_policies.py --shape opt-125m --prompt 1900      # random weights of a real shape

One model, one prompt, one engine; runs are interleaved, medians are shown. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import common
from bench_decode import Run, load_model


def case(model: Any, shape: Any, ids: list[int], new: int, name: str, share: str) -> Callable[[], dict[str, Any]]:
    """One policy at one share of the full cache's bytes: reads the prompt, writes `new` tokens."""
    from auvsum.budget import parse_budget, resolve
    from auvsum.cache.policy import make_policy
    from auvsum.engine.generate import Engine, Request
    from auvsum.events import Finished, Prefilled, Token

    policy = make_policy(name)
    cost = policy.slot_cost(kv_heads=shape.kv_heads, head_dim=shape.head_dim, element_bytes=shape.element_bytes)
    slots = policy.slots_to_hold(len(ids) + new)
    if name != "full":
        slots = resolve(
            parse_budget(share),
            shape=shape,
            cost=cost,
            prompt_tokens=len(ids),
            max_new_tokens=new,
            least_slots=policy.least_slots,
            slots_to_hold=policy.slots_to_hold,
            paper_slots=policy.paper_slots,
            free_bytes=0,
        ).slots
    layer_slots = policy.layer_slots(slots, shape.layers, len(ids))
    state = 4 * len(policy.state) * shape.kv_heads * sum(map(policy.capacity, layer_slots))

    def run() -> dict[str, Any]:
        clock, row = Run(), {"slots": slots, "state_bytes": state}
        for event in Engine(model, policy).run([Request(ids, slots=slots, max_new_tokens=new)]):
            if isinstance(event, Token):
                clock.tick()
            elif isinstance(event, Prefilled):
                row["prefill_peak_bytes"] = event.prefill_peak_bytes
            elif isinstance(event, Finished):
                row["resident_bytes"] = event.kv_bytes
        return {**row, "prefill_s": clock.prefill_seconds, "decode_tokens_per_s": clock.decode_rate}

    return run


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_model_arguments(parser)
    parser.add_argument("--policies", help="names, separated by commas; all without it", metavar="NAMES")
    parser.add_argument("--budgets", default="2%,4%,10%", metavar="SHARES")
    parser.add_argument("--prompt", type=int, default=1900, metavar="TOKENS")
    parser.add_argument("--new-tokens", type=int, default=32, metavar="TOKENS")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--dtype", choices=("auto", "bf16", "fp16", "fp32"), default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.new_tokens < 2:
        parser.error("--new-tokens must be at least 2: the first one belongs to the prefill")
    return options


def main() -> None:
    from auvsum.cache.policy import policy_names
    from auvsum.errors import BudgetError

    options = parse()
    model, shape, ids = load_model(options)
    model.generation_config.eos_token_id = None
    names = options.policies.split(",") if options.policies else policy_names()
    cases, notes = {}, {}
    for name in names:
        for share in ["100%"] if name == "full" else options.budgets.split(","):
            try:
                cases[f"{name} {share}"] = case(model, shape, ids, options.new_tokens, name, share)
            except BudgetError as error:
                notes[f"{name} {share}"] = error.hint
    results, failed = common.interleave(cases, options.repetitions)
    notes.update(failed)

    rows: list[dict[str, Any]] = []
    for label in [*cases, *(label for label in notes if label not in cases)]:
        name, share = label.split()
        row: dict[str, Any] = {"policy": name, "budget": share, "note": notes.get(label, "")}
        if runs := results.get(label):
            row |= runs[0]
            for key, digits in (("prefill_s", 4), ("decode_tokens_per_s", 2)):
                row[key] = round(common.median([run[key] for run in runs]), digits)
        rows.append(row)

    def cells(row: dict[str, Any]) -> list[str]:
        head = [row["policy"], row["budget"]]
        if "slots" not in row:
            return [*head, *["-"] * 6, row["note"]]
        sizes = [f"{row[key] / 2**20:.2f}" for key in ("resident_bytes", "state_bytes", "prefill_peak_bytes")]
        return [*head, str(row["slots"]), *sizes, f"{row['prefill_s']:.2f}", f"{row['decode_tokens_per_s']:.1f}", ""]

    what = options.shape or options.model or "default model"
    print(f"{what}, {str(model.dtype).removeprefix('torch.')}, {model.device}: {len(ids)} tokens read, "
          f"{options.new_tokens} written, median of {options.repetitions}\n")  # fmt: skip
    headings = [
        "policy",
        "bytes",
        "slots",
        "held MiB",
        "state MiB",
        "prefill peak MiB",
        "prefill s",
        "decode tok/s",
        "",
    ]
    common.print_table(headings, [cells(row) for row in rows])
    print()
    common.print_json(
        {
            "benchmark": "policies",
            "model": what,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
            "prompt_tokens": len(ids),
            "new_tokens": options.new_tokens,
            "repetitions": options.repetitions,
            "full_bytes": shape.full_bytes(len(ids)),
            "machine": common.machine(),
            "versions": common.versions(),
            "rows": rows,
        }
    )


if __name__ == "__main__":
    main()

"""How long `auvsum` takes before it does anything: `--help`, completion, a usage error. Goal: 0.3 s, and no torch.

    python benchmarks/bench_startup.py

A table for people, then one JSON line. Commands take turns, so that a busy moment hits all of them; processor time is
shown beside the clock, since it hardly depends on what else the machine is doing.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time

REPETITIONS = 9
GOAL = 0.3
COMMANDS: dict[str, tuple[list[str], dict[str, str]]] = {
    "python -c pass": ([sys.executable, "-c", "pass"], {}),
    "auvsum --help": ([sys.executable, "-m", "auvsum", "--help"], {}),
    "auvsum summarize --help": ([sys.executable, "-m", "auvsum", "summarize", "--help"], {}),
    "auvsum summarize missing.txt": ([sys.executable, "-m", "auvsum", "summarize", "missing.txt"], {}),
    "completion": (
        [sys.executable, "-m", "auvsum"],
        {"_AUVSUM_COMPLETE": "complete_bash", "COMP_WORDS": "auvsum summ", "COMP_CWORD": "1"},
    ),
}


def seconds(command: list[str], env: dict[str, str]) -> tuple[float, float]:
    """Clock and processor time of one run."""
    begun = time.perf_counter()
    process = subprocess.Popen(command, env={**os.environ, **env}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    usage = os.wait4(process.pid, 0)[2]
    process.returncode = 0  # it has been waited for
    return time.perf_counter() - begun, usage.ru_utime + usage.ru_stime


def imports_torch(command: list[str], env: dict[str, str]) -> bool:
    timed = [command[0], "-X", "importtime", *command[1:]]
    done = subprocess.run(timed, env={**os.environ, **env}, capture_output=True, text=True, check=False)
    return any(line.split("|")[-1].strip() == "torch" for line in done.stderr.splitlines())


def main() -> None:
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
    for _ in range(REPETITIONS):
        for name, (command, env) in COMMANDS.items():
            times[name].append(seconds(command, env))
    result = {}
    print(f"{'command':<32}{'median':>9}{'best':>9}{'processor':>11}  torch?")
    for name, (command, env) in COMMANDS.items():
        heavy = imports_torch(command, env)
        clock = [clock for clock, _ in times[name]]
        median, best = statistics.median(clock), min(clock)
        cpu = statistics.median(cpu for _, cpu in times[name])
        result[name] = {
            "median_s": round(median, 3),
            "best_s": round(best, 3),
            "cpu_s": round(cpu, 3),
            "imports_torch": heavy,
        }
        print(f"{name:<32}{median:>7.3f} s{best:>7.3f} s{cpu:>9.3f} s  {'yes' if heavy else 'no'}")
    print(json.dumps({"goal_s": GOAL, "repetitions": REPETITIONS, "python": platform.python_version(), **result}))


if __name__ == "__main__":
    main()
